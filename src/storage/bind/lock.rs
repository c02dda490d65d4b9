//! One lock per drive, so that commands on different drives never wait for each other. The files are root's
//! alone: whoever can open a file can hold its lock.

use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

use super::super::guard::Host;
use super::DeviceError;
use super::record::{self, STATE};

const FLAGS: libc::c_int = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;

/// The lock of a drive, until it is dropped.
#[derive(Debug)]
pub(super) struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing would not do while a child that was forked meanwhile has the file open too.
        let _ = self.0.unlock();
    }
}

/// Takes the lock of the drive at `pci`.
///
/// # Errors
/// If another command has it, or the folder of locks cannot be made.
pub(super) fn lock(host: &Host, pci: &str) -> Result<Lock, DeviceError> {
    record::folder(host)?;
    let path = path(pci);
    let open = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(FLAGS)
        .open(host.real(&path));
    let step = format!("locking {path}");
    let file = open.map_err(|e| DeviceError::system(&step, &e))?;
    file.set_permissions(Permissions::from_mode(0o600)).map_err(|e| DeviceError::system(&step, &e))?;
    take(file, &path)
}

/// The same for giving a drive back, which must not need room on a disk: where the lock's file cannot be made or
/// written, since `/run` is full or may only be read, the one that is there is taken as it is. None where there is
/// none either: no command can make one, and so none has it.
///
/// # Errors
/// As [`lock`], if another command has it or for any other reason.
pub(super) fn to_release(host: &Host, pci: &str, say: super::Say<'_>) -> Result<Option<Lock>, DeviceError> {
    let failed = match lock(host, pci) {
        Ok(lock) => return Ok(Some(lock)),
        Err(e) => e,
    };
    if !cannot_be_written(host, pci) {
        return Err(failed);
    }
    let found = existing(host, pci)?;
    if found.is_none() {
        say(&format!("{failed}; the drive is given back without a lock, which nobody can have now"));
    }
    Ok(found)
}

/// The lock whose file is there already, which is not written to; none where there is no file.
pub(super) fn existing(host: &Host, pci: &str) -> Result<Option<Lock>, DeviceError> {
    let path = path(pci);
    match OpenOptions::new().read(true).custom_flags(FLAGS).open(host.real(&path)) {
        Ok(file) => take(file, &path).map(Some),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(DeviceError::system(format!("locking {path}"), &e)),
    }
}

/// Whether the lock's file or its folder cannot be made or written for want of room or of a file system that may be written.
fn cannot_be_written(host: &Host, pci: &str) -> bool {
    let mut open = OpenOptions::new();
    open.create(true).truncate(false).write(true).mode(0o600).custom_flags(FLAGS);
    let made = record::made_folder(host).and_then(|()| open.open(host.real(&path(pci))).map(drop));
    let want = |e: std::io::Error| {
        matches!(e.kind(), ErrorKind::ReadOnlyFilesystem | ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
    };
    made.is_err_and(want)
}

fn path(pci: &str) -> String {
    format!("{STATE}/{pci}.lock")
}

fn take(file: File, path: &str) -> Result<Lock, DeviceError> {
    let step = format!("locking {path}");
    match file.try_lock() {
        Ok(()) => Ok(Lock(file)),
        Err(TryLockError::WouldBlock) => {
            Err(DeviceError::step(step, "another nt command binds, releases or stages this drive"))
        }
        Err(TryLockError::Error(e)) => Err(DeviceError::system(step, &e)),
    }
}
