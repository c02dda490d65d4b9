//! Drives that might be taken for each other. Where two have one serial number, Linux may show only
//! one of them, whichever came first: the other one's function is then without a driver or a name.

use super::host::Host;
use super::sysfs::Controller;
use super::{Allowlist, Check, Reason, identity, records};

/// Every other drive that has this one's serial number, or might have it for all that can be told.
pub fn twins(host: &Host, all: &[Controller], controller: &Controller) -> Vec<Reason> {
    let mut out = Vec::new();
    for other in all.iter().filter(|c| c.bdf != controller.bdf) {
        match record_of(host, other) {
            Err(e) => out.push(e.into()),
            Ok(recorded) => out.extend(compare(controller, other, recorded.as_deref())),
        }
    }
    super::note(&mut out, |out| elsewhere(host, all, controller, out));
    out
}

/// The serial number of a drive that nt has taken from the kernel, or is about to.
fn record_of(host: &Host, other: &Controller) -> Result<Option<String>, super::Unreadable> {
    if other.driver.as_deref() == Some("nvme") && other.name.is_some() {
        // The kernel tells it.
        return Ok(None);
    }
    Ok(records::of(host, &other.bdf)?.map(|r| r.serial))
}

fn compare(controller: &Controller, other: &Controller, recorded: Option<&str>) -> Option<Reason> {
    let serial = &controller.serial;
    let same = |theirs: &str| theirs == serial && !serial.is_empty();
    let what = match (recorded, other.driver.as_deref()) {
        (Some(theirs), _) if same(theirs) => {
            format!("the drive at {}, which nt has taken, has the same serial number {serial}", other.bdf)
        }
        (Some(_), _) => return None,
        (None, None) => format!(
            "no driver holds the NVMe drive at {0}, so its serial number is unknown; the kernel rejects the second of two drives of one serial; give it a driver (`echo {0} > /sys/bus/pci/drivers_probe`) or take it out",
            other.bdf
        ),
        (None, Some("nvme")) if other.serial.is_empty() => {
            format!("the kernel's driver holds the NVMe drive at {}, but shows no serial number of it", other.bdf)
        }
        (None, Some(_)) if same(&other.serial) => {
            format!("the drive at {} has the same serial number {serial}", other.bdf)
        }
        _ => return None,
    };
    Some(Reason::new(Check::Twin, &identity::serial_path(controller), what))
}

/// Where the serial number of another drive cannot be known, since a driver other than the kernel's holds it and nt has no
/// record of that (a drive of a guest's), it may be this one's: then the address in this one's entry is no hint any
/// more, it must be right.
pub fn address_of_entry(
    host: &Host,
    all: &[Controller],
    controller: &Controller,
    allowed: &Result<Allowlist, String>,
    out: &mut Vec<Reason>,
) -> Result<(), super::Unreadable> {
    let Ok(allowed) = allowed else { return Ok(()) };
    let entries = controller.namespaces.iter().filter_map(|n| allowed.entry(&controller.serial, n.nsid).ok());
    let Some(entry) = entries.into_iter().find(|e| address(&e.pci) != controller.bdf) else { return Ok(()) };
    for other in all.iter().filter(|c| c.bdf != controller.bdf && c.serial.is_empty()) {
        let Some(driver) = other.driver.as_deref().filter(|d| *d != "nvme") else { continue };
        if record_of(host, other)?.is_none() {
            let what = format!(
                "{driver} holds the NVMe drive at {}, so its serial number is unknown and may be this one's; the address decides then, and this one's entry says pci = {:?}, not {:?}; mend the entry, if this drive is meant",
                other.bdf, entry.pci, controller.bdf
            );
            out.push(Reason::new(Check::Allowlist, super::allowlist::DEFAULT_PATH, what));
        }
    }
    Ok(())
}

/// A PCI address in full, lower case.
fn address(text: &str) -> String {
    let full = if text.matches(':').count() == 1 { format!("0000:{text}") } else { text.to_owned() };
    full.to_ascii_lowercase()
}

/// Controllers that are no PCI functions here: over a network or a loop, a drive may be shown twice.
fn elsewhere(
    host: &Host,
    all: &[Controller],
    controller: &Controller,
    out: &mut Vec<Reason>,
) -> Result<(), super::Unreadable> {
    for name in host.list("/sys/class/nvme")? {
        if all.iter().any(|c| c.name.as_deref() == Some(&name)) {
            continue;
        }
        let path = format!("/sys/class/nvme/{name}/serial");
        let serial = host.read_if_there(&path)?.unwrap_or_default();
        if serial.trim() == controller.serial && !controller.serial.is_empty() {
            let what = format!("the controller {name} shows the same serial number {}", controller.serial);
            out.push(Reason::new(Check::Twin, &path, what));
        }
    }
    Ok(())
}

/// Takes the reasons away that another drive may have this one's serial number, if the user named
/// this one's PCI address and the entry of the allowlist has that address too.
///
/// # Errors
/// If the address given is not the drive's: a sentence.
pub fn address_decides(
    host: &Host,
    all: &[Controller],
    controller: &Controller,
    allowed: &Result<Allowlist, String>,
    pci: Option<&str>,
    reasons: &mut Vec<Reason>,
) {
    let twins = twins(host, all, controller);
    let twins: Vec<&Reason> = twins.iter().filter(|t| t.check == Check::Twin && reasons.contains(t)).collect();
    let path = controller.pci_path();
    let Some(pci) = pci else {
        if !twins.is_empty() {
            let what = format!(
                "its serial number alone does not tell it from another drive; if the drive at {0} is meant, add --pci {0}",
                controller.bdf
            );
            reasons.push(Reason::new(Check::Twin, &path, what));
        }
        return;
    };
    if address(pci) != controller.bdf {
        let what = format!("its PCI address is {}, --pci says {pci}", controller.bdf);
        return reasons.push(Reason::new(Check::Allowlist, &path, what));
    }
    if twins.is_empty() {
        return;
    }
    let entries = controller.namespaces.iter().map(|n| allowed.as_ref().ok()?.entry(&controller.serial, n.nsid).ok());
    match entries.flatten().find(|e| address(&e.pci) != controller.bdf) {
        Some(entry) => {
            let what = format!(
                "another drive may have its serial number, so the address decides, and its entry says pci = {:?}, not {:?}",
                entry.pci, controller.bdf
            );
            reasons.push(Reason::new(Check::Allowlist, super::allowlist::DEFAULT_PATH, what));
        }
        None => {
            let decided: Vec<Reason> = twins.into_iter().cloned().collect();
            reasons.retain(|r| !decided.contains(r));
        }
    }
}
