//! Damaged input from a fixed seed, 10,000 of each sort: no panic, no endless walk, and nothing that
//! was refused is accepted.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::super::partitions::{Bytes, read};
use super::super::words::Words;
use super::super::{records, signatures, superblocks};
use super::*;

const EACH: usize = 10_000;
const SEED: u64 = 0x6e74_6775_6172_6421;

/// Changes up to six bytes: a flipped bit, any byte, a removed or a doubled one, a run of one value.
fn mutate(rng: &mut impl Rng, bytes: &mut Vec<u8>) {
    for _ in 0..rng.random_range(1..=6) {
        if bytes.is_empty() {
            return;
        }
        let at = rng.random_range(0..bytes.len());
        match rng.random_range(0..5) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => drop(bytes.remove(at)),
            3 => bytes.insert(at, bytes[at]),
            _ => {
                let end = (at + rng.random_range(1..9)).min(bytes.len());
                let value = *[0, 0xff, 0x80, b'"', b'\\', b'#', b'\n'].get(rng.random_range(0..7)).unwrap();
                bytes[at..end].fill(value);
            }
        }
    }
}

/// Runs `check` with each mutation of `text`.
fn each(text: &[u8], mut check: impl FnMut(&[u8])) {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    for _ in 0..EACH {
        let mut bytes = text.to_vec();
        mutate(&mut rng, &mut bytes);
        check(&bytes);
    }
}

fn drive(fake: &Fake) -> (Host, Vec<Controller>) {
    let host = Host::at(fake.dir.path());
    let all = sysfs::controllers(&host).unwrap();
    (host, all)
}

/// A damaged list describes our drive only where its entry still says all of it, and never where it was
/// another drive's.
#[test]
fn damaged_lists_accept_no_other_drive() {
    let fake = clean();
    let (host, all) = drive(&fake);
    let ours = sysfs::find(&host, &all, "nvme1n1").unwrap();
    let good = "[[drive]]\npci = \"0000:02:00.0\"\nserial = \"EXP\"\nmodel = \"Model X\"\nnamespace = 1\nsize = 2097152\nholds = [\"gpt\"]\n";
    let accepted = |text: &[u8]| {
        let list = Allowlist::parse(&String::from_utf8_lossy(text)).ok()?;
        let found = list.entry(&ours.serial, 1).ok()?.clone();
        found.differences(ours, &ours.namespaces[0]).is_empty().then_some(found)
    };
    let mut still = 0;
    each(good.as_bytes(), |text| {
        if let Some(entry) = accepted(text) {
            still += 1;
            assert_eq!((entry.serial.as_str(), entry.model.as_str(), entry.size), ("EXP", "Model X", 2_097_152));
            assert_eq!(entry.erase, [""; 0], "no mutation of what may be read lets anything be erased");
        }
    });
    assert!(still > 0, "no mutation left the entry whole");
    // Further from ours than six changes reach.
    let other = good.replace("\"EXP\"", "\"S4EWNX0R123456\"").replace("2097152", "1000204886016");
    each(other.as_bytes(), |text| assert_eq!(accepted(text), None, "{}", String::from_utf8_lossy(text)));
}

/// A drive in memory.
struct Memory(Vec<u8>);

impl Bytes for Memory {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn get(&mut self, at: u64, len: usize) -> Result<Vec<u8>, Unreadable> {
        let start = usize::try_from(at).unwrap_or(usize::MAX).min(self.0.len());
        Ok(self.0[start..start.saturating_add(len).min(self.0.len())].to_vec())
    }
}

/// Damaged tables end, and one sound copy of two is enough to refuse.
#[test]
fn damaged_partition_tables_still_refuse() {
    let size = 256 << 10;
    let mut disk = vec![0; size];
    for (at, bytes) in gpt::table(size as u64 + (2 << 20), 512) {
        // The backup, as a drive of this size has it.
        let at = if at > size as u64 { at as usize - (2 << 20) } else { at as usize };
        disk[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    for at in [1024, size - 33 * 512] {
        disk[at..at + 16].copy_from_slice(&gpt::EFI_SYSTEM);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    for _ in 0..EACH {
        let mut damaged = disk.clone();
        // The first table alone, the length kept: what lies behind stays where it was.
        let mut first = damaged[..2048].to_vec();
        mutate(&mut rng, &mut first);
        first.resize(2048, 0);
        damaged[..2048].copy_from_slice(&first);
        let tables = read(&mut Memory(damaged), 512).unwrap();
        assert!(tables.partitions.iter().any(|p| p.boot.is_some()));
    }
}

/// Damaged MBRs end, whatever their chains say.
#[test]
fn damaged_master_boot_records_end() {
    let mut disk = vec![0; 64 << 10];
    for (sector, slot, kind, first) in [(0, 0, 0xefu8, 8u32), (0, 1, 0x0f, 20), (20, 0, 0x83, 1), (20, 1, 0x05, 10)] {
        let at = sector * 512 + 446 + slot * 16;
        disk[at + 4] = kind;
        disk[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
        disk[at + 12] = 8;
        disk[sector * 512 + 510..sector * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    for _ in 0..EACH {
        let mut damaged = disk.clone();
        for from in [446, 20 * 512 + 446] {
            let mut entries = damaged[from..from + 66].to_vec();
            mutate(&mut rng, &mut entries);
            entries.resize(66, 0);
            damaged[from..from + 66].copy_from_slice(&entries);
        }
        let tables = read(&mut Memory(damaged), 512).unwrap();
        assert!(tables.partitions.len() < 1100);
    }
}

/// Whatever becomes of a superblock, the device is never taken for an empty one.
#[test]
fn damaged_superblocks_are_still_contents() {
    let mut head = vec![0; 80 << 10];
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    put(1024, b"LABELONE");
    put(1024 + 20, &[32]);
    put(1024 + 32, b"AbCdEf0123GhIj4567KlMn89OpQrStUv");
    put(0x438, &[0x53, 0xef]);
    put(0x468, &[9; 32]);
    put(3, b"NTFS    ");
    put(11, &[0, 2, 8]);
    put(64, &[0xf6]);
    put(4096, &[0xfc, 0x4e, 0x2b, 0xa9, 1]);
    put(4608, b"vg {\nid = \"aaaaaa-bbbb-cccc-dddd-eeee-ffff-gggggg\"\nseqno = 1\n");
    put(0x4000, &[1, 1, 0, 0]);
    put(0x4008, b"\0\0\0\x04name\0\0\0\x09\0\0\0\x01\0\0\0\x04tank\0\0\0\x09pool_guid\0\0\0\0\0\0\x08\0\0\0\x01\x01\x02\x03\x04\x05\x06\x07\x08");
    put(0x10040, b"_BHRfS_M");
    put(0x10020, &[7; 16]);
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    for _ in 0..EACH {
        let mut bytes = head.clone();
        // Where something stands: in the first pages and in the one of btrfs.
        for (from, len) in [(0, 0x1400), (0x4000, 128), (0x10000, 128)] {
            let mut part = bytes[from..from + len].to_vec();
            mutate(&mut rng, &mut part);
            part.resize(len, 0);
            bytes[from..from + len].copy_from_slice(&part);
        }
        assert!(!signatures::recognise(&bytes, &[]).is_empty());
        let mut far = |at: u64, len: usize| {
            let start = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
            bytes[start..start.saturating_add(len).min(bytes.len())].to_vec()
        };
        let said = superblocks::said(&bytes, &bytes[0x8000..], &mut far);
        assert!(said.len() < 100_000);
    }
}

/// A damaged record is an error or a serial, and never one of another address.
#[test]
fn damaged_records_are_errors() {
    let text =
        format!("pci = \"{BDF}\"\nserial = \"EXP\"\nboot = \"b\"\nstate = \"bound\"\ninstance = 7\nnamespace = []\n");
    each(text.as_bytes(), |text| {
        if let Ok(recorded) = records::parse(BDF, &String::from_utf8_lossy(text)) {
            assert_eq!(recorded.pci, BDF);
        }
    });
}

/// Damage in the lines before ours hides nothing of ours.
#[test]
fn damaged_tables_still_name_the_drive() {
    let fake = clean();
    let (host, all) = drive(&fake);
    let ours = sysfs::find(&host, &all, "nvme1n1").unwrap();
    let said = |sort, text: &str| ("nvme1n1p1".to_owned(), superblocks::Said { sort, text: text.to_owned() });
    let uuid = "6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f";
    let known = vec![said(superblocks::Sort::Uuid, uuid), said(superblocks::Sort::Label, "my disk")];
    let words = Words::new(&host, ours, known).unwrap();
    let tables: [(&str, &str); 3] = [
        (
            "UUID=\"a-b\" /a ext4 rw 0 1\nLABEL=x\\040y /b xfs x-a=\\134x20 0 0",
            "LABEL=my\\040disk /data ext4 noauto 0 0",
        ),
        (
            "a /dev/sda1 /key:LABEL=x luks,header=/b\n# b\nc UUID=\"e\" none",
            "data UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f none",
        ),
        ("[Unit]\nAfter=a.device\n[Mount]\nOptions=a=b,c", "What=/dev/disk/by-label/my\\x20disk"),
    ];
    for (before, line) in tables {
        each(before.as_bytes(), |before| {
            let text = format!("{}\n{line}\n", String::from_utf8_lossy(before));
            assert!(!words.mentions(&host, &text, &['#']).unwrap().is_empty(), "{text:?}");
        });
        // Our own line, damaged: whatever it says now, it is read to its end.
        each(line.as_bytes(), |line| {
            let _ = words.mentions(&host, &String::from_utf8_lossy(line), &['#']);
        });
    }
}
