//! The model library: names instead of paths, and lists that end on no file.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value as Json, json};

use crate::common::{File, V, bin, tiny};

/// A home folder with a library and a store of Ollama's.
struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Home {
        let home = Home { dir: tempfile::tempdir().unwrap() };
        for folder in [home.models(), home.store().join("blobs"), home.manifests(), home.path("cwd")] {
            fs::create_dir_all(folder).unwrap();
        }
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn models(&self) -> PathBuf {
        self.path(".cache/nt/models")
    }

    fn store(&self) -> PathBuf {
        self.path(".ollama/models")
    }

    fn manifests(&self) -> PathBuf {
        self.store().join("manifests/registry.ollama.ai/library")
    }

    /// Puts a model into the store, as `ollama pull` would.
    fn pull(&self, model: &str, tag: &str, digit: char, bytes: &[u8]) {
        let hex = digit.to_string().repeat(64);
        fs::write(self.store().join("blobs").join(format!("sha256-{hex}")), bytes).unwrap();
        let layer = |kind: &str, digest: String, size: usize| json!({ "mediaType": format!("application/vnd.ollama.image.{kind}"), "digest": digest, "size": size });
        let layers = [
            layer("model", format!("sha256:{hex}"), bytes.len()),
            layer("template", format!("sha256:{}", "9".repeat(64)), 7),
        ];
        fs::create_dir_all(self.manifests().join(model)).unwrap();
        fs::write(self.manifests().join(model).join(tag), json!({ "layers": layers }).to_string()).unwrap();
    }

    /// `nt` in an empty folder of this home, which knows no other library.
    fn nt(&self, args: &[&str]) -> Output {
        let mut command = Command::new(bin());
        for name in ["XDG_CACHE_HOME", "XDG_DATA_HOME", "NT_MODELS", "OLLAMA_MODELS"] {
            command.env_remove(name);
        }
        command.args(args).env("HOME", self.dir.path()).current_dir(self.path("cwd")).output().unwrap()
    }

    fn run(&self, name: &str) -> Output {
        self.nt(&["run", name, "-p", "a", "-n", "2", "--temp", "0", "--backend", "cpu", "--json"])
    }

    fn list(&self) -> Vec<Json> {
        let out = self.nt(&["list", "--json"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let all: Json = serde_json::from_slice(&out.stdout).unwrap();
        // A machine may have records of drives of its own.
        let here = self.dir.path().to_str().unwrap().to_owned();
        let models = all["models"].as_array().unwrap().iter();
        models.filter(|m| m["path"].as_str().unwrap().starts_with(&here)).cloned().collect()
    }
}

fn refused(out: &Output, words: &[&str]) {
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{err}");
    for w in words {
        assert!(err.contains(w), "{w:?} is not in {err:?}");
    }
}

fn sharded(dir: &Path, name: &str) {
    let whole = tiny(2);
    let half = whole.tensors.len() / 2;
    for (no, tensors) in [&whole.tensors[..half], &whole.tensors[half..]].into_iter().enumerate() {
        let mut part = File { tensors: tensors.to_vec(), ..whole.clone() };
        part.set("split.no", V::U32(no as u32));
        part.set("split.count", V::U32(2));
        part.write(dir, &format!("{name}-{:05}-of-00002.gguf", no + 1));
    }
}

/// A model with one matrix of a type that nothing multiplies.
fn tq2() -> File {
    let mut file = tiny(1);
    let down = file.tensor("blk.0.ffn_down.weight");
    (down.ty, down.shape, down.data) = (35, vec![256, 64], vec![0; 66 * 64]);
    file.set("llama.feed_forward_length", V::U32(256));
    for name in ["gate", "up"] {
        let t = file.tensor(&format!("blk.0.ffn_{name}.weight"));
        (t.shape, t.data) = (vec![64, 256], vec![0; 64 * 256 * 4]);
    }
    file
}

/// Users of Ollama have their models already, and were asked for a path below `blobs`.
#[test]
fn a_name_of_ollamas_opens_its_blob() {
    let home = Home::new();
    home.pull("qwen2.5", "14b-instruct-q4_K_M", 'a', &tiny(2).bytes());
    home.pull("small", "latest", 'b', &tiny(1).bytes());
    for name in ["qwen2.5:14b-instruct-q4_K_M", "library/qwen2.5:14b-instruct-q4_K_M", "small", "small:latest"] {
        let out = home.run(name);
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
    }
    refused(&home.run("qwen2.5"), &["qwen2.5", "nt list"]);
}

/// Every command takes a name, not `nt run` alone.
#[test]
fn each_command_takes_a_name() {
    let home = Home::new();
    tiny(2).write(&home.models(), "some-model.gguf");
    for args in [
        &["inspect", "some-model"][..],
        &["plan", "some-model.gguf"],
        &["tokenize", "some-model", "a b"],
        &["bench", "-m", "some-model", "-p", "2", "-n", "2", "-r", "1", "--backend", "cpu", "--json"],
    ] {
        let out = home.nt(args);
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
}

/// What lies in the current folder was meant, whatever a library holds.
#[test]
fn a_file_in_the_current_folder_wins() {
    let home = Home::new();
    tiny(2).write(&home.models(), "m.gguf");
    tiny(3).write(&home.path("cwd"), "m.gguf");
    let out = home.nt(&["inspect", "m.gguf", "--json"]);
    let all: Json = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(all["hparams"]["n_layers"], 3, "{all}");
    fs::remove_file(home.path("cwd/m.gguf")).unwrap();
    let all: Json = serde_json::from_slice(&home.nt(&["inspect", "m.gguf", "--json"]).stdout).unwrap();
    assert_eq!(all["hparams"]["n_layers"], 2, "{all}");
}

/// A name that two files have must not run one of them by chance.
#[test]
fn a_name_of_two_files_is_refused_with_both() {
    let home = Home::new();
    tiny(2).write(&home.models(), "m.gguf");
    fs::create_dir_all(home.models().join("sub")).unwrap();
    tiny(1).write(&home.models().join("sub"), "m.gguf");
    refused(&home.run("m"), &["m could be any of these", "models/m.gguf", "models/sub/m.gguf"]);
    assert!(home.run("sub/m").status.success());
}

/// Names are no way out of the library, and nothing in it makes a command wait.
#[test]
fn names_and_stores_with_tricks_are_refused() {
    let home = Home::new();
    tiny(1).write(&home.path(""), "outside.gguf");
    for name in ["../outside", "../../outside.gguf", "sub/../../outside", "small:../../../../../outside.gguf"] {
        refused(&home.run(name), &["No such file"]);
    }
    home.pull("m", "link", 'a', b"GGUF");
    let blob = home.store().join("blobs").join(format!("sha256-{}", "a".repeat(64)));
    fs::remove_file(&blob).unwrap();
    symlink(home.path("outside.gguf"), &blob).unwrap();
    refused(&home.run("m:link"), &["m:link", "out of the store"]);
    let fifo = home.manifests().join("m/fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    refused(&home.run("m:fifo"), &["m:fifo", "no regular file"]);
    fs::write(home.manifests().join("m/huge"), vec![b' '; 2 << 20]).unwrap();
    refused(&home.run("m:huge"), &["m:huge", "2097152 bytes"]);
    fs::write(home.manifests().join("m/garbage"), b"\x00\xff{").unwrap();
    refused(&home.run("m:garbage"), &["m:garbage", "no manifest"]);
}

/// A library with every kind of broken file is listed to its end, each with its reason.
#[test]
fn a_list_ends_on_no_file() {
    let home = Home::new();
    tiny(2).write(&home.models(), "good.gguf");
    sharded(&home.models(), "parts");
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n";
    fs::write(home.models().join("lfs.gguf"), pointer).unwrap();
    tq2().write(&home.models(), "tq2.gguf");
    fs::write(home.models().join("empty.gguf"), b"").unwrap();
    fs::write(home.models().join("\x1b[31mred.gguf"), b"GGUF").unwrap();
    fs::write(home.models().join("last-00002-of-00002.gguf"), b"GGUF").unwrap();
    nix::unistd::mkfifo(&home.models().join("fifo.gguf"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("/nonexistent", home.models().join("gone.gguf")).unwrap();
    home.pull("good", "latest", 'a', &tiny(1).bytes());
    home.pull("cut", "latest", 'b', &tiny(1).bytes()[..100]);
    fs::write(home.manifests().join("cut/x"), b"{").unwrap();
    let models = home.list();
    let by_name = |name: &str| {
        let mut found = models.iter().filter(|m| m["name"] == name);
        let one = found.next().unwrap_or_else(|| panic!("{name} is not among {models:?}"));
        assert!(found.next().is_none(), "{name} is listed twice");
        one
    };
    for name in ["good", "parts", "good:latest"] {
        let m = by_name(name);
        assert_eq!(m["runs"], true, "{m}");
        assert_eq!(m["architecture"], "llama");
        assert_eq!(m["types"][0]["type"], "F32");
        assert!(m["predicted_tokens_per_s"].as_f64().unwrap() > 0.0 && m["plan"]["b"]["units"].is_u64(), "{m}");
    }
    assert_eq!(by_name("parts")["shards"], 2);
    for (name, words) in [
        ("lfs", "Git LFS pointer"),
        ("tq2", "TQ2_0"),
        ("empty", "empty"),
        ("\\u{1b}[31mred", "red.gguf"),
        ("last", "shard 1 of 2 is missing"),
        ("fifo", "no regular file"),
        ("gone", "No such file"),
        ("cut:latest", "sha256"),
        ("cut:x", "no manifest"),
    ] {
        let m = by_name(name);
        assert!(m["runs"] == false && m["reason"].as_str().unwrap().contains(words), "{words}: {m}");
    }
    assert_eq!(models.len(), 12, "{models:?}");
    let out = home.nt(&["list"]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success() && text.contains("cannot run") && !text.contains('\x1b'), "{text}");
}

/// Folders of `NT_MODELS` and those that are named are read the same way; one that is not there is said.
#[test]
fn folders_that_are_named_are_listed() {
    let home = Home::new();
    fs::create_dir_all(home.path("a")).unwrap();
    tiny(1).write(&home.path("a"), "in-a.gguf");
    let a = home.path("a").display().to_string();
    let out = home.nt(&["list", &a]);
    assert!(String::from_utf8_lossy(&out.stdout).contains("in-a"), "{out:?}");
    refused(&home.nt(&["list", "/nonexistent"]), &["/nonexistent", "no such folder"]);
    let listed = Command::new(bin())
        .arg("list")
        .env("NT_MODELS", format!("{a}:/nonexistent"))
        .env("HOME", home.dir.path())
        .env_remove("XDG_CACHE_HOME")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(text.contains("in-a") && text.contains("not looked at: /nonexistent"), "{text}");
}

/// A benchmark of nothing ended with 0 and a report.
#[test]
fn a_benchmark_of_nothing() {
    let model = crate::common::case("chat-plain.gguf");
    crate::common::fails(&["bench", model.to_str().unwrap(), "-p", "0", "-n", "0"], 2, &["nothing to measure"]);
}

/// A sentence on a stderr that nobody reads any more ended in a panic, in the middle of what was being undone.
#[test]
fn a_closed_stderr_is_no_panic() {
    let script = r#"{ sleep 0.3; "$0" device check nvme99n1 2>&1; echo "code $?" >&3; } | true"#;
    let d = tempfile::tempdir().unwrap();
    let codes = d.path().join("codes");
    let status = std::process::Command::new("sh")
        .args(["-c", &format!("exec 3>{}; {script}", codes.display())])
        .arg(crate::common::bin())
        .status()
        .unwrap();
    assert!(status.success());
    let code = std::fs::read_to_string(&codes).unwrap();
    assert!(!code.contains("code 101"), "{code}");
}

/// A server of one file that may say nothing more after some bytes.
fn file_server(file: Vec<u8>, stalls_at: usize) -> String {
    use std::io::{BufRead, BufReader, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut bodies = 0;
        for stream in listener.incoming().flatten() {
            let lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
            let range = lines.take_while(|l| !l.is_empty()).find_map(|l| {
                let range = l.to_lowercase().strip_prefix("range: bytes=")?.to_owned();
                let (from, to) = range.split_once('-')?;
                Some((from.parse::<usize>().ok()?, to.parse::<usize>().ok()))
            });
            let (from, to) = range.map_or((0, file.len() - 1), |(from, to)| (from, to.unwrap_or(file.len() - 1)));
            let head = format!(
                "HTTP/1.1 206 X\r\nConnection: close\r\nETag: \"a\"\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{to}/{}\r\n\r\n",
                to - from + 1,
                file.len()
            );
            // Whoever asks for all of it without a range gets it so.
            let head = if range.is_some() { head } else { head.replace("206", "200") };
            let mut body = &file[from..=to];
            bodies += usize::from(to > from);
            let stalls = to > from && bodies == 1;
            if stalls {
                body = &body[..stalls_at.min(body.len())];
            }
            let mut stream = stream;
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
            if stalls {
                std::thread::spawn(move || {
                    std::thread::sleep(std::time::Duration::from_secs(60));
                    drop(stream);
                });
            }
        }
    });
    format!("http://{at}")
}

/// Users had to download models by hand, and began again after Ctrl-C.
#[test]
fn a_pulled_model_is_stopped_resumed_listed_and_run() {
    let home = Home::new();
    let bytes = tiny(2).bytes();
    let base = file_server(bytes.clone(), 10_000);
    let url = format!("{base}/dir/pulled.gguf?key=1");
    let mut first = Command::new(bin())
        .args(["pull", &url])
        .env("HOME", home.dir.path())
        .env_remove("XDG_CACHE_HOME")
        .env_remove("NT_MODELS")
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let part = home.models().join("pulled.gguf.part");
    let began = std::time::Instant::now();
    while fs::metadata(&part).map_or(0, |m| m.len()) < 10_000 {
        assert!(began.elapsed().as_secs() < 60, "nothing comes");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(first.id() as i32), nix::sys::signal::Signal::SIGINT).unwrap();
    let mut err = String::new();
    std::io::Read::read_to_string(&mut first.stderr.take().unwrap(), &mut err).unwrap();
    assert_eq!(first.wait().unwrap().code(), Some(130), "{err}");
    assert!(err.contains("the same command goes on from there"), "{err}");
    assert!(home.list().is_empty());
    let out = home.nt(&["pull", &url, "--json"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let said: Json = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(said["name"], "pulled");
    assert_eq!(said["fetched_bytes"], bytes.len() - 10_000);
    assert_eq!(said["files"][0]["path"], home.models().join("pulled.gguf").display().to_string());
    assert_eq!(home.list()[0]["name"], "pulled");
    assert!(home.run("pulled").status.success());
    let again = home.nt(&["pull", &url]);
    assert!(again.status.success() && String::from_utf8_lossy(&again.stdout).starts_with("pulled  "));
    refused(&home.nt(&["pull", "pulled"]), &["https://", "hf:OWNER/NAME:FILE.gguf"]);
}
