//! Memory, loading, limits of the machine, error paths of a run.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{File, V, bin, fails, nt, sized, tiny, tiny_moe};

fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// The option that a refusal recommends, such as `["--ctx", "65536"]`.
fn advised(err: &str) -> [String; 2] {
    let tail = err.rsplit("; ").next().unwrap_or("");
    let words: Vec<&str> = tail.split_whitespace().take(2).collect();
    assert!(words.len() == 2 && words[0].starts_with("--"), "no advice in {err:?}");
    [words[0].to_owned(), words[1].to_owned()]
}

/// Runs `args`, which must be refused with exit code 4; returns the advice.
fn refused(args: &[&str]) -> [String; 2] {
    let out = nt(args);
    assert_eq!(out.status.code(), Some(4), "{args:?}\n{}", stderr(&out));
    advised(&stderr(&out))
}

/// `args` with each of `more` in place of an option of that name.
fn with<'a>(args: &[&'a str], more: &'a [String; 2]) -> Vec<&'a str> {
    let mut out = args.to_vec();
    match out.iter().position(|a| *a == more[0]) {
        Some(i) => out[i + 1] = &more[1],
        None => out.extend(more.iter().map(String::as_str)),
    }
    out
}

/// Guards against a KV cache of processors that no budget counts: a long context is refused before anything is
/// loaded, `nt plan` says the same, and what the refusal recommends works.
#[test]
fn a_kv_cache_that_does_not_fit_is_refused_with_a_number_that_works() {
    let d = tempfile::tempdir().unwrap();
    // 768 bytes a position, so 96 MiB; and far more than any machine has.
    for (name, file) in [("dense.gguf", tiny(6)), ("experts.gguf", tiny_moe(6))] {
        let m = file.write(d.path(), name);
        for limits in [&["--ram", "50MiB", "--ctx", "131072"][..], &["--ctx", "1073741824"]] {
            let run = [&["run", arg(&m), "-p", "x", "-n", "1", "--backend", "cpu"], limits].concat();
            let plan = [&["plan", arg(&m), "--backend", "cpu"], limits].concat();
            let (by_run, by_plan) = (refused(&run), refused(&plan));
            assert_eq!(by_run[0], "--ctx", "{limits:?}");
            // What is free differs from one call to the next only where the machine is the limit.
            assert!(by_run == by_plan || limits.len() == 2, "{limits:?}: {by_run:?} {by_plan:?}");
            for args in [with(&run, &by_run), with(&plan, &by_run)] {
                let out = nt(&args);
                assert!(out.status.success(), "{args:?}\n{}", stderr(&out));
            }
        }
    }
}

/// The workspace counts too, not the KV cache alone: a budget that holds the weights and no more is refused, and
/// the least `--ram` that is recommended is one that works.
#[test]
fn a_budget_without_room_for_the_workspace_is_refused_with_one_that_works() {
    let d = tempfile::tempdir().unwrap();
    let m = tiny(6).write(d.path(), "m.gguf");
    let run = ["run", arg(&m), "-p", "x", "-n", "1", "--backend", "cpu", "--ctx", "128", "--ram", "540KiB"];
    let advice = refused(&run);
    assert_eq!(advice[0], "--ram");
    assert!(nt(&with(&run, &advice)).status.success(), "{advice:?}");
}

/// A smaller context was advised than the prompt has tokens, where smaller passes would do.
#[test]
fn no_context_is_advised_that_the_prompt_does_not_fit() {
    let d = tempfile::tempdir().unwrap();
    let m = tiny(6).write(d.path(), "m.gguf");
    let prompt = "x".repeat(1500);
    let run = ["run", arg(&m), "-p", &prompt, "-n", "1", "--backend", "cpu", "--threads", "1"];
    let run = [&run[..], &["--ctx", "2048", "--batch", "2048", "--ram", "5MiB"]].concat();
    let advice = refused(&run);
    assert_eq!(advice[0], "--batch", "{advice:?}");
    assert!(nt(&with(&run, &advice)).status.success(), "{advice:?}");
}

/// Guards against `nt plan` that promises what `nt run` refuses, without a stack of tiers in between.
#[test]
fn no_storage_and_tiers_count_the_workspace_too() {
    let d = tempfile::tempdir().unwrap();
    let m = tiny(6).write(d.path(), "m.gguf");
    for limits in [&["--tier-c", "none", "--ram", "3MiB"][..], &["--tiers", "0:6:0", "--ram", "3MiB"]] {
        for command in [&["run", arg(&m), "-p", "x", "-n", "1"][..], &["plan", arg(&m)]] {
            let args = [command, &["--backend", "cpu", "--ctx", "8192"], limits].concat();
            fails(&args, 4, &["KV cache"]);
        }
    }
}

/// Guards against `--layout stacked` that processors accept and ignore.
#[test]
fn stacked_tiers_are_stacked_on_processors() {
    let d = tempfile::tempdir().unwrap();
    let m = tiny(6).write(d.path(), "m.gguf");
    let args = ["plan", arg(&m), "--backend", "cpu", "--tiers", "0:2:4", "--layout", "stacked", "--json"];
    let v: serde_json::Value = serde_json::from_slice(&nt(&args).stdout).unwrap();
    assert_eq!(v["plan"]["blocks"], "BBCCCC");
}

/// A model of about 1 GiB of zeros, most of which take no room on the disk.
fn large(dir: &Path) -> (PathBuf, u64) {
    let (d, f) = (2048, 8192);
    let mut file: File = tiny(5);
    file.set("llama.embedding_length", V::U32(d as u32));
    file.set("llama.feed_forward_length", V::U32(f as u32));
    let mut at = 0u64;
    for (i, t) in file.tensors.iter_mut().enumerate() {
        for n in &mut t.shape {
            *n = match *n {
                64 => d,
                32 => d / 2,
                96 => f,
                n => n,
            };
        }
        t.data.clear();
        file.offsets.push((i, at));
        at += t.shape.iter().product::<u64>() * 4;
    }
    let path = file.write(dir, "large.gguf");
    let header = std::fs::metadata(&path).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(header + at).unwrap();
    (path, at)
}

/// Bytes of memory that a process has touched.
fn resident(child: &Child) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", child.id())).unwrap_or_default();
    statm.split(' ').nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) * 4096
}

/// Starts a run and stops it (SIGSTOP) in the middle of loading; `None` if it was not caught there.
fn caught_while_loading(model: &Path, bytes: u64) -> Option<Child> {
    let mut child = Command::new(bin())
        .args(["run", arg(model), "-p", "x", "-n", "1", "--ctx", "64", "--backend", "cpu", "--ram", "2GiB"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = Pid::from_raw(child.id() as i32);
    while resident(&child) < bytes / 10 {
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    kill(pid, Signal::SIGSTOP).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    if resident(&child) < bytes / 4 * 3 {
        return Some(child);
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

/// Guards against loading that is deaf: Ctrl-C and SIGTERM end it, with nothing computed and nothing more loaded.
#[test]
fn signals_end_the_loading_of_weights() {
    let d = tempfile::tempdir().unwrap();
    let (model, bytes) = large(d.path());
    let available = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kib = available
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    if kib.is_none_or(|kib| kib << 10 < 4 << 30) {
        return;
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // A machine so busy that the whole model is loaded before it is looked at has another try.
        let child = (0..10).find_map(|_| caught_while_loading(&model, bytes)).expect("never caught while loading");
        let pid = Pid::from_raw(child.id() as i32);
        kill(pid, signal).unwrap();
        kill(pid, Signal::SIGCONT).unwrap();
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(130), "{signal}: {}", stderr(&out));
        assert!(!stderr(&out).contains("units in RAM"), "{signal}: the run went on: {}", stderr(&out));
    }
}

/// Runs `nt` with a limit of the shell's `ulimit`.
fn limited(limit: &str, args: &[&str]) -> Output {
    let script = format!("ulimit {limit} && exec \"$0\" \"$@\"");
    let nt = bin();
    Command::new("sh").arg("-c").arg(script).arg(&nt).args(args).output().unwrap()
}

/// Guards against plans that count on memory which a limit refuses: within limits of address space and of data a
/// run streams what does not fit, with the same text, or is refused with 4; it never panics, aborts or hangs.
#[test]
fn limits_of_the_process_are_kept_to_or_refused_in_a_sentence() {
    let d = tempfile::tempdir().unwrap();
    let (model, _) = large(d.path());
    let began = Instant::now();
    let args = ["run", arg(&model), "-p", "x", "-n", "1", "--ctx", "64", "--backend", "cpu", "--threads", "2"];
    let mut streamed = 0;
    for limit in ["-v 300000", "-v 700000", "-v 1100000", "-d 200000", "-d 500000", "-d 900000"] {
        let out = limited(limit, &args);
        let err = stderr(&out);
        let code = out.status.code();
        assert!(matches!(code, Some(0 | 4)), "{limit}: {code:?} {err}");
        assert!(!err.contains("panicked") && !err.contains("allocation of"), "{limit}: {err}");
        streamed += usize::from(code == Some(0));
    }
    assert!(streamed >= 2, "the larger limits have room for two blocks ({:?})", began.elapsed());
}

/// A budget that is asked for and that a limit of the process does not allow is refused, with one that works.
#[test]
fn a_budget_beyond_the_address_space_is_refused_with_one_that_works() {
    let d = tempfile::tempdir().unwrap();
    let (model, _) = large(d.path());
    let args = ["run", arg(&model), "-p", "x", "-n", "1", "--ctx", "64", "--backend", "cpu", "--ram", "2GiB"];
    let out = limited("-v 1100000", &args);
    assert_eq!(out.status.code(), Some(4), "{}", stderr(&out));
    assert!(stderr(&out).contains("ulimit -v"), "{}", stderr(&out));
    let advice = advised(&stderr(&out));
    let out = limited("-v 1100000", &with(&args, &advice));
    assert!(out.status.success(), "{advice:?}: {}", stderr(&out));
}

/// Memory that ran out was SIGABRT and a backtrace, whatever the command. Below some limit the system's loader gives up
/// before any code of nt runs.
#[test]
fn no_command_aborts_for_want_of_address_space() {
    let d = tempfile::tempdir().unwrap();
    let m = tiny(2).write(d.path(), "m.gguf");
    let messages = d.path().join("messages.json");
    std::fs::write(&messages, r#"[{"role":"user","content":"x"}]"#).unwrap();
    let commands: [&[&str]; 3] = [
        &["run", arg(&m), "-p", "x", "-n", "1", "--chat", "--backend", "cpu", "--threads", "2"],
        &["template", arg(&m), "--messages", arg(&messages)],
        &["--help"],
    ];
    let mut ran_out = 0;
    for args in commands {
        for kib in (20_000..80_000).step_by(400).rev() {
            let out = limited(&format!("-v {kib}"), args);
            let err = stderr(&out);
            if out.status.code() == Some(127) && err.contains("loading shared libraries") {
                break;
            }
            // Nor can nt answer for glibc, which ends the process where a destructor of a thread finds no room, or for what
            // Rust's library does in a thread before its first line: it panics where a stack for signals has no room, and
            // nothing is there yet to catch that.
            let others = ["Fatal glibc error: ", "failed to allocate an alternative stack", "failed to initiate panic"];
            if others.iter().any(|o| err.contains(o)) {
                continue;
            }
            assert!(matches!(out.status.code(), Some(0 | 4)), "{args:?}, {kib} KiB: {:?}: {err}", out.status);
            ran_out += usize::from(err.contains("nt: memory ran out: "));
        }
    }
    assert!(ran_out > 0, "no allocation failed");
}

/// Threads that cannot be had are a sentence and exit code 4.
#[test]
fn threads_that_cannot_be_had_are_refused() {
    let d = tempfile::tempdir().unwrap();
    let m = tiny(2).write(d.path(), "m.gguf");
    let args = ["run", arg(&m), "-p", "x", "-n", "1", "--backend", "cpu", "--threads", "1024"];
    let out = limited("-v 400000", &args);
    assert_eq!(out.status.code(), Some(4), "{}", stderr(&out));
    assert!(stderr(&out).contains("threads"), "{}", stderr(&out));
}

/// A cgroup of memory, of whichever version this machine has; removed when it is dropped.
struct Cgroup {
    folder: PathBuf,
    limit: &'static str,
}

impl Cgroup {
    /// `None` where none can be made: as a plain user, or where the mount cannot be written.
    fn new(name: &str) -> Option<Cgroup> {
        let name = format!("nt-test-{name}-{}", std::process::id());
        [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]
            .into_iter()
            .find_map(|(base, limit)| Cgroup::at(Path::new(base).join(&name), limit))
    }

    fn at(folder: PathBuf, limit: &'static str) -> Option<Cgroup> {
        std::fs::create_dir(&folder).ok()?;
        let made = Cgroup { folder, limit };
        made.folder.join(limit).exists().then_some(made)
    }

    fn below(&self) -> Option<Cgroup> {
        Cgroup::at(self.folder.join("below"), self.limit)
    }

    fn limit(&self, bytes: u64) {
        std::fs::write(self.folder.join(self.limit), bytes.to_string()).unwrap();
    }

    fn nt(&self, args: &[&str]) -> Output {
        let script = "echo $$ > \"$1/cgroup.procs\" && shift && exec \"$0\" \"$@\"";
        Command::new("sh").arg("-c").arg(script).arg(bin()).arg(&self.folder).args(args).output().unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The kernel lets go of an ended process a moment later.
        for _ in 0..50 {
            if std::fs::remove_dir(&self.folder).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Bytes that the cgroups of these tests allow, and the arguments of a run of a model that is larger.
const CGROUP_BYTES: u64 = 64 << 20;

fn larger_than_a_cgroup(dir: &Path) -> PathBuf {
    sized(6, 512, 2048).write(dir, "m.gguf")
}

/// What a run streams, and its text.
fn streamed(out: &Output) -> (u64, String) {
    assert!(out.status.success(), "{:?} {}", out.status, stderr(out));
    let v: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    (v["plan"]["c"]["bytes"].as_u64().unwrap(), v["text"].to_string())
}

/// The limit of a cgroup of version 1 was not seen: the kernel killed the run without a word. As root, and where
/// cgroups can be made.
#[test]
fn cgroup_v1() {
    let d = tempfile::tempdir().unwrap();
    let m = larger_than_a_cgroup(d.path());
    let args = ["run", arg(&m), "-p", "x", "-n", "3", "--ctx", "64", "--temp", "0", "--backend", "cpu", "--json"];
    let Some(cgroup) = Cgroup::new("own") else { return };
    cgroup.limit(CGROUP_BYTES);
    // First, so that pages of the program itself are not the cgroup's.
    let (all, expected) = streamed(&nt(&args));
    let (limited, text) = streamed(&cgroup.nt(&args));
    assert!(limited > CGROUP_BYTES / 4 && all == 0 && text == expected, "{limited} {all} {text} {expected}");
}

/// The same for the limit of a folder above.
#[test]
fn the_limit_of_a_cgroup_above() {
    let d = tempfile::tempdir().unwrap();
    let m = larger_than_a_cgroup(d.path());
    let args = ["run", arg(&m), "-p", "x", "-n", "3", "--ctx", "64", "--temp", "0", "--backend", "cpu", "--json"];
    let Some(above) = Cgroup::new("above") else { return };
    let Some(below) = above.below() else { return };
    above.limit(CGROUP_BYTES);
    // As above.
    nt(&args);
    assert!(streamed(&below.nt(&args)).0 > CGROUP_BYTES / 4);
}

/// Where nothing may be streamed, the limit is a refusal, and `nt plan` says the same.
#[test]
fn a_cgroup_that_holds_too_little_is_a_refusal() {
    let d = tempfile::tempdir().unwrap();
    let m = larger_than_a_cgroup(d.path());
    let Some(cgroup) = Cgroup::new("none") else { return };
    cgroup.limit(CGROUP_BYTES);
    for command in [&["run", arg(&m), "-p", "x", "-n", "1"][..], &["plan", arg(&m)]] {
        let out = cgroup.nt(&[command, &["--ctx", "64", "--backend", "cpu", "--tier-c", "none"]].concat());
        assert_eq!(out.status.code(), Some(4), "{command:?}: {:?} {}", out.status, stderr(&out));
    }
}

/// A benchmark's probe of memory took 512 MiB whatever a cgroup left, and the kernel killed it when its work was done; so
/// did a probe of storage with much in flight.
#[test]
fn probes_keep_to_the_limit_of_a_cgroup() {
    let d = tempfile::tempdir().unwrap();
    let m = larger_than_a_cgroup(d.path());
    let Some(cgroup) = Cgroup::new("probe") else { return };
    cgroup.limit(CGROUP_BYTES);
    let out = cgroup.nt(&["bench", arg(&m), "-p", "4", "-n", "2", "-r", "1", "--backend", "cpu"]);
    assert!(out.status.success(), "{:?} {}", out.status, stderr(&out));
    let sizes = ["--block-size", "1MiB,16MiB", "--depth", "1,32", "--seconds", "0"];
    let out = cgroup.nt(&[&["probe", "storage", arg(&m)][..], &sizes].concat());
    assert!(out.status.success(), "{:?} {}", out.status, stderr(&out));
    assert!(stderr(&out).contains("are left out"), "{}", stderr(&out));
    // What is left fits a cache, whose rate is not kept as that of RAM.
    let out = cgroup.nt(&["probe", "memory"]);
    assert!(
        out.status.code() == Some(4) && stderr(&out).contains("no cache holds"),
        "{:?} {}",
        out.status,
        stderr(&out)
    );
    let out = cgroup.nt(&["probe", "storage", arg(&m), "--block-size", "16MiB", "--depth", "32", "--seconds", "0"]);
    assert_eq!(out.status.code(), Some(4), "{:?} {}", out.status, stderr(&out));
}

/// The same took more address space than there was, and ended in an abort.
#[test]
fn a_benchmark_keeps_to_a_limit_of_address_space() {
    let d = tempfile::tempdir().unwrap();
    let m = tiny(2).write(d.path(), "m.gguf");
    let out = limited("-v 300000", &["bench", arg(&m), "-p", "4", "-n", "2", "-r", "1", "--backend", "cpu"]);
    assert!(out.status.success(), "{:?} {}", out.status, stderr(&out));
}

/// A conversation on the terminal, whose stderr tells when what was typed is done.
struct Conversation {
    child: Child,
    said: std::io::BufReader<std::process::ChildStderr>,
    /// What stderr had so far.
    heard: String,
}

impl Conversation {
    fn begin(model: &Path, more: &[&str]) -> Conversation {
        let mut command = Command::new(bin());
        command.args(["chat", arg(model), "--backend", "cpu", "--temp", "0", "-n", "4", "--threads", "1"]).args(more);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let said = std::io::BufReader::new(child.stderr.take().unwrap());
        let mut chat = Conversation { child, said, heard: String::new() };
        chat.say("/help");
        chat
    }

    /// Types a line, and waits until it is done.
    fn say(&mut self, line: &str) {
        let stdin = self.child.stdin.as_mut().unwrap();
        let more = if line == "/help" { "" } else { "/help\n" };
        std::io::Write::write_all(stdin, format!("{line}\n{more}").as_bytes()).unwrap();
        loop {
            let before = self.heard.len();
            let n = std::io::BufRead::read_line(&mut self.said, &mut self.heard).unwrap();
            assert!(n > 0, "the conversation ended: {}", self.heard);
            // The last line of the help.
            if self.heard[before..].contains("Ctrl-C in an answer") {
                return;
            }
        }
    }

    /// Its exit code, and stdout.
    fn end(mut self) -> (Option<i32>, String) {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut self.said, &mut rest).unwrap();
        let out = self.child.wait_with_output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned())
    }
}

/// A read of the drive that failed ended the whole conversation. It ends the answer, and the conversation goes on as if what was
/// asked had not been.
#[test]
fn a_conversation_outlives_a_failed_read() {
    let d = tempfile::tempdir().unwrap();
    let path = tiny(6).write(d.path(), "m.gguf");
    let whole = std::fs::read(&path).unwrap();
    let streamed = ["--tiers", "0:2:4"];
    let mut undisturbed = Conversation::begin(&path, &streamed);
    ["hello", "and then?"].iter().for_each(|line| undisturbed.say(line));
    let want = undisturbed.end();
    assert_eq!(want.0, Some(0));

    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let written = file.metadata().unwrap().modified().unwrap();
    let mut chat = Conversation::begin(&path, &streamed);
    chat.say("hello");
    file.set_len(whole.len() as u64 / 3).unwrap();
    chat.say("what is lost");
    let errors = chat.heard.lines().filter(|l| l.starts_with("nt: ")).count();
    assert!(errors == 1 && chat.heard.contains("m.gguf"), "{}", chat.heard);
    // As a drive that is there again: nobody has written to it.
    std::os::unix::fs::FileExt::write_all_at(&file, &whole, 0).unwrap();
    file.set_modified(written).unwrap();
    chat.say("and then?");
    let heard = chat.heard.clone();
    assert_eq!(chat.end(), want, "{heard}");

    // Where nothing was answered, the exit code is that of the failure.
    let mut chat = Conversation::begin(&path, &streamed);
    file.set_len(whole.len() as u64 / 3).unwrap();
    chat.say("hello");
    assert_eq!(chat.end(), (Some(1), String::new()));
}
