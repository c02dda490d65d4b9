//! Whether a model's file is a download that has its full length and not yet its bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::unistd::{Whence, lseek};

use crate::gguf::{Gguf, TensorInfo};
use crate::storage::safe;
use crate::units::format_bytes;

/// Bytes of a look, and the shortest stretch of zeros that counts.
const LOOK: usize = 4096;
/// Looks at a file, spread evenly; the last is at its end, where a download is that goes from front to back.
const LOOKS: u64 = 16;
/// Holes of a file that are counted.
const HOLES_MAX: usize = 4096;

/// Matrices with a row for each token, which may be zeros for many: vocabularies are padded.
const WORDS: [&str; 3] = ["token_embd.weight", "output.weight", "per_layer_token_embd.weight"];

/// A line on matrices' bytes that no one has written: holes of a file, or zeros where it was looked at. `None` if there are
/// none, or if the files are not there.
///
/// Weights may be zeros, and a copy may leave zeros out, so that it is no error.
pub(super) fn unwritten(gguf: &Gguf) -> Option<String> {
    for (i, shard) in gguf.shards.iter().enumerate() {
        // A recorded path may have become something whose opening waits.
        let Ok(file) = safe::open(&shard.path) else { continue };
        let looked_at = |t: &&TensorInfo| t.shard == i && t.shape.len() > 1 && !WORDS.contains(&t.name.as_str());
        let matrices: Vec<&TensorInfo> = gguf.tensors.iter().filter(looked_at).collect();
        let found = of_holes(&file, shard.len, &matrices).or_else(|| of_zeros(&file, &matrices));
        if let Some(what) = found {
            return Some(format!(
                "{}: {what}, as in a download that has not ended; if the text is wrong, fetch the file again",
                shard.path.display()
            ));
        }
    }
    None
}

/// Of matrices that lie in holes, which read as zeros.
fn of_holes(file: &File, len: u64, matrices: &[&TensorInfo]) -> Option<String> {
    let seek =
        |from: u64, whence| -> Option<u64> { u64::try_from(lseek(file, i64::try_from(from).ok()?, whence).ok()?).ok() };
    let (mut at, mut bytes, mut first) = (0, 0, None);
    for _ in 0..HOLES_MAX {
        // There is one behind every file.
        let Some(hole) = seek(at, Whence::SeekHole).filter(|h| *h < len) else { break };
        at = seek(hole, Whence::SeekData).unwrap_or(len);
        for t in matrices {
            let within = (t.offset + t.bytes).min(at).saturating_sub(t.offset.max(hole));
            if within >= LOOK as u64 {
                bytes += within;
                first.get_or_insert(&t.name);
            }
        }
        if at >= len {
            break;
        }
    }
    first.map(|t| format!("{} of its weights were never written (the first of them in {t})", format_bytes(bytes)))
}

/// Of matrices that are zeros where they are looked at.
fn of_zeros(file: &File, matrices: &[&TensorInfo]) -> Option<String> {
    let all: u64 = matrices.iter().map(|t| t.bytes).sum();
    let mut buf = [0; LOOK];
    for look in 1..=LOOKS {
        // So many bytes of matrices lie before the end of the look.
        let mut left = (u128::from(all) * u128::from(look) / u128::from(LOOKS)) as u64;
        let t = matrices.iter().find(|t| {
            let here = left <= t.bytes;
            left -= if here { 0 } else { t.bytes };
            here
        })?;
        let Some(at) = left.max(LOOK as u64).checked_sub(LOOK as u64).filter(|_| t.bytes >= LOOK as u64) else {
            continue;
        };
        if file.read_exact_at(&mut buf, t.offset + at).is_ok() && buf.iter().all(|b| *b == 0) {
            return Some(format!("its weights are zeros at byte {} (in {})", t.offset + at, t.name));
        }
    }
    None
}
