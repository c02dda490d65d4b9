//! `nt stage`: writes a model to a spare drive, which then holds nothing else.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{Failure, ModelArg, interrupt};
use crate::engine::{self, SmallerFile};
use crate::gguf::TensorType;
use crate::machine;
use crate::storage::bind;
use crate::storage::guard::{Allowlist, Host, allowlist};
use crate::storage::image::{Content, ImageError, Source, Staging, Steps};
use crate::storage::library::{Library, Recorded};
use crate::storage::source;

/// Arguments of `nt stage`.
#[derive(Debug, Args)]
pub struct StageArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// The drive: nvme1n1, a PCI address or a path below /dev
    #[arg(long, value_name = "DEVICE")]
    tier_c: String,
    /// Yes, everything on the drive will be lost; what nt did not write there itself must be listed in the drive's entry,
    /// as in erase = ["ext4"]
    #[arg(long, required = true)]
    erase: bool,
    /// The drive's serial number, as proof that this drive is meant
    #[arg(long, value_name = "S")]
    serial: String,
    /// The drive's PCI address as well, where another drive may have the same serial number
    #[arg(long, value_name = "ADDRESS")]
    pci: Option<String>,
    /// Requantise matrices with more bits to TYPE (q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, iq4_nl or mxfp4) while they are
    /// written; the model is then called MODEL.TYPE
    #[arg(long, value_name = "TYPE", value_parser = super::args::requant)]
    requant: Option<TensorType>,
    /// The list of drives that may be used, a TOML file
    #[arg(long, default_value = allowlist::DEFAULT_PATH)]
    allow: PathBuf,
}

/// Writes the model, reads it back, records it.
pub fn run(args: &StageArgs) -> Result<(), Failure> {
    let (gguf, sources) = source::model(args.model.path()).map_err(Failure::usage)?;
    match args.requant {
        None => {
            let starts: Vec<u64> = (0..sources.len()).map(|i| gguf.data_start(i)).collect();
            stage(args, &sources, &|i, source: &Source| source.head(starts[i]).map_err(|e| e.to_string()))
        }
        Some(ty) => {
            let files = engine::smaller_files(&gguf, sources, ty, machine::n_cpus()).map_err(super::codes::failure)?;
            stage(args, &files, &|_, file: &SmallerFile| Ok(file.header().to_vec()))
        }
    }
}

/// The first bytes of a file that is staged, up to the tensors' data.
type HeaderOf<'a, S> = &'a dyn Fn(usize, &S) -> Result<Vec<u8>, String>;

fn stage<S: Content>(args: &StageArgs, sources: &[S], header: HeaderOf<'_, S>) -> Result<(), Failure> {
    interrupt::install_for_changes()?;
    let host = Host::default().until(interrupt::interrupted);
    let allowed = Allowlist::load(&args.allow);
    let claim = bind::claim_to_write(&host, &args.tier_c, &args.serial, args.pci.as_deref(), &allowed);
    let claim = claim.map_err(|e| if interrupt::interrupted() { untouched(args) } else { e.into() })?;
    let mut drive = claim.drive();
    let staging = Staging::plan(&mut drive, sources, &claim.identity(), &claim.partitions()).map_err(unplanned)?;
    claim.forget_partitions()?;
    claim.last_look(&host).map_err(|e| if interrupt::interrupted() { untouched(args) } else { e.into() })?;
    let bar = if std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        indicatif::ProgressBar::new(0)
    } else {
        indicatif::ProgressBar::hidden()
    };
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let steps = &mut Steps::new(&mut progress, &interrupt::interrupted);
    let manifests = staging.write(&mut drive, steps);
    bar.finish_and_clear();
    claim.reread_partitions();
    let manifests = manifests.map_err(|e| unfinished(args, &e))?;
    let mut records = Vec::new();
    for (i, (manifest, source)) in manifests.into_iter().zip(sources).enumerate() {
        let saved = header(i, source).and_then(|header| Library::default().save(&Recorded { manifest, header }));
        records.push(saved.map_err(|why| unrecorded(args, source, &why))?);
    }
    // Whatever becomes of stdout, the drive is staged, and the user reads so.
    super::failure::say(&format!("staged; `sudo nt device bind {}` hands the drive to nt", args.tier_c));
    if let Some(Ok((name, _))) = sources.first().filter(|s| s.requant().is_some()).map(Content::names) {
        super::failure::say(&format!("the requantised model is `nt run {name} --tier-c {}`", args.tier_c));
    }
    records.iter().try_for_each(|record| super::report::print_line(&record.display().to_string())).map_err(unprinted)
}

/// The drive is staged and recorded; only the names of the records could not be written to stdout.
fn unprinted(e: Failure) -> Failure {
    let why = e.to_string();
    let why = if why.is_empty() { "stdout is closed".into() } else { why };
    Failure::running(format!("the model is staged and recorded; only the names of its records were not printed: {why}"))
}

/// Nothing was written yet.
fn unplanned(e: ImageError) -> Failure {
    match e {
        ImageError::TooLarge { .. } => Failure::limits(e),
        ImageError::Unfit { .. } => Failure::usage(e),
        e => Failure::running(e),
    }
}

fn untouched(args: &StageArgs) -> Failure {
    Failure::stopped(format!("staging was interrupted before anything was written to drive {}", args.serial))
}

/// The drive is whole; only the record on this machine is not.
fn unrecorded(args: &StageArgs, source: &impl Content, why: &str) -> Failure {
    Failure::running(format!(
        "the model is staged: drive {} holds it, read back and compared; but {} could not be recorded on this machine: {why}; without the record, `nt run NAME --tier-c {}` still finds the model on the drive itself",
        args.serial,
        source.path().display(),
        args.tier_c
    ))
}

/// What became of the drive, and the command that stages it again.
fn unfinished(args: &StageArgs, e: &ImageError) -> Failure {
    let quoted = |text: &str| match text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:=+,".contains(c)) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    };
    let mut again = format!(
        "nt stage {} --tier-c {} --erase --serial {}",
        quoted(&args.model.path().display().to_string()),
        quoted(&args.tier_c),
        quoted(&args.serial)
    );
    if let Some(ty) = args.requant {
        again += &format!(" --requant {}", ty.name().to_lowercase());
    }
    if let Some(pci) = &args.pci {
        again += &format!(" --pci {}", quoted(pci));
    }
    if args.allow != Path::new(allowlist::DEFAULT_PATH) {
        again += &format!(" --allow {}", quoted(&args.allow.display().to_string()));
    }
    match e {
        ImageError::Stopped => untouched(args),
        ImageError::Erased(why) => {
            let why = match &**why {
                ImageError::Stopped => "staging was interrupted".to_owned(),
                why => why.to_string(),
            };
            let text = format!(
                "{why}; drive {} now holds neither a model nor what was on it before; stage it again with: {again}",
                args.serial
            );
            if interrupt::interrupted() { Failure::stopped(text) } else { Failure::running(text) }
        }
        e => Failure::running(e),
    }
}
