# Functions of run.sh: the drives of a guest, their images and how QEMU is told of them.
# shellcheck shell=bash

# drive NAME KIND[:MIB] [PROPERTY…], as suites declare their own.
#   KIND   blank (zeros), random (unknown bytes), ext4 (empty), model (ext4 with smol.gguf on it), big (ext4 with
#          a model of 4 GiB, big.gguf), experts (ext4 with experts.gguf, a mixture of 40 MiB), tiny (ext4 with tiny.gguf on it, 10 MiB that can be staged and verified)
#   serial=S           serial number, default the name in capitals and 0001; %20 is a space
#   ns=P,P             properties of a namespace, `-device nvme-ns`; twice for two namespaces of half the size
#   port=NAME          the next function of that drive's slot, in its IOMMU group
#   read=BYTES         reads at most so many bytes per second; write=BYTES writes
#   iops=N             at most so many reads per second
#   unreadable=SECTOR  that sector cannot be read
#   discard            discarded blocks read as zeros (else the drive keeps what was there)
#   ports              says that several controllers may lead to it; with ns=shared=on
#   absent             not there until the suite asks the host to plug it
#   first              enumerated before the system's drive
#   KEY=VALUE          a property of `-device nvme`
standard_drives='
exp    random:64
meta   blank:32   ns=ms=8,pi=1
zns    blank:32   ns=zoned=true,zoned.zone_size=4M
fs     ext4:32
slow   random:12  read=2000000
model  model:160  serial=MODEL001
bad    model:160  serial=BAD00001 unreadable=100000
blk4k  model:160  serial=BLK4K001 ns=logical_block_size=4096,physical_block_size=4096
small  model:160  serial=SMALL001 mdts=1 max_ioqpairs=1
stage  blank:128  serial=STAGE001 read=40000000
source tiny:32    serial=SOURCE01
sib    blank:32
other  blank:32   serial=SIB0002 port=sib
big    big:4600   serial=BIG00001
'

# standard NAME: its line.
standard() {
  local line
  line=$(grep -E "^$1 " <<<"$standard_drives") || die "$0: no drive $1 in tests/vm/drives.sh"
  echo "$line"
}

# make_image NAME KIND[:MIB] [PROPERTY…]
make_image() {
  local name=$1 kind=${2%%:*} mib=${2##*:} image=$work/$1.img
  case $kind in
    blank) truncate -s "${mib}M" "$image" ;;
    random) head -c "${mib}M" /dev/urandom >"$image" ;;
    ext4) truncate -s "${mib}M" "$image" && mke2fs -q -F -t ext4 "$image" >/dev/null 2>&1 ;;
    model) cp --sparse=always --reflink=auto "$(filled model smol.gguf "$mib")" "$image" ;;
    tiny) mv "$(filled tiny tiny.gguf "$mib")" "$image" ;;
    experts) mv "$(filled experts experts.gguf "$mib")" "$image" ;;
    big) mv "$(filled big big.gguf "$mib")" "$image" ;;
    *) die "$0: drive $name: no kind $kind" ;;
  esac
  [[ " ${*:3} " != *" ns="*" ns="* ]] || { truncate -s "$((mib / 2))M" "$image"; cp --sparse=always "$image" "$work/$name.2.img"; }
}

# filled FOLDER FILE MIB: an ext4 image of so many MiB with that model on it, made once.
filled() {
  local image=$work/$1.$3.template.img
  if [ ! -f "$image" ]; then
    rm -rf "${work:?}/$1"
    mkdir "$work/$1"
    if [ "$1" = big ]; then
      need_pip gguf==0.19.0 numpy==2.4.6 >&2
      python3 tests/fidelity/synth_gguf.py llama-tiny Q4_0 "$work/big/big.gguf" --layers 36 \
        --shape '{"D": 4096, "F": 14336, "H": 32, "K": 8}' >/dev/null
    elif [ "$1" = experts ]; then
      need_pip gguf==0.19.0 numpy==2.4.6 >&2
      python3 tests/fidelity/synth_gguf.py qwen3moe-tiny Q8_0 "$work/experts/experts.gguf" --layers 6 \
        --shape '{"E": 32, "used": 4}' >/dev/null
    elif [ "$1" = tiny ]; then
      python3 tests/vm/small_gguf.py "$work/tiny/tiny.gguf" 10
    else
      ln "$model" "$work/$1/$2" 2>/dev/null || cp "$model" "$work/$1/$2"
    fi
    truncate -s "$3M" "$image"
    mke2fs -q -F -t ext4 -b 4096 -m 0 -d "$work/$1" -E lazy_itable_init=1 "$image" >/dev/null 2>&1
    rm -rf "${work:?}/$1"
  fi
  echo "$image"
}

# add_drive NAME KIND[:MIB] [PROPERTY…]: appends to `devices`; a drive that is absent is noted in `absent` as the
# QMP arguments that plug it.
add_drive() {
  local name=$1 property bus serial limits='' source spaces=() options='' away=0 index=0 space
  shift 2
  serial=${name^^}0001
  source=file=$work/$name.img
  for property in "$@"; do
    case $property in
      serial=*) serial=${property#*=} serial=${serial//%20/ } ;;
      ns=*) spaces+=("${property#ns=}") ;;
      port=*) bus=${property#*=} ;;
      read=*) limits+=,throttling.bps-read=${property#*=} ;;
      iops=*) limits+=,throttling.iops-read=${property#*=} ;;
      write=*) limits+=,throttling.bps-write=${property#*=} ;;
      discard) limits+=,discard=unmap ;;
      unreadable=*)
        printf '[inject-error]\nevent = "read_aio"\nerrno = "5"\nsector = "%s"\n' "${property#*=}" >"$work/$name.conf"
        source=file=blkdebug:$work/$name.conf:$work/$name.img
        ;;
      ports) devices+=(-device "nvme-subsys,id=sub_$name") options+=,subsys=sub_$name ;;
      absent) away=1 ;;
      first) ;;
      *) options+=,$property ;;
    esac
  done
  if [ -n "${bus:-}" ]; then
    functions[$bus]=$((functions[$bus] + 1))
    options+=,bus=rp_$bus,addr=0x0.0x${functions[$bus]}
  else
    port=$((port + 1))
    functions[$name]=0
    devices+=(-device "pcie-root-port,id=rp_$name,chassis=$port,slot=$port,bus=pcie.0")
    options+=,bus=rp_$name
    [[ $shared_ports != *" $name "* ]] || options+=,addr=0x0.0x0,multifunction=on
  fi
  devices+=(-drive "if=none,id=$name,$source,format=raw,cache=unsafe$limits")
  if [ $away = 1 ]; then
    absent+=("driver=nvme,id=$name,serial=$serial,drive=$name$options")
  elif [ ${#spaces[@]} = 0 ]; then
    devices+=(-device "nvme,id=$name,serial=$serial,drive=$name$options")
  else
    devices+=(-device "nvme,id=$name,serial=$serial$options")
    for space in "${spaces[@]}"; do
      index=$((index + 1))
      [ $index = 1 ] || devices+=(-drive "if=none,id=$name.$index,file=$work/$name.$index.img,format=raw,cache=unsafe$limits")
      [ $index = 1 ] && property=$name || property=$name.$index
      devices+=(-device "nvme-ns,drive=$property,bus=$name,nsid=$index${space:+,$space}")
    done
  fi
}
