//! Where a file's bytes lie on its drive, so that it can be read by logical block once the file
//! system is unmounted. `Documentation/filesystems/fiemap.rst`.
//!
//! The map is only as good as the moment it was made: a file that is edited or moved later makes it
//! wrong, and only the checksums, one for each [`super::checksum::CHUNK`], can see that.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::bind::DeviceError;
use super::checksum::sums;
use super::guard::{Host, sysfs};
use super::library::Recorded;
use super::manifest::Manifest;
use super::source::Source;

/// `linux/fs.h`.
mod ioctl {
    // Its size is the header's; extents follow it.
    nix::ioctl_readwrite!(fs_ioc_fiemap, b'f', 11, [u64; 4]);
}

const FLAG_SYNC: u32 = 1;
const LAST: u32 = 1;
const BATCH: usize = 128;

/// Flags of an extent that make its bytes unreadable by block, with their names.
const UNUSABLE: &[(u32, &str)] = &[
    (0x2, "its place is unknown"),
    (0x4, "it is not written yet"),
    (0x8, "it is compressed or encoded"),
    (0x80, "it is encrypted"),
    (0x100, "it is not aligned to blocks"),
    (0x200, "it lies inside the inode"),
    (0x400, "it shares a block with other files"),
    (0x800, "it is allocated and not written"),
    (0x2000, "it is shared with another file and may move"),
];

/// One extent as the kernel tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Raw {
    logical: u64,
    physical: u64,
    len: u64,
    flags: u32,
}

/// The manifest of a file on a plain ext4 or XFS file system on an NVMe drive.
///
/// # Errors
/// If the file system or one of its layers hides where the bytes are, or an extent cannot be read
/// by block; or that the file was written to meanwhile.
pub fn manifest(host: &Host, path: &Path) -> Result<Manifest, DeviceError> {
    of(host, &Source::open(path).map_err(|e| failed(path, e.to_string()))?)
}

/// The manifest of an open GGUF file, and its first `header` bytes.
///
/// # Errors
/// As [`manifest`].
pub fn record(host: &Host, source: &Source, header: u64) -> Result<Recorded, DeviceError> {
    let header = source.head(header).map_err(|e| failed(source.path(), e.to_string()))?;
    Ok(Recorded { manifest: of(host, source)?, header })
}

fn failed(path: &Path, why: String) -> DeviceError {
    DeviceError::Step { step: format!("{}: finding its extents", path.display()), why }
}

fn of(host: &Host, source: &Source) -> Result<Manifest, DeviceError> {
    let (path, file) = (source.path(), source.file());
    let fail = |why: String| failed(path, why);
    let (name, full) = source.names().map_err(&fail)?;
    let meta = file.metadata().map_err(|e| fail(e.to_string()))?;
    let number = format!("{}:{}", libc::major(meta.dev()), libc::minor(meta.dev()));
    let kind = file_system(host, &number).map_err(&fail)?;
    if !matches!(kind.as_str(), "ext4" | "xfs") {
        return Err(fail(format!("its file system is {kind}; only ext4 and xfs tell plain places")));
    }
    let all = sysfs::controllers(host).map_err(|e| fail(e.to_string()))?;
    let found = all
        .iter()
        .find_map(|c| c.namespaces.iter().find_map(|n| n.devices().find(|d| d.number == number).map(|d| (c, n, d))));
    let (controller, namespace, device) = found.ok_or_else(|| {
        fail(format!(
            "the block device {number} is no NVMe drive or partition (LVM, MD and encryption are not seen through)"
        ))
    })?;
    let raw = fiemap(file).map_err(|e| fail(e.to_string()))?;
    let extents = place(&raw, source.size(), device.start, device.size).map_err(&fail)?;
    let (input, _) = source.input().map_err(|e| fail(e.to_string()))?;
    let crc32c = sums(input).map_err(|e| fail(e.to_string()))?;
    if !source.is_unchanged().map_err(|e| fail(e.to_string()))? {
        return Err(fail("it was changed while its sums were made; record it again once it is at rest".into()));
    }
    Ok(Manifest {
        file: name,
        path: full,
        size: source.size(),
        serial: controller.serial.clone(),
        model: controller.model.clone(),
        namespace: namespace.nsid,
        extents,
        crc32c,
        requant: None,
    })
}

fn file_system(host: &Host, number: &str) -> Result<String, String> {
    let text = host.read("/proc/self/mountinfo").map_err(|e| e.to_string())?;
    let line = text.lines().find(|l| l.split(' ').nth(2) == Some(number));
    let kind = line.and_then(|l| l.split_once(" - ")).and_then(|(_, tail)| tail.split(' ').next());
    kind.map(str::to_owned).ok_or_else(|| format!("no mount has the device number {number}"))
}

fn fiemap(file: &File) -> std::io::Result<Vec<Raw>> {
    file.sync_all()?;
    let mut out: Vec<Raw> = Vec::new();
    let mut start = 0u64;
    loop {
        // struct fiemap: start, length, flags, mapped, count, reserved; then 56 bytes an extent.
        let mut words = vec![0u64; 4 + BATCH * 7];
        words[0] = start;
        words[1] = u64::MAX - start;
        words[2] = u64::from(FLAG_SYNC);
        words[3] = BATCH as u64;
        // SAFETY: the buffer holds the header and as many extents as its count says.
        unsafe { ioctl::fs_ioc_fiemap(file.as_raw_fd(), words.as_mut_ptr().cast())? };
        let mapped = ((words[2] >> 32) as usize).min(BATCH);
        for e in words[4..].as_chunks::<7>().0.iter().take(mapped) {
            out.push(Raw { logical: e[0], physical: e[1], len: e[2], flags: e[5] as u32 });
        }
        match out.last() {
            Some(last) if mapped > 0 && last.flags & LAST == 0 => start = last.logical + last.len,
            _ => return Ok(out),
        }
    }
}

/// Checks the extents and moves them to the namespace's bytes.
fn place(raw: &[Raw], size: u64, start: u64, device: u64) -> Result<Vec<(u64, u64, u64)>, String> {
    let mut next = 0;
    let mut out = Vec::new();
    for e in raw {
        if let Some((_, why)) = UNUSABLE.iter().find(|(bit, _)| e.flags & bit != 0) {
            return Err(format!("the extent at byte {} cannot be read by block: {why}", e.logical));
        }
        if e.logical != next {
            return Err(format!("the file has a hole at byte {next}; copy it with `cp --sparse=never`"));
        }
        if e.physical.checked_add(e.len).is_none_or(|end| end > device) {
            return Err(format!("the extent at byte {} ends behind the device", e.logical));
        }
        out.push((e.logical, start + e.physical, e.len));
        next = e.logical + e.len;
    }
    match raw.last() {
        Some(last) if last.flags & LAST != 0 && next >= size => Ok(out),
        _ => Err(format!("the extents end at byte {next}, the file has {size}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(logical: u64, physical: u64, len: u64, flags: u32) -> Raw {
        Raw { logical, physical, len, flags }
    }

    #[test]
    fn extents_move_by_the_partition() {
        let raw = [raw(0, 8192, 4096, 0), raw(4096, 65536, 8192, LAST)];
        assert_eq!(
            place(&raw, 10000, 1 << 20, 1 << 30),
            Ok(vec![(0, (1 << 20) + 8192, 4096), (4096, (1 << 20) + 65536, 8192)])
        );
    }

    #[test]
    fn what_blocks_do_not_hold_is_refused() {
        for (bit, why) in UNUSABLE {
            assert!(place(&[raw(0, 0, 4096, bit | LAST)], 4096, 0, 1 << 20).unwrap_err().contains(why));
        }
        assert!(place(&[raw(4096, 0, 4096, LAST)], 8192, 0, 1 << 20).unwrap_err().contains("hole"));
        assert!(place(&[raw(0, 0, 4096, 0)], 4096, 0, 1 << 20).is_err(), "no last extent");
        assert!(place(&[raw(0, 0, 4096, LAST)], 4097, 0, 1 << 20).is_err(), "short");
        assert!(place(&[raw(0, 1 << 20, 4096, LAST)], 4096, 0, 1 << 20).is_err(), "behind the device");
    }
}
