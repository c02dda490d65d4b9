//! The rooms of the house (docs/architecture.md): what each file uses of other rooms lies below its own.

use std::path::{Path, PathBuf};

/// From the top down.
const ROOMS: [&str; 16] = [
    "cli",
    "report_page",
    "library",
    "engine",
    "plan",
    "flow",
    "pipeline",
    "model",
    "tokenizer",
    "machine",
    "backend",
    "state",
    "storage",
    "memory",
    "gguf",
    "units",
];

fn files(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// Rooms that a file names behind `crate::`, comments aside.
fn rooms_used(text: &str) -> Vec<String> {
    let code: Vec<&str> = text.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
    let code = code.join("\n");
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut used = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(is_name) {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        let (names, _) = match rest.strip_prefix('{') {
            Some(list) => list.split_once('}').unwrap_or((list, "")),
            None => rest.split_once(|c| !is_name(c)).unwrap_or((rest, "")),
        };
        used.extend(names.split(',').map(|n| n.trim().chars().take_while(|c| is_name(*c)).collect::<String>()));
    }
    used
}

#[test]
fn arrows_between_rooms_point_downwards() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut all = Vec::new();
    files(&src, &mut all);
    assert!(all.len() > 100, "{} files", all.len());
    let floor = |room: &str| ROOMS.iter().position(|r| *r == room);
    let (mut upwards, mut strangers) = (Vec::new(), Vec::new());
    for path in &all {
        let file = path.strip_prefix(&src).unwrap().display().to_string();
        let room = file.split('/').next().unwrap().trim_end_matches(".rs").to_owned();
        let Some(here) = floor(&room) else {
            if !matches!(file.as_str(), "lib.rs" | "main.rs") {
                strangers.push(file);
            }
            continue;
        };
        for used in rooms_used(&std::fs::read_to_string(path).unwrap()) {
            if floor(&used).is_some_and(|there| there < here) {
                upwards.push((file.clone(), used));
            }
        }
    }
    assert!(strangers.is_empty(), "in no room: {strangers:?}");
    assert!(upwards.is_empty(), "arrows that point upwards: {upwards:?}");
}

#[test]
fn names_behind_crate_are_read() {
    let text = "use crate::a::B;\n// crate::no\nuse crate::{b::C, d};\nlet x = crate::e::f();\npub(crate) use x;\n";
    assert_eq!(rooms_used(text), ["a", "b", "d", "e"]);
}
