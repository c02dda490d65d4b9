# about: nt probe storage beside fio where each read takes 200 µs; the guest's clock counts instructions
# long
# release
# modules: null_blk
# icount: 0
# timeout: 600
. /root/probes.sh
modprobe null_blk nr_devices=1 gb=1 bs=4096 irqmode=2 completion_nsec=200000 hw_queue_depth=64 submit_queues=1
# The kernel adds its own instructions to the 200 µs, so the rate is compared with the latency that was measured.
beside "200 µs, 4 KiB x 1" /dev/nullb0 4 1
beside "200 µs, 4 KiB x 8" /dev/nullb0 4 8
