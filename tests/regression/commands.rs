//! The command line: options that are taken or refused in a sentence, results that no side file takes away, signals.

use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value as Json;

use crate::common::{bin, case, fails, nt, tiny, tiny_moe};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A short run of `nt`, with more arguments.
fn run<'a>(model: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["run", arg(model), "-p", "hello", "-n", "2", "--temp", "0", "--backend", "cpu"];
    all.extend(more);
    all
}

fn chat(model: &Path, input: &[u8]) -> Output {
    let mut command = Command::new(bin());
    command.args(["chat", arg(model), "--backend", "cpu", "--temp", "0", "-n", "4"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

/// Guards against a run of hours whose page or timeline has nowhere to go, which was found at its end: it is refused at
/// its start, with nothing computed.
#[test]
fn a_file_that_cannot_be_written_is_refused_before_the_work() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    let (m, folder) = (arg(&model), arg(d.path()));
    let nowhere = d.path().join("none/x");
    let nowhere = arg(&nowhere);
    for option in ["--html", "--timeline"] {
        fails(&run(&model, &[option, nowhere]), 2, &[option, nowhere, "there is no folder"]);
        fails(&run(&model, &[option, folder]), 2, &[option, "it is a folder"]);
        assert!(nt(&run(&model, &[option, nowhere])).stdout.is_empty());
        fails(&["plan", m, option, nowhere], 2, &[option, "there is no folder"]);
        fails(&["bench", m, "-p", "1", "-n", "0", "-r", "1", option, nowhere], 2, &[option, "there is no folder"]);
    }
    fails(&["logits", m, "--tokens", "1", "-o", nowhere], 2, &["-o", "there is no folder"]);
    fails(&["perplexity", m, "--file", m, "--timeline", folder], 2, &["--timeline", "it is a folder"]);
    fails(&["probe", "storage", m, "--plot", nowhere], 2, &["--plot", "there is no folder"]);
}

/// Guards against results that are lost with a side file: the disk is full under the page or the timeline, and what was
/// computed is printed all the same.
#[test]
fn a_side_file_that_fails_takes_nothing_from_the_result() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    let bench = ["bench", arg(&model), "-p", "2", "-n", "1", "-r", "1", "--backend", "cpu", "--json"];
    let plan = ["plan", arg(&model), "--json"];
    for option in ["--html", "--timeline"] {
        for command in [&run(&model, &["--json"])[..], &bench, &plan] {
            let out = nt(&[command, &[option, "/dev/full"]].concat());
            assert_eq!(out.status.code(), Some(1), "{command:?} {option}: {}", text(&out.stderr));
            assert!(text(&out.stderr).contains("writing to /dev/full failed"), "{}", text(&out.stderr));
            let result: Json = serde_json::from_slice(&out.stdout).expect("the result");
            assert!(!result["plan"].is_null(), "{result}");
        }
    }
}

/// Guards against a part of a file that looks like all of it: what a full disk (here a limit of a file's size) cut off is
/// removed.
#[test]
fn no_part_of_a_file_is_left_behind() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    let ids = vec!["1"; 64].join(",");
    let script = "ulimit -f 8 && exec \"$0\" \"$@\"";
    for args in [
        vec!["logits", arg(&model), "--backend", "cpu", "--tokens", &ids, "-o", "out"],
        run(&model, &["--html", "out"]),
    ] {
        let mut command = Command::new("sh");
        let out = command.arg("-c").arg(script).arg(bin()).args(&args).current_dir(d.path()).output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{args:?}: {}", text(&out.stderr));
        assert!(text(&out.stderr).contains("writing to out failed"), "{}", text(&out.stderr));
        assert!(!d.path().join("out").exists(), "{args:?}");
    }
}

/// Guards against a limit of VRAM that is passed over where none is used.
#[test]
fn a_limit_of_vram_without_a_gpu_is_told() {
    let out = nt(&run(&case("chat-plain.gguf"), &["--vram", "1GiB"]));
    assert!(out.status.success() && text(&out.stderr).contains("--vram limits nothing"), "{}", text(&out.stderr));
}

/// Guards against commands of `nt chat` that were mistyped and went to the model as messages. A path, several lines and
/// what has a space before it are messages.
#[test]
fn a_mistyped_command_is_no_message() {
    let model = case("chat-plain.gguf");
    for wrong in ["/cler", "/Save x", "/exit now", "/?"] {
        let out = chat(&model, format!("{wrong}\nhello\n").as_bytes());
        let err = text(&out.stderr);
        assert_eq!((out.status.code(), text(&out.stdout).lines().count()), (Some(0), 1), "{wrong}: {err}");
        assert!(err.contains(wrong) && err.contains("is no command") && err.contains("/help"), "{wrong}: {err}");
    }
    for message in [" /cler", "/etc/fstab", "/a long message of words"] {
        let out = chat(&model, format!("{message}\n").as_bytes());
        assert!(out.status.success() && !out.stdout.is_empty(), "{message}");
        assert!(!text(&out.stderr).contains("is no command"), "{message}");
    }
}

/// Guards against the end of a line that is too long being answered as a message, where stdin ends in it.
#[test]
fn the_rest_of_a_line_that_is_too_long_is_no_message() {
    let mut line = vec![b'w'; (16 << 20) + (1 << 17)];
    line.extend(b"hello");
    let out = chat(&case("chat-plain.gguf"), &line);
    let err = text(&out.stderr);
    assert_eq!((out.status.code(), text(&out.stdout)), (Some(2), String::new()), "{err}");
    assert_eq!(err.matches("the message is left out").count(), 1, "{err}");
}

/// Guards against ranges that name nothing and are passed over, and against a context whose refusal names no cure.
#[test]
fn tests_of_a_benchmark_are_all_run_or_refused() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    fails(&["bench", arg(&model), "-p", "16-8*2", "-n", "1"], 2, &["16-8*2", "from less to more"]);
    fails(&["bench", arg(&model), "-p", "4", "-n", "1", "-d", "4", "--ctx", "4"], 4, &["--ctx 4", "--ctx 8 would do"]);
}

/// Guards against overrides and scaling that change nothing and say nothing.
#[test]
fn metadata_that_changes_nothing_is_told() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    for (key, words) in [
        ("general.alignment=int:64", "tensors lie where the file has them"),
        ("llama.vocab_size=int:10", "the embedding's rows are the vocabulary"),
        ("general.quantization_version=int:1", "nothing reads that key"),
        ("tokenizer.ggml.eos_token=int:1", "nothing reads that key"),
        ("llama.rope.freqbase=float:5", "nothing reads that key"),
    ] {
        let out = nt(&run(&model, &["--override-kv", key]));
        let err = text(&out.stderr);
        assert!(out.status.success() && err.contains(words), "{key}: {err}");
    }
    for key in ["general.name=str:x", "tokenizer.ggml.add_bos_token=bool:true", "tokenizer.ggml.eos_token_id=int:3"] {
        let out = nt(&run(&model, &["--override-kv", key]));
        let err = text(&out.stderr);
        assert!(out.status.success() && !err.contains("--override-kv"), "{key}: {err}");
    }
    fails(&run(&model, &["--rope-orig-ctx", "64"]), 2, &["--rope-orig-ctx 64 would change nothing", "yarn"]);
}

/// Guards against the words of a parser ("invalid float literal", "number too large to fit in target type") in place of
/// what was expected.
#[test]
fn numbers_that_are_none_are_told_what_was_expected() {
    let model = case("chat-plain.gguf");
    let many = "99999999999999999999";
    for (option, value, words) in [
        ("--temp", "abc", "a number was expected"),
        ("--top-p", "", "a number was expected"),
        ("--dry-base", "x", "a number was expected"),
        ("--batch", many, "from 1 to 4096"),
        ("--batch", "0", "from 1 to 4096"),
        ("--rope-orig-ctx", many, "a whole number from 1"),
        ("--repeat-penalty", "0", "a number above 0 and up to 1000000"),
    ] {
        let given = format!("{option}={value}");
        fails(&["run", arg(&model), "-p", "hello", "-n", "1", &given], 2, &[option, words]);
    }
    fails(&["bench", arg(&model), "-r", many], 2, &["from 1 to 1000"]);
    fails(&["probe", "storage", ".", "--depth", many], 2, &["from 1 to 256"]);
    fails(&["probe", "memory", "--seconds", "nan"], 2, &["a number of seconds"]);
}

/// Guards against files that are said to be missing where something else is: a file in place of a folder, /proc.
#[test]
fn what_is_missing_is_named() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    fails(&["list", arg(&model)], 2, &["is no folder", "nt inspect"]);
    fails(&["run", arg(&model), "-f", "/none"], 2, &["the text /none cannot be read", "No such file"]);
    let run = |before: &str| {
        let script = format!("{before} exec \"$0\" run \"$1\" -p hello -n 1 --backend cpu");
        Command::new("unshare").args(["-r", "-m", "sh", "-c", &script]).arg(bin()).arg(&model).output()
    };
    // Where no namespace can be had, there is nothing to see.
    let hidden = "mount -t tmpfs none /proc || exit 77;";
    let there = run("").is_ok_and(|o| o.status.success());
    if let Some(out) = run(hidden).ok().filter(|o| there && o.status.code() != Some(77)) {
        assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains("mount -t proc"), "{}", text(&out.stderr));
    }
}

/// An address given as a model was a file that is not there.
#[test]
fn an_address_is_no_model() {
    for address in ["hf:owner/name:m.gguf", "https://example.com/m.gguf"] {
        fails(&["run", address, "-p", "x"], 2, &[address, "No such file", "`nt pull` fetches"]);
        fails(&["plan", address], 2, &["`nt pull` fetches"]);
    }
}

/// Guards against `-q` that `RUST_LOG` overrules, a filter that is none and passed over, and help that is lost in silence.
#[test]
fn what_is_said_is_what_was_asked_for() {
    let model = case("chat-plain.gguf");
    let with = |log: &str, more: &[&str]| {
        let out = Command::new(bin()).args(run(&model, more)).env("RUST_LOG", log).output().unwrap();
        assert!(out.status.success());
        text(&out.stderr)
    };
    assert_eq!(with("trace", &["-q"]), "");
    assert!(with("nt=off,=,[", &[]).contains("RUST_LOG is left out"));
    for help in [&["--help"][..], &["run", "--help"], &["--version"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let out = Command::new(bin()).args(help).stdout(full).output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{help:?}");
        assert!(text(&out.stderr).contains("writing to stdout failed"), "{}", text(&out.stderr));
    }
}

/// Starts `nt`, sends it SIGTERM after a while, and gives what it printed. One that was not ready for it yet has a
/// longer while.
fn terminated(args: &[&str], first: Duration) -> Output {
    let mut wait = first;
    loop {
        let mut command = Command::new(bin());
        let child = command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(wait);
        // One that has ended is not reaped yet: the number is still its own.
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
        let out = child.wait_with_output().unwrap();
        if out.status.code().is_some() {
            return out;
        }
        wait *= 2;
    }
}

/// Guards against a probe that is deaf to signals and ends as if it had measured all.
#[test]
fn a_probe_of_memory_ends_at_a_signal() {
    // A machine of one processor measures for less than half a second: a signal may come too late there.
    if std::thread::available_parallelism().is_ok_and(|n| n.get() > 1) {
        let out = terminated(&["probe", "memory", "--json"], Duration::from_millis(30));
        assert_eq!((out.status.code(), text(&out.stdout)), (Some(130), String::new()), "{}", text(&out.stderr));
    }
}

/// Guards against a benchmark of hours that is ended in its last test and prints nothing of the others.
#[test]
fn a_benchmark_that_is_ended_prints_what_it_has() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    let args = ["bench", arg(&model), "-p", "1", "-n", "100000", "-r", "1", "--backend", "cpu"];
    // A machine so busy that the first test is not over has another try.
    let tries = [1, 4, 16].map(Duration::from_secs);
    let out = tries.iter().map(|wait| terminated(&args, *wait)).find(|out| !out.stdout.is_empty()).expect("a line");
    let printed = text(&out.stdout);
    assert_eq!(out.status.code(), Some(130), "{}", text(&out.stderr));
    assert!(printed.starts_with("prefill     1 tokens") && printed.lines().count() == 1, "{printed:?}");
}

/// Guards against a plan for a prompt that no run would take.
#[test]
fn a_plan_refuses_a_prompt_that_a_run_refuses() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    fails(&["plan", arg(&model), "-p", "99999999999"], 4, &["-p 99999999999", "the context holds"]);
    fails(&["plan", arg(&model), "-p", "65", "--ctx", "64"], 4, &["holds 64 tokens"]);
    assert!(nt(&["plan", arg(&model), "--ctx", "64"]).status.success());
}

/// Guards against a file of another kind being printed as the fault of a machine's description.
#[test]
fn a_machine_that_is_none_is_refused_in_a_line() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    let file = d.path().join("machine");
    std::fs::write(&file, format!("\n{}", "word ".repeat(1000))).unwrap();
    let out = nt(&["plan", arg(&model), "--machine", arg(&file)]);
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(2) && err.contains("line 2") && err.len() < 500, "{err}");
    assert_eq!(err.trim_end().lines().count(), 1, "{err}");
}

/// Guards against two surprises: the newline of a prompt's file was a part of the prompt, and `-o -` made a file of that
/// name.
#[test]
fn files_and_streams_are_those_of_other_programs() {
    let d = tempfile::tempdir().unwrap();
    let model = case("chat-plain.gguf");
    let prompt = d.path().join("p");
    let tokens = |text: &str| {
        std::fs::write(&prompt, text).unwrap();
        let out = nt(&["run", arg(&model), "-f", arg(&prompt), "-n", "1", "--backend", "cpu", "--json"]);
        serde_json::from_slice::<Json>(&out.stdout).unwrap()["prompt_tokens"].clone()
    };
    assert_eq!(tokens("hello\n"), tokens("hello"));
    assert_ne!(tokens("hello\n\n"), tokens("hello"));
    let mut command = Command::new(bin());
    command.args(["logits", arg(&model), "--tokens", "1", "--backend", "cpu", "-o", "-"]).current_dir(d.path());
    let out = command.stdout(Stdio::piped()).output().unwrap();
    assert!(out.status.success() && out.stdout.starts_with(b"\x93NUMPY"), "{}", text(&out.stderr));
    assert!(!d.path().join("-").exists());
}

/// Guards against streams that another program has made non-blocking (terminals and pipes of some shells and of CI): a
/// result that does not fit into the pipe at once was cut off, and a text that comes later could not be read.
#[test]
fn streams_that_do_not_block_are_waited_for() {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let d = tempfile::tempdir().unwrap();
    let (model, file) = (case("chat-plain.gguf"), d.path().join("t"));
    std::fs::write(&file, "hello world ".repeat(20_000)).unwrap();
    let args = ["tokenize", arg(&model), "--file", arg(&file)];
    let expected = nt(&args).stdout;
    assert!(expected.len() > 1 << 16, "{}", expected.len());
    let (mut from, to) = std::io::pipe().unwrap();
    fcntl(&to, FcntlArg::F_SETFL(OFlag::O_WRONLY | OFlag::O_NONBLOCK)).unwrap();
    let mut command = Command::new(bin());
    let mut child = command.args(args).stdout(to).spawn().unwrap();
    // With it goes this process's end of the pipe.
    drop(command);
    std::thread::sleep(Duration::from_millis(300));
    let mut printed = Vec::new();
    std::io::Read::read_to_end(&mut from, &mut printed).unwrap();
    assert!(child.wait().unwrap().success() && printed == expected, "{} of {}", printed.len(), expected.len());
    let (from, mut to) = std::io::pipe().unwrap();
    fcntl(&from, FcntlArg::F_SETFL(OFlag::O_RDONLY | OFlag::O_NONBLOCK)).unwrap();
    let mut command = Command::new(bin());
    command.args(["run", arg(&model), "-f", "-", "-n", "1", "--backend", "cpu"]).stdin(from);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    to.write_all(b"hello").unwrap();
    drop(to);
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
}

/// Guards against plans that count with the rate of a sweep of small reads: 4 KiB one at a time said that a drive of
/// 2 GB/s reads 0.05.
#[test]
fn a_probe_of_small_reads_is_not_what_plans_count_with() {
    let d = tempfile::tempdir().unwrap();
    let file = d.path().join("file");
    std::fs::write(&file, vec![1; 4 << 20]).unwrap();
    for (block, kept) in [("4KiB", false), ("1MiB", true)] {
        let cache = d.path().join(block);
        let args = ["probe", "storage", arg(&file), "--block-size", block, "--depth", "1", "--seconds", "0"];
        let out = Command::new(bin()).env("XDG_CACHE_HOME", &cache).args(args).output().unwrap();
        assert!(out.status.success(), "{}", text(&out.stderr));
        let rates = std::fs::read_to_string(cache.join("nt/probe.toml")).unwrap_or_default();
        assert_eq!(rates.contains("storage"), kept, "{block}: {rates}");
        assert_eq!(text(&out.stderr).contains("is not kept for plans"), !kept, "{}", text(&out.stderr));
    }
}

/// llama.cpp's `-r` was an "unexpected argument" though README's table has it; `nt bench` has one of its own.
#[test]
fn a_reverse_prompt_is_explained() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(1).write(d.path(), "m.gguf");
    fails(&run(&model, &["-r", "User:"]), 2, &["-r is an option of llama.cpp", "--stop"]);
    let out = nt(&["bench", arg(&model), "-p", "1", "-n", "0", "-r", "none"]);
    assert!(!text(&out.stderr).contains("llama.cpp"), "{}", text(&out.stderr));
}

/// Guards against a panic at the end of a run whose page is wanted where some word of the command is not UTF-8.
#[test]
fn a_page_of_a_path_that_is_not_utf8() {
    let d = tempfile::tempdir().unwrap();
    let folder = d.path().join(std::ffi::OsStr::from_bytes(b"dir\xff"));
    std::fs::create_dir(&folder).unwrap();
    let model = tiny(1).write(&folder, "m.gguf");
    let page = folder.join("page.html");
    for args in
        [&["run", "-p", "x", "-n", "1", "--backend", "cpu"][..], &["plan"], &["bench", "-p", "1", "-n", "1", "-r", "1"]]
    {
        let mut command = Command::new(bin());
        let out =
            command.args(args).args(["-m".as_ref(), model.as_os_str()]).arg("--html").arg(&page).output().unwrap();
        assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
        assert!(std::fs::read_to_string(&page).unwrap().contains("m.gguf"), "{args:?}");
        std::fs::remove_file(&page).unwrap();
    }
}

/// Ctrl-C in a benchmark took the repetitions of its test away, and where no test had ended the JSON: what was measured is told, and
/// that it is not all.
#[test]
fn an_interrupted_benchmark_tells_what_it_has() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    for (tests, measured) in [("1,400000", &[1][..]), ("200", &[200]), ("400000", &[])] {
        let mut command = Command::new(bin());
        command.args(["bench", arg(&model), "--backend", "cpu", "--threads", "1", "-p", "0", "-n", tests, "--json"]);
        command.args(["-r", "1000"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        // By what it has computed, which says under any load how far it is.
        let stat = format!("/proc/{}/stat", child.id());
        let ticks = || {
            let stat = std::fs::read_to_string(&stat).unwrap();
            let after_name = stat.rsplit(") ").next().unwrap();
            after_name.split(' ').nth(11).unwrap().parse::<u64>().unwrap()
        };
        while ticks() < 150 {
            std::thread::sleep(Duration::from_millis(10));
        }
        kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(130), "{tests}: {}", text(&out.stderr));
        let all: Json = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(all["interrupted"], true, "{tests}");
        let told = all["tests"].as_array().unwrap();
        let sizes: Vec<u64> = told.iter().map(|t| t["n_gen"].as_u64().unwrap()).collect();
        assert_eq!(sizes, measured, "{tests}: {told:?}");
        assert!(told.iter().all(|t| t["tokens_per_s"].as_f64().unwrap() > 0.0), "{told:?}");
        assert_eq!(all["decode"]["tokens_per_s"].is_null(), measured.is_empty(), "{}", all["decode"]);
    }
}

/// A text from a pipe that nobody writes to heard no first Ctrl-C: it ends the command, and what comes late is read all the same.
#[test]
fn a_pipe_that_nobody_writes_to_is_left_at_the_first_signal() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny_moe(2).write(d.path(), "m.gguf");
    let pipe = d.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let trace = format!("trace:{}", pipe.display());
    let run = |args: &[&str]| {
        let mut command = Command::new(bin());
        command.args(args).args([arg(&model), "--backend", "cpu", "-n", "1"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let child = run(&["bench", "-p", "0", "--routing", &trace]);
        let opened = || {
            let fds = std::fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap();
            fds.flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == pipe))
        };
        while !opened() {
            std::thread::sleep(Duration::from_millis(10));
        }
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(130), "{signal}: {}", text(&out.stderr));
    }
    let child = run(&["run", "-f", arg(&pipe)]);
    std::fs::write(&pipe, "hello").unwrap();
    let out = child.wait_with_output().unwrap();
    // Its five letters, and what a text begins with.
    assert!(out.status.success() && text(&out.stderr).contains("6 tokens"), "{}", text(&out.stderr));
}
