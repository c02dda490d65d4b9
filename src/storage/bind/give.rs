//! Gives a drive back to the kernel's driver, from whatever state it is in, with a record or without.

use std::fs::File;
use std::time::Duration;

use super::super::guard::sysfs::{self, NVME_CLASS};
use super::super::guard::{Check, Host, Reason};
use super::find::Meant;
use super::record::{self, Bound, Standing, State, address, device, driver};
use super::{DeviceError, Machine, Say, find, holders, lock, take};

/// How long the namespaces of a drive that is back may take to appear.
const NAMESPACES: Duration = Duration::from_secs(3);

/// What is at a PCI address.
struct Found {
    pci: String,
    driver: Option<String>,
    forced: Option<String>,
    record: Option<Bound>,
    standing: Option<Standing>,
    /// Whether a record lies there that cannot be used.
    damaged: bool,
}

/// Gives back the drive that `name` or `pci` means. A signal does not stop it: it is finished first.
pub(super) fn release(
    m: &Machine<'_>,
    name: Option<&str>,
    pci: Option<&str>,
    dry_run: bool,
    say: Say<'_>,
) -> Result<(), DeviceError> {
    let shown = name.or(pci).unwrap_or_default();
    let pci = match find::to_release(m.host, name, pci)? {
        Meant::Drive(pci) => pci,
        Meant::Stale(pci) => return forgotten(m, shown, &pci, dry_run, say),
    };
    let _lock = if dry_run { None } else { lock::to_release(m.host, &pci, say)? };
    if !m.host.exists(&device(&pci)) {
        return gone(m, &pci, dry_run, say);
    }
    let found = Found::look(m, &pci)?;
    found.is_ours_to_give(shown)?;
    say(&format!("found: {}", found.told()));
    if dry_run {
        let busy = holders::of(m.host, &found.group_node(m.host));
        if !busy.is_empty() {
            return Err(DeviceError::Refused { name: shown.into(), reasons: busy });
        }
        say(&format!(
            "would put {pci} back to the kernel's nvme driver: driver_override cleared, probed, its record removed"
        ));
        return Ok(());
    }
    back(&Machine { stopped: &|| false, ..*m }, &pci, NAMESPACES, say)?;
    match (m.stopped)() {
        true => Err(DeviceError::Interrupted("the release was finished first".into())),
        false => Ok(()),
    }
}

/// Removes a stale record, and nothing else: the name was not that of the drive that is there now.
fn forgotten(m: &Machine<'_>, name: &str, pci: &str, dry_run: bool, say: Say<'_>) -> Result<(), DeviceError> {
    let _lock = if dry_run { None } else { Some(lock::lock(m.host, pci)?) };
    let Some(record) = record::load(m.host, pci) else { return Err(DeviceError::NotBound(name.into())) };
    let standing = record.standing(m.host);
    if standing == Standing::Holds {
        return Err(DeviceError::step(format!("finding {name}"), "another nt command has bound the drive meanwhile"));
    }
    let what = format!("a stale record of {} at {pci} ({standing})", record.shown());
    if dry_run {
        say(&format!("would remove {what}, and touch no drive"));
        return Ok(());
    }
    m.forget(pci)?;
    let now = if m.host.exists(&device(pci)) {
        format!("; what is at {pci} now was not touched (`nt device release --pci {pci}` would give that back)")
    } else {
        String::new()
    };
    say(&format!("removed {what}{now}"));
    Ok(())
}

/// What can be done for a drive that is no longer in the machine.
fn gone(m: &Machine<'_>, pci: &str, dry_run: bool, say: Say<'_>) -> Result<(), DeviceError> {
    if !m.host.exists(&record::path(pci)) {
        return Err(DeviceError::NotFound(pci.into()));
    }
    if dry_run {
        say(&format!("the drive at {pci} is gone; would remove its record"));
        return Ok(());
    }
    m.forget(pci)?;
    say(&format!("the drive at {pci} is gone; its record is removed"));
    Ok(())
}

impl Found {
    fn look(m: &Machine<'_>, pci: &str) -> Result<Found, DeviceError> {
        let class =
            m.host.read(&format!("{}/class", device(pci))).map_err(|e| DeviceError::step("reading the drive", e))?;
        if class != NVME_CLASS {
            let why = format!("class {NVME_CLASS}, NVMe, was expected, {class} was found");
            return Err(DeviceError::step(format!("releasing {pci}"), why));
        }
        let driver = driver(m.host, pci);
        let record = record::load(m.host, pci);
        let standing = record.as_ref().map(|r| r.standing(m.host));
        let damaged = record.is_none() && m.host.exists(&record::path(pci));
        Ok(Found { pci: pci.into(), driver, forced: m.driver_override(pci)?, record, standing, damaged })
    }

    /// For the user.
    fn told(&self) -> String {
        let held = self.driver.as_deref().map_or("no driver".into(), |d| format!("the driver {d}"));
        let forced = self.forced.as_deref().map_or(String::new(), |f| format!(", driver_override {f}"));
        let record = match (&self.record, self.standing) {
            (Some(r), Some(Standing::Holds)) => format!("a record of {} ({})", r.shown(), r.state),
            (Some(r), Some(standing)) => format!("a stale record of {} ({standing})", r.shown()),
            _ if self.damaged => "a record that cannot be used".into(),
            _ => "no record".into(),
        };
        format!("{} with {held}{forced}, {record}", self.pci)
    }

    /// That there is something to give back, and that it is with a driver that nt knows.
    fn is_ours_to_give(&self, name: &str) -> Result<(), DeviceError> {
        match self.driver.as_deref() {
            Some("nvme") if self.forced.is_none() && self.record.is_none() && !self.damaged => {
                // `0000:02:00.0` as well as the name that was given.
                let name = if address(name).is_some() { &self.pci } else { name };
                Err(DeviceError::NotBound(name.into()))
            }
            None | Some("nvme" | "vfio-pci") => Ok(()),
            Some(other) => Err(DeviceError::step(
                format!("releasing {}", self.pci),
                format!("the driver {other} holds it, which nt does not bind to; unbind it there first"),
            )),
        }
    }

    fn group_node(&self, host: &Host) -> String {
        format!("/dev/vfio/{}", host.link_name(&format!("{}/iommu_group", device(&self.pci))).unwrap_or_default())
    }
}

/// Whatever the state: off vfio-pci, no override, probed again, no record. The caller holds the lock. Its
/// namespaces are waited for as long as `namespaces`.
pub(super) fn back(m: &Machine<'_>, pci: &str, namespaces: Duration, say: Say<'_>) -> Result<(), DeviceError> {
    let mut found = Found::look(m, pci)?;
    found.is_ours_to_give(pci).or_else(|e| if matches!(e, DeviceError::NotBound(_)) { Ok(()) } else { Err(e) })?;
    // Held until the driver has let go: nobody can open the group meanwhile.
    let group = match found.driver.as_deref() {
        Some("vfio-pci") => hold(m, &found)?,
        _ => None,
    };
    if let (Some(record), Some(Standing::Holds)) = (&mut found.record, found.standing)
        && let Err(e) = m.note(record, State::Releasing)
    {
        // The way back is known without it, whatever becomes of this process.
        say(&format!("the record could not be moved forward, and the drive is given back all the same: {e}"));
    }
    if found.forced.is_some() {
        m.write(&format!("{}/driver_override", device(pci)), "\n")?;
    }
    if found.driver.as_deref() == Some("vfio-pci") {
        m.write(&format!("{}/driver/unbind", device(pci)), pci)?;
    }
    drop(group);
    if found.driver.as_deref() != Some("nvme") {
        m.write("/sys/bus/pci/drivers_probe", pci)?;
        if let Err(e) = live(m, pci) {
            // Nothing of ours is left on it, and the kernel does not want it: no record is to speak for it.
            if driver(m.host, pci).is_none()
                && let Err(e) = m.forget(pci)
            {
                say(&format!("its record could not be removed: {e}"));
            }
            return Err(e);
        }
        let record = found.record.as_ref().filter(|_| found.standing == Some(Standing::Holds));
        appear(m, pci, record, namespaces);
    }
    if let Err(e) = m.forget(pci) {
        say(&format!("its record could not be removed, and `nt device list` knows it as stale: {e}"));
    }
    let names = sysfs::controllers(m.host).ok().and_then(|all| all.into_iter().find(|c| c.bdf == pci));
    let (shown, name) = names.map_or((pci.to_owned(), String::new()), |c| {
        (format!("{} {}", c.model, c.serial), c.name.map_or(String::new(), |n| format!(" as {n}")))
    });
    say(&format!("{shown} is back with the kernel's nvme driver{name}"));
    Ok(())
}

/// Opens the drive's VFIO group, which the kernel grants only if nobody uses it: unbinding would wait for
/// them without end.
fn hold(m: &Machine<'_>, found: &Found) -> Result<Option<File>, DeviceError> {
    let node = found.group_node(m.host);
    if m.host.exists(&node) {
        let number = take::number_of_group(m.host, node.trim_start_matches("/dev/vfio/"))?;
        // Opening whatever else lies there tells nothing of the group, and may do anything.
        if let Err(e) = take::is_of_group(m.host, &node, number) {
            tracing::warn!("whether somebody uses the drive's group cannot be asked: {e}");
            return Ok(None);
        }
    }
    match m.kernel.open_group(&m.host.real(&node)) {
        Ok(file) => Ok(Some(file)),
        // Without a node nobody can have opened it.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            let mut reasons = holders::of(m.host, &node);
            if reasons.is_empty() {
                let open = holders::of_devices(m.host);
                let who = match open.is_empty() {
                    true => "it cannot be seen from here, as in another PID namespace".into(),
                    false => format!("it may be one of those that have VFIO devices open: {}", open.join(", ")),
                };
                let what = format!("a process uses it (EBUSY) without the group's node open; {who}; end it first");
                reasons.push(Reason::new(Check::Open, &node, what));
            }
            Err(DeviceError::Refused { name: found.pci.clone(), reasons })
        }
        Err(e) => Err(DeviceError::system(format!("opening {node}"), &e)),
    }
}

/// Waits until the kernel's driver holds the drive and has brought it up.
fn live(m: &Machine<'_>, pci: &str) -> Result<(), DeviceError> {
    let mut held = false;
    let waited = m.wait_for(&format!("giving {pci} back to the nvme driver"), || {
        let now = driver(m.host, pci);
        held |= now.as_deref() == Some("nvme");
        match now.as_deref() {
            Some("nvme") => match state(m.host, pci).as_deref() {
                None | Some("live") => Ok(()),
                Some(state) => Err(format!("the controller is {state}, not live; see `dmesg`")),
            },
            None if held => Err("the nvme driver took it and let it go again; see `dmesg`".into()),
            other => Err(format!("the driver is {}; is the module nvme loaded?", other.unwrap_or("none"))),
        }
    });
    match waited {
        // The kernel's from here on, even if it is slow or ill.
        Err(e) if driver(m.host, pci).as_deref() == Some("nvme") => {
            tracing::warn!("{e}");
            Ok(())
        }
        other => other,
    }
}

fn state(host: &Host, pci: &str) -> Option<String> {
    let base = format!("{}/nvme", device(pci));
    let name = host.list(&base).ok()?.into_iter().next()?;
    host.read(&format!("{base}/{name}/state")).ok()
}

/// Waits, not too long, for the namespaces that the record knows.
fn appear(m: &Machine<'_>, pci: &str, record: Option<&Bound>, most: Duration) {
    let end = m.kernel.now() + most;
    let wanted = record.map_or(0, |r| r.namespace.len());
    let there = || {
        let all = sysfs::controllers(m.host).unwrap_or_default();
        all.iter().find(|c| c.bdf == pci).map_or(0, |c| c.namespaces.len())
    };
    while m.kernel.now() < end && there() < wanted {
        m.kernel.pause();
    }
}
