//! `docs/safety.md` names the test of each thing that it says: each of them is there.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources(folder: &str, end: &str, all: &mut String) {
    for entry in fs::read_dir(root().join(folder)).unwrap().flatten() {
        let path = entry.path();
        let below = format!("{folder}/{}", entry.file_name().to_string_lossy());
        if path.is_dir() {
            sources(&below, end, all);
        } else if below.ends_with(end) {
            all.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}

/// The parts of a line between two of `mark`.
fn quoted(line: &str, mark: char) -> impl Iterator<Item = &str> {
    line.split(mark).skip(1).step_by(2)
}

/// Words with two underscores that are the kernel's and not a test's.
const KERNELS: [&str; 5] =
    ["vfio_iommu_type1", "allow_unsafe_interrupts", "broken_parity_status", "g_mass_storage", "logical_block_size"];

#[test]
fn every_test_that_is_named_is_there() {
    let text = fs::read_to_string(root().join("docs/safety.md")).unwrap();
    let (mut all, mut rows) = (String::new(), String::new());
    sources("src", ".rs", &mut all);
    sources("tests", ".rs", &mut all);
    sources("src/storage/guard/tests", ".rs", &mut rows);
    let mut suites = HashSet::new();
    for entry in fs::read_dir(root().join("tests/vm/suites")).unwrap().flatten() {
        suites.insert(entry.file_name().to_string_lossy().trim_end_matches(".sh").to_owned());
    }
    let is_name = |w: &&str| w.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    let mut tests = 0;
    for name in text.lines().flat_map(|l| quoted(l, '`')).filter(|w| w.matches('_').count() > 1).filter(is_name) {
        if !KERNELS.contains(&name) && !suites.contains(name) {
            assert!(all.contains(&format!("fn {name}(")), "{name} is no test");
            tests += 1;
        }
    }
    assert!(tests > 60, "{tests}");
    for suite in text.lines().flat_map(|l| quoted(l, '`')).filter_map(|w| w.strip_prefix("tests/vm/run.sh ")) {
        assert!(suites.contains(suite), "{suite} is no suite");
    }
    // The table of what is checked: each row has a row of the tests, a test or a suite.
    let table = text.split("## What is checked").nth(1).and_then(|t| t.split("\n## ").next()).unwrap();
    let lines: Vec<&str> = table.lines().filter(|l| l.starts_with("| ") && !l.starts_with("| What |")).collect();
    assert!(lines.len() > 30, "{}", lines.len());
    for line in lines.iter().filter(|l| !l.starts_with("| ---")) {
        let shown = line.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        let named: Vec<&str> = quoted(shown, '"').collect();
        for row in &named {
            assert!(rows.contains(&format!("\"{row}\"")), "{row:?} is no row");
        }
        let one = !named.is_empty()
            || quoted(shown, '`').any(|w| w.contains('_') || w.starts_with("tests/vm/") || w.ends_with(".rs"));
        assert!(one, "no test: {line}");
    }
    // The table of faults: the same for those of its siblings that are rows.
    let table = text.split("## Faults of a trial").nth(1).and_then(|t| t.split("\n## ").next()).unwrap();
    for row in table.lines().filter(|l| l.starts_with("| ")).flat_map(|l| quoted(l, '"')) {
        assert!(rows.contains(&format!("\"{row}\"")), "{row:?} is no row");
    }
}
