//! Chat templates, stop texts, sampling, and the conversation.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

use crate::common::{File, V, bin, case, nt, tiny};

const IM: &str = "<|im_start|>";
const IM_END: &str = "<|im_end|>\n";
const OPENING: &str = "<|im_start|>assistant\n";

/// [`tiny`] with chat templates by the end of their keys.
fn templated(dir: &Path, templates: &[(&str, &str)]) -> PathBuf {
    with(dir, |f| {
        for (name, source) in templates {
            f.set(&format!("tokenizer.chat_template{name}"), V::Str((*source).into()));
        }
    })
}

fn with(dir: &Path, change: impl FnOnce(&mut File)) -> PathBuf {
    let mut f = tiny(1);
    change(&mut f);
    f.write(dir, "m.gguf")
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Stdout of a run that ends well.
fn stdout<S: AsRef<std::ffi::OsStr> + std::fmt::Debug>(args: &[S]) -> String {
    let out = nt(args);
    assert_eq!(out.status.code(), Some(0), "{args:?}\n{}", text(&out.stderr));
    text(&out.stdout)
}

/// `nt template` of messages: its output.
fn template(model: &Path, messages: Json, more: &[&str]) -> Output {
    let dir = dir();
    let file = dir.path().join("m.json");
    std::fs::write(&file, messages.to_string()).unwrap();
    let mut args = vec!["template", model.to_str().unwrap(), "--messages", file.to_str().unwrap()];
    args.extend(more);
    nt(&args)
}

/// The prompt that `nt template` prints, without the newline behind it.
fn prompt(model: &Path, messages: Json, more: &[&str]) -> String {
    let out = template(model, messages, more);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let prompt = text(&out.stdout);
    prompt.strip_suffix('\n').unwrap().to_owned()
}

fn user(words: &str) -> Json {
    json!([{ "role": "user", "content": words }])
}

fn with_system() -> Json {
    json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "hi" }])
}

/// `nt run --json` on processors, greedy unless `args` say otherwise.
fn run_json(model: &Path, args: &[&str]) -> Json {
    let mut all = vec!["run", model.to_str().unwrap(), "--backend", "cpu", "--json"];
    all.extend(args);
    if !args.contains(&"--temp") {
        all.extend(["--temp", "0"]);
    }
    serde_json::from_str(&stdout(&all)).unwrap()
}

// --- What a prompt holds -----------------------------------------------------------------------------------------

/// A template that reads content as a list of parts prints nothing of a text: the user's words vanish.
#[test]
fn template_wants_parts() {
    let model = case("template-wants-parts.gguf");
    let expected = format!("{IM}user\nhello world{IM_END}{OPENING}");
    assert_eq!(prompt(&model, user("hello world"), &[]), expected);
    let plain = run_json(&case("chat-plain.gguf"), &["--chat", "-p", "hello world", "-n", "4"]);
    assert_eq!(run_json(&model, &["--chat", "-p", "hello world", "-n", "4"])["prompt_tokens"], plain["prompt_tokens"]);
}

/// The same with an index in place of a loop.
#[test]
fn template_indexes_parts() {
    let dir = dir();
    let model = templated(dir.path(), &[("", "{% for m in messages %}[{{ m.content[0]['text'] }}]{% endfor %}")]);
    assert_eq!(prompt(&model, user("hello"), &[]), "[hello]");
}

/// The other way round: parts are given, and the template adds texts.
#[test]
fn template_wants_a_text() {
    let dir = dir();
    let model = templated(dir.path(), &[("", "{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}")]);
    let parts = json!([{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }]);
    assert_eq!(prompt(&model, json!([{ "role": "user", "content": parts }]), &[]), "[a\nb]");
}

/// A template that prints a message in no form: refused rather than answered without it.
#[test]
fn template_drops_a_message() {
    let dir = dir();
    let model = templated(dir.path(), &[("", "[{{ messages[-1].content }}]")]);
    let messages = json!([{ "role": "user", "content": "first" }, { "role": "user", "content": "last" }]);
    let out = template(&model, messages, &[]);
    let err = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{err}");
    assert!(err.contains("drops message 1 (role user)") && err.contains("\"first\""), "{err}");
}

/// A template that prints an expression of each message's words.
fn printing(dir: &Path, expression: &str) -> PathBuf {
    templated(dir, &[("", &format!("{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ {expression} }}}}{{% endfor %}}"))])
}

/// A template that prints only a part of what was asked passed for one that prints all of it.
#[test]
fn template_cuts_a_message() {
    let words = "What is the capital of France, and of Spain?";
    for (expression, lost) in [
        ("m.content[:24]", "France"),
        ("m.content[-10:]", "What is"),
        ("m.content[:12] ~ m.content[-6:]", "capital"),
        ("m.content.split(',')[0]", "France"),
        ("m.content.split('capital')[1]", "What"),
    ] {
        let dir = dir();
        let model = printing(dir.path(), expression);
        let out = template(&model, user(words), &[]);
        let err = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{expression}: {err}");
        assert!(err.contains("leaves out a part of message 1 (role user)") && err.contains(lost), "{err}");
    }
}

/// The same where other words stand in the place of some.
#[test]
fn template_replaces_words_of_a_message() {
    for expression in ["m.content | replace('not', 'now')", "m.content.replace('a', '')", "m.content | reverse"] {
        let dir = dir();
        let model = printing(dir.path(), expression);
        let run = nt(&["run", model.to_str().unwrap(), "--backend", "cpu", "--chat", "-p", "do not say that"]);
        let err = text(&run.stderr);
        assert!(run.status.code() == Some(2) && err.contains("leaves out a part of message 1"), "{expression}: {err}");
        let talked = chat(&model, &["-n", "3"], b"do not say that\n");
        assert!(talked.code == Some(2) && talked.err.contains("leaves out a part"), "{expression}: {}", talked.err);
    }
}

/// And of a system message, which goes before the user's then.
#[test]
fn template_cuts_the_system_message() {
    let dir = dir();
    let model = printing(dir.path(), "m.content[:4] if m.role == 'system' else m.content");
    let out = template(&model, with_system(), &[]);
    assert_eq!(text(&out.stdout), "<user>Be brief.\nhi\n", "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("cuts the system message"), "{}", text(&out.stderr));
}

/// What is not as it was given, but as models are trained, is told of: other case, switches taken out.
#[test]
fn template_changes_the_form_of_a_message() {
    for (expression, shown, told) in [
        ("m.content | lower", "<user>tell me /no_think", "changes the case of words (role user)"),
        ("m.content.replace('/no_think', '')", "<user>Tell me ", r#"leaves "/no_think" out of a message (role user)"#),
    ] {
        let dir = dir();
        let model = printing(dir.path(), expression);
        let out = template(&model, user("Tell me /no_think"), &[]);
        let (shown, err) = (format!("{shown}\n"), text(&out.stderr));
        assert_eq!((text(&out.stdout), out.status.code()), (shown, Some(0)), "{err}");
        assert!(err.contains(told), "{err}");
    }
}

/// White space, JSON and the reasoning of earlier answers are no words that are lost.
#[test]
fn templates_that_change_no_words() {
    let messages = json!([
        { "role": "user", "content": "  two\n\n lines, \"quoted\" \u{e9} " },
        { "role": "assistant", "content": "<think>let me\nsee</think>\n\nyes" },
        { "role": "user", "content": "why?" },
    ]);
    for expression in [
        "m.content | trim",
        "m.content.split('</think>')[-1].strip()",
        "m.content | tojson",
        "{'text': m.content} | tojson(ensure_ascii=true)",
    ] {
        let dir = dir();
        let out = template(&printing(dir.path(), expression), messages.clone(), &[]);
        let err = text(&out.stderr);
        assert!(out.status.code() == Some(0) && err.is_empty(), "{expression}: {err}");
    }
}

/// Lines and indentation of code were lost without a word.
#[test]
fn template_that_joins_lines_is_told() {
    let dir = dir();
    let messages = json!([{ "role": "user", "content": "if x:\n    y" }]);
    let out = template(&printing(dir.path(), "m.content.split() | join(' ')"), messages, &[]);
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(0) && err.contains("changes white space inside a message (role user)"), "{err}");
}

/// An empty template is no template: ChatML is used, with a warning, rather than an empty prompt.
#[test]
fn template_empty() {
    let model = case("template-empty.gguf");
    let out = template(&model, user("hello world"), &[]);
    assert_eq!(text(&out.stdout), format!("{IM}user\nhello world{IM_END}{OPENING}\n"));
    assert!(text(&out.stderr).contains("template is empty; ChatML is used"), "{}", text(&out.stderr));
    let plain = run_json(&case("chat-plain.gguf"), &["--chat", "-p", "hello world", "-n", "2"]);
    assert_eq!(run_json(&model, &["--chat", "-p", "hello world", "-n", "2"])["tokens"], plain["tokens"]);
}

/// White space alone is no template either.
#[test]
fn template_blank() {
    let dir = dir();
    let model = templated(dir.path(), &[("", " \n\t")]);
    assert_eq!(prompt(&model, user("hi"), &[]), format!("{IM}user\nhi{IM_END}{OPENING}"));
}

/// A file whose only template has the name `default`.
#[test]
fn template_under_the_name_default() {
    let dir = dir();
    let model = templated(dir.path(), &[(".default", "[{{ messages[0].content }}]")]);
    assert_eq!(prompt(&model, user("hi"), &[]), "[hi]");
}

/// A template that skips the system message: it goes before the first user's, and that is said.
#[test]
fn template_drops_system() {
    let model = case("template-drops-system.gguf");
    let out = template(&model, with_system(), &[]);
    assert_eq!(text(&out.stdout), format!("{IM}user\nBe brief.\nhi{IM_END}{OPENING}"));
    assert!(text(&out.stderr).contains("drops the system message"), "{}", text(&out.stderr));
    let run = run_json(&model, &["--system", "Be brief.", "-p", "hi", "-n", "1"]);
    assert!(run["warnings"].to_string().contains("drops the system message"), "{}", run["warnings"]);
    let without = run_json(&model, &["--chat", "-p", "hi", "-n", "1"]);
    assert!(run["prompt_tokens"].as_u64() > without["prompt_tokens"].as_u64());
}

/// A template that refuses a system message: the same.
#[test]
fn template_refuses_system() {
    let dir = dir();
    let source = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
    let model = templated(dir.path(), &[("", source)]);
    assert_eq!(prompt(&model, with_system(), &[]), "<user>Be brief.\nhi");
}

/// A template that reads parts and knows no system message: both at once.
#[test]
fn template_drops_system_and_wants_parts() {
    let dir = dir();
    let source =
        "{% for m in messages if m.role == 'user' %}{% for c in m.content %}[{{ c.text }}]{% endfor %}{% endfor %}";
    let model = templated(dir.path(), &[("", source)]);
    let out = prompt(&model, with_system(), &[]);
    assert_eq!(out.replace("][", ""), "[Be brief.\nhi]");
}

/// A file's template for tools, which was never chosen: the tools did not reach the model.
#[test]
fn template_for_tools() {
    let dir = dir();
    let tools = dir.path().join("t.json");
    std::fs::write(&tools, r#"[{"name": "add"}]"#).unwrap();
    let both =
        [("", "plain {{ messages[0].content }}"), (".tool_use", "{{ tools[0].name }} {{ messages[0].content }}")];
    let model = templated(dir.path(), &both);
    assert_eq!(prompt(&model, user("hi"), &["--tools", tools.to_str().unwrap()]), "add hi");
    assert_eq!(prompt(&model, user("hi"), &[]), "plain hi");
}

/// Tools that a template does not print were left out without a word.
#[test]
fn template_without_tools() {
    let dir = dir();
    let tools = dir.path().join("t.json");
    std::fs::write(&tools, r#"[{"type": "function", "function": {"name": "add"}}]"#).unwrap();
    let model = templated(dir.path(), &[("", "{{ messages[0].content }}{{ tools | length if shown }}")]);
    let with = ["--tools", tools.to_str().unwrap()];
    let out = template(&model, user("hi"), &with);
    assert!(out.status.success() && text(&out.stdout) == "hi\n", "{out:?}");
    assert!(text(&out.stderr).contains("leaves out the tools"), "{}", text(&out.stderr));
    let out = template(&model, user("hi"), &[&with[..], &["--template-var", "shown=true"]].concat());
    assert!(!text(&out.stderr).contains("leaves out the tools"), "{}", text(&out.stderr));
    std::fs::write(&tools, "[]").unwrap();
    let out = template(&model, user("hi"), &with);
    assert!(!text(&out.stderr).contains("leaves out the tools"), "{}", text(&out.stderr));
}

/// A template of the file by its name, one that is built in, and one of another file.
#[test]
fn template_by_name_and_by_file() {
    let dir = dir();
    let model = templated(dir.path(), &[("", "plain"), (".rag", "rag {{ messages[0].content }}")]);
    let file = dir.path().join("own.jinja");
    std::fs::write(&file, "own {{ messages[0].content }}{{ extra }}").unwrap();
    assert_eq!(prompt(&model, user("hi"), &["--chat-template", "rag"]), "rag hi");
    assert_eq!(prompt(&model, user("hi"), &["--chat-template", "chatml"]), format!("{IM}user\nhi{IM_END}{OPENING}"));
    let file = file.to_str().unwrap();
    assert_eq!(prompt(&model, user("hi"), &["--chat-template", file, "--template-var", "extra=[1]"]), "own hi[1]");
    let out = template(&model, user("hi"), &["--chat-template", "nonesuch"]);
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(2) && err.contains("rag") && err.contains("llama3"), "{err}");
}

// --- Memory for the thread that renders --------------------------------------------------------------------------

/// Runs the binary under limits of the shell's `ulimit`.
fn limited(ulimit: &str, args: &[&str]) -> Output {
    let script = format!("ulimit {ulimit} && exec \"$0\" \"$@\"");
    Command::new("sh").arg("-c").arg(script).arg(bin()).args(args).output().unwrap()
}

fn messages_file(dir: &Path) -> String {
    let file = dir.join("m.json");
    std::fs::write(&file, user("hello world").to_string()).unwrap();
    file.to_str().unwrap().to_owned()
}

/// Rendering asked for 1 GiB of address space, which a limit counts in full.
#[test]
fn template_stack() {
    let (dir, model) = (dir(), case("chat-plain.gguf"));
    let file = messages_file(dir.path());
    let out = limited("-v 1000000", &["template", model.to_str().unwrap(), "--messages", &file]);
    assert_eq!(text(&out.stdout), format!("{IM}user\nhello world{IM_END}{OPENING}\n"), "{}", text(&out.stderr));
}

/// So does a limit of data, which counts stacks too.
#[test]
fn template_stack_under_a_limit_of_data() {
    let (dir, model) = (dir(), case("chat-plain.gguf"));
    let file = messages_file(dir.path());
    let out = limited("-d 100000", &["template", model.to_str().unwrap(), "--messages", &file]);
    assert_eq!(text(&out.stdout), format!("{IM}user\nhello world{IM_END}{OPENING}\n"), "{}", text(&out.stderr));
}

/// Where no thread can be had at all, the sentence speaks of memory and the exit code is 4.
#[test]
fn template_without_a_thread() {
    let (dir, model) = (dir(), case("chat-plain.gguf"));
    let file = messages_file(dir.path());
    for kib in (2000..=20_000).rev().step_by(1500) {
        let out = limited(&format!("-d {kib}"), &["template", model.to_str().unwrap(), "--messages", &file]);
        let err = text(&out.stderr);
        if out.status.code() != Some(0) {
            assert_eq!(out.status.code(), Some(4), "{kib}: {err}");
            assert!(err.contains("want of memory") && err.contains("ulimit"), "{err}");
            return;
        }
    }
    panic!("a stack of 16 MiB fits in a data segment of 2 MB");
}

// --- Stop texts --------------------------------------------------------------------------------------------------

/// Control tokens show no text, so a stop text that names one never came.
#[test]
fn stop_is_control_token() {
    let model = case("stop-is-control-token.gguf");
    let run = run_json(&model, &["-p", "h", "-n", "8", "--stop", "<|user|>"]);
    assert_eq!((&run["text"], &run["stop"]), (&json!("onetwo"), &json!("stop")));
}

/// A stop text that goes over a hidden token, and one that goes on behind it.
#[test]
fn stop_spans_a_control_token() {
    let model = case("stop-is-control-token.gguf");
    for (stop, shown) in [("two<|user|>th", "one"), ("<|user|>three", "onetwo"), ("o<|user|>", "onetw")] {
        let run = run_json(&model, &["-p", "h", "-n", "8", "--stop", stop]);
        assert_eq!((&run["text"], &run["stop"]), (&json!(shown), &json!("stop")), "{stop}");
    }
}

/// In a chat an answer ends there too.
#[test]
fn stop_is_control_token_in_a_chat() {
    let model = case("stop-is-control-token.gguf");
    let chat = chat(&model, &["-n", "8", "--stop", "<|user|>"], b"h\n");
    assert_eq!((chat.code, chat.out.as_str()), (Some(0), "onetwo\n"), "{}", chat.err);
}

/// `--special` shows control tokens by their names.
#[test]
fn special_tokens_are_shown_where_asked_for() {
    let model = case("stop-is-control-token.gguf");
    assert_eq!(run_json(&model, &["-p", "h", "-n", "4", "--special"])["text"], "onetwo<|user|>three");
    assert_eq!(run_json(&model, &["-p", "h", "-n", "4"])["text"], "onetwothree");
    let stopped = run_json(&model, &["-p", "h", "-n", "4", "--special", "--stop", "two<|us"]);
    assert_eq!((&stopped["text"], &stopped["stop"]), (&json!("onetwo<|user|>three"), &json!("length")));
}

// --- EOS ---------------------------------------------------------------------------------------------------------

/// EOS behind a prompt: the model begins another document and ignores the prompt.
#[test]
fn add_eos() {
    let (plain, eos) = (case("chat-plain.gguf"), case("add-eos.gguf"));
    let args = ["--chat", "-p", "hello", "-n", "8"];
    let (expected, got) = (run_json(&plain, &args), run_json(&eos, &args));
    assert_eq!((&got["prompt_tokens"], &got["tokens"]), (&json!(20), &expected["tokens"]));
}

/// The same where a text is continued as it is; `nt tokenize` keeps adding EOS.
#[test]
fn add_eos_behind_a_text() {
    let (plain, eos) = (case("chat-plain.gguf"), case("add-eos.gguf"));
    let args = ["-p", "hello world", "-n", "8"];
    let (expected, got) = (run_json(&plain, &args), run_json(&eos, &args));
    assert_eq!((&got["prompt_tokens"], &got["tokens"]), (&expected["prompt_tokens"], &expected["tokens"]));
    let ids = |model: &Path| stdout(&["tokenize", model.to_str().unwrap(), "hello world"]);
    assert_eq!(ids(&eos).split_whitespace().count(), ids(&plain).split_whitespace().count() + 1);
}

/// And in a chat, whose every turn is a prompt.
#[test]
fn add_eos_in_a_chat() {
    let lines = b"hello\nworld\n";
    let answers = |name: &str| chat(&case(name), &["-n", "6"], lines).out;
    assert_eq!(answers("add-eos.gguf"), answers("chat-plain.gguf"));
}

/// An EOS that the template itself writes at the end of the prompt, where the model adds one.
#[test]
fn add_eos_in_a_template() {
    let dir = dir();
    let source = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}";
    let model = with(dir.path(), |f| {
        f.set("tokenizer.chat_template", V::Str(source.into()));
        f.set("tokenizer.ggml.add_eos_token", V::Bool(true));
        f.set("tokenizer.ggml.add_bos_token", V::Bool(false));
    });
    assert_eq!(run_json(&model, &["--chat", "-p", "abc", "-n", "1"])["prompt_tokens"], 3);
}

// --- The conversation --------------------------------------------------------------------------------------------

struct Talked {
    code: Option<i32>,
    out: String,
    err: String,
}

/// `nt chat`, greedy, with these bytes as its stdin.
fn chat(model: &Path, args: &[&str], input: &[u8]) -> Talked {
    let mut child = talk(model, args);
    child.stdin.take().unwrap().write_all(input).unwrap();
    let out = child.wait_with_output().unwrap();
    Talked { code: out.status.code(), out: text(&out.stdout), err: text(&out.stderr) }
}

fn talk(model: &Path, args: &[&str]) -> Child {
    let mut command = Command::new(bin());
    command.arg("chat").arg(model).args(["--backend", "cpu", "--temp", "0"]).args(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// One line that the context cannot hold ended the conversation; it is refused, and the next one is answered.
#[test]
fn chat_line_too_long() {
    let long = format!("hello\n{}\nagain\n", "world ".repeat(70));
    let talked = chat(&case("chat-plain.gguf"), &["--ctx", "120", "-n", "5"], long.as_bytes());
    assert_eq!((talked.code, talked.out.lines().count()), (Some(0), 2), "{}", talked.err);
    let err = &talked.err;
    assert!(err.contains(" tokens") && err.contains("room for "), "{err}");
    // What was refused is no part of the history.
    let without = chat(&case("chat-plain.gguf"), &["--ctx", "120", "-n", "5"], b"hello\nagain\n");
    assert_eq!(talked.out, without.out);
}

/// A line that is not UTF-8 ended it too.
#[test]
fn chat_line_that_is_not_utf_8() {
    let talked = chat(&case("chat-plain.gguf"), &["-n", "5"], b"hello\n\xff\xfe\nagain\n");
    let without = chat(&case("chat-plain.gguf"), &["-n", "5"], b"hello\nagain\n");
    assert_eq!((talked.code, &talked.out), (Some(0), &without.out), "{}", talked.err);
    assert!(talked.err.contains("not UTF-8"), "{}", talked.err);
}

/// So did a message that the template cannot render.
#[test]
fn chat_line_that_the_template_refuses() {
    let dir = dir();
    let source = "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('not that word') }}{% endif %}{{ m.content }}{% endfor %}";
    let model = templated(dir.path(), &[("", source)]);
    let talked = chat(&model, &["-n", "5", "--ctx", "200"], b"hello\nno\nagain\n");
    assert_eq!((talked.code, talked.err.matches("not that word").count()), (Some(0), 1), "{}", talked.err);
}

/// A script whose only message was refused is told so by the exit code.
#[test]
fn chat_that_got_no_answer_fails() {
    let long = "world ".repeat(100);
    let talked = chat(&case("chat-plain.gguf"), &["--ctx", "60", "-n", "5"], long.as_bytes());
    assert_eq!((talked.code, talked.err.matches("nt: ").count()), (Some(4), 1), "{}", talked.err);
}

/// A full context ended the conversation; now the oldest turns make room, which is said once.
#[test]
fn chat_with_a_full_context() {
    let lines = "hello\n".repeat(12);
    let talked = chat(&case("chat-plain.gguf"), &["--ctx", "120", "-n", "5"], lines.as_bytes());
    assert_eq!((talked.code, talked.out.lines().count()), (Some(0), 12), "{}", talked.err);
    assert_eq!(talked.err.matches("the oldest turns are left out").count(), 1, "{}", talked.err);
}

/// A message that is longer than the context itself; and one that would have room alone, but not next to the
/// conversation.
#[test]
fn chat_line_too_long_with_and_without_a_history() {
    let model = case("chat-plain.gguf");
    let long = |n: usize| format!("{}\n", "world ".repeat(n));
    let alone = chat(&model, &["--ctx", "120", "-n", "5"], long(70).as_bytes());
    assert_eq!((alone.code, alone.out.lines().count()), (Some(0), 1), "{}", alone.err);
    let input = format!("hello\n{}/clear\n{}", long(70), long(70));
    let cleared = chat(&model, &["--ctx", "120", "-n", "5"], input.as_bytes());
    assert_eq!((cleared.code, cleared.out.lines().count()), (Some(0), 2), "{}", cleared.err);
    assert_eq!(cleared.out.lines().last(), alone.out.lines().last());
    let never = chat(&model, &["--ctx", "120", "-n", "5"], format!("{}hello\n", long(200)).as_bytes());
    assert!(never.err.contains("room for 119"), "{}", never.err);
    assert_eq!((never.code, never.out.lines().count()), (Some(0), 1), "{}", never.err);
}

/// An answer that fills the context: the next message is answered all the same.
#[test]
fn chat_after_an_answer_that_filled_the_context() {
    let talked = chat(&case("chat-plain.gguf"), &["--ctx", "80", "-n", "1000"], b"hello\nhello\n");
    assert_eq!(talked.code, Some(0), "{}", talked.err);
    assert!(talked.err.contains("was cut off"), "{}", talked.err);
}

/// What is left after old turns made room is the system message and the newest: the same answer as to these alone,
/// from a cache that had held others.
#[test]
fn chat_keeps_the_system_message_when_turns_make_room() {
    let answers = |system: &str, input: &str| {
        let args = ["--ctx", "150", "-n", "1000", "--ignore-eos", "--system", system];
        chat(&case("chat-plain.gguf"), &args, input.as_bytes()).out
    };
    // The first answer fills the context.
    let (both, alone) = (answers("the world", "hello\nhi\n"), answers("the world", "hi\n"));
    assert!(alone.len() > 20 && both.len() > alone.len() && both.ends_with(&alone), "{both:?} {alone:?}");
    assert_ne!(alone, answers("hello", "hi\n"));
}

/// Repeat penalties saw the tokens of turns that the cache no longer held.
#[test]
fn chat_penalises_what_is_in_the_context() {
    let args = ["-n", "6", "--repeat-penalty", "50", "--ctx", "400"];
    let model = case("chat-plain.gguf");
    let talked = chat(&model, &args, b"hello\n/clear\nhello\n");
    let lines: Vec<&str> = talked.out.lines().collect();
    assert_eq!((talked.code, lines.len()), (Some(0), 2), "{}", talked.err);
    assert_eq!(lines[0], lines[1]);
}

/// `/clear` and `/regen`, which were sent to the model.
#[test]
fn chat_commands() {
    let model = case("chat-plain.gguf");
    let talked = chat(&model, &["-n", "6"], b"/regen\nhello\n/regen\n/clear\nhello\n/help\n/exit\nunread\n");
    let lines: Vec<&str> = talked.out.lines().collect();
    assert!(lines.len() == 3 && lines[0] == lines[1] && lines[1] == lines[2], "{lines:?}\n{}", talked.err);
    assert!(talked.err.contains("no answer yet") && talked.err.contains("/clear"), "{}", talked.err);
}

/// A conversation that ended was lost; saved and loaded, it goes on as if it had not ended, whatever became of its file.
#[test]
fn chat_saved_and_loaded() {
    let model = case("chat-plain.gguf");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a conversation");
    let args = ["-n", "6"];
    let with = |commands: &str| {
        let name = file.to_str().unwrap();
        chat(&model, &args, commands.replace("FILE", name).as_bytes())
    };
    let long = "world ".repeat(30);
    let whole = with(&format!("hello {long}\n/save FILE\nagain\n"));
    let answers: Vec<&str> = whole.out.lines().collect();
    assert!(answers.len() == 2 && whole.err.contains("saved: 2 messages"), "{}", whole.err);
    let loaded = with("/load FILE\nagain\n");
    assert_eq!((loaded.code, loaded.out.trim_end()), (Some(0), answers[1]), "{}", loaded.err);
    assert!(loaded.err.contains("loaded: 2 messages, ") && !loaded.err.contains("anew"), "{}", loaded.err);
    // A cache that this session would not have computed.
    let bytes = std::fs::read(&file).unwrap();
    let mut other = bytes.clone();
    let first_page = 24 + u64::from_le_bytes(bytes[16..24].try_into().unwrap()) as usize;
    other[first_page] ^= 1;
    std::fs::write(&file, &other).unwrap();
    let loaded = with("/load FILE\nagain\n");
    assert_eq!((loaded.code, loaded.out.trim_end()), (Some(0), answers[1]), "{}", loaded.err);
    assert!(loaded.err.contains("computed anew"), "{}", loaded.err);
    // Of another type of cache.
    std::fs::write(&file, &bytes).unwrap();
    let loaded = chat(&model, &["-n", "6", "--kv", "f32"], format!("/load {}\nagain\n", file.display()).as_bytes());
    assert!(loaded.code == Some(0) && loaded.err.contains("computed anew"), "{}", loaded.err);
    // A file that is cut off, or another program's, is refused in a sentence, and not replaced.
    std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    let cut = with("/load FILE\nhello\n");
    assert!(cut.code == Some(0) && cut.out.lines().count() == 1, "{}", cut.err);
    assert!(cut.err.contains("is no conversation that nt saved: it has "), "{}", cut.err);
    std::fs::write(&file, "a letter").unwrap();
    let kept = with("hello\n/save FILE\n/load FILE\n/save\n");
    assert!(kept.err.contains("it is not replaced") && kept.err.contains("too short"), "{}", kept.err);
    assert!(kept.err.contains("/save FILE"), "{}", kept.err);
    assert_eq!(std::fs::read(&file).unwrap(), b"a letter");
}

/// A cache that was damaged behind its first page, which alone is computed anew for comparison, was believed.
#[test]
fn chat_loaded_from_a_damaged_file() {
    let model = case("chat-plain.gguf");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("c");
    let with = |commands: &str| chat(&model, &["-n", "6"], commands.replace("FILE", file.to_str().unwrap()).as_bytes());
    let whole = with(&format!("hello {}\n/save FILE\nagain\n", "world ".repeat(100)));
    let mut bytes = std::fs::read(&file).unwrap();
    let described = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) as usize;
    let d: Json = serde_json::from_slice(&bytes[24..24 + described]).unwrap();
    let page = d["page_bytes"].as_u64().unwrap() as usize;
    assert!(bytes.len() > 24 + described + 2 * page, "{d}");
    bytes[24 + described + page] ^= 0x40;
    std::fs::write(&file, &bytes).unwrap();
    let loaded = with("/load FILE\nagain\n");
    assert_eq!((loaded.code, loaded.out.lines().last()), (Some(0), whole.out.lines().last()), "{}", loaded.err);
    assert!(loaded.err.contains("computed anew") && loaded.err.contains("damaged"), "{}", loaded.err);
}

/// Several lines in one message, which were several messages.
#[test]
fn chat_message_of_several_lines() {
    let model = case("chat-plain.gguf");
    let answers = |input: &str| chat(&model, &["-n", "6"], input.as_bytes()).out;
    let one = answers("\"\"\"\nhello\nworld\n\"\"\"\n");
    assert_eq!(one.lines().count(), 1, "{one:?}");
    assert_eq!(answers("hello\\\nworld\n"), one);
}

/// A chat whose answers never end (`onetwothreeonetwothree…`); killed where it outlives the test.
struct Endless {
    child: Child,
    stdin: Option<ChildStdin>,
    out: BufReader<std::process::ChildStdout>,
}

impl Endless {
    /// A chat with answers of `n` tokens.
    fn begin(n: &str) -> Endless {
        let model = case("stop-is-control-token.gguf");
        let mut child = talk(&model, &["-n", n, "--ctx", "300000", "--threads", "1"]);
        let (stdin, out) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Endless { child, stdin, out }
    }

    fn say(&mut self, line: &str) {
        self.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
    }

    /// Waits until nothing of what was said is left in the pipe.
    fn waits_until_all_is_read(&self) {
        let mut left: libc::c_int = 1;
        while left > 0 {
            // SAFETY: the pipe is open, and the request writes an int.
            let rc = unsafe { libc::ioctl(self.stdin.as_ref().unwrap().as_raw_fd(), libc::FIONREAD, &mut left) };
            assert_eq!(rc, 0);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for the first words of an answer.
    fn hears(&mut self) {
        self.out.read_exact(&mut [0; 8]).unwrap();
    }

    fn signal(&self, signal: &str) {
        let kill = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(kill.success());
    }

    /// Reads to the end of the answer: the line's end that `nt chat` prints behind each.
    fn hears_the_end(&mut self) {
        let mut last = Vec::new();
        self.out.read_until(b'\n', &mut last).unwrap();
    }

    /// The exit status, within ten seconds, and stderr.
    fn ends(mut self) -> (ExitStatus, String) {
        drop(self.stdin.take());
        // Whatever it still prints is read, so that it does not wait for a reader.
        let mut out = self.out;
        let reading = std::thread::spawn(move || out.read_to_end(&mut Vec::new()));
        let start = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            if start.elapsed() > Duration::from_secs(10) {
                self.child.kill().unwrap();
                self.child.wait().unwrap();
                panic!("the chat goes on");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        reading.join().unwrap().unwrap();
        let mut err = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        (self.child.wait().unwrap(), err)
    }
}

/// Ctrl-C in an answer ended the conversation; it ends the answer, and the next message is answered.
#[test]
fn chat_interrupted_in_an_answer() {
    let mut chat = Endless::begin("10000000");
    for line in ["h\n", "h\n"] {
        chat.say(line);
        chat.hears();
        chat.signal("-INT");
        chat.hears_the_end();
    }
    let (status, err) = chat.ends();
    assert_eq!(status.code(), Some(0), "{err}");
}

/// Ctrl-C at the prompt did nothing; it ends the chat with 130 and its report.
#[test]
fn chat_interrupted_at_the_prompt() {
    let mut chat = Endless::begin("8");
    chat.say("h\n");
    chat.hears_the_end();
    // The answer's end is printed just before the prompt; either way the signal finds something to end.
    std::thread::sleep(Duration::from_millis(300));
    chat.signal("-INT");
    let (status, err) = chat.keep_open_and_end();
    assert_eq!(status.code(), Some(130), "{err}");
    assert!(err.contains("plan  "), "{err}");
}

/// SIGTERM in an answer ends the chat, not only the answer.
#[test]
fn chat_terminated_in_an_answer() {
    let mut chat = Endless::begin("10000000");
    chat.say("h\n");
    chat.hears();
    chat.signal("-TERM");
    let (status, err) = chat.keep_open_and_end();
    assert_eq!(status.code(), Some(130), "{err}");
}

impl Endless {
    /// As [`ends`](Self::ends), with stdin left open, so that its end is not what ends the chat.
    fn keep_open_and_end(mut self) -> (ExitStatus, String) {
        let stdin = self.stdin.take();
        let ended = self.ends();
        drop(stdin);
        ended
    }
}

// --- Sampling ----------------------------------------------------------------------------------------------------

/// A seed draws what it drew before there were more filters.
#[test]
fn a_seed_draws_the_same_tokens_as_ever() {
    let model = case("chat-plain.gguf");
    let drawn = |more: &[&str]| {
        let args = [&["-p", "hello world", "-n", "16", "--seed", "7"], more].concat();
        run_json(&model, &args)["tokens"].clone()
    };
    let defaults = json!([253, 97, 253, 214, 131, 116, 92, 181, 136, 235, 94, 263, 54, 162, 173, 242]);
    assert_eq!(drawn(&["--temp", "0.8"]), defaults);
    let penalised = json!([65, 177, 167, 157, 236, 199, 154, 103, 196, 239, 80, 85, 16, 163, 232, 80]);
    assert_eq!(drawn(&["--temp", "1.5", "--top-k", "0", "--repeat-penalty", "1.3"]), penalised);
}

/// Every option of sampling reaches the sampler, and a text goes on to the end of the context where asked.
#[test]
fn sampling_options_are_taken() {
    let model = case("chat-plain.gguf");
    let greedy = run_json(&model, &["-p", "hello", "-n", "8"])["tokens"].clone();
    let first = greedy[0].as_u64().unwrap();
    let other = run_json(&model, &["-p", "hello", "-n", "8", "--logit-bias", &format!("{first}-inf")]);
    assert!(other["tokens"].as_array().unwrap().iter().all(|t| *t != json!(first)));
    let always = run_json(&model, &["-p", "hello", "-n", "3", "--logit-bias", "65:100", "--repeat-last-n", "-1"]);
    assert_eq!(always["tokens"], json!([65, 65, 65]));
    for penalty in ["--presence-penalty", "--frequency-penalty"] {
        let varied = run_json(&model, &["-p", "hello", "-n", "20", penalty, "100"]);
        let mut tokens: Vec<u64> = varied["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
        tokens.sort_unstable();
        tokens.dedup();
        assert_eq!(tokens.len(), 20);
    }
    let more = "--typical 0.9 --xtc-probability 0.5 --xtc-threshold 0.1 --top-n-sigma 2 --dry-multiplier 0.8 --dry-base 1.75 --dry-allowed-length 2 --dry-penalty-last-n -1 --dry-sequence-breaker \\n --seed 1";
    let args: Vec<&str> = ["-p", "hello", "-n", "8"].into_iter().chain(more.split(' ')).collect();
    assert_eq!(run_json(&model, &args)["generated_tokens"], 8);
    let full = run_json(&model, &["-p", "hello", "-n", "-1", "--ctx", "50", "--ignore-eos"]);
    assert_eq!((&full["stop"], full["generated_tokens"].as_u64().unwrap() >= 49), (&json!("length"), true), "{full}");
    let out = nt(&["run", model.to_str().unwrap(), "-p", "x", "--backend", "cpu", "--logit-bias", "99999:1"]);
    assert!(out.status.code() == Some(2) && text(&out.stderr).contains("99999"), "{}", text(&out.stderr));
}

/// A text that ends is continued past its end where EOS is ignored.
#[test]
fn eos_is_ignored_where_asked() {
    let dir = dir();
    // A head of zeros makes all tokens alike, and of equals the first is taken, which ends the text.
    let model = with(dir.path(), |f| {
        f.tensor("output.weight").data.fill(0);
        f.set("tokenizer.ggml.eos_token_id", V::U32(0));
    });
    let ends = run_json(&model, &["-p", "a", "-n", "5"]);
    assert_eq!((&ends["stop"], &ends["generated_tokens"]), (&json!("eos"), &json!(0)));
    let goes_on = run_json(&model, &["-p", "a", "-n", "5", "--ignore-eos"]);
    assert_eq!((&goes_on["stop"], &goes_on["generated_tokens"]), (&json!("length"), &json!(5)));
}

/// Parsing a deeply nested template overflowed the main thread's stack: abort, not a sentence.
#[test]
fn a_template_nested_beyond_the_stack() {
    let d = dir();
    let deep = format!("{{{{ {}1 }}}}", "-".repeat(20_000));
    let sums = format!("{{{{ 1{} }}}}", "+1".repeat(20_000));
    let huge = format!("{{{{ {}1 }}}}", "-".repeat(1 << 20));
    for source in [deep, sums, huge] {
        let path = templated(d.path(), &[("", &source)]);
        let out = template(&path, user("hello"), &[]);
        assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
        assert!(!text(&out.stderr).contains("overflow"), "{}", text(&out.stderr));
    }
}

/// What a template makes larger than its inputs filled the memory, until the process was aborted or killed, and what
/// takes exponential time never ended: the engine does not count all of it.
#[test]
fn templates_that_grow_without_end() {
    let million = "{% set s = 'x' * 1000000 %}";
    let twice = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}";
    let nested = format!(
        "{{% set ns = namespace(x=[]) %}}{{% for i in range(99999) %}}{{% set ns.x = {}ns.x{} %}}{{% endfor %}}",
        "[".repeat(40),
        "]".repeat(40)
    );
    let texts = [
        "{{ s.replace('x', s) }}",
        "{{ s.replace('', s) }}",
        "{{ s | replace('x', s) }}",
        "{{ s.join(range(100000)) }}",
        "{{ ''.join([s] * 100000000) }}",
        "{{ ([s] * 100000000) | join(s) }}",
        "{{ '{:>3000000000}'.format(1) }}",
        "{{ ('{0:>60000000}' * 40).format(1) }}",
        "{{ '{:.3000000000f}'.format(1.5) }}",
        "{{ '%3000000000d' | format(1) }}",
        "{{ s * 100000 }}",
        "{{ ([1] * 99999999) | tojson }}",
        "{{ ([1] * 99999) | tojson(separators=[s, s]) }}",
        "{{ ('\n' * 9000000) | indent(256, true, true) }}",
        "{% for i in range(99999) %}{% set n = s.count('y') %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = (ns.x + ns.x) | list %}{% endfor %}",
        "{% set a, b = [1] * 99999999 %}",
    ];
    let of_twice = [
        "{{ ns.x }}",
        "{{ ns.x == ns.y }}",
        "{% set m = {ns.x: 1} %}",
        "{{ '{}'.format(ns.x) }}",
        "{{ raise_exception(ns.x) }}",
    ];
    let mut sources: Vec<String> = texts.iter().map(|t| format!("{million}{t}")).collect();
    sources.extend(of_twice.iter().map(|t| format!("{twice}{t}")));
    sources.extend([nested.clone(), format!("{nested}{{{{ ns.x }}}}")]);
    let d = dir();
    let (model, file) = (case("chat-plain.gguf"), d.path().join("t.jinja"));
    let messages = messages_file(d.path());
    for source in sources {
        std::fs::write(&file, &source).unwrap();
        // Address space for the stack and the heap that rendering may take, and seconds of a processor beyond which
        // the kernel kills.
        let args = ["template", model.to_str().unwrap(), "--messages", &messages, "--chat-template"];
        let out = limited("-v 700000 && ulimit -t 20", &[&args[..], &[file.to_str().unwrap()]].concat());
        let err = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{source}\n{err}");
        let told = err.contains("was stopped: it takes") || err.contains("nested too deeply");
        assert!(told && err.lines().count() == 1, "{source}\n{err}");
    }
}

/// The same while a template is parsed, and where its variables are looked for.
#[test]
fn templates_that_take_long_to_parse() {
    let d = dir();
    let sums = format!("{{{{ 1{} }}}}", "+1".repeat(60_000));
    let texts = format!("{{{{ 'x'{} }}}}", "~'x'".repeat(60_000));
    for source in [sums, texts] {
        let path = templated(d.path(), &[("", &source)]);
        let out = template(&path, user("hello"), &["--template-var", "a=1"]);
        assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
    }
}

/// A template's own error is told in one sentence, however long it is.
#[test]
fn a_template_that_raises_a_long_error() {
    let d = dir();
    let path = templated(d.path(), &[("", "{{ raise_exception('no ' * 100000) }}")]);
    let out = template(&path, user("hello"), &[]);
    assert_eq!(out.status.code(), Some(2));
    assert!(out.stderr.len() < 1000 && text(&out.stderr).contains("no no"), "{}", text(&out.stderr));
}

// --- Options -----------------------------------------------------------------------------------------------------

/// A number below zero was taken for an unknown option; it means what it means in llama.cpp, or is refused with what
/// was expected.
#[test]
fn options_below_zero() {
    let model = case("chat-plain.gguf");
    let greedy = run_json(&model, &["-p", "hello", "-n", "4"])["tokens"].clone();
    let below =
        run_json(&model, &["-p", "hello", "-n", "4", "--temp", "-1", "-t", "-1", "--seed", "-1", "--top-k", "-5"]);
    assert_eq!(below["tokens"], greedy);
    let m = model.to_str().unwrap();
    for (option, words) in [
        ("--top-p", "0 to 1 was expected"),
        ("--min-p", "0 to 1 was expected"),
        ("--typical", "0 to 1 was expected"),
        ("--xtc-probability", "0 to 1 was expected"),
        ("--repeat-penalty", "was expected"),
        ("--dry-multiplier", "was expected"),
        ("--dry-allowed-length", "a whole number from 0 was expected"),
        ("--ctx", "auto or a number from 0"),
        ("--n-buffers", "auto or a number from 2"),
        ("--ram", "is no size"),
        ("--rope-freq-base", "a number above 0 was expected"),
        ("--temp", "out of range"),
        ("--threads", "auto or a number from 0 to 1024"),
    ] {
        let value = if matches!(option, "--temp" | "--threads") { "-1000" } else { "-1" };
        let out = nt(&["run", m, "-p", "x", "--backend", "cpu", option, value]);
        let err = text(&out.stderr);
        assert!(out.status.code() == Some(2) && err.contains(words), "{option}: {err}");
        assert!(!err.contains("-- -1"), "{err}");
    }
    let out = nt(&["plan", m, "-p", "-1"]);
    assert!(text(&out.stderr).contains("a whole number from 0 was expected"), "{}", text(&out.stderr));
    let out = nt(&["logits", m, "--tokens", "-1", "-o", "/dev/null"]);
    assert!(text(&out.stderr).contains("no id of a token"), "{}", text(&out.stderr));
}

/// Options of llama.cpp were unknown, or taken for others (`-ngl` for `-n gl`, `-hf` for `-h`).
#[test]
fn options_of_llama_cpp() {
    let model = case("chat-plain.gguf");
    let m = model.to_str().unwrap();
    for (options, words) in [
        (&["-ngl", "99"][..], "--vram"),
        (&["--n-cpu-moe", "3"], "each expert is a unit"),
        (&["-hf", "some/one"], "nt pull"),
        (&["--reverse-prompt", "User:"], "--stop"),
        (&["--mirostat", "2"], "not built"),
        (&["--chat-template-kwargs", "{}"], "--template-var"),
        (&["--spec-draft-n-max", "4"], "speculative"),
        (&["--image", "x.png"], "texts only"),
        (&["--color"], "stdout has the text alone"),
        (&["-ctk", "q8_0"], "--kv f16"),
        (&["-sys", "Be brief."], "--system"),
        (&["-ts", "1,1"], "one GPU"),
        (&["-fa"], "nothing to choose"),
        (&["-cnv"], "nt chat"),
    ] {
        let out = nt(&[&["run", m, "-p", "x"], options].concat());
        let err = text(&out.stderr);
        assert!(out.status.code() == Some(2) && err.contains(words) && err.contains(options[0]), "{options:?}: {err}");
    }
    // These mean the same here.
    let same = ["--ctx-size", "64", "--predict", "2", "--temperature", "0", "--chat-template-file", "chatml"];
    stdout(&[&["run", m, "-p", "hello"][..], &same].concat());
    let file = dir().path().join("p.txt");
    assert_eq!(run_json(&model, &["-p", "hello", "-s", "3", "-n", "2", "--temp", "1"])["generated_tokens"], 2);
    let out = nt(&["run", m, "-f", file.to_str().unwrap()]);
    assert!(text(&out.stderr).contains("p.txt"), "{}", text(&out.stderr));
}

/// A prompt, a system message or a stop text may begin with a dash, as a list does.
#[test]
fn texts_that_begin_with_a_dash() {
    let model = case("chat-plain.gguf");
    let run = run_json(&model, &["-p", "- hello", "-n", "2", "--system", "-x", "--stop", "--"]);
    assert_eq!(run["generated_tokens"], 2);
}

/// An empty stop text is found before the first token.
#[test]
fn an_empty_stop_text() {
    let model = case("chat-plain.gguf");
    for command in [&["run", "-p", "hello"][..], &["chat"]] {
        let args = [command, &[model.to_str().unwrap(), "--stop", ""]].concat();
        let out = nt(&args);
        let err = text(&out.stderr);
        assert!(out.status.code() == Some(2) && err.contains("--stop") && err.contains("expected"), "{err}");
    }
}

/// `--ctx 0` is the context that the model was trained on.
#[test]
fn the_context_of_the_training() {
    let model = case("chat-plain.gguf");
    let full = run_json(&model, &["-p", "hello", "-n", "-1", "--ctx", "0", "--ignore-eos"]);
    let tokens = full["prompt_tokens"].as_u64().unwrap() + full["generated_tokens"].as_u64().unwrap();
    assert!((512..=513).contains(&tokens), "{tokens}");
}

/// Without `--ctx`, a chat uses what scaling stretches the training to, as a run does.
#[test]
fn a_chat_in_a_stretched_context() {
    let dir = dir();
    let model = with(dir.path(), |f| {
        f.set("llama.rope.scaling.type", V::Str("yarn".into()));
        f.set("llama.rope.scaling.factor", V::F32(4.0));
        f.set("llama.rope.scaling.original_context_length", V::U32(256));
    });
    let talked = chat(&model, &["-n", "2"], "a".repeat(500).as_bytes());
    assert_eq!((talked.code, talked.out.lines().count()), (Some(0), 1), "{}", talked.err);
}

/// `nt chat --json`, which was an unknown option: one object, with every message and the figures.
#[test]
fn chat_in_json() {
    let model = case("chat-plain.gguf");
    let talked = chat(&model, &["-n", "3", "--json", "--system", "Be brief."], b"hello\nworld\n");
    assert_eq!(talked.code, Some(0), "{}", talked.err);
    let all: Json = serde_json::from_str(&talked.out).unwrap();
    let roles: Vec<&str> = all["messages"].as_array().unwrap().iter().filter_map(|m| m["role"].as_str()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    assert_eq!((all["answers"].as_array().unwrap().len(), &all["answers"][1]["generated_tokens"]), (2, &json!(3)));
    assert_eq!((&all["backend"], all["plan"]["b"]["units"].as_u64() > Some(0)), (&json!("cpu"), true));
    let empty = chat(&model, &["--json"], b"");
    assert_eq!(serde_json::from_str::<Json>(&empty.out).unwrap()["messages"], json!([]));
}

/// `nt chat --timeline` was taken and wrote nothing.
#[test]
fn chat_writes_its_timeline() {
    let d = dir();
    let file = d.path().join("t.json");
    let talked = chat(&case("chat-plain.gguf"), &["-n", "3", "--timeline", file.to_str().unwrap()], b"hello\n");
    assert_eq!(talked.code, Some(0), "{}", talked.err);
    serde_json::from_slice::<Json>(&std::fs::read(&file).unwrap()).unwrap();
}

/// Perplexity put EOS behind the text, where the model adds one to texts, and measured a chunk with it.
#[test]
fn perplexity_without_eos() {
    let d = dir();
    let file = d.path().join("t.txt");
    // One token less than three chunks of 16.
    std::fs::write(&file, "a".repeat(47)).unwrap();
    let measured = |name: &str| {
        let model = case(name);
        let args = ["perplexity", model.to_str().unwrap(), "--ctx", "16", "--json", "--backend", "cpu", "-f"];
        stdout(&[&args[..], &[file.to_str().unwrap()]].concat())
    };
    assert_eq!(measured("add-eos.gguf"), measured("chat-plain.gguf"));
}

// --- What is generated, on a terminal ----------------------------------------------------------------------------

/// Stdout of a command whose stdout is a terminal.
fn on_a_terminal(args: &[&str], input: &[u8]) -> String {
    let pty = nix::pty::openpty(None, None).unwrap();
    let mut command = Command::new(bin());
    command.args(args).stdin(Stdio::piped()).stdout(pty.slave).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    // It keeps the terminal open otherwise.
    drop(command);
    child.stdin.take().unwrap().write_all(input).unwrap();
    let mut shown = Vec::new();
    // The other end is closed where the child has ended: an error, as terminals have it.
    let _ = std::fs::File::from(pty.master).read_to_end(&mut shown);
    assert!(child.wait().unwrap().success());
    text(&shown)
}

/// Control characters that a model writes acted on the terminal: titles, the clipboard, what is shown.
#[test]
fn generated_text_acts_on_no_terminal() {
    let model = case("chat-plain.gguf");
    let m = model.to_str().unwrap();
    for (c, shown) in [("\x1b", "\\u001b"), ("\x07", "\\u0007"), ("\r", "\\u000d"), ("\x08", "\\u0008")] {
        let id = stdout(&["tokenize", m, "--no-special", c]);
        let bias = format!("{}:1e6", id.trim());
        let more = ["-n", "3", "--temp", "0", "--backend", "cpu", "--logit-bias", &bias];
        let run = [&["run", m, "-p", "h"], &more[..]].concat();
        assert_eq!(on_a_terminal(&run, b"").trim_end(), shown.repeat(3), "{c:?}");
        assert_eq!(stdout(&run).trim_end_matches('\n'), c.repeat(3), "a pipe gets the bytes");
        let chat = [&["chat", m], &more[..]].concat();
        assert_eq!(on_a_terminal(&chat, b"h\n").trim_end(), shown.repeat(3), "{c:?}");
    }
}

// --- What a template, a full disk or a file's name ends ----------------------------------------------------------

/// Templates that the engine panics on ended with a trace of calls; they are refused in a sentence.
#[test]
fn templates_that_panic_the_engine() {
    for source in [
        "{{ [1,2][::-9223372036854775808] }}",
        "{% for i in [1,2] %}{{ loop.cycle() }}{% endfor %}",
        "{{ range(5,-9223372036854775808,-9223372036854775808)|list }}",
    ] {
        let dir = dir();
        let out = template(&templated(dir.path(), &[("", source)]), user("hi"), &[]);
        let err = text(&out.stderr);
        assert!(
            out.status.code() == Some(2) && err.contains("the template engine cannot render it"),
            "{source}: {err}"
        );
        assert!(!err.contains("panicked") && !err.contains("RUST_BACKTRACE"), "{err}");
    }
}

/// A namespace that holds itself overflowed the stack where it was printed, compared or hashed.
#[test]
fn templates_whose_namespace_holds_itself() {
    for value in ["ns", "[ns]", "{'a': ns}", "ns|items", "[[ns]|reverse]", "ns.a or ns"] {
        for use_ in ["{{ 'a' ~ ns }}", "{{ ns == [ns] }}", "{{ {ns: 1} }}", "{{ ns|string }}", "{{ ns|pprint }}"] {
            let dir = dir();
            let source = format!(
                "{{% set ns=namespace() %}}{{% set ns.a={value} %}}{use_}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
            );
            let out = template(&templated(dir.path(), &[("", &source)]), user("hi"), &[]);
            let err = text(&out.stderr);
            let refused = out.status.code() == Some(2) && err.contains("namespace cannot be stored");
            // What is taken of its items is a copy.
            assert!(refused || value == "ns|items" && out.status.code().is_some(), "{source}: {:?} {err}", out.status);
        }
    }
}

/// Where stderr could not be written to, a warning ended the run.
#[test]
fn warnings_that_cannot_be_written() {
    let model = case("template-empty.gguf");
    for command in [&["run", "--chat", "-p", "hello"][..], &["chat"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut nt = Command::new(bin());
        nt.args(command).arg(&model).args(["--backend", "cpu", "-n", "3", "--temp", "0"]);
        let mut child = nt.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(full).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"/help\nhello\n/clear\n/regen\n").unwrap();
        let out = child.wait_with_output().unwrap();
        assert_eq!((out.status.code(), out.stdout.is_empty()), (Some(0), false), "{command:?}");
    }
}

/// Text went on for hours where nobody could read it.
#[test]
fn text_that_cannot_be_written_ends() {
    let model = case("chat-plain.gguf");
    let script = "timeout 60 \"$0\" run \"$1\" -p hello -n 199000 --ctx 200000 --ignore-eos --backend cpu";
    for (to, code, word) in [(">/dev/full", 1, "No space left"), ("| head -c1 >/dev/null", 0, "")] {
        let out = Command::new("sh").args(["-c", &format!("{script} {to}")]).arg(bin()).arg(&model).output().unwrap();
        let err = text(&out.stderr);
        assert!(out.status.code() == Some(code) && err.contains(word), "{to}: {:?} {err}", out.status);
    }
    let piped = format!("{script} | head -c1; exit ${{PIPESTATUS[0]}}");
    let out = Command::new("bash").args(["-c", &piped]).arg(bin()).arg(&model).output().unwrap();
    assert_eq!((out.status.code(), text(&out.stderr).contains("nt:")), (Some(1), false), "{}", text(&out.stderr));
}

/// Beyond the limit of a file's size the signal ended the run without a word.
#[test]
fn a_file_larger_than_its_limit() {
    let (d, model) = (dir(), case("chat-plain.gguf"));
    let file = d.path().join("o.npy");
    let tokens = vec!["1"; 64].join(",");
    let out = limited("-f 1", &["logits", model.to_str().unwrap(), "--tokens", &tokens, "-o", file.to_str().unwrap()]);
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(1) && err.contains("File too large"), "{:?} {err}", out.status);
}

/// An output that is the model destroyed it, and of two outputs in one file the last was left.
#[test]
fn an_output_that_is_the_model() {
    let d = dir();
    let model = d.path().join("m.gguf");
    std::fs::copy(case("chat-plain.gguf"), &model).unwrap();
    let before = std::fs::read(&model).unwrap();
    let (link, hard) = (d.path().join("l"), d.path().join("h"));
    std::os::unix::fs::symlink(&model, &link).unwrap();
    std::fs::hard_link(&model, &hard).unwrap();
    let new = d.path().join("new").to_str().unwrap().to_owned();
    let again = d.path().join(".").join("new").to_str().unwrap().to_owned();
    let m = model.to_str().unwrap();
    for file in [&model, &link, &hard] {
        let f = file.to_str().unwrap();
        for args in [
            &["logits", m, "--tokens", "1", "-o", f][..],
            &["logits", m, "--tokens", "1", "-o", &new, "--timeline", f],
            &["run", m, "-p", "x", "-n", "1", "--html", f],
            &["run", m, "-p", "x", "-n", "1", "--timeline", f],
            &["run", m, "-p", "x", "-n", "1", "--timeline", &new, "--tier-c", f, "--html", &again],
            &["plan", m, "--html", f],
            &["plan", m, "--timeline", &new, "--html", &again],
            &["bench", m, "-p", "1", "-n", "1", "--html", f],
            &["chat", m, "--timeline", f],
        ] {
            let out = nt(args);
            let err = text(&out.stderr);
            assert_eq!(out.status.code(), Some(2), "{args:?}: {err}");
            assert!(err.contains("file of the model") || err.contains("names the same file"), "{args:?}: {err}");
        }
    }
    assert!(std::fs::read(&model).unwrap() == before && !Path::new(&new).exists());
    let out =
        nt(&["run", m, "-p", "x", "-n", "1", "--timeline", "/dev/null", "--html", "/dev/null", "--backend", "cpu"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
}

/// Nothing that was scored had the perplexity NaN.
#[test]
fn perplexity_of_no_chunks() {
    let (d, model) = (dir(), case("chat-plain.gguf"));
    let file = d.path().join("t.txt");
    std::fs::write(&file, "a".repeat(100)).unwrap();
    let args = ["perplexity", model.to_str().unwrap(), "--ctx", "16", "--chunks", "0", "-f", file.to_str().unwrap()];
    let out = nt(&args);
    assert!(out.status.code() == Some(2) && text(&out.stderr).contains("--chunks 0"), "{}", text(&out.stderr));
}

/// One long word took 65 bytes of memory for each of its own, whatever was free.
#[test]
fn a_text_whose_tokens_take_more_memory_than_there_is() {
    let (d, model) = (dir(), case("chat-plain.gguf"));
    let file = d.path().join("t.txt");
    std::fs::write(&file, vec![b'a'; 24 << 20]).unwrap();
    let args = ["tokenize", model.to_str().unwrap(), "--file", file.to_str().unwrap()];
    let out = limited("-v 1500000", &args);
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(4) && err.contains("24.00 MiB") && err.contains("shorten it"), "{err}");
}

/// A signal that came while tokens were made of a long text was put off until they were.
#[test]
fn a_signal_while_tokens_are_made() {
    let mut nt = Command::new(bin());
    nt.arg("run").arg(case("chat-plain.gguf")).args(["-f", "-", "--backend", "cpu"]);
    let mut child = nt.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all("hello".repeat(1_500_000).as_bytes()).unwrap();
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    // Not SIGINT, which a shell lets its background jobs ignore.
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGTERM), "{status:?}");
}

/// In a chat the signal was put off until a message's tokens were made; it takes the message back.
#[test]
fn chat_interrupted_while_tokens_are_made() {
    let mut chat = Endless::begin("8");
    let message = format!("{}\n", "hello".repeat(1_500_000));
    chat.say(&message);
    // All of it is read when the pipe is empty; making its tokens takes longer than the pause.
    chat.waits_until_all_is_read();
    std::thread::sleep(Duration::from_millis(100));
    chat.signal("-INT");
    chat.say("h\n");
    chat.hears_the_end();
    let (status, err) = chat.ends();
    assert_eq!(status.code(), Some(0), "{err}");
    assert!(err.contains("the message is taken back"), "{err}");
}

/// SIGTERM there ends the chat.
#[test]
fn chat_terminated_while_tokens_are_made() {
    let mut chat = Endless::begin("8");
    chat.say(&format!("{}\n", "hello".repeat(1_500_000)));
    chat.waits_until_all_is_read();
    std::thread::sleep(Duration::from_millis(100));
    chat.signal("-TERM");
    let (status, err) = chat.keep_open_and_end();
    assert_eq!(status.code(), Some(130), "{err}");
}

/// A template that prints a message many times over made a text whose tokens took more memory than there is.
#[test]
fn a_prompt_whose_tokens_take_more_memory_than_there_is() {
    let d = dir();
    let model = templated(d.path(), &[("", "{{ messages[0].content * 10 }}")]);
    let file = d.path().join("t.txt");
    std::fs::write(&file, vec![b'a'; 1 << 20]).unwrap();
    let args = ["run", model.to_str().unwrap(), "--backend", "cpu", "--chat", "-f", file.to_str().unwrap()];
    let out = limited("-v 900000", &args);
    let err = text(&out.stderr);
    assert!(
        out.status.code() == Some(4) && err.contains("with what the template adds") && err.contains("10.00 MiB"),
        "{err}"
    );
}

/// Each special token was looked for in the whole text: hours for the vocabularies that have many.
#[test]
fn a_vocabulary_of_special_tokens() {
    let d = dir();
    let model = with(d.path(), |f| {
        let V::Strs(mut tokens) = f.meta.iter().find(|(k, _)| k == "tokenizer.ggml.tokens").unwrap().1.clone() else {
            panic!("no tokens");
        };
        let mut kinds = vec![1; 256];
        tokens.extend((0..100_000).map(|i| format!("<extra_{i}>")));
        kinds.resize(tokens.len(), 3);
        f.set("tokenizer.ggml.tokens", V::Strs(tokens));
        f.set("tokenizer.ggml.token_type", V::I32s(kinds));
    });
    let file = d.path().join("t.txt");
    std::fs::write(&file, format!("{}<extra_77777>b", "<extra_".repeat(600_000))).unwrap();
    let out = limited("-t 8", &["tokenize", model.to_str().unwrap(), "--file", file.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(0), "{:?} {}", out.status, text(&out.stderr));
    assert!(text(&out.stdout).trim_end().ends_with(&format!(" {} 98", 258 + 77_777)));
}

/// A variable that is set to nothing was refused as a number of buffers.
#[test]
fn an_empty_variable_is_none() {
    let model = case("chat-plain.gguf");
    let mut nt = Command::new(bin());
    nt.arg("run").arg(model).args(["-p", "x", "-n", "1", "--backend", "cpu"]).env("NT_PIPELINE_DEPTH", "");
    let out = nt.output().unwrap();
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
}

/// An image in a message came out as a dictionary of Python's, which a model would have read as words.
#[test]
fn images_in_messages_are_refused() {
    let parts =
        json!([{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": "x"}]}]);
    let out = template(&case("chat-plain.gguf"), parts, &[]);
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(2) && err.contains("message 1 has a part of type image_url"), "{err}");
}

/// Biases whose sum is no number drew any token.
#[test]
fn biases_that_cancel_are_refused() {
    let model = case("chat-plain.gguf");
    let args = ["run", model.to_str().unwrap(), "-p", "x", "--logit-bias", "5:inf", "--logit-bias", "5:-inf"];
    let out = nt(&args);
    assert!(out.status.code() == Some(2) && text(&out.stderr).contains("--logit-bias 5"), "{}", text(&out.stderr));
}
