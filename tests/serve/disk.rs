//! Prompts on disk, from one server to the next.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::{Value as Json, json};

use super::common::{fails, tiny};
use super::http::Server;
use super::same_text::model;

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    all
}

/// Asks, and ends the server. How many tokens of the prompt were cached, and the text.
fn asked(model: &Path, folder: &Path, more: &[&str], prompt: &str) -> (u64, Json) {
    let mut server = Server::start(model, &[&["--cache-dir", folder.to_str().unwrap()], more].concat());
    let answer =
        server.ok("/v1/completions", &json!({ "prompt": prompt, "max_tokens": 8, "seed": 3, "temperature": 1.2 }));
    server.signal(Signal::SIGTERM);
    assert_eq!(server.ended().code(), Some(0));
    (answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(), answer["choices"][0]["text"].clone())
}

/// Users had to wait for the same long prompts after each start.
#[test]
fn prompts_outlast_the_server_that_computed_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let folder = dir.path().join("new/cache");
    let prompt = "once upon a time there was a machine ".repeat(3);
    let (cached, text) = asked(&path, &folder, &[], &prompt);
    assert_eq!(cached, 0);
    let kept = files(&folder);
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!(fs::metadata(&kept[0]).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
    let (cached, again) = asked(&path, &folder, &[], &prompt);
    assert!(cached > 64 && again == text, "{cached} {again} {text}");
    assert_eq!(files(&folder), kept);
    // Another type of the cache, another model of the same sizes: nothing of it is used, and nothing removed.
    assert_eq!(asked(&path, &folder, &["--kv", "f32"], &prompt).0, 0);
    let mut other = tiny(2);
    other.tensor("token_embd.weight").data.iter_mut().skip(1).step_by(4).for_each(|b| *b ^= 0x80);
    let other = other.write(dir.path(), "other.gguf");
    assert_eq!(asked(&other, &folder, &[], &prompt).0, 0);
    // Damaged bytes, and what is no such file at all: a new one takes its place.
    for at in [0, 20, 4000] {
        let (cached, _) = asked(&path, &folder, &[], &prompt);
        assert!(cached > 0, "byte {at}");
        for file in files(&folder) {
            let mut bytes = fs::read(&file).unwrap();
            let at = at.min(bytes.len() - 1);
            bytes[at] ^= 0xff;
            fs::write(&file, bytes).unwrap();
        }
        let (cached, again) = asked(&path, &folder, &[], &prompt);
        assert!(cached == 0 && again == text, "byte {at}: {cached} {again}");
    }
    // A context that is too short for it leaves it as it is.
    let before = files(&folder);
    let short = &["--ctx", "64"];
    asked(&path, &folder, short, "x");
    assert!(before.iter().all(|f| f.exists()));
    assert!(asked(&path, &folder, &[], &prompt).0 > 0);
    // No room for any.
    asked(&path, &folder, &["--cache-size", "1"], &prompt);
    assert!(files(&folder).is_empty());
    fails(
        &["serve", path.to_str().unwrap(), "--cache-dir", "/proc/nt"],
        2,
        &["--cache-dir /proc/nt", "cannot be written"],
    );
}

/// Where there is room for some of the prompts only, those that were used last were left out or removed.
#[test]
fn prompts_used_last_are_the_first_to_be_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = model().write(dir.path(), "m.gguf");
    let folder = dir.path().join("cache");
    let (at, prompts): (_, Vec<String>) =
        (folder.to_str().unwrap(), (0..6).map(|i| format!("{i} {}", "a machine that reads ".repeat(5))).collect());
    let ask = |server: &Server, prompt: &str| {
        let answer = server.ok("/v1/completions", &json!({ "prompt": prompt, "max_tokens": 2, "seed": 3 }));
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    let end = |mut server: Server| {
        server.signal(Signal::SIGTERM);
        assert_eq!(server.ended().code(), Some(0));
    };
    let server = Server::start(&path, &["--ctx", "2048", "--cache-dir", at]);
    prompts.iter().for_each(|p| assert!(ask(&server, p) < 64));
    end(server);
    assert_eq!(files(&folder).len(), prompts.len());
    // A server that is asked nothing leaves their order as it is.
    end(Server::start(&path, &["--ctx", "2048", "--cache-dir", at]));
    // Half of this context holds two of them.
    let server = Server::start(&path, &["--ctx", "512", "--cache-dir", at]);
    assert!(ask(&server, &prompts[5]) > 64, "the one that was used last");
    end(server);
    // Nor does a bound on their bytes remove the one that was used last.
    let one = fs::metadata(&files(&folder)[0]).unwrap().len();
    let bound = (2 * one - 1).to_string();
    let server = Server::start(&path, &["--ctx", "512", "--cache-dir", at, "--cache-size", &bound]);
    ask(&server, &prompts[4]);
    ask(&server, &prompts[5]);
    end(server);
    assert_eq!(files(&folder).len(), 1);
    let server = Server::start(&path, &["--ctx", "512", "--cache-dir", at]);
    assert!(ask(&server, &prompts[5]) > 64);
}
