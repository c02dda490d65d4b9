//! Claims of a drive's namespaces by O_EXCL: the kernel grants them to nobody who mounts, swaps on or stacks
//! over the drive.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;

use super::super::guard::{
    Allowlist, BlockDevice, Check, Controller, Host, LastLook, Purpose, Reason, has_partitions, sysfs,
};
use super::super::image::{Drive, Identity, partitions};
use super::lock::{self, Lock};
use super::{DeviceError, Machine, Running, judge, take};

/// Claims every namespace of a drive until the files are dropped.
///
/// # Errors
/// [`DeviceError::Refused`] with the one that is not granted.
pub(super) fn claim(host: &Host, drive: &Controller) -> Result<Vec<File>, DeviceError> {
    let mut claims = Vec::new();
    for namespace in &drive.namespaces {
        let path = format!("/dev/{}", namespace.whole.name);
        let (name, number) = (&namespace.whole.name, &namespace.whole.number);
        let file = host.open_block(name, number, OpenOptions::new().read(true).custom_flags(libc::O_EXCL));
        let file =
            file.map_err(|e| DeviceError::refused(name, Check::Open, &path, format!("it cannot be claimed: {e}")))?;
        leave_alone(&file);
        claims.push(file);
    }
    Ok(claims)
}

/// Has udev leave the open disk alone, and so whatever it starts for a disk that it looks at. Somebody who holds the lock
/// has the node open, which the guard sees; a failure only costs the courtesy.
fn leave_alone(disk: &File) {
    let _ = disk.try_lock();
}

/// A namespace that is ours alone to write, by the kernel's word (O_EXCL), until this is dropped.
#[derive(Debug)]
pub struct Writable {
    file: File,
    controller: Controller,
    before: LastLook,
    /// Whether the kernel was told to forget partitions and not to read the table since.
    forgot: Cell<bool>,
    _lock: Lock,
}

impl Drop for Writable {
    fn drop(&mut self) {
        if self.forgot.get() {
            self.reread_partitions();
        }
    }
}

impl Writable {
    /// What an image is written to.
    pub fn drive(&self) -> Drive<'_> {
        let namespace = &self.controller.namespaces[0];
        Drive { file: &self.file, size: namespace.whole.size, block: namespace.block_size.into() }
    }

    /// What its manifests say of it.
    pub fn identity(&self) -> Identity {
        let (serial, model) = (self.controller.serial.clone(), self.controller.model.clone());
        Identity { serial, model, namespace: self.controller.namespaces[0].nsid }
    }

    /// Node of the namespace.
    pub fn node(&self) -> String {
        format!("/dev/{}", self.controller.namespaces[0].whole.name)
    }

    /// The partitions that the kernel showed when the drive was claimed, as bytes of the namespace.
    pub fn partitions(&self) -> Vec<Range<u64>> {
        self.controller.namespaces[0].partitions.iter().map(|p| p.start..p.start + p.size).collect()
    }

    /// Looks once more, right before the first write, for whoever came since the drive was examined.
    ///
    /// # Errors
    /// [`DeviceError::Refused`] if somebody has it open or has written to it; the kernel has read its table again then, if
    /// it could ([`Writable::reread_partitions`]).
    pub fn last_look(&self, host: &Host) -> Result<(), DeviceError> {
        let reasons = self.before.reasons(host, &self.controller, std::slice::from_ref(&self.file));
        if reasons.is_empty() {
            return Ok(());
        }
        self.reread_partitions();
        Err(DeviceError::Refused { name: self.controller.namespaces[0].whole.name.clone(), reasons })
    }

    /// Has the kernel forget the partitions, so that nobody mounts one or reads its old bytes from a cache.
    ///
    /// # Errors
    /// [`DeviceError::Refused`] if one is open somewhere; the kernel has been told to read the table again then. If this
    /// process is killed, the kernel shows no partitions until it reads the table again, which the next
    /// [`claim_to_write`] that fails has it do.
    pub fn forget_partitions(&self) -> Result<(), DeviceError> {
        let namespace = &self.controller.namespaces[0];
        let number = |p: &BlockDevice| p.name.rsplit_once('p').and_then(|(_, n)| n.parse().ok());
        let numbers: Vec<u32> = namespace.partitions.iter().filter_map(number).collect();
        self.forgot.set(true);
        partitions::forget(&self.file, &numbers).map_err(|(number, e)| {
            self.reread_partitions();
            let what = format!("the kernel cannot forget the partition: {e}");
            DeviceError::refused(&namespace.whole.name, Check::Open, &format!("{}p{number}", self.node()), what)
        })
    }

    /// Has the kernel read the partition table that is on the drive. While a partition that it still shows is open it
    /// cannot, and shows what it did: until `blockdev --rereadpt`, until the drive was bound and released, or until the
    /// machine starts again.
    pub fn reread_partitions(&self) {
        self.forgot.set(false);
        if let Err(e) = partitions::reread(&self.file) {
            tracing::warn!(
                "{0}: the kernel does not read the partition table again: {e}; `blockdev --rereadpt {0}` has it try once more",
                self.node()
            );
        }
    }
}

/// Claims a drive of one namespace for writing, if its serial is `serial`, its address `pci` (which may be left out
/// while no other drive has that serial) and nothing speaks against it, checked before and under the claim.
///
/// # Errors
/// [`DeviceError::Refused`] with every reason, or the step that failed.
pub fn claim_to_write(
    host: &Host,
    name: &str,
    serial: &str,
    pci: Option<&str>,
    allowed: &Result<Allowlist, String>,
) -> Result<Writable, DeviceError> {
    let check = |under: Option<&str>| -> Result<Controller, DeviceError> {
        let all = sysfs::controllers(host).map_err(|e| DeviceError::step("reading the drives", e))?;
        let drive = sysfs::find(host, &all, name).ok_or_else(|| DeviceError::NotFound(name.into()))?;
        if under.is_none() {
            return Ok(drive.clone());
        }
        let mut reasons = judge(host, &all, drive, allowed, pci, Purpose::Erase);
        let mut add = |check, what: String| reasons.push(Reason { check, path: drive.pci_path().into(), what });
        if drive.serial != serial {
            add(Check::Allowlist, format!("its serial is {}, --serial says {serial}", drive.serial));
        }
        if drive.namespaces.len() != 1 {
            add(Check::Format, format!("it has {} namespaces, one was expected", drive.namespaces.len()));
        }
        if under != Some(drive.bdf.as_str()) {
            add(Check::Driver, "another drive has taken its name meanwhile".into());
        }
        if reasons.is_empty() { Ok(drive.clone()) } else { Err(DeviceError::Refused { name: name.into(), reasons }) }
    };
    let named = check(None)?;
    if let Some(part) = sysfs::partition(host, &named, name) {
        let whole = named.namespaces.iter().find(|n| n.partitions.contains(part)).map_or("", |n| &n.whole.name);
        let what = format!("it is a partition; staging erases the whole drive, so name that, if it is meant: {whole}");
        return Err(DeviceError::refused(name, Check::Format, &format!("/dev/{}", part.name), what));
    }
    let found = named.bdf.clone();
    let lock = lock::lock(host, &found)?;
    let kernel = Running::default();
    take::is_whole(&Machine { host, kernel: &kernel, stopped: &|| false }, name, &check(None)?)?;
    let before = LastLook::begin(host, &named).map_err(|e| DeviceError::step("reading the drive's counts", e))?;
    let claimed = claim_checked(host, name, &found, &check);
    let (file, drive) = claimed.inspect_err(|_| show_forgotten(host, &named))?;
    Ok(Writable { file, controller: drive, before, forgot: Cell::new(false), _lock: lock })
}

/// Checks the drive at `found`, claims it and checks it again.
fn claim_checked(
    host: &Host,
    name: &str,
    found: &str,
    check: &dyn Fn(Option<&str>) -> Result<Controller, DeviceError>,
) -> Result<(File, Controller), DeviceError> {
    let drive = check(Some(found))?;
    let file = open_to_write(host, name, &drive.namespaces[0].whole)?;
    leave_alone(&file);
    if check(Some(found))? != drive {
        let (path, what) = (drive.pci_path(), "it changed while it was being checked; try again".into());
        return Err(DeviceError::refused(name, Check::Driver, &path, what));
    }
    Ok((file, drive))
}

/// Whether a table on a drive describes partitions while the kernel shows none, as a stage that was killed leaves it.
pub(super) fn are_forgotten(host: &Host, drive: &Controller) -> bool {
    drive.namespaces.iter().any(|n| n.partitions.is_empty() && has_partitions(host, n))
}

/// Has the kernel read the table of a drive again whose partitions it shows none of though there are some: a stage
/// before was killed after it had them forgotten. Refused, the drive is to be as it was before that. What the kernel
/// does not do is only not repaired.
fn show_forgotten(host: &Host, drive: &Controller) {
    if !are_forgotten(host, drive) {
        return;
    }
    for namespace in &drive.namespaces {
        let whole = &namespace.whole;
        let Ok(file) = host.open_block(&whole.name, &whole.number, OpenOptions::new().read(true)) else { continue };
        match partitions::reread(&file) {
            Ok(()) => tracing::info!("/dev/{}: the kernel has read the partition table again", whole.name),
            Err(e) => tracing::debug!("/dev/{}: the kernel does not read the partition table again: {e}", whole.name),
        }
    }
}

/// Opens a namespace for writing, claimed: its node by its number, since whoever can make nodes may have given its name
/// to another drive.
pub(super) fn open_to_write(host: &Host, name: &str, whole: &BlockDevice) -> Result<File, DeviceError> {
    let options = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).clone();
    host.open_block(&whole.name, &whole.number, &options).map_err(|e| {
        let what = format!("it cannot be claimed for writing: {e}");
        DeviceError::refused(name, Check::Open, &format!("/dev/{}", whole.name), what)
    })
}
