//! Who hands a drive on to others: NVMe-oF, LIO, SCST, ublk.

use super::host::{Host, Unreadable};
use super::names::{names, target};
use super::sysfs::Controller;
use super::{Check, Reason};

const NVMET: &str = "/sys/kernel/config/nvmet/subsystems";
const LIO: &str = "/sys/kernel/config/target/core";
const SCST: &str = "/sys/kernel/scst_tgt/devices";
/// Where the servers of ublk devices note what they serve, by device number.
const UBLK_RECORDS: [&str; 2] = ["/run/ublksrvd", "/run/rublk"];

/// Every export of one of the controller's devices, or of a file on it.
pub fn exported(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for subsystem in host.list(NVMET)? {
        let base = format!("{NVMET}/{subsystem}/namespaces");
        for namespace in host.list(&base)? {
            file(host, controller, &format!("{base}/{namespace}/device_path"), "NVMe-oF", out)?;
        }
    }
    for backstore in host.list(LIO)? {
        for object in host.list(&format!("{LIO}/{backstore}"))? {
            let base = format!("{LIO}/{backstore}/{object}");
            file(host, controller, &format!("{base}/udev_path"), "a LIO target", out)?;
            info(host, controller, &format!("{base}/info"), out)?;
        }
    }
    for device in host.list(SCST)? {
        file(host, controller, &format!("{SCST}/{device}/filename"), "an SCST target", out)?;
    }
    ublk(host, controller, out)
}

/// A file that holds the path of what is exported.
fn file(host: &Host, controller: &Controller, path: &str, over: &str, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let Some(text) = host.read_if_there(path)? else {
        return Ok(());
    };
    let exported = text.lines().next().unwrap_or("").trim();
    if exported.starts_with('/')
        && let Some(device) = target(host, controller, exported)?
    {
        out.push(Reason::new(Check::Exported, path, format!("{exported} ({device}) is exported over {over}")));
    }
    Ok(())
}

/// A LIO object's description, where paths stand between other words.
fn info(host: &Host, controller: &Controller, path: &str, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let Some(text) = host.read_if_there(path)? else {
        return Ok(());
    };
    for word in text.split_whitespace().filter(|w| w.starts_with('/')) {
        if let Some(device) = target(host, controller, word)? {
            out.push(Reason::new(Check::Exported, path, format!("{word} ({device}) is exported over a LIO target")));
        }
    }
    Ok(())
}

/// ublk devices are served by programs; the kernel does not tell from what. A device whose server
/// left no record might be served from anything.
fn ublk(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for name in host.list("/sys/block")? {
        let Some(number) = name.strip_prefix("ublkb").and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        let records = UBLK_RECORDS.iter().flat_map(|folder| {
            ["pid", "json"].map(|end| [format!("{folder}/{number:04}.{end}"), format!("{folder}/{number}.{end}")])
        });
        let Some(path) = records.flatten().find(|p| host.exists(p)) else {
            return Err(Unreadable {
                path: format!("/sys/block/{name}").into(),
                why: "what this ublk device is served from cannot be told; stop its server".into(),
            });
        };
        let text = host.read(&path)?;
        for word in text.split('"').filter(|w| w.starts_with('/')) {
            if let Some(device) = target(host, controller, word)? {
                out.push(Reason::new(Check::Exported, &path, format!("{name} is served from {word} ({device})")));
            }
        }
        // A record that is no JSON still names what it serves.
        for name in names(host, controller)?.iter().filter(|n| n.word.starts_with("/dev/disk/")) {
            if text.contains(&name.word) && !out.iter().any(|r| r.path.as_os_str() == path.as_str()) {
                out.push(Reason::new(
                    Check::Exported,
                    &path,
                    format!("{} is named there as {}", name.device, name.word),
                ));
            }
        }
    }
    Ok(())
}
