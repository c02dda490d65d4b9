//! Who mounts, swaps to, boots from or keeps open a block device, in every mount namespace.

use super::host::{Host, Unreadable};
use super::sysfs::{BlockDevice, Controller};
use super::{Check, Reason};

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
            let ours = mount.number == device.number || mount.source == format!("/dev/{}", device.name);
            if ours && !seen.contains(&mount.place.to_owned()) {
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

/// The kernel's command line and the tables of `/etc` that name one of the controller's devices,
/// by name or through a link of `/dev/disk`.
pub fn named(host: &Host, controller: &Controller, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let mut words: Vec<(String, String)> =
        controller.devices().map(|d| (format!("/dev/{}", d.name), d.name.clone())).collect();
    for (folder, key) in
        [("by-uuid", "UUID"), ("by-partuuid", "PARTUUID"), ("by-label", "LABEL"), ("by-id", ""), ("by-path", "")]
    {
        let base = format!("/dev/disk/{folder}");
        for name in host.list(&base)? {
            if let Some(device) = host.link_name(&format!("{base}/{name}")).filter(|d| controller.owns(d)) {
                words.push((format!("{base}/{name}"), device.clone()));
                if !key.is_empty() {
                    words.push((format!("{key}={name}"), device));
                }
            }
        }
    }
    for (path, check) in [
        ("/proc/cmdline", Check::Boot),
        ("/etc/fstab", Check::Configured),
        ("/etc/crypttab", Check::Configured),
        ("/etc/mdadm.conf", Check::Configured),
        ("/etc/mdadm/mdadm.conf", Check::Configured),
    ] {
        let Some(text) = host.read_if_there(path)? else {
            continue;
        };
        for line in text.lines().filter(|l| !l.trim_start().starts_with('#')) {
            for token in line.split_whitespace() {
                let token = token.trim_matches('"');
                let value = token.split_once("=/dev").map_or(token, |(key, _)| &token[key.len() + 1..]);
                let hit = words.iter().find(|(w, _)| {
                    value.eq_ignore_ascii_case(w)
                        || token
                            .strip_prefix("root=")
                            .or(token.strip_prefix("resume="))
                            .is_some_and(|v| v.eq_ignore_ascii_case(w))
                });
                if let Some((word, device)) = hit {
                    out.push(Reason::new(check, path, format!("{device} is named there as {word}")));
                }
            }
        }
    }
    Ok(())
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
            let Some(name) = target.to_str().and_then(|t| t.strip_prefix("/dev/")) else {
                continue;
            };
            let generic = controller.name.as_ref().is_some_and(|c| {
                name == c
                    || name
                        .strip_prefix("ng")
                        .is_some_and(|n| n.starts_with(&format!("{}n", c.trim_start_matches("nvme"))))
            });
            if generic || controller.owns(name) {
                out.push(Reason::new(Check::Open, &folder, format!("process {pid} has /dev/{name} open")));
            }
        }
    }
    Ok(())
}
