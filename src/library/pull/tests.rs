//! Servers that break off, lie, redirect and change their minds.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use super::*;

/// A request as the server saw it.
#[derive(Clone, Debug)]
struct Seen {
    path: String,
    headers: Vec<(String, String)>,
    /// How many came before.
    no: usize,
}

impl Seen {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|h| h.0 == name).map(|h| h.1.as_str())
    }

    /// First byte of the range.
    fn from(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.split('-').next()?.parse().ok()
    }

    /// Whether only the first byte is asked for.
    fn looks(&self) -> bool {
        self.header("range") == Some("bytes=0-0")
    }
}

/// An answer: its head, and what follows.
struct Reply {
    head: String,
    body: Vec<u8>,
}

fn reply(status: u16, headers: &[(&str, String)], body: &[u8]) -> Reply {
    let mut head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\n");
    headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
    Reply { head, body: body.to_vec() }
}

/// A file as a good server sends it, ranges and all.
fn good(seen: &Seen, file: &[u8], tag: &str) -> Reply {
    let changed = seen.header("if-range").is_some_and(|t| t != tag);
    let etag = ("ETag", tag.to_owned());
    match seen.from().filter(|_| !changed) {
        Some(from) if from >= file.len() => reply(
            416,
            &[etag, ("Content-Range", format!("bytes */{}", file.len())), ("Content-Length", "0".into())],
            b"",
        ),
        Some(from) => {
            let to = if seen.looks() { 0 } else { file.len() - 1 };
            let range = ("Content-Range", format!("bytes {from}-{to}/{}", file.len()));
            reply(206, &[etag, range, ("Content-Length", (to - from + 1).to_string())], &file[from..=to])
        }
        None => reply(200, &[etag, ("Content-Length", file.len().to_string())], file),
    }
}

/// The same, broken off after some bytes of the body.
fn cut(mut reply: Reply, bytes: usize) -> Reply {
    reply.body.truncate(bytes);
    reply
}

struct Server {
    at: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    done: Arc<AtomicBool>,
}

impl Server {
    fn new(answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap().to_string();
        let (seen, done) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (log, end, answer) = (seen.clone(), done.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                let (log, answer) = (log.clone(), answer.clone());
                std::thread::spawn(move || {
                    let Some(mut seen) = read(&stream) else { return };
                    {
                        let mut log: std::sync::MutexGuard<Vec<Seen>> = log.lock().unwrap();
                        seen.no = log.len();
                        log.push(seen.clone());
                    }
                    let reply = answer(&seen);
                    let mut stream = stream;
                    let _ = stream.write_all(format!("{}\r\n", reply.head).as_bytes());
                    let _ = stream.write_all(&reply.body);
                });
            }
        });
        Server { at, seen, done }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.at)
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(&self.at);
    }
}

fn read(stream: &TcpStream) -> Option<Seen> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines().map_while(Result::ok);
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers = lines.take_while(|l| !l.is_empty());
    let headers = headers.filter_map(|l| l.split_once(": ").map(|(n, v)| (n.to_lowercase(), v.to_owned())));
    Some(Seen { path, headers: headers.collect(), no: 0 })
}

/// A GGUF file with a few numbers of its metadata and bytes behind its header.
fn gguf(numbers: &[(&str, u64)], tail: usize) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend(0u64.to_le_bytes());
    out.extend((numbers.len() as u64).to_le_bytes());
    for (key, value) in numbers {
        out.extend((key.len() as u64).to_le_bytes());
        out.extend(key.as_bytes());
        out.extend(10u32.to_le_bytes());
        out.extend(value.to_le_bytes());
    }
    let start = out.len();
    out.extend((0..tail).map(|i| (i * 7 + i / 256) as u8));
    assert!(out.len() >= start);
    out
}

fn model() -> Vec<u8> {
    gguf(&[("general.alignment", 32)], 300_000)
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn request(reference: &str, folder: &Path) -> Request {
    Request {
        reference: reference.into(),
        folder: folder.into(),
        revision: "main".into(),
        sha256: Vec::new(),
        endpoint: None,
        token: None,
        pause: Duration::from_millis(1),
    }
}

fn fetch(request: &Request) -> Result<Pulled, PullError> {
    pull(request, &mut |_| {}, &|| false)
}

fn refused(request: &Request, words: &[&str]) -> String {
    let e = fetch(request).unwrap_err();
    let text = e.to_string();
    for word in words {
        assert!(text.contains(word), "{word:?} was expected in: {text}");
    }
    // Nothing half has the name of a model.
    let named = walk(&request.folder).into_iter().filter(|f| f.extension().is_some_and(|e| e == "gguf"));
    assert_eq!(named.collect::<Vec<_>>(), Vec::<PathBuf>::new(), "{text}");
    text
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() { all.extend(walk(&entry.path())) } else { all.push(entry.path()) }
    }
    all
}

#[test]
fn a_whole_file_gets_its_name_and_nothing_else_stays() {
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(|seen| good(seen, &model(), "\"a\""));
    let mut r = request(&server.url("/x/m.gguf?key=1"), &d.path().join("new/folder"));
    r.sha256 = vec![sum(&model()).to_uppercase()];
    let (mut last, mut first) = (None, None);
    let mut progress = |p: Progress| {
        first.get_or_insert(p);
        last = Some(p);
    };
    let pulled = pull(&r, &mut progress, &|| false).unwrap();
    let path = r.folder.join("m.gguf");
    assert_eq!(fs::read(&path).unwrap(), model());
    assert_eq!(walk(d.path()), std::slice::from_ref(&path));
    let file = PulledFile { path, bytes: model().len() as u64, sha256: Some(sum(&model())), compared: true };
    assert_eq!(pulled, Pulled { name: "m".into(), files: vec![file], fetched: model().len() as u64 });
    assert_eq!(last.unwrap().bytes, (model().len() as u64, model().len() as u64));
    // The second time it is there: compared, not fetched.
    let again = fetch(&r).unwrap();
    assert_eq!((again.fetched, again.files[0].compared), (0, true));
    fs::write(r.folder.join("m.gguf"), b"other").unwrap();
    let e = fetch(&r).unwrap_err().to_string();
    assert!(e.contains("another file of this name") && fs::read(r.folder.join("m.gguf")).unwrap() == b"other", "{e}");
}

#[test]
fn what_breaks_off_goes_on_from_there() {
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(|seen| match seen.looks() {
        true => good(seen, &model(), "\"a\""),
        false => cut(good(seen, &model(), "\"a\""), 100_000),
    });
    fetch(&request(&server.url("/m.gguf"), d.path())).unwrap();
    assert_eq!(fs::read(d.path().join("m.gguf")).unwrap(), model());
    let from: Vec<_> =
        server.seen().iter().skip(1).map(|s| (s.from(), s.header("if-range").map(str::to_owned))).collect();
    let tag = Some("\"a\"".to_owned());
    assert_eq!(from, [(None, None), (Some(100_000), tag.clone()), (Some(200_000), tag.clone()), (Some(300_000), tag)]);
}

#[test]
fn a_stopped_run_leaves_what_the_next_one_goes_on_from() {
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(|seen| match seen.no {
        // It says nothing after some bytes.
        1 => {
            std::thread::sleep(Duration::from_millis(10));
            Reply { head: format!("{}Transfer-Encoding: x\r\n", ""), body: Vec::new() }
        }
        _ => good(seen, &model(), "\"a\""),
    });
    // A server that answers garbage is an error, not a hang.
    let e = fetch(&request(&server.url("/m.gguf"), d.path())).unwrap_err().to_string();
    assert!(e.contains("m.gguf"), "{e}");
    let stop = AtomicBool::new(false);
    let seen = AtomicUsize::new(0);
    let mut progress = |p: Progress| {
        seen.store(p.bytes.0 as usize, Ordering::Relaxed);
        stop.store(p.bytes.0 > 0, Ordering::Relaxed);
    };
    let r = request(&server.url("/m.gguf"), d.path());
    let e = pull(&r, &mut progress, &|| stop.load(Ordering::Relaxed)).unwrap_err();
    assert!(matches!(e, PullError::Stopped { .. }) && e.to_string().contains("goes on from there"), "{e}");
    let kept = seen.load(Ordering::Relaxed) as u64;
    assert_eq!(fs::metadata(d.path().join("m.gguf.part")).unwrap().len(), kept);
    let pulled = fetch(&r).unwrap();
    assert_eq!(pulled.fetched, model().len() as u64 - kept);
    assert_eq!(fs::read(d.path().join("m.gguf")).unwrap(), model());
    assert_eq!(walk(d.path()).len(), 1);
}

#[test]
fn a_file_that_changes_between_runs_is_begun_again() {
    let other = || gguf(&[("general.alignment", 64)], 200_000);
    for tags in [["\"a\"", "\"b\""], ["W/\"a\"", "W/\"a\""], ["\"a\"", "\"a\""]] {
        let d = tempfile::tempdir().unwrap();
        // Same tag: it is the length that differs.
        let server = Server::new(move |seen| match seen.no {
            0 => good(seen, &model(), tags[0]),
            1 => cut(good(seen, &model(), tags[0]), 100_000),
            _ => good(seen, &other(), tags[1]),
        });
        let pulled = fetch(&request(&server.url("/m.gguf"), d.path())).unwrap();
        assert_eq!(fs::read(d.path().join("m.gguf")).unwrap(), other(), "{tags:?}");
        assert_eq!(pulled.files[0].bytes, other().len() as u64);
    }
}

#[test]
fn a_part_of_another_version_is_not_gone_on_with() {
    let d = tempfile::tempdir().unwrap();
    let other = || model().into_iter().rev().chain(*b"GGUF").rev().rev().collect::<Vec<u8>>();
    assert_eq!(other().len(), model().len() + 4);
    let server = Server::new(|seen| match seen.no {
        0 => good(seen, &model(), "\"a\""),
        1 => cut(good(seen, &model(), "\"a\""), 100_000),
        2..=6 => reply(503, &[("Content-Length", "0".into())], b""),
        _ => good(seen, &model(), "\"b\""),
    });
    let r = request(&server.url("/m.gguf"), d.path());
    refused(&r, &["busy or broken (503)", "100000 of"]);
    // The same length, but another tag.
    assert_eq!(fetch(&r).unwrap().fetched, model().len() as u64);
    assert_eq!(fs::read(d.path().join("m.gguf")).unwrap(), model());
}

#[test]
fn a_server_without_ranges_is_asked_for_all_of_it() {
    let d = tempfile::tempdir().unwrap();
    let plain = |bytes: usize| cut(reply(200, &[("Content-Length", model().len().to_string())], &model()), bytes);
    let server = Server::new(move |seen| plain(if seen.no == 1 { 100_000 } else { usize::MAX }));
    fetch(&request(&server.url("/m.gguf"), d.path())).unwrap();
    assert_eq!(fs::read(d.path().join("m.gguf")).unwrap(), model());
    // One that always breaks off is given up.
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(move |seen| plain(if seen.no == 0 { usize::MAX } else { 100_000 }));
    refused(&request(&server.url("/m.gguf"), d.path()), &["broke off", "bytes are kept"]);
    assert!(server.seen().len() < 12, "{}", server.seen().len());
}

#[test]
fn lengths_that_are_lies_are_refused() {
    let whole = model().len();
    let with = |length: usize, body: Vec<u8>| {
        let d = tempfile::tempdir().unwrap();
        let server = Server::new(move |seen| match seen.looks() {
            true => {
                reply(206, &[("Content-Range", format!("bytes 0-0/{length}")), ("Content-Length", "1".into())], b"G")
            }
            false => reply(200, &[("Content-Length", length.to_string())], &body),
        });
        let mut r = request(&server.url("/m.gguf"), d.path());
        r.sha256 = vec![sum(&model())];
        refused(&r, &[])
    };
    // Too long, too short.
    assert!(with(whole + 10, model()).contains("broke off"));
    assert!(with(whole - 10, model()).contains("sha256"));
    // The two differ from each other.
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(|seen| match seen.looks() {
        true => reply(206, &[("Content-Range", "bytes 0-0/1000".into()), ("Content-Length", "1".into())], b"G"),
        false => good(seen, &model(), "\"a\""),
    });
    refused(&request(&server.url("/m.gguf"), d.path()), &["has changed"]);
    // A range that was not asked for; one that is none; a length that nobody says; chunks that never end.
    for (headers, words) in [
        (vec![("Content-Range", "bytes 5-5/1000".to_owned()), ("Content-Length", "1".into())], "were asked for"),
        (vec![("Content-Range", "bytes 0-0/*".to_owned()), ("Content-Length", "1".into())], "which is none"),
        (vec![("Content-Range", "bytes 0-0/0".to_owned()), ("Content-Length", "1".into())], "were asked for"),
    ] {
        let d = tempfile::tempdir().unwrap();
        let server = Server::new(move |_| reply(206, &headers, b"G"));
        refused(&request(&server.url("/m.gguf"), d.path()), &[words]);
    }
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(|_| reply(200, &[("Transfer-Encoding", "chunked".into())], b"4\r\nGGUF\r\n"));
    refused(&request(&server.url("/m.gguf"), d.path()), &["does not say how long"]);
    // A header that says more than there is.
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(|seen| good(seen, &model()[..30], "\"a\""));
    refused(&request(&server.url("/m.gguf"), d.path()), &[".part", "has not become a model"]);
}

#[test]
fn what_is_no_model_is_refused_at_its_first_bytes() {
    let d = tempfile::tempdir().unwrap();
    let page = || b"<!doctype html><p>Please log in".repeat(1000);
    let server = Server::new(move |seen| good(seen, &page(), "\"a\""));
    refused(&request(&server.url("/m.gguf"), d.path()), &["no GGUF file", "<!doctype html"]);
    let d = tempfile::tempdir().unwrap();
    let server =
        Server::new(|_| reply(416, &[("Content-Range", "bytes */0".into()), ("Content-Length", "0".into())], b""));
    refused(&request(&server.url("/m.gguf"), d.path()), &["it has 0 bytes"]);
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(|_| {
        let headers = [("Content-Encoding", "gzip".into()), ("Content-Length", "4".into())];
        reply(200, &headers, b"GGUF")
    });
    refused(&request(&server.url("/m.gguf"), d.path()), &["compressed"]);
}

#[test]
fn a_wrong_checksum_leaves_nothing() {
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(|seen| good(seen, &model(), "\"a\""));
    let mut r = request(&server.url("/m.gguf"), d.path());
    r.sha256 = vec!["0".repeat(64)];
    refused(&r, &["was expected", "was removed"]);
    assert_eq!(walk(d.path()), Vec::<PathBuf>::new());
    for (wrong, word) in [(vec!["xy".into()], "64 hexadecimal"), (vec!["0".repeat(64); 2], "2 checksums")] {
        r.sha256 = wrong;
        let text = refused(&r, &[word]);
        assert!(matches!(fetch(&r), Err(PullError::Usage(_))), "{text}");
    }
}

#[test]
fn answers_that_are_none_are_sentences() {
    for (status, words) in [
        (403, "refuses (403)"),
        (404, "no such file (404)"),
        (451, "status 451"),
        (500, "busy or broken (500)"),
        (204, "status 204"),
    ] {
        let d = tempfile::tempdir().unwrap();
        let server = Server::new(move |_| reply(status, &[("Content-Length", "0".into())], b""));
        refused(&request(&server.url("/m.gguf?secret=1"), d.path()), &[words, "/m.gguf"]);
        assert!(!refused(&request(&server.url("/m.gguf?secret=1"), d.path()), &[]).contains("secret"));
    }
    // A server that is busy for a moment, and one that is for an hour.
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(|seen| match seen.no {
        0 | 2 => reply(429, &[("Retry-After", "0".into()), ("Content-Length", "0".into())], b""),
        _ => good(seen, &model(), "\"a\""),
    });
    fetch(&request(&server.url("/m.gguf"), d.path())).unwrap();
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(|_| reply(429, &[("Retry-After", "3600".into()), ("Content-Length", "0".into())], b""));
    refused(&request(&server.url("/m.gguf"), d.path()), &["come again in 3600 s"]);
    assert_eq!(server.seen().len(), 1);
    // A 416 that no range deserves.
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(|seen| match seen.no {
        0 => good(seen, &model(), "\"a\""),
        1 => cut(good(seen, &model(), "\"a\""), 1000),
        2 => reply(416, &[("Content-Length", "0".into())], b""),
        _ => good(seen, &model(), "\"a\""),
    });
    assert_eq!(fetch(&request(&server.url("/m.gguf"), d.path())).unwrap().fetched, model().len() as u64 + 1000);
    // Nobody listens.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    refused(&request(&format!("http://{closed}/m.gguf"), d.path().join("x").as_path()), &["failed"]);
}

#[test]
fn redirects_are_followed_with_care() {
    let to = |location: String| reply(302, &[("Location", location), ("Content-Length", "0".into())], b"");
    // A loop.
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(move |_| to("/m.gguf".into()));
    refused(&request(&server.url("/m.gguf"), d.path()), &["more than 10 redirects"]);
    assert_eq!(server.seen().len(), 11);
    for (location, words) in
        [("ftp://h/m.gguf", "ftp://h/m.gguf, which is not followed"), ("http://u:pw@h/m.gguf", "not followed")]
    {
        let server = Server::new(move |_| to(location.into()));
        let text = refused(&request(&server.url("/m.gguf"), d.path()), &[words]);
        assert!(!text.contains("pw"), "{text}");
    }
    let server = Server::new(|_| reply(302, &[("Content-Length", "0".into())], b""));
    refused(&request(&server.url("/m.gguf"), d.path()), &["redirects to nowhere"]);
    // The name is that of the first address, wherever the bytes are.
    let server = Server::new(move |seen| match seen.path.as_str() {
        "/m.gguf" => to("away/../other.bin?sig=é|1".into()),
        _ => good(seen, &model(), "\"a\""),
    });
    assert_eq!(fetch(&request(&server.url("/m.gguf"), d.path())).unwrap().files[0].path, d.path().join("m.gguf"));
}

/// A hub with a store of files behind it on another host, as Hugging Face has.
fn hub(files: &'static [&'static str]) -> (Server, Server) {
    let body = |path: &str| {
        let no: u64 = files.iter().position(|f| path.ends_with(f)).unwrap_or(0) as u64;
        gguf(&[("split.no", no), ("split.count", files.len() as u64)], 50_000 + no as usize)
    };
    let store = Server::new(move |seen| good(seen, &body(&seen.path), "\"cdn\""));
    let base = store.url("");
    let hub = Server::new(move |seen| {
        let file = body(&seen.path);
        let headers = [
            ("Location", format!("{base}{}", seen.path)),
            ("X-Linked-Etag", format!("\"{}\"", sum(&file))),
            ("X-Linked-Size", file.len().to_string()),
            ("X-Repo-Commit", "c".repeat(40)),
            ("Content-Length", "0".into()),
        ];
        reply(302, &headers, b"")
    });
    (hub, store)
}

const SHARDS: &[&str] = &["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"];

#[test]
fn all_shards_come_of_one_commit_with_the_hubs_checksums_and_the_token_stays_there() {
    let d = tempfile::tempdir().unwrap();
    let (hub, store) = hub(SHARDS);
    let mut r = request("hf:o/n:q/m-00002-of-00003.gguf", d.path());
    (r.endpoint, r.token) = (Some(hub.url("/")), Some("hf_secret\n".into()));
    let pulled = fetch(&r).unwrap();
    assert_eq!(pulled.name, "o/n/q/m");
    let paths: Vec<_> = pulled.files.iter().map(|f| f.path.clone()).collect();
    assert_eq!(paths, SHARDS.iter().map(|s| d.path().join("o/n/q").join(s)).collect::<Vec<_>>());
    assert!(pulled.files.iter().all(|f| f.compared && f.sha256.is_some()));
    assert_eq!(walk(d.path()).len(), 3);
    let commit = "c".repeat(40);
    for seen in hub.seen() {
        assert_eq!(seen.header("authorization"), Some("Bearer hf_secret"));
        let revision = if seen.no == 0 || seen.path.contains("00001") { "main" } else { &commit };
        assert!(seen.path.starts_with(&format!("/o/n/resolve/{revision}/q/m-")), "{}", seen.path);
    }
    assert!(store.seen().iter().all(|s| s.header("authorization").is_none()), "{:?}", store.seen());
    // Another host that the user names does not get it either.
    let mut r = request(&store.url("/m-00001-of-00003.gguf"), &d.path().join("other"));
    (r.endpoint, r.token) = (Some(hub.url("")), Some("hf_secret".into()));
    fetch(&r).unwrap();
    assert!(store.seen().iter().all(|s| s.header("authorization").is_none()));
    // What was fetched is in the library, under the names that a user would type.
    let catalog = crate::library::scan(&[crate::library::Place::at(d.path(), true)]);
    let found = crate::library::find("o/n/q", &catalog).unwrap();
    assert_eq!(found, Some(d.path().join("o/n/q").join(SHARDS[0])));
    for wrong in ["a b", "a\u{e9}"] {
        r.token = Some(wrong.into());
        assert!(matches!(fetch(&r), Err(PullError::Usage(why)) if why.contains("HF_TOKEN")));
    }
}

#[test]
fn a_model_with_a_missing_or_strange_shard_is_none() {
    let d = tempfile::tempdir().unwrap();
    let shard =
        |no: u64, count: u64| gguf(&[("split.no", no), ("split.count", count), ("split.tensors.count", 0)], 1000);
    let server = Server::new(move |seen| match seen.path.as_str() {
        "/m-00001-of-00002.gguf" | "/lone.gguf" => good(seen, &shard(0, 2), "\"a\""),
        "/s-00001-of-00002.gguf" => good(seen, &shard(1, 2), "\"a\""),
        "/s-00002-of-00002.gguf" => good(seen, &shard(1, 2), "\"a\""),
        _ => reply(404, &[("Content-Length", "0".into())], b""),
    });
    refused(&request(&server.url("/m-00001-of-00002.gguf"), d.path()), &["m-00002-of-00002.gguf", "404"]);
    refused(&request(&server.url("/lone.gguf"), d.path()), &["says that it is shard 1 of 2", "it is 1 of 1"]);
    refused(&request(&server.url("/s-00001-of-00002.gguf"), d.path()), &["says that it is shard 2 of 2"]);
}

#[test]
fn a_model_that_has_no_room_is_refused_before_it_is_written() {
    let d = tempfile::tempdir().unwrap();
    let server = Server::new(|_| {
        let range = ("Content-Range", format!("bytes 0-0/{}", 1u64 << 60));
        reply(206, &[range, ("Content-Length", "1".into())], b"G")
    });
    let r = request(&server.url("/m.gguf"), &d.path().join("not/yet"));
    refused(&r, &["free", "--dir"]);
    assert!(matches!(fetch(&r), Err(PullError::Room(_))));
    assert!(!d.path().join("not").exists());
}

#[test]
fn two_runs_do_not_write_one_file() {
    let d = tempfile::tempdir().unwrap();
    let to = d.path().join("m.gguf");
    let identity = Identity { from: "x".into(), total: 10, sha256: None, tag: Some("\"a\"".into()) };
    let mut part = Part::open(&to, &identity, &mut |_| {}, &|| false).unwrap().unwrap();
    part.write(b"GGUF").unwrap();
    part.record().unwrap();
    let second = Part::open(&to, &identity, &mut |_| {}, &|| false).err().unwrap().to_string();
    assert!(second.contains("another process fetches this file"), "{second}");
    drop(part);
    let part = Part::open(&to, &identity, &mut |_| {}, &|| false).unwrap().unwrap();
    assert_eq!((part.len(), part.sha256()), (4, sum(b"GGUF")));
    drop(part);
    // Bytes that no record knows, and a record that somebody else wrote.
    fs::write(d.path().join("m.gguf.part"), b"GGUFxxxx").unwrap();
    assert_eq!(part::kept(&to, &identity), 4);
    for record in ["", "{}", "[", "{\"version\":2}"] {
        fs::write(d.path().join("m.gguf.part.json"), record).unwrap();
        assert_eq!(part::kept(&to, &identity), 0, "{record}");
    }
    fs::remove_file(d.path().join("m.gguf.part")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", d.path().join("m.gguf.part")).unwrap();
    assert!(Part::open(&to, &identity, &mut |_| {}, &|| false).is_err());
}
