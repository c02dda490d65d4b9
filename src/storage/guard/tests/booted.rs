//! Partitions that something boots from, in tables of every sort and place. Each drive's entry accepts
//! whatever the drive holds, so that only this check refuses.

use super::*;

const DISK: &str = "/dev/nvme1n1";
const ESP: [u8; 16] = gpt::EFI_SYSTEM;
const XBOOTLDR: [u8; 16] = mixed(0xbc13_c2ff, 0x59e6, 0x4262, *b"\xa3\x52\xb2\x75\xfd\x6f\x71\x72");
const PREP: [u8; 16] = mixed(0x9e1a_2d38, 0xc612, 0x4316, *b"\xaa\x26\x8b\x49\x52\x1e\x5a\x8b");
const CHROME: [u8; 16] = mixed(0xfe3a_2a5d, 0x4f32, 0x41a7, *b"\xb7\x25\xac\xcc\x32\x85\xa3\x09");
const BOOT: Check = Check::Boot;

/// A GUID as it lies on a drive.
const fn mixed(a: u32, b: u16, c: u16, rest: [u8; 8]) -> [u8; 16] {
    let (a, b, c, r) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes(), rest);
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]]
}

/// Writes an entry of an MBR: its state, type, first block and number of blocks.
fn mbr(f: &Fake, sector: usize, slot: usize, entry: (u8, u8, u32, u32)) {
    let (state, kind, first, blocks) = entry;
    let mut bytes = [0; 16];
    (bytes[0], bytes[4]) = (state, kind);
    bytes[8..12].copy_from_slice(&first.to_le_bytes());
    bytes[12..].copy_from_slice(&blocks.to_le_bytes());
    f.stamp(DISK, sector * 512 + 446 + slot * 16, &bytes);
    f.stamp(DISK, sector * 512 + 510, &[0x55, 0xaa]);
}

/// Nothing but zeros.
fn wipe(f: &Fake) {
    fs::write(f.dir.path().join(&DISK[1..]), vec![0; 2 << 20]).unwrap();
}

/// An MBR with one partition where the kernel shows it.
fn only_mbr(f: &Fake, state: u8, kind: u8) {
    wipe(f);
    mbr(f, 0, 0, (state, kind, 2048, 2048));
}

/// Moves the entries of the first table to `block`, the first of them of type `kind`.
fn entries_at(f: &Fake, block: u64, kind: [u8; 16]) {
    let mut entry = [0; 128];
    entry[..16].copy_from_slice(&kind);
    entry[32..40].copy_from_slice(&2048_u64.to_le_bytes());
    f.stamp(DISK, block as usize * 512, &entry);
    f.stamp(DISK, 512 + 72, &block.to_le_bytes());
}

/// A boot entry of the firmware whose path has a PCI node and this partition's.
fn entry(f: &Fake, name: &str, kind: u8, signature: &[u8], number: u8) {
    let mut drive = vec![4, 1, 42, 0, number, 0, 0, 0];
    drive.extend(2048u64.to_le_bytes());
    drive.extend(2048u64.to_le_bytes());
    drive.extend(signature);
    drive.resize(40, 0);
    drive.extend([kind, kind]);
    let path = [&[1, 1, 6, 0, 0, 2][..], &drive, &[4, 4, 8, 0, b'x', 0, 0, 0], &[0x7f, 0xff, 4, 0]].concat();
    let mut option = vec![7, 0, 0, 0, 1, 0, 0, 0];
    option.extend((path.len() as u16).to_le_bytes());
    option.extend("nt\0".encode_utf16().flat_map(u16::to_le_bytes));
    option.extend(path);
    option.extend([1, 2, 3]);
    let at = format!("sys/firmware/efi/efivars/{name}-8be4df61-93ca-11d2-aa0d-00e098032b8c");
    f.folder("/sys/firmware/efi/efivars");
    fs::write(f.dir.path().join(at), option).unwrap();
}

/// The GUID of the drive's first partition, as it lies there.
fn first_partition(f: &Fake) -> Vec<u8> {
    fs::read(f.dir.path().join(&DISK[1..])).unwrap()[1024 + 16..1024 + 32].to_vec()
}

type Spoil = fn(&Fake);
type Row = (&'static str, Check, Spoil);

const ROWS: &[Row] = &[
    ("the firmware's boot entry names a partition of data", BOOT, |f| entry(f, "Boot0003", 2, &first_partition(f), 1)),
    ("the firmware's boot entry names a partition of an MBR", BOOT, |f| {
        only_mbr(f, 0, 0x83);
        f.stamp(DISK, 440, &[0x78, 0x56, 0x34, 0x12]);
        entry(f, "Boot00AF", 1, &[0x78, 0x56, 0x34, 0x12], 1);
    }),
    ("an entry of a driver that the firmware loads", BOOT, |f| entry(f, "Driver0000", 2, &first_partition(f), 1)),
    ("an entry of a program before the start", BOOT, |f| entry(f, "SysPrep0001", 2, &first_partition(f), 1)),
    ("entries past 1 MiB, where the header says", BOOT, |f| entries_at(f, 3000, ESP)),
    ("only the backup has it", BOOT, |f| f.stamp(DISK, (2 << 20) - 33 * 512, &ESP)),
    ("the first header is gone", BOOT, |f| {
        f.stamp(DISK, 512, &[0; 512]);
        f.stamp(DISK, (2 << 20) - 33 * 512, &ESP);
    }),
    ("a header whose checksum is wrong", BOOT, |f| {
        f.table(DISK, ESP);
        f.stamp(DISK, 512 + 16, &[0; 4]);
    }),
    ("entries of 256 bytes", BOOT, |f| {
        f.stamp(DISK, 512 + 84, &[0, 1, 0, 0]);
        f.stamp(DISK, 1024 + 256, &ESP);
    }),
    ("a table in blocks of 4096 on a drive of 512", BOOT, |f| {
        wipe(f);
        f.stamp(DISK, 4096, b"EFI PART");
        f.stamp(DISK, 4096 + 72, &[2]);
        f.stamp(DISK, 4096 + 80, &[128, 0, 0, 0, 128]);
        f.stamp(DISK, 8192, &ESP);
        f.stamp(DISK, 8192 + 32, &[0, 1]);
    }),
    ("a second header where the first says", BOOT, |f| {
        f.stamp(DISK, 512 + 32, &1500_u64.to_le_bytes());
        f.stamp(DISK, 1500 * 512, b"EFI PART");
        f.stamp(DISK, 1500 * 512 + 72, &1501_u64.to_le_bytes());
        f.stamp(DISK, 1501 * 512, &ESP);
    }),
    ("the last entry of the table", BOOT, |f| f.stamp(DISK, 1024 + 127 * 128, &ESP)),
    ("XBOOTLDR", BOOT, |f| f.table(DISK, XBOOTLDR)),
    ("PReP", BOOT, |f| f.table(DISK, PREP)),
    ("ChromeOS kernel", BOOT, |f| f.table(DISK, CHROME)),
    ("a BIOS boots from it, by attribute", BOOT, |f| f.stamp(DISK, 1024 + 48, &[4])),
    ("the platform needs it, by attribute", BOOT, |f| f.stamp(DISK, 1024 + 48, &[1])),
    ("MBR type EF", BOOT, |f| only_mbr(f, 0, 0xef)),
    ("MBR type 41", BOOT, |f| only_mbr(f, 0, 0x41)),
    ("an active partition and boot code", BOOT, |f| {
        only_mbr(f, 0x80, 0x83);
        f.stamp(DISK, 0, &[0xfa, 0x33, 0xc0]);
    }),
    ("hybrid MBR", BOOT, |f| mbr(f, 0, 1, (0, 0xef, 2048, 2048))),
    ("a logical partition of type EF", BOOT, |f| {
        only_mbr(f, 0, 0x83);
        mbr(f, 0, 1, (0, 0x0f, 3000, 1000));
        mbr(f, 3000, 0, (0, 0x83, 1, 10));
        mbr(f, 3000, 1, (0, 0x05, 20, 100));
        mbr(f, 3020, 0, (0, 0xef, 1, 10));
    }),
    ("GRUB in the first sector", BOOT, |f| {
        only_mbr(f, 0, 0x83);
        f.stamp(DISK, 0x180, b"GRUB \0Geom\0");
    }),
    ("SYSLINUX on a FAT of the whole drive, without a table", BOOT, |f| {
        wipe(f);
        f.stamp(DISK, 3, b"SYSLINUX");
        f.stamp(DISK, 446, b"boot code text here, no table");
        f.stamp(DISK, 510, &[0x55, 0xaa]);
    }),
    ("GRUB in a first sector without a table", BOOT, |f| {
        wipe(f);
        f.stamp(DISK, 0x1d0, b"GRUB ");
    }),
    ("udev knows an EFI system partition", BOOT, |f| {
        f.put("/run/udev/data/b259:11", "E:ID_PART_ENTRY_TYPE=c12a7328-f81f-11d2-ba4b-00a0c93ec93b\n");
    }),
    ("the kernel shows a partition that no table has", Check::Unreadable, |f| wipe(f)),
    ("a partition of another start", Check::Unreadable, |f| {
        f.put("/sys/class/block/nvme1n1/nvme1n1p2/dev", "259:12");
        for base in ["/sys/class/block/nvme1n1/nvme1n1p2", "/sys/class/block/nvme1n1p2"] {
            for (file, text) in [("partition", "2"), ("start", "3000"), ("size", "8"), ("dev", "259:12")] {
                f.put(&format!("{base}/{file}"), text);
            }
            f.folder(&format!("{base}/holders"));
        }
        f.put("/dev/nvme1n1p2", "zero");
    }),
    ("a table of more entries than are read", Check::Unreadable, |f| f.stamp(DISK, 512 + 80, &[0xff; 4])),
    ("a hibernated system", Check::Swap, |f| f.stamp("/dev/nvme1n1p1", 4086, b"S1SUSPEND\0")),
    ("a hibernated system in larger pages", Check::Swap, |f| f.stamp("/dev/nvme1n1p1", 65526, b"LINHIB0001")),
    ("a hibernated system on another drive, which may have this one mounted", Check::Swap, |f| {
        f.put("/run/udev/data/b259:1", "E:ID_FS_USAGE=other\nE:ID_FS_TYPE=swsuspend\n");
    }),
];

#[test]
fn boot_partitions_refuse_wherever_their_table_lies() {
    let mut missed = Vec::new();
    for (name, check, spoil) in ROWS {
        let fake = clean();
        spoil(&fake);
        let reasons = fake.reasons(&accepting());
        if !reasons.iter().any(|r| r.check == *check) {
            missed.push(format!("{name}: {check:?} was expected, {reasons:?} was found"));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

/// Tables of data alone pass where the entry accepts them.
#[test]
fn tables_of_data_pass() {
    let pass: [(&str, Spoil); 6] = [
        ("MBR of data", |f| only_mbr(f, 0, 0x83)),
        ("active without boot code", |f| only_mbr(f, 0x80, 0x83)),
        // parted writes code that says there is nothing to boot.
        ("boot code without an active partition", |f| {
            only_mbr(f, 0, 0x83);
            f.stamp(DISK, 0, &[0xfa, 0xb8, 0, 0x10, 0x8e, 0xd0]);
        }),
        ("logical partitions in a circle", |f| {
            only_mbr(f, 0, 0x83);
            mbr(f, 0, 1, (0, 0x0f, 3000, 1000));
            mbr(f, 3000, 0, (0, 0x83, 1, 10));
            mbr(f, 3000, 1, (0, 0x05, 0, 100));
        }),
        ("headers in a circle", |f| f.stamp(DISK, 512 + 32, &1_u64.to_le_bytes())),
        ("a header that points past the end", |f| {
            f.stamp(DISK, 512 + 72, &u64::MAX.to_le_bytes());
            f.stamp(DISK, 512 + 32, &u64::MAX.to_le_bytes());
        }),
    ];
    for (name, make) in pass {
        let fake = clean();
        make(&fake);
        assert_eq!(fake.reasons(&accepting()), vec![], "{name}");
    }
}

/// Entries of other drives, of partitions that are gone, and damaged ones are no reason; none panics.
#[test]
fn boot_entries_of_others_are_no_reason() {
    let fake = clean();
    let own = first_partition(&fake);
    entry(&fake, "Boot0001", 2, &[9; 16], 1);
    entry(&fake, "Boot0002", 1, &own, 1);
    entry(&fake, "Boot0004", 0, &own, 1);
    entry(&fake, "BootOrder", 2, &own, 1);
    entry(&fake, "Boot00005", 2, &own, 1);
    fake.put("/sys/firmware/efi/efivars/Boot0006-8be4df61-93ca-11d2-aa0d-00e098032b8c", "");
    fake.put("/sys/firmware/efi/efivars/Boot0007-00000000-0000-0000-0000-000000000000", "x");
    assert_eq!(fake.reasons(&accepting()), vec![]);
    let at = fake.dir.path().join("sys/firmware/efi/efivars/Boot0003-8be4df61-93ca-11d2-aa0d-00e098032b8c");
    entry(&fake, "Boot0003", 2, &own, 1);
    let whole = fs::read(&at).unwrap();
    for len in 0..whole.len() {
        fs::write(&at, &whole[..len]).unwrap();
        fake.reasons(&accepting());
    }
}

fn accepting() -> Result<Allowlist, String> {
    let mut list = list().unwrap();
    list.drive[0].holds.extend(["mbr", "swap", "unknown data"].map(String::from));
    Ok(list)
}

/// Tables of more partitions than are looked at refuse, whatever the rest of them may be; the same ones twice are few.
#[test]
fn more_partitions_than_are_read_refuse() {
    let too_many = |fake: &Fake| {
        let reasons = fake.reasons(&accepting());
        reasons.iter().any(|r| r.check == Check::Unreadable && r.what.contains("more than 256"))
    };
    let gpt_of = |count: u32, distinct: bool| {
        let fake = clean();
        fake.stamp(DISK, 512 + 80, &count.to_le_bytes());
        for i in 0..count {
            let mut entry = [0; 128];
            entry[..16].copy_from_slice(&gpt::TYPE);
            entry[16] = 1;
            entry[17..21].copy_from_slice(&(if distinct { i } else { 7 }).to_le_bytes());
            entry[32..40].copy_from_slice(&2048_u64.to_le_bytes());
            fake.stamp(DISK, 1024 + 128 * i as usize, &entry);
        }
        fake
    };
    assert!(too_many(&gpt_of(300, true)));
    assert!(!too_many(&gpt_of(300, false)));
    assert!(!too_many(&gpt_of(128, true)));
    // A chain of logical partitions, of which each is another one and none is new.
    for (tables, refused) in [(200, false), (300, true)] {
        let fake = clean();
        wipe(&fake);
        mbr(&fake, 0, 0, (0, 0x05, 2048, 2048));
        for i in 0..tables {
            mbr(&fake, 2048 + i as usize, 0, (0, 0x05, i + 1, 8));
        }
        assert_eq!(too_many(&fake), refused, "{tables}");
    }
}
