//! The PCI side: the IOMMU, who shares the group, virtual functions, RAID parents.

use super::host::{Host, Unreadable};
use super::sysfs::Controller;
use super::{Check, Reason};

const BRIDGE_CLASSES: [&str; 2] = ["0x0604", "0x0600"];

/// The number of the drive's IOMMU group.
pub fn group(host: &Host, controller: &Controller) -> Option<String> {
    host.link_name(&format!("{}/iommu_group", controller.pci_path()))
}

/// An IOMMU that isolates this function, and nothing else in its group.
pub fn iommu(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let path = format!("{}/iommu_group", controller.pci_path());
    let Some(group) = group(host, controller) else {
        out.push(Reason::new(Check::Iommu, &path, "the drive is behind no IOMMU; switch it on in the firmware (VT-d or AMD-Vi) and boot with intel_iommu=on or amd_iommu=on".into()));
        return Ok(());
    };
    let base = format!("/sys/kernel/iommu_groups/{group}");
    if host.read_if_there(&format!("{base}/name"))?.as_deref() == Some("vfio-noiommu") {
        out.push(Reason::new(Check::Iommu, &base, "the group is one of no-IOMMU mode, which is not supported".into()));
    }
    let kind = format!("{base}/type");
    if let Some(found) = host.read_if_there(&kind)?
        && !matches!(found.as_str(), "DMA" | "DMA-FQ" | "identity" | "auto")
    {
        out.push(Reason::new(Check::Iommu, &kind, format!("the group's domain is {found}, one of DMA was expected")));
    }
    let members = host.list(&format!("{base}/devices"))?;
    if !members.contains(&controller.bdf) {
        out.push(Reason::new(Check::Iommu, &base, format!("group {group} does not list the drive")));
    }
    for other in members.iter().filter(|m| **m != controller.bdf) {
        let class = host.read(&format!("/sys/bus/pci/devices/{other}/class"))?;
        if !BRIDGE_CLASSES.iter().any(|b| class.starts_with(b)) {
            out.push(Reason::new(
                Check::Sibling,
                &format!("{base}/devices"),
                format!("{other} (class {class}) shares IOMMU group {group} with the drive"),
            ));
        }
    }
    Ok(())
}

/// The function itself: driver, transport, state, virtual functions, parents.
pub fn function(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let pci = controller.pci_path();
    match controller.driver.as_deref() {
        Some("nvme") => {}
        other => out.push(Reason::new(
            Check::Driver,
            &format!("{pci}/driver"),
            format!("the nvme driver was expected, {} was found", other.unwrap_or("no driver")),
        )),
    }
    if host.exists(&format!("{pci}/physfn")) {
        out.push(Reason::new(Check::Virtual, &format!("{pci}/physfn"), "it is an SR-IOV virtual function".into()));
    }
    if let Some(count) = host.read_if_there(&format!("{pci}/sriov_numvfs"))?
        && count != "0"
    {
        out.push(Reason::new(
            Check::Virtual,
            &format!("{pci}/sriov_numvfs"),
            format!("it has {count} virtual functions"),
        ));
    }
    let Some(name) = &controller.name else {
        return Ok(());
    };
    let path = format!("/sys/class/nvme/{name}/transport");
    let transport = host.read(&path)?;
    if transport != "pcie" {
        out.push(Reason::new(Check::Driver, &path, format!("its transport is {transport}, not pcie")));
    }
    let path = format!("/sys/class/nvme/{name}/state");
    if let Some(state) = host.read_if_there(&path)?
        && state != "live"
    {
        out.push(Reason::new(Check::Driver, &path, format!("the controller is {state}, not live")));
    }
    // Domains of more than four digits are made up by drivers that hide drives behind themselves.
    if controller.bdf.split(':').next().is_some_and(|domain| domain.len() > 4) {
        out.push(Reason::new(Check::Raid, &pci, "its PCI domain is one of a RAID or VMD controller".into()));
    }
    parents(host, &pci, out)
}

fn parents(host: &Host, pci: &str, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let real = host.resolve(pci)?;
    for parent in real.ancestors().skip(1) {
        let Some(parent) = parent.to_str().filter(|p| p.contains("/pci")) else {
            break;
        };
        let raid = host.read_if_there(&format!("{parent}/class"))?.is_some_and(|c| c.starts_with("0x0104"));
        if raid || host.link_name(&format!("{parent}/driver")).as_deref() == Some("vmd") {
            out.push(Reason::new(Check::Raid, parent, "the drive is behind a RAID or VMD controller".into()));
        }
    }
    Ok(())
}

/// Reads and writes under way, and the power state.
pub fn hot(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for namespace in &controller.namespaces {
        let path = format!("/sys/class/block/{}/inflight", namespace.whole.name);
        let text = host.read(&path)?;
        if text.split_whitespace().any(|n| n != "0") {
            out.push(Reason::new(Check::Open, &path, format!("{} has I/O under way", namespace.whole.name)));
        }
    }
    let path = format!("{}/power_state", controller.pci_path());
    match host.read_if_there(&path)?.as_deref() {
        None | Some("D0" | "unknown") => {}
        Some(state) => out.push(Reason::new(Check::Driver, &path, format!("its power state is {state}, not D0"))),
    }
    let path = format!("{}/broken_parity_status", controller.pci_path());
    if host.read_if_there(&path)?.is_some_and(|broken| broken != "0") {
        out.push(Reason::new(Check::Driver, &path, "the kernel saw broken parity on it".into()));
    }
    Ok(())
}
