//! Checksums of a file's bytes, one for each [`CHUNK`].

use std::io::Read;

/// Bytes that one checksum covers.
pub const CHUNK: usize = 64 << 10;

/// CRC-32C of each [`CHUNK`] of what `input` holds.
pub fn sums(mut input: impl Read) -> std::io::Result<Vec<u32>> {
    let mut found = Vec::new();
    let mut buffer = Vec::with_capacity(CHUNK);
    loop {
        buffer.clear();
        (&mut input).take(CHUNK as u64).read_to_end(&mut buffer)?;
        if buffer.is_empty() {
            return Ok(found);
        }
        found.push(crc32c(&buffer));
    }
}

/// CRC-32C (Castagnoli), RFC 3720 appendix B.4.
pub fn crc32c(data: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has the instruction, as was asked just now.
        return unsafe { crc32c_sse42(data) };
    }
    crc32c_table(data)
}

/// By the processor's own instruction, several GB/s.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
fn crc32c_sse42(data: &[u8]) -> u32 {
    use std::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u64};
    let (words, rest) = data.as_chunks::<8>();
    let crc = words.iter().fold(u64::from(!0u32), |c, w| _mm_crc32_u64(c, u64::from_le_bytes(*w)));
    !rest.iter().fold(crc as u32, |c, b| _mm_crc32_u8(c, *b))
}

fn crc32c_table(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0u32; 256];
        let mut i = 0;
        while i < 256 {
            let mut c = i as u32;
            let mut bit = 0;
            while bit < 8 {
                c = if c & 1 == 1 { c >> 1 ^ 0x82f6_3b78 } else { c >> 1 };
                bit += 1;
            }
            table[i] = c;
            i += 1;
        }
        table
    };
    !data.iter().fold(!0, |c: u32, b| c >> 8 ^ TABLE[((c ^ u32::from(*b)) & 0xff) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let data: Vec<u8> = (0..1003u32).map(|i| (i * 37) as u8).collect();
        assert!((0..1003).all(|n| crc32c(&data[n..]) == crc32c_table(&data[n..])));
    }
}
