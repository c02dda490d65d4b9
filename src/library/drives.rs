//! Models on drives: what is recorded of them on this machine, and what is staged on drives that the kernel holds and
//! this user may read. A drive bound to vfio-pci is not opened for a list: what it holds is known by its record.

use std::collections::BTreeSet;
use std::path::Path;

use super::{Catalog, Entry, Header, printable};
use crate::engine;
use crate::storage::bind;
use crate::storage::guard::Host;
use crate::storage::library::Library;

/// Adds them.
pub(super) fn scan(catalog: &mut Catalog) {
    let host = Host::default();
    let bound: BTreeSet<String> = bind::bound(&host).into_iter().map(|b| b.serial).collect();
    let mut known = BTreeSet::new();
    for m in Library::default().all() {
        let m = match m {
            Ok(m) => m,
            Err(why) => {
                catalog.notes.push(printable(&why.to_string()));
                continue;
            }
        };
        // The file itself is listed where it lies.
        if !is_first(&m.file) || m.path.exists() && catalog.entries.iter().any(|e| e.path == m.path) {
            continue;
        }
        known.insert((m.serial.clone(), m.file.clone()));
        let state = if bound.contains(&m.serial) { "bound to vfio-pci" } else { "recorded" };
        let at = format!("drive {} {}, {state}", printable(&m.model), printable(&m.serial));
        catalog.entries.push(entry(&m.file, at, &m.path, Some(m.size), Header::Record));
    }
    for drive in engine::staged_drives(&host) {
        for (file, header) in drive.models {
            if known.contains(&(drive.serial.clone(), file.clone())) {
                continue;
            }
            let at = format!("staged on {}", drive.node.display());
            match header {
                Ok(gguf) => {
                    let bytes = gguf.shards.iter().map(|s| s.len).sum();
                    let path = gguf.shards.first().map_or(drive.node.clone(), |s| s.path.clone());
                    catalog.entries.push(entry(&file, at, &path, Some(bytes), Header::Known(Box::new(gguf))));
                }
                Err(e) => {
                    let broken = entry(&file, at, &drive.node, None, Header::File);
                    catalog.entries.push(Entry { fault: Some(e.to_string()), ..broken });
                }
            }
        }
    }
}

/// Whether a file is a model's only or first one.
fn is_first(file: &str) -> bool {
    file.rsplit_once("-of-").is_none_or(|(head, _)| {
        let digits = head.rsplit('-').next().unwrap_or("");
        digits.len() != 5 || digits == "00001" || digits.parse::<u32>().is_err()
    })
}

fn entry(file: &str, place: String, path: &Path, bytes: Option<u64>, header: Header) -> Entry {
    let name = printable(file.strip_suffix(".gguf").unwrap_or(file));
    Entry { name, place, path: path.into(), bytes, fault: None, aliases: Vec::new(), header }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_but_the_first_are_passed_over() {
        for first in ["m.gguf", "m-00001-of-00003.gguf", "one-of-us.gguf"] {
            assert!(is_first(first), "{first}");
        }
        assert!(!is_first("m-00002-of-00003.gguf"));
    }
}
