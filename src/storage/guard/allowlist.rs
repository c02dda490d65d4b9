//! `/etc/nt/drives.toml`: the drives that may be bound. A drive that no entry describes exactly is
//! refused; the PCI address of an entry is only a hint, since it moves when a card is added.

use std::fs::{Metadata, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::sysfs::{Controller, Namespace};

/// Where the list lies unless `--allow` names another file.
pub const DEFAULT_PATH: &str = "/etc/nt/drives.toml";

/// The longest list that is read.
const LIST_MAX: u64 = 1 << 20;

/// One drive that may be bound.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// PCI address when the entry was written; only a hint.
    pub pci: String,
    /// Serial number.
    pub serial: String,
    /// Model.
    pub model: String,
    /// Namespace identifier.
    pub namespace: u32,
    /// Bytes of the namespace.
    pub size: u64,
    /// EUI-64 of the namespace, if it is to be compared: hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eui: Option<String>,
    /// NGUID of the namespace, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nguid: Option<String>,
    /// What the drive holds that nt may read (`ext4`, `gpt`, `unknown data`, …); nothing else is accepted.
    #[serde(default)]
    pub holds: Vec<String>,
    /// What it holds that `nt stage --erase` may overwrite. `holds` is no word on that.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub erase: Vec<String>,
}

/// The list of drives.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Allowlist {
    /// Its entries.
    #[serde(default)]
    pub drive: Vec<Entry>,
}

impl Entry {
    /// The entry that would describe this namespace.
    pub fn of(controller: &Controller, namespace: &Namespace) -> Self {
        let id = |file| namespace.trusted_ids().find(|(f, _)| *f == file).map(|(_, id)| id.to_owned());
        Self {
            eui: id("eui"),
            nguid: id("nguid"),
            pci: controller.bdf.clone(),
            serial: controller.serial.clone(),
            model: controller.model.clone(),
            namespace: namespace.nsid,
            size: namespace.whole.size,
            holds: Vec::new(),
            erase: Vec::new(),
        }
    }

    /// What differs between this entry and the drive, each as a sentence; empty if nothing does.
    pub fn differences(&self, controller: &Controller, namespace: &Namespace) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, listed: &dyn std::fmt::Display, real: &dyn std::fmt::Display| {
            let (listed, real) = (listed.to_string(), real.to_string());
            if listed != real {
                found.push(format!("the allowlist says {what} {listed}, the drive says {real}"));
            }
        };
        compare("serial", &self.serial, &controller.serial);
        compare("model", &self.model, &controller.model);
        compare("namespace", &self.namespace, &namespace.nsid);
        compare("size", &self.size, &namespace.whole.size);
        for (file, listed) in [("eui", &self.eui), ("nguid", &self.nguid)] {
            let Some(listed) = listed else { continue };
            match namespace.trusted_ids().find(|(f, _)| *f == file) {
                Some((_, real)) => compare(file, &listed.replace([' ', '-'], "").to_ascii_lowercase(), &real),
                None => compare(file, listed, &"none that is its own"),
            }
        }
        found
    }
}

impl Allowlist {
    /// Reads a list; it must belong to root and be writable by nobody else.
    pub fn load(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let fail = |e: std::io::Error| {
            format!("{shown}: the allowlist cannot be read: {e}; `nt device list` prints the lines to put there")
        };
        // A FIFO would make us wait for a writer.
        let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(fail)?;
        check_owner(path, &file.metadata().map_err(fail)?)?;
        let mut text = String::new();
        file.by_ref().take(LIST_MAX + 1).read_to_string(&mut text).map_err(fail)?;
        if text.len() as u64 > LIST_MAX {
            return Err(format!("{shown}: the allowlist is longer than {LIST_MAX} bytes"));
        }
        Self::parse(&text).map_err(|e| format!("{shown}: {e}"))
    }

    /// Parses the text of a list.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|e| e.to_string())
    }

    /// The one entry with this serial and namespace: none and several are both refusals.
    pub fn entry(&self, serial: &str, nsid: u32) -> Result<&Entry, String> {
        let mut same = self.drive.iter().filter(|e| e.serial == serial && e.namespace == nsid);
        match (same.next(), same.next()) {
            (Some(entry), None) => Ok(entry),
            (None, _) => Err(format!("no entry names serial {serial}, namespace {nsid}")),
            (Some(_), Some(_)) => Err(format!("two entries name serial {serial}, namespace {nsid}")),
        }
    }
}

/// Judges the file that is open, not what its path leads to by now.
fn check_owner(path: &Path, meta: &Metadata) -> Result<(), String> {
    let shown = path.display();
    if !meta.is_file() {
        return Err(format!("{shown}: the allowlist must be a regular file"));
    }
    if meta.uid() != 0 || meta.mode() & 0o022 != 0 {
        return Err(format!(
            "{shown}: the allowlist must belong to root and be writable by nobody else (owner {}, mode {:o}); mend it with `chown root {shown} && chmod 644 {shown}`",
            meta.uid(),
            meta.mode() & 0o777
        ));
    }
    Ok(())
}
