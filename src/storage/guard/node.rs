//! Device nodes by their numbers. A name says nothing: any folder may hold a node of any number, and
//! a node may be deleted while it is open.
//!
//! In a picture of a machine (tests) a plain file stands for a node: its number is what sysfs says of
//! its name, or what it holds itself, `b 259:11` or `c 241:1`; one that holds `on 259:11` is a file on
//! that device.

use std::cmp::Ordering;
use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use nix::errno::Errno;

use super::ask::{self, Answer};
use super::host::{Host, Unreadable};

/// Links followed before a path counts as a circle, as in the kernel.
const LINKS_MAX: usize = 40;

/// `major:minor` of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Number {
    /// The driver's part.
    pub major: u32,
    /// The device's part.
    pub minor: u32,
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for Number {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.trim().split_once(':').ok_or(())?;
        Ok(Self { major: major.parse().map_err(|_| ())?, minor: minor.parse().map_err(|_| ())? })
    }
}

/// What a path leads to, every link followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// A block device.
    Block(Number),
    /// A character device.
    Char(Number),
    /// Neither; the number is that of the file system it lies on, where it is known.
    File(Option<Number>),
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block(number) => write!(f, "the node of block device {number}"),
            Self::Char(number) => write!(f, "the node of character device {number}"),
            Self::File(_) => f.write_str("no node of a device"),
        }
    }
}

impl Node {
    /// What an open file is.
    pub fn of(meta: &Metadata) -> Self {
        let number = |n: u64| Number { major: libc::major(n), minor: libc::minor(n) };
        match meta.file_type() {
            kind if kind.is_block_device() => Self::Block(number(meta.rdev())),
            kind if kind.is_char_device() => Self::Char(number(meta.rdev())),
            _ => Self::File(Some(number(meta.dev()))),
        }
    }

    /// An error that says what `path` is, unless it is this node.
    ///
    /// # Errors
    /// That it is another one, or none.
    pub fn must_be(self, path: &str, found: Self) -> io::Result<()> {
        if self == found {
            return Ok(());
        }
        let what = format!(
            "{path} is {found}, and by sysfs it must be {self}; remove it and have udev make it anew (`udevadm trigger --action=add`)"
        );
        Err(io::Error::new(io::ErrorKind::InvalidData, what))
    }
}

/// What a loop device stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backing {
    /// The device with the file system that the file lies on.
    pub on: Number,
    /// The block device itself, if it is one.
    pub device: Number,
}

impl Host {
    /// What `path` leads to; `None` where nothing is there.
    pub fn node(&self, path: &str) -> Result<Option<Node>, Unreadable> {
        self.nodes(&[path.to_owned()])?.pop().unwrap_or(Ok(None))
    }

    /// What each of `paths` leads to. Servers that do not answer keep nobody: see `ask`.
    ///
    /// # Errors
    /// If one of them got no answer; nothing is known of any then.
    pub fn nodes(&self, paths: &[String]) -> Result<Vec<Answer>, Unreadable> {
        if self.is_real() { ask::nodes(paths) } else { Ok(paths.iter().map(|p| self.pictured(p)).collect()) }
    }

    /// Opens `path` if it is the node `expected`. A name below `/dev` is what somebody made of it: it is looked at
    /// before anything is opened, and what is opened then is what was looked at, and is looked at again.
    ///
    /// # Errors
    /// Those of the system, or that the path is another device's node or no node.
    pub fn open_node(&self, path: &str, expected: Node, options: &OpenOptions) -> io::Result<File> {
        if !self.is_real() {
            let found = self.pictured(path).map_err(io::Error::other)?.ok_or(io::ErrorKind::NotFound)?;
            expected.must_be(path, found)?;
            return options.open(self.real(path));
        }
        // O_PATH opens the name and not the device.
        let seen = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)?;
        expected.must_be(path, Node::of(&seen.metadata()?))?;
        let file = options.open(format!("/proc/self/fd/{}", seen.as_raw_fd()))?;
        expected.must_be(path, Node::of(&file.metadata()?))?;
        Ok(file)
    }

    /// Opens `/dev/NAME` if it is the node of the block device that sysfs gives the number `number`, `259:3`.
    ///
    /// # Errors
    /// As [`Host::open_node`].
    pub fn open_block(&self, name: &str, number: &str, options: &OpenOptions) -> io::Result<File> {
        let expected = super::nodes::number(number, &format!("/sys/class/block/{name}/dev"));
        self.open_node(&format!("/dev/{name}"), Node::Block(expected.map_err(io::Error::other)?), options)
    }

    /// True if two paths lead to the same file or folder.
    pub fn is_same(&self, a: &str, b: &str) -> Result<bool, Unreadable> {
        use std::os::unix::fs::MetadataExt;
        let place = |path: &str| {
            let real = if self.is_real() { PathBuf::from(path) } else { self.follow(path).unwrap_or_default() };
            let meta = std::fs::metadata(real).map_err(|e| Self::fail(path, &e))?;
            Ok((meta.dev(), meta.ino()))
        };
        Ok(place(a)? == place(b)?)
    }

    /// What the loop device `name` stands on, by the kernel's word; `None` where it stands on nothing. It is asked
    /// through its node, which must have the number that sysfs tells: one that is missing or another device's says
    /// nothing of this one.
    ///
    /// # Errors
    /// That it cannot be asked.
    pub fn loop_backing(&self, name: &str) -> Result<Option<Backing>, Unreadable> {
        let path = format!("/dev/{name}");
        let fail = |e: io::Error| {
            let cure = "have udev make its node anew (`udevadm trigger --action=add`), or detach it (`losetup -d`)";
            Unreadable { why: format!("what {name} stands on cannot be asked: {e}; {cure}"), ..Self::fail(&path, &e) }
        };
        if !self.is_real() {
            let text = self.read_if_there(&path)?.unwrap_or_default();
            let mut words = text.split_whitespace();
            let numbers = words.next() == Some("loop");
            let mut number = || words.next().and_then(|w| w.parse().ok());
            let found = number().zip(number()).filter(|_| numbers).map(|(device, on)| Backing { on, device });
            return found.map(Some).ok_or_else(|| fail(io::ErrorKind::NotFound.into()));
        }
        let number = self.read(&format!("/sys/class/block/{name}/dev"))?;
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        match self.open_block(name, &number, &options) {
            Ok(file) => loop_status(&file).map_err(fail),
            // It is being taken down.
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(e) => Err(fail(e)),
        }
    }

    /// Where `path` lies in a picture, with every link followed inside of it.
    fn follow(&self, path: &str) -> Option<PathBuf> {
        self.walk(path, &mut |_| ())
    }

    /// Where `path` lies, with every link followed below the root; `visit` sees each folder, link and file on the way.
    pub(super) fn walk(&self, path: &str, visit: &mut impl FnMut(&str)) -> Option<PathBuf> {
        let mut left: Vec<PathBuf> = vec![PathBuf::from(path)];
        let (mut at, mut links) = (PathBuf::from("/"), 0);
        while let Some(part) = left.pop() {
            let mut parts = part.components();
            let Some(first) = parts.next() else { continue };
            left.push(parts.as_path().to_path_buf());
            match first {
                Component::RootDir => at = PathBuf::from("/"),
                Component::ParentDir => drop(at.pop()),
                Component::Normal(name) => {
                    at.push(name);
                    visit(at.to_str()?);
                    let Ok(target) = std::fs::read_link(self.real(at.to_str()?)) else { continue };
                    links += 1;
                    if links > LINKS_MAX {
                        return None;
                    }
                    at.pop();
                    left.push(target);
                }
                _ => {}
            }
        }
        Some(self.real(at.to_str()?))
    }

    fn pictured(&self, path: &str) -> Result<Option<Node>, Unreadable> {
        let Some(real) = self.follow(path).filter(|p| p.exists()) else { return Ok(None) };
        let name = real.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if real.starts_with(self.real("/dev")) {
            for (class, block) in [("block", true), ("nvme-generic", false), ("nvme", false)] {
                let number = self.read_if_there(&format!("/sys/class/{class}/{name}/dev"))?;
                if let Some(number) = number.and_then(|n| n.parse().ok()) {
                    return Ok(Some(if block { Node::Block(number) } else { Node::Char(number) }));
                }
            }
        }
        let text = if real.is_file() { start(&real).map_err(|e| Self::fail(path, &e))? } else { String::new() };
        let said = text.split_once(' ').and_then(|(kind, number)| Some((kind, number.parse().ok()?)));
        Ok(Some(match said {
            Some(("b", number)) => Node::Block(number),
            Some(("c", number)) => Node::Char(number),
            Some(("on", number)) => Node::File(Some(number)),
            _ => Node::File(None),
        }))
    }
}

/// The first bytes of a file as text.
fn start(path: &Path) -> io::Result<String> {
    use io::Read;
    let mut bytes = Vec::new();
    File::open(path)?.take(32).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    rest: [u8; 208],
}

const _: () = assert!(size_of::<LoopInfo>() == 232);

/// `linux/loop.h`.
mod ioctl {
    nix::ioctl_read_bad!(loop_get_status64, 0x4c05, super::LoopInfo);
}

fn loop_status(file: &File) -> io::Result<Option<Backing>> {
    let mut info = LoopInfo { device: 0, inode: 0, rdevice: 0, rest: [0; 208] };
    // SAFETY: the call writes one `struct loop_info64`, whose size is asserted above, to `info`.
    match unsafe { ioctl::loop_get_status64(file.as_raw_fd(), &raw mut info) } {
        Ok(_) => {}
        // No file is set up.
        Err(Errno::ENXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    }
    let number = |n: u64| Number { major: libc::major(n), minor: libc::minor(n) };
    Ok(Some(Backing { on: number(info.device), device: number(info.rdevice) }))
}

/// How the tables of descriptors of two threads stand in the kernel's order of them; equal, if it is one table. `None`
/// where it cannot be told.
pub fn compare_files(a: &str, b: &str) -> Option<Ordering> {
    const KCMP_FILES: libc::c_int = 2;
    let (a, b) = (a.parse::<libc::pid_t>().ok()?, b.parse::<libc::pid_t>().ok()?);
    // SAFETY: a comparison by the kernel that takes only numbers.
    match unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_FILES, 0, 0) } {
        0 => Some(Ordering::Equal),
        1 => Some(Ordering::Less),
        2 => Some(Ordering::Greater),
        _ => None,
    }
}

/// Whether two descriptors, each with its thread, are of one open file; false where that cannot be told.
pub fn is_one_file(a: &(String, String), b: &(String, String)) -> bool {
    const KCMP_FILE: libc::c_int = 0;
    let number = |text: &String| text.parse::<libc::c_int>().ok();
    let (Some(a_tid), Some(a_fd), Some(b_tid), Some(b_fd)) = (number(&a.0), number(&a.1), number(&b.0), number(&b.1))
    else {
        return false;
    };
    // SAFETY: a comparison by the kernel that takes only numbers.
    unsafe { libc::syscall(libc::SYS_kcmp, a_tid, b_tid, KCMP_FILE, a_fd, b_fd) == 0 }
}
