# about: from the moment at which a read could start to its start, through io_uring and through VFIO
# long
# release
# drives: model
# unchanged: model
. /root/models.sh
allow
m=$(drive MODEL001) dev=${m}n1
# starts NAME MODEL [OPTIONS]: that time while tokens are generated, in microseconds
starts() {
  name=$1; shift
  works "$name" asuser "nt -q bench $* $tiers --backend cpu -t 2 --ctx 64 -p 0 -n 12 -r 1 --json >/tmp/bench.json"
  grep -o '"nvme":{[^}]*}[^}]*}' /tmp/bench.json | grep -o '"start_us":{[^}]*}' | sed "s/^/INFO $name: /"
}
mkdir -p /mnt/model
mount -t ext4 -o ro /dev/$dev /mnt/model
works "record the model" nt device extents /mnt/model/smol.gguf
for turn in 1 2; do starts "io_uring" /mnt/model/smol.gguf; done
unmount /mnt/model
accept MODEL001 ext4
works "bind" sh /root/scripts/bind-vfio.sh $dev
for turn in 1 2; do starts "VFIO" smol --tier-c $dev; done
works "release" sh /root/scripts/release-vfio.sh $dev
