//! The rooms of the house (docs/architecture.md): what each file uses of other rooms lies below its own, and inside a
//! room nothing goes round in a circle.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// From the top down.
const ROOMS: [&str; 17] = [
    "cli",
    "serve",
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

/// Parts of rooms that use each other in a circle still, as room and parts (none: any of it); each is to go.
const CIRCLES: [(&str, &[&str]); 4] = [
    ("cli", &[]),
    ("engine", &["places", "source", "stripes"]),
    ("plan", &["device", "place"]),
    ("storage", &["bind", "extents", "guard", "health", "image", "library", "vfio"]),
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

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// What stands behind a path such as `super::`: a name, or those of a list.
fn names_behind<'a>(code: &'a str, path: &str) -> Vec<&'a str> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices(path) {
        if code[..at].ends_with(|c| is_name(c) || c == ':') {
            continue;
        }
        let rest = &code[at + path.len()..];
        let list = rest.strip_prefix('{').map(|list| list.split_once('}').map_or(list, |l| l.0));
        match list {
            Some(list) => names.extend(list.split(|c| !is_name(c)).filter(|n| !n.is_empty())),
            None => names.extend(rest.split(|c| !is_name(c)).next()),
        }
    }
    names
}

/// For each part of a room (a file or folder in it), which others it names, tests aside.
fn parts(folder: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let room = folder.file_name().unwrap().to_str().unwrap();
    let mut all = Vec::new();
    files(folder, &mut all);
    let mut parts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in &all {
        let inside: Vec<&str> = path.strip_prefix(folder).unwrap().iter().map(|c| c.to_str().unwrap()).collect();
        let part = inside[0].trim_end_matches(".rs").to_owned();
        // How far up the room is: `mod.rs` stands for its folder.
        let depth = inside.len() - usize::from(inside.ends_with(&["mod.rs"]));
        if depth == 0 {
            continue;
        }
        let text = std::fs::read_to_string(path).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let code: Vec<&str> = code.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
        let code = code.join("\n");
        let mut used = names_behind(&code, &"super::".repeat(depth));
        used.extend(names_behind(&code, &format!("crate::{room}::")));
        parts.entry(part).or_default().extend(used.into_iter().map(str::to_owned));
    }
    let names: BTreeSet<String> = parts.keys().cloned().collect();
    for (part, used) in &mut parts {
        used.retain(|u| u != part && names.contains(u));
    }
    parts
}

#[test]
fn no_part_of_a_room_uses_itself_by_way_of_others() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    for room in ROOMS.iter().filter(|r| src.join(r).is_dir()) {
        let parts = parts(&src.join(room));
        let reached = |from: &String| {
            let mut seen = BTreeSet::new();
            let mut next: Vec<&String> = parts[from].iter().collect();
            while let Some(part) = next.pop() {
                if seen.insert(part) {
                    next.extend(parts.get(part).into_iter().flatten());
                }
            }
            seen
        };
        let known = CIRCLES.iter().find(|c| c.0 == *room);
        let is_known = |part: &String| known.is_some_and(|c| c.1.is_empty() || c.1.contains(&part.as_str()));
        let round = parts.keys().filter(|p| reached(p).contains(p) && !is_known(p));
        found.extend(round.map(|part| format!("{room}::{part}")));
    }
    assert!(found.is_empty(), "these use themselves by way of others of their room: {found:?}");
}

#[test]
fn names_behind_crate_are_read() {
    let text = "use crate::a::B;\n// crate::no\nuse crate::{b::C, d};\nlet x = crate::e::f();\npub(crate) use x;\n";
    assert_eq!(rooms_used(text), ["a", "b", "d", "e"]);
}
