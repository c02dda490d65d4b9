//! Memory of the machine and the limits that cgroups set on this process.

use std::path::{Path, PathBuf};

use crate::plan::format_bytes;

/// Memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// `MemTotal`.
    pub total: Option<u64>,
    /// `MemAvailable`.
    pub available: Option<u64>,
    /// What the tightest cgroup above this process still allows, its file cache counted as free.
    pub cgroup_left: Option<u64>,
}

impl Memory {
    /// What may be taken: the smaller of what is available and what cgroups allow, less a reserve
    /// of max(4 GiB, 15 % of RAM) for everything else (a quarter where the machine is that small).
    pub fn budget(&self) -> Option<u64> {
        let available = self.available?;
        let total = self.total.unwrap_or(available);
        let free = self.cgroup_left.map_or(available, |left| left.min(available));
        let reserve = (total / 100 * 15).max(4 << 30);
        Some(free.saturating_sub(reserve).max(free / 4))
    }

    /// Why `need` bytes cannot be taken without bringing the machine to its knees; `None` if they can, or
    /// if nothing is known.
    pub fn refusal(&self, need: u64) -> Option<String> {
        let available = self.available?;
        let free = self.cgroup_left.map_or(available, |left| left.min(available));
        let keep = available_min(self.total.unwrap_or(available));
        let who = if free < available { "this process's cgroup leaves" } else { "this machine has" };
        (need.saturating_add(keep) > free).then(|| {
            format!(
                "weights and buffers would take {}, but {who} {} of memory free, of which {} stay for everything else; --ram {}MiB would fit",
                format_bytes(need),
                format_bytes(free),
                format_bytes(keep),
                self.budget().unwrap_or(0) >> 20
            )
        })
    }
}

/// The least memory that must stay available on a machine with `total` bytes, or it stalls.
pub(super) fn available_min(total: u64) -> u64 {
    (total / 50).clamp(256 << 20, 1 << 30).min(total / 8)
}

/// Reads memory facts below `root` (`/` outside tests).
pub fn memory(root: &Path) -> Memory {
    let meminfo = std::fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    Memory {
        total: kib_field(&meminfo, "MemTotal:"),
        available: kib_field(&meminfo, "MemAvailable:"),
        cgroup_left: cgroup_left(root),
    }
}

/// A `Name:   123 kB` field, in bytes.
pub(super) fn kib_field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|l| l.strip_prefix(name))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The least of what is left from this process's cgroup (v2) up to the root.
fn cgroup_left(root: &Path) -> Option<u64> {
    cgroups(root).iter().filter_map(|folder| left_in(folder)).min()
}

/// What one cgroup leaves: below `memory.max`, where the kernel kills, and `memory.high`, where it makes
/// processes wait. File cache counts as free: the kernel takes it back first.
pub(super) fn left_in(folder: &Path) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    let number = |name: &str| read(name).trim().parse::<u64>().ok();
    let limit = [number("memory.max"), number("memory.high")].into_iter().flatten().min()?;
    let stat = read("memory.stat");
    let cache = field(&stat, "file").saturating_sub(field(&stat, "shmem"));
    Some(limit.saturating_sub(number("memory.current")?.saturating_sub(cache)))
}

/// The number behind `name` in lines of name and number; 0 where there is none.
pub(super) fn field(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|v| v.trim().parse().ok()).unwrap_or(0)
}

/// Folders of this process's cgroup (v2) and those above it, up to the root.
pub(super) fn cgroups(root: &Path) -> Vec<PathBuf> {
    let own = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let Some(path) = own.lines().find_map(|l| l.strip_prefix("0::")) else { return Vec::new() };
    let base = root.join("sys/fs/cgroup");
    let own = base.join(path.trim_start_matches('/'));
    own.ancestors().take_while(|dir| dir.starts_with(&base)).map(Path::to_path_buf).collect()
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
        assert_eq!(m, Memory { total: None, available: None, cgroup_left: None });
        assert_eq!(m.budget(), None);
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
        assert_eq!(m.budget(), Some((9u64 << 30) - (33_554_432u64 * 1024 / 100 * 15)));
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
    fn what_does_not_fit_is_refused_with_the_nearest_that_does() {
        let small = Memory { total: Some(2 << 30), available: Some(1800 << 20), cgroup_left: None };
        assert_eq!(small.refusal(1 << 30), None);
        let why = small.refusal(8 << 30).unwrap();
        assert!(why.contains("8.00 GiB") && why.contains("--ram 450MiB"), "{why}");
        let boxed = Memory { cgroup_left: Some(1 << 30), ..small };
        assert!(boxed.refusal(1 << 30).unwrap().contains("cgroup"));
        assert_eq!(Memory { total: None, available: None, cgroup_left: None }.refusal(u64::MAX), None);
    }

    #[test]
    fn fifteen_percent_is_kept_on_a_large_machine() {
        let m = Memory { total: Some(128 << 30), available: Some(120 << 30), cgroup_left: None };
        assert_eq!(m.budget(), Some((120u64 << 30) - ((128u64 << 30) / 100 * 15)));
    }
}
