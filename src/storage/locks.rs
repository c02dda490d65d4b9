//! Locks of drives that encrypt themselves: TCG's security subsystem classes (Opal, Enterprise, Pyrite, Ruby) by Level 0
//! Discovery, and the passwords of ATA that some NVMe drives know. What is locked may read as zeros, and a shadow MBR
//! stands in front of the data, so a drive full of data can look empty.

use std::io::{Error, Result};

use super::admin::{Answer, IDENTIFY_BYTES};

/// Bytes asked for of the list of protocols, of Level 0 Discovery and of the state of an ATA password.
pub const PROTOCOLS_BYTES: usize = 512;
pub const LEVEL_0_BYTES: usize = 2048;
pub const PASSWORD_BYTES: usize = 16;

/// Optional admin commands of Identify Controller, and the bit for Security Send and Receive. NVMe Base 2.0, figure 275.
const OACS: usize = 256;
const OACS_SECURITY: u8 = 1;
/// Security protocols: the list of them, TCG, an ATA device's password. SPC-5 §6.40, SAT-4 §11.4.
const LIST: u8 = 0;
const TCG: u8 = 1;
const ATA: u8 = 0xef;
/// What is specific to Level 0 Discovery.
const LEVEL_0: u16 = 1;
/// Generic statuses of a command, and of a protocol, that a drive does not know.
const UNKNOWN: [u16; 2] = [0x01, 0x02];
/// Type and code of a status, without its flags.
const STATUS: u16 = 0x7ff;

/// What keeps a drive's data from being seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    /// A range of it is locked.
    Range,
    /// A shadow MBR is shown in place of its first blocks.
    Shadow,
    /// It waits for its ATA password.
    Password,
}

/// A drive that is asked.
pub trait Asked {
    /// Identify Controller.
    ///
    /// # Errors
    /// What the system or the drive answers.
    fn identify(&mut self) -> Result<[u8; IDENTIFY_BYTES]>;
    /// Security Receive.
    ///
    /// # Errors
    /// What the system answers.
    fn receive(&mut self, protocol: u8, specific: u16, to: &mut [u8]) -> Result<Answer>;
}

/// Everything that keeps the data of `drive` from being seen. One that has no security commands is asked no further.
///
/// # Errors
/// What the system answers, or that the drive does not say whether it is locked.
pub fn of(drive: &mut impl Asked) -> Result<Vec<Lock>> {
    if drive.identify()?[OACS] & OACS_SECURITY == 0 {
        return Ok(Vec::new());
    }
    let mut protocols = [0; PROTOCOLS_BYTES];
    // Without a list each is asked for: one that it does not know is refused by the drive.
    // A list names itself first, and each once, in order; one that does not is none.
    let is_list = |l: &&[u8]| l.first() == Some(&LIST) && l.is_sorted_by(|a, b| a < b);
    let listed = known(drive.receive(LIST, 0, &mut protocols)?)?.then(|| list(&protocols)).filter(is_list);
    let has = |protocol: u8| listed.is_none_or(|l| l.contains(&protocol));
    let mut found = Vec::new();
    let mut level_0 = [0; LEVEL_0_BYTES];
    if has(TCG) && known(drive.receive(TCG, LEVEL_0, &mut level_0)?)? {
        // Zeros of a drive that does not list the protocol are no answer; of one that does they tell nothing.
        if listed.is_some() || level_0 != [0; LEVEL_0_BYTES] {
            found.extend(discovered(&level_0)?);
        }
    }
    let mut password = [0; PASSWORD_BYTES];
    if has(ATA) && known(drive.receive(ATA, 0, &mut password)?)? && waits_for_password(&password) {
        found.push(Lock::Password);
    }
    Ok(found)
}

/// Whether there was an answer; not where the drive does not know what it was asked.
fn known(answer: Answer) -> Result<bool> {
    match answer {
        Ok(()) => Ok(true),
        Err(status) if UNKNOWN.contains(&(status & STATUS)) => Ok(false),
        Err(status) => Err(Error::other(format!("the drive answered with status {status:#x}"))),
    }
}

/// The protocols of a list, SPC-5 §6.40.2: its length is in bytes 6 and 7.
fn list(answer: &[u8; PROTOCOLS_BYTES]) -> &[u8] {
    let len = usize::from(u16::from_be_bytes([answer[6], answer[7]]));
    &answer[8..(8 + len).min(PROTOCOLS_BYTES)]
}

/// Locks by Level 0 Discovery, TCG Opal 2.02 §3.1.1: a header of 48 bytes that begins with the length of what follows
/// that length, then descriptors of features, each a code, a version and the length of the rest. The locking feature is
/// 0002h; byte 4 has the bits.
fn discovered(answer: &[u8; LEVEL_0_BYTES]) -> Result<Vec<Lock>> {
    const HEADER: usize = 48;
    const LOCKING: [u8; 2] = [0, 2];
    const LOCKED: u8 = 1 << 2;
    const MBR_ENABLED: u8 = 1 << 4;
    const MBR_DONE: u8 = 1 << 5;
    let stated = u32::from_be_bytes([answer[0], answer[1], answer[2], answer[3]]) as usize;
    let end = stated.saturating_add(4);
    let short = || Error::other("what it says of its locks is too short");
    if end < HEADER {
        return Err(short());
    }
    let mut at = HEADER;
    while at < end {
        let Some([code @ .., _, len]) = answer.get(at..at + 4) else {
            let why = format!("what it says of its locks is longer than the {LEVEL_0_BYTES} bytes that are read");
            return Err(Error::other(why));
        };
        if code == LOCKING {
            let bits = answer.get(at + 4).filter(|_| *len > 0 && at + 4 < end).ok_or_else(short)?;
            let locked = (bits & LOCKED != 0).then_some(Lock::Range);
            let shadow = (bits & (MBR_ENABLED | MBR_DONE) == MBR_ENABLED).then_some(Lock::Shadow);
            return Ok(locked.into_iter().chain(shadow).collect());
        }
        at += 4 + usize::from(*len);
    }
    Ok(Vec::new())
}

/// Whether the drive waits for a password, SAT-4 §11.4.3: the bits are in byte 9, whatever length byte 1 states.
fn waits_for_password(answer: &[u8; PASSWORD_BYTES]) -> bool {
    const LOCKED: u8 = 1 << 2;
    answer[9] & LOCKED != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Level 0 Discovery of a drive of Opal 2: TPer, locking with these bits, geometry, Opal itself.
    pub fn level_0(bits: u8) -> Vec<u8> {
        let mut features = vec![0, 1, 0x10, 12, 0x11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        features.extend([0, 2, 0x10, 12, bits, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        features.extend([0, 3, 0x10, 28]);
        features.extend([0; 28]);
        features.extend([2, 3, 0x10, 16, 0x10, 0, 0, 1, 0, 0, 4, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
        let mut out = vec![0; 48];
        out[..4].copy_from_slice(&(44 + features.len() as u32).to_be_bytes());
        out[7] = 1;
        out.extend(features);
        out
    }

    /// A drive of these protocols and answers; `None` is a status.
    struct Fake {
        security: bool,
        protocols: std::result::Result<Vec<u8>, u16>,
        level_0: std::result::Result<Vec<u8>, u16>,
        ata: std::result::Result<Vec<u8>, u16>,
        asked: Vec<u8>,
    }

    impl Fake {
        fn opal(bits: u8) -> Fake {
            let (protocols, level_0) = (Ok(vec![0, 1, 2]), Ok(level_0(bits)));
            Fake { security: true, protocols, level_0, ata: Err(0x4002), asked: Vec::new() }
        }

        fn locks(&mut self) -> std::result::Result<Vec<Lock>, String> {
            of(self).map_err(|e| e.to_string())
        }
    }

    impl Asked for Fake {
        fn identify(&mut self) -> Result<[u8; IDENTIFY_BYTES]> {
            let mut answer = [0; IDENTIFY_BYTES];
            answer[OACS] = u8::from(self.security) | 0x1e;
            Ok(answer)
        }

        fn receive(&mut self, protocol: u8, specific: u16, to: &mut [u8]) -> Result<Answer> {
            self.asked.push(protocol);
            let answer = match (protocol, specific) {
                (0, 0) => {
                    self.protocols.clone().map(|list| [&[0, 0, 0, 0, 0, 0, 0, list.len() as u8], &list[..]].concat())
                }
                (1, 1) => self.level_0.clone(),
                (0xef, 0) => self.ata.clone(),
                _ => Err(0x4002),
            };
            Ok(answer.map(|bytes| {
                let len = bytes.len().min(to.len());
                to[..len].copy_from_slice(&bytes[..len]);
            }))
        }
    }

    #[test]
    fn locks_are_told_by_level_0_discovery() {
        // Supported, enabled, locked, encrypting, MBR enabled, done, no shadow MBR, unlocked by resets.
        for (bits, locks) in [
            (0b0000_0000, vec![]),
            (0b0000_0001, vec![]),
            (0b0000_1001, vec![]),
            (0b0000_1011, vec![]),
            (0b0000_1111, vec![Lock::Range]),
            (0b1000_1111, vec![Lock::Range]),
            (0b0001_1111, vec![Lock::Range, Lock::Shadow]),
            (0b0001_1011, vec![Lock::Shadow]),
            (0b0011_1011, vec![]),
            (0b0011_1111, vec![Lock::Range]),
            (0b0100_1011, vec![]),
        ] {
            assert_eq!(Fake::opal(bits).locks(), Ok(locks), "{bits:08b}");
        }
    }

    #[test]
    fn what_a_drive_does_not_know_it_is_not_asked_for() {
        let mut fake = Fake { security: false, ..Fake::opal(0xff) };
        assert_eq!(fake.locks(), Ok(vec![]));
        assert!(fake.asked.is_empty(), "no security command is sent to a drive that has none");
        let mut fake = Fake { protocols: Ok(vec![0, 0xee]), ..Fake::opal(0xff) };
        assert_eq!((fake.locks(), fake.asked), (Ok(vec![]), vec![0]));
        // No list: each protocol is asked for, and one that is not known (with "do not retry" or without) is none.
        for status in [0x4002, 0x0002, 0x4001, 0x0001] {
            let mut fake = Fake { protocols: Err(status), ..Fake::opal(0b1111) };
            assert_eq!(fake.locks(), Ok(vec![Lock::Range]), "{status:#x}");
            let mut fake = Fake { protocols: Err(status), level_0: Err(status), ..Fake::opal(0) };
            assert_eq!((fake.locks(), fake.asked), (Ok(vec![]), vec![0, 1, 0xef]), "{status:#x}");
        }
    }

    /// What cannot be told is an error, and never an unlocked drive.
    #[test]
    fn a_drive_that_does_not_say_is_an_error() {
        for status in [0x0006, 0x4006, 0x0286, 0x0c00 | 0x04] {
            assert!(Fake { level_0: Err(status), ..Fake::opal(0) }.locks().is_err(), "{status:#x}");
            assert!(Fake { protocols: Err(status), ..Fake::opal(0) }.locks().is_err(), "{status:#x}");
            let mut fake = Fake { protocols: Ok(vec![0, 0xef]), ata: Err(status), ..Fake::opal(0) };
            assert!(fake.locks().is_err(), "{status:#x}");
        }
        // The locking feature may lie behind what is read.
        let feature = [&[0x01, 0x00, 0x10, 0xfc][..], &[0; 0xfc]].concat();
        let header = [&8000u32.to_be_bytes()[..], &[0; 44]].concat();
        let answer = [header, feature.repeat(20), level_0(0b1111)[48..].to_vec()].concat();
        let why = Fake { level_0: Ok(answer), ..Fake::opal(0) }.locks().unwrap_err();
        assert!(why.contains("longer than the 2048 bytes"), "{why}");
    }

    /// Guards against answers of zeros, or cut short, that made a locked drive an unlocked one.
    #[test]
    fn answers_that_tell_nothing_are_errors() {
        // A list without itself is none: all are asked for.
        for protocols in [vec![], vec![0xee], vec![0; 200], vec![0, 2, 2], vec![0, 0xef, 0]] {
            let mut fake = Fake { protocols: Ok(protocols), ..Fake::opal(0b1111) };
            assert_eq!(fake.locks(), Ok(vec![Lock::Range]));
        }
        let no_bits = [&level_0(0)[..48], &[0, 2, 0x10, 0]].concat();
        for answer in [vec![], vec![0; 48], level_0(0b1111)[..3].to_vec(), no_bits] {
            let why = Fake { level_0: Ok(answer), ..Fake::opal(0) }.locks().unwrap_err();
            assert!(why.contains("too short"), "{why}");
        }
        // Zeros to a protocol that nothing lists.
        let mut fake = Fake { protocols: Err(2), level_0: Ok(vec![]), ..Fake::opal(0) };
        assert_eq!(fake.locks(), Ok(vec![]));
    }

    #[test]
    fn a_password_of_ata_is_a_lock() {
        let state = |bits| Ok(vec![0, 14, 0, 0, 0, 0, 0xff, 0xfe, 0, bits, 0, 0, 0, 0, 0, 0]);
        // Supported, enabled, locked, frozen.
        for (bits, locks) in [(0x01, vec![]), (0x03, vec![]), (0x0b, vec![]), (0x07, vec![Lock::Password])] {
            let mut fake = Fake { protocols: Ok(vec![0, 0xef]), ata: state(bits), ..Fake::opal(0) };
            assert_eq!(fake.locks(), Ok(locks), "{bits:#x}");
        }
        // The state counts whatever length it states.
        for len in [0, 9, 255] {
            let answer = vec![0, len, 0, 0, 0, 0, 0, 0, 0, 0x07];
            let mut fake = Fake { protocols: Ok(vec![0, 0xef]), ata: Ok(answer), ..Fake::opal(0) };
            assert_eq!(fake.locks(), Ok(vec![Lock::Password]), "{len}");
        }
    }

    /// Answers of any bytes end, and those of an unlocked drive that were changed say at most that it is locked.
    #[test]
    fn changed_answers_end() {
        let mut seed = 7u64;
        let mut next = |limit: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % limit
        };
        for _ in 0..10_000 {
            let mut answer = level_0(0b0001_1111);
            for _ in 0..=next(4) {
                let at = next(answer.len());
                answer[at] = next(256) as u8;
            }
            let _ = Fake { level_0: Ok(answer), ..Fake::opal(0) }.locks();
        }
    }
}
