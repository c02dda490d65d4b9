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
    let own: [(&str, Make); 3] = [
        ("staged", |f| {
            for (at, bytes) in gpt::table(8 << 20, 512) {
                f.stamp(DISK, at as usize, &bytes);
            }
            f.stamp(P1, 0, image::MAGIC);
            f.stamp(P1, 1 << 20, b"weights");
            f.stamp(DISK, 1 << 20, image::MAGIC);
            f.stamp(DISK, 3 << 20, b"weights");
        }),
        ("cut off", |f| {
            f.stamp(DISK, 0, &mark::mark(&[]));
            f.stamp(DISK, 512, b"EFI PART");
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
    let foreign: [(&str, Make); 4] = [
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
