//! What cannot be seen from where this program runs. A user of a drive that cannot be seen is not
//! one that is absent, so each of these is a refusal.

use super::host::{Host, Unreadable};
use super::open::processes;
use super::{Check, Reason};

/// The number of the namespaces that the machine starts with (`include/linux/proc_ns.h`).
const FIRST: [(&str, &str); 2] = [("pid", "pid:[4026531836]"), ("user", "user:[4026531837]")];
/// Parts of the kernel that hand on or use drives, and the folder or file that lists what they have.
const LISTS: [(&str, &str); 6] = [
    ("nvmet", "/sys/kernel/config/nvmet/subsystems"),
    ("target_core_mod", "/sys/kernel/config/target/core"),
    ("scst", "/sys/kernel/scst_tgt/devices"),
    ("zfs", "/proc/spl/kstat/zfs"),
    ("usb_f_mass_storage", "/sys/kernel/config/usb_gadget"),
    ("ocfs2_nodemanager", "/sys/kernel/config/cluster"),
];
/// Where what is exported by configfs is shown, once it is mounted.
const CONFIGFS: &str = "/sys/kernel/config";
/// Folders that every Linux with a block layer has.
const FOLDERS: [&str; 3] = ["/sys/block", "/sys/class/block", "/sys/module"];
/// Folders with tables or nodes.
const SHARED: [&str; 6] = ["/", "/etc", "/dev", "/run", "/usr", "/boot"];
/// What is read below `/proc` and `/sys`; a mount over one of these hides the machine's own.
const COVERED: [&str; 12] = [
    "/proc/swaps",
    "/proc/mdstat",
    "/proc/cmdline",
    "/proc/self",
    "/proc/spl",
    "/sys/block",
    "/sys/bus",
    "/sys/class",
    "/sys/devices",
    "/sys/fs/btrfs",
    "/sys/module",
    "/sys/power",
];

/// Everything that hides users of drives from this process.
pub fn hidden(host: &Host, out: &mut Vec<Reason>) -> Result<(), Unreadable> {
    let mut add = |path: &str, what: String| out.push(Reason::new(Check::Unreadable, path, what));
    for (kind, first) in FIRST {
        let path = format!("/proc/self/ns/{kind}");
        let found = match host.link(&path) {
            // A kernel without user namespaces has nothing to tell of them.
            Err(e) if kind == "user" && e.is_gone() => continue,
            found => found?,
        };
        if found.as_os_str() != first {
            let what = format!(
                "nt runs in a {kind} namespace of its own ({}), where the machine's processes cannot be seen; run it outside of the container",
                found.display()
            );
            add(&path, what);
        }
    }
    for folder in FOLDERS.iter().filter(|f| !host.exists(f)) {
        add(folder, "there is no such folder; is sysfs mounted?".into());
    }
    for (module, list) in LISTS.iter().filter(|(_, list)| !host.exists(list)) {
        let loaded = host.exists(&format!("/sys/module/{module}"));
        let built_in = !loaded && is_built_in(host, module)?;
        if loaded || built_in {
            let how = if loaded { "loaded" } else { "built into the kernel" };
            let what = format!(
                "the module {module} is {how}, but what it exports or holds is not shown there; mount configfs (`mount -t configfs none /sys/kernel/config`) or remove the module"
            );
            add(list, what);
        }
    }
    if !processes(host)?.iter().any(|pid| pid == "1") {
        add("/proc", "process 1 is not shown there: other users' processes are hidden; run as root".into());
    }
    // The kernel's word on when the machine started is another one there, and with it the age of what exports lead to.
    let (path, first) = ("/proc/self/ns/time", "time:[4026531834]");
    match host.link(path) {
        Err(e) if e.is_gone() => {}
        found if found.as_ref().is_ok_and(|f| f.as_os_str() == first) => {}
        found => {
            let what = format!("nt runs in a time namespace of its own ({}); run it outside of that", found?.display());
            add(path, what);
        }
    }
    mounts(host, &mut add)?;
    tables(host, &mut add)
}

/// Whether the kernel has a module built in, which `/sys/module` shows only if it has parameters. Without the kernel's
/// list of those, each that shows itself through a configfs of the same kind may be.
fn is_built_in(host: &Host, module: &str) -> Result<bool, Unreadable> {
    let release = host.read_if_there("/proc/sys/kernel/osrelease")?.unwrap_or_default();
    let list = ["/lib", "/usr/lib"].map(|lib| format!("{lib}/modules/{release}/modules.builtin"));
    if let Some(list) = list.iter().find(|l| host.exists(l)) {
        return Ok(host.read(list)?.lines().any(|l| l.ends_with(&format!("/{module}.ko"))));
    }
    let shown = LISTS.iter().any(|(m, list)| *m == module && list.starts_with(CONFIGFS));
    let has = |path: &str, word: &str| -> Result<bool, Unreadable> {
        let text = host.read_if_there(path)?.unwrap_or_default();
        Ok(text.lines().any(|l| l.split_whitespace().any(|w| w == word)))
    };
    let mounts = host.read("/proc/self/mountinfo")?;
    let mounted = mounts.lines().filter_map(super::mounts::parse).any(|m| m.kind == "configfs" && m.place == CONFIGFS);
    Ok(shown && !mounted && has("/proc/filesystems", "configfs")? && !has("/proc/modules", "configfs")?)
}

/// Mounts over what is read, and a `/proc` that shows only a part.
fn mounts(host: &Host, add: &mut impl FnMut(&str, String)) -> Result<(), Unreadable> {
    let path = "/proc/self/mountinfo";
    for mount in host.read(path)?.lines().filter_map(super::mounts::parse) {
        let process = |p: &str| p.strip_prefix("/proc/").is_some_and(|r| r.starts_with(|c: char| c.is_ascii_digit()));
        let covers = COVERED.iter().any(|c| mount.place == *c || mount.place.starts_with(&format!("{c}/")));
        if covers || process(&mount.place) {
            add(
                path,
                format!("a {} is mounted over {}, which hides what the kernel says there", mount.kind, mount.place),
            );
        }
        if mount.place == "/proc" && mount.options.split(',').any(|o| o.starts_with("subset=")) {
            add(path, "/proc is mounted with subset=, which shows only a part".into());
        }
    }
    Ok(())
}

/// Tables and nodes are the machine's only where its first process sees the same folders. A namespace of our own may
/// have a mount over one file, which the folders do not show.
fn tables(host: &Host, add: &mut impl FnMut(&str, String)) -> Result<(), Unreadable> {
    let (own, first) = ("/proc/self/ns/mnt", "/proc/1/ns/mnt");
    if let (Ok(ours), Ok(theirs)) = (host.link(own), host.link(first))
        && ours != theirs
    {
        let what = "nt runs in a mount namespace of its own, where files may be mounted over the machine's tables; run it from a login shell or as `sudo nsenter --target 1 --mount nt device …`; a systemd service has such a namespace by PrivateTmp=, ProtectSystem=, ProtectHome= and the like: bind in a unit without them, and run the model in one that has them";
        add(own, what.into());
        return Ok(());
    }
    for folder in SHARED.iter().filter(|f| host.exists(f)) {
        let theirs = format!("/proc/1/root{folder}");
        if !host.is_same(&theirs, folder)? {
            let what = format!(
                "nt runs in a chroot, a container or a mount namespace whose {folder} is not the machine's, so its tables and nodes are not seen"
            );
            add(&theirs, what);
            break;
        }
    }
    Ok(())
}
