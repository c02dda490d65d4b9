//! Which drive a user means: among those that are bound, or half so, by their records; among all others by
//! what sysfs says.

use std::os::unix::fs::MetadataExt;

use super::super::guard::{Controller, Host, sysfs};
use super::record::{self, Bound, BoundNamespace, Standing, State, address, device, driver};
use super::{DeviceError, GROUP};

/// Every drive that is bound and may be used.
pub fn bound(host: &Host) -> Vec<Bound> {
    record::current(host).into_iter().filter(|r| usable(host, r)).collect()
}

fn usable(host: &Host, record: &Bound) -> bool {
    record.state == State::Bound && driver(host, &record.pci).as_deref() == Some("vfio-pci")
}

/// Whether the node of a bound drive's group belongs to [`GROUP`]; none where there is no such group or no node.
pub fn is_handed_over(host: &Host, record: &Bound) -> Option<bool> {
    let group = nix::unistd::Group::from_name(GROUP).ok().flatten()?;
    let node = std::fs::symlink_metadata(host.real(&format!("/dev/vfio/{}", record.group))).ok()?;
    Some(node.gid() == group.gid.as_raw())
}

/// The bound drive, and its namespace, that a user means by its former name or its PCI address.
///
/// # Errors
/// [`DeviceError::NotBound`]; [`DeviceError::Ambiguous`] if several bound drives had the name; or that the
/// kernel has given the name to another drive since, or that the drive is only half bound.
pub fn find_bound(host: &Host, name: &str) -> Result<(Bound, BoundNamespace), DeviceError> {
    let Some(drive) = recorded(host, name, record::current(host))? else {
        return Err(DeviceError::NotBound(name.into()));
    };
    if !usable(host, &drive) {
        if driver(host, &drive.pci).as_deref() == Some("nvme") {
            return Err(DeviceError::NotBound(name.into()));
        }
        return Err(half_done(name, &drive.pci, &drive.progress(host)));
    }
    let short = name.strip_prefix("/dev/").unwrap_or(name);
    let namespace = drive.namespace_of(short).or(drive.namespace.first()).cloned();
    namespace.map(|n| (drive, n)).ok_or_else(|| DeviceError::NotBound(name.into()))
}

/// That a drive is neither the kernel's nor bound, and what puts it right.
pub(super) fn half_done(name: &str, pci: &str, what: &str) -> DeviceError {
    let why = format!("{what}; give it back to the kernel with `sudo nt device release --pci {pci}`");
    DeviceError::step(format!("using {name} ({pci})"), why)
}

/// The one of `records` that `name` means.
pub(super) fn recorded(host: &Host, name: &str, records: Vec<Bound>) -> Result<Option<Bound>, DeviceError> {
    let short = name.strip_prefix("/dev/").unwrap_or(name);
    let Some(one) = one_of(name, records)? else { return Ok(None) };
    // An address is nobody else's; a link is another drive's once that one has the label or serial number that it tells of.
    if !is_exactly(&one, name) || host.link_name(name).is_some() {
        not_reused(host, name, short, &one)?;
    }
    Ok(Some(one))
}

/// The one of `records` that had the name, whoever may have it now.
fn one_of(name: &str, records: Vec<Bound>) -> Result<Option<Bound>, DeviceError> {
    let short = name.strip_prefix("/dev/").unwrap_or(name);
    let mut found: Vec<Bound> = records.into_iter().filter(|r| is_exactly(r, name) || r.has_name(short)).collect();
    if found.iter().any(|r| is_exactly(r, name)) {
        found.retain(|r| is_exactly(r, name));
    }
    if found.len() > 1 {
        let drives = found.iter().map(|r| format!("{} ({})", r.pci, r.shown())).collect();
        return Err(DeviceError::Ambiguous { name: name.into(), drives });
    }
    Ok(found.pop())
}

fn is_exactly(record: &Bound, name: &str) -> bool {
    record.is_exactly(name) || record.is_exactly(name.strip_prefix("/dev/").unwrap_or(name))
}

/// Makes sure that the kernel has not given a bound drive's name to another drive.
fn not_reused(host: &Host, name: &str, short: &str, record: &Bound) -> Result<(), DeviceError> {
    let before = record.namespace_of(short).map_or(record.controller.as_str(), |n| n.name.as_str());
    let node = host.link_name(name).unwrap_or_else(|| before.to_owned());
    let taken = ["/sys/class/block", "/sys/class/nvme"].iter().any(|base| host.exists(&format!("{base}/{node}")));
    // A half-done drive may still be the kernel's, under its own name.
    if !taken || driver(host, &record.pci).as_deref() == Some("nvme") {
        return Ok(());
    }
    Err(DeviceError::step(
        format!("finding {name}"),
        format!(
            "the drive of that name is bound to vfio-pci, and the kernel has given the name to another one; name the bound drive by its address {}",
            record.pci
        ),
    ))
}

/// The drives of the machine.
pub(super) fn controllers(host: &Host) -> Result<Vec<Controller>, DeviceError> {
    sysfs::controllers(host).map_err(|e| DeviceError::step("reading the drives", e))
}

/// That nothing has this name; a record that cannot be used may be that of the drive that is meant.
pub(super) fn not_found(host: &Host, name: &str) -> DeviceError {
    let damaged = record::damaged(host);
    let Some(first) = damaged.first() else { return DeviceError::NotFound(name.into()) };
    let records = damaged.iter().map(|pci| record::path(pci)).collect::<Vec<_>>().join(" and ");
    let why = format!(
        "there is no NVMe drive of this name, and what {records} remembered is damaged; if that was this drive, give it back by its address, as in `sudo nt device release --pci {first}`"
    );
    DeviceError::step(format!("finding {name}"), why)
}

/// What `release` is to work on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meant {
    /// The drive at this PCI address.
    Drive(String),
    /// A stale record alone: the name was that of a drive which is not at this address any more, so that whatever is
    /// there now, or has the name now, is not meant.
    Stale(String),
}

/// What `release` is to work on, from the name and the address that the user gave.
pub(super) fn to_release(host: &Host, name: Option<&str>, pci: Option<&str>) -> Result<Meant, DeviceError> {
    let given = |text: &str| {
        address(text).ok_or_else(|| {
            let why = format!("a PCI address such as 0000:02:00.0 was expected, {text:?} was found");
            DeviceError::step("reading --pci", why)
        })
    };
    match (name, pci) {
        (None, Some(pci)) => given(pci).map(Meant::Drive),
        (Some(name), None) => by_name(host, name)?.ok_or_else(|| not_found(host, name)),
        (Some(name), Some(pci)) => {
            let pci = given(pci)?;
            let same = |r: &Bound| matches!(r.standing(host), Standing::Holds | Standing::Undone);
            let fits = record::load(host, &pci).is_some_and(|r| same(&r) && (r.is_exactly(name) || r.has_name(name)))
                || address(name).as_deref() == Some(&pci)
                || sysfs::find(host, &controllers(host)?, name).is_some_and(|d| d.bdf == pci);
            if fits {
                Ok(Meant::Drive(pci))
            } else {
                Err(DeviceError::step(format!("finding {name}"), format!("it is not the drive at {pci}")))
            }
        }
        (None, None) => Err(DeviceError::step("finding the drive", "a name or --pci ADDRESS was expected")),
    }
}

/// Records that hold go before those of a drive that somebody gave back by hand, these before stale ones, these before
/// the kernel's names: a name that nt remembers never means a drive that nt did not touch.
fn by_name(host: &Host, name: &str) -> Result<Option<Meant>, DeviceError> {
    if let Some(pci) = address(name).filter(|pci| host.exists(&device(pci)) || record::load(host, pci).is_some()) {
        return Ok(Some(Meant::Drive(pci)));
    }
    let (holding, others): (Vec<_>, Vec<_>) =
        record::all(host).into_iter().partition(|r| r.standing(host) == Standing::Holds);
    if let Some(record) = recorded(host, name, holding)? {
        return Ok(Some(Meant::Drive(record.pci)));
    }
    let named = sysfs::find(host, &controllers(host)?, name).map(|d| d.bdf.clone());
    // By its link, or by a name that no other drive has now.
    let (undone, stale): (Vec<_>, Vec<_>) = others
        .into_iter()
        .partition(|r| r.standing(host) == Standing::Undone && named.as_ref().is_none_or(|n| *n == r.pci));
    if let Some(record) = recorded(host, name, undone)? {
        return Ok(Some(Meant::Drive(record.pci)));
    }
    if let Some(record) = one_of(name, stale)? {
        return Ok(Some(Meant::Stale(record.pci)));
    }
    Ok(named.map(Meant::Drive))
}
