//! What keeps a drive from showing its data, or from being written to: locks of drives that encrypt themselves, and write
//! protection.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Result};

use super::host::{Host, Unreadable};
use super::sysfs::Controller;
use super::{Check, Reason};
use crate::storage::admin::{self, Answer, IDENTIFY_BYTES};
use crate::storage::locks::{self, Asked, Lock};

/// A drive that the kernel drives, by its node.
struct Drive(File);

impl Asked for Drive {
    fn identify(&mut self) -> Result<[u8; IDENTIFY_BYTES]> {
        admin::identify(&self.0)
    }

    fn receive(&mut self, protocol: u8, specific: u16, to: &mut [u8]) -> Result<Answer> {
        admin::security_receive(&self.0, protocol, specific, to)
    }
}

/// In a picture of a machine (tests) the controller's node holds the answers, one after another.
struct Pictured(Vec<u8>);

impl Asked for Pictured {
    fn identify(&mut self) -> Result<[u8; IDENTIFY_BYTES]> {
        let mut answer = [0; IDENTIFY_BYTES];
        self.0.iter().take(IDENTIFY_BYTES).zip(&mut answer).for_each(|(from, to)| *to = *from);
        Ok(answer)
    }

    fn receive(&mut self, protocol: u8, _: u16, to: &mut [u8]) -> Result<Answer> {
        let [list, level_0] = [locks::PROTOCOLS_BYTES, locks::LEVEL_0_BYTES];
        let at = IDENTIFY_BYTES + [0, list, list + level_0][usize::from(protocol.min(2))];
        let held = self.0.get(at..at + to.len());
        Ok(held.map(|held| to.copy_from_slice(held)).ok_or(0x06))
    }
}

/// A drive whose data cannot be seen could hold anything, however empty it looks. One that is in use is not asked: it is
/// refused anyway, and one that never answers would be reset by the kernel under its users.
pub fn locked(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> std::result::Result<(), Unreadable> {
    if out.iter().any(|r| matches!(r.check, Check::Boot | Check::Mounted | Check::Swap | Check::Stacked)) {
        return Ok(());
    }
    let (Some(name), Some(namespace)) = (&controller.name, controller.namespaces.first()) else { return Ok(()) };
    let node = format!("/dev/{}", namespace.whole.name);
    let found = if host.is_real() {
        match host.open_block(&namespace.whole.name, &namespace.whole.number, OpenOptions::new().read(true)) {
            // Whoever may not open it reads so where its contents are looked at.
            Err(e) if e.kind() == ErrorKind::PermissionDenied => return Ok(()),
            opened => opened.and_then(|file| locks::of(&mut Drive(file))),
        }
    } else {
        locks::of(&mut Pictured(host.bytes(&format!("/dev/{name}")).unwrap_or_default()))
    };
    let found = found.map_err(|e| {
        let cure = match e.kind() {
            ErrorKind::PermissionDenied => "run it as root",
            _ => "try again; a drive that never answers that is not supported",
        };
        Unreadable::new(&node, format!("it was asked whether it is locked, without an answer: {e}; {cure}"))
    })?;
    out.extend(found.into_iter().map(|lock| {
        let what = match lock {
            Lock::Range => {
                "it encrypts itself and is locked (TCG), so its data cannot be seen and it may look empty; unlock it first (as with `sedutil-cli`, `nvme sed unlock` or `cryptsetup open`), or reset it by its PSID, if its data may be lost"
            }
            Lock::Shadow => {
                "it shows a shadow MBR in place of its data (TCG), which cannot be seen; unlock it first (as with `sedutil-cli --setmbrdone on`), or reset it by its PSID, if its data may be lost"
            }
            Lock::Password => {
                "it waits for its ATA password, so its data cannot be seen; unlock it first, in the firmware or with the program that set the password"
            }
        };
        Reason::new(Check::Unreadable, &node, what.into())
    }));
    Ok(())
}

/// Devices that may only be read, by the drive's word (NVMe Base 2.0 §8.12, NSATTR) or somebody's here. It refuses to be
/// overwritten, as a whole for one partition.
pub fn protected(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> std::result::Result<(), Unreadable> {
    for device in controller.devices() {
        let path = format!("/sys/class/block/{}/ro", device.name);
        if host.read_if_there(&path)?.is_some_and(|ro| ro != "0") {
            let node = format!("/dev/{}", device.name);
            let what = format!(
                "{} is write protected, by somebody here (`blockdev --setrw {node}` ends that) or by the drive itself (`nvme get-feature {node} -f 0x84`)",
                device.name
            );
            out.push(Reason::new(Check::Format, &path, what));
        }
    }
    Ok(())
}
