//! The last line: the kernel's own word that nobody else claims a drive (`O_EXCL`). A mount, an array,
//! a volume or swap claims; a process that only has the node open does not.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use super::host::Host;
use super::sysfs::Controller;
use super::{Check, Reason};

/// How a claim that is let go at once ended.
#[derive(Debug)]
pub enum Claim {
    /// Every namespace was ours alone, for this long.
    Made(Duration),
    /// It was not tried.
    NotTried,
    /// This user may not open the nodes.
    NotAllowed,
    /// Somebody else claims one.
    Refused(Vec<Reason>),
}

/// Claims every namespace of a drive and lets go at once: two system calls a namespace, far below 10 ms.
pub fn moment(host: &Host, controller: &Controller) -> Claim {
    let start = Instant::now();
    let mut claims: Vec<File> = Vec::new();
    for namespace in &controller.namespaces {
        let path = format!("/dev/{}", namespace.whole.name);
        let flags = libc::O_EXCL | libc::O_NONBLOCK;
        let options = OpenOptions::new().read(true).custom_flags(flags).clone();
        match host.open_block(&namespace.whole.name, &namespace.whole.number, &options) {
            Ok(file) => claims.push(file),
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => return Claim::NotAllowed,
            Err(e) => {
                let what = match e.raw_os_error() {
                    Some(libc::EBUSY) => "something else claims it (mounted, swap, part of an array or volume)".into(),
                    _ => format!("it cannot be claimed: {e}"),
                };
                return Claim::Refused(vec![Reason::new(Check::Open, &path, what)]);
            }
        }
    }
    drop(claims);
    Claim::Made(start.elapsed())
}
