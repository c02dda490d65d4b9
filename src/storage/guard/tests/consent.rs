//! Consent to reading what a drive holds and consent to losing it are two lines of an entry. One line was both: a list
//! that was written for binding a drive let `nt stage --erase` overwrite it.

use super::*;
use crate::storage::image::{self, mark};

const DISK: &str = "/dev/nvme1n1";
const P1: &str = "/dev/nvme1n1p1";

/// A list whose entry lets these contents be read and these be erased.
fn consents(holds: &[&str], erase: &[&str]) -> Result<Allowlist, String> {
    let mut list = list().unwrap();
    list.drive[0].holds = holds.iter().map(|kind| (*kind).into()).collect();
    list.drive[0].erase = erase.iter().map(|kind| (*kind).into()).collect();
    Ok(list)
}

/// The drive with a table and ext4 in its partition.
fn with_ext4() -> Fake {
    let fake = clean();
    fake.stamp(P1, 0x438, &[0x53, 0xef]);
    fake
}

/// Makes the drive one of so many MiB of zeros.
fn blank(f: &Fake, mib: u64) {
    f.put("/sys/class/block/nvme1n1/size", &format!("{}", mib << 11));
    fs::write(f.dir.path().join(&DISK[1..]), "").unwrap();
    f.stamp(DISK, (mib << 20) as usize - 1, &[0]);
}

fn contents(reasons: &[Reason]) -> Vec<&str> {
    reasons.iter().filter(|r| r.check == Check::Contents).map(|r| r.what.as_str()).collect()
}

#[test]
fn what_may_be_read_may_not_be_erased() {
    let fake = with_ext4();
    assert_eq!(fake.reasons(&consents(&["gpt", "ext4"], &[])), vec![]);
    let reasons = fake.reasons_for(&consents(&["gpt", "ext4"], &[]), Purpose::Erase);
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    for what in contents(&reasons) {
        assert!(what.contains("lets nt read (holds) and not erase"), "{what}");
        assert!(what.ends_with("its entry needs the line erase = [\"gpt\", \"ext4\"] as well"), "{what}");
    }
    // And the other way round: a drive that may be overwritten is no drive that may be read.
    assert_eq!(fake.reasons_for(&consents(&[], &["gpt", "ext4"]), Purpose::Erase), vec![]);
    assert_eq!(contents(&fake.reasons(&consents(&[], &["gpt", "ext4"]))).len(), 2);
}

/// The line that a reason names is the whole line: pasted, it is all that is needed, whatever stood there before.
#[test]
fn the_line_that_is_named_is_enough() {
    for (purpose, key) in [(Purpose::Read, "holds = ["), (Purpose::Erase, "erase = [")] {
        for before in [&[][..], &["xfs"], &["ext4"]] {
            let fake = with_ext4();
            let (holds, erase) = if purpose == Purpose::Read { (before, &[][..]) } else { (&[][..], before) };
            let reasons = fake.reasons_for(&consents(holds, erase), purpose);
            let told: Vec<_> = contents(&reasons);
            assert_eq!(told.len(), if before == ["ext4"] { 1 } else { 2 }, "{told:?}");
            let line = told[0].split(key).nth(1).and_then(|rest| rest.split(']').next()).unwrap();
            assert!(told.iter().all(|what| what.contains(&format!("{key}{line}]"))), "{told:?}");
            let entry = "[[drive]]\npci = \"0000:02:00.0\"\nserial = \"EXP\"\nmodel = \"Model X\"\nnamespace = 1\nsize = 2097152\n";
            let pasted = Allowlist::parse(&format!("{entry}{key}{line}]\n"));
            assert_eq!(fake.reasons_for(&pasted, purpose), vec![], "{line}");
            assert!(before.iter().all(|kind| line.contains(kind)), "{line}");
        }
    }
}

/// A drive that nt staged, one whose staging was cut off, and an empty one need no line, for either purpose.
#[test]
fn nts_own_and_nothing_need_no_consent() {
    type Make = fn(&Fake);
    let own: [(&str, Make); 4] = [
        ("staged", |f| {
            for (at, bytes) in gpt::table(8 << 20, 512) {
                f.stamp(DISK, at as usize, &bytes);
            }
            f.stamp(P1, 0, &image::superblock(b"[]"));
            f.stamp(P1, 1 << 20, b"weights");
            f.stamp(DISK, 1 << 20, &image::superblock(b"[]"));
            f.stamp(DISK, 3 << 20, b"weights");
        }),
        ("cut off", |f| {
            f.stamp(DISK, 0, &mark::mark(&[]));
            f.stamp(DISK, 512, b"EFI PART");
        }),
        ("cut off, with the old table in other blocks and what it described", |f| {
            linux_table(f, 4096);
            f.stamp(DISK, EXT4 + 0x438, &[0x53, 0xef]);
            f.stamp(DISK, 0, &mark::mark(&[]));
            forget(f);
        }),
        ("empty", |_| ()),
    ];
    for (name, make) in own {
        let fake = clean();
        blank(&fake, 8);
        make(&fake);
        for purpose in [Purpose::Read, Purpose::Erase] {
            let found = fake.reasons_for(&consents(&[], &[]), purpose);
            assert_eq!(contents(&found), [""; 0], "{name}, {purpose:?}");
        }
    }
}

/// What only looks like nt's: its table on a drive with something else, its image without its table.
#[test]
fn what_only_looks_like_nts_is_not_erased() {
    type Make = fn(&Fake);
    let foreign: [(&str, Make); 7] = [
        ("something behind its table", |f| {
            for (at, bytes) in gpt::table(8 << 20, 512) {
                f.stamp(DISK, at as usize, &bytes);
            }
            f.stamp(DISK, 600 << 10, b"mine");
        }),
        ("a damaged mark", |f| {
            f.stamp(DISK, 0, &mark::mark(&[]));
            f.stamp(DISK, 20, b"x");
        }),
        ("the magic of an image on the whole drive", |f| f.stamp(DISK, 0, image::MAGIC)),
        ("eight bytes of an image in a partition, and data", |f| {
            f.stamp(P1, 0, image::MAGIC);
            f.stamp(P1, 8, &[7; 8192]);
        }),
        ("a superblock with one bit wrong", |f| {
            f.stamp(P1, 0, &image::superblock(b"[]"));
            f.stamp(P1, 2000, &[1]);
        }),
        ("a superblock of another version", |f| {
            let mut sb = image::superblock(b"[]");
            sb[8] = 2;
            f.stamp(P1, 0, &sb);
        }),
        ("a mark in a partition", |f| f.stamp(P1, 0, &mark::mark(&[]))),
    ];
    for (name, make) in foreign {
        let fake = clean();
        blank(&fake, 8);
        make(&fake);
        let reasons = fake.reasons_for(&consents(&["gpt", "nt image", "nt staging"], &[]), Purpose::Erase);
        assert_eq!(contents(&reasons).len(), 1, "{name}: {reasons:?}");
    }
}

/// Where the tables of `linux_table` and `mbr_of` have their one partition.
const EXT4: usize = 1 << 20;

/// A GPT in blocks of `block` bytes with one partition of Linux data on the drive of 8 MiB.
fn linux_table(f: &Fake, block: u64) {
    for (at, mut bytes) in gpt::table(8 << 20, block) {
        if bytes.starts_with(&gpt::TYPE) {
            bytes[..16].copy_from_slice(b"somebody's data!");
        }
        f.stamp(DISK, at as usize, &bytes);
    }
}

/// An MBR with one partition, whose numbers count blocks of `block` bytes.
fn mbr_of(f: &Fake, block: u32) {
    let mut entry = [0; 16];
    entry[4] = 0x83;
    entry[8..12].copy_from_slice(&(EXT4 as u32 / block).to_le_bytes());
    entry[12..].copy_from_slice(&((6 << 20) / block).to_le_bytes());
    f.stamp(DISK, 446, &entry);
    f.stamp(DISK, 510, &[0x55, 0xaa]);
}

/// Has the kernel forget the drive's partition.
fn forget(f: &Fake) {
    for path in ["sys/class/block/nvme1n1/nvme1n1p1", "sys/class/block/nvme1n1p1"] {
        fs::remove_dir_all(f.dir.path().join(path)).unwrap();
    }
}

/// A partition that the kernel does not show was erased without consent to what lay in it, and a table of the machine
/// that named its file system did not refuse: a table in blocks of 4096 bytes on a drive of 512, as USB enclosures write
/// them, or partitions that a stage had the kernel forget before it was killed.
#[test]
fn what_lies_in_partitions_that_the_kernel_does_not_show_counts() {
    type Make = fn(&Fake);
    let tables: [(&str, Make); 8] = [
        ("GPT in blocks of 4096", |f| linux_table(f, 4096)),
        ("GPT in blocks of 2048", |f| linux_table(f, 2048)),
        ("GPT that the kernel was told to forget", |f| linux_table(f, 512)),
        ("only its backup", |f| {
            linux_table(f, 4096);
            f.stamp(DISK, 0, &[0; 64 << 10]);
        }),
        ("only its backup, on a drive that does not end with a whole block", |f| {
            linux_table(f, 4096);
            f.stamp(DISK, 0, &[0; 64 << 10]);
            f.put("/sys/class/block/nvme1n1/size", &format!("{}", (8 << 11) + 1));
            f.stamp(DISK, (8 << 20) + 511, &[0]);
        }),
        ("MBR", |f| mbr_of(f, 512)),
        ("MBR in blocks of 4096", |f| mbr_of(f, 4096)),
        ("GPT, and the kernel shows another partition", |f| {
            linux_table(f, 512);
            f.put("/sys/class/block/nvme1n1p1/size", "8");
        }),
    ];
    let consent = consents(&["gpt", "mbr", "ext4", "unknown data"], &["gpt", "mbr", "unknown data"]);
    for (name, make) in tables {
        let fake = clean();
        blank(&fake, 8);
        make(&fake);
        if !name.contains("another") {
            forget(&fake);
        }
        fake.stamp(DISK, EXT4 + 0x438, &[0x53, 0xef]);
        fake.stamp(DISK, EXT4 + 0x468, b"\x1f\x2e\x3d\x4c0123456789ab");
        let reasons = fake.reasons_for(&consent, Purpose::Erase);
        let told = contents(&reasons);
        let wanted = format!("it holds ext4, in a partition from byte {EXT4} on");
        assert!(told.iter().any(|what| what.starts_with(&wanted)), "{name}: {reasons:?}");
        assert_eq!(contents(&fake.reasons(&consent)), [""; 0], "{name}: its entry lets it be read");
        let unit = "[Mount]\nWhat=/dev/disk/by-uuid/1f2e3d4c-3031-3233-3435-363738396162\nWhere=/srv\n";
        fake.put("/etc/systemd/system/srv.mount", unit);
        let reasons = fake.reasons(&consent);
        assert!(reasons.iter().any(|r| r.check == Check::Configured), "{name}: {reasons:?}");
    }
}

/// What is merely somebody's bytes where a partition would lie if the MBR counted larger blocks, is no partition.
#[test]
fn a_partition_is_not_looked_for_in_anothers_data() {
    let fake = clean();
    blank(&fake, 32);
    mbr_of(&fake, 512);
    fake.stamp(DISK, 8 << 20, &[7; 70 << 10]);
    for base in ["/sys/class/block/nvme1n1/nvme1n1p1", "/sys/class/block/nvme1n1p1"] {
        fake.put(&format!("{base}/size"), &format!("{}", 6 << 11));
    }
    assert_eq!(contents(&fake.reasons(&consents(&["mbr"], &[]))), [""; 0]);
}

/// The same of a hibernated system.
#[test]
fn a_system_hibernated_in_a_partition_that_is_not_shown_refuses() {
    let fake = clean();
    blank(&fake, 8);
    linux_table(&fake, 4096);
    forget(&fake);
    fake.stamp(DISK, EXT4 + 4086, b"S1SUSPEND\0");
    let reasons = fake.reasons(&consents(&["gpt", "swap"], &[]));
    assert!(reasons.iter().any(|r| r.check == Check::Swap), "{reasons:?}");
}

/// A drive whose ends are empty and that holds something between them may be read, and is not erased unasked.
#[test]
fn what_lies_between_empty_ends_is_not_erased() {
    for at in [5 << 20, 20 << 20, 27 << 20] {
        let fake = clean();
        blank(&fake, 32);
        fake.stamp(DISK, at, &[7; 70 << 10]);
        let reasons = fake.reasons_for(&consents(&["unknown data"], &[]), Purpose::Erase);
        assert!(contents(&reasons)[0].contains("erase = [\"unknown data\"]"), "{reasons:?}");
        assert_eq!(contents(&fake.reasons_for(&consents(&[], &["unknown data"]), Purpose::Erase)), [""; 0]);
        assert_eq!(contents(&fake.reasons(&consents(&[], &[]))), [""; 0]);
    }
    // The same in a partition, whose table may go.
    let fake = with_ext4();
    for base in ["/sys/class/block/nvme1n1/nvme1n1p1", "/sys/class/block/nvme1n1p1"] {
        fake.put(&format!("{base}/size"), &format!("{}", 32 << 11));
    }
    fs::write(fake.dir.path().join(&P1[1..]), "").unwrap();
    fake.stamp(P1, (32 << 20) - 1, &[0]);
    assert_eq!(fake.reasons_for(&consents(&[], &["gpt"]), Purpose::Erase), vec![]);
    fake.stamp(P1, 16 << 20, &[7; 70 << 10]);
    let reasons = fake.reasons_for(&consents(&[], &["gpt"]), Purpose::Erase);
    assert!(contents(&reasons)[0].contains("erase = [\"gpt\", \"unknown data\"]"), "{reasons:?}");
}

/// An old list is read as before, one with the new line too, and a wrong word is an error and no consent.
#[test]
fn lists_of_before_are_read() {
    let entry = "[[drive]]\npci = \"p\"\nserial = \"S\"\nmodel = \"M\"\nnamespace = 1\nsize = 1\n";
    let list = Allowlist::parse(&format!("{entry}holds = [\"ext4\"]\n")).unwrap();
    assert!(list.drive[0].erase.is_empty());
    assert!(!toml::to_string(&list).unwrap().contains("erase"));
    let list = Allowlist::parse(&format!("{entry}erase = [\"ext4\"]\n")).unwrap();
    assert_eq!((list.drive[0].holds.len(), &list.drive[0].erase[..]), (0, &["ext4".to_owned()][..]));
    for wrong in ["erase = true\n", "erase = \"ext4\"\n", "Erase = [\"ext4\"]\n", "holds = []\nholds = []\n"] {
        assert!(Allowlist::parse(&format!("{entry}{wrong}")).is_err(), "{wrong}");
    }
}
