//! Memory of the machine and the limits that cgroups set on this process.

use std::path::{Path, PathBuf};

/// Memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// `MemTotal`.
    pub total: Option<u64>,
    /// `MemAvailable`.
    pub available: Option<u64>,
    /// What the tightest cgroup above this process still allows.
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

/// The least of `memory.max - memory.current` from this process's cgroup (v2) up to the root.
fn cgroup_left(root: &Path) -> Option<u64> {
    let left = |dir: PathBuf| {
        let number = |name: &str| std::fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
        Some(number("memory.max")?.saturating_sub(number("memory.current")?))
    };
    cgroups(root).into_iter().filter_map(left).min()
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
    fn fifteen_percent_is_kept_on_a_large_machine() {
        let m = Memory { total: Some(128 << 30), available: Some(120 << 30), cgroup_left: None };
        assert_eq!(m.budget(), Some((120u64 << 30) - ((128u64 << 30) / 100 * 15)));
    }
}
