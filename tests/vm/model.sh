# A model on the second drive: in RAM, streamed through io_uring, and through VFIO once the drive is
# bound. Sourced by guest.sh.

allow
m=$(drive MODEL001) dev=${m}n1
address=$(basename "$(readlink -f /sys/class/nvme/$m/device)")
mkdir -p /mnt/model /dev/disk/by-id
ln -s ../../$dev /dev/disk/by-id/nvme-MODEL001
chmod 777 /var/lib/nt
prompt='-p "The capital of France is" -n 2 --temp 0 --ctx 16 -t 2'
tiers="--tiers 0:4:26 --n-buffers 3"
# run NAME [OPTIONS]: as a plain user; leaves the JSON in /tmp/NAME.json
run() { out=$1; shift; asuser "nt -q run $* $prompt --json" >/tmp/$out.json 2>/tmp/$out.err; code=$?; cat /tmp/$out.json /tmp/$out.err; return $code; }
logits() { out=$1; shift; asuser "nt -q logits $* --tokens 504,3575,282 --ctx 16 -t 2 -o /tmp/$out.npy"; }
field() { sed -n "s/.*\"$2\":\(\[[^]]*\]\|\"[^\"]*\"\|[0-9.]*\).*/\1/p" /tmp/$1.json; }
same() { if [ -n "$(field $2 tokens)" ] && [ "$(field $1 tokens)" = "$(field $2 tokens)" ]; then pass "tokens: $2 as $1"; else fail "tokens: $2 as $1"; fi; }
bits() { if cmp /tmp/$1.npy /tmp/$2.npy >/tmp/out 2>&1; then pass "logits: $2 as $1, bit for bit"; else fail "logits: $2 as $1"; fi; }

mount -t ext4 -o ro /dev/$dev /mnt/model
works "record the model" asuser nt device extents /mnt/model/smol.gguf
works "in RAM" run ram /mnt/model/smol.gguf
works "logits in RAM" logits ram /mnt/model/smol.gguf
works "through io_uring" run uring /mnt/model/smol.gguf $tiers --tier-c $dev
[ "$(field uring reader)" = '"io_uring"' ] && grep -q "not bound to vfio-pci" /tmp/uring.json && pass "io_uring, and why" || fail "io_uring, and why"
works "logits through io_uring" logits uring /mnt/model/smol.gguf $tiers
same ram uring
bits ram uring
umount /mnt/model
sed '/MODEL001/,/holds/s/holds = .*/holds = ["ext4"]/' $list >/tmp/model.toml; cp /tmp/model.toml $list
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
