//! Memory of the machine and the limits on this process: cgroups of both versions, address space, data and
//! locked memory.

use std::path::{Path, PathBuf};

use crate::units::format_bytes;

/// Memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// `MemTotal`.
    pub total: Option<u64>,
    /// `MemAvailable`.
    pub available: Option<u64>,
    /// What the tightest cgroup above this process still allows, its file cache counted as free.
    pub cgroup_left: Option<u64>,
    /// What the limits on address space and data (`ulimit -v`, `ulimit -d`) still allow.
    pub address_left: Option<u64>,
    /// What may still be locked (`ulimit -l`); `None` without a limit or with CAP_IPC_LOCK.
    pub lock_left: Option<u64>,
}

/// One bound on what may be taken.
struct Bound {
    who: &'static str,
    /// Bytes that it leaves.
    free: u64,
    /// Bytes of them that a plan leaves to everything else.
    reserve: u64,
    /// Bytes of them that nothing may take, however it was asked for.
    keep: u64,
}

/// The least memory of a cgroup that must stay free, of `free` at the start, or the watch of memory stops a run.
pub(super) fn cgroup_free_min(free: u64) -> u64 {
    (free / 10).min(32 << 20)
}

/// Bytes of address space that stay free, for stacks of threads and what libraries map.
const ADDRESS_KEEP: u64 = 64 << 20;

impl Memory {
    fn bounds(&self) -> impl Iterator<Item = Bound> {
        let total = self.total.or(self.available).unwrap_or(0);
        let reserve = (total / 100 * 15).max(4 << 30);
        let machine = self.available.map(|free| Bound {
            who: "this machine has",
            free,
            reserve: reserve.min(free - free / 4),
            keep: available_min(total),
        });
        let of_process = |who, left: Option<u64>, keep: &dyn Fn(u64) -> u64| {
            left.map(|free| Bound { who, free, reserve: reserve.min(free / 4), keep: keep(free) })
        };
        // A quarter more than what the watch stops at.
        let keep_of_cgroup = |free| cgroup_free_min(free) / 4 * 5;
        let cgroup = of_process("this process's cgroup leaves", self.cgroup_left, &keep_of_cgroup);
        let limits = "the limits on this process (ulimit -v, ulimit -d) leave";
        let address = of_process(limits, self.address_left, &|free| ADDRESS_KEEP.min(free / 8));
        machine.into_iter().chain(cgroup).chain(address)
    }

    /// Bytes that are free by the tightest bound, of the machine, a cgroup or a limit; `None` if nothing is known.
    pub fn free(&self) -> Option<u64> {
        self.bounds().map(|b| b.free).min()
    }

    /// What may be taken; `None` if nothing is known. Of the machine's memory a reserve of max(4 GiB, 15 % of
    /// RAM) stays for everything else (three quarters of what is free where that is less), of what a cgroup or
    /// a limit leaves as much, but no more than a quarter.
    pub fn budget(&self) -> Option<u64> {
        self.bounds().map(|b| b.free - b.reserve.max(b.keep).min(b.free)).min()
    }

    /// A budget that still holds where a little less is free than now, rounded down to MiB; `None` if nothing
    /// is known or left.
    pub fn safe_budget(&self) -> Option<u64> {
        let mib = (self.budget()? / 100 * 97) >> 20;
        (mib > 0).then_some(mib << 20)
    }

    /// Why `need` bytes cannot be taken without bringing the machine to its knees; `None` if they can, or
    /// if nothing is known.
    pub fn refusal(&self, need: u64) -> Option<Shortage> {
        let short = self.bounds().find(|b| need.saturating_add(b.keep) > b.free)?;
        Some(Shortage::Free { need, who: short.who, free: short.free, keep: short.keep })
    }

    /// Why `need` bytes cannot be locked; `None` if they can, or if nothing is known.
    pub fn lock_refusal(&self, need: u64) -> Option<Shortage> {
        let left = self.lock_left.filter(|left| need > *left)?;
        Some(Shortage::Locked { need, left })
    }
}

/// Memory that is not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Shortage {
    /// Too little is free.
    #[error(
        "weights, KV cache and buffers would take {}, but {who} {} of memory free, of which {} stay for everything else",
        format_bytes(*.need), format_bytes(*.free), format_bytes(*.keep)
    )]
    Free {
        /// Bytes that are needed.
        need: u64,
        /// Who has too few, with a verb.
        who: &'static str,
        /// Bytes that are free.
        free: u64,
        /// Bytes of those that stay for others.
        keep: u64,
    },
    /// Too little may be locked.
    #[error(
        "reading a bound drive locks {} of memory, but the limit on locked memory (ulimit -l) leaves {}; `nt doctor` says how to raise it",
        format_bytes(*.need), format_bytes(*.left)
    )]
    Locked {
        /// Bytes that are needed.
        need: u64,
        /// Bytes that may be locked still.
        left: u64,
    },
}

/// The least memory that must stay available on a machine with `total` bytes, or it stalls.
pub(super) fn available_min(total: u64) -> u64 {
    (total / 50).clamp(256 << 20, 1 << 30).min(total / 8)
}

/// Reads memory facts below `root` (`/` outside tests).
pub fn memory(root: &Path) -> Memory {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let (meminfo, status, limits) = (read("proc/meminfo"), read("proc/self/status"), read("proc/self/limits"));
    let left = |limit: &str, used: &str| {
        Some(soft_limit(&limits, limit)?.saturating_sub(kib_field(&status, used).unwrap_or(0)))
    };
    let spaces = [left("Max address space", "VmSize:"), left("Max data size", "VmData:")];
    Memory {
        total: kib_field(&meminfo, "MemTotal:"),
        available: kib_field(&meminfo, "MemAvailable:"),
        cgroup_left: cgroup_left(root),
        address_left: spaces.into_iter().flatten().min(),
        lock_left: left("Max locked memory", "VmLck:").filter(|_| !may_lock(&status)),
    }
}

/// A `Name:   123 kB` field, in bytes.
pub(super) fn kib_field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|l| l.strip_prefix(name))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The soft limit of a line of `proc/self/limits`, in bytes; `None` where there is none.
fn soft_limit(limits: &str, name: &str) -> Option<u64> {
    limits.lines().find_map(|l| l.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

/// Whether this process has CAP_IPC_LOCK, which no limit on locked memory binds.
fn may_lock(status: &str) -> bool {
    const IPC_LOCK: u64 = 1 << 14;
    let set = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    set.and_then(|s| u64::from_str_radix(s.trim(), 16).ok()).is_some_and(|caps| caps & IPC_LOCK != 0)
}

/// The least of what is left from this process's cgroups up to their roots.
fn cgroup_left(root: &Path) -> Option<u64> {
    cgroups(root).iter().filter_map(Cgroup::left).min()
}

/// The number behind `name` in lines of name and number; 0 where there is none.
fn field(text: &str, name: &str) -> u64 {
    optional_field(text, name).unwrap_or(0)
}

fn optional_field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '))?.trim().parse().ok()
}

/// A cgroup that this process belongs to.
#[derive(Debug)]
pub(super) struct Cgroup {
    folder: PathBuf,
    /// Of version 1, whose files have other names.
    v1: bool,
}

/// Limits of version 1 from here on mean none: the kernel writes the largest number of whole pages.
const V1_NO_LIMIT: u64 = 1 << 62;

impl Cgroup {
    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.join(name)).unwrap_or_default()
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.read(name).trim().parse().ok()
    }

    /// Bytes that it leaves. File cache counts as free: the kernel takes it back first.
    pub fn left(&self) -> Option<u64> {
        let (limit, used, cache) = if self.v1 { self.v1_use()? } else { self.v2_use()? };
        Some(limit.saturating_sub(used.saturating_sub(cache)))
    }

    /// Limit, use and cache: below `memory.max` the kernel kills, below `memory.high` it makes processes wait.
    fn v2_use(&self) -> Option<(u64, u64, u64)> {
        let limit = [self.number("memory.max"), self.number("memory.high")].into_iter().flatten().min()?;
        let stat = self.read("memory.stat");
        let cache = field(&stat, "file").saturating_sub(field(&stat, "shmem"));
        Some((limit, self.number("memory.current")?, cache))
    }

    /// Limit, use and cache. The limits of folders above are told too, which a container may not see.
    fn v1_use(&self) -> Option<(u64, u64, u64)> {
        let stat = self.read("memory.stat");
        let own = self.number("memory.limit_in_bytes");
        let above = optional_field(&stat, "hierarchical_memory_limit");
        let limit = own.into_iter().chain(above).min().filter(|n| *n < V1_NO_LIMIT)?;
        Some((limit, self.number("memory.usage_in_bytes")?, field(&stat, "total_inactive_file")))
    }

    /// Times that it ran out of memory since it was made; `None` where that is not told.
    pub fn ooms(&self) -> Option<u64> {
        if self.v1 {
            return optional_field(&self.read("memory.oom_control"), "oom_kill");
        }
        let events = self.read("memory.events");
        (!events.is_empty()).then(|| field(&events, "oom"))
    }
}

/// Cgroups of this process and those above them, up to the roots of their mounts: version 2, and the memory
/// controller of version 1 (a hybrid machine has both).
pub(super) fn cgroups(root: &Path) -> Vec<Cgroup> {
    let own = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mounts = std::fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    let mut out = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(number), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let v1 = controllers.split(',').any(|c| c == "memory");
        if !v1 && (number, controllers) != ("0", "") {
            continue;
        }
        let (mount, top) = mount_of(&mounts, v1)
            .unwrap_or_else(|| (if v1 { "/sys/fs/cgroup/memory" } else { "/sys/fs/cgroup" }.into(), "/".into()));
        let base = root.join(mount.trim_start_matches('/'));
        // In a container the mount may begin at the process's own cgroup, whose path is the host's.
        let below = path.strip_prefix(top.trim_end_matches('/')).unwrap_or(path);
        let folder = base.join(below.trim_start_matches('/'));
        // Folders that are not there say nothing; the mount's own root comes last.
        let up = folder.ancestors().take_while(|dir| dir.starts_with(&base));
        out.extend(up.map(|dir| Cgroup { folder: dir.to_path_buf(), v1 }));
    }
    out
}

/// Where cgroups of that version are mounted, and the cgroup that is mounted there.
fn mount_of(mountinfo: &str, v1: bool) -> Option<(String, String)> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (top, mount) = (fields.next()?, fields.next()?);
        let mut fs = after.split(' ');
        let kind = fs.next()?;
        let options = fs.nth(1).unwrap_or("");
        let wanted = match v1 {
            true => kind == "cgroup" && options.split(',').any(|o| o == "memory"),
            false => kind == "cgroup2",
        };
        wanted.then(|| (mount.to_owned(), top.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let d = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let p = d.path().join(path);
            std::fs::create_dir_all(p.parent().unwrap()).unwrap();
            std::fs::write(p, text).unwrap();
        }
        d
    }

    #[test]
    fn a_machine_without_facts_has_no_budget() {
        let d = tree(&[]);
        let m = memory(d.path());
        assert_eq!(m, Memory::default());
        assert_eq!(m.budget(), None);
    }

    #[test]
    fn a_plan_leaves_a_cgroup_more_than_the_watch_stops_at() {
        for free in [1 << 20, 10 << 20, 50 << 20, 400 << 20, 64 << 30] {
            let m = Memory { cgroup_left: Some(free), ..Memory::default() };
            let left = free - m.budget().unwrap();
            assert!(left > cgroup_free_min(free), "{free} {left}");
            assert!(m.refusal(free - cgroup_free_min(free)).is_some() && m.refusal(free / 2).is_none(), "{free}");
        }
    }

    #[test]
    fn the_tightest_cgroup_counts() {
        let d = tree(&[
            ("proc/meminfo", "MemTotal:       33554432 kB\nMemFree: 1 kB\nMemAvailable:   31457280 kB\n"),
            ("proc/self/cgroup", "0::/user/app\n"),
            ("sys/fs/cgroup/user/memory.max", "10737418240\n"),
            ("sys/fs/cgroup/user/memory.current", "1073741824\n"),
            ("sys/fs/cgroup/user/app/memory.max", "max\n"),
            ("sys/fs/cgroup/user/app/memory.current", "4096\n"),
        ]);
        let m = memory(d.path());
        assert_eq!(m.cgroup_left, Some(9 << 30));
        assert_eq!(m.budget(), Some((9u64 << 30) / 4 * 3));
    }

    #[test]
    fn a_cgroup_that_makes_wait_counts_and_its_cache_is_free() {
        let d = tree(&[
            ("proc/self/cgroup", "0::/a\n"),
            ("sys/fs/cgroup/a/memory.max", "max\n"),
            ("sys/fs/cgroup/a/memory.high", "1000\n"),
            ("sys/fs/cgroup/a/memory.current", "900\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 5\nfile 400\nshmem 100\n"),
        ]);
        assert_eq!(memory(d.path()).cgroup_left, Some(400));
    }

    #[test]
    fn what_does_not_fit_is_refused_and_the_budget_is_not() {
        let small = Memory { total: Some(2 << 30), available: Some(1800 << 20), ..Memory::default() };
        assert_eq!(small.refusal(1 << 30), None);
        let why = small.refusal(8 << 30).unwrap().to_string();
        assert!(why.contains("8.00 GiB") && why.contains("this machine"), "{why}");
        assert_eq!(small.budget(), Some(450 << 20));
        let boxed = Memory { cgroup_left: Some(1 << 30), ..small };
        assert!(boxed.refusal(1 << 30).unwrap().to_string().contains("cgroup"));
        assert_eq!(Memory::default().refusal(u64::MAX), None);
    }

    /// Guards against a refusal that recommends what it has just refused: small machines, small cgroups and
    /// small limits included.
    #[test]
    fn a_budget_is_never_refused() {
        for total in [256u64 << 20, 1 << 30, 23 << 30, 512 << 30] {
            for left in [20u64 << 20, 64 << 20, 600 << 20, 9 << 30, 400 << 30] {
                for (cgroup_left, address_left) in [(None, None), (Some(left), None), (None, Some(left))] {
                    let available = Some(total / 10 * 9);
                    let m = Memory { total: Some(total), available, cgroup_left, address_left, lock_left: None };
                    let budget = m.budget().unwrap();
                    assert!(budget > 0 && m.refusal(budget).is_none(), "{m:?}: {budget}");
                    assert!(m.safe_budget().is_none_or(|b| b < budget));
                }
            }
        }
    }

    /// Guards against limits of cgroup v1 that are not seen, until the kernel kills without a word.
    #[test]
    fn a_cgroup_of_version_1_counts_with_its_inactive_files_free() {
        let d = tree(&[
            ("proc/self/cgroup", "9:name=systemd:/x\n4:memory:/x\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "67108864\n"),
            ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "30000000\n"),
            ("sys/fs/cgroup/memory/x/memory.stat", "cache 9\ninactive_file 7\ntotal_inactive_file 20000000\n"),
            ("sys/fs/cgroup/memory/x/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n"),
        ]);
        assert_eq!(memory(d.path()).cgroup_left, Some(67_108_864 - 10_000_000));
        assert_eq!(cgroups(d.path())[0].ooms(), Some(2));
    }

    #[test]
    fn the_parents_of_a_cgroup_of_version_1_count() {
        let d = tree(&[
            ("proc/self/cgroup", "5:cpu,cpuacct:/y\n4:hugetlb,memory:/a/b\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "1000\n"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "400\n"),
            ("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "300\n"),
            ("sys/fs/cgroup/memory/a/b/memory.stat", "hierarchical_memory_limit 5000\ntotal_inactive_file 0\n"),
        ]);
        assert_eq!(memory(d.path()).cgroup_left, Some(600));
        std::fs::remove_dir_all(d.path().join("sys/fs/cgroup/memory/a/b")).unwrap();
        assert_eq!(memory(d.path()).cgroup_left, Some(600), "a folder that is not there says nothing");
    }

    #[test]
    fn in_a_container_the_root_of_the_mount_counts() {
        let files = [
            ("proc/self/cgroup", "4:memory:/docker/abc\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "500\n"),
        ];
        assert_eq!(memory(tree(&files).path()).cgroup_left, Some(1500));
        // The mount begins at the container's cgroup, and lies elsewhere.
        let mut files = files.to_vec();
        let mounts = "30 25 0:26 /docker/abc /cg/mem rw,nosuid - cgroup cgroup rw,memory\n";
        files.extend([
            ("proc/self/mountinfo", mounts),
            ("cg/mem/memory.limit_in_bytes", "900\n"),
            ("cg/mem/memory.usage_in_bytes", "100\n"),
        ]);
        assert_eq!(memory(tree(&files).path()).cgroup_left, Some(800));
    }

    #[test]
    fn a_hybrid_machine_is_asked_for_both_versions() {
        let d = tree(&[
            ("proc/self/cgroup", "4:memory:/x\n0::/y\n"),
            (
                "proc/self/mountinfo",
                "31 25 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n32 25 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            ),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "5000\n"),
            ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "1000\n"),
            ("sys/fs/cgroup/unified/y/memory.max", "3000\n"),
            ("sys/fs/cgroup/unified/y/memory.current", "100\n"),
        ]);
        assert_eq!(memory(d.path()).cgroup_left, Some(2900));
        std::fs::write(d.path().join("sys/fs/cgroup/unified/y/memory.max"), "max\n").unwrap();
        assert_eq!(memory(d.path()).cgroup_left, Some(4000));
    }

    /// Guards against a plan that counts on memory which `ulimit -v` or `ulimit -d` refuses.
    #[test]
    fn limits_of_the_process_count() {
        let limits = "Limit Soft Hard Units\nMax data size             700000 unlimited bytes\nMax address space         2000000 unlimited bytes\nMax locked memory         8192 8192 bytes\n";
        let status = "VmSize:\t1000 kB\nVmLck:\t4 kB\nVmData:\t100 kB\nCapEff:\t0000000000000000\n";
        let d = tree(&[("proc/self/limits", limits), ("proc/self/status", status)]);
        let m = memory(d.path());
        assert_eq!((m.address_left, m.lock_left), (Some(700_000 - 102_400), Some(4096)));
        assert!(m.lock_refusal(5000).unwrap().to_string().contains("ulimit -l") && m.lock_refusal(4096).is_none());
        assert!(m.refusal(1 << 20).unwrap().to_string().contains("ulimit -v"));
        std::fs::write(d.path().join("proc/self/status"), status.replace("0000\n", "4000\n")).unwrap();
        assert_eq!(memory(d.path()).lock_left, None);
        std::fs::write(d.path().join("proc/self/limits"), limits.replace("700000", "unlimited")).unwrap();
        assert_eq!(memory(d.path()).address_left, Some(2_000_000 - 1_024_000));
    }

    #[test]
    fn fifteen_percent_is_kept_on_a_large_machine() {
        let m = Memory { total: Some(128 << 30), available: Some(120 << 30), ..Memory::default() };
        assert_eq!(m.budget(), Some((120u64 << 30) - ((128u64 << 30) / 100 * 15)));
    }
}
