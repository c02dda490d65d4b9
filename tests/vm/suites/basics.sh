# about: refusals, bind, reads compared with the kernel's, two processes, kill, release
# drives: exp meta zns fs sib other
boot=$(drive BOOT0001) exp=$(drive EXP0001) fs=$(drive FS0001)
dev=${exp}n1
for c in /sys/class/nvme/nvme*; do echo "INFO $(basename $c) $(cat $c/serial) $(basename $(readlink $c/device)) group $(basename $(readlink $c/device/iommu_group))"; done

rm -f $list
refused "not on the list" "allowlist" $nt bind $dev
allow
before=$(sha256sum /dev/$dev | cut -c1-64)
refused "boot drive" "mounted at /" $nt bind ${boot}n1
for d in META0001 ZNS0001 SIB0001; do
  n=$(drive $d)n1; [ -b /dev/$n ] || { echo "SKIP $d: no such drive"; continue; }
  $nt check "$n" >/tmp/out 2>&1
  code=$?
  sed "s/^/INFO $d /" /tmp/out
  case $d:$code in
    META*:3) grep -q format: /tmp/out && pass "metadata and PI" || fail "metadata and PI" ;;
    ZNS*:3) grep -q format: /tmp/out && pass "zoned" || fail "zoned" ;;
    SIB*:3) grep -q sibling: /tmp/out && pass "sibling in the group" || fail "sibling in the group" ;;
    *) fail "$d is not refused" ;;
  esac
done
refused "file system signature" "it holds ext4" $nt bind ${fs}n1
mkdir -p /mnt/fs; mount -t ext4 /dev/${fs}n1 /mnt/fs
refused "mounted" "is mounted at /mnt/fs" $nt bind ${fs}n1
head -c 9000001 /dev/urandom >/mnt/fs/a; cp /mnt/fs/a /tmp/file.copy
works "extents of a file" $nt extents /mnt/fs/a -o /tmp/manifest.json
umount /mnt/fs
sed '/FS0001/,/holds/s/holds = .*/holds = ["ext4"]/' $list >/etc/nt/fs.toml
works "bind a drive that holds the file" $nt bind ${fs}n1 --allow /etc/nt/fs.toml
works "the file by its extents" nvme_probe file ${fs}n1 /tmp/manifest.json /tmp/file.copy
works "release the drive that holds the file" $nt release ${fs}n1
fs=$(drive FS0001)
dd if=/dev/zero of=/dev/${fs}n1 bs=1M count=32 2>/dev/null; mkswap /dev/${fs}n1 >/dev/null; swapon /dev/${fs}n1
refused "swap" "used as swap" $nt bind ${fs}n1
swapoff /dev/${fs}n1
sleep 1000 </dev/$dev & holder=$!
refused "open elsewhere" "has /dev/$dev open" $nt bind $dev
kill $holder; wait $holder 2>/dev/null
sed 's/EXP0001/EXP9999/' $list >/etc/nt/other.toml
refused "other serial" "no entry names serial EXP0001" $nt bind $dev --allow /etc/nt/other.toml
chmod 666 /etc/nt/other.toml
refused "list others may write" "writable by nobody else" $nt bind $dev --allow /etc/nt/other.toml

cp /dev/$dev /tmp/copy.img
nvme id-ctrl /dev/$exp -b >/tmp/kernel.ctrl 2>/dev/null
nvme id-ns /dev/$dev -b >/tmp/kernel.ns 2>/dev/null

works "dry run" $nt bind $dev --dry-run
works "bind" $nt bind $dev
[ ! -e /dev/$dev ] && pass "no kernel node while bound" || fail "no kernel node while bound"
works "a plain user identifies" asuser nvme_probe identify $dev /tmp/vfio
cmp /tmp/kernel.ctrl /tmp/vfio.ctrl >/tmp/out 2>&1 && pass "identify controller equals nvme-cli's" || fail "identify controller equals nvme-cli's"
cmp /tmp/kernel.ns /tmp/vfio.ns >/tmp/out 2>&1 && pass "identify namespace equals nvme-cli's" || fail "identify namespace equals nvme-cli's"
works "a plain user reads 10000 times, all equal" asuser nvme_probe compare $dev /tmp/copy.img 10000
sed 's/^/INFO /' /tmp/out
works "a plain user probes the bound drive" asuser nt probe storage $dev --block-size 4KiB,128KiB --depth 1,16 --seconds 0 --json
grep -q '"through":"vfio"' /tmp/out && pass "and reads it through VFIO" || fail "and reads it through VFIO"
sed 's/.*"knee":/INFO probe knee /; s/,"buffered.*//' /tmp/out
nvme_probe forever $dev & reader=$!
sleep 1
refused "release while in use" "uses it" $nt release $dev
nvme_probe identify $dev /tmp/second >/tmp/out 2>&1 && fail "two processes on one drive" || pass "two processes on one drive: $(head -c 150 /tmp/out | head -1)"
kill -9 $reader; wait $reader 2>/dev/null
works "reads after kill -9" nvme_probe compare $dev /tmp/copy.img 200
works "release" $nt release $dev
sleep 0.5
after=$(sha256sum /dev/$(drive EXP0001)n1 | cut -c1-64)
[ "$before" = "$after" ] && pass "data unchanged" || fail "data unchanged"
rm -f /tmp/copy.img /tmp/file.copy
