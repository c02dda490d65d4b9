//! Everything by which binding changes the machine goes through [`Kernel`], so that a test can stand in for
//! the kernel and stop or fail at each change.

use std::fs::{self, File, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::super::guard::Host;
use super::super::guard::node::{Node, Number};
use super::{GROUP, child};

/// How long a driver's last moments may take before the kernel is left to them.
const UNBIND: Duration = Duration::from_secs(30);
/// How long other attributes may take.
const ATTRIBUTE: Duration = Duration::from_secs(5);

/// What is asked of the running kernel.
pub trait Kernel {
    /// Is called before each change of the machine with what it will be; an error stops it.
    fn about_to(&self, what: &str) -> Result<()>;

    /// Writes to an attribute of sysfs. [`std::io::ErrorKind::TimedOut`] means that the kernel is still at it.
    fn write(&self, host: &Host, path: &str, text: &str) -> Result<()>;

    /// Reads an attribute whose reading may wait for the device's lock.
    fn read(&self, host: &Host, path: &str) -> Result<String>;

    /// Loads a module.
    fn load_module(&self, name: &str) -> Result<()>;

    /// Opens the node of a VFIO group, and nothing more. EBUSY means that somebody uses the group.
    fn open_group(&self, node: &Path) -> Result<File>;

    /// Gives a node to the group `nt`, if it is a character device and, where `number` is known, that one; false if there is
    /// no such group.
    fn hand_over(&self, node: &Path, number: Option<Number>) -> Result<bool>;

    /// Time since some moment.
    fn now(&self) -> Duration;

    /// Waits a little.
    fn pause(&self);
}

/// The kernel of this machine.
#[derive(Debug)]
pub struct Running {
    began: Instant,
    #[cfg(debug_assertions)]
    changes: std::cell::Cell<u32>,
}

impl Default for Running {
    fn default() -> Self {
        Running {
            began: Instant::now(),
            #[cfg(debug_assertions)]
            changes: std::cell::Cell::new(0),
        }
    }
}

impl Kernel for Running {
    fn about_to(&self, what: &str) -> Result<()> {
        tracing::debug!("changing: {what}");
        #[cfg(debug_assertions)]
        self.kill_in_test();
        Ok(())
    }

    fn write(&self, host: &Host, path: &str, text: &str) -> Result<()> {
        let file = OpenOptions::new().write(true).custom_flags(libc::O_CLOEXEC).open(host.real(path))?;
        let limit = if path.ends_with("/unbind") { UNBIND } else { ATTRIBUTE };
        child::write(&file, text, limit)
    }

    fn read(&self, host: &Host, path: &str) -> Result<String> {
        child::read(&File::open(host.real(path))?, ATTRIBUTE)
    }

    fn load_module(&self, name: &str) -> Result<()> {
        let mut command = Command::new("modprobe");
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let out = command.args(["--", name]).stdin(Stdio::null()).output()?;
        if out.status.success() {
            return Ok(());
        }
        Err(Error::other(String::from_utf8_lossy(&out.stderr).trim().to_owned()))
    }

    fn open_group(&self, node: &Path) -> Result<File> {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK).open(node)
    }

    fn hand_over(&self, node: &Path, number: Option<Number>) -> Result<bool> {
        let Ok(Some(group)) = nix::unistd::Group::from_name(GROUP) else {
            return Ok(false);
        };
        give(node, number, group.gid.as_raw())?;
        Ok(true)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn pause(&self) {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Gives a character device to root and `group`, mode 0660. What was looked at is what is given, whatever its name leads to
/// meanwhile; a link is not followed, and the node is not opened for more than its name.
fn give(node: &Path, number: Option<Number>, group: u32) -> Result<()> {
    let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let found = OpenOptions::new().read(true).custom_flags(flags).open(node)?;
    let is = Node::of(&found.metadata()?);
    match (is, number) {
        (Node::Char(_), None) => {}
        (_, Some(number)) => Node::Char(number).must_be(&node.display().to_string(), is)?,
        _ => return Err(Error::new(ErrorKind::InvalidData, format!("{} is {is}", node.display()))),
    }
    let open = format!("/proc/self/fd/{}", found.as_raw_fd());
    chown(&open, Some(0), Some(group))?;
    fs::set_permissions(&open, fs::Permissions::from_mode(0o660))
}

#[cfg(debug_assertions)]
impl Running {
    /// Sends this process a signal before its change number n, for the tests in a virtual machine:
    /// `NT_TEST_KILL_AT=n:SIGKILL`. Not in release builds.
    fn kill_in_test(&self) {
        self.changes.set(self.changes.get() + 1);
        let Ok(wanted) = std::env::var("NT_TEST_KILL_AT") else { return };
        let Some((n, signal)) = wanted.split_once(':') else { return };
        if let (Ok(n), Ok(signal)) = (n.parse::<u32>(), signal.parse::<nix::sys::signal::Signal>())
            && self.changes.get() == n
        {
            eprintln!("test: {signal} before change {n}");
            let _ = nix::sys::signal::raise(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Root gave away what a name led to: a link's target, a file, another group's node. What is no node of that number
    /// keeps owner and mode.
    #[test]
    fn only_the_node_itself_is_given_away() {
        use std::os::unix::fs::{MetadataExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("file"), "x").unwrap();
        fs::set_permissions(at("file"), fs::Permissions::from_mode(0o600)).unwrap();
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        symlink("/dev/null", at("link to a device")).unwrap();
        symlink(at("file"), at("link to a file")).unwrap();
        let null = fs::metadata("/dev/null").unwrap();
        let number = Number { major: 1, minor: 3 };
        for name in ["file", "fifo", "link to a device", "link to a file", "nowhere"] {
            for number in [None, Some(number), Some(Number { major: 241, minor: 0 })] {
                assert!(give(&at(name), number, null.gid()).is_err(), "{name}");
            }
        }
        let other = Number { major: 241, minor: 7 };
        let e = give(Path::new("/dev/null"), Some(other), null.gid()).unwrap_err().to_string();
        assert!(e.contains("character device 1:3") && e.contains("241:7"), "{e}");
        let after = fs::metadata("/dev/null").unwrap();
        assert_eq!((after.mode(), after.uid(), after.gid()), (null.mode(), null.uid(), null.gid()));
        assert_eq!(fs::metadata(at("file")).unwrap().mode() & 0o777, 0o600);
    }
}
