# Functions of run.sh: the suites, the kernel, the root file system, the initramfs, the boot.
# shellcheck shell=bash
#
# `store` is the folder for all guests, with what was fetched; `work` that of one guest.

base_modules=(crc32c_generic nvme vfio-pci vfio_iommu_type1 ext4)
base_programs=(nvme:nvme-cli fio mke2fs sfdisk blkid)
most_drives=14 # of a guest that suites share: two guests then take about as long as each other

# declared SUITE WORD: the value of that line of the suite's first comment, nothing where there is none.
declared() { sed -n -e '/^#/!q' -e "s/^# $2\(: *\| *$\)//p" "$here/suites/$1.sh"; }
# says SUITE WORD: whether there is such a line.
says() { sed -e '/^#/!q' "$here/suites/$1.sh" | grep -qE "^# $2(:|$)"; }

list_suites() {
  local file name
  for file in "$here"/suites/*.sh; do
    name=$(basename "$file" .sh)
    printf '%-14s %s%s\n' "$name" "$(declared "$name" about)" "$(if says "$name" long; then echo ' (long)'; fi)"
  done
}

# select_suites NAME…: fills `guests`, each a word list: the suites that share a boot.
select_suites() {
  local name shared=() file suites=() drives=0 more
  for name in "$@"; do
    if [ "$name" = all ]; then
      for file in "$here"/suites/*.sh; do
        name=$(basename "$file" .sh)
        says "$name" long || suites+=("$name")
      done
    else
      [ -f "$here/suites/$name.sh" ] || die "$0: no suite $name; there are: $(cd "$here/suites" && echo *.sh | sed 's/\.sh//g')"
      suites+=("$name")
    fi
  done
  guests=()
  for name in "${suites[@]}"; do
    if says "$name" "guest: own" || says "$name" machine || says "$name" memory || says "$name" append || says "$name" release || says "$name" icount; then
      guests+=("$name")
      continue
    fi
    more=$(drives_of "$name" | wc -l)
    if [ $((drives + more)) -gt $most_drives ] && [ ${#shared[@]} != 0 ]; then
      guests=("${shared[*]}" ${guests[@]+"${guests[@]}"})
      shared=() drives=0
    fi
    shared+=("$name")
    drives=$((drives + more))
  done
  [ ${#shared[@]} = 0 ] || guests=("${shared[*]}" ${guests[@]+"${guests[@]}"})
}

# drives_of SUITE…: a line for each of their drives, NAME KIND:MIB PROPERTY…, none twice.
drives_of() {
  local suite name
  for suite in "$@"; do
    for name in $(declared "$suite" drives); do standard "$name"; done
    declared "$suite" drive
  done | awk '!seen[$1]++'
}

profile_of() { if says "$1" release; then echo release; else echo debug; fi; }
profiles() { for guest in "${guests[@]}"; do profile_of "${guest%% *}"; done | sort -u; }

build_nt() {
  if [ "$1" = release ]; then
    cargo build --quiet --release --bin nt # emulated processors compute slowly enough
  else
    cargo build --quiet --bin nt --example nvme_probe
  fi
}

# Installs what the harness needs when it is missing and this is root; else says so and exits with 77.
need_tools() {
  local command missing=()
  for command in qemu-system-x86_64:qemu-system-x86 nvme:nvme-cli fio:fio cpio:cpio depmod:kmod sfdisk:fdisk; do
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
    >"$store/apt.log" 2>&1 || { echo "tests/vm: skipped, since apt-get cannot install ${missing[*]} ($store/apt.log)" >&2; exit 77; }
}

# Debian's kernel, unpacked and never installed.
fetch_kernel() {
  if [ ! -d "$store/kernel/boot" ]; then
    local package
    package=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/ {print $2; exit}')
    (cd "$store" && apt-get download "$package" >/dev/null 2>&1)
    dpkg-deb -x "$store"/linux-image-*.deb "$store/kernel"
    rm -f "$store"/linux-image-*.deb
  fi
  kernel_version=$(basename "$store"/kernel/lib/modules/*)
  vmlinuz=$store/kernel/boot/vmlinuz-$kernel_version
  [ -f "$store/kernel/lib/modules/$kernel_version/modules.dep" ] || depmod -b "$store/kernel" "$kernel_version"
}

# fetch_package NAME: unpacks a Debian package into $store/tools, once, and never installs it.
fetch_package() {
  [ ! -e "$store/tools/.$1" ] || return 0
  mkdir -p "$store/tools" "$store/debs"
  rm -f "$store"/debs/*
  (cd "$store/debs" && apt-get download "$1" >/dev/null 2>&1) || return 1
  dpkg-deb -x "$store"/debs/*.deb "$store/tools" && touch "$store/tools/.$1"
}

# find_program COMMAND: where it lies, on this machine or unpacked.
find_program() {
  local folder
  command -v "$1" && return
  for folder in usr/sbin usr/bin sbin bin; do
    if [ -e "$store/tools/$folder/$1" ]; then echo "$store/tools/$folder/$1"; return; fi
  done
  return 1
}

tool_libraries() { echo "$PWD/$store/tools/usr/lib/x86_64-linux-gnu:$PWD/$store/tools/lib/x86_64-linux-gnu:$PWD/$store/tools/usr/lib"; }

# need_program COMMAND[:PACKAGE]: finds it or unpacks the package and those of the libraries it misses.
need_program() {
  local command=${1%%:*} package=${1##*:} path missing
  path=$(find_program "$command") || { fetch_package "$package" && path=$(find_program "$command"); } || return 1
  while missing=$(LD_LIBRARY_PATH=$(tool_libraries) ldd "$path" 2>/dev/null | awk '/not found/ {print $1; exit}'); [ -n "$missing" ]; do
    package=$(package_of "$missing") && fetch_package "$package" || return 1
    [ -n "$(find "$store/tools" -name "$missing")" ] || return 1
  done
}

# package_of LIBRARY: Debian's name for the package of a library, libinih.so.1 as libinih1.
package_of() {
  local name
  name=$(sed -E 's/\.so\./-/; s/_/-/g' <<<"$1" | tr '[:upper:]' '[:lower:]')
  for name in "$(sed -E 's/([^0-9])-([0-9.]+)$/\1\2/' <<<"$name")" "$name"; do
    if apt-cache show "$name" >/dev/null 2>&1; then echo "$name"; return; fi
  done
  return 1
}

# copy_program PATH ROOT [DESTINATION]: a program and the libraries it is linked to.
copy_program() {
  local path=$1 root=$2 to=${3:-/usr/bin/$(basename "$1")} lib
  install -D -m 755 "$(readlink -f "$path")" "$root$to"
  LD_LIBRARY_PATH=$(tool_libraries) ldd "$path" 2>/dev/null | grep -o '/[^ ]*' | while read -r lib; do
    to=${lib#"$PWD/$store/tools"}
    [ -e "$root$to" ] || install -D -m 755 "$(readlink -f "$lib")" "$root$to"
  done
}

# copy_modules ROOT MODULE…
copy_modules() {
  local root=$1 file module base=$store/kernel
  shift
  for module in "$@"; do
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

# make_root SUITE…: the guest's root with what these suites need.
make_root() {
  local root=$work/root suite program file modules=("${base_modules[@]}") built
  built=${CARGO_TARGET_DIR:-target}/$(profile_of "$1")
  rm -rf "$root"
  busybox_tree "$root"
  for program in "${base_programs[@]}" $(for suite in "$@"; do declared "$suite" programs; done); do
    if need_program "$program"; then
      copy_program "$(find_program "${program%%:*}")" "$root" "/usr/bin/${program%%:*}"
    else
      say "tests/vm: no ${program%%:*} for the guest, since apt-get cannot download it"
    fi
  done
  for suite in "$@"; do
    read -ra file <<<"$(declared "$suite" modules)"
    modules+=(${file[@]+"${file[@]}"})
    for file in $(declared "$suite" files); do install -D -m 755 -t "$root/root/files" "$file"; done
    install -D -m 755 -t "$root/root/suites" "$here/suites/$suite.sh"
  done
  copy_modules "$root" "${modules[@]}"
  copy_program "$built/nt" "$root"
  [ ! -e "$built/examples/nvme_probe" ] || copy_program "$built/examples/nvme_probe" "$root"
  strip -g "$root/usr/bin/nt" "$root/usr/bin/nvme_probe" 2>/dev/null || true
  install -D -m 755 -t "$root/root" "$here"/{guest,checks,models,probes,staging,stage_kills}.sh
  install -D -m 755 "$here/init.sh" "$root/sbin/init.sh"
  install -D -m 755 udev/nt-vfio-group "$root/usr/lib/udev/nt-vfio-group"
  mkdir -p "$root/root/scripts" "$root/root/udev"
  cp scripts/*.sh "$root/root/scripts/" 2>/dev/null || true
  cp udev/* "$root/root/udev/" 2>/dev/null || true
  printf 'root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\nstranger:x:1001:1001::/tmp:/bin/sh\n' >"$root/etc/passwd"
  printf 'root:x:0:\nuser:x:1000:\nstranger:x:1001:\nnt:x:990:user\n' >"$root/etc/group"
}

make_initramfs() {
  local root=$work/initramfs
  rm -rf "$root"
  busybox_tree "$root"
  copy_modules "$root" crc32c_generic nvme ext4
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
  rm -f "$work/boot.img"
  truncate -s "$((mib + 2))M" "$work/boot.img"
  printf 'label: gpt\nstart=1MiB, size=%dMiB, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4\n' "$mib" |
    sfdisk -q "$work/boot.img"
  mke2fs -q -F -t ext4 -d "$work/root" -E offset=1048576,lazy_itable_init=1 "$work/boot.img" "${mib}M" >/dev/null 2>&1
}

# run_guest "SUITE…": makes the drives of these suites, boots, prints the results; fails if a check failed.
run_guest() {
  local suites line shared_ports port=0 devices=() absent=() early=() unchanged=(boot) sums status=0
  local -A functions=()
  read -ra suites <<<"$1"
  make_root "${suites[@]}"
  make_initramfs
  rm -f "$work"/*.img
  make_boot_drive
  shared_ports=" $(drives_of "${suites[@]}" | grep -o 'port=[^ ]*' | cut -d= -f2 | tr '\n' ' ') "
  drives_of "${suites[@]}" >"$work/drives"
  while read -ra line; do
    make_image "${line[@]}"
    if [[ " ${line[*]} " = *" first "* ]]; then add_drive "${line[@]}"; fi
  done <"$work/drives"
  add_drive boot boot serial=BOOT0001
  while read -ra line; do
    if [[ " ${line[*]} " != *" first "* ]]; then add_drive "${line[@]}"; fi
  done <"$work/drives"
  rm -f "$work"/*.template.img
  for line in $(for suite in "${suites[@]}"; do declared "$suite" unchanged; done | tr ' ' '\n' | sort -u); do unchanged+=("$line"); done
  unchanged=("${unchanged[@]/#/$work/}")
  sums=$(sha256sum "${unchanged[@]/%/.img}")
  boot "${suites[@]}" || status=1
  if [ "$sums" = "$(sha256sum "${unchanged[@]/%/.img}")" ]; then
    echo "PASS unchanged: ${unchanged[*]##*/}"
  else
    echo "FAIL changed, or one of them: ${unchanged[*]##*/}"
    status=1
  fi
  [ "$keep" = 1 ] || rm -f "$work"/*.img
  return $status
}

# no_timer_check: on a loaded host an emulated timer is too late for the check at boot, which then panics.
# Without iommu=pt the guest's own nvme driver has been seen to panic in iommu_dma_unmap_sg before
# any drive was bound; VFIO makes a translated domain of its own either way.
# boot SUITE…: runs the guest, as often as a suite asks for, prints its results, fails if any check failed.
boot() {
  local left=("$@") step=${NT_VM_STEP:-} log=$work/$1.log machine accel=${NT_VM_ACCEL:-tcg} memory append watcher again limit=120 suite smp started=$SECONDS
  machine=(-machine "q35,kernel-irqchip=split,accel=$accel" -device intel-iommu,intremap=on)
  [ "$(declared "$1" machine)" != noiommu ] || machine=(-machine "q35,accel=$accel")
  memory=$(declared "$1" memory)
  # One processor whose clock advances by instructions: what the host does besides changes nothing.
  smp=(-smp 2)
  says "$1" icount && smp=(-smp 1 -icount "shift=$(declared "$1" icount),sleep=off") machine=(-machine q35,accel=tcg)
  append=$(declared "$1" append)
  for suite in "$@"; do limit=$((limit + $(timeout_of "$suite"))); done
  : >"$log"
  while :; do
    : >"$log.part"
    python3 "$here/host.py" "$log.part" "$work/qmp" ${absent[@]+"${absent[@]}"} & watcher=$!
    timeout "${NT_VM_TIMEOUT:-$limit}" qemu-system-x86_64 "${machine[@]}" -cpu max,-arch-capabilities "${smp[@]}" -m "${memory:-1024}" \
      -nodefaults -display none -pidfile "$work/qemu.pid" -serial "file:$log.part" -qmp "unix:$work/qmp,server=on,wait=off" -no-reboot \
      -kernel "$vmlinuz" -initrd "$work/initramfs.gz" "${devices[@]}" \
      -append "console=ttyS0 quiet panic=-1 intel_iommu=on no_timer_check ${NT_VM_APPEND-iommu=pt} $append nt.suites=$(tr ' ' , <<<"${left[*]}") nt.step=$step nt.seed=${NT_VM_SEED:-1}" \
      2>"$work/qemu.log" || [ $? != 139 ] || crashed=1
    kill "$watcher" 2>/dev/null || true
    wait "$watcher" 2>/dev/null || true
    tr -d '\r' <"$log.part" >>"$log"
    again=$(tr -d '\r' <"$log.part" | grep -aE '^AGAIN [^ ]+ [^ ]+$' | tail -n 1) || break
    rm -f "$log.part"
    step=${again##* } again=${again#AGAIN }
    while [ "${left[0]}" != "${again% *}" ]; do left=("${left[@]:1}"); done
  done
  rm -f "$log.part"
  grep -a -E '^(SUITE|PASS|FAIL|SKIP|INFO|DONE) ' "$log" || true
  echo "vm $*: $((SECONDS - started)) s, log in $log"
  for suite in "$@"; do
    grep -aqx "DONE $suite" "$log" || { echo "FAIL $suite did not end" | tee -a "$log"; }
  done
  if grep -aq '^FAIL ' "$log"; then
    echo "vm $*: FAILED" >&2
    return 1
  fi
}

timeout_of() { local seconds; seconds=$(declared "$1" timeout); echo "${seconds:-900}"; }
