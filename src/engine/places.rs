//! Where the kernel finds a copy of a model: whole files, a mounted file system of a drive, or a
//! staged image.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::error::{CopyError, Differs, EngineError, NoCopy};
use super::staged::Image;
use crate::gguf::Gguf;
use crate::storage::Part;
use crate::storage::guard::node::{Node, Number};
use crate::storage::guard::{Controller, Host, sysfs};
use crate::storage::manifest::Manifest;
use crate::storage::safe;

/// Where a copy of the model lies that the kernel reads.
pub(super) struct Located {
    /// Each shard's place.
    pub parts: Vec<Part>,
    /// What an image says of each shard, if the model is staged.
    pub manifests: Vec<Manifest>,
    /// Whether a drive was named, not a file or directory.
    pub on_drive: bool,
}

impl Located {
    /// For the user: the folder of whole files, or the file.
    pub fn shown(&self) -> String {
        let Some(first) = self.parts.first() else { return String::new() };
        let whole = first.within.is_none();
        let folder = first.path.parent().filter(|_| whole && (self.on_drive || self.parts.len() > 1));
        folder.unwrap_or(&first.path).display().to_string()
    }

    /// Whether both are one file.
    pub fn same(&self, other: &Located) -> bool {
        use std::os::unix::fs::MetadataExt;
        let id = |l: &Located| {
            let part = l.parts.first()?;
            let meta = std::fs::metadata(&part.path).ok()?;
            Some((meta.dev(), meta.ino(), part.within))
        };
        id(self).is_some() && id(self) == id(other)
    }
}

/// Finds the model at a place that the kernel reads.
pub(super) fn locate(host: &Host, gguf: &Gguf, target: &Path) -> Result<Located, EngineError> {
    let name = target.to_string_lossy();
    let whole = |paths: Vec<PathBuf>| paths.into_iter().map(Part::whole).collect();
    if name == "auto" {
        return match gguf.shards.iter().find(|s| !s.path.exists()) {
            None => Ok(Located {
                parts: gguf.shards.iter().map(|s| Part::whole(&s.path)).collect(),
                on_drive: false,
                manifests: Vec::new(),
            }),
            Some(gone) => Err(CopyError::Gone(gone.path.clone()).into()),
        };
    }
    if let Some(drive) = kernel_drive(host, &name)? {
        let source = match copy_on_drive(host, &drive, gguf) {
            Ok(paths) => {
                return Ok(Located { parts: whole(paths), on_drive: true, manifests: Vec::new() });
            }
            Err(source) => source,
        };
        let mut unstaged = Vec::new();
        for namespace in sysfs::namespaces(host, &drive, &name) {
            let path = PathBuf::from(format!("/dev/{}", namespace.whole.name));
            match Image::on_namespace(host, namespace) {
                Ok(image) => return on_image(&image, (&path, namespace.whole.number.parse().ok()), gguf, true),
                Err(e) => unstaged.push((path, e)),
            }
        }
        return Err(CopyError::NotOnDrive { name: name.into_owned(), source, unstaged }.into());
    }
    if !target.exists() {
        return Err(CopyError::NoSuchPlace(name.into_owned()).into());
    }
    if !target.is_dir()
        && let Ok(image) = Image::on_node(target)
    {
        return on_image(&image, (target, None), gguf, false);
    }
    Ok(Located { parts: whole(copy_paths(gguf, target)?), on_drive: false, manifests: Vec::new() })
}

/// The model as staged on a drive or in an image file: its path and, where a drive was named, the number that the node must
/// have when it is opened to be read.
fn on_image(
    image: &Image,
    (node, number): (&Path, Option<Number>),
    gguf: &Gguf,
    on_drive: bool,
) -> Result<Located, EngineError> {
    let mut located = Located { parts: Vec::new(), manifests: Vec::new(), on_drive };
    for (i, shard) in gguf.shards.iter().enumerate() {
        let found = image.recorded(&shard.path, gguf.data_start(i))?;
        let differs =
            |what| EngineError::from(CopyError::OtherStaged { own: shard.path.clone(), what, node: node.into() });
        if found.manifest.size != shard.len {
            return Err(differs(Differs::Length));
        }
        let mut own = vec![0; found.header.len()];
        if let Ok(mut file) = safe::open(&shard.path) {
            file.read_exact(&mut own).map_err(io(&shard.path))?;
            if own != found.header {
                return Err(differs(Differs::Header));
            }
        }
        let &[(0, start, _)] = &found.manifest.extents[..] else {
            return Err(CopyError::Pieces { file: found.manifest.file, node: node.into() }.into());
        };
        let within = Some((start, found.manifest.size));
        located.parts.push(Part { path: node.into(), within, node: number.map(Node::Block) });
        located.manifests.push(found.manifest);
    }
    Ok(located)
}

/// The error of a file that cannot be read.
fn io(path: &Path) -> impl Fn(std::io::Error) -> EngineError + '_ {
    |source| CopyError::Io { path: path.into(), source }.into()
}

/// The kernel's NVMe drive of that name, if it is one.
fn kernel_drive(host: &Host, name: &str) -> Result<Option<Controller>, EngineError> {
    let all = sysfs::controllers(host).map_err(CopyError::from)?;
    Ok(sysfs::find(host, &all, name).cloned())
}

/// The model's files on a mounted file system of the drive: its own if they lie there, else files
/// of the same names and lengths at the top of one.
fn copy_on_drive(host: &Host, drive: &Controller, gguf: &Gguf) -> Result<Vec<PathBuf>, NoCopy> {
    let text = host.read("/proc/self/mountinfo")?;
    let mut folders: Vec<PathBuf> =
        gguf.shards.first().and_then(|s| s.path.parent()).map(Path::to_path_buf).into_iter().collect();
    let mut mounts = Vec::new();
    for line in text.lines() {
        let mut words = line.split(' ').skip(2);
        let (Some(number), _, Some(point)) = (words.next(), words.next(), words.next()) else { continue };
        if drive.devices().any(|d| d.number == number) {
            mounts.push(unescape(point));
        }
    }
    if mounts.is_empty() {
        return Err(NoCopy::NotMounted);
    }
    folders.extend(mounts.iter().cloned());
    let here = |p: &PathBuf| {
        use std::os::unix::fs::MetadataExt;
        let number = |dev: u64| format!("{}:{}", libc::major(dev), libc::minor(dev));
        std::fs::metadata(p).is_ok_and(|m| drive.devices().any(|d| d.number == number(m.dev())))
    };
    for folder in folders {
        if let Ok(paths) = copy_paths(gguf, &folder)
            && paths.iter().all(here)
        {
            return Ok(paths);
        }
    }
    let points = mounts.iter().map(|m| m.display().to_string()).collect::<Vec<_>>().join(", ");
    Err(NoCopy::NotThere(points))
}

/// A path of `mountinfo`, where white space and backslashes are octal.
fn unescape(text: &str) -> PathBuf {
    let pairs = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    pairs.iter().fold(text.to_owned(), |t, (from, to)| t.replace(from, to)).into()
}

/// Bytes of a file or block device, and whether it is the latter.
fn length(path: &Path) -> std::io::Result<(u64, bool)> {
    use std::os::unix::fs::FileTypeExt as _;
    let mut file = safe::open(path)?;
    let is_device = file.metadata()?.file_type().is_block_device();
    Ok((std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))?, is_device))
}

/// A copy of the model's files, of the same names and lengths.
fn copy_paths(gguf: &Gguf, copy: &Path) -> Result<Vec<PathBuf>, EngineError> {
    let mut paths = Vec::new();
    for shard in &gguf.shards {
        let path = match shard.path.file_name() {
            Some(name) if copy.is_dir() => copy.join(name),
            _ if gguf.shards.len() == 1 => copy.to_path_buf(),
            _ => {
                return Err(CopyError::NoFolder { copy: copy.into(), shards: gguf.shards.len() }.into());
            }
        };
        let (len, is_device) = length(&path).map_err(io(&path))?;
        // A device has whole sectors.
        if len < shard.len || !is_device && len != shard.len {
            return Err(CopyError::OtherLength { copy: path, len, own: shard.path.clone(), expected: shard.len }.into());
        }
        same_start(&shard.path, &path, gguf.data_start(paths.len()))?;
        paths.push(path);
    }
    Ok(paths)
}

/// Makes sure that a copy has the header of the model's own file, if that is there.
fn same_start(own: &Path, copy: &Path, len: u64) -> Result<(), EngineError> {
    if own == copy || !own.exists() {
        return Ok(());
    }
    let start = |path: &Path| {
        let mut bytes = Vec::new();
        let read = safe::open(path).and_then(|f| f.take(len).read_to_end(&mut bytes));
        read.map(|_| bytes).map_err(io(path))
    };
    if start(own)? == start(copy)? {
        return Ok(());
    }
    Err(CopyError::OtherHeader { copy: copy.into(), own: own.into() }.into())
}
