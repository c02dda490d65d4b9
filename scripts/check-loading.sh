#!/usr/bin/env bash
# Stops nt while it loads: how long Ctrl-C (SIGINT) and SIGTERM take to end it, and whether a shortage of memory does.
#
#   scripts/check-loading.sh [NT] [RUNS]     NT: the binary (target/release/nt); RUNS: 20 of each signal
#
# Loads a model of 1.9 GiB with the shapes of Llama 3 8B from /dev/shm ($DIR for another place; a drive shows the reads
# that are in flight). The second part puts nt into a cgroup whose limit falls while it loads, as if others took that
# memory; it needs root and is left out elsewhere, and the script says so.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh
nt=${1:-target/release/nt}
runs=${2:-20}
[ -x "$nt" ] || die "$nt is missing; build it with: cargo build --release"
need_pip gguf==0.19.0 numpy==2.4.6
work=$(mktemp -d "${DIR:-/dev/shm}/nt-loading.XXXXXX")
trap 'rm -rf "$work"' EXIT
python3 tests/fidelity/synth_gguf.py llama3-8b Q4_K_M "$work/m.gguf" --layers 10 > /dev/null
python3 - "$nt" "$work/m.gguf" "$runs" << 'PY'
import os, pathlib, signal, subprocess, sys, time

nt, model, runs = sys.argv[1], sys.argv[2], int(sys.argv[3])
size = os.path.getsize(model)
page = os.sysconf("SC_PAGE_SIZE")
failed = 0


def start(limit=None):
    """nt, once it has read a tenth of the model; None if it was loaded before that was seen."""
    args = [nt, "run", model, "-p", "x", "-n", "1", "--ctx", "64", "--backend", "cpu", "--tier-c", "none"]
    enter = (lambda: (limit / "cgroup.procs").write_text(str(os.getpid()))) if limit else None
    child = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=enter)
    while child.poll() is None:
        try:
            resident = int(pathlib.Path(f"/proc/{child.pid}/statm").read_text().split()[1]) * page
        except (OSError, IndexError):
            break
        if resident > size * 3 // 4:
            child.kill()
            break
        if resident > size // 10:
            return child
        time.sleep(0.0005)
    child.communicate()
    return None


def signals():
    global failed
    for number in (signal.SIGINT, signal.SIGTERM):
        times, late = [], 0
        while len(times) < runs and late < 10 * runs:
            child = start()
            if child is None:
                late += 1
                continue
            began = time.monotonic()
            child.send_signal(number)
            _, err = child.communicate()
            ms = (time.monotonic() - began) * 1e3
            if child.returncode != 130 or "units in RAM" in err:
                print(f"FAIL  {number.name}: exit code {child.returncode}: {err.strip()}")
                failed = 1
            times.append(ms)
        times.sort()
        if not times:
            print(f"FAIL  {number.name}: loading was never seen")
            failed = 1
            continue
        word = "ok   " if times[-1] <= 200 and len(times) == runs else "SLOW "
        failed |= word != "ok   "
        print(f"{word} {number.name}: {len(times)} runs ended {times[0]:.0f} to {times[-1]:.0f} ms after the signal, median {times[len(times) // 2]:.0f} ms")


def cgroup():
    """A cgroup with a limit of memory, of whichever version this machine has; the file of the limit and of the use."""
    name = f"nt-check-{os.getpid()}"
    for base, limit, use in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ):
        folder = pathlib.Path(base) / name
        try:
            folder.mkdir()
        except OSError:
            continue
        if (folder / limit).exists():
            return folder, folder / limit, folder / use
        folder.rmdir()
    return None


def shortage():
    """The limit falls to 192 MiB above what is used: the rest of the model does not fit."""
    global failed
    made = cgroup()
    if made is None:
        print("      no cgroup can be made here: a shortage of memory while loading is NOT checked")
        return
    folder, limit, use = made
    try:
        for _ in range(20):
            limit.write_text(str(size * 3))
            child = start(folder)
            if child is None:
                continue
            child.send_signal(signal.SIGSTOP)
            time.sleep(0.02)
            limit.write_text(str(int(use.read_text()) + (192 << 20)))
            child.send_signal(signal.SIGCONT)
            _, err = child.communicate()
            ok = child.returncode == 1 and "stopped before memory ran out" in err
            failed |= not ok
            print(f"{'ok   ' if ok else 'FAIL '} shortage: exit code {child.returncode}: {err.strip().splitlines()[-1] if err.strip() else ''}")
            return
        print("FAIL  shortage: loading was never seen")
        failed = 1
    finally:
        time.sleep(0.2)
        folder.rmdir()


signals()
shortage()
sys.exit(failed)
PY
