//! What is recorded of a file on a drive: its name, its place, and the checksums of its bytes.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::checksum::{CHUNK, crc32c};

/// Where bytes of a file lie on the drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte in the file.
    pub file_offset: u64,
    /// First byte on the namespace.
    pub device_offset: u64,
    /// Bytes.
    pub len: u64,
}

/// A file's place on a drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Name of the file.
    pub file: String,
    /// Where it was when it was recorded.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Serial of the drive.
    pub serial: String,
    /// Model of the drive.
    pub model: String,
    /// Namespace.
    pub namespace: u32,
    /// (first byte in the file, first byte on the namespace, bytes).
    pub extents: Vec<(u64, u64, u64)>,
    /// CRC-32C of each [`CHUNK`] of the file.
    pub crc32c: Vec<u32>,
    /// The type that the file's larger matrices were requantised to when it was staged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requant: Option<String>,
}

impl Manifest {
    /// The extents for [`crate::storage::vfio::VfioReader::add_file`].
    pub fn spans(&self) -> Vec<Span> {
        self.extents.iter().map(|&(file_offset, device_offset, len)| Span { file_offset, device_offset, len }).collect()
    }

    /// True if `data` is what the file holds in its chunk number `chunk`.
    pub fn holds(&self, chunk: usize, data: &[u8]) -> bool {
        self.crc32c.get(chunk) == Some(&crc32c(data))
    }

    /// The byte of the namespace that holds byte `offset` of the file.
    pub fn place(&self, offset: u64) -> Option<u64> {
        let span = self.extents.iter().find(|e| (e.0..e.0.saturating_add(e.2)).contains(&offset))?;
        Some(span.1 + (offset - span.0))
    }

    /// What makes a manifest unusable, if anything: extents must follow one another and cover the
    /// file, with a checksum for each chunk.
    pub fn fault(&self) -> Option<String> {
        let mut next = 0;
        for &(file, device, len) in &self.extents {
            if file != next || len == 0 || file.checked_add(len).is_none() || device.checked_add(len).is_none() {
                return Some(format!("the extent at byte {file} does not follow the one before, which ends at {next}"));
            }
            next = file + len;
        }
        if next < self.size {
            return Some(format!("its extents end at byte {next}, the file has {}", self.size));
        }
        let chunks = self.size.div_ceil(CHUNK as u64);
        (self.crc32c.len() as u64 != chunks)
            .then(|| format!("it has {} checksums, the file has {chunks} chunks", self.crc32c.len()))
    }
}
