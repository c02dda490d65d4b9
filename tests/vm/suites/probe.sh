# about: nt probe storage beside fio where the drive's speed is fixed by bytes or by reads per second
# long
# guest: own
# timeout: 240
# release
# drive: bytes random:64 read=20000000
# drive: reads random:64 iops=800
. /root/probes.sh
beside "20 MB/s, 128 KiB x 4" /dev/$(drive BYTES0001)n1 128 4 20000000
beside "800 reads per second, 4 KiB x 1" /dev/$(drive READS0001)n1 4 1 3276800
beside "800 reads per second, 4 KiB x 32" /dev/$(drive READS0001)n1 4 32 3276800
