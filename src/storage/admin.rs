//! Admin commands by way of the kernel's driver: its ioctl, by which Get Log Page and Identify are sent here and nothing
//! else.

use std::fs::File;
use std::os::fd::AsRawFd;

use super::smart::LOG_BYTES;

/// Bytes that Identify answers.
pub const IDENTIFY_BYTES: usize = 4096;

/// `struct nvme_admin_cmd` of `linux/nvme_ioctl.h`.
#[repr(C)]
#[derive(Default)]
struct AdminCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}
const _: () = assert!(size_of::<AdminCommand>() == 72);

/// Sends Get Log Page 02h (opcode 02h, which reads) to the controller whose character device is open.
///
/// # Errors
/// What the system or the drive answers.
pub fn log_page(file: &File) -> std::io::Result<[u8; LOG_BYTES]> {
    let cdw10 = 0x02 | (LOG_BYTES as u32 / 4 - 1) << 16;
    ask(file, AdminCommand { opcode: 0x02, nsid: u32::MAX, cdw10, ..AdminCommand::default() })
}

/// Sends Identify Controller (opcode 06h, CNS 01h, which reads) to the controller whose character device is open.
///
/// # Errors
/// What the system or the drive answers.
pub fn identify(file: &File) -> std::io::Result<[u8; IDENTIFY_BYTES]> {
    ask(file, AdminCommand { opcode: 0x06, cdw10: 1, ..AdminCommand::default() })
}

/// Sends a command whose answer is `N` bytes.
fn ask<const N: usize>(file: &File, command: AdminCommand) -> std::io::Result<[u8; N]> {
    const NVME_IOCTL_ADMIN_CMD: libc::c_ulong = 0xc048_4e41;
    let mut answer = [0u8; N];
    let (addr, data_len) = (answer.as_mut_ptr() as u64, N as u32);
    let mut command = AdminCommand { addr, data_len, timeout_ms: 5000, ..command };
    // SAFETY: the structure is the ioctl's own, and the buffer it names is as long as it says and outlives
    // the call, which returns when the command has ended.
    match unsafe { libc::ioctl(file.as_raw_fd(), NVME_IOCTL_ADMIN_CMD, &raw mut command) } {
        0 => Ok(answer),
        status if status > 0 => Err(std::io::Error::other(format!("the drive answered with status {status:#x}"))),
        _ => Err(std::io::Error::last_os_error()),
    }
}
