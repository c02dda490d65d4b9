# about: a drive is taken out of the machine in the middle of a pass that reads from it through VFIO
# drive: gone model:160 serial=GONE0001 read=40000000
# drive: stays random:16 serial=STAYS001
# unchanged: gone stays
# guest: own
# timeout: 300
. /root/models.sh
allow
dev=$(drive GONE0001)n1
address=$(address $(drive GONE0001))
mkdir -p /mnt/model
mount -t ext4 -o ro /dev/$dev /mnt/model
works "record the model" nt device extents /mnt/model/smol.gguf
unmount /mnt/model
accept GONE0001 ext4
works "bind the drive" sh /root/scripts/bind-vfio.sh $dev

# The kernel asks for the drive back and waits until it has it.
asuser "exec timeout 150 nt -q run smol --tier-c $dev $tiers -p Hello -n 250 --ctx 300 -t 1" >/tmp/taken 2>&1 & first=$!
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do [ -s /tmp/taken ] && break; sleep 1; done
echo "HOST unplug gone"
wait $first; code=$?
cp /tmp/taken /tmp/out
echo "INFO exit $code: $(tail -c 200 /tmp/taken | tail -1)"
[ $code = 1 ] && grep -q "on drive GONE0001: .* asks for the drive back" /tmp/out && pass "the run ends, and says why" || fail "the run ends, and says why"
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do [ -e /sys/bus/pci/devices/$address ] || break; sleep 1; done
[ ! -e /sys/bus/pci/devices/$address ] && pass "the drive is gone" || fail "the drive is gone"
logits none smol --tier-c $dev $tiers >/tmp/out 2>&1; code=$?
sed 's/^/INFO /' /tmp/out
[ $code = 2 ] && grep -q "$dev: no such drive" /tmp/out && pass "a drive that is gone is named" || fail "a drive that is gone is named"
works "the other drives are still there" $nt list
