# about: experts on a bound drive with caches in RAM: tokens and logits of RAM, cold and warm, misses in flight together
# drive: routed experts:64 serial=ROUTED01
. /root/models.sh
allow
m=$(drive ROUTED01) dev=${m}n1
prompt='-p "w1 w2 w3" -n 24 --temp 0 --ctx 64 -t 2'
logits() { out=$1; shift; asuser "nt -q logits $* --tokens 5,77,300,12,250 --ctx 16 -t 2 -o /tmp/$out.npy"; }
mkdir -p /mnt/model
mount -t ext4 -o ro /dev/$dev /mnt/model
works "record the model" nt device extents /mnt/model/experts.gguf
works "in RAM" run ram /mnt/model/experts.gguf
works "logits in RAM" logits ram /mnt/model/experts.gguf
unmount /mnt/model
accept ROUTED01 ext4
works "scripts/bind-vfio.sh $dev" sh /root/scripts/bind-vfio.sh $dev
for ram in 64MiB 80MiB; do
  works "experts through VFIO, --ram $ram" run cached experts --tier-c $dev --ram $ram
  [ "$(field cached reader)" = '"vfio"' ] && pass "vfio" || fail "vfio"
  same ram cached
  echo "INFO hits $(field cached hit_rate), misses per layer $(field cached misses_per_layer), in flight $(field cached in_flight), at most $(field cached misses_max)"
  awk "BEGIN { exit !($(field cached hit_rate) > 0) }" && pass "caches hit" || fail "caches hit"
  works "logits through VFIO, every read compared" logits cached experts --tier-c $dev --ram $ram --verify
  bits ram cached
done
works "a routing that is forced" asuser "nt -q bench experts --tier-c $dev --ram 64MiB -b 16 -t 2 -p 0 -n 16 -r 1 --routing uniform --json >/tmp/bench.json"
echo "INFO hits $(field bench hit_rate), misses per layer $(field bench misses_per_layer), in flight $(field bench in_flight)"
awk "BEGIN { exit !($(field bench in_flight) > 1) }" && pass "misses are in flight together" || fail "misses are in flight together"
works "scripts/release-vfio.sh $dev" sh /root/scripts/release-vfio.sh $dev
