//! Every command this program can build: a closed list, none of which changes data on the drive.
//! [`Command::encode`] is the only place where a submission queue entry is made.

/// A submission queue entry, 64 bytes. NVMe Base 2.0 §3.3.3.1.
pub type Sqe = [u32; 16];

/// The commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Identify, CNS 01h: the controller. NVMe Base 2.0 §5.17.
    IdentifyController {
        /// Where the 4096 bytes go.
        to: u64,
    },
    /// Identify, CNS 00h: a namespace.
    IdentifyNamespace {
        /// Namespace.
        nsid: u32,
        /// Where the 4096 bytes go.
        to: u64,
    },
    /// Get Log Page 02h: health, 512 bytes. §5.16.1.3.
    HealthLog {
        /// Where the bytes go.
        to: u64,
    },
    /// Get Log Page 81h: sanitize status, its first 512 bytes. §5.16.1.25.
    SanitizeLog {
        /// Where the bytes go.
        to: u64,
    },
    /// Set Features 07h: number of queues; it lasts until the next reset. §5.27.1.5.
    QueueCount {
        /// Pairs wanted.
        pairs: u16,
    },
    /// Create I/O Completion Queue. §5.5.
    CreateCompletionQueue {
        /// Queue.
        id: u16,
        /// Entries.
        entries: u16,
        /// Its memory.
        at: u64,
        /// Raise interrupt vector 0 for its entries.
        interrupt: bool,
    },
    /// Create I/O Submission Queue, completing to the queue of the same number. §5.6.
    CreateSubmissionQueue {
        /// Queue.
        id: u16,
        /// Entries.
        entries: u16,
        /// Its memory.
        at: u64,
    },
    /// Delete I/O Submission Queue. §5.8.
    DeleteSubmissionQueue {
        /// Queue.
        id: u16,
    },
    /// Delete I/O Completion Queue. §5.7.
    DeleteCompletionQueue {
        /// Queue.
        id: u16,
    },
    /// Abort: asks the controller to end one command; its answer's bit 0 is 0 if it did. §5.1.
    Abort {
        /// Submission queue of the command.
        queue: u16,
        /// The command's identifier.
        cid: u16,
    },
    /// Read. NVM Command Set 1.0 §3.2.4.
    Read {
        /// Namespace.
        nsid: u32,
        /// First logical block.
        lba: u64,
        /// Blocks, at least 1.
        blocks: u16,
        /// First PRP entry.
        prp1: u64,
        /// Second PRP entry, or the list's address.
        prp2: u64,
    },
}

/// Dword 10 of Get Log Page: the page, and 512 bytes in words of four, less one.
const fn log_page(id: u32) -> u32 {
    id | (512 / 4 - 1) << 16
}

impl Command {
    /// The entry with its command identifier.
    pub fn encode(&self, cid: u16) -> Sqe {
        let mut e: Sqe = [0; 16];
        let mut data = |prp1: u64, prp2: u64| {
            e[6] = prp1 as u32;
            e[7] = (prp1 >> 32) as u32;
            e[8] = prp2 as u32;
            e[9] = (prp2 >> 32) as u32;
        };
        let opcode = match *self {
            Self::IdentifyController { to } => {
                data(to, 0);
                e[10] = 1;
                0x06
            }
            Self::IdentifyNamespace { nsid, to } => {
                data(to, 0);
                e[1] = nsid;
                0x06
            }
            Self::HealthLog { to } => {
                data(to, 0);
                (e[1], e[10]) = (u32::MAX, log_page(0x02));
                0x02
            }
            Self::SanitizeLog { to } => {
                data(to, 0);
                (e[1], e[10]) = (u32::MAX, log_page(0x81));
                0x02
            }
            Self::QueueCount { pairs } => {
                let n = u32::from(pairs.max(1) - 1);
                e[10] = 0x07;
                e[11] = n << 16 | n;
                0x09
            }
            Self::CreateCompletionQueue { id, entries, at, interrupt } => {
                data(at, 0);
                e[10] = u32::from(entries - 1) << 16 | u32::from(id);
                e[11] = 1 | u32::from(interrupt) << 1;
                0x05
            }
            Self::CreateSubmissionQueue { id, entries, at } => {
                data(at, 0);
                e[10] = u32::from(entries - 1) << 16 | u32::from(id);
                e[11] = u32::from(id) << 16 | 1;
                0x01
            }
            Self::DeleteSubmissionQueue { id } => {
                e[10] = u32::from(id);
                0x00
            }
            Self::DeleteCompletionQueue { id } => {
                e[10] = u32::from(id);
                0x04
            }
            Self::Abort { queue, cid } => {
                e[10] = u32::from(cid) << 16 | u32::from(queue);
                0x08
            }
            Self::Read { nsid, lba, blocks, prp1, prp2 } => {
                data(prp1, prp2);
                e[1] = nsid;
                e[10] = lba as u32;
                e[11] = (lba >> 32) as u32;
                e[12] = u32::from(blocks.max(1) - 1);
                0x02
            }
        };
        e[0] = opcode | u32::from(cid) << 16;
        e
    }

    /// True for commands of the I/O queue.
    pub fn is_io(&self) -> bool {
        matches!(self, Self::Read { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::Command::*;

    #[test]
    fn no_command_writes() {
        let all = [
            IdentifyController { to: 4096 },
            IdentifyNamespace { nsid: 1, to: 4096 },
            HealthLog { to: 4096 },
            SanitizeLog { to: 4096 },
            QueueCount { pairs: 1 },
            CreateCompletionQueue { id: 1, entries: 2, at: 4096, interrupt: true },
            CreateSubmissionQueue { id: 1, entries: 2, at: 4096 },
            DeleteSubmissionQueue { id: 1 },
            DeleteCompletionQueue { id: 1 },
            Abort { queue: 1, cid: 2 },
            Read { nsid: 1, lba: 0, blocks: 1, prp1: 4096, prp2: 0 },
        ];
        for command in all {
            // A new variant must be added here before this compiles.
            let opcode = match command {
                IdentifyController { .. } | IdentifyNamespace { .. } => 0x06,
                HealthLog { .. } | SanitizeLog { .. } | Read { .. } => 0x02,
                QueueCount { .. } => 0x09,
                CreateCompletionQueue { .. } => 0x05,
                CreateSubmissionQueue { .. } => 0x01,
                DeleteSubmissionQueue { .. } => 0x00,
                DeleteCompletionQueue { .. } => 0x04,
                Abort { .. } => 0x08,
            };
            let entry = command.encode(7);
            assert_eq!(entry[0] & 0xff, opcode, "{command:?}");
            assert_eq!(entry[0] >> 16, 7);
            // On an I/O queue 01h would be Write: only Read may go there.
            assert_eq!(command.is_io(), matches!(command, Read { .. }));
        }
        assert_eq!(QueueCount { pairs: 1 }.encode(0)[10], 7, "the only feature that is set");
    }

    #[test]
    fn no_other_opcode_exists() {
        // On the I/O queue 01h is Write, 04h Write Uncorrectable, 08h Write Zeroes, 09h Dataset
        // Management: none of the admin commands may get there, and `push` sends only reads.
        let text = include_str!("command.rs");
        let body = text.split("let opcode = match").nth(1).and_then(|t| t.split("e[0] = opcode").next()).unwrap();
        let mut opcodes: Vec<&str> =
            body.lines().map(str::trim).filter(|l| l.starts_with("0x") && l.len() == 4).collect();
        opcodes.sort_unstable();
        opcodes.dedup();
        assert_eq!(opcodes, ["0x00", "0x01", "0x02", "0x04", "0x05", "0x06", "0x08", "0x09"]);
    }

    #[test]
    fn abort_names_queue_and_command() {
        assert_eq!(Abort { queue: 1, cid: 0x2003 }.encode(0)[10], 0x2003_0001);
    }

    #[test]
    fn entries_are_made_in_this_file_only() {
        let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/storage/vfio");
        for file in std::fs::read_dir(here).unwrap() {
            let path = file.unwrap().path();
            if path.ends_with("command.rs") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(!text.contains("let mut e: Sqe") && !text.contains("[u32; 16] = ["), "{}", path.display());
        }
    }
}
