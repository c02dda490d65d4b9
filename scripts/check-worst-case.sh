#!/usr/bin/env bash
# The owner's worst case: a 70B model in Q2_K on a machine with little RAM next to the GPU. What nt does to others while it loads and
# decodes, whether a signal at any moment ends it cleanly, and how far its speed is from what `nt plan` says.
#
#   scripts/check-worst-case.sh [NT]     NT: the binary (target/release/nt); needs a GPU
#
# $VRAM (14GiB), $THREADS (8), $LIMIT (30 GiB, of the cgroup), $LAYERS (80), $STOPS (10), $DIR (/dev/shm: 27 GB), or $MODEL, a file to be
# used in place of the one that is made; BACKEND=cpu tries the script itself where there is no GPU. Needs python3 with numpy and gguf. Takes some six minutes on an H100.
#
# nt runs in a cgroup of its own with the limit. Where none can be made, --ram keeps it to what it would take there, and the script says
# so (a limit on address space does not do: CUDA alone reserves hundreds of GiB). Next to it a second process, in another cgroup, touches
# memory and sleeps; its pressure is its cgroup's `memory.pressure`, else the machine's, else only how late it wakes.
set -euo pipefail
cd "$(dirname "$0")/.."
nt=${1:-target/release/nt}
[ -x "$nt" ] || { echo "$nt is missing; build it with: cargo build --release" >&2; exit 1; }
work=$(mktemp -d "${DIR:-/dev/shm}/nt-worst.XXXXXX")
trap 'rm -rf "$work"' EXIT
model=${MODEL:-}
if [ -z "$model" ]; then
  model=$work/m.gguf
  python3 tests/fidelity/synth_gguf.py llama3-70b Q2_K "$model" --layers "${LAYERS:-80}" > /dev/null
fi
python3 - "$nt" "$model" << 'PY'
import json, mmap, os, pathlib, random, re, signal, subprocess, sys, threading, time

nt, model = sys.argv[1:]
GIB = 1 << 30
vram, threads = os.environ.get("VRAM", "14GiB"), os.environ.get("THREADS", "8")
limit, stops = float(os.environ.get("LIMIT", "30")) * GIB, int(os.environ.get("STOPS", "10"))
PRESSURE_MAX, SPEED_ERROR_MAX, STOP_S_MAX = 10.0, 0.10, 5.0
failed = 0


def told(ok, text):
    global failed
    failed |= not ok
    print(f"{'ok   ' if ok else 'FAIL '} {text}", flush=True)


def cgroup(name, bytes_max=None):
    """A folder of a new cgroup of whichever version this machine has, or none where none can be made."""
    for base, file in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        folder = pathlib.Path(base) / f"nt-worst-{name}-{os.getpid()}"
        try:
            folder.mkdir()
            if (folder / file).exists():
                if bytes_max:
                    (folder / file).write_text(str(int(bytes_max)))
                return folder
        except OSError:
            pass
        if folder.exists():
            folder.rmdir()
    return None


groups = [cgroup("nt", limit), cgroup("other")]
if None in groups:
    # As nt plans with a limit: what is left of it is a reserve.
    room = int(limit - max(4 * GIB, 0.15 * limit))
    print(f"      no cgroup can be made here: --ram {room / GIB:.1f} GiB stands for a limit of {limit / GIB:.0f} GiB; whether the limit itself is kept is NOT checked")
else:
    room = None
backend = os.environ.get("BACKEND", "cuda")
placement = ["--threads", threads, "--ctx", "2048", "--backend", backend]
placement += (["--vram", vram] if backend == "cuda" else []) + (["--ram", str(room)] if room else [])


def enter(group):
    return (lambda: (group / "cgroup.procs").write_text(str(os.getpid()))) if group else None


def start(*args, **how):
    return subprocess.Popen([nt, *args], text=True, preexec_fn=enter(groups[0]), **how)


# The second process: sleeps 10 ms and touches pages, and says how late it was.
OTHER = """
import mmap, random, sys, time
m = mmap.mmap(-1, 256 << 20)
for i in range(0, len(m), 4096): m[i] = 1
late = []
while True:
    began = time.monotonic(); time.sleep(0.01)
    for _ in range(200): m[random.randrange(0, len(m))] = 1
    late.append((began, time.monotonic() - began - 0.01))
    if len(late) == 100:
        print(round(sum(l for _, l in late) / sum(l + 0.01 for _, l in late) * 100, 2), round(max(l for _, l in late) * 1e3, 1), flush=True); late = []
"""
other = subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True, preexec_fn=enter(groups[1]))
# By phase: highest avg10 by kind of pressure, worst lateness of the other process, highest swap and memory of nt's group.
phase, seen = ["before"], {}
ended = threading.Event()
current = [None]


def pressures():
    for kind in ("memory", "io", "cpu"):
        for path in ([groups[1] / f"{kind}.pressure"] if groups[1] else []) + [pathlib.Path("/proc/pressure") / kind]:
            try:
                yield kind, float(re.search(r"some avg10=([\d.]+)", path.read_text()).group(1))
                break
            except (OSError, AttributeError):
                continue


def note(key, value):
    now = seen.setdefault(phase[0], {})
    now[key] = max(now.get(key, 0.0), value)


def watch():
    while not ended.wait(0.5):
        for kind, value in pressures():
            note(f"{kind} some avg10 %", value)
        child = current[0]
        if child and child.poll() is None:
            try:
                status = pathlib.Path(f"/proc/{child.pid}/status").read_text()
                note("swapped by nt, MiB", int(re.search(r"VmSwap:\s+(\d+)", status).group(1)) / 1024)
                note("resident, GiB", int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / (1 << 20))
            except (OSError, AttributeError):
                pass


def lateness():
    for line in other.stdout:
        share, worst = map(float, line.split())
        note("other process late, % of its time", share)
        note("other process late at most, ms", worst)


def swapped():
    text = pathlib.Path("/proc/vmstat").read_text()
    return [int(n) for n in re.findall(r"^pswp(?:in|out) (\d+)$", text, re.M)]


def vram_used():
    try:
        ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.run(ask, capture_output=True, text=True).stdout.split()[0])
    except (OSError, IndexError, ValueError):
        return None


try:
    threading.Thread(target=watch, daemon=True).start()
    threading.Thread(target=lateness, daemon=True).start()
    pages, free_before = swapped(), vram_used()
    time.sleep(3)
    # Rates are measured first, so that the plan and the run know the same ones.
    phase[0] = "probe"
    probe = start("probe", "memory", "link", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    probe.communicate()
    phase[0] = "plan"
    plan = start("plan", model, *placement, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = plan.communicate()
    if plan.returncode:
        sys.exit(f"nt plan: exit code {plan.returncode}: {err.strip()}")
    plan = json.loads(out)
    if not plan["simulated"]:
        sys.exit("nt plan makes no prediction: a rate that it needs is not known")
    predicted, homes = plan["simulated"]["tokens_per_s"], plan["plan"]
    print("      plan:", ", ".join(f"{t.upper()} {homes[t]['bytes'] / GIB:.1f} GiB" for t in "abc"), f"site {plan['site']}, {predicted:.2f} tokens/s, id {plan['plan_id']}")

    phase[0] = "load and decode"
    began = time.monotonic()
    current[0] = bench = start("bench", model, *placement, "-p", "64", "-n", "32", "-r", "2", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = bench.communicate()
    whole_s = time.monotonic() - began
    told(bench.returncode == 0, f"bench: exit code {bench.returncode} in {whole_s:.0f} s {'' if bench.returncode == 0 else err.strip()[-400:]}")
    if bench.returncode == 0:
        got = json.loads(out)["decode"]["tokens_per_s"]
        told(abs(got / predicted - 1) <= SPEED_ERROR_MAX, f"decode {got:.2f} tokens/s, nt plan said {predicted:.2f} ({100 * (got / predicted - 1):+.1f} %, at most {100 * SPEED_ERROR_MAX:.0f})")

    # SIGTERM, half of the times while weights are loaded and half while tokens are generated.
    phase[0] = "SIGTERM"
    load_s = None
    for i in range(stops):
        # The first, which is stopped while it decodes, says how long loading takes.
        decoding = i % 2 == 0
        began = time.monotonic()
        current[0] = run = start("run", model, *placement, "-p", "one two three", "-n", "400", "--temp", "0", "--ignore-eos", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if decoding:
            first = run.stdout.read(1)
            load_s = load_s or time.monotonic() - began
            time.sleep(0.1 + 0.35 * i)
            where = f"{0.1 + 0.35 * i:.2f} s behind the first token" if first else "without any token"
        else:
            part = i / stops
            time.sleep((load_s or 10) * part)
            where = f"{100 * part:.0f} % of loading"
        sent = time.monotonic()
        early = run.poll()
        run.send_signal(signal.SIGTERM)
        try:
            _, err = run.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            told(False, f"SIGTERM {where}: nt did not end within a minute")
            continue
        took = time.monotonic() - sent
        # Before it listens to signals it has nothing to end.
        at_once = run.returncode == -signal.SIGTERM and sent - began < 0.3
        clean = (run.returncode == 130 or at_once) and early is None and "panicked" not in err
        told(clean and took <= STOP_S_MAX, f"SIGTERM {where}: exit code {run.returncode} after {took:.2f} s{'' if clean else ': ' + err.strip()[-300:]}")
    current[0] = None
    time.sleep(1)
    free_after = vram_used()
    if free_before is not None and free_after is not None:
        told(free_after <= free_before + 64, f"VRAM in use before and behind all runs: {free_before} and {free_after} MiB")

    for name, values in seen.items():
        print(f"      {name}: " + ", ".join(f"{k} {v:.1f}" for k, v in sorted(values.items())))
    kinds = {k.split()[0] for values in seen.values() for k in values if "avg10" in k}
    if "memory" in kinds:
        worst = max(v for values in seen.values() for k, v in values.items() if k.startswith("memory some"))
        whose = "the second process's" if groups[1] else "the machine's"
        told(worst < PRESSURE_MAX, f"{whose} memory pressure: some avg10 {worst:.1f} % at most (below {PRESSURE_MAX:.0f})")
    else:
        print("      this kernel tells no pressure (PSI): only how late the second process was is known")
    now = swapped()
    swap = max((v.get("swapped by nt, MiB", 0) for v in seen.values()), default=0)
    told(now == pages and swap == 0, f"no swapping: pages in and out {pages} before, {now} behind; nt's own {swap:.0f} MiB at most")
finally:
    ended.set()
    if current[0] and current[0].poll() is None:
        current[0].kill()
    other.kill()
    other.wait()
    time.sleep(0.3)
    for group in filter(None, groups):
        try:
            group.rmdir()
        except OSError:
            pass
sys.exit(failed)
PY
