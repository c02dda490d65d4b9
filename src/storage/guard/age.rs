//! Whether a path may have led elsewhere when the kernel followed it. Where an export is known by a path alone, what the
//! path leads to now proves nothing: its node may have been removed and another file put there since.

use std::ffi::CString;
use std::io;

use super::host::{Host, Unreadable};
use super::node::Node;
use super::sysfs::Controller;

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
        let renamed = self.changed > since && self.changed != self.written;
        let born = self.born.unwrap_or(self.changed);
        match self.kind {
            libc::S_IFDIR => self.born.is_some_and(|born| born > since) || renamed,
            libc::S_IFREG => born > since || renamed,
            _ => self.changed > since,
        }
    }
}

/// The first step on the way along `path` that may have come there since the machine started, which is before any export
/// began: folders of configfs do not keep the time when they were made. A node below `/dev` that has the name and the
/// number that sysfs tells is the kernel's own, and is believed; so is a link to it that is udev's by its notes, unless udev
/// has it for `controller` as well, to which it may have led before. A mount over a step is not seen.
///
/// # Errors
/// If an age cannot be told.
pub fn changed_since_start(host: &Host, controller: &Controller, path: &str) -> Result<Option<String>, Unreadable> {
    let stat = "/proc/stat";
    let started = host.read(stat)?.lines().find_map(|l| l.strip_prefix("btime ")?.trim().parse().ok());
    let since = (started.ok_or_else(|| Unreadable::new(stat, "it does not tell when the machine started"))?, 0);
    let mut steps = Vec::new();
    host.walk(path, &mut |step| steps.push(step.to_owned()));
    let notes = steps.last().map_or(Ok(None), |last| notes_of_kernels(host, last))?;
    for step in &steps {
        let believed = match &notes {
            // The kernel makes `/dev` and its node anew at each start, and udev the folders of its links.
            Some(_) if step == "/dev" || Some(step) == steps.last() => true,
            Some(notes) if step.starts_with("/dev/") => match host.link(step) {
                Err(_) => true,
                Ok(_) => is_link_of(host, notes, step)? && !is_link_of_any(host, controller, step)?,
            },
            _ => false,
        };
        if !believed && times(host, step)?.is_later(since) {
            return Ok(Some(step.clone()));
        }
    }
    Ok(None)
}

/// Where udev has its notes on the device whose node the kernel made at `path`, below `/dev` under the device's own name;
/// none if it did not.
fn notes_of_kernels(host: &Host, path: &str) -> Result<Option<String>, Unreadable> {
    let Some(name) = path.strip_prefix("/dev/").filter(|name| !name.contains('/')) else { return Ok(None) };
    let (class, sort, found) = match host.node(path)? {
        Some(Node::Block(found)) => ("block", 'b', found),
        Some(Node::Char(found)) => ("nvme", 'c', found),
        _ => return Ok(None),
    };
    let number = host.read_if_there(&format!("/sys/class/{class}/{name}/dev"))?;
    let is_its = number.and_then(|n| n.parse().ok()) == Some(found);
    Ok(is_its.then(|| format!("/run/udev/data/{sort}{found}")))
}

/// Whether udev's notes name this link below `/dev`.
fn is_link_of(host: &Host, notes: &str, link: &str) -> Result<bool, Unreadable> {
    let text = host.read_if_there(notes)?.unwrap_or_default();
    let link = link.strip_prefix("/dev/");
    Ok(text.lines().any(|l| l.strip_prefix("S:").is_some_and(|name| Some(name) == link)))
}

/// The same of any block device of `controller`.
fn is_link_of_any(host: &Host, controller: &Controller, link: &str) -> Result<bool, Unreadable> {
    for device in controller.devices() {
        if is_link_of(host, &format!("/run/udev/data/b{}", device.number), link)? {
            return Ok(true);
        }
    }
    Ok(false)
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
            ("a folder renamed since", times(libc::S_IFDIR, 11, 5, Some(5)), true),
            ("a folder of unknown birth with new files", times(libc::S_IFDIR, 99, 99, None), false),
        ] {
            assert_eq!(times.is_later((10, 0)), later, "{what}");
        }
    }
}
