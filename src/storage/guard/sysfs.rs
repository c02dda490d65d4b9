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
        self.ids.iter().filter(|(_, id)| !is_bogus(id)).map(|(file, id)| (*file, id.as_str()))
    }
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
    /// All its namespaces.
    pub namespaces: Vec<Namespace>,
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
    };
    if let Some(name) = name {
        let class = format!("{pci}/nvme/{name}");
        found.serial = host.read(&format!("{class}/serial"))?.trim().to_owned();
        found.model = host.read(&format!("{class}/model"))?.trim().to_owned();
        found.firmware = host.read(&format!("{class}/firmware_rev"))?.trim().to_owned();
        for entry in host.list(&class)? {
            // nvme0n1, and nvme0c0n1: a path of a multipath namespace, whose node is nvme0n1.
            if let Some(node) = namespace_node(&name, &entry) {
                found.namespaces.push(namespace(host, &node)?);
            }
        }
        found.namespaces.sort_by(|a, b| a.whole.name.cmp(&b.whole.name));
        found.namespaces.dedup_by(|a, b| a.whole.name == b.whole.name);
    }
    Ok(found)
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
    let mut ids = Vec::new();
    for file in ["eui", "nguid", "uuid"] {
        if let Some(text) = host.read_if_there(&format!("{base}/{file}"))? {
            ids.push((file, text.to_ascii_lowercase().chars().filter(char::is_ascii_hexdigit).collect()));
        }
    }
    Ok(Namespace {
        ids,
        whole,
        nsid: number(&nsid, &format!("{base}/nsid"))? as u32,
        block_size: number(&block_size, &format!("{base}/queue/logical_block_size"))? as u32,
        partitions,
    })
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
        c.bdf == short
            || c.bdf.strip_prefix("0000:") == Some(&short)
            || c.name.as_deref() == Some(&short)
            || c.owns(&short)
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
