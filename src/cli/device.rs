//! `nt device`: which drives there are, which may be handed to nt and why not, hand one over, give
//! it back.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::printable::printable;
use super::report::print_line;
use super::{Failure, interrupt};
use crate::storage::bind::{self, Bound, DeviceError, Machine, Running, Standing, State};
use crate::storage::guard::claim::{self, Claim};
use crate::storage::guard::{self, Allowlist, Controller, Host, Purpose, allowlist, sysfs};
use crate::storage::library::Library;
use crate::storage::{extents, health, safe, source};

/// Arguments of `nt device`.
#[derive(Debug, Args)]
pub struct DeviceArgs {
    #[command(subcommand)]
    command: Command,
    /// The list of drives that may be bound, a TOML file
    #[arg(long, global = true, default_value = allowlist::DEFAULT_PATH)]
    allow: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show every NVMe drive, whether it may be bound, its health, and the lines for the allowlist
    List,
    /// Say every reason against binding a drive; as root, claim it for a moment to be sure
    Check {
        /// nvme1n1, a PCI address, or a path below /dev
        device: String,
        /// Its PCI address as well, where another drive may have the same serial number
        #[arg(long, value_name = "ADDRESS")]
        pci: Option<String>,
    },
    /// Take a drive from the kernel (as root)
    Bind {
        /// nvme1n1, a PCI address, or a path below /dev
        device: String,
        /// Its PCI address as well, where another drive may have the same serial number
        #[arg(long, value_name = "ADDRESS")]
        pci: Option<String>,
        /// Claim the drive for a moment, print each step and write nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Give a drive back to the kernel, bound or half bound, recorded or not (as root)
    Release {
        /// Its name before it was bound, or its PCI address
        #[arg(required_unless_present = "pci")]
        device: Option<String>,
        /// Its PCI address, where the name is not known or fits several drives
        #[arg(long, value_name = "ADDRESS")]
        pci: Option<String>,
        /// Print each step and write nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Record where a model's files lie on their drive, with checksums, for reading them by block later
    Extents {
        /// A GGUF file (or the first of several) on ext4 or XFS on an NVMe drive
        model: PathBuf,
        /// Write the manifest of this one file there, whatever it is; - is stdout
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

/// Runs `nt device`. Results go to stdout, steps to stderr.
///
/// # Errors
/// See [`DeviceError`]; a refusal is exit code 3.
pub fn run(args: DeviceArgs) -> Result<(), Failure> {
    let host = Host::default().until(interrupt::interrupted);
    let allowed = Allowlist::load(&args.allow);
    let kernel = Running::default();
    let machine = Machine { host: &host, kernel: &kernel, stopped: &interrupt::interrupted };
    // What a drive says of itself is in these lines.
    let mut say = |line: &str| super::failure::say(&printable(line));
    match args.command {
        Command::List => list(&host, &allowed)?,
        Command::Check { device, pci } => check(&host, &device, pci.as_deref(), &allowed)?,
        Command::Bind { device, pci, dry_run } => {
            interrupt::install_for_changes()?;
            machine.bind(&device, pci.as_deref(), &allowed, dry_run, &mut say)?;
        }
        Command::Release { device, pci, dry_run } => {
            interrupt::install_for_changes()?;
            machine.release(device.as_deref(), pci.as_deref(), dry_run, &mut say)?;
        }
        Command::Extents { model, output: Some(output) } => write_manifest(&host, &model, &output)?,
        Command::Extents { model, output: None } => record(&host, &model)?,
    }
    Ok(())
}

/// Writes one file's manifest where the user says.
fn write_manifest(host: &Host, model: &Path, output: &Path) -> Result<(), Failure> {
    let manifest = extents::manifest(host, model)?;
    let fail = |why: String| step(format!("writing {}", output.display()), why);
    let text = serde_json::to_string(&manifest).map_err(|e| fail(e.to_string()))?;
    if output.as_os_str() == "-" {
        return print_line(&text);
    }
    // A link of somebody else's is replaced and not followed.
    if output.symlink_metadata().is_ok_and(|m| !m.is_file() && !m.is_symlink()) {
        return Err(fail("it is no regular file; -o - writes to stdout".into()).into());
    }
    safe::replace(output, text.as_bytes(), 0o644, ".nt-").map_err(|e| fail(e.to_string()).into())
}

fn step(step: String, why: impl ToString) -> DeviceError {
    DeviceError::Step { step, why: why.to_string() }
}

/// Records every file of a model, so that `nt run NAME --tier-c DRIVE` can read it without its file
/// system.
fn record(host: &Host, model: &Path) -> Result<(), Failure> {
    let (gguf, sources) = source::model(model).map_err(|e| step("reading the model".into(), e))?;
    for (i, file) in sources.iter().enumerate() {
        let recorded = extents::record(host, file, gguf.data_start(i))?;
        let saved = Library::default().save(&recorded);
        print_line(&saved.map_err(|e| step("recording the model".into(), e))?.display().to_string())?;
    }
    Ok(())
}

/// Prints one line of results, whatever a drive's serial number or model would make of it.
fn line(text: &str) -> Result<(), Failure> {
    print_line(&text.replace('\n', "\\n"))
}

fn controllers(host: &Host) -> Result<Vec<Controller>, DeviceError> {
    sysfs::controllers(host).map_err(|e| DeviceError::Step { step: "reading the drives".into(), why: e.to_string() })
}

/// Says every reason against binding a drive; without one, claims it for a moment as the last question.
fn check(host: &Host, name: &str, pci: Option<&str>, allowed: &Result<Allowlist, String>) -> Result<(), Failure> {
    let all = controllers(host)?;
    let drive = sysfs::find(host, &all, name).ok_or_else(|| DeviceError::NotFound(name.into()))?;
    let reasons = bind::judge(host, &all, drive, allowed, pci, Purpose::Read);
    let claimed = if reasons.is_empty() { claim::moment(host, drive) } else { Claim::NotTried };
    match claimed {
        Claim::Made(time) => {
            line(&format!("{name}: {} {} at {} may be bound", drive.model, drive.serial, drive.bdf))?;
            line(&format!("  claimed and let go after {} µs: nobody else claims it", time.as_micros()))
        }
        Claim::Refused(reasons) => Err(DeviceError::Refused { name: name.into(), reasons }.into()),
        Claim::NotAllowed | Claim::NotTried => {
            if !nix::unistd::geteuid().is_root() {
                line(&format!("{name}: not claimed: run as root"))?;
            }
            if reasons.is_empty() {
                return line(&format!("{name}: {} {} at {}: no reason found", drive.model, drive.serial, drive.bdf));
            }
            Err(DeviceError::Refused { name: name.into(), reasons }.into())
        }
    }
}

fn list(host: &Host, allowed: &Result<Allowlist, String>) -> Result<(), Failure> {
    let all = controllers(host)?;
    if all.is_empty() {
        line("no NVMe drive was found on the PCI bus")?;
    }
    let records = bind::records(host);
    for drive in &all {
        match records.iter().find(|r| r.pci == drive.bdf) {
            Some(r) if r.standing(host) == Standing::Holds => list_recorded(host, drive, r)?,
            stale => {
                if let Some(r) = stale {
                    line(&format!("{} has a stale record of {} ({})", r.pci, r.shown(), r.standing(host)))?;
                }
                list_free(host, &all, drive, allowed)?;
            }
        }
    }
    for pci in bind::damaged_records(host) {
        line(&format!(
            "{pci} has a record of nt's that is damaged; `sudo nt device release --pci {pci}` gives the drive back and removes it"
        ))?;
    }
    for r in records.iter().filter(|r| !all.iter().any(|d| d.bdf == r.pci)) {
        line(&format!(
            "{} has a stale record of {} ({}); `sudo nt device release --pci {0}` removes it",
            r.pci,
            r.shown(),
            r.standing(host)
        ))?;
    }
    Ok(())
}

/// A drive that nt has bound, or half so.
fn list_recorded(host: &Host, drive: &Controller, r: &Bound) -> Result<(), Failure> {
    if r.state != State::Bound || drive.driver.as_deref() != Some("vfio-pci") {
        let held = drive.driver.as_deref().unwrap_or("no driver");
        line(&format!("{} {} with {held} (was {}): {}", r.pci, r.shown(), r.controller, r.progress(host)))?;
        return line(&format!("  put it back with `sudo nt device release --pci {}`", r.pci));
    }
    line(&format!("{} {} bound to vfio-pci (was {})", r.pci, r.shown(), r.controller))?;
    if bind::is_handed_over(host, r) == Some(false) {
        line(&format!(
            "  its node /dev/vfio/{} is not group {}'s, so only root can use the drive (was the bind cut off?); `sudo nt device release --pci {}`, then bind it again",
            r.group,
            bind::GROUP,
            r.pci
        ))?;
    }
    match health::of_bound(host, r) {
        Ok(health) => line(&format!("  health: {health}")),
        Err(why) => line(&format!("  health: {why}")),
    }
}

/// A drive that is not nt's.
fn list_free(
    host: &Host,
    all: &[Controller],
    drive: &Controller,
    allowed: &Result<Allowlist, String>,
) -> Result<(), Failure> {
    let hidden = drive.hidden.iter().map(|h| h.name.as_str()).filter(|name| drive.name.as_deref() != Some(name));
    let names: Vec<_> = drive.namespaces.iter().map(|n| n.whole.name.as_str()).chain(hidden).collect();
    line(&format!("{} {} {} {}", drive.bdf, names.join(","), drive.model, drive.serial))?;
    if drive.name.is_some() {
        let (Ok(said) | Err(said)) = health::of_kernel(host, drive);
        line(&format!("  health: {said}"))?;
    }
    let reasons = guard::examine(host, all, drive, allowed, Purpose::Read);
    if reasons.is_empty() {
        line("  no reason against it was found (`nt device check` also claims it for a moment)")?;
    }
    for reason in &reasons {
        line(&format!("  not: {reason}"))?;
    }
    if drive.driver.is_none() {
        line(&format!("  no driver holds it; `sudo nt device release --pci {}` gives it to the kernel", drive.bdf))?;
    }
    if reasons.iter().any(|r| r.check == guard::Check::Allowlist) {
        line(&format!("  its lines for {}:", allowlist::DEFAULT_PATH))?;
        for namespace in &drive.namespaces {
            let entry = allowlist::Entry::of(drive, namespace);
            line("    [[drive]]")?;
            for text in toml::to_string(&entry).unwrap_or_default().lines() {
                line(&format!("    {text}"))?;
            }
        }
    }
    Ok(())
}
