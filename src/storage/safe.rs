//! Files in places where other users may interfere: opened without blocking and only if they are of the
//! expected kind, read up to a limit, and replaced whole, under a random name until they are complete.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl, readlinkat};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};

/// Mode bits that let the group or everybody write.
const OTHERS_WRITE: u32 = 0o022;

fn refuse(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, what.into())
}

/// Opens a regular file or a block device for reading, links followed. Anything else, such as a FIFO or a
/// device whose opening has an effect, is refused without being opened.
///
/// # Errors
/// Those of the system, or that the file is of another kind.
pub fn open(path: &Path) -> Result<File> {
    open_with(path, 0)
}

/// As [`open`], with more flags of `open(2)`.
///
/// # Errors
/// As [`open`].
pub fn open_with(path: &Path, flags: i32) -> Result<File> {
    open_if(path, flags, &|_| Ok(()))
}

/// As [`open_with`], of what `right` has no objection to: it is asked before the file is opened, and of what was opened.
///
/// # Errors
/// As [`open`], and those of `right`.
pub fn open_if(path: &Path, flags: i32, right: &dyn Fn(&Metadata) -> Result<()>) -> Result<File> {
    // O_PATH opens the name and not the file: the kind is known before the file's own code runs.
    let found = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)?;
    let meta = found.metadata()?;
    let kind = meta.file_type();
    if kind.is_dir() {
        return Err(Error::from(ErrorKind::IsADirectory));
    }
    right(&meta)?;
    if !kind.is_file() && !kind.is_block_device() {
        return Err(refuse("it is neither a regular file nor a block device"));
    }
    let again = format!("/proc/self/fd/{}", found.as_raw_fd());
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | flags).open(again);
    // The file is there and open: what was not found is /proc.
    let file = file.map_err(|e| match e.kind() {
        ErrorKind::NotFound => {
            refuse("files are opened through /proc, which is not mounted here; mount -t proc proc /proc")
        }
        _ => e,
    })?;
    right(&file.metadata()?)?;
    blocking(&file)?;
    Ok(file)
}

/// Links followed before a name counts as a circle, as in the kernel.
const LINKS_MAX: usize = 40;

/// What lies where a file is to be written.
enum Output {
    /// Something that may be written, opened by its name alone.
    There(File, Metadata),
    /// Nothing, at this path.
    Missing(PathBuf),
}

/// Looks what lies there, before it is opened. A block device, whose contents would be lost, is refused; for root, so is a link
/// that somebody else laid.
fn output(path: &Path) -> Result<Output> {
    let mut at = path.to_path_buf();
    for _ in 0..LINKS_MAX {
        let look = |flags| OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC | flags).open(&at);
        let mut found = match look(libc::O_NOFOLLOW) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Output::Missing(at)),
            found => found?,
        };
        let mut meta = found.metadata()?;
        if meta.is_symlink() {
            if nix::unistd::geteuid().is_root() && meta.uid() != 0 {
                return Err(refuse(format!("a link of user {} lies there, which root does not follow", meta.uid())));
            }
            if !fstatfs(&found).is_ok_and(|f| f.filesystem_type() == PROC_SUPER_MAGIC) {
                let target = readlinkat(&found, c"").map_err(Error::from)?;
                at = at.parent().unwrap_or(Path::new("/")).join(target);
                continue;
            }
            // Links of /proc lead to open files, which need have no path.
            found = look(0)?;
            meta = found.metadata()?;
        }
        if meta.file_type().is_block_device() {
            return Err(refuse("it is a block device, whose contents would be lost; name a file"));
        }
        return Ok(Output::There(found, meta));
    }
    Err(refuse("too many links lie there"))
}

/// Whether [`create`] would refuse what lies there now, which is not touched.
///
/// # Errors
/// Why it would.
pub fn may_create(path: &Path) -> Result<()> {
    output(path).map(|_| ())
}

/// Opens a file for writing, emptied, and makes it where it is not there. What lies there is looked at before it is opened, and
/// what is opened is what was looked at, however late it took the file's name.
///
/// # Errors
/// Those of the system, that it is a block device, or, for root, a link that somebody else laid.
pub fn create(path: &Path) -> Result<File> {
    for _ in 0..LINKS_MAX {
        match output(path)? {
            Output::There(_, meta) if meta.is_dir() => return Err(Error::from(ErrorKind::IsADirectory)),
            Output::There(found, meta) => {
                let again = format!("/proc/self/fd/{}", found.as_raw_fd());
                return OpenOptions::new().write(true).truncate(meta.is_file()).open(again);
            }
            Output::Missing(at) => match OpenOptions::new().write(true).create_new(true).open(at) {
                // Somebody has laid something there meanwhile.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                made => return made,
            },
        }
    }
    Err(refuse("what lies there changes all the time"))
}

/// Takes O_NONBLOCK away: it was for opening alone.
fn blocking(file: &File) -> Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(())
}

/// What was read of a file, and who may have written it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Owner.
    pub uid: u32,
    /// Whether its group or everybody may write it.
    pub others_write: bool,
}

/// Reads a regular file of at most `limit` bytes. A link in place of the file is an error.
///
/// # Errors
/// Those of the system, or that the file is of another kind or longer.
pub fn read(path: &Path, limit: u64) -> Result<Contents> {
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NOCTTY;
    // The kind is looked at first, since opening some devices has an effect. Both looks must agree.
    let before = fs::symlink_metadata(path)?;
    if !before.is_file() {
        return Err(refuse("it is no regular file"));
    }
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(refuse("it is no regular file"));
    }
    let long = || refuse(format!("it has more than {limit} bytes"));
    if meta.len() > limit {
        return Err(long());
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize);
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(long());
    }
    Ok(Contents { bytes, uid: meta.uid(), others_write: meta.mode() & OTHERS_WRITE != 0 })
}

/// Puts `bytes` at `path` with `mode`: written under a random name in the same folder, synced, then renamed. A
/// link at `path` is replaced, not followed. `prefix` begins the random name, so that what a killed
/// process left can be told.
///
/// # Errors
/// Those of the system; `path` is then as it was.
pub fn replace(path: &Path, bytes: &[u8], mode: u32, prefix: &str) -> Result<()> {
    let folder = path.parent().ok_or_else(|| refuse("it has no folder"))?;
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    // O_EXCL, and mode 0600 until it is complete.
    let mut file = tempfile::Builder::new().prefix(prefix).suffix(".part").tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().set_permissions(Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    sync_folder(folder)
}

/// Makes the names in a folder durable.
///
/// # Errors
/// Those of the system.
pub fn sync_folder(folder: &Path) -> Result<()> {
    let flags = libc::O_DIRECTORY | libc::O_CLOEXEC;
    OpenOptions::new().read(true).custom_flags(flags).open(folder)?.sync_all()
}

/// An open folder: names in it are found there, whatever becomes of its own name.
#[derive(Debug)]
pub struct Folder(File);

impl Folder {
    /// The path of a name in the folder, for this process alone.
    pub fn at(&self, name: &str) -> std::path::PathBuf {
        format!("/proc/self/fd/{}/{name}", self.0.as_raw_fd()).into()
    }
}

/// Makes `path` a folder that belongs to this user and that nobody else may write; an older one that others
/// could write loses that right. Its parent must exist. A folder that is `shared` is open to all readers.
///
/// # Errors
/// Those of the system, or that it is a link, no folder, or another user's.
pub fn own_folder(path: &Path, shared: bool) -> Result<Folder> {
    match fs::DirBuilder::new().mode(0o755).create(path) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let folder = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|e| match path.is_symlink() {
        true => refuse("a link lies in place of the folder; move it away"),
        false => e,
    })?;
    let meta = folder.metadata()?;
    let me = nix::unistd::geteuid().as_raw();
    if meta.uid() == 0 && me != 0 {
        return Err(ErrorKind::PermissionDenied.into());
    }
    if meta.uid() != me {
        return Err(refuse(format!("the folder belongs to user {}, not to user {me}; move it away", meta.uid())));
    }
    let mode = meta.mode() & 0o7777;
    let wanted = if shared { 0o755 } else { mode & !OTHERS_WRITE };
    if mode != wanted {
        folder.set_permissions(Permissions::from_mode(wanted))?;
    }
    Ok(Folder(folder))
}

/// Makes a folder, and those above it, for files that only cost time to make again. Root's must lie where root alone may
/// write: with sudo, `HOME` may be another user's, whose links would lead root anywhere.
///
/// # Errors
/// As [`own_folder`], or that others could write there.
pub fn cache_folder(path: &Path) -> Result<Folder> {
    let lowest = path.ancestors().find(|p| p.symlink_metadata().is_ok());
    if nix::unistd::geteuid().is_root() && !lowest.is_some_and(is_ours_alone) {
        return Err(refuse(format!("{} is not root's alone, so root keeps nothing there", path.display())));
    }
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    own_folder(path, false)
}

/// Whether nobody but root and this user can change what lies at `path`: the folder and all above it
/// belong to one of them, and nobody else may write there (in a sticky folder, such as `/tmp`, others cannot
/// replace what is not theirs).
pub fn is_ours_alone(path: &Path) -> bool {
    let me = nix::unistd::geteuid().as_raw();
    let Ok(real) = path.canonicalize() else { return false };
    real.ancestors().enumerate().all(|(up, folder)| {
        let Ok(meta) = fs::symlink_metadata(folder) else { return false };
        let closed = meta.mode() & OTHERS_WRITE == 0 || up > 0 && meta.mode() & libc::S_ISVTX != 0;
        meta.is_dir() && (meta.uid() == 0 || meta.uid() == me) && closed
    })
}

#[cfg(test)]
pub(crate) mod tests;
