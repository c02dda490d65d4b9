//! Who a drive says it is: the allowlist, twins, and identifiers that identify nothing.

use std::fs::OpenOptions;
use std::io::Read;

use super::host::Unreadable;
use super::node::Node;
use super::sysfs::Controller;
use super::{Allowlist, Check, Host, Reason, allowlist, nodes};
use crate::storage::admin;

/// Where Identify Controller has the bits on several paths, and two of those. NVMe Base 2.0, figure 275.
const CMIC: usize = 76;
const CMIC_PORTS: u8 = 1;
const CMIC_CONTROLLERS: u8 = 1 << 1;

/// Serial numbers that vendors left in place of one.
const PLACEHOLDERS: [&str; 13] = [
    "s/n",
    "sn",
    "n/a",
    "na",
    "none",
    "null",
    "unknown",
    "default",
    "default string",
    "serial",
    "serial number",
    "to be filled by o.e.m.",
    "not specified",
];

/// True for an identifier that many drives may carry: a placeholder, one character throughout, at
/// most one that is not a zero, or digits that count up.
pub fn is_bogus(id: &str) -> bool {
    let lower = id.trim().to_ascii_lowercase();
    let digits: Vec<u8> = lower.bytes().filter(u8::is_ascii_alphanumeric).collect();
    let zeros = digits.iter().filter(|b| **b == b'0').count();
    let hex = |b: &u8| char::from(*b).to_digit(16);
    let counts = |a: &u8, b: &u8| hex(a).zip(hex(b)).is_some_and(|(a, b)| b == (a + 1) % 16 || (a == 9 && b == 0));
    let counted = |step: usize| {
        digits.len() >= 8 && digits.len().is_multiple_of(step) && {
            let parts: Vec<&[u8]> = digits.chunks(step).collect();
            let zero_padded = step == 1 || parts.iter().all(|p| p[..step - 1].iter().all(|b| *b == b'0'));
            zero_padded && parts.windows(2).all(|w| counts(&w[0][step - 1], &w[1][step - 1]))
        }
    };
    PLACEHOLDERS.contains(&lower.as_str())
        || digits.iter().all(|b| *b == b'0')
        || digits.len() > 1 && digits.iter().all(|b| *b == digits[0])
        || digits.len() >= 8 && zeros + 1 >= digits.len()
        || counted(1)
        || counted(2)
}

/// The serial number identifies a drive at all.
pub fn identified(controller: &Controller, out: &mut Vec<Reason>) {
    if is_bogus(&controller.serial) {
        let what = match controller.serial.as_str() {
            "" => "it has no serial number".to_owned(),
            serial => format!("its serial number {serial:?} identifies no single drive"),
        };
        out.push(Reason::new(Check::Twin, &serial_path(controller), what));
    }
}

/// Where the kernel tells a controller's serial number.
pub fn serial_path(controller: &Controller) -> String {
    match &controller.name {
        Some(name) => format!("{}/nvme/{name}/serial", controller.pci_path()),
        None => controller.pci_path(),
    }
}

/// No other drive's namespaces have the same identifiers.
pub fn namespaces(all: &[Controller], controller: &Controller, out: &mut Vec<Reason>) {
    let others = || all.iter().filter(|c| c.bdf != controller.bdf);
    for namespace in &controller.namespaces {
        for (file, id) in namespace.trusted_ids() {
            let same = |c: &&Controller| c.trusted_ids().any(|(_, other)| other == id);
            if let Some(twin) = others().find(same) {
                let path = format!("/sys/class/block/{}/{file}", namespace.whole.name);
                let what = format!("the drive at {} has the same {file} {id}", twin.bdf);
                out.push(Reason::new(Check::Twin, &path, what));
            }
        }
    }
}

/// Nothing of the drive is hidden from the kernel's own view, and so from every other check.
pub fn hidden(controller: &Controller, out: &mut Vec<Reason>) {
    for hidden in &controller.hidden {
        let Unreadable { path, why, .. } = &hidden.unreadable;
        let what = match hidden.name.as_str() {
            name if controller.name.as_deref() == Some(name) => {
                format!("what {name} says of itself cannot be read: {why}")
            }
            name => format!(
                "the kernel does not show {name} whole, a namespace of the same drive ({why}); it hides those that are zoned or of a format that it does not know"
            ),
        };
        // What the kernel hides has no device number.
        let check = if hidden.unreadable.is_gone() { Check::Format } else { Check::Unreadable };
        out.push(Reason { check, path: path.clone(), what });
    }
}

/// Each namespace is described by one entry of the allowlist.
pub fn listed(controller: &Controller, allowed: &Result<Allowlist, String>, out: &mut Vec<Reason>) {
    let path = allowlist::DEFAULT_PATH;
    if controller.namespaces.is_empty() && controller.hidden.is_empty() {
        let what = "it has no namespace that the kernel shows".into();
        out.push(Reason::new(Check::Driver, &controller.pci_path(), what));
    }
    let list = match allowed {
        Ok(list) => list,
        Err(why) => return out.push(Reason::new(Check::Allowlist, path, why.clone())),
    };
    for namespace in &controller.namespaces {
        let found = match list.entry(&controller.serial, namespace.nsid) {
            Err(why) => vec![why],
            Ok(entry) => entry.differences(controller, namespace),
        };
        out.extend(found.into_iter().map(|what| Reason::new(Check::Allowlist, path, what)));
    }
}

/// Several controllers or paths lead to the drive, here or, by its own word, elsewhere.
pub fn shared(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let Some(name) = &controller.name else {
        return Ok(());
    };
    for subsystem in host.list("/sys/class/nvme-subsystem")? {
        let path = format!("/sys/class/nvme-subsystem/{subsystem}");
        let mut members = host.list(&path)?;
        members.retain(|e| e.strip_prefix("nvme").is_some_and(|n| n.parse::<u32>().is_ok()));
        if members.contains(name) && members.len() > 1 {
            let what = format!("the controllers {} lead to the same drive", members.join(", "));
            out.push(Reason::new(Check::Shared, &path, what));
        }
    }
    // The kernel makes hidden path devices for drives whose CMIC says that they may have several
    // controllers, unless it was built or told to make them for none or for all. The drive is asked then.
    let is_on = |name: &str| -> Result<bool, Unreadable> {
        let text = host.read_if_there(&format!("/sys/module/nvme_core/parameters/{name}"))?;
        Ok(matches!(text.as_deref(), Some("Y" | "1")))
    };
    if !is_on("multipath")? || is_on("multipath_always_on")? {
        return several(host, name, out);
    }
    let folder = format!("{}/nvme/{name}", controller.pci_path());
    for entry in host.list(&folder)? {
        if entry.starts_with("nvme") && super::sysfs::namespace_node(name, &entry).is_some_and(|node| node != entry) {
            let what = format!("{entry} is a path to a namespace that several controllers may lead to (CMIC)");
            out.push(Reason::new(Check::Shared, &folder, what));
        }
    }
    Ok(())
}

/// Whether the drive says (CMIC, by Identify Controller) that several ports or controllers may lead to it.
fn several(host: &Host, name: &str, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let (node, path) = (format!("/dev/{name}"), format!("/sys/class/nvme/{name}/dev"));
    let number = nodes::number(&host.read(&path)?, &path)?;
    let asked = host.open_node(&node, Node::Char(number), OpenOptions::new().read(true));
    let asked = asked.and_then(|mut file| match host.is_real() {
        true => admin::identify(&file),
        // In a picture of a machine (tests) the node holds the answer.
        false => {
            let mut answer = [0; admin::IDENTIFY_BYTES];
            file.read_exact(&mut answer).map(|()| answer)
        }
    });
    let answer = asked.map_err(|e| {
        let why = format!(
            "the kernel's NVMe multipath is off or on for all drives, so the drive was asked whether several controllers lead to it (CMIC), without an answer: {e}; run it as root"
        );
        Unreadable::new(&node, why)
    })?;
    if answer[CMIC] & (CMIC_PORTS | CMIC_CONTROLLERS) != 0 {
        let what = "it says that several controllers may lead to it (CMIC)".into();
        out.push(Reason::new(Check::Shared, &node, what));
    }
    Ok(())
}
