//! A machine of plain files with two drives, and a kernel that does to them what Linux does to sysfs. It can be
//! told to end, fail or signal the command at its n-th change.

use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::io::{Error, Result};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::{Kernel, Machine};
use crate::storage::guard::Host;
use crate::storage::guard::node::Number;

pub const BOOT: &str = "0000:01:00.0";
pub const SPARE: &str = "0000:02:00.0";
pub const BOOT_ID: &str = "6d1f7bd2-0000-4000-8000-000000000001";

/// What befalls the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    /// Its process ends, nothing is cleaned up.
    Kill,
    /// The call fails.
    Fail,
    /// A signal asks it to stop.
    Signal,
}

/// What a killed command unwinds with.
pub struct Killed;

/// What somebody else does to the machine.
pub type Act = fn(&Fake);

pub struct Fake {
    dir: tempfile::TempDir,
    pub host: Host,
    /// Changes so far, and each of them.
    pub changes: Cell<u32>,
    pub log: RefCell<Vec<String>>,
    pub blow: Cell<Option<(u32, Blow)>>,
    pub stopped: Cell<bool>,
    /// Somebody has the group open whom nobody sees.
    pub busy: Cell<bool>,
    /// An unbind never comes back.
    pub stuck: Cell<bool>,
    /// What vfio-pci leaves undone.
    pub no_node: Cell<bool>,
    /// The nvme driver does not want the drive.
    pub rejected: Cell<bool>,
    /// Modules that can be loaded.
    pub loadable: Cell<bool>,
    /// What somebody else does just before a change.
    pub meanwhile: Cell<Option<(u32, Act)>>,
    clock: Cell<Duration>,
}

impl Fake {
    pub fn new() -> Fake {
        let dir = crate::storage::safe::tests::scratch();
        let fake = Fake {
            host: Host::at(dir.path()),
            dir,
            changes: Cell::new(0),
            log: RefCell::default(),
            blow: Cell::new(None),
            stopped: Cell::new(false),
            busy: Cell::new(false),
            stuck: Cell::new(false),
            no_node: Cell::new(false),
            rejected: Cell::new(false),
            loadable: Cell::new(true),
            meanwhile: Cell::new(None),
            clock: Cell::default(),
        };
        fake.put("/proc/sys/kernel/random/boot_id", &format!("{BOOT_ID}\n"));
        fake.put("/proc/self/mountinfo", "");
        fake.folder("/sys/block");
        fake.folder("/sys/bus/pci/drivers/vfio-pci");
        fake.folder("/sys/module/vfio_iommu_type1");
        fake.folder("/dev/vfio");
        fake.add(BOOT, 14);
        fake.add(SPARE, 15);
        fake
    }

    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    pub fn machine(&self) -> Machine<'_> {
        Machine { host: &self.host, kernel: self, stopped: &|| false }
    }

    pub fn real(&self, path: &str) -> PathBuf {
        self.host.real(path)
    }

    pub fn put(&self, path: &str, text: &str) {
        let at = self.real(path);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::write(at, text).unwrap();
    }

    pub fn link(&self, path: &str, target: &str) {
        let at = self.real(path);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&at);
        symlink(target, at).unwrap();
    }

    pub fn folder(&self, path: &str) {
        fs::create_dir_all(self.real(path)).unwrap();
    }

    /// A function of this address and group that no driver holds.
    pub fn add_function(&self, pci: &str, group: u32) {
        let base = format!("/sys/bus/pci/devices/{pci}");
        self.put(&format!("{base}/class"), "0x010802\n");
        self.put(&format!("{base}/driver_override"), "(null)\n");
        symlink(format!("../../../../kernel/iommu_groups/{group}"), self.real(&format!("{base}/iommu_group"))).unwrap();
        self.folder(&format!("/sys/kernel/iommu_groups/{group}/devices"));
        let entry = format!("/sys/kernel/iommu_groups/{group}/devices/{pci}");
        symlink(format!("../../../../bus/pci/devices/{pci}"), self.real(&entry)).unwrap();
    }

    /// A drive of this address and group, with the nvme driver.
    pub fn add(&self, pci: &str, group: u32) {
        self.add_function(pci, group);
        self.probe(pci);
    }

    /// Takes a drive out of the machine.
    pub fn unplug(&self, pci: &str) {
        self.unbind(pci);
        let group = self.host.link_name(&format!("/sys/bus/pci/devices/{pci}/iommu_group")).unwrap();
        fs::remove_file(self.real(&format!("/sys/kernel/iommu_groups/{group}/devices/{pci}"))).unwrap();
        fs::remove_dir_all(self.real(&format!("/sys/bus/pci/devices/{pci}"))).unwrap();
    }

    pub fn driver(&self, pci: &str) -> Option<String> {
        self.host.link_name(&format!("/sys/bus/pci/devices/{pci}/driver"))
    }

    pub fn forced(&self, pci: &str) -> String {
        self.host.read(&format!("/sys/bus/pci/devices/{pci}/driver_override")).unwrap()
    }

    pub fn record(&self, pci: &str) -> PathBuf {
        self.real(&format!("/run/nt/{pci}.toml"))
    }

    fn group(&self, pci: &str) -> String {
        self.host.link_name(&format!("/sys/bus/pci/devices/{pci}/iommu_group")).unwrap()
    }

    /// The kernel's name of a drive: the lowest that is free.
    fn attach(&self, pci: &str) {
        let n = (0..).find(|n| !self.host.exists(&format!("/sys/class/nvme/nvme{n}"))).unwrap();
        let base = format!("/sys/bus/pci/devices/{pci}/nvme/nvme{n}");
        for (file, text) in
            [("serial", format!("S {pci}  \n")), ("model", "Mödel X\n".into()), ("firmware_rev", "1\n".into())]
        {
            self.put(&format!("{base}/{file}"), &text);
        }
        self.put(&format!("{base}/state"), "live\n");
        self.folder(&format!("{base}/nvme{n}n1"));
        self.put(&format!("/sys/class/nvme/nvme{n}/pci"), pci);
        let block = format!("/sys/class/block/nvme{n}n1");
        for (file, text) in [("dev", format!("259:{n}")), ("size", "4096".into()), ("nsid", "1".into())] {
            self.put(&format!("{block}/{file}"), &text);
        }
        self.put(&format!("{block}/queue/logical_block_size"), "512");
        self.put(&format!("{block}/inflight"), "       0        0\n");
        self.put(&format!("/dev/nvme{n}n1"), "");
    }

    /// What the kernel does when a driver lets go.
    pub fn unbind(&self, pci: &str) {
        let base = format!("/sys/bus/pci/devices/{pci}");
        match self.driver(pci).as_deref() {
            Some("nvme") => {
                let name = self.host.list(&format!("{base}/nvme")).unwrap().remove(0);
                fs::remove_dir_all(self.real(&format!("{base}/nvme"))).unwrap();
                fs::remove_dir_all(self.real(&format!("/sys/class/nvme/{name}"))).unwrap();
                fs::remove_dir_all(self.real(&format!("/sys/class/block/{name}n1"))).unwrap();
                fs::remove_file(self.real(&format!("/dev/{name}n1"))).unwrap();
            }
            Some("vfio-pci") => {
                let _ = fs::remove_file(self.real(&format!("/dev/vfio/{}", self.group(pci))));
                let _ = fs::remove_dir_all(self.real(&format!("/sys/class/vfio/{}", self.group(pci))));
            }
            _ => {}
        }
        let _ = fs::remove_file(self.real(&format!("{base}/driver")));
    }

    /// What the kernel does when it looks for a driver.
    pub fn probe(&self, pci: &str) {
        let forced = self.forced(pci);
        let driver = if forced == "(null)" { "nvme" } else { forced.as_str() };
        let there = driver != "vfio-pci" || self.host.exists("/sys/bus/pci/drivers/vfio-pci");
        if self.driver(pci).is_some() || !there || driver == "nvme" && self.rejected.get() {
            return;
        }
        symlink(format!("../../drivers/{driver}"), self.real(&format!("/sys/bus/pci/devices/{pci}/driver"))).unwrap();
        match driver {
            "nvme" => self.attach(pci),
            "vfio-pci" if !self.no_node.get() => {
                self.folder(&format!("/sys/class/vfio/{}", self.group(pci)));
                self.put(&format!("/dev/vfio/{0}", self.group(pci)), &format!("c 244:{}", self.group(pci)));
            }
            _ => {}
        }
    }
}

impl Kernel for Fake {
    fn about_to(&self, what: &str) -> Result<()> {
        self.changes.set(self.changes.get() + 1);
        self.log.borrow_mut().push(what.into());
        if let Some((_, act)) = self.meanwhile.get().filter(|(n, _)| *n == self.changes.get()) {
            act(self);
        }
        match self.blow.get() {
            Some((n, blow)) if n == self.changes.get() => match blow {
                Blow::Kill => std::panic::resume_unwind(Box::new(Killed)),
                Blow::Fail => Err(Error::from_raw_os_error(libc::EIO)),
                Blow::Signal => {
                    self.stopped.set(true);
                    Ok(())
                }
            },
            _ => Ok(()),
        }
    }

    fn write(&self, _: &Host, path: &str, text: &str) -> Result<()> {
        if self.stuck.get() && path.ends_with("/unbind") {
            return Err(Error::new(std::io::ErrorKind::TimedOut, "the kernel did not answer"));
        }
        if let Some(pci) = path.strip_prefix("/sys/bus/pci/devices/").and_then(|p| p.strip_suffix("/driver/unbind")) {
            assert_eq!(text, pci, "the kernel takes the driver from the device that is named");
            if self.driver(pci).is_none() {
                return Err(Error::from_raw_os_error(libc::ENOENT));
            }
            self.unbind(pci);
        } else if path == "/sys/bus/pci/drivers_probe" {
            self.probe(text);
        } else if path.ends_with("/driver_override") {
            self.put(path, if text.trim().is_empty() { "(null)\n" } else { text });
        } else {
            panic!("{text} was written to {path}");
        }
        Ok(())
    }

    fn read(&self, host: &Host, path: &str) -> Result<String> {
        host.read(path).map_err(Error::other)
    }

    fn load_module(&self, name: &str) -> Result<()> {
        if !self.loadable.get() {
            return Err(Error::other(format!("FATAL: Module {name} not found in directory /lib/modules/6.1.0")));
        }
        match name {
            "vfio-pci" => self.folder("/sys/bus/pci/drivers/vfio-pci"),
            "vfio_iommu_type1" => self.folder("/sys/module/vfio_iommu_type1"),
            other => panic!("{other} was to be loaded"),
        }
        Ok(())
    }

    fn open_group(&self, node: &Path) -> Result<File> {
        let file = File::open(node)?;
        if self.busy.get() { Err(Error::from_raw_os_error(libc::EBUSY)) } else { Ok(file) }
    }

    fn hand_over(&self, node: &Path, _: Option<Number>) -> Result<bool> {
        File::open(node).map(|_| true)
    }

    fn now(&self) -> Duration {
        self.clock.get()
    }

    fn pause(&self) {
        self.clock.set(self.clock.get() + Duration::from_millis(20));
    }
}
