#!/bin/sh
ls -l /sys/class/nvme/ /dev/vfio
for d in /sys/class/nvme/nvme*; do echo "INFO $d $(cat $d/serial) $(readlink -f $d/device) group $(basename $(readlink $d/device/iommu_group))"; done
mount
cat /proc/uptime
echo "DONE x"
