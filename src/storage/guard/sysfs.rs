//! NVMe controllers of the host with their namespaces and partitions, as sysfs tells them.

use super::host::{Host, Unreadable};
use super::identity::is_bogus;

/// A partition or a whole namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// Kernel name, `nvme0n1p2`.
    pub name: String,
    /// `major:minor`.
    pub number: String,
    /// First byte on the namespace (0 for a whole namespace).
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

/// One namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// The whole device.
    pub whole: BlockDevice,
    /// Namespace identifier.
    pub nsid: u32,
    /// Bytes a logical block.
    pub block_size: u32,
    /// Its partitions.
    pub partitions: Vec<BlockDevice>,
    /// Identifiers by the name of their file (`eui`, `nguid`, `uuid`), as lower-case hexadecimal digits.
    pub ids: Vec<(&'static str, String)>,
}

impl Namespace {
    /// The whole device, then its partitions.
    pub fn devices(&self) -> impl Iterator<Item = &BlockDevice> {
        std::iter::once(&self.whole).chain(&self.partitions)
    }

    /// The identifiers that can be the drive's alone.
    pub fn trusted_ids(&self) -> impl Iterator<Item = (&'static str, &str)> {
        trusted(&self.ids)
    }
}

fn trusted<'a>(ids: &'a [(&'static str, String)]) -> impl Iterator<Item = (&'static str, &'a str)> {
    ids.iter().filter(|(_, id)| !is_bogus(id)).map(|(file, id)| (*file, id.as_str()))
}

/// One NVMe PCI function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controller {
    /// PCI address, `0000:02:00.0`.
    pub bdf: String,
    /// Driver bound to it, `nvme`, `vfio-pci` or none.
    pub driver: Option<String>,
    /// Kernel name, `nvme0`; none where the kernel's driver does not hold it.
    pub name: Option<String>,
    /// Serial number, trimmed.
    pub serial: String,
    /// Model, trimmed.
    pub model: String,
    /// Firmware revision, trimmed.
    pub firmware: String,
    /// All its namespaces that the kernel shows whole.
    pub namespaces: Vec<Namespace>,
    /// What cannot be read of it; a drive with any is refused.
    pub hidden: Vec<Hidden>,
}

/// A namespace that the kernel hides, as one that is zoned or of a format it does not know, or something else of a drive
/// that cannot be read. It makes its own drive odd, and no other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hidden {
    /// Kernel name of the namespace, or of the controller.
    pub name: String,
    /// What could not be read, and why.
    pub unreadable: Unreadable,
    /// Identifiers of it that can be read all the same, as in [`Namespace::ids`].
    pub ids: Vec<(&'static str, String)>,
}

impl Controller {
    /// sysfs folder of the PCI function.
    pub fn pci_path(&self) -> String {
        format!("/sys/bus/pci/devices/{}", self.bdf)
    }

    /// Every namespace and partition.
    pub fn devices(&self) -> impl Iterator<Item = &BlockDevice> {
        self.namespaces.iter().flat_map(Namespace::devices)
    }

    /// Every identifier that can be the drive's alone, those of hidden namespaces too.
    pub fn trusted_ids(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let all = self.namespaces.iter().map(|n| &n.ids).chain(self.hidden.iter().map(|h| &h.ids));
        all.flat_map(|ids| trusted(ids))
    }

    /// True if one of its devices has this kernel name.
    pub fn owns(&self, name: &str) -> bool {
        self.devices().any(|d| d.name == name)
    }
}

/// PCI class code of NVMe controllers.
pub const NVME_CLASS: &str = "0x010802";

/// Every NVMe controller of the host, by PCI address.
pub fn controllers(host: &Host) -> Result<Vec<Controller>, Unreadable> {
    let base = "/sys/bus/pci/devices";
    let mut found = Vec::new();
    for bdf in host.list(base)? {
        if host.read(&format!("{base}/{bdf}/class"))? == NVME_CLASS {
            found.push(controller(host, &bdf)?);
        }
    }
    Ok(found)
}

fn controller(host: &Host, bdf: &str) -> Result<Controller, Unreadable> {
    let pci = format!("/sys/bus/pci/devices/{bdf}");
    let name = host.list(&format!("{pci}/nvme"))?.into_iter().next();
    let mut found = Controller {
        bdf: bdf.to_owned(),
        driver: host.link_name(&format!("{pci}/driver")),
        name: name.clone(),
        serial: String::new(),
        model: String::new(),
        firmware: String::new(),
        namespaces: Vec::new(),
        hidden: Vec::new(),
    };
    if let Some(name) = name {
        let class = format!("{pci}/nvme/{name}");
        // Without a serial number it may be the twin of any other drive, which is then refused (`twins.rs`).
        found.serial = attribute(host, &name, &format!("{class}/serial"), &mut found.hidden);
        found.model = attribute(host, &name, &format!("{class}/model"), &mut found.hidden);
        found.firmware = attribute(host, &name, &format!("{class}/firmware_rev"), &mut found.hidden);
        // nvme0n1, and nvme0c0n1: a path of a multipath namespace, whose node is nvme0n1.
        let entries = host.list(&class)?;
        let mut nodes: Vec<String> = entries.iter().filter_map(|entry| namespace_node(&name, entry)).collect();
        nodes.sort();
        nodes.dedup();
        for node in nodes {
            match namespace(host, &node) {
                Ok(namespace) => found.namespaces.push(namespace),
                Err(unreadable) => {
                    let ids = ids(host, &node).unwrap_or_default();
                    found.hidden.push(Hidden { name: node, unreadable, ids });
                }
            }
        }
    }
    Ok(found)
}

/// An attribute of a controller, trimmed; empty where it cannot be read, which is noted.
fn attribute(host: &Host, name: &str, path: &str, hidden: &mut Vec<Hidden>) -> String {
    host.read(path).map(|text| text.trim().to_owned()).unwrap_or_else(|unreadable| {
        hidden.push(Hidden { name: name.to_owned(), unreadable, ids: Vec::new() });
        String::new()
    })
}

/// `nvme1n2` for the entries `nvme1n2` and `nvme1c3n2` of the folder of a controller, `nvme1` or `nvme3`.
pub fn namespace_node(controller: &str, entry: &str) -> Option<String> {
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    if let Some(n) = entry.strip_prefix(controller).and_then(|rest| rest.strip_prefix('n')) {
        return digits(n).then(|| entry.to_owned());
    }
    // A path has the number of its subsystem first, which may be another controller's.
    let (subsystem, rest) = entry.strip_prefix("nvme")?.split_once('c')?;
    let (path, n) = rest.split_once('n')?;
    (digits(subsystem) && digits(path) && digits(n)).then(|| format!("nvme{subsystem}n{n}"))
}

fn namespace(host: &Host, node: &str) -> Result<Namespace, Unreadable> {
    let base = format!("/sys/class/block/{node}");
    let whole = block_device(host, node)?;
    let mut partitions = Vec::new();
    for entry in host.list(&format!("{base}/"))? {
        if entry.starts_with(&format!("{node}p")) && host.exists(&format!("{base}/{entry}/partition")) {
            partitions.push(block_device(host, &entry)?);
        }
    }
    let nsid = host.read(&format!("{base}/nsid"))?;
    let block_size = host.read(&format!("{base}/queue/logical_block_size"))?;
    Ok(Namespace {
        ids: ids(host, node)?,
        whole,
        nsid: number(&nsid, &format!("{base}/nsid"))? as u32,
        block_size: number(&block_size, &format!("{base}/queue/logical_block_size"))? as u32,
        partitions,
    })
}

fn ids(host: &Host, node: &str) -> Result<Vec<(&'static str, String)>, Unreadable> {
    let mut ids = Vec::new();
    for file in ["eui", "nguid", "uuid"] {
        if let Some(text) = host.read_if_there(&format!("/sys/class/block/{node}/{file}"))? {
            ids.push((file, text.to_ascii_lowercase().chars().filter(char::is_ascii_hexdigit).collect()));
        }
    }
    Ok(ids)
}

fn block_device(host: &Host, name: &str) -> Result<BlockDevice, Unreadable> {
    let base = format!("/sys/class/block/{name}");
    let sectors = |file: &str| -> Result<u64, Unreadable> {
        let path = format!("{base}/{file}");
        Ok(number(&host.read(&path)?, &path)?.saturating_mul(512))
    };
    Ok(BlockDevice {
        name: name.to_owned(),
        number: host.read(&format!("{base}/dev"))?,
        start: if host.exists(&format!("{base}/start")) { sectors("start")? } else { 0 },
        size: sectors("size")?,
    })
}

fn number(text: &str, path: &str) -> Result<u64, Unreadable> {
    text.trim().parse().map_err(|_| Unreadable::new(path, format!("a number was expected, {text:?} was found")))
}

/// The controller a user means by `nvme0`, `nvme0n1`, `nvme0n1p1`, `/dev/…`, a by-id path, or a PCI
/// address.
pub fn find<'a>(host: &Host, all: &'a [Controller], name: &str) -> Option<&'a Controller> {
    let short = node(host, name)?;
    all.iter().find(|c| {
        c.bdf.eq_ignore_ascii_case(&short)
            || c.bdf.strip_prefix("0000:").is_some_and(|bdf| bdf.eq_ignore_ascii_case(&short))
            || c.name.as_deref() == Some(&short)
            || c.owns(&short)
            || c.hidden.iter().any(|h| h.name == short)
    })
}

/// The namespaces that a user means by a name of `drive`: the one that it names, itself or by a partition, else all.
pub fn namespaces<'a>(host: &Host, drive: &'a Controller, name: &str) -> Vec<&'a Namespace> {
    let short = node(host, name).unwrap_or_default();
    let named = drive.namespaces.iter().find(|n| n.devices().any(|d| d.name == short));
    named.map_or_else(|| drive.namespaces.iter().collect(), |n| vec![n])
}

/// The partition of `drive` that a user's name for it is, if it is one.
pub fn partition<'a>(host: &Host, drive: &'a Controller, name: &str) -> Option<&'a BlockDevice> {
    let short = node(host, name)?;
    drive.namespaces.iter().flat_map(|n| &n.partitions).find(|p| p.name == short)
}

/// A name without `/dev/`, or that of the node that a link below it leads to.
fn node(host: &Host, name: &str) -> Option<String> {
    let short = name.strip_prefix("/dev/").unwrap_or(name);
    if name.starts_with("/dev/") && short.contains('/') { host.link_name(name) } else { Some(short.to_owned()) }
}
