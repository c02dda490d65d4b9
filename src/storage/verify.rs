//! Reads recorded files from end to end and compares every chunk with its checksum: what `nt verify`
//! does.

use std::time::Duration;

use super::checksum::CHUNK;
use super::{CHUNK_BYTES, Corruption, Extent, FileId, ReadRequest, Reader, Record, StorageError};
use crate::memory::{Arena, ArenaError, Region};

/// Reads in flight.
const READS: usize = 8;
/// Bytes of one of them.
const READ_BYTES: u64 = 4 * CHUNK_BYTES;

/// Why a model could not be verified. Bytes that differ are no error but a result.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Reading.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Memory to read to.
    #[error(transparent)]
    Memory(#[from] ArenaError),
}

/// Every chunk of the reader's files that differs from its record, in order; `records` are those of its
/// files. `progress` gets bytes compared and bytes to compare.
///
/// # Errors
/// If something cannot be read.
pub fn verify(
    reader: Box<dyn Reader>,
    records: &[Record],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<Corruption>, VerifyError> {
    let mut arena = Arena::new(READS as u64 * READ_BYTES)?;
    let slots = (0..READS).map(|_| arena.take(READ_BYTES)).collect::<Result<Vec<_>, _>>()?;
    // Bound anew so that every way out drops it, and waits for its reads, before the memory.
    let mut reader = reader;
    reader.attach(&arena.whole())?;
    let total = records.iter().map(|r| r.manifest.size).sum();
    let mut todo = records.iter().enumerate().flat_map(|(i, r)| pieces(i, r.manifest.size));
    let mut free: Vec<usize> = (0..READS).collect();
    let mut flying: [Option<Piece>; READS] = [None; READS];
    let (mut found, mut done, mut completions) = (Vec::new(), 0, Vec::new());
    loop {
        while let Some(&slot) = free.last()
            && let Some(piece) = todo.next()
        {
            free.pop();
            flying[slot] = Some(piece);
            submit(reader.as_mut(), slot, &piece, &slots[slot])?;
        }
        if reader.outstanding() == 0 {
            break;
        }
        reader.poll(&mut completions, Some(Duration::from_millis(100))).map_err(StorageError::from)?;
        for completion in completions.drain(..) {
            completion.result.map_err(StorageError::from)?;
            let slot = completion.tag as usize;
            let Some(piece) = flying.get_mut(slot).and_then(Option::take) else { continue };
            // SAFETY: the read has ended, and its length fits the region, as `submit` saw to.
            let data = unsafe { std::slice::from_raw_parts(slots[slot].addr(), piece.len as usize) };
            let block = u64::from(reader.alignment(FileId(piece.file as u16)).offset);
            let first = (piece.offset / CHUNK as u64) as usize;
            let chunks = data.chunks(CHUNK).enumerate();
            found.extend(chunks.filter_map(|(i, c)| records[piece.file].compare(first + i, c, block).err()));
            done += piece.len;
            progress(done, total);
            free.push(slot);
        }
    }
    found.sort_by(|a, b| (&a.file, a.offset).cmp(&(&b.file, b.offset)));
    Ok(found)
}

/// A part of a file that is read at once.
#[derive(Clone, Copy, Debug)]
struct Piece {
    file: usize,
    offset: u64,
    len: u64,
}

fn pieces(file: usize, size: u64) -> impl Iterator<Item = Piece> {
    (0..size.div_ceil(READ_BYTES)).map(move |i| {
        let offset = i * READ_BYTES;
        Piece { file, offset, len: READ_BYTES.min(size - offset) }
    })
}

fn submit(reader: &mut dyn Reader, slot: usize, piece: &Piece, to: &Region) -> Result<(), StorageError> {
    let file = FileId(piece.file as u16);
    let len = piece.len.next_multiple_of(u64::from(reader.alignment(file).offset));
    let extents = [Extent { file, offset: piece.offset, len, dst_offset: 0 }];
    let request = ReadRequest::to(to, slot as u64, &extents);
    // SAFETY: the slot's last read has ended; the caller keeps the arena longer than the reader, and
    // looks at the slot when this read has ended.
    Ok(unsafe { reader.submit(&request) }?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::checksum::sums;
    use crate::storage::manifest::Manifest;
    use crate::storage::{Script, ScriptedReader};

    #[test]
    fn every_chunk_that_differs_is_found_whatever_the_order() {
        let size = 2 * READ_BYTES as usize + 3 * CHUNK + 99;
        let data: Vec<u8> = (0..size).map(|i| ((i * 2_654_435_761) >> 7) as u8).collect();
        let record = |name: &str, data: &[u8]| Record {
            manifest: Manifest {
                file: name.into(),
                path: name.into(),
                size: data.len() as u64,
                serial: "S".into(),
                model: "M".into(),
                namespace: 1,
                extents: vec![(0, 1 << 20, (data.len() as u64).next_multiple_of(4096))],
                crc32c: sums(data).unwrap(),
                requant: None,
            },
            tensors: vec![(0, data.len() as u64, "t".into())],
        };
        let records = [record("a", &data), record("b", &data[..777])];
        let script = || Script { delay_max: 5, ..Script::default() };
        let mut last = (0, 0);
        let whole = ScriptedReader::new(vec![data.clone(), data[..777].to_vec()], script());
        let found = verify(Box::new(whole), &records, &mut |done, total| last = (done, total)).unwrap();
        assert!(found.is_empty(), "{found:?}");
        assert_eq!(last, (size as u64 + 777, size as u64 + 777));

        let mut wrong = data.clone();
        for at in [0, READ_BYTES as usize - 1, size - 1] {
            wrong[at] ^= 0x10;
        }
        let mut small = data[..777].to_vec();
        small[776] ^= 1;
        let found = verify(Box::new(ScriptedReader::new(vec![wrong, small], script())), &records, &mut |_, _| ());
        let places: Vec<_> = found.unwrap().iter().map(|c| (c.file.clone(), c.offset, c.len)).collect();
        let chunk = CHUNK as u64;
        let end = size as u64 / chunk * chunk;
        let expected =
            [("a", 0, chunk), ("a", READ_BYTES - chunk, chunk), ("a", end, size as u64 - end), ("b", 0, 777)];
        assert_eq!(places, expected.map(|(f, o, l)| (f.to_owned(), o, l)));
    }
}
