//! Admin commands through the kernel's ioctl: Get Log Page, Identify Controller and Security Receive, which read, and no
//! other.

use std::fs::File;
use std::io::{Error, Result};
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

/// What a drive answers to a command: nothing more than its data, or its status.
pub type Answer = std::result::Result<(), u16>;

/// Sends Get Log Page 02h (opcode 02h) to the controller of an open node.
///
/// # Errors
/// What the system or the drive answers.
pub fn health_log(file: &File) -> Result<[u8; LOG_BYTES]> {
    let mut log = [0; LOG_BYTES];
    let cdw10 = 0x02 | (LOG_BYTES as u32 / 4 - 1) << 16;
    told(send(file, AdminCommand { opcode: 0x02, nsid: u32::MAX, cdw10, ..AdminCommand::default() }, &mut log)?)?;
    Ok(log)
}

/// Sends Identify Controller (opcode 06h, CNS 01h) to the controller of an open node.
///
/// # Errors
/// What the system or the drive answers.
pub fn identify(file: &File) -> Result<[u8; IDENTIFY_BYTES]> {
    let mut answer = [0; IDENTIFY_BYTES];
    told(send(file, AdminCommand { opcode: 0x06, cdw10: 1, ..AdminCommand::default() }, &mut answer)?)?;
    Ok(answer)
}

/// Sends Security Receive (opcode 82h, NVMe Base 2.0 §5.25) of a protocol and what is specific to it; `to` is filled, with
/// zeros where the drive has less.
///
/// # Errors
/// What the system answers.
pub fn security_receive(file: &File, protocol: u8, specific: u16, to: &mut [u8]) -> Result<Answer> {
    let cdw10 = u32::from(protocol) << 24 | u32::from(specific) << 8;
    send(file, AdminCommand { opcode: 0x82, cdw10, cdw11: to.len() as u32, ..AdminCommand::default() }, to)
}

fn told(answer: Answer) -> Result<()> {
    answer.map_err(|status| Error::other(format!("the drive answered with status {status:#x}")))
}

/// Sends a command that fills `to`.
fn send(file: &File, command: AdminCommand, to: &mut [u8]) -> Result<Answer> {
    let (addr, data_len) = (to.as_mut_ptr() as u64, to.len() as u32);
    // No time of our own (`timeout_ms`): when it is over, the kernel resets the controller, whoever uses the drive.
    let mut command = AdminCommand { addr, data_len, ..command };
    // SAFETY: the structure is the ioctl's own, and the buffer it names is as long as it says and outlives
    // the call, which returns when the command has ended.
    Ok(match unsafe { ioctl::admin_command(file.as_raw_fd(), &raw mut command)? } {
        0 => Ok(()),
        status => Err(status as u16),
    })
}

/// `linux/nvme_ioctl.h`.
mod ioctl {
    nix::ioctl_readwrite!(admin_command, b'N', 0x41, super::AdminCommand);
}
