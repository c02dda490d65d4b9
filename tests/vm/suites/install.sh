# about: scripts/install.sh as a whole, in a folder that it takes for the machine: what it makes, keeps, refuses and removes
# programs: install:coreutils stat:coreutils find:findutils getent:libc-bin groupadd:passwd groupdel:passwd udevadm:udev
# timeout: 300
m=/tmp/machine
# inside COMMAND…: with /tmp/machine as the root; only its own /etc, /var and /usr/lib/udev can be written
inside() { chroot $m /bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"; }
machine() {
  rm -rf $m/etc $m/var $m/usr/lib/udev
  mkdir -p $m/bin $m/sbin $m/lib $m/lib64 $m/usr/bin $m/usr/lib $m/usr/lib/udev $m/root $m/proc $m/dev $m/tmp $m/run $m/etc $m/var/lib
  printf 'root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n' >$m/etc/passwd
  printf 'root:x:0:\nuser:x:1000:\n' >$m/etc/group
}
# What there is, but what groupadd leaves of its own.
tree() { (cd $m && find etc var usr/lib/udev ! -name 'group*' ! -name 'gshadow*' ! -name '.pwd.lock' ! -name subgid* | sort); }
# mode FILE MODE OWNER
mode() { [ "$(/usr/bin/stat -c '%a %U %G' $m/$1)" = "$2 root root" ] && pass "$1 is $2" || { /usr/bin/stat $m/$1 >/tmp/out 2>&1; fail "$1 is $2"; }; }
machine
for folder in bin sbin lib lib64 usr/bin root proc dev; do [ ! -d /$folder ] || mount --bind /$folder $m/$folder; done
for folder in /usr/lib/*/; do
  name=${folder#/usr/lib/}; name=${name%/}
  [ $name = udev ] || { mkdir -p $m/usr/lib/$name; mount --bind /usr/lib/$name $m/usr/lib/$name; }
done
mount -t tmpfs tmpfs $m/tmp
inside getent group root >/tmp/out 2>&1 && inside sh -c 'command -v groupadd groupdel install' >/tmp/out 2>&1 || { fail "the folder is a machine"; return; }

for who in user; do
  tree >/tmp/before
  chroot $m /bin/su $who -s /bin/sh -c "sh /root/scripts/install.sh" >/tmp/out 2>&1; code=$?
  tree | cmp -s - /tmp/before && [ $code = 1 ] && pass "a plain user changes nothing" || { echo "exit $code" >>/tmp/out; fail "a plain user changes nothing"; }
done
tree >/tmp/fresh
works "install" inside sh /root/scripts/install.sh
grep -q "^done; add yourself" /tmp/out && pass "says what to do next" || fail "says what to do next"
mode etc/udev/rules.d/70-nt-vfio.rules 644
mode usr/lib/udev/nt-vfio-group 755
mode etc/security/limits.d/70-nt.conf 644
mode etc/nt/drives.toml 644
mode etc/nt 755
mode var/lib/nt 755
mode var/lib/nt/system 755
cmp $m/usr/lib/udev/nt-vfio-group /root/udev/nt-vfio-group >/tmp/out 2>&1 && cmp $m/etc/udev/rules.d/70-nt-vfio.rules /root/udev/70-nt-vfio.rules >/tmp/out 2>&1 && pass "rule and program are whole" || fail "rule and program are whole"
grep -q '^@nt - memlock unlimited' $m/etc/security/limits.d/70-nt.conf && pass "the limit is the group's" || fail "the limit is the group's"
inside getent group nt >/tmp/out && pass "the group is there" || fail "the group is there"
inside /usr/lib/udev/nt-vfio-group 0 && fail "the program runs and denies" || pass "the program runs and denies"
tree >/tmp/installed
works "install again" inside sh /root/scripts/install.sh
tree | cmp -s - /tmp/installed && pass "nothing more is there" || fail "nothing more is there"
works "remove" inside sh /root/scripts/install.sh --remove
tree >/tmp/removed
grep -vE '^(etc/(udev|udev/rules.d|security|security/limits.d))$' /tmp/removed | cmp - /tmp/fresh >/tmp/out 2>&1 && pass "nothing is left but folders of other programs" || { diff /tmp/fresh /tmp/removed >/tmp/out; fail "nothing is left but folders of other programs"; }
inside getent group nt >/tmp/out && fail "the group is gone" || pass "the group is gone"
works "remove again" inside sh /root/scripts/install.sh --remove

# What is the owner's stays: a list with entries, records, a group that was there before.
machine
inside groupadd --system nt
sed -i 's/^nt:.*/&user,other/' $m/etc/group; echo "nt:x:998:$(inside getent group nt | cut -d: -f3)::/:/bin/sh" >>$m/etc/passwd
works "install where the group is there" inside sh /root/scripts/install.sh
grep -q "was there before: .*(nt other user)" /tmp/out && pass "and says who may use drives now" || fail "and says who may use drives now"
printf '  [[drive]] # mine\npci = "0000:02:00.0"\nserial = "S"\nmodel = "M"\nnamespace = 1\nsize = 1\n' >>$m/etc/nt/drives.toml
mkdir -p $m/var/lib/nt/system/S; echo {} >$m/var/lib/nt/system/S/m.gguf.json
cp $m/etc/nt/drives.toml /tmp/list.kept
works "install again over a list" inside sh /root/scripts/install.sh
cmp /tmp/list.kept $m/etc/nt/drives.toml >/tmp/out 2>&1 && pass "the list is as it was" || fail "the list is as it was"
works "remove, with a list and records" inside sh /root/scripts/install.sh --remove
cmp /tmp/list.kept $m/etc/nt/drives.toml >/tmp/out 2>&1 && [ -f $m/var/lib/nt/system/S/m.gguf.json ] && inside getent group nt >/dev/null && pass "list, records and group are kept" || fail "list, records and group are kept"
[ ! -e $m/usr/lib/udev/nt-vfio-group ] && [ ! -e $m/etc/udev/rules.d/70-nt-vfio.rules ] && [ ! -e $m/etc/security/limits.d/70-nt.conf ] && pass "what opens drives is gone" || fail "what opens drives is gone"

# A list that others could write, and places where older versions let members write.
machine
mkdir -p $m/etc/nt; echo '# by a member' >$m/etc/nt/drives.toml; chmod 666 $m/etc/nt/drives.toml
works "install over a list that others could write" inside sh /root/scripts/install.sh
grep -q "look through its entries" /tmp/out && pass "it says so" || fail "it says so"
grep -q "by a member" $m/etc/nt/drives.toml.others && ! grep -q "by a member" $m/etc/nt/drives.toml && pass "and believes none of them" || fail "and believes none of them"
mode etc/nt/drives.toml 644
for plant in "ln -s /etc $m/var/lib/nt/system" "ln -s /nothing $m/var/lib/nt/system" "install -d -o 1000 $m/var/lib/nt/system" "touch $m/var/lib/nt/system"; do
  machine
  mkdir -p $m/var/lib/nt; chown 0:1000 $m/var/lib/nt; chmod 2775 $m/var/lib/nt; chmod 700 $m/etc/nt 2>/dev/null
  $plant; [ "${plant%% *}" != touch ] || chown 1000 $m/var/lib/nt/system
  before=$(/usr/bin/stat -c '%a %u %g' $m/etc)
  inside sh /root/scripts/install.sh >/tmp/out 2>&1; code=$?
  [ $code = 1 ] && grep -q "is a link or not root's" /tmp/out && [ "$before" = "$(/usr/bin/stat -c '%a %u %g' $m/etc)" ] && pass "refused: ${plant%% /*}" || { echo "exit $code" >>/tmp/out; fail "refused: ${plant%% /*}"; }
  [ "$(/usr/bin/stat -c %a $m/var/lib/nt)" = 755 ] && pass "and the members' place is closed" || fail "and the members' place is closed"
done
for mounted in $(awk -v m=$m '$2 ~ "^"m {print $2}' /proc/mounts | sort -r); do umount $mounted; done
