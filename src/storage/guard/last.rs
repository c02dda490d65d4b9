//! The last look at a drive, right before the first step that changes it. Between the examination under the claim and
//! that step somebody who claims nothing may have opened the drive, or opened it, written, and closed it again: the first
//! is found by looking for users once more, the second by the kernel's count of writes.

use std::fs::File;
use std::time::Duration;

use super::host::{Host, Unreadable};
use super::sysfs::{self, Controller};
use super::words::Words;
use super::{Check, Reason, exports, note, open, pci, stack};

/// How often users are looked for, and the time between: who only looks at a drive, as monitors do, is soon done.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(200);

/// What was written to a drive before its examination began.
#[derive(Debug, Clone, Copy)]
pub struct LastLook {
    written: u64,
}

impl LastLook {
    /// Begins before the first examination.
    ///
    /// # Errors
    /// If the kernel's counts cannot be read.
    pub fn begin(host: &Host, controller: &Controller) -> Result<LastLook, Unreadable> {
        Ok(LastLook { written: written(host, controller)? })
    }

    /// Everybody who uses the drive now, or has written to it since [`LastLook::begin`]. `claims` are its namespaces, open:
    /// what others left in the kernel's cache is flushed through them, so that it counts.
    pub fn reasons(self, host: &Host, controller: &Controller, claims: &[File]) -> Vec<Reason> {
        let mut out = Vec::new();
        for left in (0..TRIES).rev() {
            out.clear();
            // Loop devices and exports open a drive in the kernel, where no process has it.
            note(&mut out, |out| stack::loops(host, controller, out));
            note(&mut out, |out| exports::exported(host, controller, &Words::new(host, controller, Vec::new())?, out));
            note(&mut out, |out| open::opened(host, controller, std::process::id(), out));
            note(&mut out, |out| pci::hot(host, controller, out));
            note(&mut out, |out| counted(host, controller, out));
            note(&mut out, |out| is_same(host, controller, out));
            if out.is_empty() || left == 0 || !host.is_real() || host.is_stopped() {
                break;
            }
            std::thread::sleep(PAUSE);
        }
        note(&mut out, |out| {
            for (claim, namespace) in claims.iter().zip(&controller.namespaces) {
                let path = format!("/dev/{}", namespace.whole.name);
                claim.sync_all().map_err(|e| Unreadable::new(&path, format!("flushing it failed: {e}")))?;
            }
            let now = written(host, controller)?;
            if now != self.written {
                let what = "somebody wrote to it while it was being checked; end who did, and try again";
                let path = controller.namespaces.first().map_or(controller.pci_path(), |n| counts(&n.whole.name));
                out.push(Reason::new(Check::Open, &path, what.into()));
            }
            Ok(())
        });
        out
    }
}

/// Each namespace whose writes the kernel does not count, so that the last look would see none.
pub fn counted(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for namespace in &controller.namespaces {
        let name = &namespace.whole.name;
        let path = format!("/sys/class/block/{name}/queue/iostats");
        if host.read_if_there(&path)?.as_deref() == Some("0") {
            let what = format!(
                "the kernel does not count what is written to {name}, so a write during the checks would not be seen; switch counting on (`echo 1 > /sys/block/{name}/queue/iostats`)"
            );
            out.push(Reason::new(Check::Unreadable, &path, what));
        }
    }
    Ok(())
}

/// That the drive at the address is the one that was examined, with no other namespaces: one that came since was neither
/// examined nor claimed. Partitions may have been forgotten meanwhile, by us.
fn is_same(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let now = sysfs::controllers(host)?.into_iter().find(|c| c.bdf == controller.bdf);
    let who = |c: &Controller| {
        let namespaces = c.namespaces.iter().map(|n| (n.whole.clone(), n.nsid, n.block_size));
        (c.name.clone(), c.serial.clone(), c.model.clone(), namespaces.collect::<Vec<_>>(), c.hidden.len())
    };
    if now.as_ref().map(who) != Some(who(controller)) {
        let what = "the drive or its namespaces changed while it was being checked; try again".into();
        out.push(Reason::new(Check::Driver, &controller.pci_path(), what));
    }
    Ok(())
}

fn counts(name: &str) -> String {
    format!("/sys/class/block/{name}/stat")
}

/// Sectors that were written to and discarded on all namespaces; 0 where the kernel does not count. Requests do not tell: a
/// flush of ours is one of writing nothing.
fn written(host: &Host, controller: &Controller) -> Result<u64, Unreadable> {
    let mut sum = 0u64;
    for namespace in &controller.namespaces {
        let path = counts(&namespace.whole.name);
        let text = host.read_if_there(&path)?.unwrap_or_default();
        let numbers: Vec<u64> = text.split_whitespace().map_while(|n| n.parse().ok()).collect();
        // Documentation/block/stat.rst: write sectors, discard sectors.
        sum = [6, 13].iter().filter_map(|i| numbers.get(*i)).fold(sum, |sum, n| sum.wrapping_add(*n));
    }
    Ok(sum)
}
