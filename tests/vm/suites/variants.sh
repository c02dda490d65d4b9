# about: members of LVM, LUKS and MD, models on drives with other limits, striped, one taken out, a slow drive
# long
# drives: model bad blk4k small fs slow
# unchanged: model slow
# programs: dmsetup
# modules: dm-mod raid1
. /root/models.sh
oracle
# Each as the signature alone, and then with something that stands on the drive.
d=$(drive FS0001)n1
blocks=$(cat /sys/block/$d/size)
wipe() { dd if=/dev/zero of=/dev/$d bs=1M count=2 conv=fsync 2>/dev/null; }
sign() { wipe; printf "$2" | dd of=/dev/$d bs=1 seek=$1 conv=notrunc,fsync 2>/dev/null; }
allow
accept FS0001
sign 512 'LABELONE\001\000\000\000\000\000\000\000'
refused "LVM member by its label" "it holds lvm" $nt bind $d
sign 0 'LUKS\272\276\000\002'
refused "LUKS member by its header" "it holds luks" $nt bind $d
sign 4096 '\374\116\053\251\001\000\000\000'
refused "MD member by its superblock" "it holds md" $nt bind $d
wipe
modprobe dm-mod
if command -v dmsetup >/dev/null; then
  for kind in LVM-abc0123:"an LVM volume" CRYPT-LUKS2-abc0123-secret:"an encrypted volume"; do
    dmsetup create --noudevsync -u "${kind%%:*}" upper --table "0 $((blocks - 8192)) linear /dev/$d 4096" >/tmp/out 2>&1 ||
      { fail "a volume as ${kind#*:}"; continue; }
    refused "under ${kind#*:}" "${kind#*:}" $nt bind $d
    dmsetup remove --noudevsync upper >/dev/null 2>&1
  done
else
  echo "SKIP under device mapper: no dmsetup"
fi
# An array made through sysfs needs no tool and leaves no superblock.
modprobe raid1
echo md127 >/sys/module/md_mod/parameters/new_array
md=/sys/block/md127/md
if { echo raid1 >$md/level && echo none >$md/metadata_version && echo 2 >$md/raid_disks &&
  cat /sys/block/$d/dev >$md/new_dev && echo 0 >$md/dev-$d/slot && echo $((blocks / 2)) >$md/component_size &&
  echo readonly >$md/array_state; } 2>/tmp/out; then
  refused "in an MD array" "MD array" $nt bind $d
else
  fail "an MD array through sysfs"
fi
echo clear >$md/array_state 2>/dev/null

# The whole model on drives with 4096-byte blocks, and with commands of 8 KiB and one queue.
for d in BLK4K001 SMALL001; do
  n=$(drive $d)n1
  mkdir -p /var/lib/nt/system/$d
  sed "s/MODEL001/$d/" $manifest >/var/lib/nt/system/$d/smol.gguf.json
  cp /var/lib/nt/system/MODEL001/smol.gguf.header /var/lib/nt/system/$d/
  accept $d ext4
  cp /dev/$n /tmp/copy.img
  works "$d bind" sh /root/scripts/bind-vfio.sh $n
  works "$d reads equal" nvme_probe compare $n /tmp/copy.img 500
  rm /tmp/copy.img
  works "$d logits" logits $d smol --tier-c $n $tiers --verify
  bits ram $d
  works "$d run" run $d smol --tier-c $n $tiers
  same ram $d
  works "$d release" sh /root/scripts/release-vfio.sh $n
done

# Striped over two bound drives, with blocks of 512 and of 4096 bytes; over a bound drive and a mounted
# one; and over one that cannot read a sector, put where that sector's stripe is read from.
one=$(drive MODEL001)n1 two=$(drive BLK4K001)n1 bad=$(drive BAD00001)n1
two_address=$(address ${two%n1})
accept MODEL001 ext4
accept BAD00001 ext4
mkdir -p /var/lib/nt/system/BAD00001
sed 's/MODEL001/BAD00001/' $manifest >/var/lib/nt/system/BAD00001/smol.gguf.json
cp /var/lib/nt/system/MODEL001/smol.gguf.header /var/lib/nt/system/BAD00001/
for n in $one $two $bad; do works "bind $n for striping" sh /root/scripts/bind-vfio.sh $n; done
works "logits striped over bound drives" logits stripes smol --tier-c $two,$one $tiers --reader vfio
bits ram stripes
mount -t ext4 -o ro /dev/$(drive SMALL001)n1 /mnt/model
works "striped over a bound and a mounted drive" run mixed smol --tier-c $one,/mnt/model $tiers
unmount /mnt/model
grep -o 'tier C is[^"]*' /tmp/mixed.json | sed 's/^/INFO /'
[ "$(field mixed reader)" = '"mixed"' ] && grep -q "striped over .*MODEL001.* (through vfio) and /mnt/model/smol.gguf (through io_uring)" /tmp/mixed.json && pass "both are named" || fail "both are named"
same ram mixed
stripe=$(sed 's/.*"extents":\[\[//; s/\]\].*//; s/\],\[/\n/g' $manifest | awk -F, -v at=51200000 '$2 <= at && at < $2 + $3 {printf "%d", ($1 + at - $2) / 1048576}')
[ $((stripe % 2)) = 0 ] && both=$bad,$one || both=$one,$bad
logits bad smol --tier-c $both $tiers >/tmp/out 2>&1; code=$?
sed 's/^/INFO /' /tmp/out
[ $code = 1 ] && grep -q "smol.gguf on drive BAD00001: reading .* failed" /tmp/out && pass "of two drives, the one that fails is named" || fail "of two drives, the one that fails is named"
logits late smol --tier-c $one,$one $tiers >/tmp/out 2>&1; [ $? = 2 ] && grep -q "are the same drive" /tmp/out && pass "a drive is not striped with itself" || fail "a drive is not striped with itself"

# One of two taken out in the middle of a pass: the run ends and says why, the other drive is as before.
: >/tmp/taken # what stands there is of another run
asuser "exec timeout 100 nt -q run smol --tier-c $one,$two $tiers -p Hello -n 250 --ctx 300 -t 1" >/tmp/taken 2>&1 & first=$!
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do [ -s /tmp/taken ] && break; sleep 1; done
echo "HOST unplug blk4k"
wait $first; code=$?
tail -c 400 /tmp/taken >/tmp/out
sed 's/^/INFO /' /tmp/out
[ $code = 1 ] && grep -q "smol.gguf on drive BLK4K001: .* asks for the drive back" /tmp/out && pass "of two drives, the one taken out is named" || fail "of two drives, the one taken out is named (exit $code)"
works "logits from the drive that stayed" logits stayed smol --tier-c $one $tiers
bits ram stayed
for n in $one $bad; do works "release $n after striping" sh /root/scripts/release-vfio.sh $n; done
[ -b /dev/$(drive MODEL001)n1 ] && pass "the kernel has it again" || fail "the kernel has it again"
[ ! -e /sys/bus/pci/devices/$two_address ] && pass "the one taken out is gone" || fail "the one taken out is gone"

# A slow drive: 2 MB/s. Within its deadline it is only slow; past it there is an error, and an end.
n=$(drive SLOW0001)n1
cp /dev/$n /tmp/copy.img
works "bind the slow drive" $nt bind $n
works "slow reads are right" timeout 60 nvme_probe compare $n /tmp/copy.img 8
timeout 30 nvme_probe late $n 1 >/tmp/out 2>&1; code=$?
sed 's/^/INFO /' /tmp/out
[ $code = 1 ] && grep -q "were not read within" /tmp/out && pass "a deadline that passes is named" || fail "a deadline that passes is named"
works "the slow drive reads again" timeout 60 nvme_probe compare $n /tmp/copy.img 4
works "silenced with reads under way" timeout 60 nvme_probe silence $n
sed 's/^/INFO /' /tmp/out
works "and it reads again after that" timeout 60 nvme_probe compare $n /tmp/copy.img 4
works "release the slow drive" $nt release $n
cmp /dev/$(drive SLOW0001)n1 /tmp/copy.img >/tmp/out 2>&1 && pass "the slow drive is unchanged" || fail "the slow drive is unchanged"
