//! Which drives nt itself has taken from the kernel: the records in `/run/nt`, of which only the
//! address and the serial number matter here. A bound drive tells the kernel nothing, so its record is
//! the only source of its serial.

use std::os::unix::fs::MetadataExt;

use serde::Deserialize;

use super::host::{Host, Unreadable};

/// Where the records lie, `ADDRESS.toml`.
const FOLDER: &str = "/run/nt";

/// One drive of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// PCI address.
    pub pci: String,
    /// Serial number.
    pub serial: String,
}

/// The parts of a record that are read here; others are left alone.
#[derive(Debug, Deserialize)]
struct Record {
    pci: String,
    serial: String,
    /// Boot that it holds for.
    #[serde(default)]
    boot: String,
    /// Inode of the device's folder in sysfs; 0 if unknown.
    #[serde(default)]
    instance: u64,
}

/// Takes a record apart; `name` is the address in its file's name.
pub fn parse(name: &str, text: &str) -> Result<Recorded, String> {
    let record: Record = toml::from_str(text).map_err(|e| e.message().to_owned())?;
    if record.pci != name {
        return Err(format!("it is of {}", record.pci));
    }
    Ok(Recorded { pci: record.pci, serial: record.serial.trim().to_owned() })
}

/// The record of the function at `pci`, if one speaks of this boot and of the device that is there now.
///
/// # Errors
/// If there is one that cannot be read: the drive might then be anyone's twin.
pub fn of(host: &Host, pci: &str) -> Result<Option<Recorded>, Unreadable> {
    let path = format!("{FOLDER}/{pci}.toml");
    let Some(text) = host.read_if_there(&path)? else { return Ok(None) };
    let wrong = |why: String| {
        Unreadable::new(
            &path,
            format!(
                "the record of a drive that nt has taken cannot be used: {why}; give the drive back with `nt device release --pci {pci}`"
            ),
        )
    };
    let recorded = parse(pci, &text).map_err(wrong)?;
    let record: Record = toml::from_str(&text).map_err(|e| wrong(e.message().to_owned()))?;
    let boot = host.read_if_there("/proc/sys/kernel/random/boot_id")?.unwrap_or_default();
    let folder = std::fs::metadata(host.real(&format!("/sys/bus/pci/devices/{pci}")));
    let stale = !record.boot.is_empty() && record.boot != boot;
    let replaced = record.instance != 0 && folder.is_ok_and(|f| f.ino() != record.instance);
    Ok((!stale && !replaced).then_some(recorded))
}
