//! Decides whether a drive may be taken from the kernel. Default deny: a drive passes only if the
//! allowlist describes it and no check finds a reason against it; what cannot be read is a reason.
//! All reasons are reported at once, each with the path it was read from. Reads only.

mod age;
pub mod allowlist;
mod ask;
mod attended;
mod boot;
pub mod claim;
mod commands;
mod consent;
mod exports;
mod fat;
mod firmware;
pub mod host;
mod identity;
mod last;
mod locked;
mod mounts;
pub mod node;
mod nodes;
mod open;
mod opinions;
mod partitions;
mod pci;
mod records;
mod sight;
pub(super) mod signatures;
mod sockets;
mod stack;
mod superblocks;
pub mod sysfs;
mod tables;
#[cfg(test)]
mod tests;
mod twins;
mod words;

use std::fmt;
use std::path::PathBuf;

use consent::Foreign;
use partitions::Tables;
use signatures::Place;
use words::Words;

use super::image;

pub use allowlist::Allowlist;
pub use boot::has_partitions;
pub use consent::Purpose;
pub use host::{Host, Unreadable};
pub use last::LastLook;
pub use sysfs::{BlockDevice, Controller, Namespace};
pub use twins::address_decides;

/// What kind of reason speaks against a drive. The words are the headings of `docs/safety.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Check {
    /// The system boots or runs from it.
    Boot,
    /// A file system on it is mounted.
    Mounted,
    /// Swap or hibernation.
    Swap,
    /// Another block device stands on it.
    Stacked,
    /// A table of the machine names it.
    Configured,
    /// A process has it open, or I/O is under way.
    Open,
    /// It is exported to other machines.
    Exported,
    /// It holds data the allowlist does not mention.
    Contents,
    /// No entry of the allowlist describes it.
    Allowlist,
    /// Its identifiers are another drive's as well, or identify nothing.
    Twin,
    /// No IOMMU isolates it.
    Iommu,
    /// Another device shares its IOMMU group.
    Sibling,
    /// Its driver, transport or power state is not as expected.
    Driver,
    /// SR-IOV.
    Virtual,
    /// Behind a RAID or VMD controller.
    Raid,
    /// More than one controller leads to it.
    Shared,
    /// Its format is not supported (metadata, protection information, zones, a namespace that the kernel hides).
    Format,
    /// A check could not be made.
    Unreadable,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// One reason against a drive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// Its kind.
    pub check: Check,
    /// Where it was read.
    pub path: PathBuf,
    /// What was found.
    pub what: String,
}

impl Reason {
    pub(crate) fn new(check: Check, path: &str, what: String) -> Self {
        Self { check, path: path.into(), what }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A name that somebody else chose must not pass for a line of ours.
        let line = format!("{}: {} ({})", self.check, self.what, self.path.display());
        f.write_str(&line.replace('\n', "\\n"))
    }
}

impl From<Unreadable> for Reason {
    fn from(e: Unreadable) -> Self {
        Self { check: Check::Unreadable, what: e.why, path: e.path }
    }
}

/// Every reason against using `controller` for this purpose; empty if it may be bound, or overwritten.
pub fn examine(
    host: &Host,
    all: &[Controller],
    controller: &Controller,
    allowed: &Result<Allowlist, String>,
    purpose: Purpose,
) -> Vec<Reason> {
    let mut out = Vec::new();
    // Who it is.
    identity::identified(controller, &mut out);
    identity::hidden(controller, &mut out);
    out.extend(twins::twins(host, all, controller));
    identity::namespaces(all, controller, &mut out);
    identity::listed(controller, allowed, &mut out);
    note(&mut out, |out| twins::address_of_entry(host, all, controller, allowed, out));
    note(&mut out, |out| identity::shared(host, controller, out));
    // Where it is.
    note(&mut out, |out| pci::function(host, controller, out));
    note(&mut out, |out| pci::iommu(host, controller, out));
    note(&mut out, |out| pci::hot(host, controller, out));
    note(&mut out, |out| last::counted(host, controller, out));
    // Who uses it, and whether that can be seen.
    note(&mut out, |out| sight::hidden(host, out));
    note(&mut out, |out| nodes::Nodes::of(host, controller)?.are_right(host, out));
    note(&mut out, |out| mounts::mounted(host, controller, out));
    note(&mut out, |out| mounts::swap(host, controller, out));
    note(&mut out, |out| opinions::hibernated(host, controller, out));
    for device in controller.devices() {
        note(&mut out, |out| stack::holders(host, device, out));
    }
    note(&mut out, |out| stack::elsewhere(host, controller, out));
    note(&mut out, |out| stack::linked(host, controller, out));
    note(&mut out, |out| stack::loops(host, controller, out));
    note(&mut out, |out| stack::zfs(host, controller, out));
    note(&mut out, |out| boot::root(host, controller, out));
    note(&mut out, |out| open::opened(host, controller, std::process::id(), out));
    // Whether its data can be seen at all, and overwritten.
    note(&mut out, |out| locked::locked(host, controller, out));
    if purpose == Purpose::Erase {
        note(&mut out, |out| locked::protected(host, controller, out));
    }
    // What it says of itself, and who names it by that.
    let mut said = opinions::said(host, controller);
    for namespace in &controller.namespaces {
        let tables = boot::tables(host, namespace).unwrap_or_else(|e| {
            out.push(e.into());
            Tables::default()
        });
        note(&mut out, |out| {
            let found = contents(host, namespace, &tables, purpose, &mut said)?;
            let entry = allowed.as_ref().ok().and_then(|l| l.entry(&controller.serial, namespace.nsid).ok());
            out.extend(consent::missing(&found, entry, purpose));
            Ok(())
        });
        note(&mut out, |out| format(host, namespace, out));
        note(&mut out, |out| boot::hibernated(host, namespace, &tables, out));
        boot::partitions(host, namespace, &tables, &mut out);
        note(&mut out, |out| firmware::boots(host, namespace, &tables, out));
        let name = &namespace.whole.name;
        said.extend(words::of_tables(&tables).into_iter().map(|s| (name.clone(), s)));
    }
    if said.len() > SAID_MAX {
        let path = controller.namespaces.first().map_or(controller.pci_path(), |n| format!("/dev/{}", n.whole.name));
        let what = format!(
            "it has more than {SAID_MAX} identifiers and labels, more than tables are searched for; if nothing there is needed, clear it first (`wipefs --all {path}`)"
        );
        out.push(Reason::new(Check::Unreadable, &path, what));
    }
    said.truncate(SAID_MAX);
    note(&mut out, |out| {
        let words = Words::new(host, controller, said)?;
        note(out, |out| exports::exported(host, controller, &words, out));
        tables::named(host, &words, out)
    });
    out
}

/// Most identifiers of one drive that tables are searched for. Whoever could write to a drive can have put more there than
/// anybody waits for.
const SAID_MAX: usize = 4096;

/// Runs one check; if it could not be made, that is the reason.
fn note(out: &mut Vec<Reason>, check: impl FnOnce(&mut Vec<Reason>) -> Result<(), Unreadable>) {
    if let Err(e) = check(out) {
        out.push(e.into());
    }
}

/// Contents of a namespace and its partitions, those that only a table describes among them, that are not nt's own, by
/// our own look and by `blkid`; what they say of themselves is added to `said`.
fn contents(
    host: &Host,
    namespace: &Namespace,
    tables: &Tables,
    purpose: Purpose,
    said: &mut Vec<(String, superblocks::Said)>,
) -> Result<Vec<Foreign>, Unreadable> {
    let mut found = Vec::new();
    for device in namespace.devices() {
        let kinds = held(host, namespace, &Place { device, part: None }, purpose, said)?;
        let path = format!("/dev/{}", device.name);
        found.extend(kinds.into_iter().map(|kind| Foreign { path: path.clone(), kind, unshown: None }));
    }
    let whole = Place { device: &namespace.whole, part: None };
    // What the old tables of a drive that is being staged describe was given up when its mark was written.
    let given_up = image::mark::ranges(&whole.read(host, 0, image::mark::BYTES)?).is_some();
    for (place, certain) in boot::unshown(namespace, tables) {
        let mut kinds = held(host, namespace, &place, purpose, said)?;
        // Bytes that nobody knows, at a place where a partition would lie if its table counted other blocks than the
        // drive's, are another partition's.
        kinds.retain(|kind| !given_up && (certain || kind != signatures::UNKNOWN));
        let unshown = place.part.as_ref().map(|p| p.start);
        found.extend(kinds.into_iter().map(|kind| Foreign { path: place.path(), kind, unshown }));
    }
    Ok(found)
}

/// Kinds of contents of one place that are not nt's own; what they say of themselves is added to `said`.
fn held(
    host: &Host,
    namespace: &Namespace,
    place: &Place<'_>,
    purpose: Purpose,
    said: &mut Vec<(String, superblocks::Said)>,
) -> Result<Vec<String>, Unreadable> {
    let (head, tail) = place.edges(host)?;
    let mut far = |at: u64, len: usize| place.read(host, at, len).unwrap_or_default();
    let mut told = superblocks::said(&head, &tail, &mut far);
    let opinion = opinions::blkid(host, place);
    told.extend(opinion.said);
    // What is left out of too many is a refusal, by the one too many.
    let left = (SAID_MAX + 1).saturating_sub(said.len());
    said.extend(told.into_iter().take(left).map(|s| (place.device.name.clone(), s)));
    let mut kinds: Vec<String> = signatures::recognise(&head, &tail).into_iter().map(String::from).collect();
    kinds.extend(opinion.holds.filter(|kind| !kinds.contains(kind)));
    let whole = place.part.is_none() && *place.device == namespace.whole;
    if purpose == Purpose::Erase && kinds.is_empty() && place.holds_inside(host)? {
        kinds.push(signatures::UNKNOWN.into());
    }
    let (size, block) = (place.size(), namespace.block_size.into());
    kinds.retain(|kind| !signatures::is_own(kind, whole, &head, &tail, size, block));
    Ok(kinds)
}

fn format(host: &Host, namespace: &Namespace, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let base = format!("/sys/class/block/{}", namespace.whole.name);
    if !matches!(namespace.block_size, 512 | 4096) {
        out.push(Reason::new(
            Check::Format,
            &format!("{base}/queue/logical_block_size"),
            format!("blocks of {} bytes", namespace.block_size),
        ));
    }
    let zoned = format!("{base}/queue/zoned");
    if let Some(kind) = host.read_if_there(&zoned)?
        && kind != "none"
    {
        out.push(Reason::new(Check::Format, &zoned, format!("a zoned namespace ({kind})")));
    }
    for file in ["integrity/tag_size", "metadata_bytes"] {
        let path = format!("{base}/{file}");
        if let Some(bytes) = host.read_if_there(&path)?
            && bytes != "0"
        {
            out.push(Reason::new(Check::Format, &path, format!("{bytes} bytes of integrity metadata a block")));
        }
    }
    let integrity = format!("{base}/integrity/format");
    if let Some(kind) = host.read_if_there(&integrity)?
        && !matches!(kind.as_str(), "none" | "nop")
    {
        out.push(Reason::new(Check::Format, &integrity, format!("protection information ({kind})")));
    }
    Ok(())
}
