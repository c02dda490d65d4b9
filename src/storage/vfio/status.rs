//! Completion status. NVMe Base 2.0 §3.3.3.2.1.

use std::fmt;

/// The 15 status bits of a completion entry: SC 7:0, SCT 10:8, CRD 12:11, M 13, DNR 14.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    /// True if the command succeeded: both the code and its type are zero.
    pub fn ok(self) -> bool {
        self.0 & 0x7ff == 0
    }
    /// Status code type.
    pub fn kind(self) -> u8 {
        (self.0 >> 8 & 7) as u8
    }
    /// Status code.
    pub fn code(self) -> u8 {
        self.0 as u8
    }
    /// True if the same command may succeed later. Media errors are bound to their blocks.
    pub fn may_retry(self) -> bool {
        !self.ok() && self.0 >> 14 & 1 == 0 && self.kind() != 2
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match (self.kind(), self.code()) {
            (0, 0x00) => "success",
            (0, 0x01) => "invalid opcode",
            (0, 0x02) => "invalid field",
            (0, 0x04) => "data transfer error",
            (0, 0x06) => "internal error",
            (0, 0x07) => "aborted by request",
            (0, 0x08) => "submission queue deleted",
            (0, 0x0b) => "invalid namespace or format",
            (0, 0x1d) => "sanitize in progress",
            (0, 0x20) => "namespace is write protected",
            (0, 0x80) => "block address out of range",
            (0, 0x82) => "namespace not ready",
            (0, 0x84) => "format in progress",
            (2, 0x81) => "unrecovered read error",
            (2, 0x82) => "guard check error",
            (2, 0x83) => "application tag check error",
            (2, 0x84) => "reference tag check error",
            (2, 0x86) => "access denied (is the range locked?)",
            (2, 0x87) => "deallocated or unwritten block",
            (3, _) => "path error",
            _ => "error",
        };
        write!(f, "{words} (status type {}, code {:#04x})", self.kind(), self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::Status;

    #[test]
    fn type_and_code_both_count() {
        assert!(Status(0).ok());
        assert!(!Status(0x200).ok(), "a type without a code is an error");
        assert!(Status(0x006).may_retry());
        assert!(!Status(0x4006).may_retry(), "do not retry");
        assert!(!Status(0x281).may_retry(), "media errors stay");
        assert!(Status(0x281).to_string().contains("unrecovered read"));
    }
}
