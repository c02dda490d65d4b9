//! Keeps a run from taking the machine down: watches memory pressure, what is available and the
//! cgroup's events, and asks the run to stop before the kernel kills somebody.
//!
//! The decision is a pure function of facts. A thread reads them four times per second, and the more often the nearer
//! a limit is: loading fills memory at gigabytes per second.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::memory::{self, kib_field};

/// The longest that the watch relies on what it saw: a drive's reads fill at most 200 MB in it, should a limit fall.
const INTERVAL: Duration = Duration::from_millis(25);
/// The same where a limit is all but reached.
const INTERVAL_MIN: Duration = Duration::from_millis(4);
/// Bytes per second that memory may fill at.
const FILLING: f64 = 8e9;
/// Killed before the desktop, should it come to that; 1000 is the most.
const OOM_SCORE: i32 = 500;

/// What the kernel says about memory right now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Facts {
    /// Share of the last ten seconds in which some task waited for memory, in percent.
    pub some_avg10: Option<f64>,
    /// Share in which all tasks did, in percent.
    pub full_avg10: Option<f64>,
    /// `MemTotal`, in bytes.
    pub total: Option<u64>,
    /// `MemAvailable`, in bytes.
    pub available: Option<u64>,
    /// What the tightest cgroup of either version leaves, its file cache counted as free, in bytes.
    pub cgroup_free: Option<u64>,
    /// Times the cgroup ran out of memory since it was made.
    pub cgroup_oom: Option<u64>,
}

/// When to stop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Least `MemAvailable`, in bytes.
    pub available_min: u64,
    /// Below this much `MemAvailable` pressure counts, in bytes. Above it, those who wait are in a
    /// cgroup of their own, and stopping would not help them.
    pub tight: u64,
    /// Most pressure on all tasks, in percent.
    pub full_avg10_max: f64,
    /// Most pressure on some task, in percent.
    pub some_avg10_max: f64,
    /// Least that the cgroup leaves, in bytes.
    pub cgroup_free_min: u64,
    /// `cgroup_oom` at the start.
    pub cgroup_oom: u64,
}

impl Limits {
    /// For a machine that looks like `now` before the run.
    pub fn of(now: &Facts) -> Limits {
        let total = now.total.unwrap_or(8 << 30);
        Limits {
            available_min: memory::available_min(total),
            tight: total / 8,
            full_avg10_max: 10.0,
            some_avg10_max: 40.0,
            cgroup_free_min: memory::cgroup_free_min(now.cgroup_free.unwrap_or(u64::MAX)),
            cgroup_oom: now.cgroup_oom.unwrap_or(0),
        }
    }
}

/// Whether a run may go on.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Yes.
    Go,
    /// No, for this reason: a sentence with the numbers.
    Stop(String),
}

/// Judges `now`. What is not known speaks for going on.
pub fn verdict(now: &Facts, limits: &Limits) -> Verdict {
    let mib = |bytes: u64| bytes >> 20;
    if let Some(a) = now.available.filter(|a| *a < limits.available_min) {
        return Verdict::Stop(format!(
            "only {} MiB of memory are available on this machine, and below {} MiB it would stall",
            mib(a),
            mib(limits.available_min)
        ));
    }
    if let Some(n) = now.cgroup_oom.filter(|n| *n > limits.cgroup_oom) {
        return Verdict::Stop(format!(
            "the memory limit of this process's cgroup was hit ({} times since the start)",
            n - limits.cgroup_oom
        ));
    }
    if let Some(left) = now.cgroup_free.filter(|f| *f < limits.cgroup_free_min) {
        return Verdict::Stop(format!("the cgroup of this process leaves {} MiB of memory", mib(left)));
    }
    if now.available.is_some_and(|a| a >= limits.tight) {
        return Verdict::Go;
    }
    let over = |share: Option<f64>, max: f64| share.filter(|s| *s > max);
    if let Some(s) = over(now.full_avg10, limits.full_avg10_max) {
        return Verdict::Stop(format!("all processes waited for memory {s:.0} % of the last ten seconds"));
    }
    if let Some(s) = over(now.some_avg10, limits.some_avg10_max) {
        return Verdict::Stop(format!("processes waited for memory {s:.0} % of the last ten seconds"));
    }
    Verdict::Go
}

/// How long facts like `now` may be relied on.
fn interval(now: &Facts, limits: &Limits) -> Duration {
    let machine = now.available.map(|a| a.saturating_sub(limits.available_min));
    let cgroup = now.cgroup_free.map(|f| f.saturating_sub(limits.cgroup_free_min));
    let left = machine.into_iter().chain(cgroup).min();
    left.map_or(INTERVAL, |left| Duration::from_secs_f64(left as f64 / FILLING).clamp(INTERVAL_MIN, INTERVAL))
}

/// Reads the facts below `root`.
pub fn facts(root: &Path) -> Facts {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let pressure = read("proc/pressure/memory");
    let avg10 = |kind: &str| {
        let line = pressure.lines().find(|l| l.split(' ').next() == Some(kind))?;
        line.split(' ').find_map(|w| w.strip_prefix("avg10="))?.parse().ok()
    };
    let meminfo = read("proc/meminfo");
    let mut out = Facts {
        some_avg10: avg10("some"),
        full_avg10: avg10("full"),
        total: kib_field(&meminfo, "MemTotal:"),
        available: kib_field(&meminfo, "MemAvailable:"),
        ..Facts::default()
    };
    for cgroup in memory::cgroups(root) {
        out.cgroup_free = out.cgroup_free.into_iter().chain(cgroup.left()).min();
        if let Some(ooms) = cgroup.ooms() {
            out.cgroup_oom = Some(out.cgroup_oom.unwrap_or(0) + ooms);
        }
    }
    out
}

/// Raises this process's score, so that the kernel, should it have to kill, does not take the
/// desktop. A refusal changes nothing else.
pub fn raise_oom_score(root: &Path) {
    let path = root.join("proc/self/oom_score_adj");
    let now = std::fs::read_to_string(&path).ok().and_then(|t| t.trim().parse::<i32>().ok());
    if now.is_some_and(|n| n < OOM_SCORE) {
        let _ = std::fs::write(path, OOM_SCORE.to_string());
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    reason: Option<String>,
    over: bool,
}

/// A thread that watches until it is dropped.
pub struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Begins to watch the machine below `root`. Without a thread nothing is watched, and a warning says so.
    pub fn start(root: &Path) -> Watch {
        let shared = Arc::new(Shared::default());
        let (theirs, root): (_, PathBuf) = (shared.clone(), root.into());
        let thread = std::thread::Builder::new().name("nt-pressure".into()).spawn(move || watch(&theirs, &root));
        let thread =
            thread.inspect_err(|e| tracing::warn!("memory pressure is not watched: no thread could be started: {e}"));
        Watch { shared, thread: thread.ok() }
    }

    /// Why the run should stop, once it should.
    pub fn reason(&self) -> Option<String> {
        self.shared.state.lock().ok()?.reason.clone()
    }

    /// Whether it should.
    pub fn tripped(&self) -> bool {
        self.shared.state.lock().is_ok_and(|s| s.reason.is_some())
    }
}

fn watch(shared: &Shared, root: &Path) {
    let limits = Limits::of(&facts(root));
    let Ok(mut state) = shared.state.lock() else { return };
    while !state.over {
        drop(state);
        let now = facts(root);
        let verdict = verdict(&now, &limits);
        let Ok(mut locked) = shared.state.lock() else { return };
        if let Verdict::Stop(reason) = verdict {
            locked.reason = Some(reason);
            return;
        }
        if locked.over {
            return;
        }
        let Ok((next, _)) = shared.wake.wait_timeout(locked, interval(&now, &limits)) else { return };
        state = next;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Ok(mut state) = self.shared.state.lock() {
            state.over = true;
        }
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::facts::tests::tree;
    use super::*;

    const GIB: u64 = 1 << 30;

    fn calm() -> Facts {
        Facts {
            some_avg10: Some(0.0),
            full_avg10: Some(0.0),
            total: Some(32 * GIB),
            available: Some(16 * GIB),
            cgroup_free: Some(8 * GIB),
            cgroup_oom: Some(3),
        }
    }

    #[test]
    fn each_danger_stops_and_is_named() {
        let limits = Limits::of(&calm());
        assert_eq!(verdict(&calm(), &limits), Verdict::Go);
        assert_eq!(verdict(&Facts::default(), &limits), Verdict::Go);
        let low = Some(3 * GIB);
        for (facts, words) in [
            (Facts { available: Some(100 << 20), ..calm() }, "100 MiB"),
            (Facts { cgroup_oom: Some(5), ..calm() }, "2 times"),
            (Facts { cgroup_free: Some(8 << 20), ..calm() }, "8 MiB"),
            (Facts { full_avg10: Some(30.0), available: low, ..calm() }, "30 %"),
            (Facts { some_avg10: Some(60.0), available: low, ..calm() }, "60 %"),
        ] {
            assert!(matches!(verdict(&facts, &limits), Verdict::Stop(r) if r.contains(words)), "{words}");
        }
    }

    /// Guards against a limit that is passed between two looks.
    #[test]
    fn near_a_limit_the_watch_looks_more_often() {
        let limits = Limits::of(&calm());
        assert_eq!(interval(&calm(), &limits), INTERVAL);
        assert_eq!(interval(&Facts::default(), &limits), INTERVAL);
        let near = |free| interval(&Facts { cgroup_free: Some(free), ..calm() }, &limits);
        assert!(near(160 << 20) < INTERVAL && near(96 << 20) < near(160 << 20) && near(33 << 20) == INTERVAL_MIN);
        assert_eq!(interval(&Facts { available: Some(limits.available_min), ..calm() }, &limits), INTERVAL_MIN);
    }

    #[test]
    fn pressure_elsewhere_does_not_stop_a_machine_with_room() {
        let limits = Limits::of(&calm());
        assert_eq!(verdict(&Facts { full_avg10: Some(90.0), ..calm() }, &limits), Verdict::Go);
    }

    #[test]
    fn small_machines_have_small_limits() {
        let small = Facts { total: Some(GIB), available: Some(200 << 20), ..Facts::default() };
        assert_eq!(verdict(&small, &Limits::of(&small)), Verdict::Go);
    }

    #[test]
    fn files_of_the_kernel_are_read() {
        let d = tree(&[
            (
                "proc/pressure/memory",
                "some avg10=12.50 avg60=1.00 avg300=0.00 total=5\nfull avg10=3.25 avg60=0 avg300=0 total=1\n",
            ),
            ("proc/meminfo", "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n"),
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/memory.max", "1000000\n"),
            ("sys/fs/cgroup/a/memory.current", "900000\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 5\nfile_mapped 7\nfile 50000\nshmem 10000\n"),
            ("sys/fs/cgroup/a/memory.events", "low 0\nmax 9\noom 1\noom_kill 1\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
        ]);
        let f = facts(d.path());
        assert_eq!(
            f,
            Facts {
                some_avg10: Some(12.5),
                full_avg10: Some(3.25),
                total: Some(GIB),
                available: Some(GIB / 2),
                cgroup_free: Some(140_000),
                cgroup_oom: Some(1),
            }
        );
    }

    #[test]
    fn a_cgroup_of_version_1_is_watched() {
        let d = tree(&[
            ("proc/self/cgroup", "4:memory:/a\n0::/\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "67108864\n"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "64000000\n"),
            ("sys/fs/cgroup/memory/a/memory.stat", "total_inactive_file 1000\n"),
            ("sys/fs/cgroup/memory/a/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
        ]);
        let f = facts(d.path());
        assert_eq!((f.cgroup_free, f.cgroup_oom), (Some(67_108_864 - 63_999_000), Some(3)));
        // A tenth of what was free at the start stays, so that a small one can be used at all.
        let began = Facts { cgroup_free: Some(50 << 20), ..f };
        assert!(matches!(verdict(&f, &Limits::of(&began)), Verdict::Stop(r) if r.contains("cgroup")));
        assert_eq!(verdict(&Facts { cgroup_free: Some(6 << 20), ..f }, &Limits::of(&began)), Verdict::Go);
    }

    #[test]
    fn a_watch_notices_a_change_and_ends() {
        let d = tree(&[("proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")]);
        let watch = Watch::start(d.path());
        assert!(!watch.tripped());
        std::fs::write(d.path().join("new"), "MemTotal: 33554432 kB\nMemAvailable: 1024 kB\n").unwrap();
        std::fs::rename(d.path().join("new"), d.path().join("proc/meminfo")).unwrap();
        while !watch.tripped() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(watch.reason().unwrap().contains("1 MiB"));
    }

    #[test]
    fn the_score_is_raised_and_never_lowered() {
        for (before, after) in [("0\n", "500"), ("800\n", "800\n")] {
            let d = tree(&[("proc/self/oom_score_adj", before)]);
            raise_oom_score(d.path());
            assert_eq!(std::fs::read_to_string(d.path().join("proc/self/oom_score_adj")).unwrap(), after);
        }
    }
}
