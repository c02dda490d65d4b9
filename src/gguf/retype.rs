//! A header with other types and places of its tensors. Both are numbers of a fixed size, so nothing else moves.

use super::TensorType;

/// The number that `general.file_type` has for a type that most of a file's matrices have (llama.h, `llama_ftype`).
const FILE_TYPES: &[(TensorType, u32)] = &[
    (TensorType::Q4_0, 2),
    (TensorType::Q4_1, 3),
    (TensorType::Q8_0, 7),
    (TensorType::Q5_0, 8),
    (TensorType::Q5_1, 9),
    (TensorType::Q4_K, 14),
    (TensorType::Q5_K, 16),
    (TensorType::Q6_K, 18),
    (TensorType::IQ4_NL, 25),
    (TensorType::MXFP4, 38),
];

/// Where a walk over a header is.
struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Walk<'_> {
    fn skip(&mut self, n: usize) -> Option<usize> {
        let start = self.at;
        self.at = start.checked_add(n).filter(|end| *end <= self.bytes.len())?;
        Some(start)
    }

    fn u32(&mut self) -> Option<u32> {
        let at = self.skip(4)?;
        Some(u32::from_le_bytes(self.bytes[at..at + 4].try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        let at = self.skip(8)?;
        Some(u64::from_le_bytes(self.bytes[at..at + 8].try_into().ok()?))
    }

    fn string(&mut self) -> Option<String> {
        let len = usize::try_from(self.u64()?).ok()?;
        let at = self.skip(len)?;
        Some(String::from_utf8_lossy(&self.bytes[at..at + len]).into_owned())
    }

    fn value(&mut self, kind: u32) -> Option<()> {
        let bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 => {
                let len = self.u64()?;
                usize::try_from(len).ok()?
            }
            9 => {
                let (kind, n) = (self.u32()?, self.u64()?);
                return (0..n).try_for_each(|_| self.value(kind));
            }
            _ => return None,
        };
        self.skip(bytes).map(|_| ())
    }
}

/// The header `bytes`, which was parsed before, with the type and the first byte in the file that `of` gives for each tensor by its name,
/// and `most` as the type of the file; `None` if it is no such header. `alignment` is that of its data.
pub fn retyped(
    bytes: &[u8],
    alignment: u64,
    most: TensorType,
    of: impl Fn(&str) -> Option<(TensorType, u64)>,
) -> Option<Vec<u8>> {
    let mut out = bytes.to_vec();
    let mut walk = Walk { bytes, at: 8 };
    let (tensors, keys) = (walk.u64()?, walk.u64()?);
    for _ in 0..keys {
        let key = walk.string()?;
        let kind = walk.u32()?;
        let at = walk.at;
        walk.value(kind)?;
        let number = FILE_TYPES.iter().find(|t| t.0 == most && key == "general.file_type" && kind == 4);
        if let Some((_, number)) = number {
            out[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
    }
    let mut places = Vec::new();
    for _ in 0..tensors {
        let name = walk.string()?;
        let dims = usize::try_from(walk.u32()?).ok()?;
        walk.skip(dims.checked_mul(8)?)?;
        let at = walk.skip(12)?;
        let (ty, first) = of(&name)?;
        out[at..at + 4].copy_from_slice(&ty.id().to_le_bytes());
        places.push((at + 4, first));
    }
    let data = (walk.at as u64).checked_next_multiple_of(alignment)?;
    for (at, first) in places {
        out[at..at + 8].copy_from_slice(&first.checked_sub(data)?.to_le_bytes());
    }
    Some(out)
}
