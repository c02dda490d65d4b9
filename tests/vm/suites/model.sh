# about: a model in RAM, streamed through io_uring and through VFIO, damaged, killed, staged
# drives: model bad stage
# unchanged: model
. /root/models.sh
allow
m=$(drive MODEL001) dev=${m}n1
address=$(address $m)
mkdir -p /dev/disk/by-id
ln -s ../../$dev /dev/disk/by-id/nvme-MODEL001
oracle
mount -t ext4 -o ro /dev/$dev /mnt/model
works "through io_uring" run uring /mnt/model/smol.gguf $tiers --tier-c $dev
[ "$(field uring reader)" = '"io_uring"' ] && grep -q "not bound to vfio-pci" /tmp/uring.json && pass "io_uring, and why" || fail "io_uring, and why"
works "logits through io_uring" logits uring /mnt/model/smol.gguf $tiers
same ram uring
bits ram uring
unmount /mnt/model
accept MODEL001 ext4
works "scripts/bind-vfio.sh $dev" sh /root/scripts/bind-vfio.sh $dev
works "by name through VFIO" run vfio smol --tier-c $dev $tiers
grep -o 'tier C is[^"]*' /tmp/vfio.json | sed 's/^/INFO /'
[ "$(field vfio reader)" = '"vfio"' ] && grep -q "bound to vfio-pci" /tmp/vfio.json && pass "vfio, and why" || fail "vfio, and why"
same ram vfio
works "logits through VFIO, by address, every read compared" logits vfio smol.gguf --tier-c $address $tiers --verify
bits ram vfio
works "logits through VFIO, by-id and the old path" logits byid /mnt/model/smol.gguf --tier-c /dev/disk/by-id/nvme-MODEL001 --reader vfio $tiers
bits ram byid
run no smol --tier-c $dev --reader io_uring >/tmp/out 2>&1; [ $? = 2 ] && pass "io_uring refused on a bound drive" || fail "io_uring refused on a bound drive"
works "scripts/release-vfio.sh $dev" sh /root/scripts/release-vfio.sh $dev

# A byte that changes on the drive after it was recorded.
at=$(sed 's/.*"extents":\[\[//; s/\]\].*//; s/\],\[/\n/g' $manifest | awk -F, '$1 <= 50000000 && 50000000 < $1 + $3 {printf "%d", ($2 + 50000000 - $1) / 512}')
dd if=/dev/$(drive MODEL001)n1 of=/tmp/sector bs=512 skip=$at count=1 2>/dev/null
tr '\000-\377' '\001-\377\000' </tmp/sector | dd of=/dev/$(drive MODEL001)n1 bs=512 seek=$at count=1 conv=fsync 2>/dev/null
dev=$(drive MODEL001)n1
works "bind the drive with a changed sector" sh /root/scripts/bind-vfio.sh $dev
logits corrupt smol --tier-c $dev $tiers >/tmp/out 2>&1; code=$?
sed 's/^/INFO /' /tmp/out
[ $code = 1 ] && grep -q "\.weight: .* of drive MODEL001" /tmp/out && pass "a changed sector is named by tensor and block" || fail "a changed sector is named by tensor and block"
works "release it" sh /root/scripts/release-vfio.sh $dev
dev=$(drive MODEL001)n1
dd if=/tmp/sector of=/dev/$dev bs=512 seek=$at count=1 conv=fsync 2>/dev/null

# Killed in the middle of a pass, and two at once.
works "bind it once more" sh /root/scripts/bind-vfio.sh $dev
asuser "exec nt -q run smol --tier-c $dev $tiers -p Hello -n 200 --ctx 300 -t 1" >/tmp/killed 2>&1 & first=$!
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do [ -s /tmp/killed ] && break; sleep 1; done
logits second smol --tier-c $dev $tiers >/tmp/out 2>&1; code=$?
sed 's/^/INFO /' /tmp/out
[ $code = 1 ] && grep -q "VFIO cannot open the drive" /tmp/out && pass "two processes on one drive" || fail "two processes on one drive"
kill -9 $(pidof nt) $first; wait $first 2>/dev/null
works "runs again after kill -9" logits again smol --tier-c $dev $tiers
bits ram again
works "release after kill -9" sh /root/scripts/release-vfio.sh $dev

# A drive that cannot read a sector.
dev=$(drive BAD00001)n1
mkdir -p /var/lib/nt/system/BAD00001
sed 's/MODEL001/BAD00001/' $manifest >/var/lib/nt/system/BAD00001/smol.gguf.json
cp /var/lib/nt/system/MODEL001/smol.gguf.header /var/lib/nt/system/BAD00001/
accept BAD00001 ext4
works "bind a drive with a bad sector" sh /root/scripts/bind-vfio.sh $dev
logits bad smol --tier-c $dev $tiers >/tmp/out 2>&1; code=$?
sed 's/^/INFO /' /tmp/out
[ $code = 1 ] && grep -q "smol.gguf on drive BAD00001: reading .* failed" /tmp/out && pass "a read error is named" || fail "a read error is named"
works "release a drive with a bad sector" sh /root/scripts/release-vfio.sh $dev

# Staged on a drive of its own.
dev=$(drive STAGE001)n1
mount -t ext4 -o ro /dev/$(drive MODEL001)n1 /mnt/model
refused "stage with another serial" "serial is STAGE001" nt stage /mnt/model/smol.gguf --tier-c $dev --erase --serial EXP0001
refused "stage onto the boot drive" "mounted at /" nt stage /mnt/model/smol.gguf --tier-c $(drive BOOT0001)n1 --erase --serial BOOT0001
refused "stage onto the model's own drive" "is mounted at /mnt/model" nt stage /mnt/model/smol.gguf --tier-c $(drive MODEL001)n1 --erase --serial MODEL001
nt stage /mnt/model/smol.gguf --tier-c $dev --serial STAGE001 >/tmp/out 2>&1; [ $? = 2 ] && pass "stage without --erase" || fail "stage without --erase"
works "stage" nt stage /mnt/model/smol.gguf --tier-c $dev --erase --serial STAGE001
accept STAGE001
unmount /mnt/model
sfdisk --verify /dev/$dev >/tmp/out 2>&1 && sfdisk -d /dev/$dev >>/tmp/out && grep -q 'name="nt models"' /tmp/out && pass "the partition table is whole" || fail "the partition table is whole"
works "bind the staged drive, whose entry accepts no contents" sh /root/scripts/bind-vfio.sh $dev
works "logits from the staged drive" logits staged smol --tier-c $dev $tiers
bits ram staged
# The same on a machine that has no record of the model: the drive's superblock and table say what it holds.
mkdir /tmp/records && mv /var/lib/nt/* /tmp/records/ && pass "no record is left" || fail "no record is left"
works "logits from the staged drive without a record" logits table smol --tier-c $dev $tiers
bits ram table
mv /tmp/records/* /var/lib/nt/
works "release the staged drive" sh /root/scripts/release-vfio.sh $dev
