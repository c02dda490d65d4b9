//! Takes a drive from the kernel's driver and gives it back. Needs root; everything else of this
//! program does not.
//!
//! Order: lock the drive, check, modules, claim every namespace with O_EXCL, check again, note in the
//! journal, `driver_override` by exact address, a last look for users and writes, unbind while the claims are held (so
//! nobody can mount in between), probe, verify, note that it is bound, hand the group's node to the group `nt`. The journal (`record`) moves forward at
//! each step, so that `release` can undo whatever was begun. On a failure or a signal the kernel's driver
//! is put back before the command ends.

mod child;
mod claim;
mod error;
mod find;
mod give;
mod holders;
mod kernel;
mod lock;
mod record;
mod take;
#[cfg(test)]
mod tests;

use std::time::Duration;

use super::guard::{Allowlist, Controller, Host, Purpose, Reason, address_decides, examine};

pub use claim::{Writable, claim_to_write};
pub use error::DeviceError;
pub use find::{bound, find_bound, is_handed_over};
pub use kernel::{Kernel, Running};
pub use record::{
    Bound, BoundNamespace, Standing, State, all as records, current as current_records, damaged as damaged_records,
};

pub use take::group_node_is_right;

use record::device;

/// The group whose members may use a bound drive.
pub const GROUP: &str = "nt";
/// How long the kernel may take for a step.
const WAIT: Duration = Duration::from_secs(10);

/// Every reason against using the drive, for this purpose, that a user means by its name and, between twins, by its address
/// `pci`.
pub fn judge(
    host: &Host,
    all: &[Controller],
    drive: &Controller,
    allowed: &Result<Allowlist, String>,
    pci: Option<&str>,
    purpose: Purpose,
) -> Vec<Reason> {
    let mut reasons = examine(host, all, drive, allowed, purpose);
    address_decides(host, all, drive, allowed, pci, &mut reasons);
    reasons
}

/// Takes one line per step.
pub type Say<'a> = &'a mut dyn FnMut(&str);

/// What binding works on.
#[derive(Clone, Copy)]
pub struct Machine<'a> {
    /// Its files.
    pub host: &'a Host,
    /// What changes it.
    pub kernel: &'a dyn Kernel,
    /// Whether a signal has asked to stop.
    pub stopped: &'a dyn Fn() -> bool,
}

impl std::fmt::Debug for Machine<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("host", self.host).finish_non_exhaustive()
    }
}

impl Machine<'_> {
    /// Binds the drive named `name`, at the address `pci` (which may be left out while no other drive may have its
    /// serial number). `say` gets one line per step; with `dry_run` the drive is claimed for a moment and nothing is
    /// written.
    ///
    /// # Errors
    /// [`DeviceError::Refused`] with every reason, or the step that failed; [`DeviceError::Interrupted`] if a signal
    /// came before the drive was bound. The drive is the kernel's again then.
    pub fn bind(
        &self,
        name: &str,
        pci: Option<&str>,
        allowed: &Result<Allowlist, String>,
        dry_run: bool,
        say: Say<'_>,
    ) -> Result<(), DeviceError> {
        let judge =
            |host: &Host, all: &[Controller], drive: &Controller| judge(host, all, drive, allowed, pci, Purpose::Read);
        take::bind(self, name, &judge, dry_run, say)
    }

    /// Gives a drive back to the kernel, bound or half so, with a record or without: the one that `name` means, or
    /// the one at the address `pci`.
    ///
    /// # Errors
    /// [`DeviceError::Refused`] if it is in use, [`DeviceError::Ambiguous`] if the name fits several, or the step that
    /// failed; [`DeviceError::Interrupted`] if a signal came, after the release was finished.
    pub fn release(
        &self,
        name: Option<&str>,
        pci: Option<&str>,
        dry_run: bool,
        say: Say<'_>,
    ) -> Result<(), DeviceError> {
        give::release(self, name, pci, dry_run, say)
    }

    /// `driver_override` of a PCI device; none if it is empty.
    ///
    /// # Errors
    /// If the kernel does not say, which it does not while an unbind waits.
    pub fn driver_override(&self, pci: &str) -> Result<Option<String>, DeviceError> {
        let path = format!("{}/driver_override", device(pci));
        if !self.host.exists(&path) {
            return Ok(None);
        }
        let text = self.kernel.read(self.host, &path).map_err(|e| self.stuck(&format!("reading {path}"), &e))?;
        Ok(Some(text).filter(|t| !t.is_empty() && t != "(null)"))
    }

    /// Makes one change, after whoever stands in for the kernel was told of it.
    fn change<T>(&self, what: &str, make: impl FnOnce() -> std::io::Result<T>) -> Result<T, DeviceError> {
        self.kernel.about_to(what).and_then(|()| make()).map_err(|e| self.stuck(what, &e))
    }

    fn write(&self, path: &str, text: &str) -> Result<(), DeviceError> {
        let what = format!("writing {:?} to {path}", text.trim_end());
        self.change(&what, || self.kernel.write(self.host, path, text))
    }

    fn note(&self, record: &mut Bound, state: State) -> Result<(), DeviceError> {
        record.state = state;
        let what = format!("noting the drive in {}", record::path(&record.pci));
        self.change(&what, || record::save(self.host, record))
    }

    fn forget(&self, pci: &str) -> Result<(), DeviceError> {
        self.change(&format!("removing {}", record::path(pci)), || record::remove(self.host, pci))
    }

    fn stuck(&self, step: &str, e: &std::io::Error) -> DeviceError {
        if e.kind() != std::io::ErrorKind::TimedOut {
            return DeviceError::system(step, e);
        }
        let open = holders::of_devices(self.host);
        let who =
            if open.is_empty() { String::new() } else { format!("; VFIO devices are open in {}", open.join(", ")) };
        DeviceError::step(
            step,
            format!(
                "{e}; it waits until no process uses the drive, and goes on by itself then: release it again after that{who}"
            ),
        )
    }

    /// An error if a signal has asked to stop.
    fn stop_if_asked(&self) -> Result<(), DeviceError> {
        match (self.stopped)() {
            true => Err(DeviceError::Interrupted("the drive is with the kernel's driver".into())),
            false => Ok(()),
        }
    }

    /// Waits until `there` has no objection; after [`WAIT`], its last one is the error.
    fn wait_for(&self, step: &str, mut there: impl FnMut() -> Result<(), String>) -> Result<(), DeviceError> {
        let end = self.kernel.now() + WAIT;
        loop {
            let Err(why) = there() else { return Ok(()) };
            if self.kernel.now() > end {
                return Err(DeviceError::step(step, why));
            }
            self.stop_if_asked()?;
            self.kernel.pause();
        }
    }
}
