# about: reads per second through the kernel and through VFIO
# long
# drives: exp
dev=$(drive EXP0001)n1
echo "INFO clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
allow
# Twice, so that both see what else the host does; fio the second time without its own look at the clock.
for clock in 0 1; do
  echo "INFO fio gtod_reduce=$clock"
  bench_kernel --gtod_reduce=$clock
  works "bind" $nt bind $dev
  bench_vfio
  works "release" $nt release $dev
  dev=$(drive EXP0001)n1
done
