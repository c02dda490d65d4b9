//! Writing an image: a mark in the first block, everything of before wiped, the files, the table of manifests, all of it
//! read back and compared, the superblock, the table of partitions, its first block last.

use std::ops::Range;

use super::super::checksum::{CHUNK, crc32c};
use super::super::gpt;
use super::super::manifest::Manifest;
use super::content::Content;
use super::drive::Target;
use super::wipe::Wipe;
use super::{ALIGN, ImageError, SUPERBLOCK, TABLE_MAX, io, mark, old, read, superblock};

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
    sources: Vec<&'a dyn Content>,
    /// One for each source, without checksums.
    manifests: Vec<Manifest>,
    wipe: Wipe,
    /// The first block with the mark, and what else was in that block.
    first: Vec<u8>,
}

impl<'a> Staging<'a> {
    /// Looks at what lies on the drive; `kernel` are the partitions that the kernel shows. Whatever can be wrong with the
    /// files' names, their number and their sizes is found here.
    ///
    /// # Errors
    /// [`ImageError::TooLarge`], [`ImageError::Unfit`].
    pub fn plan(
        drive: &mut dyn Target,
        sources: &'a [impl Content],
        identity: &Identity,
        kernel: &[Range<u64>],
    ) -> Result<Staging<'a>, ImageError> {
        let sources: Vec<&dyn Content> = sources.iter().map(|s| s as &dyn Content).collect();
        let manifests: Result<Vec<_>, _> = sources.iter().map(|s| manifest(*s, identity)).collect();
        let mut manifests = manifests?;
        let (starts, needed) = places(&manifests)?;
        if needed > drive.size() {
            return Err(ImageError::TooLarge { needed, size: drive.size() });
        }
        for (m, start) in manifests.iter_mut().zip(starts) {
            m.extents = vec![(0, start, m.size.next_multiple_of(ALIGN))];
        }
        // What lies behind the mark in a larger block says where the copies of an ext's superblock are.
        let mut first = drive.get(0, drive.block())?;
        first[..mark::BYTES].copy_from_slice(&mark::mark(&old::to_remember(drive, kernel)));
        Ok(Staging { sources, manifests, wipe: Wipe::of(drive, kernel), first })
    }

    /// Wipes the drive and writes the image; gives the manifests.
    ///
    /// # Errors
    /// [`ImageError::Stopped`] before anything was written; else [`ImageError::Erased`] with the reason.
    pub fn write(&self, drive: &mut dyn Target, steps: &mut Steps<'_>) -> Result<Vec<Manifest>, ImageError> {
        steps.total = self.wipe.bytes() + 2 * self.sources.iter().map(|s| s.size()).sum::<u64>();
        steps.done(0)?;
        self.replace(drive, steps).map_err(|e| ImageError::Erased(Box::new(e)))
    }

    fn replace(&self, drive: &mut dyn Target, steps: &mut Steps<'_>) -> Result<Vec<Manifest>, ImageError> {
        drive.put(0, &self.first)?;
        drive.sync()?;
        self.wipe.run(drive, steps)?;
        if self.first[mark::BYTES..].iter().any(|b| *b != 0) {
            let mut only_mark = self.first.clone();
            only_mark[mark::BYTES..].fill(0);
            drive.put(0, &only_mark)?;
            drive.sync()?;
        }
        let mut manifests = self.manifests.clone();
        for (source, manifest) in self.sources.iter().zip(&mut manifests) {
            manifest.crc32c = copy(drive, *source, manifest.extents[0].1, steps)?;
            if !source.is_unchanged().map_err(io(shown(*source)))? {
                return Err(ImageError::Changed { file: shown(*source) });
            }
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

fn shown(source: &dyn Content) -> String {
    source.path().display().to_string()
}

/// The manifest of a file before anything is known of its bytes and its place.
fn manifest(source: &dyn Content, identity: &Identity) -> Result<Manifest, ImageError> {
    let (file, path) = source.names().map_err(|why| ImageError::Unfit { file: shown(source), why })?;
    Ok(Manifest {
        file,
        path,
        size: source.size(),
        serial: identity.serial.clone(),
        model: identity.model.clone(),
        namespace: identity.namespace,
        extents: vec![(0, u64::MAX, u64::MAX)],
        crc32c: Vec::new(),
        requant: source.requant(),
    })
}

/// Where each of the files will begin, and the bytes needed in all.
fn places(manifests: &[Manifest]) -> Result<(Vec<u64>, u64), ImageError> {
    let unfit =
        |why: String| ImageError::Unfit { file: manifests.first().map_or(String::new(), |m| m.file.clone()), why };
    let json = serde_json::to_vec(manifests).map_err(|e| unfit(format!("its manifest cannot be written: {e}")))?;
    // A checksum takes up to eleven characters.
    let sums: u64 = manifests.iter().map(|m| m.size.div_ceil(CHUNK as u64)).sum::<u64>().saturating_mul(11);
    let table = sums.saturating_add(json.len() as u64);
    if table > TABLE_MAX {
        return Err(unfit(format!("the table of its checksums would have {table} bytes, more than {TABLE_MAX}")));
    }
    let too_large = || ImageError::TooLarge { needed: u64::MAX, size: 0 };
    let mut next = (gpt::START + SUPERBLOCK + table).next_multiple_of(ALIGN);
    let mut starts = Vec::new();
    for m in manifests {
        starts.push(next);
        let end = next.checked_add(m.size).and_then(|end| end.checked_next_multiple_of(ALIGN));
        next = end.ok_or_else(too_large)?;
    }
    Ok((starts, next.checked_add(gpt::START).ok_or_else(too_large)?))
}

/// Copies a file to the drive; gives the checksums of its chunks.
fn copy(
    drive: &mut dyn Target,
    source: &dyn Content,
    start: u64,
    steps: &mut Steps<'_>,
) -> Result<Vec<u32>, ImageError> {
    let mut sums = Vec::new();
    let mut buffer = vec![0u8; ALIGN as usize];
    let mut at = 0;
    while at < source.size() {
        let n = (source.size() - at).min(ALIGN) as usize;
        source.read_at(&mut buffer[..n], at).map_err(io(shown(source)))?;
        sums.extend(buffer[..n].chunks(CHUNK).map(crc32c));
        buffer[n..].fill(0);
        // Whole MiB, so that no other data lies between the end of a file and the next multiple.
        drive.put(start + at, &buffer)?;
        at += n as u64;
        steps.done(n as u64)?;
    }
    Ok(sums)
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
