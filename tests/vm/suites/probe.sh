# about: nt probe storage beside fio where the kernel limits bytes or reads per second; the guest's clock counts instructions
# long
# release
# modules: null_blk
# icount: 0
# timeout: 600
. /root/probes.sh
# Reads of a millisecond, which the limit lets through some dozens at a time. Larger ones than 64 KiB are divided, and count
# more than once towards a limit of bytes.
modprobe null_blk nr_devices=1 gb=1 bs=4096 irqmode=2 completion_nsec=1000000 hw_queue_depth=64 submit_queues=1
mkdir -p /tmp/cgroup
mount -t cgroup2 none /tmp/cgroup
echo +io >/tmp/cgroup/cgroup.subtree_control
mkdir /tmp/cgroup/limited
echo $$ >/tmp/cgroup/limited/cgroup.procs
limit() { echo "$(cat /sys/block/nullb0/dev) rbps=max riops=max $1" >/tmp/cgroup/limited/io.max; }
limit rbps=20000000
beside "20 MB/s, 64 KiB x 4" /dev/nullb0 64 4 20000000
limit riops=800
beside "800 reads per second, 4 KiB x 1" /dev/nullb0 4 1 3276800
beside "800 reads per second, 4 KiB x 32" /dev/nullb0 4 32 3276800
echo $$ >/tmp/cgroup/cgroup.procs
rmdir /tmp/cgroup/limited
umount /tmp/cgroup
