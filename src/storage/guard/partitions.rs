//! Partition tables as firmware and kernels may read them: GPT wherever a header says, the backup at
//! the end, MBR with its chain of logical partitions, and which partitions something boots from.
//!
//! A library for GPT (the crate `gpt`) gives up where a checksum differs, wants a header in the
//! second block and knows no MBR types. A firmware may accept what it refuses, so damaged tables are
//! read here as far as they go.

/// Bytes of entries that are read of one table. Tables have 16 KiB.
const ENTRIES_MAX: u64 = 4 << 20;
/// Partitions of all tables of one drive, and tables in an MBR's chain of logical ones. A drive with more is refused.
const PARTITIONS_MAX: usize = 256;
/// Blocks that tables may count in, whatever the drive's are: an enclosure may show a drive of 512 as one of 4096.
const BLOCKS: [u64; 4] = [512, 1024, 2048, 4096];
/// Attributes of a GPT entry: the platform needs it; a BIOS boots from it.
const REQUIRED: u64 = 1;
const LEGACY_BOOT: u64 = 1 << 2;

/// GPT types that a firmware or boot loader uses, as text.
const BOOT_TYPES: [(&str, &str); 12] = [
    ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "an EFI system partition"),
    ("21686148-6449-6e6f-744e-656564454649", "a BIOS boot partition"),
    ("bc13c2ff-59e6-4262-a352-b275fd6f7172", "an extended boot loader partition (XBOOTLDR)"),
    ("9e1a2d38-c612-4316-aa26-8b49521e5a8b", "a PReP boot partition"),
    ("024dee41-33e7-11d3-9d69-0008c781f39f", "an MBR inside of the table"),
    ("426f6f74-0000-11aa-aa11-00306543ecac", "an Apple boot partition"),
    ("fe3a2a5d-4f32-41a7-b725-accc3285a309", "a ChromeOS kernel"),
    ("cab6e88e-abf3-4102-a07a-d4bb9be3c1d3", "ChromeOS firmware"),
    ("83bd6b9d-7f41-11dc-be0b-001560b84f0f", "a FreeBSD boot partition"),
    ("6a82cb45-1dd2-11b2-99a6-080020736631", "a Solaris boot partition"),
    ("f4019732-066e-4e12-8273-346c5641494f", "a Sony boot partition"),
    ("bfbfafe7-a34f-448a-9a5b-6213eb736c22", "a Lenovo boot partition"),
];
/// MBR types likewise.
const MBR_BOOT_TYPES: [(u8, &str); 5] = [
    (0xef, "an EFI system partition (MBR type EF)"),
    (0x41, "a PReP boot partition (MBR type 41)"),
    (0xab, "a Darwin boot partition (MBR type AB)"),
    (0xbe, "a Solaris boot partition (MBR type BE)"),
    (0xea, "an extended boot loader partition (MBR type EA)"),
];
/// Words of boot loaders that lie in the first sector and need no active partition.
const LOADERS: [(&[u8], &str); 4] =
    [(b"GRUB", "GRUB"), (b"LILO", "LILO"), (b"isolinux", "ISOLINUX"), (b"SYSLINUX", "SYSLINUX")];
/// MBR types of containers of logical partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// One partition of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// First byte on the drive.
    pub start: u64,
    /// Bytes; 0 for one that holds only other partitions.
    pub size: u64,
    /// Whether its place is certain: the entries of an MBR count blocks, and do not say of which size.
    pub certain: bool,
    /// PARTUUID as tables of a machine have it.
    pub uuid: String,
    /// PARTLABEL; empty in MBR.
    pub label: String,
    /// What boots from it, if something does.
    pub boot: Option<String>,
}

/// Everything the tables of one drive say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {
    /// Partitions of all tables, each once.
    pub partitions: Vec<Partition>,
    /// Identifiers of the whole drive.
    pub disks: Vec<String>,
    /// A boot loader in the first sector.
    pub loader: Option<&'static str>,
    /// A table that states more entries than are read.
    pub too_large: Option<String>,
}

impl Tables {
    /// Adds a partition that is not there yet; false once there are too many.
    fn add(&mut self, found: Partition) -> bool {
        if self.partitions.contains(&found) {
            return true;
        }
        if self.partitions.len() == PARTITIONS_MAX {
            self.too_large = Some(format!("its partition tables have more than {PARTITIONS_MAX} partitions"));
            return false;
        }
        self.partitions.push(found);
        true
    }
}

/// A drive to read tables from.
pub trait Bytes {
    /// Bytes of the drive.
    fn size(&self) -> u64;
    /// Up to `len` bytes at `at`; fewer at the end.
    ///
    /// # Errors
    /// Those of the reading.
    fn get(&mut self, at: u64, len: usize) -> Result<Vec<u8>, super::Unreadable>;
}

/// Reads every table of a drive with blocks of `block` bytes.
///
/// # Errors
/// Those of the reading.
pub fn read(drive: &mut impl Bytes, block: u64) -> Result<Tables, super::Unreadable> {
    let mut tables = Tables::default();
    mbr(drive, block, true, &mut tables)?;
    for other in BLOCKS.into_iter().filter(|other| *other != block) {
        mbr(drive, other, false, &mut tables)?;
    }
    let own = Some(block).filter(|b| *b > 0 && !BLOCKS.contains(b));
    for block in BLOCKS.into_iter().chain(own) {
        // The last whole block: a drive of 512-byte blocks need not end with one of 4096.
        let mut places = vec![block, (drive.size() / block).saturating_sub(1).saturating_mul(block)];
        let mut next = 0;
        while let Some(at) = places.get(next).copied() {
            next += 1;
            let header = drive.get(at, 512)?;
            if !header.starts_with(b"EFI PART") {
                continue;
            }
            // Where the header says that the other one lies; a few steps, since headers may lie.
            let other = number(&header, 32, 8).saturating_mul(block);
            if places.len() < 8 && !places.contains(&other) {
                places.push(other);
            }
            gpt(drive, block, at, &header, &mut tables)?;
        }
    }
    Ok(tables)
}

/// The entries of the GPT whose header lies at `at`: where it says, and where they are by default.
fn gpt(
    drive: &mut impl Bytes,
    block: u64,
    at: u64,
    header: &[u8],
    tables: &mut Tables,
) -> Result<(), super::Unreadable> {
    let disk = guid(header.get(56..72).unwrap_or_default());
    tables.disks.extend(disk.filter(|d| !tables.disks.contains(d)));
    let (count, size) = (number(header, 80, 4), number(header, 84, 4).clamp(128, 4096));
    let len = count.saturating_mul(size);
    if len > ENTRIES_MAX {
        tables.too_large = Some(format!("its partition table states {count} entries of {size} bytes"));
    }
    let len = len.clamp(128 * 128, ENTRIES_MAX);
    let stated = number(header, 72, 8).saturating_mul(block);
    let default = if at == block { 2 * block } else { at.saturating_sub(128 * 128) };
    for (from, size) in [(stated, size), (default, 128)] {
        for entry in drive.get(from, len as usize)?.chunks_exact(size as usize) {
            if entry_of(entry, block).is_some_and(|found| !tables.add(found)) {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn entry_of(entry: &[u8], block: u64) -> Option<Partition> {
    let kind = guid(&entry[..16])?;
    let attributes = number(entry, 48, 8);
    let name: Vec<u16> = entry[56..128].chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect();
    let label = String::from_utf16_lossy(&name);
    let known = BOOT_TYPES.iter().find(|(text, _)| *text == kind).map(|(_, what)| (*what).to_owned());
    let by_attribute = || {
        let what = match attributes {
            a if a & LEGACY_BOOT != 0 => "a partition that a BIOS boots from (attribute 2)",
            a if a & REQUIRED != 0 => "a partition that the platform needs (attribute 0)",
            _ => return None,
        };
        Some(what.to_owned())
    };
    let (first, last) = (number(entry, 32, 8), number(entry, 40, 8));
    Some(Partition {
        start: first.saturating_mul(block),
        size: last.saturating_add(1).saturating_sub(first).saturating_mul(block),
        certain: true,
        uuid: guid(&entry[16..32]).unwrap_or_default(),
        label: label.split('\0').next().unwrap_or("").to_owned(),
        boot: known.or_else(by_attribute),
    })
}

/// The master boot record and the chain of logical partitions.
fn mbr(drive: &mut impl Bytes, block: u64, certain: bool, tables: &mut Tables) -> Result<(), super::Unreadable> {
    let sector = drive.get(0, 512)?;
    // A loader on a drive without a table (SYSLINUX on a FAT of the whole drive) has its text where a table would be.
    let end = if mbr_entries(&sector).is_some() { 440 } else { sector.len().min(510) };
    let holds = |word: &[u8]| sector[..end].windows(word.len()).any(|w| w == word);
    tables.loader = LOADERS.iter().find(|(word, _)| holds(word)).map(|(_, name)| *name);
    let Some(entries) = mbr_entries(&sector) else { return Ok(()) };
    let code = sector[..440].iter().any(|b| *b != 0);
    let disk = format!("{:08x}", number(&sector, 440, 4));
    if disk != "00000000" && !tables.disks.contains(&disk) {
        tables.disks.push(disk.clone());
    }
    let mut extended = Vec::new();
    for (i, entry) in entries.iter().enumerate() {
        if EXTENDED.contains(&entry.kind) {
            extended.push(entry.first.saturating_mul(block));
        }
        if entry.kind == 0xee {
            // It only protects a GPT; a loader that asks for an active one is shown by its code.
            continue;
        }
        let active = entry.active && code;
        let start = entry.first.saturating_mul(block);
        tables.add(Partition { certain, ..logical(entry, start, block, &disk, i + 1, active) });
    }
    let (mut index, mut seen) = (5, Vec::new());
    for base in extended {
        let mut at = base;
        // A chain may run in a circle.
        while !seen.contains(&at) {
            if seen.len() == PARTITIONS_MAX {
                tables.too_large =
                    Some(format!("its chain of logical partitions has more than {PARTITIONS_MAX} tables"));
                return Ok(());
            }
            seen.push(at);
            let sector = drive.get(at, 512)?;
            let Some(entries) = mbr_entries(&sector) else { break };
            for entry in entries.iter().filter(|e| !EXTENDED.contains(&e.kind)) {
                let start = at.saturating_add(entry.first.saturating_mul(block));
                let found = logical(entry, start, block, &disk, index, entry.active && code);
                tables.add(Partition { certain, ..found });
                index += 1;
            }
            let Some(next) = entries.iter().find(|e| EXTENDED.contains(&e.kind)) else { break };
            at = base.saturating_add(next.first.saturating_mul(block));
        }
    }
    Ok(())
}

fn logical(entry: &MbrEntry, start: u64, block: u64, disk: &str, index: usize, active: bool) -> Partition {
    let known = MBR_BOOT_TYPES.iter().find(|(kind, _)| *kind == entry.kind).map(|(_, what)| (*what).to_owned());
    let active = active.then(|| "an active partition and boot code before it".to_owned());
    let size = if EXTENDED.contains(&entry.kind) { 0 } else { entry.count.saturating_mul(block) };
    let uuid = format!("{disk}-{index:02x}");
    Partition { start, size, certain: true, uuid, label: String::new(), boot: known.or(active) }
}

struct MbrEntry {
    active: bool,
    kind: u8,
    first: u64,
    count: u64,
}

/// The entries of a sector that is a partition table; `None` for the first sector of a file system,
/// which ends with the same two bytes.
fn mbr_entries(sector: &[u8]) -> Option<Vec<MbrEntry>> {
    if sector.get(510..512) != Some(&[0x55, 0xaa]) {
        return None;
    }
    let entries = sector[446..510].chunks_exact(16);
    if entries.clone().any(|e| e[0] & 0x7f != 0) {
        return None;
    }
    let used = entries.filter(|e| e[4] != 0 && number(e, 12, 4) != 0);
    let entry =
        |e: &[u8]| MbrEntry { active: e[0] == 0x80, kind: e[4], first: number(e, 8, 4), count: number(e, 12, 4) };
    Some(used.map(entry).collect())
}

/// A little-endian number; 0 where there are no bytes.
pub fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let part = bytes.get(at..at + len).unwrap_or_default();
    part.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// A GUID as text, its first three fields little-endian; `None` for zeros or too few bytes.
pub fn guid(b: &[u8]) -> Option<String> {
    if b.len() != 16 || b.iter().all(|b| *b == 0) {
        return None;
    }
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let back = |bytes: &[u8]| bytes.iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
    Some(format!("{}-{}-{}-{}-{}", back(&b[..4]), back(&b[4..6]), back(&b[6..8]), hex(&b[8..10]), hex(&b[10..16])))
}
