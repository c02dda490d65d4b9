#!/bin/sh
# Prepares a machine for drives read through VFIO: a group, a udev rule, a limit of locked memory,
# an empty allowlist. Run as root; `scripts/install.sh --remove` undoes all of it but the allowlist
# once it has entries.
set -eu
rules=/etc/udev/rules.d/70-nt-vfio.rules
limits=/etc/security/limits.d/70-nt.conf
list=/etc/nt/drives.toml
here=$(cd "$(dirname "$0")/.." && pwd)
[ "$(id -u)" = 0 ] || { echo "$0: must be run as root" >&2; exit 1; }
if [ "${1:-}" = --remove ]; then
  rm -f "$rules" "$limits"
  if [ -d /var/lib/nt ]; then rmdir /var/lib/nt 2>/dev/null || echo "kept: /var/lib/nt holds records"; fi
  if [ -f "$list" ] && ! grep -q '^\[\[drive\]\]' "$list"; then rm -f "$list"; fi
  if getent group nt >/dev/null; then groupdel nt; fi
  if command -v udevadm >/dev/null; then udevadm control --reload; fi
  echo "removed"
  exit 0
fi
getent group nt >/dev/null || groupadd --system nt
install -D -m 644 "$here/udev/70-nt-vfio.rules" "$rules"
mkdir -p "$(dirname "$limits")" /etc/nt
install -d -m 2775 -g nt /var/lib/nt # places of models, recorded by nt device extents
cat >"$limits" <<LIMITS
# Memory that a drive writes to is locked. Members of nt may lock all of it; nt keeps to its plan.
@nt - memlock unlimited
LIMITS
[ -f "$list" ] || echo "# Drives that nt may take; \`nt device list\` prints the lines." >"$list"
chown root:root "$list"
chmod 644 "$list"
if command -v udevadm >/dev/null; then udevadm control --reload; fi
echo "done; add yourself to the group with: usermod -aG nt ${SUDO_USER:-USER} (then log in again)"
