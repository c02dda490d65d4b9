//! Takes a drive from the kernel's driver and gives it back. Needs root; everything else of this
//! program does not.
//!
//! Order: lock, claim every namespace with O_EXCL, check, check again, `driver_override` by exact
//! address, unbind while the claims are held (so nobody can mount in between), probe, verify, hand
//! the group's node to the group `nt`. On any failure the kernel's driver is put back.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::guard::{self, Allowlist, Controller, Host, Reason, sysfs};
use super::image::Drive;

/// The group whose members may use a bound drive.
pub const GROUP: &str = "nt";
const STATE: &str = "/run/nt";
const WAIT: Duration = Duration::from_secs(10);

/// Why a drive was not bound, released or found.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The guard has reasons against it (exit code 3).
    #[error("{name} is refused:\n{}", lines(.reasons))]
    Refused {
        /// The drive as the user named it.
        name: String,
        /// Every reason.
        reasons: Vec<Reason>,
    },
    /// No such drive.
    #[error("{0}: there is no NVMe drive of this name; `nt device list` shows them")]
    NotFound(String),
    /// The drive is not bound.
    #[error("{0} is not bound to vfio-pci; bind it with `sudo nt device bind {0}`")]
    NotBound(String),
    /// A step failed; the drive is back with the kernel unless the sentence says otherwise.
    #[error("{step} failed: {why}")]
    Step {
        /// What was tried.
        step: String,
        /// The system's words.
        why: String,
    },
}

impl DeviceError {
    /// True if a safety rule refused the drive.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    fn step(step: impl Into<String>, why: impl std::fmt::Display) -> Self {
        Self::Step { step: step.into(), why: why.to_string() }
    }
}

fn lines(reasons: &[Reason]) -> String {
    reasons.iter().map(|r| format!("  - {r}")).collect::<Vec<_>>().join("\n")
}

/// What is remembered of a bound drive, in `/run/nt/ADDRESS.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bound {
    /// PCI address.
    pub pci: String,
    /// Kernel name before, `nvme1`.
    pub controller: String,
    /// Serial.
    pub serial: String,
    /// Model.
    pub model: String,
    /// IOMMU group.
    pub group: String,
    /// Names below `/dev/disk`, which are gone while it is bound.
    #[serde(default)]
    pub links: Vec<String>,
    /// Its namespaces.
    pub namespace: Vec<BoundNamespace>,
}

/// A namespace of a bound drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundNamespace {
    /// Kernel name before, `nvme1n1`.
    pub name: String,
    /// Identifier.
    pub nsid: u32,
    /// Bytes.
    pub size: u64,
}

/// Binds the drive named `name`. `say` gets one line a step; with `dry_run` nothing is written.
///
/// # Errors
/// [`DeviceError::Refused`] with every reason, or the step that failed.
pub fn bind(
    host: &Host,
    name: &str,
    allowed: &Result<Allowlist, String>,
    dry_run: bool,
    mut say: impl FnMut(&str),
) -> Result<(), DeviceError> {
    let lock = if dry_run { None } else { Some(lock(host)?) };
    let find = || -> Result<(Vec<Controller>, Controller), DeviceError> {
        let all = sysfs::controllers(host).map_err(|e| DeviceError::step("reading the drives", e))?;
        let drive = sysfs::find(host, &all, name).cloned().ok_or_else(|| DeviceError::NotFound(name.into()))?;
        Ok((all, drive))
    };
    let check = |expected: Option<&Controller>| -> Result<Controller, DeviceError> {
        let (all, drive) = find()?;
        let mut reasons = guard::examine(host, &all, &drive, allowed);
        if expected.is_some_and(|e| *e != drive) {
            reasons.push(Reason {
                check: guard::Check::Driver,
                path: drive.pci_path().into(),
                what: "it changed while it was being checked".into(),
            });
        }
        if reasons.is_empty() { Ok(drive) } else { Err(DeviceError::Refused { name: name.into(), reasons }) }
    };
    let drive = check(None)?;
    say(&format!("checked: {} is {} {} with no reason against it", name, drive.model, drive.serial));
    let claims = if dry_run { Vec::new() } else { claim(host, &drive)? };
    say(&format!(
        "claimed: {}",
        drive.namespaces.iter().map(|n| format!("/dev/{}", n.whole.name)).collect::<Vec<_>>().join(", ")
    ));
    check(Some(&drive))?;
    say("checked again under the claim");
    let group = host.link_name(&format!("{}/iommu_group", drive.pci_path())).unwrap_or_default();
    let steps = [
        (format!("{}/driver_override", drive.pci_path()), "vfio-pci".to_owned()),
        (format!("{}/driver/unbind", drive.pci_path()), drive.bdf.clone()),
        ("/sys/bus/pci/drivers_probe".to_owned(), drive.bdf.clone()),
    ];
    if dry_run {
        for (path, text) in &steps {
            say(&format!("would write {text} to {path}"));
        }
        say(&format!("would hand /dev/vfio/{group} to group {GROUP} and note it in {STATE}"));
        return Ok(());
    }
    let result = take(host, &drive, &group, &steps, &mut say);
    drop(claims);
    if let Err(e) = result {
        say("giving the drive back to the kernel");
        give_back(host, &drive.bdf)
            .map_err(|back| DeviceError::step(format!("{e}; giving {} back", drive.bdf), back))?;
        return Err(e);
    }
    drop(lock);
    Ok(())
}

fn lock(host: &Host) -> Result<File, DeviceError> {
    let folder = host.real(STATE);
    fs::create_dir_all(&folder).map_err(|e| DeviceError::step(format!("making {STATE}"), e))?;
    let path = folder.join("lock");
    let fail = |e: std::io::Error| DeviceError::step(format!("locking {STATE}/lock"), e);
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path).map_err(fail)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(e) => Err(DeviceError::step(format!("locking {STATE}/lock (is another nt device command running?)"), e)),
    }
}

fn claim(host: &Host, drive: &Controller) -> Result<Vec<File>, DeviceError> {
    let mut claims = Vec::new();
    for namespace in &drive.namespaces {
        let path = format!("/dev/{}", namespace.whole.name);
        let file = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(host.real(&path));
        let file = file.map_err(|e| DeviceError::Refused {
            name: namespace.whole.name.clone(),
            reasons: vec![Reason {
                check: guard::Check::Open,
                path: path.clone().into(),
                what: format!("it cannot be claimed: {e}"),
            }],
        })?;
        // udev leaves a locked disk alone. A failure only costs that courtesy.
        // SAFETY: an advisory lock on a file that is open.
        unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
        claims.push(file);
    }
    Ok(claims)
}

/// A namespace that is ours alone to write, by the kernel's word (O_EXCL), until this is dropped.
#[derive(Debug)]
pub struct Writable {
    file: File,
    controller: Controller,
    _lock: File,
}

impl Writable {
    /// What an image is written to.
    pub fn drive(&self) -> Drive<'_> {
        let namespace = &self.controller.namespaces[0];
        Drive {
            file: &self.file,
            size: namespace.whole.size,
            block: namespace.block_size.into(),
            serial: self.controller.serial.clone(),
            model: self.controller.model.clone(),
            namespace: namespace.nsid,
        }
    }

    /// Has the kernel read the new partition table. If it cannot now, it will when the drive is next
    /// bound and released.
    pub fn reread_partitions(&self) {
        const BLKRRPART: libc::c_ulong = 0x125f;
        // SAFETY: an ioctl without argument on an open device.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), BLKRRPART) } != 0 {
            tracing::debug!("the kernel keeps the old partition table: {}", std::io::Error::last_os_error());
        }
    }
}

/// Claims a drive of one namespace for writing, if its serial is `serial` and nothing speaks against
/// it, checked before and under the claim.
///
/// # Errors
/// [`DeviceError::Refused`] with every reason, or the step that failed.
pub fn claim_to_write(
    host: &Host,
    name: &str,
    serial: &str,
    allowed: &Result<Allowlist, String>,
) -> Result<Writable, DeviceError> {
    let lock = lock(host)?;
    let check = || -> Result<Controller, DeviceError> {
        let all = sysfs::controllers(host).map_err(|e| DeviceError::step("reading the drives", e))?;
        let drive = sysfs::find(host, &all, name).ok_or_else(|| DeviceError::NotFound(name.into()))?;
        let mut reasons = guard::examine(host, &all, drive, allowed);
        let mut add = |check, what: String| reasons.push(Reason { check, path: drive.pci_path().into(), what });
        if drive.serial != serial {
            add(guard::Check::Allowlist, format!("its serial is {}, --serial says {serial}", drive.serial));
        }
        if drive.namespaces.len() != 1 {
            add(guard::Check::Format, format!("it has {} namespaces, one was expected", drive.namespaces.len()));
        }
        if reasons.is_empty() { Ok(drive.clone()) } else { Err(DeviceError::Refused { name: name.into(), reasons }) }
    };
    let drive = check()?;
    let path = format!("/dev/{}", drive.namespaces[0].whole.name);
    let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(host.real(&path));
    let file = open.map_err(|e| DeviceError::step(format!("claiming {path} for writing"), e))?;
    if check()? != drive {
        return Err(DeviceError::step(format!("claiming {path}"), "it changed while it was being checked"));
    }
    Ok(Writable { file, controller: drive, _lock: lock })
}

fn write(host: &Host, path: &str, text: &str) -> Result<(), DeviceError> {
    fs::write(host.real(path), text).map_err(|e| DeviceError::step(format!("writing {text:?} to {path}"), e))
}

/// Links below `/dev/disk/by-id` that lead to the drive.
fn links(host: &Host, drive: &Controller) -> Vec<String> {
    let folder = "/dev/disk/by-id";
    let names = host.list(folder).unwrap_or_default().into_iter().map(|n| format!("{folder}/{n}"));
    names.filter(|n| host.link_name(n).is_some_and(|target| drive.owns(&target))).collect()
}

fn take(
    host: &Host,
    drive: &Controller,
    group: &str,
    steps: &[(String, String)],
    say: &mut impl FnMut(&str),
) -> Result<(), DeviceError> {
    let links = links(host, drive);
    for (path, text) in steps {
        write(host, path, text)?;
        say(&format!("wrote {text} to {path}"));
    }
    wait_for_driver(host, &drive.bdf, "vfio-pci")?;
    let node = format!("/dev/vfio/{group}");
    let end = Instant::now() + WAIT;
    while !host.exists(&node) {
        if Instant::now() > end {
            return Err(DeviceError::step(
                format!("waiting for {node}"),
                "it did not appear; is the module vfio_iommu_type1 loaded?",
            ));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    hand_over(host, &node)?;
    say(&format!("{node} belongs to group {GROUP}"));
    let state = Bound {
        pci: drive.bdf.clone(),
        controller: drive.name.clone().unwrap_or_default(),
        serial: drive.serial.clone(),
        model: drive.model.clone(),
        group: group.into(),
        links,
        namespace: drive
            .namespaces
            .iter()
            .map(|n| BoundNamespace { name: n.whole.name.clone(), nsid: n.nsid, size: n.whole.size })
            .collect(),
    };
    let text = toml::to_string(&state).map_err(|e| DeviceError::step("noting the drive", e))?;
    write(host, &state_path(&drive.bdf), &text)
}

fn state_path(bdf: &str) -> String {
    format!("{STATE}/{bdf}.toml")
}

fn wait_for_driver(host: &Host, bdf: &str, driver: &str) -> Result<(), DeviceError> {
    let path = format!("/sys/bus/pci/devices/{bdf}/driver");
    let end = Instant::now() + WAIT;
    loop {
        let found = host.link_name(&path);
        if found.as_deref() == Some(driver) {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(DeviceError::step(
                format!("binding {bdf} to {driver}"),
                format!(
                    "the driver is {}; is the module loaded (`modprobe {driver}`)?",
                    found.as_deref().unwrap_or("none")
                ),
            ));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Gives the node to the group `nt`, if there is one; without it only root may use the drive.
fn hand_over(host: &Host, node: &str) -> Result<(), DeviceError> {
    use std::os::unix::fs::{PermissionsExt, chown};
    let Ok(Some(group)) = nix::unistd::Group::from_name(GROUP) else {
        return Ok(());
    };
    let path: PathBuf = host.real(node);
    chown(&path, Some(0), Some(group.gid.as_raw()))
        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o660)))
        .map_err(|e| DeviceError::step(format!("handing {node} to group {GROUP}"), e))
}

/// Every drive that this program has bound.
pub fn bound(host: &Host) -> Vec<Bound> {
    let names = host.list(STATE).unwrap_or_default();
    names
        .iter()
        .filter(|n| n.ends_with(".toml"))
        .filter_map(|n| toml::from_str::<Bound>(&host.read(&format!("{STATE}/{n}")).ok()?).ok())
        .filter(|b| host.link_name(&format!("/sys/bus/pci/devices/{}/driver", b.pci)).as_deref() == Some("vfio-pci"))
        .collect()
}

/// The bound drive, and its namespace, that a user means by its former name or its PCI address.
///
/// # Errors
/// [`DeviceError::NotBound`], or that the kernel has given the name to another drive since.
pub fn find_bound(host: &Host, name: &str) -> Result<(Bound, BoundNamespace), DeviceError> {
    let short = name.strip_prefix("/dev/").unwrap_or(name);
    for drive in bound(host) {
        let exact = drive.pci == short
            || drive.pci.strip_prefix("0000:") == Some(short)
            || drive.links.iter().any(|link| link == name);
        let whole = exact || drive.controller == short;
        let found = drive.namespace.iter().find(|n| {
            whole || n.name == short || short.strip_prefix(n.name.as_str()).is_some_and(|p| p.starts_with('p'))
        });
        if let Some(namespace) = found.cloned() {
            if !exact && host.exists(&format!("/sys/class/block/{}", namespace.name)) {
                return Err(DeviceError::step(
                    format!("finding {name}"),
                    format!(
                        "the drive of that name is bound to vfio-pci, and the kernel has given the name to another one; name the bound drive by its address {}",
                        drive.pci
                    ),
                ));
            }
            return Ok((drive, namespace));
        }
    }
    Err(DeviceError::NotBound(name.into()))
}

/// Gives a bound drive back to the kernel.
///
/// # Errors
/// If it is not bound by us, in use, or the kernel does not take it.
pub fn release(host: &Host, name: &str, dry_run: bool, mut say: impl FnMut(&str)) -> Result<(), DeviceError> {
    let (drive, _) = find_bound(host, name)?;
    let reasons = users(host, &drive.group);
    if !reasons.is_empty() {
        return Err(DeviceError::Refused { name: name.into(), reasons });
    }
    if dry_run {
        say(&format!("would unbind {} from vfio-pci, clear its driver_override and probe it", drive.pci));
        return Ok(());
    }
    let _lock = lock(host)?;
    give_back(host, &drive.pci)?;
    fs::remove_file(host.real(&state_path(&drive.pci))).map_err(|e| DeviceError::step("forgetting the drive", e))?;
    say(&format!("{} {} is back with the kernel's nvme driver", drive.model, drive.serial));
    Ok(())
}

/// Processes with the group open: unbinding would wait for them without end.
fn users(host: &Host, group: &str) -> Vec<Reason> {
    let node = PathBuf::from(format!("/dev/vfio/{group}"));
    let mut out = Vec::new();
    for pid in host.list("/proc").unwrap_or_default() {
        let folder = format!("/proc/{pid}/fd");
        if !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        for fd in host.list(&folder).unwrap_or_default() {
            if host.link(&format!("{folder}/{fd}")).ok().as_deref() == Some(Path::new(&node)) {
                out.push(Reason {
                    check: guard::Check::Open,
                    path: folder.clone().into(),
                    what: format!("process {pid} uses it"),
                });
            }
        }
    }
    out
}

/// Whatever the state: off vfio-pci, no override, probed again.
fn give_back(host: &Host, bdf: &str) -> Result<(), DeviceError> {
    let pci = format!("/sys/bus/pci/devices/{bdf}");
    write(host, &format!("{pci}/driver_override"), "\n")?;
    match host.link_name(&format!("{pci}/driver")).as_deref() {
        Some("nvme") => return Ok(()),
        Some(_) => write(host, &format!("{pci}/driver/unbind"), bdf)?,
        None => {}
    }
    write(host, "/sys/bus/pci/drivers_probe", bdf)?;
    wait_for_driver(host, bdf, "nvme")
}
