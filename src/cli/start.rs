//! How commands start a session, evaluate with it and stop.

use std::path::Path;

use super::codes::{failure, refusal};
use super::failure::say;
use super::options::named_places;
use super::{Failure, ModelArg, Placement, interrupt, outputs};
use crate::backend::cuda::Device;
use crate::backend::{BackendError, BackendKind, Class};
use crate::engine::{
    EngineError, LackError, Opened, Options, Session, Starting, choose_buffers, this_machine, with_batch,
};
use crate::machine::ollama::{self, Eviction};
use crate::machine::pressure::{self, Watch};
use crate::model::{ForwardError, Outputs};
use crate::storage::guard::Host;
/// Opens a model: header, tokenizer, structure.
pub(super) fn open(model: &ModelArg, placement: &Placement) -> Result<Opened, Failure> {
    let overrides = placement.overrides.overrides()?;
    let opened = Opened::open_from(model.path(), &named_places(placement)?, &overrides).map_err(failure)?;
    for w in opened.tokenizer.warnings().iter().chain(&opened.warnings) {
        tracing::warn!("{w}");
    }
    Ok(opened)
}

/// What is done before memory is taken: an Ollama is asked to make room where the user asks for it, and
/// memory is watched from here on; should the kernel have to kill, it takes this process first.
pub(super) fn prepare(p: &Placement) -> Watch {
    if p.evict_ollama {
        evict_ollama();
    }
    pressure::raise_oom_score(Path::new("/"));
    Watch::start(Path::new("/"))
}

/// Says on stderr what came of it. A run goes on either way: the plan takes what is free.
fn evict_ollama() {
    let host = std::env::var("OLLAMA_HOST").ok();
    match ollama::address(host.as_deref()).and_then(ollama::evict) {
        Ok(Eviction::Unloaded(names)) if names.is_empty() => say("Ollama has no model loaded"),
        Ok(Eviction::Unloaded(names)) => say(&format!("Ollama has unloaded {}", names.join(", "))),
        Ok(Eviction::NotThere(at)) => say(&format!("no Ollama answers at {at}; nothing to unload")),
        Ok(Eviction::StillLoaded(names)) => tracing::warn!("Ollama still holds {}", names.join(", ")),
        Err(e) => tracing::warn!("Ollama's models could not be unloaded: {e}"),
    }
}

/// Evaluates tokens of a class; SIGINT and a shortage of memory end it.
pub(super) fn evaluate(
    s: &mut Session,
    tokens: &[u32],
    class: Class,
    outputs: Outputs,
    watch: &Watch,
) -> Result<(), Failure> {
    s.eval(tokens, class, outputs, &|| to_stop(watch)).map_err(|e| stopped(e, watch))
}

/// Whether a signal or a shortage of memory asks the run to stop.
pub(super) fn to_stop(watch: &Watch) -> bool {
    interrupt::interrupted() || watch.tripped()
}

/// An engine's error with its exit code; if the watch of memory has interrupted the run, that of memory.
pub(super) fn stopped(e: EngineError, watch: &Watch) -> Failure {
    match (e, watch.reason()) {
        (EngineError::Forward(ForwardError::Interrupted), Some(why)) if !interrupt::interrupted() => {
            short_of_memory(&why)
        }
        (e, _) => failure(e),
    }
}

/// The failure of a run that its watch of memory has stopped.
pub(super) fn short_of_memory(reason: &str) -> Failure {
    Failure::running(format!(
        "stopped before memory ran out: {reason}; give a smaller --ram, or end what else takes memory"
    ))
}

/// Starts a session, with progress on a terminal and notes on stderr. A signal or a shortage of memory ends it.
pub(super) fn start(opened: &Opened, options: Options, progress: bool, watch: &Watch) -> Result<Session, Failure> {
    start_until(opened, options, progress, watch, &|| false)
}

/// The same; it ends as by a signal once `stop` says so.
pub(super) fn start_until(
    opened: &Opened,
    options: Options,
    progress: bool,
    watch: &Watch,
    stop: &dyn Fn() -> bool,
) -> Result<Session, Failure> {
    let bar = if progress && std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        indicatif::ProgressBar::new(0).with_style(
            indicatif::ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes} {bytes_per_sec}")
                .unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()),
        )
    } else {
        indicatif::ProgressBar::hidden()
    };
    let open = |options| {
        let mut progress = |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        };
        Session::start(opened, options, &mut Starting { progress: &mut progress, stop: &|| to_stop(watch) || stop() })
    };
    // Held until the session holds it: what is asked of the GPU before then shares one context with it.
    let _gpu = (options.backend != BackendKind::Cpu).then(|| Device::open(0));
    let chosen = chosen(opened, &options);
    let session = match &chosen {
        None => open(options.clone()),
        // What a forecast counts on may have been taken meanwhile.
        Some(chosen) => match open(chosen.clone()) {
            Err(e) if lacks_room(&e) => open(options.clone()),
            other => other,
        },
    };
    bar.finish_and_clear();
    let session = session.map_err(|e| match e {
        e @ EngineError::Forward(_) => stopped(e, watch),
        e => refusal(e, opened, || this_machine(opened, options.backend), &options),
    })?;
    for note in session.notes() {
        tracing::warn!("{note}");
    }
    // What is not kept can be had from `nt plan --save`.
    let _ = session.recipe().keep();
    if options.vram.is_some() && session.device().is_none() {
        tracing::warn!("--vram limits nothing here: processors compute, and take what --ram gives");
    }
    // Without a GPU the fallback is a line of the report; where there is one, something is to be mended.
    if let Some(why) = session.fallback().filter(|_| crate::machine::facts::has_nvidia_gpu(&Host::default())) {
        tracing::warn!("{why}; `nt doctor` says what mends it");
    }
    Ok(session)
}

/// Whether a session that takes less may start where this one did not.
fn lacks_room(e: &EngineError) -> bool {
    use EngineError::{Arena, Backend, Lacking, Plan};
    matches!(e, Plan(_) | Arena(_) | Backend(BackendError::OutOfMemory { .. }) | Lacking(LackError::Memory { .. }))
}

/// The options with what a forecast chooses and they leave open: tokens of a pass, where prompts may be longer than the usual one, and
/// buffers by rates that were measured, if there are any. `None` for nothing.
fn chosen(opened: &Opened, options: &Options) -> Option<Options> {
    let measured = crate::machine::probe::cache_file().is_some_and(|f| f.exists());
    let buffers = options.n_buffers.is_none() && options.repeat.is_none() && measured;
    let long = options.longest_prompt.is_some_and(|n| n.min(options.n_ctx) > Options::BATCH);
    if !buffers && !long {
        return None;
    }
    let (model, machine) = (&opened.model, this_machine(opened, options.backend));
    let options = if long { with_batch(model, &machine, options) } else { options.clone() };
    let n_buffers = options.n_buffers.or_else(|| choose_buffers(model, &machine, &options).filter(|_| buffers));
    Some(Options { n_buffers, ..options })
}

/// Writes the timeline, if one was asked for.
pub(super) fn write_timeline(placement: &Placement, session: &mut Session) -> Result<(), Failure> {
    match &placement.timeline {
        Some(path) => session.write_timeline(path).map_err(|e| outputs::failed(path, &e)),
        None => Ok(()),
    }
}
