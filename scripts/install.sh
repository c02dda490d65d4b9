#!/bin/sh
# Prepares a machine for drives read through VFIO: a group, a udev rule and its program, a limit of locked
# memory, folders that root alone may write, an empty allowlist. Run as root; `scripts/install.sh --remove`
# undoes it, but keeps an allowlist with entries, records, and a group that was there before.
#
# Members of the group nt may use every drive that nt has bound, with any program, and may lock all of the
# machine's memory: the memory that a drive writes to is locked, and the kernel's default of 8 MiB is too
# little. nt keeps to its plan; other programs of members need not. Put nobody there who may not do that.
set -eu
rules=/etc/udev/rules.d/70-nt-vfio.rules
program=/usr/lib/udev/nt-vfio-group
limits=/etc/security/limits.d/70-nt.conf
list=/etc/nt/drives.toml
made=/etc/nt/group-made-by-install # a mark: the group may go when nt goes
here=$(cd "$(dirname "$0")/.." && pwd)
# A udev that does not run reads the rule when it starts.
reload() { if command -v udevadm >/dev/null; then udevadm control --reload 2>/dev/null || echo "udev does not run here"; fi; }
[ "$(id -u)" = 0 ] || { echo "$0: must be run as root" >&2; exit 1; }
if [ "${1:-}" = --remove ]; then
  rm -f "$rules" "$program" "$limits"
  rmdir /var/lib/nt/system /var/lib/nt 2>/dev/null || true
  if [ -d /var/lib/nt ]; then echo "kept: /var/lib/nt holds records"; fi
  # Whatever stands there besides comments and blanks is the owner's.
  if [ -f "$list" ] && ! grep -q '^[[:space:]]*[^#[:space:]]' "$list"; then rm -f "$list"; fi
  if [ -f "$made" ]; then
    if getent group nt >/dev/null; then groupdel nt; fi
    rm -f "$made"
  elif getent group nt >/dev/null; then
    echo "kept: the group nt, which was there before; groupdel nt removes it"
  fi
  rmdir /etc/nt 2>/dev/null || true
  reload
  echo "removed"
  exit 0
fi
install -d -o root -g root -m 755 "$(dirname "$limits")" /etc/nt
if ! getent group nt >/dev/null; then
  groupadd --system nt
  : >"$made"
elif [ ! -f "$made" ]; then
  # It may have been made for something else.
  gid=$(getent group nt | cut -d: -f3)
  who=$({ getent group nt | cut -d: -f4 | tr , '\n'; getent passwd | awk -F: -v gid="$gid" '$4 == gid {print $1}'; } | sort -u | xargs)
  echo "the group nt was there before: whoever is in it may use every drive that is bound (${who:-nobody is in it now})" >&2
fi
install -D -o root -g root -m 755 "$here/udev/nt-vfio-group" "$program"
install -D -o root -g root -m 644 "$here/udev/70-nt-vfio.rules" "$rules"
# Places of models that root records. Older versions let the group write to the first.
# A link that a member laid in place of the second would give its target to root.
install -d -o root -g root -m 755 /var/lib/nt
chmod g-s /var/lib/nt
if [ -L /var/lib/nt/system ] || { [ -e /var/lib/nt/system ] && [ "$(stat -c %u /var/lib/nt/system)" != 0 ]; }; then
  echo "$0: /var/lib/nt/system is a link or not root's; move it away, then run this again" >&2
  exit 1
fi
install -d -o root -g root -m 755 /var/lib/nt/system
cat >"$limits" <<LIMITS
# Memory that a drive writes to is locked. Members of nt may lock all of it; nt keeps to its plan.
@nt - memlock unlimited
LIMITS
# Entries that others could have written are not to be believed because root owns the file from now on.
# A link of root's to a file in a folder of root's is his own; one that leads nowhere would have that place written to.
others=
if [ -L "$list" ]; then
  folder=$(dirname "$(readlink -f "$list")")
  if [ "$(stat -c %u "$list")" != 0 ] || [ ! -f "$list" ] || [ -n "$(find "$folder" -prune \( ! -user 0 -o -perm /022 \))" ]; then others=1; fi
fi
if [ -e "$list" ] && [ -n "$(find -L "$list" -prune \( ! -user 0 -o -perm /022 \))" ]; then others=1; fi
if [ -n "$others" ]; then
  aside=$list.others
  n=1
  while [ -e "$aside" ] || [ -L "$aside" ]; do
    n=$((n + 1))
    aside=$list.others.$n
  done
  mv "$list" "$aside"
  echo "$list was not root's alone and is now $aside: look through its entries, which others could have written, and put those back that are yours" >&2
fi
[ -f "$list" ] || echo "# Drives that nt may take; \`nt device list\` prints the lines." >"$list"
chown root:root "$list"
chmod 644 "$list"
reload
echo "done; add yourself to the group with: usermod -aG nt ${SUDO_USER:-USER} (then log in again)"
