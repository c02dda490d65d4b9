//! Whether a path may have led elsewhere when the kernel followed it. Where an export is known by a path alone, what the
//! path leads to now proves nothing: its node may have been removed and another file put there since.

use std::ffi::CString;
use std::io;

use super::host::{Host, Unreadable};
use super::node::Node;

/// A moment, in seconds and nanoseconds.
type Moment = (i64, u32);

/// What an entry of a folder says of its own age.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// Its kind, as in `st_mode`.
    kind: u32,
    /// Its last change: what it is called, who owns it, what it holds.
    changed: Moment,
    /// The last write.
    written: Moment,
    /// When it was made, where the file system knows.
    born: Option<Moment>,
}

impl Times {
    /// Whether it may have come to its place after `since`. Every change of the name of a node or link is told by the time
    /// of its last change. A file or a folder is changed by who writes to it, too: it was made too late, or was renamed
    /// after its last write.
    fn is_later(&self, since: Moment) -> bool {
        let born = self.born.unwrap_or(self.changed);
        match self.kind {
            libc::S_IFDIR => self.born.is_some_and(|born| born > since),
            libc::S_IFREG => born > since || (self.changed > since && self.changed != self.written),
            _ => self.changed > since,
        }
    }
}

/// The first step on the way along `path` that may have come there since the machine started, which is before any export
/// began: folders of configfs do not keep the time when they were made. A node below `/dev` that has the name and the
/// number that sysfs tells is the kernel's own, and is believed. A mount over a step is not seen.
///
/// # Errors
/// If an age cannot be told.
pub fn changed_since_start(host: &Host, path: &str) -> Result<Option<String>, Unreadable> {
    let stat = "/proc/stat";
    let started = host.read(stat)?.lines().find_map(|l| l.strip_prefix("btime ")?.trim().parse().ok());
    let since = (started.ok_or_else(|| Unreadable::new(stat, "it does not tell when the machine started"))?, 0);
    let mut steps = Vec::new();
    host.walk(path, &mut |step| steps.push(step.to_owned()));
    if steps.last().map_or(Ok(false), |last| is_kernels(host, last))? {
        return Ok(None);
    }
    for step in steps {
        if times(host, &step)?.is_later(since) {
            return Ok(Some(step));
        }
    }
    Ok(None)
}

/// Whether `path` is the node below `/dev` that the kernel made for a device of this name.
fn is_kernels(host: &Host, path: &str) -> Result<bool, Unreadable> {
    let Some(name) = path.strip_prefix("/dev/").filter(|name| !name.contains('/')) else { return Ok(false) };
    let (class, found) = match host.node(path)? {
        Some(Node::Block(found)) => ("block", found),
        Some(Node::Char(found)) => ("nvme", found),
        _ => return Ok(false),
    };
    let number = host.read_if_there(&format!("/sys/class/{class}/{name}/dev"))?;
    Ok(number.and_then(|n| n.parse().ok()) == Some(found))
}

/// The times of `path` itself; no link is followed and no server asked where that can be avoided.
fn times(host: &Host, path: &str) -> Result<Times, Unreadable> {
    let fail = |e: &io::Error| Host::fail(path, e);
    let real = host.real(path);
    let name = CString::new(real.as_os_str().as_encoded_bytes()).map_err(|e| fail(&e.into()))?;
    // SAFETY: all zeros are a valid value of this structure of integers.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT | libc::AT_STATX_DONT_SYNC;
    let mask = libc::STATX_TYPE | libc::STATX_CTIME | libc::STATX_MTIME | libc::STATX_BTIME;
    // SAFETY: `name` ends with a zero byte and `found` may be written; both outlive the call.
    if unsafe { libc::statx(libc::AT_FDCWD, name.as_ptr(), flags, mask, &raw mut found) } != 0 {
        return Err(fail(&io::Error::last_os_error()));
    }
    let moment = |t: libc::statx_timestamp| (t.tv_sec, t.tv_nsec);
    let born = (found.stx_mask & libc::STATX_BTIME != 0).then(|| moment(found.stx_btime));
    let kind = u32::from(found.stx_mode) & libc::S_IFMT;
    let (changed, written) = (moment(found.stx_ctime), moment(found.stx_mtime));
    if host.is_real() {
        return Ok(Times { kind, changed, written, born });
    }
    // In a picture a plain file stands for a node, and the time that a test can set for the one that it cannot.
    let node = matches!(host.node(path)?, Some(Node::Block(_) | Node::Char(_)));
    Ok(Times { kind: if node { libc::S_IFBLK } else { kind }, changed: written, written, born: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node by its last change, a file by when it was made or renamed, however often it is written to.
    #[test]
    fn what_came_later_is_told_from_what_was_only_written() {
        let times = |kind, changed, written, born: Option<i64>| Times {
            kind,
            changed: (changed, 0),
            written: (written, 0),
            born: born.map(|b| (b, 0)),
        };
        for (what, times, later) in [
            ("an old node", times(libc::S_IFBLK, 9, 9, None), false),
            ("a node made since", times(libc::S_IFBLK, 11, 11, Some(11)), true),
            ("a node renamed since", times(libc::S_IFBLK, 11, 5, Some(5)), true),
            ("a link made since", times(libc::S_IFLNK, 11, 11, Some(11)), true),
            ("an old image", times(libc::S_IFREG, 9, 9, Some(9)), false),
            ("an image that is written to", times(libc::S_IFREG, 99, 99, Some(9)), false),
            ("a file made since", times(libc::S_IFREG, 11, 11, Some(11)), true),
            ("a file renamed since", times(libc::S_IFREG, 11, 9, Some(9)), true),
            ("a file of unknown birth, written since", times(libc::S_IFREG, 11, 11, None), true),
            ("a folder with new files", times(libc::S_IFDIR, 99, 99, Some(9)), false),
            ("a folder made since", times(libc::S_IFDIR, 99, 99, Some(11)), true),
        ] {
            assert_eq!(times.is_later((10, 0)), later, "{what}");
        }
    }
}
