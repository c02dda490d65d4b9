# about: power cuts after a kill at five points of bind and release: the kernel has the drive again, no record holds
# long
# drive: cut random:16 serial=CUT00001
# unchanged: cut
# timeout: 300
# guest: own
dev=$(drive CUT00001)n1
at=$(address ${dev%n1})
if [ -n "$step" ]; then
  [ "$(basename "$(readlink /sys/bus/pci/devices/$at/driver)")" = nvme ] && pass "after $step: the kernel has the drive" || fail "after $step: the kernel has the drive"
  $nt release --pci $at >/tmp/out 2>&1; code=$?
  [ $code = 1 ] && grep -q "is not bound" /tmp/out && pass "after $step: nothing to release" || fail "after $step: nothing to release (exit $code)"
fi
allow
# A record that a folder outside a memory file system would have kept.
mkdir -p /run/nt
printf 'pci = "%s"\nboot = "00000000-0000-0000-0000-000000000000"\nstate = "bound"\ninstance = 1\ncontroller = "%s"\nserial = "X"\nmodel = "X"\ngroup = "1"\nlinks = []\n[[namespace]]\nname = "%s"\nnsid = 1\nsize = 1\n' \
  $at ${dev%n1} $dev >/run/nt/$at.toml
$nt list >/tmp/out 2>&1
grep -q "stale record of X X (it is of another boot)" /tmp/out && pass "a record of another boot is stale" || fail "a record of another boot is stale"
/root/udev/nt-vfio-group $(basename $(readlink /sys/bus/pci/devices/$at/iommu_group)) && fail "the rule does not believe it" || pass "the rule does not believe it"
works "bind writes over it" $nt bind $dev
works "release" $nt release $dev
dev=$(drive CUT00001)n1
case $step in
  '') NT_TEST_KILL_AT=3:SIGKILL $nt bind $dev; again override ;;
  override) NT_TEST_KILL_AT=5:SIGKILL $nt bind $dev; again unbound ;;
  unbound) $nt bind $dev; again bound ;;
  bound) $nt bind $dev; NT_TEST_KILL_AT=3:SIGKILL $nt release $dev; again releasing ;;
  releasing) $nt bind $dev; NT_TEST_KILL_AT=4:SIGKILL $nt release $dev; again released ;;
  *) ;;
esac
