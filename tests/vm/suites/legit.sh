# about: what must stay easy: odd serials, two namespaces, short addresses, a drive before the system's, three at once, one of a guest's
# drive: early random:8 serial=EARLY001 first
# drive: spaced random:8 serial=My%20Drive%207 smart_critical_warning=2
# drive: umlaut random:8 serial=Größe-Ω1
# drive: twofold random:16 serial=TWO00001 ns= ns=
# drive: vm random:8 serial=VM000001
# unchanged: early spaced umlaut twofold twofold.2 vm
# timeout: 400
# programs: udevadm:udev
allow
# cycle NAME DEVICE [ALIAS…]: bind, read as a plain user by each name, release
cycle() {
  title=$1 d=$2; shift 2
  sum=$(sha256sum </dev/$d)
  works "$title: bind" sh /root/scripts/bind-vfio.sh $d
  for alias in $d "$@"; do works "$title: a plain user reads it as $alias" asuser nvme_probe identify $alias /tmp/id; done
  $nt list >/tmp/out 2>/dev/null
  grep -A1 "bound to vfio-pci (was ${d%n*})" /tmp/out | grep -q "health: .* °C.* used.* spare" && pass "$title: its health is listed" || fail "$title: its health is listed"
  works "$title: release" sh /root/scripts/release-vfio.sh $d
  [ "$sum" = "$(sha256sum </dev/$d)" ] && pass "$title: back at once, the same bytes" || fail "$title: back at once, the same bytes"
}
# by SERIAL: also one with spaces or more than ASCII
by() { for c in /sys/class/nvme/nvme*; do case "$(cat $c/serial)" in "$1"*) basename $c ;; esac; done; }
[ "$(drive EARLY001)" = nvme0 ] && pass "a drive comes before the system's" || echo "INFO the early drive is $(drive EARLY001)"
early=$(drive EARLY001)n1
cycle "before the system's" $early $(address ${early%n1}) $(address ${early%n1} | cut -c6-) /dev/$early
cycle "a serial with spaces" $(by "My Drive 7")n1
u=$(by "Größe"); [ -n "$u" ] || u=$(by "Gr")
[ -n "$u" ] && cycle "a serial with more than ASCII" ${u}n1 || echo "SKIP a serial with more than ASCII: no such drive"
two=$(drive TWO00001)
if [ -b /dev/${two}n2 ]; then
  works "two namespaces: bind" $nt bind ${two}n2
  works "two namespaces: the second" asuser nvme_probe identify ${two}n2 /tmp/second
  works "two namespaces: the first" asuser nvme_probe identify ${two}n1 /tmp/first
  works "two namespaces: release by the first" $nt release ${two}n1
else
  echo "SKIP two namespaces"
fi

# Three at once, another one with vfio-pci for a guest, and each is given back alone.
guest=$(address $(drive VM000001))
echo vfio-pci >/sys/bus/pci/devices/$guest/driver_override
echo $guest >/sys/bus/pci/drivers/nvme/unbind
echo $guest >/sys/bus/pci/drivers_probe
one=$(address $(drive EARLY001)) two=$(address $(by "My Drive 7")) three=$(address $(drive TWO00001)) # names are given again
for d in $one $two $three; do works "three at once: bind $d" $nt bind $d; done
[ $($nt list 2>/dev/null | grep -c "bound to vfio-pci") = 3 ] && pass "three are listed" || { $nt list >/tmp/out 2>&1; fail "three are listed"; }
$nt list 2>/dev/null | grep -A1 "My Drive 7 bound" | grep -q "CRITICAL: temperature out of range" && pass "the warning of one of them" || { $nt list >/tmp/out 2>&1; fail "the warning of one of them"; }
for d in $three $one $two; do works "three at once: release $d" $nt release $d; done
[ "$(basename $(readlink /sys/bus/pci/devices/$guest/driver))" = vfio-pci ] && pass "the guest's drive is the guest's still" || fail "the guest's drive is the guest's still"
works "the guest's drive, once it is named" $nt release --pci $guest

# Records: root's for all, a user's own, and those of older versions.
works "list and check as a plain user" asuser "$nt list"

# With udev, which runs the rule at each event.
daemon=$(ls /usr/bin/udevadm 2>/dev/null)
if [ -n "$daemon" ] && ln -sf $daemon /tmp/systemd-udevd && /tmp/systemd-udevd --version >/tmp/out 2>&1; then
  mkdir -p /run/udev/rules.d
  cp /root/udev/70-nt-vfio.rules /run/udev/rules.d/
  /tmp/systemd-udevd --daemon >/tmp/out 2>&1 && pass "udev runs" || fail "udev runs"
  d=$(drive EARLY001)n1
  at=$(address ${d%n1}); group=$(basename $(readlink /sys/bus/pci/devices/$at/iommu_group))
  guests=$(basename $(readlink /sys/bus/pci/devices/$guest/iommu_group))
  works "udev: bind" $nt bind $d
  echo vfio-pci >/sys/bus/pci/devices/$guest/driver_override
  echo $guest >/sys/bus/pci/drivers/nvme/unbind
  echo $guest >/sys/bus/pci/drivers_probe
  udevadm settle; udevadm trigger --action=change --subsystem-match=vfio; udevadm settle
  stat -c '%G %a %n' /dev/vfio/* >/tmp/out
  [ "$(stat -c %G:%a /dev/vfio/$group)" = nt:660 ] && pass "udev: nt's group is nt's" || fail "udev: nt's group is nt's"
  [ "$(stat -c %G /dev/vfio/$guests)" = root ] && pass "udev: the guest's is root's" || fail "udev: the guest's is root's"
  works "udev: a plain user reads it" asuser nvme_probe identify $at /tmp/id
  works "udev: release" $nt release $at
  works "udev: the guest's" $nt release --pci $guest
  udevadm settle
  kill $(pidof systemd-udevd) 2>/dev/null
  rm -rf /run/udev
else
  sed 's/^/INFO /' /tmp/out
  echo "SKIP udev: not in the guest"
fi
