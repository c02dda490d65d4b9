//! Arguments that commands share: what `docs` and scripts rely on.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::backend::quantise;
use crate::engine::{DryParams, Options, SamplerParams, Slices};
use crate::gguf::{Metadata, TensorType, Value};
use crate::library;
use crate::model::{HParams, Overrides, RopeType, SLICE_PARTS};
use crate::plan::{BUFFERS_MAX, Tiers, parse_size};

/// The model, as an argument or with `-m`.
#[derive(Clone, Debug, Args)]
pub struct ModelArg {
    /// GGUF file, or any shard of a sharded one, or a folder with one model; or a name that `nt list` shows,
    /// such as Ollama's qwen2.5:14b; or the name of one that `nt device extents` recorded.
    #[arg(value_name = "MODEL", required_unless_present = "model_option")]
    model: Option<PathBuf>,
    /// The same, as an option.
    #[arg(short = 'm', long = "model", value_name = "MODEL", id = "model_option", conflicts_with = "model")]
    model_option: Option<PathBuf>,
}

impl ModelArg {
    /// The path that was given either way.
    pub fn path(&self) -> &std::path::Path {
        self.model.as_deref().or(self.model_option.as_deref()).unwrap_or(std::path::Path::new(""))
    }

    /// Puts the file in place of a bare name that means one in the model library. A file of that name in the current
    /// folder comes first; a name that the library does not know is left as it is.
    ///
    /// # Errors
    /// If the name could mean several files, or one that cannot be used.
    pub(super) fn look_up(&mut self) -> Result<(), super::Failure> {
        let path = self.path();
        if path.exists() || !library::is_bare(path) {
            return Ok(());
        }
        let name = path.to_string_lossy().into_owned();
        if let Some(found) = library::find(&name, &library::scan(&library::places())).map_err(super::Failure::usage)? {
            *self = ModelArg { model: Some(found), model_option: None };
        }
        Ok(())
    }

    /// Whether the model is a bare name for which neither a file nor an entry of the library was found.
    pub(super) fn is_unknown(&self) -> bool {
        !self.path().exists() && library::is_bare(self.path())
    }
}

/// One or more models, as arguments or with `-m`.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// GGUF file, or any shard of a sharded one, or a folder with one model; or a name that `nt list` shows,
    /// such as Ollama's qwen2.5:14b; or the name of one that `nt device extents` recorded.
    #[arg(value_name = "MODEL", required_unless_present = "model_option")]
    models: Vec<PathBuf>,
    /// The same, as an option.
    #[arg(short = 'm', long = "model", value_name = "MODEL", id = "model_option", conflicts_with = "models")]
    model_option: Vec<PathBuf>,
}

impl ModelArgs {
    /// Each of them.
    pub fn all(&self) -> impl Iterator<Item = ModelArg> {
        let all = self.models.iter().chain(&self.model_option);
        all.map(|path| ModelArg { model: Some(path.clone()), model_option: None })
    }
}

/// `auto` or a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auto<T> {
    /// Computed.
    Auto,
    /// Given.
    Given(T),
}

impl<T> Auto<T> {
    /// The value, if given.
    pub fn given(self) -> Option<T> {
        match self {
            Auto::Auto => None,
            Auto::Given(v) => Some(v),
        }
    }
}

fn auto<T>(text: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Result<Auto<T>, String> {
    if text == "auto" { Ok(Auto::Auto) } else { parse(text).map(Auto::Given) }
}

fn auto_size(text: &str) -> Result<Auto<u64>, String> {
    auto(text, parse_size)
}

fn auto_count(text: &str, min: usize, max: usize) -> Result<Auto<usize>, String> {
    auto(text, |t| match t.parse() {
        Ok(n) if (min..=max).contains(&n) => Ok(n),
        _ => Err(format!("auto or a number from {min} to {max} was expected")),
    })
}

fn auto_buffers(text: &str) -> Result<Auto<usize>, String> {
    // A variable of the environment that is empty says nothing.
    if text.is_empty() { Ok(Auto::Auto) } else { auto_count(text, 2, BUFFERS_MAX) }
}

fn auto_ctx(text: &str) -> Result<Auto<usize>, String> {
    auto_count(text, 0, 1 << 30)
}

/// Threads: -1 and 0 for all processors, as in llama.cpp.
fn auto_threads(text: &str) -> Result<Auto<usize>, String> {
    if text == "-1" {
        Ok(Auto::Auto)
    } else {
        auto_count(text, 0, 1024).map(|n| if n == Auto::Given(0) { Auto::Auto } else { n })
    }
}

/// A seed: -1 for one from the clock, as in llama.cpp.
fn auto_seed(text: &str) -> Result<Auto<u64>, String> {
    match text {
        "auto" | "-1" => Ok(Auto::Auto),
        other => other
            .parse()
            .map(Auto::Given)
            .map_err(|_| "auto, -1 (both from the clock) or a whole number from 0 was expected".into()),
    }
}

/// A whole number.
pub(super) fn count(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| "a whole number from 0 was expected".into())
}

/// A whole number; all for one below 0.
pub(super) fn count_or_all(text: &str) -> Result<usize, String> {
    match text.parse::<i64>() {
        Ok(n) => Ok(usize::try_from(n).unwrap_or(usize::MAX)),
        Err(_) => Err("a whole number, or -1 for all, was expected".into()),
    }
}

/// How many of the most likely tokens are kept: 0 for all, as for every number below it.
fn top_k(text: &str) -> Result<usize, String> {
    match text.parse::<i64>() {
        Ok(n) => Ok(usize::try_from(n).unwrap_or(0)),
        Err(_) => Err("a whole number was expected; 0 or less keeps all".into()),
    }
}

/// A text that is not empty.
pub(super) fn stop_text(text: &str) -> Result<String, String> {
    match text.is_empty() {
        true => {
            Err("an empty text is found before the first token, so nothing would be generated; a text was expected"
                .into())
        }
        false => Ok(text.to_owned()),
    }
}

/// A type that matrices can be requantised to.
pub(super) fn requant(text: &str) -> Result<TensorType, String> {
    let found = quantise::TYPES.iter().copied().find(|ty| ty.name().eq_ignore_ascii_case(text));
    found.ok_or_else(|| {
        let all = quantise::TYPES.iter().map(|ty| ty.name().to_lowercase()).collect::<Vec<_>>().join(", ");
        format!("one of {all} was expected")
    })
}

fn tiers(text: &str) -> Result<Tiers, String> {
    text.parse()
}

fn slices(text: &str) -> Result<Slices, String> {
    let percent =
        |text: &str| text.strip_suffix('%').unwrap_or(text).parse::<u32>().ok().filter(|n| (1..100).contains(n));
    match text {
        "auto" => Ok(Slices::Auto),
        "off" => Ok(Slices::Off),
        _ => match percent(text) {
            Some(n) => Ok(Slices::Of((n * SLICE_PARTS + 50) / 100)),
            None => Err("auto, off, or the percent of each part that are for processors, 1 to 99".into()),
        },
    }
}

/// Where operations run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendArg {
    /// The best that is there.
    Auto,
    /// Processors.
    Cpu,
    /// A GPU.
    Cuda,
}

/// What computes, a GPU or processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SiteArg {
    /// A GPU that can, with processors next to it where that is faster; else processors.
    Auto,
    /// A GPU alone.
    Gpu,
    /// Processors alone.
    Cpu,
    /// A GPU, and processors for all that rests in RAM and that they can compute there.
    Both,
}

/// Whether a GPU keeps experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExpertCacheArg {
    /// What is faster by the choices of earlier runs of the model, or of --routing; off where nothing is known.
    Auto,
    /// The experts that fit live in VRAM.
    Off,
    /// All live in RAM, and VRAM has slots for those of each layer that were chosen last.
    On,
}

/// Order of the tiers over the depth of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LayoutArg {
    /// In proportion all along.
    Interleaved,
    /// One tier after the other.
    Stacked,
}

/// How tier C is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReaderArg {
    /// VFIO for a drive that is bound; else io_uring, or a pread pool where it is refused.
    Auto,
    /// A drive bound to vfio-pci or fail.
    Vfio,
    /// io_uring or fail.
    #[value(name = "io_uring")]
    IoUring,
    /// A pool of threads that call pread.
    Pread,
}

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(non_camel_case_types, reason = "the type has ggml's name")]
pub enum KvArg {
    /// Half precision.
    F16,
    /// Single precision.
    F32,
    /// Bytes, 32 with a scale in half precision: about half of f16, on processors only.
    #[value(name = "q8_0")]
    Q8_0,
}

/// Where weights live and how they move.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Placement")]
pub struct Placement {
    /// Where operations run; auto is a GPU that can, else processors.
    #[arg(long, value_enum, default_value = "auto")]
    pub backend: BackendArg,
    /// What computes. auto is a GPU, and processors next to it compute feed-forward parts and experts where they lie in RAM, while
    /// generating, as many as rates of `nt probe` make fastest; or processors alone where no GPU can.
    #[arg(long, value_enum, default_value = "auto")]
    pub site: SiteArg,
    /// Threads that compute on processors, 1 to 1024; auto (also 0 and -1) is all processors of this process.
    #[arg(long, short = 't', value_name = "auto|N", default_value = "auto", value_parser = auto_threads)]
    pub threads: Auto<usize>,
    /// RAM that weights may take, resident and staging together, and where no GPU computes the KV cache and
    /// workspace too: bytes, or with a unit as 14GiB or 500MB. auto is what is available less 4 GiB or 15 % of RAM,
    /// whichever is more, but at least a quarter of it, and at most three quarters of what cgroups and limits
    /// (ulimit -v, -d) leave where that is less.
    #[arg(long, value_name = "SIZE", default_value = "auto", value_parser = auto_size)]
    pub ram: Auto<u64>,
    /// VRAM to use, weights, KV cache and the rest together: bytes, or with a unit as 14GiB or 500MB. auto is what
    /// is free less 512 MiB, or less a sixteenth if that is less.
    #[arg(long, value_name = "SIZE", default_value = "auto", value_parser = auto_size)]
    pub vram: Auto<u64>,
    /// Where tier C is read: none, auto (where the model lies), a drive (nvme1n1, a PCI address or a
    /// path below /dev), or a directory or file that holds a copy of the model. Of several between
    /// commas, each holds a copy, and reads are dealt over them.
    #[arg(long, value_name = "none|auto|PLACE[,PLACE]…", default_value = "auto")]
    pub tier_c: String,
    /// How tier C is read; auto takes the fastest way that is open.
    #[arg(long, value_enum, default_value = "auto")]
    pub reader: ReaderArg,
    /// Compare every read with the checksums that `nt device extents` or `nt stage` recorded (default: only the
    /// first read from a bound drive).
    #[arg(long)]
    pub verify: bool,
    /// Type of the KV cache (default: f16; f32 for `nt logits`; that of --plan, where one is given). q8_0 takes about half of f16, on processors, and heads whose size is
    /// a multiple of 32.
    #[arg(long, value_enum)]
    pub kv: Option<KvArg>,
    /// Buffers of the ring, 2 to 64, each as large as the largest unit that moves, with a smaller slot for attention
    /// parts where they move too. auto is 3 (2 where there is no room), or by simulation where `nt probe` has measured
    /// the links.
    #[arg(long, value_name = "auto|N", default_value = "auto", env = "NT_PIPELINE_DEPTH", value_parser = auto_buffers)]
    pub n_buffers: Auto<usize>,
    /// What VRAM that is left holds of a mixture of experts whose experts fit in RAM: some of them always, or those of each layer
    /// that were chosen last. Models that were trained choose the same ones again soon, so that on is faster; with random weights
    /// off is.
    #[arg(long, value_enum, default_value = "auto")]
    pub expert_cache: ExpertCacheArg,
    /// Whether feed-forward parts of dense blocks are cut in two where not all fits in VRAM, so that the GPU and processors next to it
    /// compute each at once: where that is faster by the rates that `nt probe memory link` has measured, or not, or with so many percent
    /// of each for processors, if all fits in VRAM and RAM.
    #[arg(long, value_name = "auto|off|PERCENT", default_value = "auto", value_parser = slices)]
    pub ffn_slices: Slices,
    /// Counts of blocks in VRAM, RAM and storage; the plan chooses which (default: as many as fit in VRAM, then in
    /// RAM).
    #[arg(long, value_name = "A:B:C", value_parser = tiers)]
    pub tiers: Option<Tiers>,
    /// How `--tiers` lays tiers out over the depth of the model: interleaved keeps all links busy at
    /// once, stacked is for comparison.
    #[arg(long, value_enum, default_value = "interleaved", requires = "tiers")]
    pub layout: LayoutArg,
    /// Compute at one site only, so that results have the same bits wherever units live.
    #[arg(long)]
    pub exact: bool,
    /// Make a plan again, by the id that reports and `nt plan` give or a file of `nt plan --save`: the same sites compute, so that
    /// results have the same bits, where --kv and what overrides the file's keys are the same too. What does not fit this model or machine is refused.
    #[arg(
        long,
        value_name = "ID|FILE",
        conflicts_with_all = ["vram", "ram", "tiers", "layout", "site", "exact", "n_buffers", "expert_cache", "ffn_slices", "batch"]
    )]
    pub plan: Option<String>,
    /// Positions (tokens) that the KV cache holds. auto is what the prompt and the tokens to generate need; 4096 for
    /// `nt chat` and `nt plan`, 512 for `nt perplexity`; no more than the model was trained on. 0 is what it was trained on.
    #[arg(long, short = 'c', alias = "ctx-size", value_name = "auto|N", default_value = "auto", value_parser = auto_ctx)]
    pub ctx: Auto<usize>,
    /// Keep all positions of layers whose windows hide all but the last ones, as of other layers. It takes more memory for long
    /// contexts, and lets a conversation go back anywhere without its prompt being computed again.
    #[arg(long)]
    pub swa_full: bool,
    /// Tokens of the prompt that a pass evaluates at once, 1 to 4096 (default: as the plan finds best, 512 or more): each pass brings
    /// or reads all weights once, so that more take less time for a long prompt, and more memory. The text is the same for any
    /// number.
    #[arg(
        long,
        short = 'b',
        visible_alias = "ubatch-size",
        alias = "batch-size",
        value_name = "N",
        value_parser = batch
    )]
    pub batch: Option<u16>,
    /// Requantise matrices with more bits to TYPE while they are loaded, so that more of the model fits and less is carried: q8_0,
    /// q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, iq4_nl or mxfp4. What is read from storage stays as the file has it
    /// (`nt stage --requant` makes a drive with smaller ones); `nt perplexity --kl` says how much a text's probabilities change.
    #[arg(long, value_name = "TYPE", value_parser = requant)]
    pub requant: Option<TensorType>,
    /// The same as `--requant q4_k`.
    #[arg(long, hide = true, conflicts_with = "requant")]
    pub requant_q4k: bool,
    /// Ask an Ollama on this machine (OLLAMA_HOST, or 127.0.0.1:11434) to unload its models first.
    #[arg(long)]
    pub evict_ollama: bool,
    /// Write a timeline of reads and computes, which ui.perfetto.dev opens.
    #[arg(long, value_name = "FILE")]
    pub timeline: Option<PathBuf>,
    /// Metadata in place of the file's.
    #[command(flatten)]
    pub overrides: OverrideArgs,
}

impl Placement {
    /// The type that `--requant` asks for.
    pub fn requant(&self) -> Option<TensorType> {
        self.requant.or(self.requant_q4k.then_some(TensorType::Q4_K))
    }

    /// `--ctx`, where 0 stands for the positions that the model was trained on.
    pub fn ctx(&self, hparams: &HParams) -> Auto<usize> {
        match self.ctx {
            Auto::Given(0) => Auto::Given(hparams.n_ctx_train),
            other => other,
        }
    }
}

/// Scaling of rotary frequencies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RopeScalingArg {
    /// As trained.
    None,
    /// Positions divided by the factor.
    Linear,
    /// YaRN.
    Yarn,
}

/// Metadata in place of the file's.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Metadata")]
pub struct OverrideArgs {
    /// Take VALUE for the metadata key KEY in place of the file's; TYPE is int, float, bool or str (repeat for
    /// more).
    #[arg(long, value_name = "KEY=TYPE:VALUE")]
    pub override_kv: Vec<String>,
    /// Scaling of rotary frequencies, for contexts longer than trained (default: as the file says).
    #[arg(long, value_enum)]
    pub rope_scaling: Option<RopeScalingArg>,
    /// The context is this many times longer than trained.
    #[arg(long, alias = "rope-scale", value_name = "FACTOR", value_parser = positive)]
    pub rope_factor: Option<f32>,
    /// Positions that the model was trained on before scaling (default: as the file says).
    #[arg(long, alias = "yarn-orig-ctx", value_name = "N", value_parser = positions)]
    pub rope_orig_ctx: Option<u32>,
    /// Base of the rotary frequencies (default: as the file says).
    #[arg(long, value_name = "BASE", value_parser = positive)]
    pub rope_freq_base: Option<f32>,
    /// Factor of the rotary frequencies: 1 / `--rope-factor`.
    #[arg(long, value_name = "SCALE", value_parser = positive, conflicts_with = "rope_factor")]
    pub rope_freq_scale: Option<f32>,
}

/// A number, with or without a fraction.
fn number(text: &str) -> Result<f32, String> {
    text.parse().map_err(|_| "a number was expected".into())
}

/// A whole number of a range.
pub(super) fn within<T: std::str::FromStr + PartialOrd + std::fmt::Display>(
    text: &str,
    from: T,
    to: T,
) -> Result<T, String> {
    let number = text.parse::<T>().ok().filter(|n| (&from..=&to).contains(&n));
    number.ok_or_else(|| format!("a whole number from {from} to {to} was expected"))
}

fn batch(text: &str) -> Result<u16, String> {
    within(text, 1, Options::MAX_BATCH as u16)
}

fn positions(text: &str) -> Result<u32, String> {
    within(text, 1, 1 << 30)
}

fn positive(text: &str) -> Result<f32, String> {
    let number = text.parse::<f32>().ok().filter(|v| v.is_finite() && *v > 0.0);
    number.ok_or_else(|| "a number above 0 was expected".into())
}

/// One `KEY=TYPE:VALUE`.
fn override_kv(text: &str) -> Result<(String, Value), String> {
    let form = || format!("--override-kv {text}: KEY=TYPE:VALUE was expected, TYPE one of int, float, bool, str");
    let (key, rest) = text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or_else(form)?;
    let (ty, value) = rest.split_once(':').ok_or_else(form)?;
    let value = match ty {
        "int" => value.parse().ok().map(Value::Int),
        "float" => value.parse().ok().map(Value::Float),
        "bool" => value.parse().ok().map(Value::Bool),
        "str" => Some(Value::Str(value.to_owned())),
        _ => return Err(form()),
    };
    value.map(|v| (key.to_owned(), v)).ok_or_else(|| format!("--override-kv {text}: the value is no {ty}"))
}

impl OverrideArgs {
    /// What is to stand in place of the file's metadata.
    pub fn overrides(&self) -> Result<Overrides, super::Failure> {
        let values = self.override_kv.iter().map(|t| override_kv(t)).collect::<Result<_, _>>();
        Ok(Overrides {
            values: values.map_err(super::Failure::usage)?,
            rope_type: self.rope_scaling.map(|s| match s {
                RopeScalingArg::None => RopeType::None,
                RopeScalingArg::Linear => RopeType::Linear,
                RopeScalingArg::Yarn => RopeType::Yarn,
            }),
            rope_factor: self.rope_factor.or(self.rope_freq_scale.map(|s| 1.0 / s)),
            rope_orig_ctx: self.rope_orig_ctx.map(|n| n as usize),
            rope_base: self.rope_freq_base,
        })
    }

    /// Writes it into a header's metadata; what nothing reads is warned of.
    pub fn apply(&self, metadata: &mut Metadata) -> Result<(), super::Failure> {
        for line in self.overrides()?.apply(metadata).map_err(super::Failure::usage)? {
            tracing::warn!("{line}");
        }
        Ok(())
    }
}

/// How tokens are drawn. What is not given is as the file advises (`general.sampling.*`), or llama.cpp's default.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct Sampling {
    /// Temperature, up to 100; 0 or less takes the most likely token [default: the file's, or 0.8].
    #[arg(long, alias = "temperature", value_name = "X", value_parser = number)]
    pub temp: Option<f32>,
    /// Keep this many of the most likely tokens; 0 or less keeps all [default: the file's, or 40].
    #[arg(long, value_name = "N", value_parser = top_k)]
    pub top_k: Option<usize>,
    /// Keep the most likely tokens up to this probability mass, 0 to 1; 1 keeps all [default: the file's, or 0.95].
    #[arg(long, value_name = "P", value_parser = number)]
    pub top_p: Option<f32>,
    /// Keep tokens at least this likely relative to the likeliest, 0 to 1; 0 keeps all [default: the file's, or 0.05].
    #[arg(long, value_name = "P", value_parser = number)]
    pub min_p: Option<f32>,
    /// Locally typical sampling: keep the tokens whose surprise is nearest the expected one, up to this probability
    /// mass, 0 to 1; 1 keeps all.
    #[arg(long, alias = "typical-p", value_name = "P", default_value_t = 1.0, value_parser = number)]
    pub typical: f32,
    /// Keep tokens whose logits lie at most this many standard deviations below the largest; -1 keeps all.
    #[arg(long, alias = "top-nsigma", value_name = "N", default_value_t = -1.0, value_parser = number)]
    pub top_n_sigma: f32,
    /// XTC: with this probability, 0 to 1, drop all tokens above the threshold but the least likely of them; 0 is off
    /// [default: the file's, or 0].
    #[arg(long, value_name = "P", value_parser = number)]
    pub xtc_probability: Option<f32>,
    /// XTC: the probability from which a token counts, 0 to 1; above 0.5 is off [default: the file's, or 0.1].
    #[arg(long, value_name = "P", value_parser = number)]
    pub xtc_threshold: Option<f32>,
    /// Penalty for tokens among the last ones: their logits are divided by it where positive, else multiplied; 1 is
    /// off [default: the file's, or 1].
    #[arg(long, value_name = "X", value_parser = number)]
    pub repeat_penalty: Option<f32>,
    /// How many of the last tokens count for the repeat, presence and frequency penalties; -1 for the whole text, 0 is
    /// off [default: the file's, or 64].
    #[arg(long, value_name = "N", value_parser = last_n)]
    pub repeat_last_n: Option<usize>,
    /// Taken off the logit of each token among the last ones; 0 is off.
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = number)]
    pub presence_penalty: f32,
    /// Taken off the logit of each token among the last ones, for each time it occurs there; 0 is off.
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = number)]
    pub frequency_penalty: f32,
    /// DRY: penalty for a token that would go on with a sequence that occurred before, multiplier × base ^ (its length
    /// − allowed length); 0 is off.
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = number)]
    pub dry_multiplier: f32,
    /// DRY: what each further token of the sequence multiplies the penalty by, at least 1.
    #[arg(long, value_name = "X", default_value_t = 1.75, value_parser = number)]
    pub dry_base: f32,
    /// DRY: length in tokens up to which repeating a sequence is free.
    #[arg(long, value_name = "N", default_value = "2", value_parser = count)]
    pub dry_allowed_length: usize,
    /// DRY: how many of the last tokens are searched; -1 for the whole text, 0 is off.
    #[arg(long, value_name = "N", default_value = "64", value_parser = last_n)]
    pub dry_penalty_last_n: usize,
    /// DRY: a text over which no repetition reaches (repeat for more; \n and \t are read as such). The first one
    /// replaces the default ones, a newline, `:`, `"` and `*`; none stands for no text at all.
    #[arg(long, value_name = "TEXT")]
    pub dry_sequence_breaker: Vec<String>,
    /// Add X to the logit of a token (repeat for more); ID+X and ID-X are read too, and -inf never draws it. `nt
    /// tokenize` prints ids.
    #[arg(short = 'l', long, value_name = "ID:X", value_parser = logit_bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Never draw a token that ends the text, so that only the number of tokens, a stop text or the context does.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Seed of the drawing, a whole number; auto (also -1) is one from the clock.
    #[arg(short, long, value_name = "auto|S", default_value = "auto", value_parser = auto_seed)]
    pub seed: Auto<u64>,
}

impl Sampling {
    /// The sampler's parameters for a file, and what it advises in vain as warnings.
    pub fn params_for(&self, metadata: &Metadata) -> Result<(SamplerParams, Vec<String>), super::Failure> {
        let (advised, notes) = SamplerParams::advised(metadata);
        Ok((self.params(&advised)?, notes))
    }

    /// The sampler's parameters, those of `default` where nothing is given, or what is wrong with them.
    pub fn params(&self, default: &SamplerParams) -> Result<SamplerParams, super::Failure> {
        let in_range = |name: &str, v: f32, from: f32, to: f32| {
            let expected = match from == f32::MIN_POSITIVE {
                true => format!("a number above 0 and up to {to}"),
                false => format!("{from} to {to}"),
            };
            let wrong = || super::Failure::usage(format!("{name} {v} is out of range; {expected} was expected"));
            if (from..=to).contains(&v) { Ok(v) } else { Err(wrong()) }
        };
        let d = default;
        let clock = || std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_nanos() as u64);
        Ok(SamplerParams {
            temp: in_range("--temp", self.temp.unwrap_or(d.temp), -100.0, 100.0)?.max(0.0),
            top_k: self.top_k.unwrap_or(d.top_k),
            top_p: in_range("--top-p", self.top_p.unwrap_or(d.top_p), 0.0, 1.0)?,
            min_p: in_range("--min-p", self.min_p.unwrap_or(d.min_p), 0.0, 1.0)?,
            typical: in_range("--typical", self.typical, 0.0, 1.0)?,
            top_n_sigma: in_range("--top-n-sigma", self.top_n_sigma, -1.0, 1000.0)?,
            xtc_probability: in_range(
                "--xtc-probability",
                self.xtc_probability.unwrap_or(d.xtc_probability),
                0.0,
                1.0,
            )?,
            xtc_threshold: in_range("--xtc-threshold", self.xtc_threshold.unwrap_or(d.xtc_threshold), 0.0, 1.0)?,
            repeat_penalty: in_range(
                "--repeat-penalty",
                self.repeat_penalty.unwrap_or(d.repeat_penalty),
                f32::MIN_POSITIVE,
                1e6,
            )?,
            presence_penalty: in_range("--presence-penalty", self.presence_penalty, -1e6, 1e6)?,
            frequency_penalty: in_range("--frequency-penalty", self.frequency_penalty, -1e6, 1e6)?,
            repeat_last_n: self.repeat_last_n.unwrap_or(d.repeat_last_n),
            dry: self.dry(in_range)?,
            logit_bias: self.logit_bias.clone(),
            ignore_eos: self.ignore_eos,
            ends: Vec::new(),
            min_tokens: 0,
            seed: self.seed.given().unwrap_or_else(clock),
            grammar: None,
            thought: None,
        })
    }

    /// Checks the biases that were given against a vocabulary of `n_vocab` tokens, and that each token's have a sum.
    pub fn check(&self, n_vocab: usize) -> Result<(), super::Failure> {
        let sum = |id: u32| self.logit_bias.iter().filter(|b| b.0 == id).map(|b| b.1).sum::<f32>();
        if let Some((id, _)) = self.logit_bias.iter().find(|(id, x)| x.is_infinite() && sum(*id).is_nan()) {
            let what = format!("--logit-bias {id}: inf and -inf were given for that token; one of them was expected");
            return Err(super::Failure::usage(what));
        }
        match self.logit_bias.iter().find(|(id, _)| *id as usize >= n_vocab) {
            None => Ok(()),
            Some((id, _)) => Err(super::Failure::usage(format!(
                "--logit-bias {id}: the model has {n_vocab} tokens, so an id from 0 to {} was expected",
                n_vocab.saturating_sub(1)
            ))),
        }
    }

    fn dry(
        &self,
        in_range: impl Fn(&str, f32, f32, f32) -> Result<f32, super::Failure>,
    ) -> Result<DryParams, super::Failure> {
        let given = &self.dry_sequence_breaker;
        Ok(DryParams {
            multiplier: in_range("--dry-multiplier", self.dry_multiplier, 0.0, 1e6)?,
            base: in_range("--dry-base", self.dry_base, 1.0, 1e6)?,
            allowed_length: self.dry_allowed_length,
            last_n: self.dry_penalty_last_n,
            breakers: match given.is_empty() {
                true => DryParams::default().breakers,
                false => given.iter().filter(|b| *b != "none").map(|b| unescaped(b)).collect(),
            },
        })
    }
}

/// A number of tokens to generate: -1 (or -2, as llama.cpp has it) until the context is full.
pub(super) fn n_predict(text: &str) -> Result<usize, String> {
    let expected = "a number of tokens, or -1 until the context is full, was expected";
    match text.parse::<i64>() {
        Ok(-1 | -2) => Ok(usize::MAX),
        Ok(n) => usize::try_from(n).map_err(|_| expected.to_owned()),
        Err(_) => Err(expected.to_owned()),
    }
}

/// A number of last tokens: -1 for all.
fn last_n(text: &str) -> Result<usize, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(usize::MAX),
        Ok(n) if n >= 0 => usize::try_from(n).map_err(|e| e.to_string()),
        _ => Err("a number of tokens, or -1 for the whole text, was expected".to_owned()),
    }
}

/// `ID:X`, `ID+X` or `ID-X`.
fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    let split = || {
        let at = text.find(|c: char| !c.is_ascii_digit())?;
        let (id, rest) = text.split_at(at);
        let x: f32 = rest.strip_prefix(':').unwrap_or(rest).parse().ok()?;
        (rest.starts_with([':', '+', '-']) && !x.is_nan()).then_some((id.parse().ok()?, x))
    };
    split().ok_or_else(|| "ID:X, ID+X or ID-X was expected, as 15043:-1.5 or 2:-inf".to_owned())
}

/// A text with the escapes of C's strings that texts of tokens need.
fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, chars.as_str().chars().next()) {
            ('\\', Some(e @ ('n' | 't' | 'r' | '\\' | '"' | '\''))) => {
                chars.next();
                out.push(match e {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    other => other,
                });
            }
            _ => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_is_read_as_llama_cpp_writes_it_too() {
        assert_eq!(logit_bias("15043:-1.5"), Ok((15043, -1.5)));
        assert_eq!(logit_bias("15043+1"), Ok((15043, 1.0)));
        assert_eq!(logit_bias("2-inf"), Ok((2, f32::NEG_INFINITY)));
        for wrong in ["", "5", ":1", "5:", "5:nan", "a:1", "-1:2", "5=1", "99999999999:1"] {
            assert!(logit_bias(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn counts_below_zero_mean_all() {
        assert_eq!((n_predict("-1"), n_predict("-2"), n_predict("7")), (Ok(usize::MAX), Ok(usize::MAX), Ok(7)));
        assert!(n_predict("-3").is_err() && n_predict("x").is_err() && last_n("-2").is_err());
        assert_eq!(last_n("-1"), Ok(usize::MAX));
    }

    #[test]
    fn escapes_are_those_of_c() {
        assert_eq!(unescaped(r#"a\n\t\\\"\x"#), "a\n\t\\\"\\x");
    }
}
