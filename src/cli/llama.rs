//! Options of llama.cpp that nt does not have: what a user who types one is told in place of "unexpected argument".

use std::ffi::OsString;

use super::Failure;

/// Names of an option, and what to do here.
struct Absent {
    names: &'static [&'static str],
    instead: &'static str,
}

const fn absent(names: &'static [&'static str], instead: &'static str) -> Absent {
    Absent { names, instead }
}

/// The README has the same list.
const ABSENT: &[Absent] = &[
    absent(
        &["-ngl", "--gpu-layers", "--n-gpu-layers"],
        "VRAM is filled by itself; --vram SIZE limits it, --tiers A:B:C sets the blocks in VRAM, RAM and storage by hand",
    ),
    absent(
        &["-ot", "--override-tensor", "-cmoe", "--cpu-moe", "-ncmoe", "--n-cpu-moe"],
        "each expert is a unit, and the plan places it; --vram SIZE and --ram SIZE limit it",
    ),
    absent(
        &["-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-mu", "--model-url"],
        "nothing is downloaded; fetch the file, for example into ~/.cache/nt/models, where nt finds it by its name",
    ),
    absent(&["-cnv", "--conversation", "-st", "--single-turn"], "`nt chat` talks, and `nt run --chat` answers once"),
    absent(&["-no-cnv", "--no-conversation"], "`nt run` continues a text without --chat"),
    absent(&["-sys", "--system-prompt"], "--system TEXT"),
    absent(&["-ub"], "--batch N (or --ubatch-size N) is how many tokens of a prompt a pass evaluates"),
    absent(&["-tb", "--threads-batch"], "-t sets the threads of prompt and answer"),
    absent(
        &["--mmap", "--no-mmap", "--mlock", "-dio", "--direct-io", "-ndio", "--no-direct-io"],
        "weights are read past the page cache, as far as they do not stay in memory; --tier-c none forbids reading them while it runs",
    ),
    absent(&["-ctk", "--cache-type-k", "-ctv", "--cache-type-v"], "--kv f16, f32 or q8_0 sets the type of both"),
    absent(&["-fa", "--flash-attn"], "there is nothing to choose"),
    absent(
        &["-sm", "--split-mode", "-ts", "--tensor-split", "-mg", "--main-gpu", "--rpc", "-dev", "--device"],
        "one GPU of one machine computes",
    ),
    absent(&["--jinja", "--no-jinja"], "chat templates are always rendered"),
    absent(&["--lora", "--lora-scaled", "--mmproj", "-mm"], "there is nothing like it here"),
    absent(&["-j", "-jf"], "--json-schema takes a file, or the schema itself"),
    absent(&["-md", "--model-draft"], "there is no speculative decoding yet"),
];

/// The first of the arguments that is llama.cpp's alone, as a sentence.
pub(super) fn explained(args: impl IntoIterator<Item = OsString>) -> Option<Failure> {
    let words = args.into_iter().filter_map(|a| a.into_string().ok()).take_while(|a| a != "--");
    let find = |word: String| {
        let name = word.split_once('=').map_or(&*word, |(name, _)| name).to_owned();
        let found = ABSENT.iter().find(|a| a.names.contains(&name.as_str()))?;
        Some(Failure::usage(format!("{name} is an option of llama.cpp, not of nt: {}", found.instead)))
    };
    words.into_iter().find_map(find)
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
    }

    /// What nt has itself is not explained away.
    #[test]
    fn nothing_that_nt_has_is_in_the_list() {
        for command in super::super::args::Cli::command().get_subcommands() {
            for argument in command.get_arguments() {
                let names = argument.get_long().map(|l| format!("--{l}")).into_iter();
                let names: Vec<String> = names.chain(argument.get_short().map(|s| format!("-{s}"))).collect();
                let both = |a: &Absent| a.names.iter().find(|n| names.iter().any(|own| own == **n)).copied();
                assert_eq!(ABSENT.iter().find_map(both), None, "{}", command.get_name());
            }
        }
    }
}
