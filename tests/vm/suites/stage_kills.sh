# about: nt stage ended by SIGKILL, SIGINT, SIGTERM at changes drawn from the seed: the drive is staged again as it is
# drives: source
# drive: killed blank:64 serial=KILLED01 discard
# drive: kept random:32 serial=KEPT0001
# unchanged: kept source
# programs: mdadm cryptsetup:cryptsetup-bin lvm:lvm2 wipefs:util-linux sgdisk:gdisk
# modules: dm-mod
. /root/stage_kills.sh
prepare
# The first change is the last moment at which nothing is written yet; the others are spread over all there are.
killed 1 SIGTERM
killed 2 SIGKILL
for signal in SIGINT SIGKILL SIGTERM SIGKILL; do
  next 70
  killed $((3 + drawn)) $signal
done
