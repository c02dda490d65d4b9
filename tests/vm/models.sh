# What the suites that run a model share. Sourced by them.
prompt='-p "The capital of France is" -n 2 --temp 0 --ctx 16 -t 2'
tiers="--tiers 0:4:26 --n-buffers 3"
# run NAME [OPTIONS]: as a plain user; leaves the JSON in /tmp/NAME.json
run() { out=$1; shift; asuser "nt -q run $* $prompt --json" >/tmp/$out.json 2>/tmp/$out.err; code=$?; cat /tmp/$out.json /tmp/$out.err; return $code; }
logits() { out=$1; shift; asuser "nt -q logits $* --tokens 504,3575,282 --ctx 16 -t 2 -o /tmp/$out.npy"; }
field() { sed -n "s/.*\"$2\":\(\[[^]]*\]\|\"[^\"]*\"\|[0-9.]*\).*/\1/p" /tmp/$1.json; }
same() { if [ -n "$(field $2 tokens)" ] && [ "$(field $1 tokens)" = "$(field $2 tokens)" ]; then pass "tokens: $2 as $1"; else fail "tokens: $2 as $1"; fi; }
bits() { if cmp /tmp/$1.npy /tmp/$2.npy >/tmp/out 2>&1; then pass "logits: $2 as $1, bit for bit"; else fail "logits: $2 as $1"; fi; }
manifest=/var/lib/nt/system/MODEL001/smol.gguf.json

# oracle: the model in RAM and its record, made once per guest: /tmp/ram.{json,npy} and below /var/lib/nt
oracle() {
  mkdir -p /mnt/model /run/oracle
  if [ ! -e /run/oracle/ram.npy ]; then
    mount -t ext4 -o ro /dev/$(drive MODEL001)n1 /mnt/model
    works "record the model" nt device extents /mnt/model/smol.gguf
    works "in RAM" run ram /mnt/model/smol.gguf
    works "logits in RAM" logits ram /mnt/model/smol.gguf
    unmount /mnt/model
    cp -r /tmp/ram.json /tmp/ram.npy /var/lib/nt/system/MODEL001 /run/oracle/
  fi
  cp /run/oracle/ram.* /tmp/
  mkdir -p /var/lib/nt/system
  cp -r /run/oracle/MODEL001 /var/lib/nt/system/
}
