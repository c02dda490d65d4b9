# about: nt stage ended by each signal at every change, and by a reboot and a power cut at some: 75 minutes and more
# long
# drives: source
# drive: killed blank:64 serial=KILLED01 discard
# drive: kept random:32 serial=KEPT0001
# unchanged: kept source
# programs: mdadm cryptsetup:cryptsetup-bin lvm:lvm2 wipefs:util-linux sgdisk:gdisk
# modules: dm-mod
# guest: own
# timeout: 14400
. /root/stage_kills.sh
# NT_VM_STEP=51 begins at change 51, with one signal for each change, then the next for each.
# Five boots: after a kill at changes spread over all, and with the power cut while the drive is written.
case ${step:-0} in
  0 | 1 | 2 | 3 | 4)
    reboots=${step:-0}
    if [ $reboots = 0 ]; then prepare; else
      prepare_again
      case $reboots in
        2 | 4) is_marked && pass "the power was cut while the drive was written ($reboots)" || fail "the power was cut while the drive was written ($reboots)" ;;
      esac
      recovered "after boot $reboots"
    fi
    case $reboots in
      0 | 2 | 4) killed_only $((2 + reboots * 15)) SIGKILL ;;
      *)
        # The power goes at once, so what `again` prints is printed before.
        before >/tmp/out 2>&1; give $d gpt ext4 "unknown data"; sync
        echo "AGAIN $suite $((reboots + 1))"; sleep 1
        sectors=$(written)
        stage >/tmp/out 2>&1 &
        for try in $(seq 3000); do [ $(written) = $sectors ] || break; done
        [ $(written) = $sectors ] && fail "the power is cut while the drive is written"
        usleep $((reboots * 50000)); echo b >/proc/sysrq-trigger; sleep 60
        ;;
    esac
    again $((reboots + 1))
    ;;
esac
prepare_again
# each FROM ROUNDS SIGNALS: kills at every change from there to the last, in so many rounds, with so many signals each
each() {
  for round in $(seq 0 $(($2 - 1))); do
    change=$1
    while [ $change -lt 200 ]; do
      for nth in $(seq $((change + round)) $((change + round + $3 - 1))); do
        case $((nth % 3)) in 0) signal=SIGKILL ;; 1) signal=SIGINT ;; 2) signal=SIGTERM ;; esac
        killed $change $signal
      done
      [ $ended = 0 ] && break
      change=$((change + 1))
    done
  done
}
if [ $step -gt 5 ]; then each $step 3 1; else
  recovered "after boot 5"
  each 1 1 3
fi
[ $change -gt 40 ] && [ $change -lt 200 ] && pass "$change changes" || fail "$change changes"
