//! What hands a drive on to others, or uses it in the kernel: NVMe-oF, LIO, SCST, USB gadgets, Xen, ublk, the
//! heartbeat of clusters.

use super::age;
use super::host::{Host, Unreadable};
use super::node::Number;
use super::nodes::{Nodes, Target};
use super::sysfs::Controller;
use super::words::Words;
use super::{Check, Reason};

const NVMET: &str = "/sys/kernel/config/nvmet/subsystems";
const LIO: &str = "/sys/kernel/config/target/core";
const SCST: &str = "/sys/kernel/scst_tgt/devices";
const GADGETS: &str = "/sys/kernel/config/usb_gadget";
const CLUSTERS: &str = "/sys/kernel/config/cluster";
const XEN: &str = "/sys/bus/xen-backend/devices";
/// Where the servers of ublk devices note what they serve, by device number.
const UBLK_RECORDS: [&str; 2] = ["/run/ublksrvd", "/run/rublk"];

/// What is looked for.
struct Look<'a> {
    host: &'a Host,
    controller: &'a Controller,
    nodes: Nodes,
}

/// Whether what a path names is open in the kernel, and what that proves.
#[derive(Clone, Copy)]
enum Use {
    /// It is not.
    Off,
    /// It is, and the path is the kernel's of what is open, or nothing tells since when it is.
    On,
    /// It is, by a path that somebody wrote there. What the path leads to now need not be what it led to then.
    Written,
}

impl Use {
    fn is_on(self) -> bool {
        !matches!(self, Use::Off)
    }
}

/// Every export of one of the controller's devices, or of a file on it.
pub fn exported(host: &Host, controller: &Controller, words: &Words, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let look = Look { host, controller, nodes: Nodes::of(host, controller)? };
    for subsystem in host.list(NVMET)? {
        let base = format!("{NVMET}/{subsystem}/namespaces");
        for namespace in host.list(&base)? {
            look.nvmet(&format!("{base}/{namespace}"), out)?;
        }
        // A controller that is passed through as a whole.
        look.nvmet(&format!("{NVMET}/{subsystem}/passthru"), out)?;
    }
    for backstore in host.list(LIO)? {
        for object in folders(host, &format!("{LIO}/{backstore}"))? {
            let base = format!("{LIO}/{backstore}/{object}");
            // `info` tells the number of a device, so a path that is gone hides nothing there.
            look.info(&base, out)?;
            look.file(&format!("{base}/udev_path"), "a LIO target", Use::Off, out)?;
        }
    }
    for device in host.list(SCST)? {
        look.file(&format!("{SCST}/{device}/filename"), "an SCST target", Use::On, out)?;
    }
    for gadget in host.list(GADGETS)? {
        for function in folders(host, &format!("{GADGETS}/{gadget}/functions"))? {
            let base = format!("{GADGETS}/{gadget}/functions/{function}");
            for lun in folders(host, &base)?.iter().filter(|l| l.starts_with("lun.")) {
                look.file(&format!("{base}/{lun}/file"), "a USB gadget", Use::On, out)?;
            }
        }
    }
    look.file("/sys/module/g_mass_storage/parameters/file", "a USB gadget", Use::On, out)?;
    for device in host.list(XEN)? {
        let path = format!("{XEN}/{device}/physical_device");
        // Hexadecimal, `103:b`.
        let number = host.read_if_there(&path)?.and_then(|text| {
            let (major, minor) = text.trim().split_once(':')?;
            let hex = |n| u32::from_str_radix(n, 16).ok();
            Some(Number { major: hex(major)?, minor: hex(minor)? })
        });
        if let Some(name) = number.and_then(|n| look.nodes.block(n)) {
            out.push(Reason::new(Check::Exported, &path, format!("{name} is given to a guest of Xen")));
        }
    }
    look.heartbeats(out)?;
    look.ublk(words, out)
}

/// Names in a folder that are folders.
fn folders(host: &Host, path: &str) -> Result<Vec<String>, Unreadable> {
    let mut names = if host.real(path).is_dir() { host.list(path)? } else { Vec::new() };
    names.retain(|n| host.real(&format!("{path}/{n}")).is_dir());
    Ok(names)
}

impl Look<'_> {
    /// A namespace or a controller that NVMe-oF hands on.
    fn nvmet(&self, base: &str, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
        let enabled = self.host.read_if_there(&format!("{base}/enable"))?.is_some_and(|e| e != "0");
        let used = if enabled { Use::Written } else { Use::Off };
        self.file(&format!("{base}/device_path"), "NVMe-oF", used, out)
    }

    /// A file that holds the path of what is exported.
    fn file(&self, path: &str, over: &str, used: Use, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
        let text = self.host.read_if_there(path)?.unwrap_or_default();
        let exported = text.lines().next().unwrap_or("").trim().trim_matches('"');
        if exported.is_empty() || exported == "(null)" {
            return Ok(());
        }
        self.export(path, exported, over, used, out)
    }

    /// The path `exported`, which was read from `path`. One in use that leads nowhere now, or that may have led elsewhere
    /// when the kernel opened it, may be of any device.
    fn export(
        &self,
        path: &str,
        exported: &str,
        over: &str,
        used: Use,
        out: &mut Vec<Reason>,
    ) -> Result<(), Unreadable> {
        if exported.is_empty() {
            return Ok(());
        }
        if !exported.starts_with('/') {
            return self.relative(path, exported, over, used.is_on(), out);
        }
        let untold = match self.nodes.target(self.host, self.controller, exported)? {
            Target::Ours(device) => {
                out.push(Reason::new(Check::Exported, path, format!("{exported} ({device}) is exported over {over}")));
                None
            }
            Target::Gone if used.is_on() => Some("leads nowhere now".to_owned()),
            Target::Other => match used {
                Use::Written => age::changed_since_start(self.host, self.controller, exported)?.map(|step| {
                    format!("may have led elsewhere when it was opened: {step} was changed since the machine started")
                }),
                _ => None,
            },
            Target::Gone => None,
        };
        if let Some(why) = untold {
            let what = format!(
                "{exported}, exported over {over}, {why}, so the device cannot be told; remove the export, or export the kernel's own node below /dev"
            );
            out.push(Reason::new(Check::Unreadable, path, what));
        }
        Ok(())
    }

    /// A path without a slash before it, which the kernel follows from where the one who wrote it stood, and for some
    /// files from its root. A controller that is passed through may stand there by its name alone.
    fn relative(
        &self,
        path: &str,
        exported: &str,
        over: &str,
        in_use: bool,
        out: &mut Vec<Reason>,
    ) -> Result<(), Unreadable> {
        let below = [format!("/{exported}"), format!("/dev/{exported}")];
        let mut ours = self.nodes.spelled(exported).map(str::to_owned);
        for from in &below {
            if let Target::Ours(device) = self.nodes.target(self.host, self.controller, from)? {
                ours = ours.or(Some(device));
            }
        }
        if let Some(device) = ours {
            let what = format!("{exported} ({device}) is exported over {over}");
            out.push(Reason::new(Check::Exported, path, what));
        } else if in_use {
            let what = format!(
                "{exported}, exported over {over}, is no path from /, so the device cannot be told; export it by a path that begins with /"
            );
            out.push(Reason::new(Check::Unreadable, path, what));
        }
        Ok(())
    }

    /// The cluster file systems' heartbeat (OCFS2): the kernel writes to a region of the drive while nothing is mounted.
    fn heartbeats(&self, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
        for cluster in folders(self.host, CLUSTERS)? {
            let base = format!("{CLUSTERS}/{cluster}/heartbeat");
            for region in folders(self.host, &base)? {
                let path = format!("{base}/{region}/dev");
                let name = self.host.read_if_there(&path)?.unwrap_or_default();
                if let Some(name) = self.nodes.spelled(name.trim()) {
                    let what = format!("the kernel writes the heartbeat of the cluster {cluster} to {name}");
                    out.push(Reason::new(Check::Open, &path, what));
                }
            }
        }
        Ok(())
    }

    /// A LIO object's description: paths between other words, and `Major: 259 Minor: 11` of a device.
    fn info(&self, base: &str, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
        let path = &format!("{base}/info");
        let text = self.host.read_if_there(path)?.unwrap_or_default();
        // What is set up is open in the kernel, before anything is handed on: it is "DEACTIVATED" then all the same.
        let is_set_up = self.host.read_if_there(&format!("{base}/enable"))?.is_some_and(|e| e != "0");
        let is_off = text.starts_with("Status: DEACTIVATED") && !is_set_up;
        let (over, used) = ("a LIO target", if is_off { Use::Off } else { Use::Written });
        let is_of = |plugin: &str| base.strip_prefix(LIO).is_some_and(|b| b.starts_with(plugin));
        // Memory.
        if is_of("/rd_mcp_") {
            return Ok(());
        }
        // Of a file, its path as it was written there, which may hold any character but a comma.
        let file = text.split_once(" File: ").and_then(|(_, rest)| Some(rest.rsplit_once(" Size: ")?.0.trim()));
        if let Some(file) = file.filter(|_| is_of("/fileio_")) {
            return self.export(path, file, over, used, out);
        }
        let words: Vec<&str> = text.split_whitespace().collect();
        let after = |key: &str| words.iter().position(|w| *w == key).and_then(|i| words.get(i + 1)?.parse().ok());
        let number = after("Major:").zip(after("Minor:")).map(|(major, minor)| Number { major, minor });
        if let Some(name) = number.and_then(|n| self.nodes.block(n)) {
            out.push(Reason::new(Check::Exported, path, format!("{name} is exported over a LIO target")));
        }
        // `/dev/…` and `file//dev/…` of programs that serve, which have open what they serve.
        for word in words.iter().filter_map(|w| Some(&w[w.find('/')?..])).filter(|w| w.len() > 1) {
            self.export(path, word, over, if number.is_none() { Use::On } else { Use::Off }, out)?;
        }
        Ok(())
    }

    /// ublk devices are served by programs; the kernel does not tell from what. A device whose server
    /// left no record might be served from anything.
    fn ublk(&self, words: &Words, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
        for name in self.host.must_list("/sys/block")? {
            let Some(number) = name.strip_prefix("ublkb").and_then(|n| n.parse::<u32>().ok()) else {
                continue;
            };
            let records = UBLK_RECORDS.iter().flat_map(|folder| {
                ["pid", "json"].map(|end| [format!("{folder}/{number:04}.{end}"), format!("{folder}/{number}.{end}")])
            });
            let Some(path) = records.flatten().find(|p| self.host.exists(p)) else {
                let why = "what this ublk device is served from cannot be told; stop its server";
                return Err(Unreadable::new(&format!("/sys/block/{name}"), why));
            };
            let text = self.host.read(&path)?;
            for word in text.split('"').filter(|w| w.starts_with('/')) {
                let what = match self.nodes.target(self.host, self.controller, word)? {
                    Target::Ours(device) => format!("{name} is served from {word} ({device})"),
                    _ => continue,
                };
                out.push(Reason::new(Check::Exported, &path, what));
            }
            for mention in words.mentions(self.host, &text, &[])? {
                let what = format!("{} is named there as {}", mention.device, mention.word);
                out.push(Reason::new(Check::Exported, &path, what));
            }
        }
        Ok(())
    }
}
