# about: nt stage ended by each signal at every change, and by a reboot and a power cut at some: an hour
# long
# drives: source
# drive: killed blank:64 serial=KILLED01 discard
# drive: kept random:32 serial=KEPT0001
# unchanged: kept source
# programs: mdadm cryptsetup:cryptsetup-bin lvm:lvm2 wipefs:util-linux sgdisk:gdisk
# modules: dm-mod
# guest: own
# timeout: 7200
. /root/stage_kills.sh
# Five boots: after a kill at changes spread over all, and with the power cut while the drive is written.
case ${step:-0} in
  0 | 1 | 2 | 3 | 4)
    reboots=${step:-0}
    if [ $reboots = 0 ]; then prepare; else
      prepare_again
      recovered "after boot $reboots"
    fi
    case $reboots in
      0 | 2 | 4) killed_only $((2 + reboots * 15)) SIGKILL ;;
      *) before >/dev/null 2>&1; { stage >/tmp/out 2>&1 & sleep $reboots; } ;;
    esac
    again $((reboots + 1))
    ;;
esac
prepare_again
recovered "after boot 5"
change=1
while [ $change -lt 200 ]; do
  for signal in SIGKILL SIGINT SIGTERM; do killed $change $signal; done
  [ $ended = 0 ] && break
  change=$((change + 1))
done
[ $change -gt 40 ] && [ $change -lt 200 ] && pass "$change changes" || fail "$change changes"
