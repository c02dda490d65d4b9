//! One lock per drive, so that commands on different drives never wait for each other. The files are root's
//! alone: whoever can open a file can hold its lock.

use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

use super::super::guard::Host;
use super::DeviceError;
use super::record::{self, STATE};

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
    let path = format!("{STATE}/{pci}.lock");
    let step = format!("locking {path}");
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let open = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(flags)
        .open(host.real(&path));
    let file = open.map_err(|e| DeviceError::system(&step, &e))?;
    file.set_permissions(Permissions::from_mode(0o600)).map_err(|e| DeviceError::system(&step, &e))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock(file)),
        Err(TryLockError::WouldBlock) => {
            Err(DeviceError::step(step, "another nt command binds, releases or stages this drive"))
        }
        Err(TryLockError::Error(e)) => Err(DeviceError::system(step, &e)),
    }
}
