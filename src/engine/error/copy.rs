//! Why a model cannot be read from where it lies, or from where `--tier-c` says.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::EngineError;
use crate::gguf::TensorType;
use crate::storage::guard::Unreadable;
use crate::storage::library::Unusable;

/// Why a model has no place that it can be read from.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// A record that is there and cannot be used.
    #[error(transparent)]
    Record(#[from] Unusable),
    /// No record.
    #[error(
        "{}: its place{} is not recorded; run `nt device extents {}` while its file system is mounted",
        path.display(), on(serial), path.display()
    )]
    Unrecorded {
        /// The model's file.
        path: PathBuf,
        /// The drive's serial, if one was named.
        serial: Option<String>,
    },
    /// No file, no record, and no staged model of that name.
    #[error("{} is neither a file nor recorded, and on {}: {source}", path.display(), place.display())]
    Nowhere {
        /// What was asked for.
        path: PathBuf,
        /// The first of the places where it was looked for.
        place: PathBuf,
        /// Why it was not found there.
        source: Box<EngineError>,
    },
    /// Neither recorded nor staged.
    #[error("{recorded}; {source}")]
    Neither {
        /// Why there is no record.
        recorded: Box<EngineError>,
        /// Why there is no staged model.
        source: Box<EngineError>,
    },
    /// A drive that VFIO is to read and that is not bound.
    #[error("--reader vfio: {}", not_bound(.0))]
    NotBound(String),
    /// A drive that the kernel is to read and that is bound.
    #[error(
        "{why}, which the kernel cannot read; leave --reader away, or give the drive back with `sudo nt device release {pci}`"
    )]
    Bound {
        /// What is bound.
        why: String,
        /// The drive's address.
        pci: String,
    },
    /// A file that is gone, on drives that are neither mounted nor bound.
    #[error(
        "{} is not there; it is recorded on {drives}, which is not bound: mount its file system, or bind the drive with `sudo nt device bind`",
        path.display()
    )]
    Unmounted {
        /// The file.
        path: PathBuf,
        /// The drives on which it is recorded.
        drives: String,
    },
    /// No place was named.
    #[error("no place was named")]
    NoPlace,
    /// A record of another drive.
    #[error("{file} is recorded on namespace {recorded}, but namespace {named} was named")]
    OtherDrive {
        /// The file.
        file: String,
        /// Namespace, model and serial of the record.
        recorded: String,
        /// The same of what was named.
        named: String,
    },
    /// A record of another file.
    #[error(
        "{file} as recorded on drive {serial} has another {what} than {}; run `nt device extents` on it again",
        own.display()
    )]
    OtherRecord {
        /// The file as recorded.
        file: String,
        /// The drive's serial.
        serial: String,
        /// What differs.
        what: Differs,
        /// The model's file.
        own: PathBuf,
    },
    /// A staged model that is another one.
    #[error(
        "{} has another {what} than what was staged under its name on {}; it is no copy",
        own.display(), node.display()
    )]
    OtherStaged {
        /// The model's file.
        own: PathBuf,
        /// What differs.
        what: Differs,
        /// Where it was staged.
        node: PathBuf,
    },
    /// A copy of another length.
    #[error("{} has {len} bytes, but {} has {expected}; it is no copy", copy.display(), own.display())]
    OtherLength {
        /// The copy.
        copy: PathBuf,
        /// Its bytes.
        len: u64,
        /// The model's file.
        own: PathBuf,
        /// Its bytes.
        expected: u64,
    },
    /// A copy with another header.
    #[error("{} has another header than {}; it is no copy", copy.display(), own.display())]
    OtherHeader {
        /// The copy.
        copy: PathBuf,
        /// The model's file.
        own: PathBuf,
    },
    /// Copies for which other bytes are recorded.
    #[error("--tier-c {places}: other bytes are recorded for {a} than for {b}")]
    OtherBytes {
        /// All places.
        places: String,
        /// One of them.
        a: String,
        /// Another.
        b: String,
    },
    /// One place named twice.
    #[error("--tier-c {places}: {a} and {b} are {same}; each place needs its own copy")]
    Same {
        /// All places.
        places: String,
        /// One of them.
        a: String,
        /// Another.
        b: String,
        /// What both are.
        same: &'static str,
    },
    /// One of several places cannot be used.
    #[error("--tier-c {places}: {source}")]
    At {
        /// All places.
        places: String,
        /// Why.
        source: Box<EngineError>,
    },
    /// Places for VFIO of which the kernel reads one.
    #[error(
        "--reader vfio: {file} is read through the kernel; of places that are striped, as {places} are, each must be a drive bound to vfio-pci"
    )]
    ThroughKernel {
        /// What the kernel reads.
        file: String,
        /// All places.
        places: String,
    },
    /// A file of the model that is gone.
    #[error("auto: {} is not there", .0.display())]
    Gone(PathBuf),
    /// A place that is not there.
    #[error("--tier-c {0}: no such drive, file or directory")]
    NoSuchPlace(String),
    /// A drive without a copy.
    #[error(
        "--tier-c {name}: {source}; {}; and {} to read a model recorded there",
        sentences(unstaged),
        not_bound(name)
    )]
    NotOnDrive {
        /// The drive.
        name: String,
        /// Why no file on it is a copy.
        source: NoCopy,
        /// By node, why no staged model is.
        unstaged: Vec<(PathBuf, EngineError)>,
    },
    /// A staged file that a reader of nodes cannot read.
    #[error("{file} lies in several pieces on {}", node.display())]
    Pieces {
        /// The file.
        file: String,
        /// Where it was staged.
        node: PathBuf,
    },
    /// A staged model of another name.
    #[error("no {name} is staged there; the drive holds {held}")]
    NotStaged {
        /// What was asked for.
        name: String,
        /// What is there.
        held: String,
    },
    /// A file in place of a folder.
    #[error("{}: a directory with all {shards} shards was expected", copy.display())]
    NoFolder {
        /// What was named.
        copy: PathBuf,
        /// Shards of the model.
        shards: usize,
    },
    /// A file that cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// A node that cannot be read.
    #[error(transparent)]
    Node(io::Error),
    /// What the system says of drives.
    #[error(transparent)]
    System(#[from] Unreadable),
    /// An entry of the library that is no model.
    #[error("{}: {fault}", path.display())]
    Entry {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        fault: String,
    },
    /// Nothing to requantise.
    #[error("--requant {0}: no matrix of the model is larger than that; leave --requant away")]
    NothingLarger(TensorType),
    /// A header that does not come out of the form that is known.
    #[error("{}: its header cannot be written anew", .0.display())]
    Header(PathBuf),
}

/// What differs between a file and its copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Differs {
    /// Bytes.
    Length,
    /// What lies before its tensors.
    Header,
}

impl fmt::Display for Differs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Differs::Length => "length",
            Differs::Header => "header",
        })
    }
}

/// Why no file on a drive is a copy of the model.
#[derive(Debug, thiserror::Error)]
pub enum NoCopy {
    /// The table of mounts cannot be read.
    #[error(transparent)]
    Mounts(#[from] Unreadable),
    /// Nothing is mounted.
    #[error("no file system on it is mounted")]
    NotMounted,
    /// It is not there.
    #[error("no copy of the model lies on it or at the top of {0}")]
    NotThere(String),
}

/// That a drive is not bound, and how it is.
pub(in super::super) fn not_bound(name: &str) -> String {
    format!("{name} is not bound to vfio-pci; bind it with `sudo nt device bind {name}`")
}

fn on(serial: &Option<String>) -> String {
    serial.as_ref().map_or(String::new(), |s| format!(" on drive {s}"))
}

fn sentences(faults: &[(PathBuf, EngineError)]) -> String {
    faults.iter().map(|(node, e)| format!("{}: {e}", node.display())).collect::<Vec<_>>().join("; ")
}
