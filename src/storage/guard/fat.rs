//! Serial numbers and labels of FAT, exFAT and NTFS, whose labels lie in a folder or a record.

use super::partitions::number;
use super::superblocks::{Far, Said, Sort, add, text, utf16};

/// Bytes that are read of a root folder or a record.
const FOLDER: usize = 64 << 10;

/// Adds what a boot sector of one of the three says.
pub fn said(head: &[u8], far: Far<'_>, out: &mut Vec<Said>) {
    match head.get(3..11) {
        Some(b"EXFAT   ") => exfat(head, far, out),
        Some(b"NTFS    ") => ntfs(head, far, out),
        _ => fat(head, far, out),
    }
}

/// `ABCD-1234`, as FAT and exFAT serials are written.
fn short(serial: u64) -> String {
    if serial == 0 { String::new() } else { format!("{:04X}-{:04X}", serial >> 16 & 0xffff, serial & 0xffff) }
}

fn fat(head: &[u8], far: Far<'_>, out: &mut Vec<Said>) {
    let wide = head.get(82..87) == Some(b"FAT32");
    if !wide && head.get(54..57) != Some(b"FAT") {
        return;
    }
    let (serial, name) = if wide { (67, 71) } else { (39, 43) };
    add(out, Sort::Uuid, short(number(head, serial, 4)));
    add(out, Sort::Label, text(head.get(name..name + 11).unwrap_or_default()));
    let (sector, cluster) = (number(head, 11, 2), number(head, 13, 1));
    let (reserved, copies) = (number(head, 14, 2), number(head, 16, 1));
    let table = if wide { number(head, 36, 4) } else { number(head, 22, 2) };
    let data = reserved + copies * table;
    let root = if wide { data + number(head, 44, 4).saturating_sub(2) * cluster } else { data };
    let folder = far(root.saturating_mul(sector), FOLDER);
    // A volume's label is an entry of the root folder with attribute 8, and not a part of a long name.
    for entry in folder.chunks_exact(32).take_while(|e| e[0] != 0).filter(|e| e[0] != 0xe5) {
        if entry[11] & 0x08 != 0 && entry[11] & 0x0f != 0x0f {
            add(out, Sort::Label, text(&entry[..11]));
        }
    }
}

fn exfat(head: &[u8], far: Far<'_>, out: &mut Vec<Said>) {
    add(out, Sort::Uuid, short(number(head, 100, 4)));
    let (sector, cluster) = (number(head, 108, 1).min(12), number(head, 109, 1).min(25));
    let first = number(head, 96, 4).saturating_sub(2) << cluster;
    let at = (number(head, 88, 4) + first).saturating_mul(1 << sector);
    for entry in far(at, FOLDER).chunks_exact(32).filter(|e| e[0] == 0x83) {
        let len = usize::from(entry[1].min(11)) * 2;
        add(out, Sort::Label, utf16(&entry[2..2 + len]));
    }
}

fn ntfs(head: &[u8], far: Far<'_>, out: &mut Vec<Said>) {
    let serial = number(head, 72, 8);
    if serial != 0 {
        add(out, Sort::Uuid, format!("{serial:016X}"));
    }
    // Clusters a record as a signed byte: below zero it is the logarithm of its bytes.
    let cluster = number(head, 11, 2) * number(head, 13, 1);
    let size = match number(head, 64, 1) as u8 {
        n @ 0x80.. => 1u64 << (n.wrapping_neg() & 0x1f),
        n => cluster * u64::from(n),
    };
    let at = number(head, 48, 8).saturating_mul(cluster).saturating_add(3 * size);
    let record = far(at, size.clamp(512, FOLDER as u64) as usize);
    if !record.starts_with(b"FILE") {
        return;
    }
    let mut attribute = number(&record, 20, 2) as usize;
    while let Some(rest) = record.get(attribute..).filter(|r| r.len() >= 24) {
        let (kind, len) = (number(rest, 0, 4), number(rest, 4, 4) as usize);
        if kind == 0xffff_ffff || len < 24 {
            break;
        }
        // The volume's name.
        if kind == 0x60 {
            let (bytes, from) = (number(rest, 16, 4) as usize, number(rest, 20, 2) as usize);
            add(out, Sort::Label, utf16(rest.get(from..from.saturating_add(bytes)).unwrap_or_default()));
        }
        attribute = attribute.saturating_add(len);
    }
}
