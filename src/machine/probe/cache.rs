//! Measured rates, kept in `$XDG_CACHE_HOME/nt/probe.toml` with the device and the day, so that a
//! plan need not guess.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::storage::safe;
use crate::units::is_rate;

/// Most bytes of the cache that are read; one has a few hundred for each device.
const CACHE_MAX: u64 = 1 << 20;

/// A measured rate of one link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// `storage`, `memory`, `h2d`, `d2h`, `vram`; `decode` for weights that processors compute in one-token passes.
    pub kind: String,
    /// The device, named so that it is known again.
    pub identity: String,
    /// Bytes per second.
    pub bytes_per_s: f64,
    /// Bytes of one read or copy at which it was reached.
    pub block_bytes: Option<u64>,
    /// Reads in flight, or threads.
    pub depth: Option<usize>,
    /// Day of the measurement, `2026-11-23`.
    pub date: String,
    /// The same in seconds since 1970.
    pub unix_s: u64,
}

impl Rate {
    /// A rate measured now.
    pub fn now(kind: &str, identity: &str, bytes_per_s: f64, block_bytes: Option<u64>, depth: Option<usize>) -> Rate {
        let unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Rate {
            kind: kind.into(),
            identity: identity.into(),
            bytes_per_s,
            block_bytes,
            depth,
            date: date(unix_s),
            unix_s,
        }
    }

    /// Seconds since it was measured.
    pub fn age_s(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs().saturating_sub(self.unix_s))
    }
}

#[derive(Default, Serialize, Deserialize)]
struct Cache {
    #[serde(default)]
    rate: Vec<Rate>,
}

/// This day in UTC, `2026-11-23`.
pub fn today() -> String {
    Rate::now("", "", 0.0, None, None).date
}

/// A time in seconds since 1970 as `2026-11-23T12:34:56Z`.
pub fn utc(unix_s: u64) -> String {
    let s = unix_s % 86_400;
    format!("{}T{:02}:{:02}:{:02}Z", date(unix_s), s / 3600, s / 60 % 60, s % 60)
}

/// Where the cache lies; `None` without `XDG_CACHE_HOME` and `HOME`.
pub fn file() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(base.join("nt/probe.toml"))
}

/// Least bytes of a read whose rate says something of how weights are read.
pub const KEPT_BLOCK_MIN: u64 = 128 << 10;

/// The last measured rate of this kind and device, if there is one.
pub fn measured(kind: &str, identity: &str) -> Option<Rate> {
    find(&file()?, kind, identity)
}

/// Keeps `rates`, each in place of an older one of the same kind and device.
///
/// # Errors
/// If the cache cannot be written.
pub fn record(rates: &[Rate]) -> std::io::Result<()> {
    match file() {
        Some(path) => store(&path, rates),
        None => Err(std::io::Error::other("neither XDG_CACHE_HOME nor HOME is set")),
    }
}

/// An unreadable cache is an empty one: it only costs another measurement. So is one that is no regular file, or longer
/// than any that was written here.
fn load(path: &Path) -> Cache {
    let text = safe::read(path, CACHE_MAX).ok().and_then(|c| String::from_utf8(c.bytes).ok());
    text.and_then(|t| toml::from_str(&t).ok()).unwrap_or_default()
}

/// The last rate of a device. Those of smaller reads than weights are read in are none: older versions kept such. Nor are those that
/// nothing in a machine has.
fn find(path: &Path, kind: &str, identity: &str) -> Option<Rate> {
    let kept = |r: &Rate| r.block_bytes.is_none_or(|b| b >= KEPT_BLOCK_MIN) && is_rate(r.bytes_per_s);
    load(path).rate.into_iter().find(|r| r.kind == kind && r.identity == identity && kept(r))
}

fn store(path: &Path, rates: &[Rate]) -> std::io::Result<()> {
    let mut cache = load(path);
    for new in rates {
        cache.rate.retain(|r| r.kind != new.kind || r.identity != new.identity);
        cache.rate.push(new.clone());
    }
    let text = toml::to_string(&cache).map_err(std::io::Error::other)?;
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("probe.toml");
    let folder = safe::cache_folder(path.parent().unwrap_or(Path::new(".")))?;
    safe::replace(&folder.at(name), text.as_bytes(), 0o644, ".nt-")
}

/// The day, in UTC, of a time in seconds since 1970: civil calendar from a day count, with years
/// that begin in March (so that the leap day is the last).
fn date(unix_s: u64) -> String {
    let days = unix_s / 86_400 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_rate_of_a_device_is_found() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join("nt/probe.toml");
        assert_eq!(find(&path, "storage", "a"), None);
        let (a, b) =
            (Rate::now("storage", "a", 1e9, Some(1 << 20), None), Rate::now("memory", "a", 2e9, None, Some(2)));
        store(&path, &[a.clone(), b.clone()]).unwrap();
        let newer = Rate { bytes_per_s: 3e9, ..a };
        store(&path, std::slice::from_ref(&newer)).unwrap();
        assert_eq!(find(&path, "storage", "a"), Some(newer));
        assert_eq!(find(&path, "memory", "a"), Some(b));
        assert_eq!(find(&path, "storage", "b"), None);
        store(&path, &[Rate::now("storage", "a", 5e7, Some(4096), None)]).unwrap();
        assert_eq!(find(&path, "storage", "a"), None, "small reads say nothing of weights");
    }

    #[test]
    fn a_broken_cache_is_an_empty_one() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join("probe.toml");
        std::fs::write(&path, "rate = 5").unwrap();
        assert_eq!(find(&path, "storage", "a"), None);
        store(&path, &[Rate::now("storage", "a", 1e9, None, None)]).unwrap();
        assert!(find(&path, "storage", "a").is_some());
    }

    /// A FIFO in the place of the cache made root wait, and a link led root to another file.
    #[test]
    fn what_lies_in_the_place_of_the_cache_is_replaced_and_not_followed() {
        let d = crate::storage::safe::tests::scratch();
        let path = d.path().join("nt/probe.toml");
        std::fs::create_dir(d.path().join("nt")).unwrap();
        let rate = Rate::now("storage", "a", 1e9, None, None);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
        assert_eq!(find(&path, "storage", "a"), None);
        store(&path, std::slice::from_ref(&rate)).unwrap();
        assert_eq!(find(&path, "storage", "a"), Some(rate.clone()));
        let other = d.path().join("other");
        std::fs::write(&other, "precious").unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        store(&path, std::slice::from_ref(&rate)).unwrap();
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "precious");
        assert!(std::fs::symlink_metadata(&path).unwrap().is_file());
        // A link in the place of the folder, also one that leads nowhere yet.
        for target in [d.path().to_path_buf(), d.path().join("nowhere")] {
            let linked = d.path().join("linked");
            std::os::unix::fs::symlink(&target, &linked).unwrap();
            assert!(store(&linked.join("probe.toml"), std::slice::from_ref(&rate)).is_err());
            assert!(!target.join("probe.toml").exists());
            std::fs::remove_file(&linked).unwrap();
        }
    }

    #[test]
    fn days_follow_the_calendar() {
        for (s, day) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (1_709_251_199, "2024-02-29"),
            (1_795_392_000, "2026-11-23"),
        ] {
            assert_eq!(date(s), day);
        }
    }
}
