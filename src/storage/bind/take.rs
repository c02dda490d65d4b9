//! Takes a drive from the kernel's driver.

use std::fs::File;
use std::time::Duration;

use super::super::guard::claim::Claim;
use super::super::guard::node::{Node, Number};
use super::super::guard::{self, Check, Controller, Host, LastLook, Reason, sysfs};
use super::find::{controllers, recorded};
use super::record::{self, Bound, Standing, State, device, driver};
use super::{DeviceError, GROUP, Machine, Say, claim, give, lock};

/// What holds the reasons against a drive.
pub(super) type Judge<'a> = dyn Fn(&Host, &[Controller], &Controller) -> Vec<Reason> + 'a;

/// Modules that a bound drive needs, and the sign that each is there.
const MODULES: [(&str, &str); 2] =
    [("vfio-pci", "/sys/bus/pci/drivers/vfio-pci"), ("vfio_iommu_type1", "/sys/module/vfio_iommu_type1")];

/// Binds the drive named `name` unless `judge` has a reason against it.
pub(super) fn bind(
    m: &Machine<'_>,
    name: &str,
    judge: &Judge<'_>,
    dry_run: bool,
    say: Say<'_>,
) -> Result<(), DeviceError> {
    let first = find(m, name)?;
    let _lock = if dry_run { None } else { Some(lock::lock(m.host, &first.bdf)?) };
    if !dry_run {
        forget_stale(m, &first.bdf, say)?;
    }
    let before = LastLook::begin(m.host, &first).map_err(|e| DeviceError::step("reading the drive's counts", e))?;
    let drive = check(m, name, judge, &first)?;
    say(&format!("checked: {} is {} {} with no reason against it", name, drive.model, drive.serial));
    modules(m, dry_run, say)?;
    let nodes = drive.namespaces.iter().map(|n| format!("/dev/{}", n.whole.name)).collect::<Vec<_>>().join(", ");
    if dry_run {
        say(&moment(m, name, &drive)?);
        foretell(m, &drive, say);
        return Ok(());
    }
    let claims = claim::claim(m.host, &drive)?;
    check(m, name, judge, &drive)?;
    say(&format!("claimed and checked again: {nodes}"));
    let last = |claims: &[File]| match before.reasons(m.host, &drive, claims) {
        reasons if reasons.is_empty() => Ok(()),
        reasons => Err(DeviceError::Refused { name: name.into(), reasons }),
    };
    let result = take(m, (name, &drive), claims, &last, say);
    if let Err(e) = result {
        return Err(undo(m, &drive.bdf, e, say));
    }
    Ok(())
}

/// Claims the drive and lets go at once, since the check takes longer than a dry run may keep a drive.
fn moment(m: &Machine<'_>, name: &str, drive: &Controller) -> Result<String, DeviceError> {
    match guard::claim::moment(m.host, drive) {
        Claim::Made(time) => Ok(format!("claimed and let go after {} µs: nobody else claims it", time.as_micros())),
        Claim::Refused(reasons) => Err(DeviceError::Refused { name: name.into(), reasons }),
        Claim::NotAllowed | Claim::NotTried => Ok("not claimed: run as root".into()),
    }
}

/// Removes the records that hold no more, each under its own lock; those that another command works on are left to
/// it. One of a drive that somebody gave back by hand goes too: if it were bound by hand again, to something else's
/// use, the record would hold again and open it to the group. `own` is the drive whose lock the caller holds.
pub(super) fn forget_stale(m: &Machine<'_>, own: &str, say: Say<'_>) -> Result<(), DeviceError> {
    let stale = |r: &Bound| r.standing(m.host) != Standing::Holds;
    for old in record::all(m.host).iter().filter(|r| stale(r)) {
        let lock = if old.pci == own { None } else { lock::lock(m.host, &old.pci).ok() };
        if lock.is_none() && old.pci != own {
            continue;
        }
        if record::load(m.host, &old.pci).as_ref().is_some_and(stale) {
            m.forget(&old.pci)?;
            say(&format!("removed a stale record of {} at {}: {}", old.shown(), old.pci, old.standing(m.host)));
        }
    }
    Ok(())
}

/// The drive as it is now, if it is whole and all the kernel's.
fn find(m: &Machine<'_>, name: &str) -> Result<Controller, DeviceError> {
    let all = controllers(m.host)?;
    let Some(drive) = sysfs::find(m.host, &all, name) else {
        return Err(match recorded(m.host, name, record::current(m.host))? {
            Some(r) => begun(m.host, name, &r),
            None => super::find::not_found(m.host, name),
        });
    };
    is_whole(m, name, drive)?;
    Ok(drive.clone())
}

/// That neither a bind nor a release of the drive has begun: by its record, its `driver_override` and its driver.
pub(super) fn is_whole(m: &Machine<'_>, name: &str, drive: &Controller) -> Result<(), DeviceError> {
    let pci = &drive.bdf;
    if let Some(r) = record::current(m.host).iter().find(|r| r.pci == *pci) {
        return Err(begun(m.host, name, r));
    }
    // With another driver and no record it is somebody else's: not for nt to give back unasked.
    if let Some(other) = drive.driver.as_deref().filter(|d| *d != "nvme") {
        let what = format!("the nvme driver was expected, {other} was found, by no bind of nt's");
        return Err(DeviceError::refused(name, Check::Driver, &format!("{}/driver", device(pci)), what));
    }
    if let Some(found) = m.driver_override(pci)? {
        let path = format!("{}/driver_override", device(pci));
        return Err(half(name, pci, &path, &format!("its driver_override is {found}, none was expected")));
    }
    if drive.driver.is_none() {
        return Err(half(name, pci, &format!("{}/driver", device(pci)), "no driver holds it"));
    }
    Ok(())
}

fn begun(host: &Host, name: &str, r: &Bound) -> DeviceError {
    let progress = r.progress(host);
    half(name, &r.pci, &record::path(&r.pci), &format!("{} at {}: {progress}", r.shown(), r.pci))
}

fn half(name: &str, pci: &str, path: &str, what: &str) -> DeviceError {
    let cure = format!("{what}; give it back to the kernel with `sudo nt device release --pci {pci}`");
    DeviceError::refused(name, Check::Driver, path, cure)
}

/// Examines the drive; it must be as it was.
fn check(m: &Machine<'_>, name: &str, judge: &Judge<'_>, before: &Controller) -> Result<Controller, DeviceError> {
    let drive = find(m, name)?;
    let mut reasons = judge(m.host, &controllers(m.host)?, &drive);
    m.stop_if_asked()?;
    if drive != *before {
        reasons.push(Reason {
            check: Check::Driver,
            path: before.pci_path().into(),
            what: "it changed while it was being checked".into(),
        });
    }
    if reasons.is_empty() { Ok(drive) } else { Err(DeviceError::Refused { name: name.into(), reasons }) }
}

/// Makes sure, before anything is changed, that vfio-pci and the IOMMU's side of VFIO are there.
fn modules(m: &Machine<'_>, dry_run: bool, say: Say<'_>) -> Result<(), DeviceError> {
    for (module, sign) in MODULES {
        if m.host.exists(sign) {
            continue;
        }
        if dry_run {
            say(&format!("would load the module {module}"));
            continue;
        }
        m.change(&format!("loading the module {module}"), || m.kernel.load_module(module))?;
        if !m.host.exists(sign) {
            let why = format!("{sign} did not appear; does this kernel have the module {module}?");
            return Err(DeviceError::step(format!("loading the module {module}"), why));
        }
        say(&format!("loaded the module {module}"));
    }
    m.stop_if_asked()
}

/// The changes, in order.
fn steps(pci: &str) -> [(String, String); 3] {
    [
        (format!("{}/driver_override", device(pci)), "vfio-pci".into()),
        (format!("{}/driver/unbind", device(pci)), pci.into()),
        ("/sys/bus/pci/drivers_probe".into(), pci.into()),
    ]
}

fn foretell(m: &Machine<'_>, drive: &Controller, say: Say<'_>) {
    let record = Bound::of(m.host, drive, "");
    say(&format!("would note it in {}", record::path(&drive.bdf)));
    for (path, text) in steps(&drive.bdf) {
        say(&format!("would write {text} to {path}"));
    }
    say(&format!("would hand /dev/vfio/{} to group {GROUP}, if there is one", record.group));
}

/// The record goes before each change, so that whatever ends this process, `release` knows. `last` looks at the drive once
/// more before the kernel's driver lets go.
fn take(
    m: &Machine<'_>,
    (name, drive): (&str, &Controller),
    claims: Vec<File>,
    last: &dyn Fn(&[File]) -> Result<(), DeviceError>,
    say: Say<'_>,
) -> Result<(), DeviceError> {
    let mut record = Bound::of(m.host, drive, name);
    m.note(&mut record, State::Begun)?;
    let [set, unbind, probe] = steps(&drive.bdf);
    for ((path, text), after) in [(set, State::Override), (unbind, State::Unbound)] {
        m.stop_if_asked()?;
        if after == State::Unbound {
            let looked = last(&claims);
            // A signal ends the look, which then is no reason of the drive's.
            m.stop_if_asked()?;
            looked?;
        }
        m.write(&path, &text)?;
        m.note(&mut record, after)?;
        say(&format!("wrote {text} to {path}"));
    }
    // The nodes are gone, and nobody can claim them any more.
    drop(claims);
    m.stop_if_asked()?;
    m.write(&probe.0, &probe.1)?;
    say(&format!("wrote {} to {}", probe.1, probe.0));
    m.wait_for(&format!("binding {} to vfio-pci", drive.bdf), || {
        let found = driver(m.host, &drive.bdf);
        match found.as_deref() {
            Some("vfio-pci") => Ok(()),
            _ => Err(format!("the driver is {}; see `dmesg`", found.as_deref().unwrap_or("none"))),
        }
    })?;
    let node = format!("/dev/vfio/{}", record.group);
    m.wait_for(&format!("waiting for {node}"), || match m.host.exists(&node) {
        true => Ok(()),
        false => Err("it did not appear".into()),
    })?;
    let number = number_of_group(m.host, &record.group)?;
    is_of_group(m.host, &node, number)?;
    m.stop_if_asked()?;
    // The record first: a node that is handed over without one that says so would stay so.
    record.taking = record::taking(m.host, &record.group);
    m.note(&mut record, State::Bound)?;
    m.stop_if_asked()?;
    if m.change(&format!("handing {node} to group {GROUP}"), || m.kernel.hand_over(&m.host.real(&node), number))? {
        say(&format!("{node} belongs to group {GROUP}"));
    } else {
        say(&format!("{node} is root's alone: there is no group {GROUP}, which scripts/install.sh makes"));
    }
    m.stop_if_asked()?;
    say(&format!("bound: {} at {}", record.shown(), record.pci));
    Ok(())
}

/// The number that sysfs tells of a VFIO group's node; none where it tells none.
pub(super) fn number_of_group(host: &Host, group: &str) -> Result<Option<Number>, DeviceError> {
    let path = format!("/sys/class/vfio/{group}/dev");
    let fail = |e: &dyn std::fmt::Display| DeviceError::step(format!("reading {path}"), e);
    let Some(text) = host.read_if_there(&path).map_err(|e| fail(&e))? else { return Ok(None) };
    text.parse().map(Some).map_err(|()| fail(&format!("a device number was expected, {text:?} was found")))
}

/// What lies at `node` must be the group's own, by its number: another group's, left there under its name, would be handed
/// over, or asked for its users, in its place.
pub(super) fn is_of_group(host: &Host, node: &str, number: Option<Number>) -> Result<(), DeviceError> {
    let Some(number) = number else { return Ok(()) };
    let fail = |e: &dyn std::fmt::Display| DeviceError::step(format!("looking at {node}"), e);
    let found = host.node(node).map_err(|e| fail(&e))?.unwrap_or(Node::File(None));
    Node::Char(number).must_be(node, found).map_err(|e| fail(&e))
}

/// Makes sure that the node of the VFIO group of the drive at `pci` is the group's own, before anybody opens it by its name; one
/// that is missing is left to who opens it.
///
/// # Errors
/// That another device's node, or a file, lies in its place.
pub fn group_node_is_right(host: &Host, pci: &str) -> Result<(), DeviceError> {
    let Some(group) = host.link_name(&format!("{}/iommu_group", device(pci))) else { return Ok(()) };
    let node = format!("/dev/vfio/{group}");
    if host.exists(&node) { is_of_group(host, &node, number_of_group(host, &group)?) } else { Ok(()) }
}

/// Gives the drive back after a failed bind, whatever has been asked meanwhile; the error says what became
/// of it.
fn undo(m: &Machine<'_>, pci: &str, e: DeviceError, say: Say<'_>) -> DeviceError {
    say("giving the drive back to the kernel");
    let m = Machine { stopped: &|| false, ..*m };
    let Err(back) = give::back(&m, pci, Duration::ZERO, say) else { return e };
    let cure = format!("try `sudo nt device release --pci {pci}`");
    match e {
        DeviceError::Interrupted(_) => {
            DeviceError::step(format!("giving {pci} back after an interrupt"), format!("{back}; {cure}"))
        }
        e => DeviceError::step(format!("{e}; giving {pci} back"), format!("{back}; {cure}")),
    }
}
