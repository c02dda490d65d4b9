//! Whether an entry of the allowlist consents to what a drive holds. Consent to reading it and consent to losing it are
//! two lines of the entry: a list that was written for binding a drive never lets it be overwritten.

use super::allowlist::Entry;
use super::{Check, Reason};

/// What a drive is examined for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To be bound, and read.
    Read,
    /// To be overwritten.
    Erase,
}

impl Purpose {
    /// The line of an entry that consents to it.
    fn key(self) -> &'static str {
        match self {
            Purpose::Read => "holds",
            Purpose::Erase => "erase",
        }
    }

    fn consent(self, entry: &Entry) -> &[String] {
        match self {
            Purpose::Read => &entry.holds,
            Purpose::Erase => &entry.erase,
        }
    }
}

/// Contents of a device that are not nt's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign {
    /// The device's node.
    pub path: String,
    /// What lies there: `ext4`, `unknown data`.
    pub kind: String,
    /// First byte of the partition that it lies in, where the kernel does not show that.
    pub unshown: Option<u64>,
}

/// A reason for each of the contents of a namespace that its entry does not consent to, with the whole line that it
/// would need.
pub fn missing(found: &[Foreign], entry: Option<&Entry>, purpose: Purpose) -> Vec<Reason> {
    let given = entry.map_or(&[][..], |e| purpose.consent(e));
    let mut kinds: Vec<&str> = Vec::new();
    for kind in given.iter().map(String::as_str).chain(found.iter().map(|f| f.kind.as_str())) {
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let quoted: Vec<String> = kinds.iter().map(|kind| format!("{kind:?}")).collect();
    let line = format!("{} = [{}]", purpose.key(), quoted.join(", "));
    let reason = |f: &Foreign| {
        let kind = &f.kind;
        let place = f.unshown.map_or(String::new(), |at| {
            format!(
                ", in a partition from byte {at} on that a table of the drive describes and the kernel does not show"
            )
        });
        let what = match purpose {
            Purpose::Read => format!("it holds {kind}{place}; if nt may read that, its entry needs the line {line}"),
            Purpose::Erase if entry.is_some_and(|e| e.holds.contains(kind)) => format!(
                "it holds {kind}{place}, which its entry lets nt read (holds) and not erase; if all of it may be lost, its entry needs the line {line} as well"
            ),
            Purpose::Erase => {
                format!("it holds {kind}{place}; if all of it may be lost, its entry needs the line {line}")
            }
        };
        Reason::new(Check::Contents, &f.path, what)
    };
    found.iter().filter(|f| !given.contains(&f.kind)).map(reason).collect()
}
