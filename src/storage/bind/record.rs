//! The journal of binding: `/run/nt/ADDRESS.toml`, one record per drive, written and synced before the
//! first change of the drive and moved forward at each step. A record holds for one boot and for one
//! appearance of the device in sysfs; one that does not is stale.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::super::guard::sysfs::NVME_CLASS;
use super::super::guard::{Controller, Host};
use super::super::safe;
use super::DeviceError;

/// The folder of records. Root's, mode 0755.
pub(super) const STATE: &str = "/run/nt";
/// Most bytes of a record.
const RECORD_MAX: u64 = 64 << 10;
/// Most bytes of links in one.
const LINKS_MAX: usize = 16 << 10;

/// How far a bind or a release has come: the last step that is known to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Nothing has been changed yet.
    Begun,
    /// `driver_override` says vfio-pci.
    Override,
    /// The kernel's driver has let go.
    Unbound,
    /// vfio-pci holds it: it may be used, as soon as its node is handed over, which comes last.
    Bound,
    /// It is being given back.
    Releasing,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            State::Begun => "a bind has begun",
            State::Override => "a bind has set driver_override",
            State::Unbound => "a bind has taken it from its driver",
            State::Bound => "it is bound",
            State::Releasing => "a release has begun",
        })
    }
}

/// What is remembered of a drive that is bound, or half so. The udev rule's program reads the first lines, which
/// hold nothing that a drive says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bound {
    /// PCI address.
    pub pci: String,
    /// Boot that it holds for; empty in records of older versions.
    #[serde(default)]
    pub boot: String,
    /// Progress. A record that does not say it is not used: it would pass for that of a bound drive.
    pub state: State,
    /// Inode of the device's folder in sysfs, which is another one when a device appears anew; 0 if unknown.
    #[serde(default)]
    pub instance: u64,
    /// Inode of the VFIO group's folder in sysfs, which is another one whenever vfio-pci takes the drive; 0 until it is
    /// bound.
    #[serde(default)]
    pub taking: u64,
    /// Kernel name before, `nvme1`.
    pub controller: String,
    /// Serial.
    pub serial: String,
    /// Model.
    pub model: String,
    /// IOMMU group.
    pub group: String,
    /// Links below `/dev`, which are gone while it is bound.
    #[serde(default)]
    pub links: Vec<String>,
    /// Its namespaces.
    pub namespace: Vec<BoundNamespace>,
}

/// A namespace of a bound drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundNamespace {
    /// Kernel name before, `nvme1n1`.
    pub name: String,
    /// Identifier.
    pub nsid: u32,
    /// Bytes.
    pub size: u64,
}

/// Whether a record still speaks of the device at its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It does.
    Holds,
    /// It is of another boot.
    OtherBoot,
    /// No NVMe device is at the address.
    Gone,
    /// The device was taken out, and one was put in, since.
    Replaced,
    /// The kernel's driver has the drive again and nothing is left to undo.
    Undone,
    /// It was given back by hand and then bound to vfio-pci by somebody else: what nt remembers is not that.
    Retaken,
}

impl std::fmt::Display for Standing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Standing::Holds => "it holds",
            Standing::OtherBoot => "it is of another boot",
            Standing::Gone => "the drive is gone",
            Standing::Replaced => "the drive was taken out since",
            Standing::Undone => "the kernel's driver has the drive again",
            Standing::Retaken => "somebody else has bound the drive to vfio-pci since",
        })
    }
}

impl Bound {
    /// The record of a drive that the kernel's driver holds, before anything is done; `name` is what the user called it.
    pub(super) fn of(host: &Host, drive: &Controller, name: &str) -> Bound {
        let namespace = |n: &super::super::guard::Namespace| BoundNamespace {
            name: n.whole.name.clone(),
            nsid: n.nsid,
            size: n.whole.size,
        };
        let mut links = links(host, drive);
        // Any link below `/dev` may have been given.
        if name.matches('/').count() > 2 && name.len() <= LINKS_MAX && !links.iter().any(|link| link == name) {
            links.insert(0, name.to_owned());
        }
        Bound {
            pci: drive.bdf.clone(),
            boot: boot(host),
            state: State::Begun,
            instance: instance(host, &drive.bdf),
            taking: 0,
            controller: drive.name.clone().unwrap_or_default(),
            serial: drive.serial.clone(),
            model: drive.model.clone(),
            group: host.link_name(&format!("{}/iommu_group", drive.pci_path())).unwrap_or_default(),
            links,
            namespace: drive.namespaces.iter().map(namespace).collect(),
        }
    }

    /// Whether it still speaks of the device at its address. Does not look at `driver_override`.
    pub fn standing(&self, host: &Host) -> Standing {
        let folder = device(&self.pci);
        if !self.boot.is_empty() && self.boot != boot(host) {
            Standing::OtherBoot
        } else if host.read(&format!("{folder}/class")).ok().as_deref() != Some(NVME_CLASS) {
            Standing::Gone
        } else if self.instance != 0 && self.instance != instance(host, &self.pci) {
            Standing::Replaced
        } else if matches!(self.state, State::Bound | State::Unbound)
            && driver(host, &self.pci).as_deref() == Some("nvme")
        {
            Standing::Undone
        } else if self.state == State::Bound
            && self.taking != 0
            && self.taking != taking(host, &self.group)
            // Without a driver nobody has taken it since: it was unbound by hand, and the way back is not finished.
            && driver(host, &self.pci).is_some()
        {
            Standing::Retaken
        } else {
            Standing::Holds
        }
    }

    /// How far it has come, for the user, beside the driver that holds it now.
    pub fn progress(&self, host: &Host) -> String {
        match (self.state, driver(host, &self.pci)) {
            (State::Bound, None) => "it was bound, and somebody has unbound it since".into(),
            (state, _) => state.to_string(),
        }
    }

    /// For the user: model and serial, or what there is.
    pub fn shown(&self) -> String {
        let name = format!("{} {}", self.model, self.serial);
        if name.trim().is_empty() { "the drive".into() } else { name }
    }

    /// Whether `name` is one by which a user may mean it: its controller, a namespace or a partition of one,
    /// as they were called before.
    pub(super) fn has_name(&self, name: &str) -> bool {
        self.controller == name || self.namespace_of(name).is_some()
    }

    /// The namespace that `name` is or is a partition of.
    pub(super) fn namespace_of(&self, name: &str) -> Option<&BoundNamespace> {
        self.namespace.iter().find(|n| n.name == name || name.strip_prefix(n.name.as_str()).is_some_and(is_partition))
    }

    /// Whether `name` is its address or a link that led to it: a name that only it can have.
    pub(super) fn is_exactly(&self, name: &str) -> bool {
        address(name).is_some_and(|a| a == self.pci) || self.links.iter().any(|link| link == name)
    }
}

fn is_partition(rest: &str) -> bool {
    rest.strip_prefix('p').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// The folder of a PCI device in sysfs.
pub(super) fn device(pci: &str) -> String {
    format!("/sys/bus/pci/devices/{pci}")
}

/// The driver that holds a PCI device.
pub(super) fn driver(host: &Host, pci: &str) -> Option<String> {
    host.link_name(&format!("{}/driver", device(pci)))
}

/// A PCI address in full, lower case: `0000:02:00.0` for `02:00.0`.
pub fn address(text: &str) -> Option<String> {
    let full = if text.matches(':').count() == 1 { format!("0000:{text}") } else { text.to_owned() };
    let (rest, function) = full.rsplit_once('.')?;
    let mut parts = rest.split(':');
    let hex = |s: &str, len: std::ops::RangeInclusive<usize>| {
        len.contains(&s.len()) && s.bytes().all(|b| b.is_ascii_hexdigit())
    };
    let fits = hex(parts.next()?, 4..=8) && hex(parts.next()?, 2..=2) && hex(parts.next()?, 2..=2);
    let one = function.len() == 1 && matches!(function.as_bytes()[0], b'0'..=b'7');
    (fits && one && parts.next().is_none()).then(|| full.to_ascii_lowercase())
}

/// This boot's identifier; empty if the kernel does not tell.
fn boot(host: &Host) -> String {
    host.read("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

/// sysfs gives a folder a new inode number whenever a device appears.
fn instance(host: &Host, pci: &str) -> u64 {
    std::fs::metadata(host.real(&device(pci))).map_or(0, |m| m.ino())
}

/// The inode of a VFIO group's folder, which vfio-pci makes when it takes the drive; 0 if there is none.
pub(super) fn taking(host: &Host, group: &str) -> u64 {
    std::fs::metadata(host.real(&format!("/sys/class/vfio/{group}"))).map_or(0, |m| m.ino())
}

/// Links below `/dev/disk` that lead to the drive, those to whole namespaces first, and no more than a record has room for: a
/// drive may have hundreds of partitions.
fn links(host: &Host, drive: &Controller) -> Vec<String> {
    let folders = host.list("/dev/disk").unwrap_or_default().into_iter().map(|f| format!("/dev/disk/{f}"));
    let names = folders.flat_map(|folder| {
        let names = host.list(&folder).unwrap_or_default();
        names.into_iter().map(move |name| format!("{folder}/{name}"))
    });
    let of = |name: String| Some((host.link_name(&name).filter(|target| drive.owns(target))?, name));
    let (whole, parts): (Vec<_>, Vec<_>) =
        names.filter_map(of).partition(|(target, _)| drive.namespaces.iter().any(|n| n.whole.name == *target));
    let mut left = LINKS_MAX;
    let mut fits = |name: &String| match left.checked_sub(name.len()) {
        Some(rest) => {
            left = rest;
            true
        }
        None => false,
    };
    whole.into_iter().chain(parts).map(|(_, name)| name).take_while(|name| fits(name)).collect()
}

/// Where the record of an address lies.
pub(super) fn path(pci: &str) -> String {
    format!("{STATE}/{pci}.toml")
}

/// Makes the folder of records, or makes sure that it is root's alone.
pub(super) fn folder(host: &Host) -> Result<(), DeviceError> {
    made_folder(host).map_err(|e| DeviceError::system(format!("making {STATE}"), &e))
}

/// The same, with the system's error.
pub(super) fn made_folder(host: &Host) -> std::io::Result<()> {
    let folder = host.real(STATE);
    // On a machine /run is there already.
    let parent = folder.parent().unwrap_or(Path::new("/"));
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o755).create(parent);
    made.and_then(|()| safe::own_folder(&folder, true).map(|_| ()))
}

/// Writes a record; it is on disk, whole, when this returns. The caller holds the drive's lock.
pub(super) fn save(host: &Host, record: &Bound) -> std::io::Result<()> {
    let text = toml::to_string(record).map_err(std::io::Error::other)?;
    sweep(host, &record.pci);
    safe::replace(&host.real(&path(&record.pci)), text.as_bytes(), 0o644, &prefix(&record.pci))
}

/// Removes a record, if there is one. The caller holds the drive's lock.
pub(super) fn remove(host: &Host, pci: &str) -> std::io::Result<()> {
    sweep(host, pci);
    match std::fs::remove_file(host.real(&path(pci))) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ if host.exists(STATE) => safe::sync_folder(&host.real(STATE)),
        _ => Ok(()),
    }
}

fn prefix(pci: &str) -> String {
    format!(".{pci}-")
}

/// Removes what a killed command left half written for this address.
fn sweep(host: &Host, pci: &str) {
    for name in host.list(STATE).unwrap_or_default().iter().filter(|n| n.starts_with(&prefix(pci))) {
        let _ = std::fs::remove_file(host.real(&format!("{STATE}/{name}")));
    }
}

/// The record of an address, if there is one that can be read.
pub(super) fn load(host: &Host, pci: &str) -> Option<Bound> {
    let path = host.real(&path(pci));
    let contents = match safe::read(&path, RECORD_MAX) {
        Ok(contents) => contents,
        Err(e) => {
            if e.kind() != std::io::ErrorKind::NotFound {
                tracing::warn!("{}: the record is not used: {e}", path.display());
            }
            return None;
        }
    };
    // In a folder of root's, which it is but in tests, a record must be root's.
    let roots = std::fs::metadata(host.real(STATE)).is_ok_and(|m| m.uid() == 0);
    if roots && (contents.uid != 0 || contents.others_write) {
        tracing::warn!("{}: the record is not used: others than root may write it", path.display());
        return None;
    }
    match toml::from_str::<Bound>(&String::from_utf8_lossy(&contents.bytes)) {
        Ok(record) if record.pci == pci => Some(record),
        Ok(record) => {
            tracing::warn!("{}: the record is not used: it is of {}", path.display(), record.pci);
            None
        }
        Err(e) => {
            tracing::warn!("{}: the record is not used: {}", path.display(), e.message());
            None
        }
    }
}

/// Addresses whose record cannot be used, as one that is empty or another's.
pub fn damaged(host: &Host) -> Vec<String> {
    let names = host.list(STATE).unwrap_or_default();
    let all = names.iter().filter_map(|n| address(n.strip_suffix(".toml")?));
    all.filter(|pci| host.exists(&path(pci)) && load(host, pci).is_none()).collect()
}

/// Every record that can be read, whatever its state and standing, by address.
pub fn all(host: &Host) -> Vec<Bound> {
    let names = host.list(STATE).unwrap_or_default();
    names.iter().filter_map(|n| address(n.strip_suffix(".toml")?)).filter_map(|pci| load(host, &pci)).collect()
}

/// Every record of a drive that is bound or half so, of this boot and of the device that is there now.
pub fn current(host: &Host) -> Vec<Bound> {
    all(host).into_iter().filter(|r| r.standing(host) == Standing::Holds).collect()
}
