//! The kernel's own list of a drive's partitions: emptied before the drive is staged, read from the table again
//! afterwards. What it still shows of the old ones could be mounted, and written to.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::errno::Errno;

/// `linux/fs.h`.
mod ioctl {
    nix::ioctl_none!(blkrrpart, 0x12, 95);
    nix::ioctl_write_ptr_bad!(blkpg, nix::request_code_none!(0x12, 105), super::Argument);
}

/// `linux/blkpg.h`.
const DELETE: libc::c_int = 2;
/// Somebody who only looks at a partition, as udev does, is done within this time.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(100);

/// `struct blkpg_partition`.
#[repr(C)]
struct Partition {
    start: i64,
    length: i64,
    number: libc::c_int,
    names: [u8; 128],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct Argument {
    operation: libc::c_int,
    flags: libc::c_int,
    len: libc::c_int,
    data: *mut Partition,
}

const _: () = assert!(size_of::<Partition>() == 152 && size_of::<Argument>() == 24);

/// Has the kernel forget these partitions of the drive that `whole` is open on, by their numbers.
///
/// # Errors
/// If one is open somewhere after five seconds, with its number; those before it are forgotten.
pub fn forget(whole: &File, numbers: &[u32]) -> std::result::Result<(), (u32, Error)> {
    for &number in numbers {
        let mut tries = 0;
        while let Err(e) = delete(whole, number) {
            tries += 1;
            match e.raw_os_error() {
                Some(libc::ENXIO) => break,
                Some(libc::EBUSY) if tries < TRIES => std::thread::sleep(PAUSE),
                _ => return Err((number, e)),
            }
        }
    }
    Ok(())
}

fn delete(whole: &File, number: u32) -> Result<()> {
    let number = number.try_into().map_err(|_| Error::from(ErrorKind::InvalidInput))?;
    let mut partition = Partition { start: 0, length: 0, number, names: [0; 128] };
    let len = size_of::<Partition>() as libc::c_int;
    let argument = Argument { operation: DELETE, flags: 0, len, data: &mut partition };
    // SAFETY: the ioctl reads an `Argument` at the pointer and a `Partition` at its `data`; both are of the kernel's
    // layout, which is asserted above, and live until it returns. The descriptor is open.
    unsafe { ioctl::blkpg(whole.as_raw_fd(), &argument)? };
    Ok(())
}

/// Has the kernel read the table of partitions of the drive that `whole` is open on.
///
/// # Errors
/// If one of the old partitions is open somewhere: the kernel keeps them all then.
pub fn reread(whole: &File) -> Result<()> {
    for _ in 1..TRIES {
        // SAFETY: an ioctl without argument on an open device.
        match unsafe { ioctl::blkrrpart(whole.as_raw_fd()) } {
            Ok(_) => return Ok(()),
            Err(Errno::EBUSY) => std::thread::sleep(PAUSE),
            Err(e) => return Err(e.into()),
        }
    }
    Err(Errno::EBUSY.into())
}
