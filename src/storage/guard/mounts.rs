//! Who mounts, swaps to, boots from or keeps open a block device, in every mount namespace.

use std::path::Path;

use super::host::{Host, Unreadable};
use super::names::names;
use super::sysfs::{BlockDevice, Controller};
use super::{Check, Reason};

/// Tables that name devices which are used when the machine starts.
const TABLES: [&str; 5] =
    ["/etc/fstab", "/etc/crypttab", "/etc/mdadm.conf", "/etc/mdadm/mdadm.conf", "/etc/lvm/devices/system.devices"];
/// Units of systemd, of which some mount or swap.
const UNITS: &str = "/etc/systemd/system";

/// One line of a mountinfo file.
#[derive(Debug, PartialEq, Eq)]
struct Mount<'a> {
    number: &'a str,
    place: &'a str,
    source: &'a str,
}

fn parse(line: &str) -> Option<Mount<'_>> {
    let (head, tail) = line.split_once(" - ")?;
    let mut head = head.split(' ').skip(2);
    Some(Mount { number: head.next()?, place: head.nth(1)?, source: tail.split(' ').nth(1)? })
}

/// Mounts of any process on `device`.
pub fn mounted(host: &Host, device: &BlockDevice, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let mut files = vec!["/proc/self/mountinfo".to_owned()];
    for pid in processes(host)? {
        files.push(format!("/proc/{pid}/mountinfo"));
    }
    let mut seen = Vec::new();
    for (i, path) in files.iter().enumerate() {
        let text = match host.read(path) {
            Ok(text) => text,
            // A process that has ended meanwhile has no mounts; our own list must be there.
            Err(_) if i > 0 && !host.exists(path.trim_end_matches("/mountinfo")) => continue,
            // A zombie or kernel thread without a mount namespace.
            Err(e) if i > 0 && e.why.contains("Invalid argument") => continue,
            Err(e) => return Err(e),
        };
        for mount in text.lines().filter_map(parse) {
            if on(&mount, device) && !seen.contains(&mount.place.to_owned()) {
                seen.push(mount.place.to_owned());
                let check = if is_system(mount.place) { Check::Boot } else { Check::Mounted };
                out.push(Reason::new(check, path, format!("{} is mounted at {}", device.name, mount.place)));
            }
        }
    }
    Ok(())
}

fn is_system(place: &str) -> bool {
    matches!(place, "/" | "/boot" | "/boot/efi" | "/efi" | "/usr" | "/var" | "/home")
}

fn processes(host: &Host) -> Result<Vec<String>, Unreadable> {
    let mut names = host.list("/proc")?;
    names.retain(|n| n.bytes().all(|b| b.is_ascii_digit()));
    Ok(names)
}

/// Swap on `device`, hibernation to it.
pub fn swap(host: &Host, device: &BlockDevice, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    if let Some(text) = host.read_if_there("/proc/swaps")? {
        for line in text.lines().skip(1) {
            if line.split_whitespace().next() == Some(&format!("/dev/{}", device.name)) {
                out.push(Reason::new(Check::Swap, "/proc/swaps", format!("{} is used as swap", device.name)));
            }
        }
    }
    if let Some(number) = host.read_if_there("/sys/power/resume")?
        && number == device.number
    {
        out.push(Reason::new(Check::Swap, "/sys/power/resume", format!("the machine hibernates to {}", device.name)));
    }
    for name in host.list("/sys/block")?.iter().filter(|n| n.starts_with("zram")) {
        let path = format!("/sys/block/{name}/backing_dev");
        if host.read_if_there(&path)?.as_deref() == Some(&format!("/dev/{}", device.name)) {
            out.push(Reason::new(Check::Swap, &path, format!("{} backs {name}", device.name)));
        }
    }
    Ok(())
}

/// The controller's device that carries the file system on which `path` lies.
pub fn below(host: &Host, controller: &Controller, path: &str) -> Result<Option<String>, Unreadable> {
    let text = host.read("/proc/self/mountinfo")?;
    let over = text.lines().filter_map(parse).filter(|m| Path::new(path).starts_with(m.place));
    // Of several mounts at one place, the last is the one that is seen.
    let mount = over.max_by_key(|m| m.place.len());
    Ok(mount.and_then(|m| controller.devices().find(|d| on(&m, d))).map(|d| d.name.clone()))
}

fn on(mount: &Mount<'_>, device: &BlockDevice) -> bool {
    mount.number == device.number || mount.source == format!("/dev/{}", device.name)
}

/// The devices below `/`, down to the lowest. A root that cannot be followed is a refusal; one that is
/// no block device (memory, network) is not, and btrfs and ZFS are looked for elsewhere.
pub fn root(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let path = "/proc/self/mountinfo";
    let text = host.read(path)?;
    let fail = |why: String| Unreadable { path: path.into(), why };
    let mount = text.lines().filter_map(parse).rfind(|m| m.place == "/");
    let mount = mount.ok_or_else(|| fail("no mount at / is listed there".into()))?;
    if mount.number.starts_with("0:") {
        return Ok(());
    }
    let mut open = Vec::new();
    for name in host.list("/sys/class/block")? {
        if host.read_if_there(&format!("/sys/class/block/{name}/dev"))?.as_deref() == Some(mount.number) {
            open.push(name);
        }
    }
    if open.is_empty() {
        return Err(fail(format!("the device {} of / is not among those of /sys/class/block", mount.number)));
    }
    let mut seen = open.clone();
    while let Some(name) = open.pop() {
        if controller.owns(&name) {
            out.push(Reason::new(Check::Boot, path, format!("/ stands on {name}")));
        }
        for lower in host.list(&format!("/sys/class/block/{name}/slaves"))? {
            if !seen.contains(&lower) {
                seen.push(lower.clone());
                open.push(lower);
            }
        }
    }
    Ok(())
}

/// The kernel's command line and the tables of `/etc` that name one of the controller's devices.
pub fn named(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let names = names(host, controller)?;
    let mut files = vec![("/proc/cmdline".to_owned(), Check::Boot)];
    files.extend(TABLES.map(|path| (path.to_owned(), Check::Configured)));
    for unit in host.list(UNITS)?.iter().filter(|u| u.ends_with(".mount") || u.ends_with(".swap")) {
        files.push((format!("{UNITS}/{unit}"), Check::Configured));
    }
    for (path, check) in files {
        let Some(text) = host.read_if_there(&path)? else {
            continue;
        };
        for line in text.lines().filter(|l| !l.trim_start().starts_with('#')) {
            if let Some(name) = names.iter().find(|n| line.split_whitespace().any(|token| means(token, &n.word))) {
                out.push(Reason::new(check, &path, format!("{} is named there as {}", name.device, name.word)));
            }
        }
    }
    Ok(())
}

/// True if `token` of a table means `word`: itself, or as the value of a key (`root=UUID=…`,
/// `What=/dev/…`, `cryptdevice=UUID=…:name`), or as a bare identifier (`rd.luks.uuid=luks-…`).
fn means(token: &str, word: &str) -> bool {
    let token = token.replace('"', "");
    let same =
        |t: &str| t.split([':', ',']).any(|part| part.eq_ignore_ascii_case(word)) || t.eq_ignore_ascii_case(word);
    if same(&token) || token.split_once('=').is_some_and(|(_, value)| same(value)) {
        return true;
    }
    let unique = word.strip_prefix("UUID=").or(word.strip_prefix("PARTUUID=")).filter(|id| id.len() >= 8);
    unique.is_some_and(|id| token.to_ascii_lowercase().contains(&id.to_ascii_lowercase()))
}

/// Processes that hold a node of the controller open.
pub fn opened(host: &Host, controller: &Controller, own_pid: u32, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    for pid in processes(host)? {
        if pid == own_pid.to_string() {
            continue;
        }
        let folder = format!("/proc/{pid}/fd");
        let fds = match host.list(&folder) {
            Ok(fds) => fds,
            Err(_) if !host.exists(&format!("/proc/{pid}")) => continue,
            Err(e) => return Err(e),
        };
        for fd in fds {
            let Ok(target) = host.link(&format!("{folder}/{fd}")) else {
                continue;
            };
            if let Some(name) = node(controller, &target.to_string_lossy()) {
                out.push(Reason::new(Check::Open, &folder, format!("process {pid} has /dev/{name} open")));
            }
            if target.as_os_str() == "anon_inode:[io_uring]" {
                registered(host, controller, &pid, &fd, out)?;
            }
        }
    }
    Ok(())
}

/// The node of the controller at a path below `/dev`: a namespace, a partition, or a node for commands.
fn node<'a>(controller: &Controller, path: &'a str) -> Option<&'a str> {
    let name = path.strip_prefix("/dev/")?;
    let generic = controller.name.as_ref().is_some_and(|c| {
        let commands = format!("{}n", c.trim_start_matches("nvme"));
        name == c || name.strip_prefix("ng").is_some_and(|n| n.starts_with(&commands))
    });
    (generic || controller.owns(name)).then_some(name)
}

/// Files registered with an io_uring stay open when their descriptors are closed.
fn registered(
    host: &Host,
    controller: &Controller,
    pid: &str,
    fd: &str,
    out: &mut Vec<Reason>,
) -> Result<(), Unreadable> {
    let path = format!("/proc/{pid}/fdinfo/{fd}");
    let text = match host.read(&path) {
        Ok(text) => text,
        Err(_) if !host.exists(&path) => return Ok(()),
        Err(e) => return Err(e),
    };
    let files = text.lines().filter_map(|l| l.split_once(": ")).map(|(_, file)| file.trim());
    for name in files.filter_map(|file| node(controller, file)) {
        out.push(Reason::new(Check::Open, &path, format!("process {pid} has /dev/{name} in an io_uring")));
    }
    Ok(())
}
