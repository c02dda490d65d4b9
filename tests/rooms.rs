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
    "gguf",
    "memory",
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

/// The code of a file: without its tests and its comments.
fn code(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    code.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The list that begins behind a brace, up to the brace that ends it.
fn list(text: &str) -> &str {
    let mut open = 1;
    let end = text.find(|c| {
        open += i32::from(c == '{') - i32::from(c == '}');
        open == 0
    });
    &text[..end.unwrap_or(text.len())]
}

/// The first names of a list's paths: of `a::{B, C}, d` those are `a` and `d`.
fn heads(list: &str) -> Vec<&str> {
    let mut depth = 0;
    let parts = list.split(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        depth == 0 && c == ','
    });
    parts.map(|p| p.trim().split(|c| !is_name(c)).next().unwrap()).filter(|n| !n.is_empty()).collect()
}

/// What stands behind a path such as `super::` or `crate::`: a name, or those of a list.
fn names_behind<'a>(code: &'a str, path: &str) -> Vec<&'a str> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices(path) {
        if code[..at].ends_with(|c| is_name(c) || c == ':') {
            continue;
        }
        let rest = &code[at + path.len()..];
        match rest.strip_prefix('{') {
            Some(rest) => names.extend(heads(list(rest))),
            None => names.extend(rest.split(|c| !is_name(c)).next().filter(|n| !n.is_empty())),
        }
    }
    names
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
        // Tests may look up; nothing that is shipped may.
        let code = code(&std::fs::read_to_string(path).unwrap());
        for used in names_behind(&code, "crate::") {
            if floor(used).is_some_and(|there| there < here) {
                upwards.push((file.clone(), used.to_owned()));
            }
        }
    }
    assert!(strangers.is_empty(), "in no room: {strangers:?}");
    assert!(upwards.is_empty(), "arrows that point upwards: {upwards:?}");
}

/// By name, the part that a room's `mod.rs` takes it from: `use a::{B, C}` gives B and C to `a`.
fn taken_from(folder: &Path) -> BTreeMap<String, String> {
    let code = code(&std::fs::read_to_string(folder.join("mod.rs")).unwrap_or_default());
    let mut from = BTreeMap::new();
    for statement in code.split(';') {
        let Some((_, path)) = statement.split_once("use ") else { continue };
        let Some((part, names)) = path.trim().split_once("::") else { continue };
        let names = names.split(|c| !is_name(c)).filter(|n| !n.is_empty());
        from.extend(names.map(|n| (n.to_owned(), part.to_owned())));
    }
    from
}

/// For each part of a room (a file or folder in it), which others it names, by themselves or by what the room's `mod.rs`
/// takes from them; tests aside.
fn parts(folder: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let room = folder.file_name().unwrap().to_str().unwrap();
    let from = taken_from(folder);
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
        if inside.iter().any(|c| matches!(*c, "tests" | "tests.rs")) {
            continue;
        }
        let code = code(&std::fs::read_to_string(path).unwrap());
        let mut used = names_behind(&code, &"super::".repeat(depth));
        used.extend(names_behind(&code, &format!("crate::{room}::")));
        let named = |name: &str| from.get(name).map_or_else(|| name.to_owned(), String::clone);
        parts.entry(part).or_default().extend(used.into_iter().map(named));
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
        let round = parts.keys().filter(|p| reached(p).contains(p));
        found.extend(round.map(|part| format!("{room}::{part}")));
    }
    assert!(found.is_empty(), "these use themselves by way of others of their room: {found:?}");
}

#[test]
fn names_behind_a_path_are_read() {
    let text = "use crate::a::B;\n// crate::no\nuse crate::{b::{C, x::Y}, d};\nlet x = crate::e::f();\npub(crate) use x;\n\
                #[cfg(test)]\nmod tests {\n    use crate::tests;\n";
    assert_eq!(names_behind(&code(text), "crate::"), ["a", "b", "d", "e"]);
}

/// Guards against a reading that finds no circle since it finds nothing.
#[test]
fn a_circle_is_seen_by_way_of_what_a_room_shows() {
    let room = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| std::fs::write(room.path().join(name), text).unwrap();
    put("mod.rs", "mod a;\nmod b;\n\npub use a::{One, Two};\n");
    put("a.rs", "use super::b::Three;\n");
    put("b.rs", "use super::{Other, Two};\n");
    let parts = parts(room.path());
    let of = |part: &str| parts[part].iter().map(String::as_str).collect::<Vec<_>>();
    assert_eq!((of("a"), of("b")), (vec!["b"], vec!["a"]));
}
