//! What a controller and a namespace say of themselves. NVMe Base 2.0 §5.17.2; NVM Command Set §4.1.5.

/// Fields of Identify Controller that this program uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControllerInfo {
    /// PCI vendor.
    pub vendor: u16,
    /// Serial number, trimmed.
    pub serial: String,
    /// Model, trimmed.
    pub model: String,
    /// Firmware, trimmed.
    pub firmware: String,
    /// Most bytes a command may carry; none if there is no limit.
    pub max_transfer: Option<u64>,
    /// Capabilities for several paths; not 0 means that others may write.
    pub sharing: u8,
    /// Ways in which it can be sanitized; 0 if it keeps no log of that.
    pub sanitize: u32,
    /// Shutdown time, microseconds.
    pub shutdown_us: u32,
    /// Number of namespaces.
    pub namespaces: u32,
    /// Aborts that may be outstanding at once.
    pub aborts: u16,
    /// Smallest supported entry sizes of SQ and CQ, as powers of two.
    pub entry_shifts: (u8, u8),
}

/// Fields of Identify Namespace that this program uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamespaceInfo {
    /// Logical blocks.
    pub blocks: u64,
    /// log2 of the block's bytes.
    pub block_shift: u8,
    /// Bytes of metadata a block.
    pub metadata: u16,
    /// Protection information type.
    pub protection: u8,
    /// Sharing capabilities.
    pub sharing: u8,
    /// Percent of a running format that remain; 0 if none runs.
    pub formatting: u8,
    /// Globally unique identifier.
    pub nguid: [u8; 16],
    /// IEEE identifier.
    pub eui64: [u8; 8],
}

fn u16_at(d: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([d[at], d[at + 1]])
}

fn u32_at(d: &[u8], at: usize) -> u32 {
    u32::from(u16_at(d, at)) | u32::from(u16_at(d, at + 2)) << 16
}

fn text(d: &[u8]) -> String {
    String::from_utf8_lossy(d).trim_matches(['\0', ' ']).to_owned()
}

/// Reads Identify Controller; `min_page_shift` is CAP.MPSMIN's. `None` unless there are 4096 bytes.
pub fn controller(d: &[u8], min_page_shift: u32) -> Option<ControllerInfo> {
    if d.len() < 4096 {
        return None;
    }
    Some(ControllerInfo {
        vendor: u16_at(d, 0),
        serial: text(&d[4..24]),
        model: text(&d[24..64]),
        firmware: text(&d[64..72]),
        max_transfer: (d[77] != 0).then(|| 1u64.checked_shl(u32::from(d[77]) + min_page_shift).unwrap_or(u64::MAX)),
        sharing: d[76],
        sanitize: u32_at(d, 328),
        shutdown_us: u32_at(d, 88),
        namespaces: u32_at(d, 516),
        aborts: u16::from(d[258]) + 1,
        entry_shifts: (d[512] & 0xf, d[513] & 0xf),
    })
}

/// Reads Identify Namespace. `None` unless there are 4096 bytes.
pub fn namespace(d: &[u8]) -> Option<NamespaceInfo> {
    if d.len() < 4096 {
        return None;
    }
    let format = usize::from(d[26] & 0xf) | usize::from(d[26] >> 5 & 3) << 4;
    let lbaf = 128 + 4 * format;
    let mut nguid = [0; 16];
    nguid.copy_from_slice(&d[104..120]);
    let mut eui64 = [0; 8];
    eui64.copy_from_slice(&d[120..128]);
    Some(NamespaceInfo {
        blocks: u64::from(u32_at(d, 0)) | u64::from(u32_at(d, 4)) << 32,
        block_shift: d[lbaf + 2],
        metadata: u16_at(d, lbaf),
        protection: d[29] & 7,
        sharing: d[30],
        formatting: if d[32] & 0x80 != 0 { d[32] & 0x7f } else { 0 },
        nguid,
        eui64,
    })
}

impl NamespaceInfo {
    /// Bytes a block.
    pub fn block_size(&self) -> u32 {
        1 << self.block_shift
    }

    /// Why this namespace must not be used, each as a sentence.
    pub fn refusals(&self) -> Vec<String> {
        let mut out = Vec::new();
        if !matches!(self.block_shift, 9 | 12) {
            out.push(format!("blocks of 2^{} bytes; 512 and 4096 are supported", self.block_shift));
        }
        if self.metadata != 0 {
            out.push(format!("{} bytes of metadata a block", self.metadata));
        }
        if self.protection != 0 {
            out.push(format!("protection information of type {}", self.protection));
        }
        if self.sharing & 1 != 0 {
            out.push("it is shared between controllers".into());
        }
        if self.formatting != 0 {
            out.push(format!("it is being formatted, {} % remain", self.formatting));
        }
        if self.blocks == 0 {
            out.push("it has no blocks".into());
        }
        out
    }
}
