//! Writing an image: a mark in the first block, everything of before wiped, the files, the table of manifests, all of it
//! read back and compared, the superblock, the table of partitions, its first block last.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::super::extents::{CHUNK, Manifest, crc32c};
use super::super::{gpt, safe};
use super::drive::Target;
use super::wipe::Wipe;
use super::{ALIGN, ImageError, SUPERBLOCK, io, mark, old, read, superblock};

/// A file to be staged.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Source {
    /// Opens a regular file for reading; anything else, which could keep its reader waiting, is an error.
    ///
    /// # Errors
    /// If it cannot be opened or is no regular file.
    pub fn open(path: &Path) -> Result<Source, ImageError> {
        let shown = path.display().to_string();
        let file = safe::open(path).map_err(io(&shown))?;
        let found = file.metadata().map_err(io(&shown))?;
        if !found.is_file() {
            return Err(io(shown)(std::io::Error::other("it is no regular file")));
        }
        Ok(Source { path: path.to_path_buf(), file, size: found.len() })
    }

    /// Its first `len` bytes, or all of them.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn head(&self, len: u64) -> Result<Vec<u8>, ImageError> {
        let mut bytes = vec![0; len.min(self.size) as usize];
        self.file.read_exact_at(&mut bytes, 0).map_err(io(self.path.display().to_string()))?;
        Ok(bytes)
    }

    fn name(&self) -> String {
        self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned()
    }
}

/// The drive that manifests name.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Serial number.
    pub serial: String,
    /// Model.
    pub model: String,
    /// Namespace.
    pub namespace: u32,
}

/// Who follows the work, and may end it.
pub struct Steps<'a> {
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
    stopped: &'a dyn Fn() -> bool,
}

impl<'a> Steps<'a> {
    /// `progress` gets bytes done and bytes to do, wiping and reading back included; work ends with
    /// [`ImageError::Stopped`] soon after `stopped` says true.
    pub fn new(progress: &'a mut dyn FnMut(u64, u64), stopped: &'a dyn Fn() -> bool) -> Steps<'a> {
        Steps { done: 0, total: 0, progress, stopped }
    }

    pub(super) fn done(&mut self, bytes: u64) -> Result<(), ImageError> {
        self.done += bytes;
        (self.progress)(self.done, self.total);
        if (self.stopped)() { Err(ImageError::Stopped) } else { Ok(()) }
    }
}

impl std::fmt::Debug for Steps<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Steps").field("done", &self.done).field("total", &self.total).finish_non_exhaustive()
    }
}

/// What will be written to a drive and wiped on it. Nothing of that has happened yet.
#[derive(Debug)]
pub struct Staging<'a> {
    sources: &'a [Source],
    starts: Vec<u64>,
    wipe: Wipe,
    mark: Vec<u8>,
}

impl<'a> Staging<'a> {
    /// Looks at what lies on the drive; `kernel` are the partitions that the kernel shows.
    ///
    /// # Errors
    /// [`ImageError::TooLarge`].
    pub fn plan(
        drive: &mut dyn Target,
        sources: &'a [Source],
        kernel: &[Range<u64>],
    ) -> Result<Staging<'a>, ImageError> {
        let sizes: Vec<u64> = sources.iter().map(|s| s.size).collect();
        let (starts, needed) = plan(&sizes);
        if needed > drive.size() {
            return Err(ImageError::TooLarge { needed, size: drive.size() });
        }
        let mut mark = mark::mark(&old::to_remember(drive, kernel));
        mark.resize(drive.block() as usize, 0);
        Ok(Staging { sources, starts, wipe: Wipe::of(drive, kernel), mark })
    }

    /// Wipes the drive and writes the image; gives the manifests.
    ///
    /// # Errors
    /// [`ImageError::Stopped`] before anything was written; else [`ImageError::Erased`] with the reason.
    pub fn write(
        &self,
        drive: &mut dyn Target,
        identity: &Identity,
        steps: &mut Steps<'_>,
    ) -> Result<Vec<Manifest>, ImageError> {
        steps.total = self.wipe.bytes() + 2 * self.sources.iter().map(|s| s.size).sum::<u64>();
        steps.done(0)?;
        self.replace(drive, identity, steps).map_err(|e| ImageError::Erased(Box::new(e)))
    }

    fn replace(
        &self,
        drive: &mut dyn Target,
        identity: &Identity,
        steps: &mut Steps<'_>,
    ) -> Result<Vec<Manifest>, ImageError> {
        drive.put(0, &self.mark)?;
        drive.sync()?;
        self.wipe.run(drive, steps)?;
        let mut manifests = Vec::new();
        for (source, &start) in self.sources.iter().zip(&self.starts) {
            manifests.push(copy(drive, source, start, identity, steps)?);
        }
        let table = serde_json::to_vec(&manifests).map_err(|e| ImageError::None(e.to_string()))?;
        drive.put(gpt::START + SUPERBLOCK, &table)?;
        drive.sync()?;
        for manifest in &manifests {
            compare(drive, manifest, steps)?;
        }
        drive.put(gpt::START, &superblock(&table))?;
        let (first, rest): (Vec<_>, Vec<_>) =
            gpt::table(drive.size(), drive.block()).into_iter().partition(|(at, _)| *at == 0);
        for (at, bytes) in rest {
            drive.put(at, &bytes)?;
        }
        drive.sync()?;
        // One block, so this happens or does not.
        for (at, bytes) in first {
            drive.put(at, &bytes)?;
        }
        drive.sync()?;
        let back = read(drive)?;
        if back == manifests { Ok(back) } else { Err(ImageError::None("the table does not read back the same".into())) }
    }
}

/// Where each file of `sizes` will begin, and the bytes needed in all.
fn plan(sizes: &[u64]) -> (Vec<u64>, u64) {
    // A checksum takes up to eleven characters, the rest of a manifest well below 16 KiB.
    let table: u64 = sizes.iter().map(|s| s.div_ceil(CHUNK as u64) * 11 + (16 << 10)).sum();
    let mut next = (gpt::START + SUPERBLOCK + table).next_multiple_of(ALIGN);
    let mut starts = Vec::new();
    for size in sizes {
        starts.push(next);
        next = (next + size).next_multiple_of(ALIGN);
    }
    (starts, next + gpt::START)
}

fn copy(
    drive: &mut dyn Target,
    source: &Source,
    start: u64,
    identity: &Identity,
    steps: &mut Steps<'_>,
) -> Result<Manifest, ImageError> {
    let mut sums = Vec::new();
    let mut buffer = vec![0u8; ALIGN as usize];
    let mut at = 0;
    while at < source.size {
        let n = (source.size - at).min(ALIGN) as usize;
        source.file.read_exact_at(&mut buffer[..n], at).map_err(io(source.path.display().to_string()))?;
        sums.extend(buffer[..n].chunks(CHUNK).map(crc32c));
        buffer[n..].fill(0);
        // Whole MiB, so that no other data lies between the end of a file and the next multiple.
        drive.put(start + at, &buffer)?;
        at += n as u64;
        steps.done(n as u64)?;
    }
    Ok(Manifest {
        file: source.name(),
        path: std::path::absolute(&source.path).unwrap_or_else(|_| source.path.clone()),
        size: source.size,
        serial: identity.serial.clone(),
        model: identity.model.clone(),
        namespace: identity.namespace,
        extents: vec![(0, start, source.size.next_multiple_of(ALIGN))],
        crc32c: sums,
    })
}

fn compare(drive: &mut dyn Target, m: &Manifest, steps: &mut Steps<'_>) -> Result<(), ImageError> {
    for i in 0..m.crc32c.len() {
        let at = (i * CHUNK) as u64;
        let n = (m.size - at).min(CHUNK as u64);
        let device = m.place(at).unwrap_or(drive.size());
        if !m.holds(i, &drive.get(device, n)?) {
            return Err(ImageError::ReadBack { file: m.file.clone(), offset: device });
        }
        steps.done(n)?;
    }
    Ok(())
}
