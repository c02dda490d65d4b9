//! Staging over a drive in memory that keeps what was not flushed apart: cut off at any write, with any part of
//! the unflushed blocks on the drive or not, and written over all that could have been there.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::storage::guard::signatures;
use crate::storage::source::tests::swapped;

const SIZE: u64 = 32 << 20;

/// A drive in memory. What was written since the last flush lies in `pending`, in its order.
struct Memory {
    bytes: Vec<u8>,
    pending: Vec<(u64, Vec<u8>)>,
    block: u64,
    /// Calls that change it, before one fails.
    left: u32,
    /// What it gives for what was discarded; none where it cannot discard.
    discarded: Option<u8>,
}

impl Memory {
    fn of(bytes: Vec<u8>, block: u64) -> Memory {
        Memory { bytes, pending: Vec::new(), block, left: u32::MAX, discarded: None }
    }

    fn change(&mut self) -> Result<(), ImageError> {
        self.left = self.left.checked_sub(1).ok_or(ImageError::Stopped)?;
        Ok(())
    }

    /// Power fails: each block that was not flushed is there or is not.
    fn cut(&mut self, rng: &mut ChaCha8Rng) {
        for (at, bytes) in std::mem::take(&mut self.pending) {
            for (i, block) in bytes.chunks(self.block as usize).enumerate() {
                if rng.random_bool(0.5) {
                    let at = at as usize + i * self.block as usize;
                    self.bytes[at..at + block.len()].copy_from_slice(block);
                }
            }
        }
        self.left = u32::MAX;
    }
}

impl Medium for Memory {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn get(&mut self, at: u64, len: u64) -> Result<Vec<u8>, ImageError> {
        let mut out = self.bytes[at as usize..(at + len) as usize].to_vec();
        for (place, bytes) in &self.pending {
            let (start, end) = (at.max(*place), (at + len).min(place + bytes.len() as u64));
            if start < end {
                out[(start - at) as usize..(end - at) as usize]
                    .copy_from_slice(&bytes[(start - place) as usize..(end - place) as usize]);
            }
        }
        Ok(out)
    }
}

impl Target for Memory {
    fn block(&self) -> u64 {
        self.block
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), ImageError> {
        self.change()?;
        let (first, end) = (at / self.block * self.block, (at + bytes.len() as u64).next_multiple_of(self.block));
        let mut whole = self.get(first, end - first)?;
        whole[(at - first) as usize..][..bytes.len()].copy_from_slice(bytes);
        self.pending.push((first, whole));
        Ok(())
    }

    fn discard(&mut self, range: Range<u64>) -> Result<bool, ImageError> {
        self.change()?;
        let Some(value) = self.discarded else { return Ok(false) };
        // Every discard comes after a flush.
        assert!(self.pending.is_empty());
        self.bytes[range.start as usize..range.end as usize].fill(value);
        Ok(true)
    }

    fn sync(&mut self) -> Result<(), ImageError> {
        self.change()?;
        for (at, block) in std::mem::take(&mut self.pending) {
            self.bytes[at as usize..at as usize + block.len()].copy_from_slice(&block);
        }
        Ok(())
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let data: Vec<u8> = (0..9_000_001u64).map(|i| (i.wrapping_mul(0x9E37_79B9) >> 13) as u8).collect();
    let paths = [folder.join("a.gguf"), folder.join("b.gguf")];
    std::fs::write(&paths[0], &data).unwrap();
    std::fs::write(&paths[1], &data[..70_000]).unwrap();
    paths.to_vec()
}

fn sources(paths: &[PathBuf]) -> Vec<Source> {
    paths.iter().map(|p| Source::open(p).unwrap()).collect()
}

fn identity() -> Identity {
    Identity { serial: "S".into(), model: "M".into(), namespace: 1 }
}

fn stage(drive: &mut dyn Target, sources: &[Source], kernel: &[Range<u64>]) -> Result<Vec<Manifest>, ImageError> {
    let staging = Staging::plan(drive, sources, &identity(), kernel)?;
    staging.write(drive, &mut Steps::new(&mut |_, _| (), &|| false))
}

/// What the guard finds in a range of the drive.
fn found(bytes: &[u8]) -> Vec<&'static str> {
    let (head, tail) = edges(bytes);
    signatures::recognise(head, tail)
}

fn edges(bytes: &[u8]) -> (&[u8], &[u8]) {
    (&bytes[..1 << 20], &bytes[bytes.len() - (1 << 20)..])
}

#[test]
fn files_come_back_and_a_failed_staging_leaves_no_image() {
    let folder = tempfile::tempdir().unwrap();
    for block in [512, 4096] {
        let files = files(folder.path());
        let sources = sources(&files);
        let mut drive = Memory::of(vec![0; SIZE as usize], block);
        assert!(read(&mut drive).unwrap_err().to_string().contains("no partition"));
        let staging = Staging::plan(&mut drive, &sources, &identity(), &[]).unwrap();
        let mut last = (0, 0);
        let mut progress = |done, total| last = (done, total);
        let manifests = staging.write(&mut drive, &mut Steps::new(&mut progress, &|| false)).unwrap();
        assert_eq!(last.0, last.1);
        assert_eq!(read(&mut drive).unwrap(), manifests);
        for (m, path) in manifests.iter().zip(&files) {
            assert_eq!(m.fault(), None);
            assert_eq!(m.extents[0].1 % ALIGN, 0);
            assert_eq!(drive.get(m.extents[0].1, m.size).unwrap(), std::fs::read(path).unwrap());
        }
        // Staging again fails half way: the old table must not stand for the new bytes.
        let short = [Source::open(&files[0]).unwrap(), Source::open(&files[1]).unwrap()];
        File::options().write(true).open(&files[1]).unwrap().set_len(10).unwrap();
        assert!(matches!(stage(&mut drive, &short, &[]), Err(ImageError::Erased(_))));
        assert!(read(&mut drive).unwrap_err().to_string().contains("was interrupted"));
    }
}

/// Every call that changes the drive is once the last one, over a drive with old partitions: then either nothing is
/// written yet, or the drive says that it is being staged, and staging it once more leaves what the first would have.
#[test]
fn cut_off_at_any_write_it_is_staged_again() {
    let folder = tempfile::tempdir().unwrap();
    let sources = [Source::open(&{
        let path = folder.path().join("a.gguf");
        std::fs::write(&path, [7; 300_000]).unwrap();
        path
    })
    .unwrap()];
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let size = 12u64 << 20;
    let partition = 3 << 20..9u64 << 20;
    for (block, discarded) in [(512, None), (512, Some(0xff)), (4096, Some(0))] {
        let mut old = vec![0u8; size as usize];
        rng.fill_bytes(&mut old);
        // An MBR of one partition, which nothing remembers once its sector is gone.
        old[..512].fill(0);
        let mut entry = [0u8; 16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&((partition.start / block) as u32).to_le_bytes());
        entry[12..16].copy_from_slice(&(((partition.end - partition.start) / block) as u32).to_le_bytes());
        old[446..462].copy_from_slice(&entry);
        old[510..512].copy_from_slice(&[0x55, 0xaa]);
        let mut changes = 0;
        loop {
            let mut drive = Memory::of(old.clone(), block);
            (drive.left, drive.discarded) = (changes, discarded);
            let whole = stage(&mut drive, &sources, &[]).is_ok();
            drive.cut(&mut rng);
            let there = read(&mut drive).is_ok();
            assert!(there || !whole);
            let marked = mark::ranges(&drive.bytes).is_some();
            assert!(marked || there || drive.bytes == old, "change {changes} with blocks of {block}");
            if marked {
                // Nothing that the owner of the drive would have to allow first.
                let (head, tail) = edges(&drive.bytes);
                let mut foreign = found(&drive.bytes);
                foreign.retain(|kind| !signatures::is_own(kind, true, head, tail, size, block));
                assert_eq!(foreign, [""; 0], "change {changes}");
            }
            if !there {
                assert!(stage(&mut drive, &sources, &[]).is_ok());
            }
            let (head, tail) = edges(&drive.bytes);
            assert!(gpt::is_ours(head, tail, size, block));
            let zero = |at: u64| drive.bytes[at as usize..(at as usize + (1 << 20))].iter().all(|b| *b == 0);
            assert!(zero(partition.start) && zero(partition.end - (1 << 20)), "change {changes}");
            changes += 1;
            if whole {
                break;
            }
        }
        assert!(changes > 25);
    }
}

#[test]
fn a_signal_ends_it_and_says_what_became_of_the_drive() {
    let folder = tempfile::tempdir().unwrap();
    let sources = sources(&files(folder.path()));
    let mut drive = Memory::of(vec![1; SIZE as usize], 512);
    for (calls, erased) in [(0u32, false), (1, true), (30, true)] {
        let left = std::cell::Cell::new(calls);
        let stopped = || left.replace(left.get().saturating_sub(1)) == 0;
        let staging = Staging::plan(&mut drive, &sources, &identity(), &[]).unwrap();
        match staging.write(&mut drive, &mut Steps::new(&mut |_, _| (), &stopped)) {
            Err(ImageError::Stopped) => assert!(!erased && drive.bytes.iter().all(|b| *b == 1)),
            Err(ImageError::Erased(why)) => assert!(erased && matches!(*why, ImageError::Stopped)),
            other => panic!("{other:?}"),
        }
    }
}

/// A drive that does not keep the zeros is not called staged.
#[test]
fn what_does_not_read_as_zeros_is_an_error() {
    struct Stuck(Memory);
    impl Medium for Stuck {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn get(&mut self, at: u64, len: u64) -> Result<Vec<u8>, ImageError> {
            let mut bytes = self.0.get(at, len)?;
            if (at..at + len).contains(&(SIZE - 5)) {
                bytes[(SIZE - 5 - at) as usize] = 1;
            }
            Ok(bytes)
        }
    }
    impl Target for Stuck {
        fn block(&self) -> u64 {
            512
        }
        fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), ImageError> {
            self.0.put(at, bytes)
        }
        fn discard(&mut self, range: Range<u64>) -> Result<bool, ImageError> {
            self.0.discard(range)
        }
        fn sync(&mut self) -> Result<(), ImageError> {
            self.0.sync()
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let sources = sources(&files(folder.path()));
    let e = stage(&mut Stuck(Memory::of(vec![0; SIZE as usize], 512)), &sources, &[]).unwrap_err().to_string();
    assert!(e.contains("do not read back") && e.contains("neither a model nor"), "{e}");
}

/// One signature at its place, on the whole drive or in a partition.
type Leftover = (&'static str, fn(u64) -> u64, &'static [u8]);

/// Where formats leave what they are known by, from the start of a range of so many bytes.
const LEFTOVERS: &[Leftover] = &[
    ("ext4", |_| 0x438, &[0x53, 0xef]),
    ("a copy of ext4's superblock, blocks of 1 KiB", |_| (8 << 20) + 0x438, &[0x53, 0xef]),
    ("a copy of ext4's superblock, blocks of 1 KiB, group 3", |_| (24 << 20) + 0x438, &[0x53, 0xef]),
    ("xfs", |_| 0, b"XFSB"),
    ("btrfs", |_| 0x10040, b"_BHRfS_M"),
    ("md 0.90", |size| (size & !0xffff) - 0x10000, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("md 1.0", |size| (((size >> 9) - 16) & !7) << 9, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("md 1.1", |_| 0, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("md 1.2", |_| 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("lvm, first sector", |_| 0, b"LABELONE"),
    ("lvm, fourth sector", |_| 1536, b"LABELONE"),
    ("luks", |_| 0, b"LUKS\xba\xbe"),
    ("second header of luks at 16 KiB", |_| 0x4000, b"SKUL\xba\xbe"),
    ("second header of luks at 4 MiB", |_| 0x40_0000, b"SKUL\xba\xbe"),
    ("ntfs", |_| 3, b"NTFS    "),
    ("ntfs, last sector", |size| size - 512 + 3, b"NTFS    "),
    ("zfs, second label", |_| (256 << 10) + (128 << 10), &0x00ba_b10c_u64.to_le_bytes()),
    ("zfs, third label", |size| (size & !0x3ffff) - (512 << 10) + (128 << 10), &0x00ba_b10c_u64.to_le_bytes()),
    ("zfs, fourth label", |size| (size & !0x3ffff) - (128 << 10), &0x00ba_b10c_u64.to_be_bytes()),
    ("bcache", |_| 0x1018, &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca]),
    ("f2fs, second superblock", |_| 0x1400, &[0x10, 0x20, 0xf5, 0xf2]),
    ("nilfs2, second superblock", |size| (((size >> 12) - 1) << 12) | 6, &[0x34, 0x34]),
    ("udf, anchor with blocks of 4 KiB", |_| 256 << 12, &[2, 0, 2, 0]),
    ("swap", |_| 4086, b"SWAPSPACE2"),
    ("intel raid", |size| size - 1024, b"Intel Raid ISM Cfg Sig."),
    ("promise raid, far from the end", |size| size - 3087 * 512, b"Promise Technology"),
    ("hfs+, second header", |size| size - 1024, b"H+"),
    ("vmfs, its volume", |_| 1 << 20, &[0x0d, 0xd0, 0x01, 0xc0]),
    ("vmfs", |_| 2 << 20, &[0x5e, 0xf1, 0xab, 0x2f]),
];

#[test]
fn nothing_of_what_was_there_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    std::fs::write(&path, [7; 10_000]).unwrap();
    let sources = sources(&[path]);
    let partition = (1 << 20) + 512 * 7..(30u64 << 20) - 512 * 3;
    for (name, place, magic) in LEFTOVERS {
        for range in [0..SIZE, partition.clone()] {
            let mut drive = Memory::of(vec![0; SIZE as usize], 512);
            let at = (range.start + place(range.end - range.start)) as usize;
            assert!(((at + magic.len()) as u64) <= range.end, "{name}");
            drive.bytes[at..at + magic.len()].copy_from_slice(magic);
            let kernel = std::slice::from_ref(&range);
            stage(&mut drive, &sources, if range.start == 0 { &[] } else { kernel }).unwrap();
            assert_ne!(drive.bytes[at..at + magic.len()], **magic, "{name} in {range:?}");
            assert_eq!(found(&drive.bytes), ["gpt"], "{name}");
            assert_eq!(found(&drive.bytes[gpt::START as usize..(SIZE - gpt::START) as usize]), ["nt image"], "{name}");
        }
    }
}

/// Copies that only the first superblock tells of: ext4 with groups of its own size, XFS's allocation groups, on a
/// whole drive too, where the mark takes the place of XFS's superblock.
#[test]
fn copies_are_found_by_the_first_superblock() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    std::fs::write(&path, [7; 10_000]).unwrap();
    let sources = sources(&[path]);
    let range = 3 << 20..31u64 << 20;
    for at in [0, range.start] {
        let kernel = if at == 0 { vec![] } else { vec![range.clone()] };
        let mut ext = vec![0; SIZE as usize];
        let group = 3500 * 4096;
        for g in 0..2 {
            let sb = (at + g * group + if g == 0 { 1024 } else { 0 }) as usize;
            ext[sb + 24..sb + 28].copy_from_slice(&2u32.to_le_bytes());
            ext[sb + 32..sb + 36].copy_from_slice(&3500u32.to_le_bytes());
            ext[sb + 56..sb + 58].copy_from_slice(&[0x53, 0xef]);
        }
        // A block of 4096 bytes holds the first superblock, which must not go with the mark.
        for (block, left) in [(512, u32::MAX), (4096, u32::MAX), (512, 2), (4096, 2)] {
            let mut drive = Memory::of(ext.clone(), block);
            drive.left = left;
            let first = stage(&mut drive, &sources, &kernel);
            assert_eq!(first.is_err(), left == 2);
            drive.left = u32::MAX;
            if first.is_err() {
                assert_eq!(mark::ranges(&drive.get(0, 512).unwrap()), Some(kernel.clone()));
                stage(&mut drive, &sources, &[]).unwrap();
            }
            assert_eq!(drive.get(at + group + 56, 2).unwrap(), [0, 0], "blocks of {block}, from {at}");
            assert!(gpt::is_ours(edges(&drive.bytes).0, edges(&drive.bytes).1, SIZE, block));
        }

        let mut xfs = vec![0u8; SIZE as usize];
        let group = 1501 * 4096;
        for g in 0..4 {
            let sb = (at + g * group) as usize;
            xfs[sb..sb + 8].copy_from_slice(b"XFSB\0\0\x10\0");
            xfs[sb + 84..sb + 88].copy_from_slice(&1501u32.to_be_bytes());
        }
        // Once in one go, once cut off just after the mark.
        for left in [u32::MAX, 2] {
            let mut drive = Memory::of(xfs.clone(), 512);
            drive.left = left;
            let first = stage(&mut drive, &sources, &kernel);
            drive.left = u32::MAX;
            if first.is_err() {
                stage(&mut drive, &sources, &[]).unwrap();
            }
            for g in 0..4 {
                assert_ne!(drive.get(at + g * group, 4).unwrap(), b"XFSB", "group {g} of {at}");
            }
        }
    }
}

/// Logical partitions of an MBR and their tables, and a GPT that only its backup tells of.
#[test]
fn partitions_that_the_kernel_does_not_show_are_wiped_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    std::fs::write(&path, [7; 10_000]).unwrap();
    let sources = sources(&[path]);
    let entry = |kind: u8, first: u32, count: u32| {
        let mut e = [0u8; 16];
        e[4] = kind;
        e[8..12].copy_from_slice(&first.to_le_bytes());
        e[12..16].copy_from_slice(&count.to_le_bytes());
        e
    };
    let mib = 2048;
    let mut drive = Memory::of(vec![0; SIZE as usize], 512);
    let mut table = |at: u32, entries: &[[u8; 16]]| {
        let at = at as usize * 512;
        for (i, e) in entries.iter().enumerate() {
            drive.bytes[at + 446 + 16 * i..at + 462 + 16 * i].copy_from_slice(e);
        }
        drive.bytes[at + 510..at + 512].copy_from_slice(&[0x55, 0xaa]);
    };
    table(0, &[entry(5, 9 * mib, 22 * mib)]);
    table(9 * mib, &[entry(0x83, mib, mib), entry(5, 3 * mib, 19 * mib)]);
    table(12 * mib, &[entry(0x83, mib, 9 * mib)]);
    let second = (13usize << 20, 22usize << 20);
    drive.bytes[second.0 + 0x1008..][..8].copy_from_slice(b"anything");
    drive.bytes[second.1 - 512..][..8].copy_from_slice(b"anything");
    stage(&mut drive, &sources, &[]).unwrap();
    assert!(drive.bytes[9 << 20..(SIZE - (1 << 20)) as usize].iter().all(|b| *b == 0));

    let mut drive = Memory::of(vec![0; SIZE as usize], 512);
    for (at, bytes) in gpt::table(SIZE, 512) {
        if at > SIZE / 2 {
            drive.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        }
    }
    let entries = (SIZE - 33 * 512) as usize;
    drive.bytes[entries + 32..entries + 40].copy_from_slice(&(10 * 2048u64).to_le_bytes());
    drive.bytes[entries + 40..entries + 48].copy_from_slice(&(20 * 2048u64 - 1).to_le_bytes());
    drive.bytes[(20 << 20) - 512..][..8].copy_from_slice(b"anything");
    stage(&mut drive, &sources, &[]).unwrap();
    assert!(drive.bytes[9 << 20..(SIZE - (1 << 20)) as usize].iter().all(|b| *b == 0));
}

#[test]
fn another_machines_image_is_found_by_its_superblock() {
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path());
    let path = folder.path().join("drive.img");
    let target = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    target.set_len(SIZE).unwrap();
    assert!(read(&mut Node::open(&files[1]).unwrap()).unwrap_err().to_string().contains("too small"));
    let mut drive = Drive { file: &target, size: SIZE, block: 4096 };
    let manifests = stage(&mut drive, &sources(&files), &[]).unwrap();
    let mut node = Node::open(&path).unwrap();
    assert_eq!(read(&mut node).unwrap(), manifests);
    assert_eq!(named(&manifests, Path::new("b")), Some(&manifests[1]));
    assert_eq!(named(&manifests, Path::new("/gone/b.gguf")), Some(&manifests[1]));
    assert_eq!(named(&manifests, Path::new("c")), None);
    let medium: Rc<RefCell<dyn Medium>> = Rc::new(RefCell::new(node));
    for (m, path) in manifests.iter().zip(&files) {
        let mut bytes = Vec::new();
        Staged::new(Rc::clone(&medium), m).read_to_end(&mut bytes).unwrap();
        assert!(bytes == std::fs::read(path).unwrap());
    }
    // A table that points elsewhere is not followed, nor a damaged one.
    let table_at = gpt::START + SUPERBLOCK;
    let original = drive.get(table_at, 1).unwrap();
    target.write_all_at(b"x", table_at).unwrap();
    assert!(read(&mut *medium.borrow_mut()).unwrap_err().to_string().contains("table is damaged"));
    target.write_all_at(&original, table_at).unwrap();
    for wrong_place in [SIZE, 0] {
        let mut wrong = manifests.clone();
        wrong[1].extents[0].1 = wrong_place;
        let table = serde_json::to_vec(&wrong).unwrap();
        target.write_all_at(&table, table_at).unwrap();
        target.write_all_at(&superblock(&table), gpt::START).unwrap();
        let e = read(&mut *medium.borrow_mut()).unwrap_err().to_string();
        assert!(e.contains("b.gguf") && e.contains("outside the partition"), "{e}");
    }
    target.write_all_at(&[0; 16], gpt::START).unwrap();
    assert!(read(&mut *medium.borrow_mut()).unwrap_err().to_string().contains("no superblock"));
}

#[test]
fn too_large_a_model_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let sources = sources(&files(folder.path()));
    let mut small = Memory::of(vec![3; 8 << 20], 512);
    assert!(matches!(stage(&mut small, &sources, &[]), Err(ImageError::TooLarge { size: 8_388_608, .. })));
    assert!(small.bytes.iter().all(|b| *b == 3));
}

/// What the table on the drive cannot hold is found before anything is written: names that are not UTF-8; and names that
/// take more room than any table had for them, so that the table was written over the first file.
#[test]
fn names_are_judged_before_anything_is_written() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    for name in [&b"a\xff.gguf"[..], b"\xe9t\xe9/b.gguf"] {
        let path = folder.path().join(std::ffi::OsStr::from_bytes(name));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, [7; 1000]).unwrap();
        let mut drive = Memory::of(vec![3; SIZE as usize], 512);
        let e = stage(&mut drive, &sources(&[path]), &[]).unwrap_err();
        assert!(matches!(e, ImageError::Unfit { .. }) && e.to_string().contains("not UTF-8"), "{e}");
        assert!(drive.bytes.iter().all(|b| *b == 3));
    }
    // Control characters take six characters each; 90 files have 2 MiB of names.
    let mut deep = folder.path().to_path_buf();
    for _ in 0..14 {
        deep.push("\x01".repeat(250));
    }
    std::fs::create_dir_all(&deep).unwrap();
    let paths: Vec<_> = (0..90).map(|i| deep.join(format!("{i}.gguf"))).collect();
    for path in &paths {
        std::fs::write(path, [5; 300]).unwrap();
    }
    let mut drive = Memory::of(vec![0; 128 << 20], 512);
    let manifests = stage(&mut drive, &sources(&paths), &[]).unwrap();
    assert!(serde_json::to_vec(&manifests).unwrap().len() > 90 << 14);
    for m in &manifests {
        assert_eq!(drive.get(m.extents[0].1, 300).unwrap(), [5; 300]);
    }
}

/// The file that was opened is staged, whatever its path leads to later, and one that is written to meanwhile is not
/// called staged.
#[test]
fn a_file_that_is_swapped_or_written_to_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let (source, moved) = swapped(folder.path());
    let mut drive = Memory::of(vec![0; SIZE as usize], 512);
    let sources = [source];
    let manifests = stage(&mut drive, &sources, &[]).unwrap();
    assert_eq!(drive.get(manifests[0].extents[0].1, 5000).unwrap(), [7; 5000]);
    File::options().write(true).open(moved).unwrap().set_len(6000).unwrap();
    let e = stage(&mut drive, &sources, &[]).unwrap_err();
    assert!(matches!(&e, ImageError::Erased(why) if matches!(**why, ImageError::Changed { .. })), "{e}");
    assert!(read(&mut drive).is_err());
}

/// A drive of so many groups, by its superblocks, that following them would take for ever.
#[test]
fn copies_are_followed_within_one_limit() {
    struct Endless;
    impl Medium for Endless {
        fn size(&self) -> u64 {
            1 << 50
        }
        fn get(&mut self, _: u64, len: u64) -> Result<Vec<u8>, ImageError> {
            let mut bytes = vec![0; len as usize];
            bytes[..8].copy_from_slice(b"XFSB\0\0\x10\0");
            bytes[84..88].copy_from_slice(&16u32.to_be_bytes());
            if len > 0x43a {
                bytes[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
            }
            Ok(bytes)
        }
    }
    let mut left = old::COPIES_MAX;
    let found: usize = (0..100u64).map(|i| old::copies(&mut Endless, &(i << 40..(i + 1) << 40), &mut left).len()).sum();
    assert_eq!(left, 0);
    assert!(found < 2 * old::COPIES_MAX as usize, "{found}");
}

/// A pipe in place of the model would keep root waiting, with the drive claimed.
#[test]
fn only_regular_files_are_staged() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("m.gguf");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(Source::open(&pipe).unwrap_err().to_string().contains("neither a regular file"));
    assert!(Source::open(folder.path()).is_err());
}

/// Ten thousand changes from a seed of what a drive says of its image: the table of partitions, the superblock, the table
/// of manifests, with their sums made right again, too. None panics, and what is accepted is the image as it was
/// written, or lies within its partition and covers its file.
#[test]
fn a_changed_image_is_refused_or_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    std::fs::write(&path, [7; 200_000]).unwrap();
    let size = 16u64 << 20;
    let mut drive = Memory::of(vec![0; size as usize], 512);
    let manifests = stage(&mut drive, &sources(&[path]), &[]).unwrap();
    let table = serde_json::to_vec(&manifests).unwrap();
    let start = gpt::START as usize;
    let places: [(&str, Range<usize>); 4] = [
        ("table of partitions", 0..34 * 512),
        ("first entry", 1024..1152),
        ("superblock", start..start + SUPERBLOCK as usize),
        ("table", start + SUPERBLOCK as usize..start + SUPERBLOCK as usize + table.len()),
    ];
    let first = drive.bytes[..2048].to_vec();
    let second = drive.bytes[start..start + SUPERBLOCK as usize].to_vec();
    for (seed, (name, place)) in places.iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed as u64);
        let original = drive.bytes[place.clone()].to_vec();
        for round in 0..10_000 {
            let mut bytes = original.clone();
            change(&mut bytes, &mut rng);
            drive.bytes[place.clone()].copy_from_slice(&bytes);
            if round % 2 == 1 {
                correct_sums(&mut drive.bytes, table.len());
            }
            if let Ok(found) = read(&mut drive) {
                let fits = |m: &Manifest| {
                    let inside = |e: &(u64, u64, u64)| e.1 >= gpt::START && e.1 + e.2 <= size - gpt::START;
                    m.fault().is_none() && m.extents.iter().all(inside)
                };
                assert!(round % 2 == 1 || found == manifests, "{name}, round {round}");
                assert!(found.iter().all(fits), "{name}, round {round}");
            }
            drive.bytes[place.clone()].copy_from_slice(&original);
            drive.bytes[..2048].copy_from_slice(&first);
            drive.bytes[start..start + SUPERBLOCK as usize].copy_from_slice(&second);
        }
        assert_eq!(read(&mut drive).unwrap(), manifests);
    }
}

/// Ten thousand changes from a seed of the tables that tell what else is to be wiped: the MBR with its logical
/// partitions, both GPTs, a mark. Whatever they say, what is wiped lies on the drive, in order, without its first block,
/// and covers the first and last MiB.
#[test]
fn changed_tables_wipe_nothing_outside_the_drive() {
    let size = 16u64 << 20;
    let mut bytes = vec![0u8; size as usize];
    for (at, table) in gpt::table(size, 512) {
        bytes[at as usize..at as usize + table.len()].copy_from_slice(&table);
    }
    let logical = 4usize << 20;
    for (sector, slot, kind, first) in [(0, 1, 0x0fu8, 8192u32), (logical, 0, 0x83, 1), (logical, 1, 0x05, 64)] {
        let at = sector + 446 + 16 * slot;
        bytes[at + 4] = kind;
        bytes[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
        bytes[at + 12..at + 16].copy_from_slice(&4096u32.to_le_bytes());
        bytes[sector + 510..sector + 512].copy_from_slice(&[0x55, 0xaa]);
    }
    let mut drive = Memory::of(bytes, 512);
    let end = size as usize;
    let places =
        [446..512, 512..604, 1024..1152, logical + 446..logical + 512, end - 33 * 512..end - 32 * 512, end - 512..end];
    let marked = mark::mark(&[1 << 20..3 << 20, 5 << 20..6 << 20]);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for round in 0..10_000 {
        let place = if round % 7 == 6 { 0..mark::BYTES } else { places[round % 7].clone() };
        let kept = drive.bytes[place.clone()].to_vec();
        if round % 7 == 6 {
            drive.bytes[..mark::BYTES].copy_from_slice(&marked);
        }
        change(&mut drive.bytes[place.clone()], &mut rng);
        let wiped = wipe::Wipe::of(&mut drive, &[u64::MAX - 5..u64::MAX, 3 << 20..4 << 20]);
        for wave in wiped.waves() {
            let in_order = wave.windows(2).all(|w| w[0].end <= w[1].start);
            assert!(
                in_order && wave.iter().all(|r| r.start >= 512 && r.start < r.end && r.end <= size),
                "round {round}"
            );
        }
        let covered = |at: u64| wiped.waves().iter().flatten().any(|r| r.contains(&at));
        assert!([512, (1 << 20) - 1, size - (1 << 20), size - 1].into_iter().all(covered), "round {round}");
        drive.bytes[place].copy_from_slice(&kept);
    }
}

/// A byte, a number, or a run of bytes is another one; what is text gets other digits and signs.
fn change(bytes: &mut [u8], rng: &mut ChaCha8Rng) {
    for _ in 0..rng.random_range(1..4) {
        let at = rng.random_range(0..bytes.len());
        match rng.random_range(0..5) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => bytes[at] = b"0123456789-,[]{}\"e.\\"[rng.random_range(0..20)],
            3 => {
                let values = [0, 1, u64::MAX, i64::MAX as u64, 1 << 63, 512, 1 << 20, u64::from(u32::MAX)];
                let value = values[rng.random_range(0..values.len())].to_le_bytes();
                let n = value.len().min(bytes.len() - at);
                bytes[at..at + n].copy_from_slice(&value[..n]);
            }
            _ => {
                let end = (at + rng.random_range(1..64)).min(bytes.len());
                rng.fill_bytes(&mut bytes[at..end]);
            }
        }
    }
}

/// What whoever writes such an image on purpose would do.
fn correct_sums(drive: &mut [u8], table: usize) {
    let entries = gpt::crc32(&drive[1024..1024 + 128 * 128]);
    drive[512 + 88..512 + 92].copy_from_slice(&entries.to_le_bytes());
    drive[512 + 16..512 + 20].fill(0);
    let header = gpt::crc32(&drive[512..512 + 92]);
    drive[512 + 16..512 + 20].copy_from_slice(&header.to_le_bytes());
    let start = gpt::START as usize;
    let at = start + SUPERBLOCK as usize;
    let sum = crc32c(&drive[at..at + table]);
    drive[start + 12..start + 16].copy_from_slice(&sum.to_le_bytes());
    let end = at - 4;
    let sum = crc32c(&drive[start..end]);
    drive[end..at].copy_from_slice(&sum.to_le_bytes());
}
