#!/bin/sh
# First program of the guest's root: the few file systems, then the suites, then power off.
export PATH=/usr/bin:/bin:/sbin
# The root stays read-only: its drive must be the same, byte for byte, when all is done.
for folder in /run /tmp /mnt /etc/nt /var/lib/nt; do mount -t tmpfs tmpfs $folder; done
chmod 1777 /tmp
echo 1 >/proc/sys/kernel/printk
echo /bin/modprobe >/proc/sys/kernel/modprobe
modprobe vfio-pci
modprobe vfio_iommu_type1
chmod 666 /dev/vfio/vfio
sh /root/guest.sh 2>&1
sync
poweroff -f
