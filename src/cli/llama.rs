//! Options of llama.cpp that nt does not have: what a user who types one is told in place of "unexpected argument".

use std::ffi::OsString;

use super::Failure;

/// Names of an option (with `*` at its end, of all that begin so), and what to do here.
struct Absent {
    names: &'static [&'static str],
    instead: &'static str,
}

impl Absent {
    fn is(&self, name: &str) -> bool {
        self.names.iter().any(|n| n.strip_suffix('*').map_or(*n == name, |begin| name.starts_with(begin)))
    }
}

const fn absent(names: &'static [&'static str], instead: &'static str) -> Absent {
    Absent { names, instead }
}

/// The README has the same list; source of the names: llama.cpp's `common/arg.cpp`.
const ABSENT: &[Absent] = &[
    absent(
        &["-ngl", "--gpu-layers", "--n-gpu-layers"],
        "VRAM is filled by itself; --vram SIZE limits it, --tiers A:B:C sets the blocks in VRAM, RAM and storage by hand",
    ),
    absent(
        &["-ot", "--override-tensor", "-cmoe", "--cpu-moe", "-ncmoe", "--n-cpu-moe", "-ncffn", "--n-cpu-ffn"],
        "each expert is a unit, and the plan places it; --vram SIZE and --ram SIZE limit it",
    ),
    absent(
        &[
            "-fit",
            "-fitt",
            "-fitc",
            "--fit*",
            "-nkvo",
            "--no-kv-offload",
            "-kvo",
            "--kv-offload",
            "--no-op-offload",
            "--op-offload",
            "--repack",
            "--no-repack",
            "--no-host",
        ],
        "the plan places all parts by itself; `nt plan` shows where",
    ),
    absent(
        &["-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-mu", "--model-url", "-dr", "--docker-repo"],
        "`nt pull hf:OWNER/NAME:FILE` or `nt pull URL` fetches a model beforehand, and `nt run FILE` finds it",
    ),
    absent(
        &[
            "-cnv",
            "--conversation",
            "-st",
            "--single-turn",
            "-i",
            "--interactive*",
            "-if",
            "-mli",
            "--multiline-input",
            "--in-prefix*",
            "--in-suffix",
        ],
        "`nt chat` talks, and `nt run --chat` answers once",
    ),
    absent(&["-no-cnv", "--no-conversation"], "`nt run` continues a text without --chat"),
    absent(
        &["-sys", "--system-prompt", "-sysf", "--system-prompt-file"],
        "--system TEXT; of a file, --system \"$(cat FILE)\"",
    ),
    absent(&["--reverse-prompt"], REVERSE_PROMPT),
    absent(&["-e", "--escape", "--no-escape"], "a prompt is taken as it is; $'a\\nb' has the shell write a newline"),
    absent(&["-ub"], "--batch N (or --ubatch-size N) is how many tokens of a prompt a pass evaluates"),
    absent(&["-tb", "--threads-batch"], "-t sets the threads of prompt and answer"),
    absent(
        &["-C", "--cpu-mask*", "-Cr", "--cpu-range*", "--cpu-strict*", "-Cb", "-Crb", "--prio*", "--poll*", "--numa"],
        "-t sets the threads; `taskset` or `numactl` before nt choose the processors",
    ),
    absent(
        &[
            "--mmap",
            "--no-mmap",
            "--mlock",
            "-dio",
            "--direct-io",
            "-ndio",
            "--no-direct-io",
            "-lm",
            "--load-mode",
            "-lzm",
            "--lazy-mode",
        ],
        "weights are read past the page cache, as far as they do not stay in memory; --tier-c none forbids reading them while it runs",
    ),
    absent(&["-ctk", "--cache-type-k", "-ctv", "--cache-type-v"], "--kv f16, f32 or q8_0 sets the type of both"),
    absent(
        &[
            "-fa",
            "--flash-attn",
            "--warmup",
            "--no-warmup",
            "-ctxcp",
            "--ctx-checkpoints",
            "--swa-checkpoints",
            "-cms",
            "--checkpoint-min-step",
            "-cram",
            "--cache-ram",
            "-kvu",
            "--kv-unified*",
            "-dt",
            "--defrag-thold",
            "-cb",
            "--cont-batching",
            "--no-cont-batching",
            "--cache-idle-slots",
            "--cache-prompt",
            "--cache-reuse",
            "--backend-sampling",
            "-bs",
        ],
        "there is nothing to choose",
    ),
    absent(
        &["--keep", "--context-shift", "--no-context-shift", "-gan", "--grp-attn*", "-gaw"],
        "a text ends where the context is full, and `nt chat` leaves out its oldest turns there; -c N sets the context",
    ),
    absent(
        &["-sm", "--split-mode", "-ts", "--tensor-split", "-mg", "--main-gpu", "--rpc", "-dev", "--device"],
        "one GPU of one machine computes",
    ),
    absent(&["--list-devices"], "`nt doctor` says what computes here"),
    absent(&["--check-tensors"], "`nt verify` compares every tensor with its record"),
    absent(
        &["--jinja", "--no-jinja", "--skip-chat-parsing", "--no-skip-chat-parsing"],
        "chat templates are always rendered",
    ),
    absent(
        &[
            "--chat-template-kwargs",
            "-rea",
            "--reasoning",
            "--reasoning-effort",
            "--reasoning-format",
            "--reasoning-budget*",
            "--reasoning-preserve",
        ],
        "--template-var NAME=VALUE sets a variable of the template, as enable_thinking=false or reasoning_effort=low",
    ),
    absent(
        &[
            "--lora*",
            "--control-vector*",
            "--mmproj*",
            "-mm",
            "-mmu",
            "--image*",
            "--audio",
            "--video*",
            "--media-path",
            "--mtmd*",
        ],
        "there is nothing like it here: no adapters, and texts only",
    ),
    absent(&["-j", "-jf"], "--json-schema takes a file, or the schema itself"),
    absent(
        &[
            "-md",
            "--model-draft",
            "--draft*",
            "--spec-*",
            "-hfd",
            "-hfrd",
            "--hf-repo-draft",
            "-td",
            "-tbd",
            "-ngld",
            "-devd",
            "-ctkd",
            "-ctvd",
            "-otd",
            "-cmoed",
            "-ncmoed",
            "-lcs",
            "-lcd",
            "--lookup-cache*",
        ],
        "there is no speculative decoding yet",
    ),
    absent(
        &["--samplers", "--sampler-seq", "--sampling-seq"],
        "filters work in llama.cpp's default order; those at their neutral value do nothing",
    ),
    absent(
        &["--mirostat*", "--dynatemp*", "--adaptive*"],
        "that way of drawing is not built; --help lists those that are",
    ),
    absent(
        &["--yarn-ext-factor", "--yarn-attn-factor", "--yarn-beta-slow", "--yarn-beta-fast"],
        "--override-kv ARCHITECTURE.rope.scaling.yarn_beta_fast=float:32 and the like set it",
    ),
    absent(
        &["--prompt-cache*", "--slot-save-path"],
        "/save and /load of `nt chat` keep a conversation and its cache, and `nt serve --cache-dir` keeps prompts",
    ),
    absent(
        &[
            "--display-prompt",
            "--no-display-prompt",
            "--verbose-prompt",
            "-co",
            "--color",
            "--simple-io",
            "--perf",
            "--no-perf",
            "--show-timings",
            "--no-show-timings",
        ],
        "stdout has the text alone, stderr the report; -q leaves the report out",
    ),
    absent(&["--log-*", "-lv", "--verbosity"], "-v logs more, -q less, and 2> FILE keeps it"),
    absent(&["-np"], "`nt serve --parallel N` answers several requests at once"),
    absent(&["--api-key"], "--api-key-file F has the keys, a line each"),
    absent(
        &[
            "--embedding",
            "--embeddings",
            "--metrics",
            "--props",
            "--slots",
            "--no-slots",
            "--ui",
            "--no-ui",
            "--webui",
            "--no-webui",
        ],
        "there is nothing to switch on: what `nt serve` has is always served (docs/clients.md)",
    ),
    absent(
        &[
            "--ssl-*",
            "--path",
            "--api-prefix",
            "--cors-*",
            "--reuse-port",
            "--threads-http",
            "--ui-*",
            "--webui-*",
            "--tools-runtime",
            "--mcp-*",
            "-ag",
            "--agent",
            "--models-*",
            "--rerank*",
            "--tags",
            "-sps",
            "--slot-prompt-similarity",
            "--sleep-idle-seconds",
            "--sse-ping-interval",
            "--prefill-assistant",
            "--no-prefill-assistant",
            "--spm-infill",
        ],
        "`nt serve` has nothing like it (docs/clients.md); a proxy before it adds TLS and paths",
    ),
    absent(
        &["--hellaswag*", "--winogrande*", "--multiple-choice*", "--kl-divergence*", "--save-all-logits", "--ppl-*"],
        "`nt perplexity` measures perplexity, and with --requant TYPE --kl how far fewer bits lead from the file's",
    ),
];

/// What `-r` and its long name are here.
const REVERSE_PROMPT: &str = "--stop TEXT ends the text there";

/// The first of the arguments that is llama.cpp's alone, as a sentence.
pub(super) fn explained(args: impl IntoIterator<Item = OsString>) -> Option<Failure> {
    let words: Vec<String> = args.into_iter().filter_map(|a| a.into_string().ok()).take_while(|a| a != "--").collect();
    // `nt bench` has an -r of its own.
    let talks = words.iter().any(|w| w == "run" || w == "chat") && !words.iter().any(|w| w == "bench");
    let find = |word: &String| {
        let name = word.split_once('=').map_or(&**word, |(name, _)| name);
        let instead = match ABSENT.iter().find(|a| a.is(name)) {
            Some(found) => found.instead,
            None if name == "-r" && talks => REVERSE_PROMPT,
            None => return None,
        };
        Some(Failure::usage(format!("{name} is an option of llama.cpp, not of nt: {instead}")))
    };
    words.iter().find_map(find)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn told(args: &[&str]) -> Option<String> {
        explained(args.iter().map(OsString::from)).map(|f| f.to_string())
    }

    #[test]
    fn options_of_llama_cpp_are_known_by_name() {
        assert!(told(&["nt", "run", "m", "-ngl", "99"]).is_some_and(|t| t.contains("--vram")));
        assert!(told(&["nt", "run", "m", "--n-gpu-layers=99"]).is_some_and(|t| t.starts_with("--n-gpu-layers is")));
        assert_eq!(told(&["nt", "run", "m", "-n", "gl", "--", "-ngl"]), None);
        assert!(told(&["nt", "run", "m", "-r", "User:"]).is_some_and(|t| t.contains("--stop")));
        assert_eq!(told(&["nt", "bench", "m", "-r", "x"]), None);
    }

    /// What nt has itself is not explained away.
    #[test]
    fn nothing_that_nt_has_is_in_the_list() {
        for command in super::super::Cli::command().get_subcommands() {
            for argument in command.get_arguments() {
                let names = argument.get_long().map(|l| format!("--{l}")).into_iter();
                let names: Vec<String> = names.chain(argument.get_short().map(|s| format!("-{s}"))).collect();
                let both = |a: &Absent| names.iter().find(|own| a.is(own)).cloned();
                assert_eq!(ABSENT.iter().find_map(both), None, "{}", command.get_name());
            }
        }
    }
}
