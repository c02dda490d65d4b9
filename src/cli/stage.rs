//! `nt stage`: writes a model to a spare drive, which then holds nothing else.

use std::path::PathBuf;

use clap::Args;

use super::{Failure, ModelArg};
use crate::gguf::Gguf;
use crate::storage::bind;
use crate::storage::guard::{Allowlist, Host, allowlist};
use crate::storage::image;
use crate::storage::library::{Library, Recorded};

/// Arguments of `nt stage`.
#[derive(Debug, Args)]
pub struct StageArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// The drive: nvme1n1, a PCI address or a path below /dev
    #[arg(long, value_name = "DEVICE")]
    tier_c: String,
    /// Yes, everything on the drive will be lost
    #[arg(long, required = true)]
    erase: bool,
    /// The drive's serial number, as proof that this drive is meant
    #[arg(long, value_name = "S")]
    serial: String,
    /// The drive's PCI address as well, where another drive may have the same serial number
    #[arg(long, value_name = "ADDRESS")]
    pci: Option<String>,
    /// The list of drives that may be used, a TOML file
    #[arg(long, default_value = allowlist::DEFAULT_PATH)]
    allow: PathBuf,
}

/// Writes the model, reads it back, records it.
pub fn run(args: &StageArgs) -> Result<(), Failure> {
    let gguf = Gguf::open(args.model.path()).map_err(Failure::usage)?;
    let files: Vec<PathBuf> = gguf.shards.iter().map(|s| s.path.clone()).collect();
    let host = Host::default();
    let claim =
        bind::claim_to_write(&host, &args.tier_c, &args.serial, args.pci.as_deref(), &Allowlist::load(&args.allow));
    let claim = claim?;
    let bar = if std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        indicatif::ProgressBar::new(0)
    } else {
        indicatif::ProgressBar::hidden()
    };
    let manifests = image::write(&claim.drive(), &files, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let manifests = manifests.map_err(Failure::running)?;
    claim.reread_partitions();
    for (i, manifest) in manifests.into_iter().enumerate() {
        let mut header = vec![0; gguf.data_start(i).min(manifest.size) as usize];
        std::fs::File::open(&manifest.path)
            .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut header))
            .map_err(|e| Failure::running(format!("{}: {e}", manifest.path.display())))?;
        let saved = Library::default().save(&Recorded { manifest, header }).map_err(Failure::running)?;
        super::report::print_line(&saved.display().to_string())?;
    }
    eprintln!("staged; to bind the drive, its entry needs holds = [\"gpt\", \"nt image\"]");
    Ok(())
}
