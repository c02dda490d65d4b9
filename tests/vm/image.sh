# Functions of run.sh: the kernel, the root file system, the initramfs, the drives, the boot.
# shellcheck shell=bash

modules=(crc32c_generic nvme vfio-pci vfio_iommu_type1 ext4 dm-mod raid1)
programs=(nvme fio mke2fs sfdisk blkid dmsetup)
bad_sector=100000

# Installs what the harness needs when it is missing and this is root; else says so and exits with 77.
need_tools() {
  local command missing=()
  for command in qemu-system-x86_64:qemu-system-x86 nvme:nvme-cli fio:fio cpio:cpio depmod:kmod sfdisk:fdisk dmsetup:dmsetup; do
    command -v "${command%:*}" >/dev/null || missing+=("${command#*:}")
  done
  [ -x /bin/busybox ] && ! ldd /bin/busybox >/dev/null 2>&1 || missing+=(busybox-static)
  [ ${#missing[@]} = 0 ] && return
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests/vm: skipped, since packages are missing: sudo apt-get install ${missing[*]}" >&2
    exit 77
  fi
  say "installing ${missing[*]}"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
    >"$work/apt.log" 2>&1 || { echo "tests/vm: skipped, since apt-get cannot install ${missing[*]} ($work/apt.log)" >&2; exit 77; }
}

# Debian's kernel, unpacked and never installed.
fetch_kernel() {
  if [ ! -d "$work/kernel/boot" ]; then
    local package
    package=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/ {print $2; exit}')
    (cd "$work" && apt-get download "$package" >/dev/null 2>&1)
    dpkg-deb -x "$work"/linux-image-*.deb "$work/kernel"
    rm -f "$work"/linux-image-*.deb
  fi
  kernel_version=$(basename "$work"/kernel/lib/modules/*)
  vmlinuz=$work/kernel/boot/vmlinuz-$kernel_version
  [ -f "$work/kernel/lib/modules/$kernel_version/modules.dep" ] || depmod -b "$work/kernel" "$kernel_version"
}

# copy_program PATH ROOT [DESTINATION]: a program and the libraries it is linked to.
copy_program() {
  local path=$1 root=$2 to=${3:-/usr/bin/$(basename "$1")} lib
  install -D -m 755 "$path" "$root$to"
  ldd "$path" 2>/dev/null | grep -o '/[^ ]*' | while read -r lib; do
    [ -e "$root$lib" ] || install -D -m 755 "$(readlink -f "$lib")" "$root$lib"
  done
}

copy_modules() {
  local root=$1 file base=$work/kernel
  for module in "${modules[@]}"; do
    modprobe -d "$base" -S "$kernel_version" --show-depends "$module" | awk '/^insmod/ {print $2}'
  done | sort -u | while read -r file; do
    install -D -m 644 "$file" "$root/lib/modules/$kernel_version/${file##*/lib/modules/"$kernel_version"/}"
  done
  cp "$base/lib/modules/$kernel_version"/modules.{order,builtin,builtin.modinfo} "$root/lib/modules/$kernel_version/"
  depmod -b "$root" "$kernel_version"
}

busybox_tree() {
  local root=$1
  mkdir -p "$root"/{bin,sbin,dev,proc,sys,run,tmp,mnt,etc/nt,var/lib/nt,root,usr/bin}
  cp /bin/busybox "$root/bin/busybox"
  /bin/busybox --list | while read -r name; do
    [ "$name" = busybox ] || ln -sf busybox "$root/bin/$name"
  done
}

make_root() {
  local root=$work/root
  rm -rf "$root"
  busybox_tree "$root"
  copy_modules "$root"
  for program in "${programs[@]}"; do
    if command -v "$program" >/dev/null; then copy_program "$(command -v "$program")" "$root"; fi
  done
  local built=${CARGO_TARGET_DIR:-target}/${NT_VM_PROFILE:-debug}
  copy_program "$built/nt" "$root"
  [ ! -e "$built/examples/nvme_probe" ] || copy_program "$built/examples/nvme_probe" "$root"
  strip -g "$root/usr/bin/nt" "$root/usr/bin/nvme_probe" 2>/dev/null || true
  install -D -m 755 -t "$root/root" tests/vm/{guest,checks,model,variants}.sh
  install -D -m 755 tests/vm/init.sh "$root/sbin/init.sh"
  mkdir -p "$root/root/scripts" "$root/root/udev"
  cp scripts/*.sh "$root/root/scripts/" 2>/dev/null || true
  cp udev/*.rules "$root/root/udev/" 2>/dev/null || true
  printf 'root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n' >"$root/etc/passwd"
  printf 'root:x:0:\nuser:x:1000:\nnt:x:990:user\n' >"$root/etc/group"
}

make_initramfs() {
  local root=$work/initramfs
  rm -rf "$root"
  busybox_tree "$root"
  local keep=("${modules[@]}")
  modules=(crc32c_generic nvme ext4)
  copy_modules "$root"
  modules=("${keep[@]}")
  cat >"$root/init" <<'INIT'
#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
modprobe crc32c_generic; modprobe nvme; modprobe ext4
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  for c in /sys/class/nvme/nvme*; do
    case $(cat $c/serial 2>/dev/null) in BOOT0001*) [ -b /dev/$(basename $c)n1p1 ] && root=/dev/$(basename $c)n1p1 ;; esac
  done
  [ -n "$root" ] && break
  sleep 0.2
done
mount -t ext4 -o ro $root /mnt || poweroff -f
mount --move /dev /mnt/dev; mount --move /proc /mnt/proc; mount --move /sys /mnt/sys
exec switch_root /mnt /sbin/init.sh
INIT
  chmod +x "$root/init"
  (cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) >"$work/initramfs.gz"
}

# The guest's root as the first partition of a drive.
make_boot_drive() {
  local mib
  mib=$(($(du -sm "$work/root" | cut -f1) + 96))
  rm -f "$work"/*.img
  truncate -s "$((mib + 2))M" "$work/boot.img"
  printf 'label: gpt\nstart=1MiB, size=%dMiB, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4\n' "$mib" |
    sfdisk -q "$work/boot.img"
  mke2fs -q -F -t ext4 -d "$work/root" -E offset=1048576,lazy_itable_init=1 "$work/boot.img" "${mib}M" >/dev/null 2>&1
}

make_drives() {
  make_boot_drive
  # Unknown, random bytes: what a drive with nothing recognisable on it looks like.
  head -c 64M /dev/urandom >"$work/exp.img"
  head -c 12M /dev/urandom >"$work/slow.img"
  truncate -s 32M "$work/meta.img" "$work/zns.img" "$work/sib.img" "$work/other.img" "$work/fs.img"
  mke2fs -q -F -t ext4 "$work/fs.img" >/dev/null 2>&1
  rm -rf "$work/model"
  mkdir "$work/model"
  ln "$model" "$work/model/smol.gguf" 2>/dev/null || cp "$model" "$work/model/smol.gguf"
  truncate -s 160M "$work/model.img"
  mke2fs -q -F -t ext4 -b 4096 -d "$work/model" -E lazy_itable_init=1 "$work/model.img" >/dev/null 2>&1
  # The same once more, on a drive that cannot read one sector in the middle of the model.
  cp --sparse=always "$work/model.img" "$work/bad.img"
  # And on drives with other block and transfer sizes.
  cp --sparse=always "$work/model.img" "$work/blk4k.img"
  cp --sparse=always "$work/model.img" "$work/small.img"
  printf '[inject-error]\nevent = "read_aio"\nerrno = "5"\nsector = "%s"\n' "$bad_sector" >"$work/bad.conf"
  truncate -s 128M "$work/stage.img"
}

# unplug LOG SOCKET: takes the drives out of the machine that the guest names, each in a line "UNPLUG drive".
unplug() {
  # exec: else a kill of this function's shell would leave Python waiting.
  exec python3 - "$1" "$2" <<'PY'
import json, re, socket, sys, time
log, path = sys.argv[1:]
stream, taken = None, 0

def send(name, **arguments):
    stream.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
    stream.flush()
    time.sleep(0.2)

while True:
    time.sleep(0.3)
    for drive in re.findall(rb"^UNPLUG (\w+)\r?$", open(log, "rb").read(), re.M)[taken:]:
        if stream is None:
            qmp = socket.socket(socket.AF_UNIX)
            qmp.connect(path)
            stream = qmp.makefile("rw")
            send("qmp_capabilities")
        send("device_del", id=drive.decode())
        taken += 1
PY
}

# Without iommu=pt the guest's own nvme driver has been seen to panic in iommu_dma_unmap_sg before
# any drive was bound; VFIO makes a translated domain of its own either way. NT_VM_APPEND replaces it.
# boot iommu|noiommu CHECKS: runs the guest, prints its results, fails if any check failed.
boot() {
  local kind=$1 checks=$2 log=$work/$1.log machine=(-machine q35,accel=tcg)
  if [ "$kind" = iommu ]; then
    machine=(-machine q35,kernel-irqchip=split,accel=tcg -device intel-iommu,intremap=on)
  fi
  local port=0 devices=()
  add_port() { port=$((port + 1)); devices+=(-device "pcie-root-port,id=rp$port,chassis=$port,slot=$port,bus=pcie.0"); }
  add_file() {
    local limit=
    case $1 in
      stage) limit=,throttling.bps-read=40000000 ;;
      slow) limit=,throttling.bps-read=2000000 ;;
    esac
    devices+=(-drive "if=none,id=$1,file=$work/$1.img,format=raw,cache=unsafe$limit")
  }
  for name in boot model exp meta zns blk4k small fs stage bad slow; do
    add_port
    case $name in
      bad) devices+=(-drive "if=none,id=bad,file=blkdebug:$work/bad.conf:$work/bad.img,format=raw,cache=unsafe") ;;
      *) add_file "$name" ;;
    esac
    case $name in
      bad) devices+=(-device "nvme,id=bad,serial=BAD00001,drive=bad,bus=rp$port") ;;
      # A slow drive, by the measure of today's.
      stage) devices+=(-device "nvme,id=stage,serial=STAGE001,drive=stage,bus=rp$port") ;;
      boot) devices+=(-device "nvme,serial=BOOT0001,drive=boot,bus=rp$port") ;;
      exp) devices+=(-device "nvme,id=exp,serial=EXP0001,drive=exp,bus=rp$port") ;;
      meta) devices+=(-device "nvme,id=meta,serial=META0001,bus=rp$port" -device "nvme-ns,drive=meta,bus=meta,ms=8,pi=1") ;;
      zns) devices+=(-device "nvme,id=zns,serial=ZNS0001,bus=rp$port" -device "nvme-ns,drive=zns,bus=zns,zoned=true,zoned.zone_size=4M") ;;
      blk4k) devices+=(-device "nvme,id=blk4k,serial=BLK4K001,bus=rp$port" -device "nvme-ns,drive=blk4k,bus=blk4k,logical_block_size=4096,physical_block_size=4096") ;;
      small) devices+=(-device "nvme,id=small,serial=SMALL001,drive=small,mdts=1,max_ioqpairs=1,bus=rp$port") ;;
      model) devices+=(-device "nvme,id=model,serial=MODEL001,drive=model,bus=rp$port") ;;
      slow) devices+=(-device "nvme,id=slow,serial=SLOW0001,drive=slow,bus=rp$port") ;;
      fs) devices+=(-device "nvme,id=fs,serial=FS0001,drive=fs,bus=rp$port") ;;
    esac
  done
  add_port
  add_file sib
  add_file other
  devices+=(-device "nvme,serial=SIB0001,drive=sib,bus=rp$port,addr=0x0.0x0,multifunction=on"
    -device "nvme,serial=SIB0002,drive=other,bus=rp$port,addr=0x0.0x1")
  local started=$SECONDS watcher
  : >"$log"
  unplug "$log" "$work/qmp" & watcher=$!
  timeout "${NT_VM_TIMEOUT:-600}" qemu-system-x86_64 "${machine[@]}" -cpu max -smp 2 -m 1024 -nodefaults -display none \
    -serial "file:$log" -qmp "unix:$work/qmp,server=on,wait=off" -no-reboot -kernel "$vmlinuz" -initrd "$work/initramfs.gz" "${devices[@]}" \
    -append "console=ttyS0 quiet panic=-1 intel_iommu=on ${NT_VM_APPEND-iommu=pt} nt.checks=${checks// /,}" 2>"$work/qemu.log" || true
  kill "$watcher" 2>/dev/null || true
  wait "$watcher" 2>/dev/null || true
  grep -a -E '^(PASS|FAIL|SKIP|INFO|DONE) ' "$log" | tr -d '\r' || true
  echo "vm $kind: $((SECONDS - started)) s, log in $log"
  if grep -aq '^FAIL ' "$log" || ! grep -aq '^DONE ' "$log"; then
    echo "vm $kind: FAILED" >&2
    return 1
  fi
}
