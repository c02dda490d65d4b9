#!/bin/sh
# Runs the suites named on the kernel's command line, one after another, inside the guest.
word() { sed -n "s/.*nt\.$1=\([^ ]*\).*/\1/p" /proc/cmdline; }
export seed=$(word seed) step=$(word step)

# Whatever the suite before has left: nothing of it may decide what the next one finds.
clean() {
  cd /
  kill -9 $(pidof nt nvme_probe) 2>/dev/null
  swapoff -a 2>/dev/null
  for mounted in $(awk '$2 ~ "^/(mnt|tmp)/" {print $2}' /proc/mounts | sort -r); do umount -l $mounted; done
  rm -rf /tmp/* /etc/nt/* /var/lib/nt/* /mnt/* /dev/disk
  chmod 755 /var/lib/nt
}

# A suite leaves no drive on vfio-pci.
given_back() {
  for device in /sys/bus/pci/drivers/vfio-pci/0*; do
    [ -e "$device" ] || continue
    echo "FAIL $1 left $(basename $device) bound to vfio-pci"
    nt device release $(basename $device)
  done
}

for suite in $(word suites | tr ',' ' '); do
  clean
  file=/root/suites/$suite.sh
  seconds=$(sed -n 's/^# timeout: *//p' $file)
  began=$(cut -d. -f1 /proc/uptime)
  echo "SUITE $suite"
  export suite
  timeout -s KILL ${seconds:-900} sh -c ". /root/checks.sh; . $file; exit 0"; code=$?
  [ $code = 0 ] || echo "FAIL $suite ended with $code (137: after its ${seconds:-900} s)"
  given_back $suite
  echo "INFO $suite took $(($(cut -d. -f1 /proc/uptime) - began)) s"
  echo "DONE $suite"
  step=
done
clean
