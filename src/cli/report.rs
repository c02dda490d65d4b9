//! What a run reports: on stderr for people, as JSON for programs.

use std::io::Write;

use serde_json::{Value as Json, json};

use super::Failure;
use super::printable::{Shown, printable};
use super::streams::{Stderr, Stdout};
use crate::engine::{BatchSizes, Generation, Links, Opened, Options, Predicted, RequantReport, Session};
use crate::flow::Latencies;
use crate::machine;
use crate::model::SLICE_PARTS;
use crate::plan::{Home, LinkName, SHARE_MAX, format_bytes};

/// Figures of a session, ready to print. What was not measured is `None`.
pub struct Report {
    backend: &'static str,
    reader: Option<&'static str>,
    n_buffers: usize,
    batch: BatchSizes,
    plan_id: String,
    homes: [(usize, u64); 3],
    /// Blocks on storage, and all.
    blocks: (usize, usize),
    links: Links,
    /// Slots of caches, and the experts on storage that they are for, of all layers; and how many layers.
    caches: (usize, usize, usize),
    /// Slots in VRAM of a layer's experts in RAM, and those experts.
    slots: Option<(usize, usize)>,
    predicted: Option<Predicted>,
    device: Option<String>,
    /// Units, bytes and threads of processors next to the device.
    beside: Option<(usize, u64, usize)>,
    /// Of the choices that fall on experts in RAM, the part that those compute, where the link brings the others.
    part_of_choices: Option<f64>,
    /// Of each feed-forward part, what they have, where those are cut.
    part_of_each: Option<f64>,
    vram_bytes: Option<u64>,
    peak_rss_bytes: Option<u64>,
    notes: Vec<String>,
    requant: Option<RequantReport>,
    /// Positions of the context, and those that the model was trained on, where those are fewer.
    beyond: Option<(usize, usize)>,
    fallback: Option<String>,
    decode_tokens_per_s: Option<f64>,
    prompt: Option<(usize, f64)>,
    generated: usize,
    first_token_s: Option<f64>,
}

/// Of each feed-forward part, what `slices` of it are.
pub(super) fn part_of_each(slices: u32) -> f64 {
    f64::from(slices) / f64::from(SLICE_PARTS)
}

/// What processors next to a GPU have of feed-forward parts that are cut, as reports and plans say it.
pub(super) fn of_each(threads: usize, part: f64, bytes: &str) -> String {
    let percent = part * 100.0;
    format!(
        "while generating, {threads} processors compute {percent:.0} % of each feed-forward part in RAM ({bytes}), the GPU the rest at the same time"
    )
}

impl Report {
    /// Figures of the session so far.
    pub fn new(session: &Session, opened: &Opened) -> Report {
        let homes = [Home::A, Home::B, Home::C].map(|home| {
            let of = session.homes().iter().zip(&session.model().units).filter(|(h, _)| **h == home);
            (of.clone().count(), of.map(|(_, u)| u.bytes()).sum())
        });
        let mut notes: Vec<String> = opened.tokenizer.warnings().iter().chain(&opened.warnings).cloned().collect();
        notes.extend(session.notes().iter().cloned());
        Report {
            backend: session.backend_name(),
            reader: session.reader_name(),
            n_buffers: session.n_slots(),
            batch: session.batch(),
            plan_id: session.recipe().id(),
            homes,
            blocks: blocks_on_storage(session),
            links: session.links(),
            slots: session.device_caches().first().map(|c| (c.slots, c.experts)),
            caches: session.caches().iter().fold((0, 0, 0), |(s, e, n), c| (s + c.slots, e + c.experts, n + 1)),
            predicted: session.predicted(),
            device: session.device(),
            beside: session.beside().map(|beside| {
                let of = session.model().units.iter().zip(beside).filter(|(_, b)| *b);
                (of.clone().count(), of.map(|(u, _)| u.bytes()).sum(), session.threads_beside())
            }),
            part_of_choices: session.part_of_choices(),
            part_of_each: session.slices().map(part_of_each),
            vram_bytes: session.vram_bytes(),
            peak_rss_bytes: machine::peak_rss_bytes(),
            notes,
            requant: session.requant().cloned(),
            beyond: Some((session.n_ctx(), opened.model.hparams.n_ctx_reach)).filter(|(n, reach)| n > reach),
            fallback: session.fallback().map(str::to_owned),
            decode_tokens_per_s: None,
            prompt: None,
            generated: 0,
            first_token_s: None,
        }
    }

    /// Sets the simulator's prediction.
    pub fn predicted(&mut self, predicted: Option<Predicted>) {
        self.predicted = predicted;
    }

    /// Adds warnings that do not come from the session.
    pub fn warnings(&mut self, more: &[String]) {
        self.notes.extend_from_slice(more);
    }

    /// Warnings: what was asked for and is not so.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Adds the figures of a generation.
    pub fn generation(&mut self, g: &Generation) {
        self.prompt = Some((g.prompt_tokens, g.prefill_s));
        self.generated = g.tokens.len();
        self.first_token_s = g.first_token_s;
        self.decode_tokens_per_s = (g.decode_passes > 0).then(|| g.decode_passes as f64 / g.decode_s);
        if g.context_full {
            self.notes.push("the context is full; a larger --ctx allows more tokens".into());
        }
    }

    /// Sets the peak of memory, where something else than the run took memory since.
    pub fn peak_rss(&mut self, bytes: Option<u64>) {
        self.peak_rss_bytes = bytes;
    }

    /// Sets the decode rate that the roofline is compared with.
    pub fn decode_rate(&mut self, tokens_per_s: Option<f64>) {
        self.decode_tokens_per_s = tokens_per_s;
    }

    /// The device, if it has memory of its own, and the bytes of it in use.
    pub fn device_json(&self) -> (Json, Json) {
        (json!(self.device), json!(self.vram_bytes))
    }

    fn site(&self) -> &'static str {
        match (&self.device, self.beside) {
            (Some(_), Some(_)) => "both",
            (Some(_), None) => "gpu",
            (None, _) => "cpu",
        }
    }

    /// What computes which of the weights; of processors next to a device, while tokens are generated.
    fn sites_json(&self) -> Json {
        let all: (usize, u64) = self.homes.iter().fold((0, 0), |sum, h| (sum.0 + h.0, sum.1 + h.1));
        let site = |name, units, bytes: u64| json!({ "site": name, "units": units, "bytes": bytes });
        match (&self.device, self.beside) {
            (Some(_), Some((units, bytes, threads))) => {
                let l = &self.links;
                let (busy, waits) = l.beside_busy().unzip();
                let cpu = json!({
                    "site": "cpu", "units": units, "bytes": bytes, "threads": threads, "gb_per_s": l.beside_gb_per_s(),
                    "busy": busy, "waits_for_gpu": waits, "bytes_per_token": l.beside_bytes_per_pass,
                    "part_of_choices": self.part_of_choices, "part_of_each": self.part_of_each,
                });
                // Divided experts are units of both.
                let (n, of_both) = if self.part_of_choices.is_some() { (0, 0) } else { (units, bytes) };
                let mut gpu = site("gpu", all.0 - n, all.1 - of_both);
                gpu["bytes_per_token"] = json!(l.bytes_per_pass.saturating_sub(l.beside_bytes_per_pass));
                json!([gpu, cpu])
            }
            (Some(_), None) => json!([site("gpu", all.0, all.1)]),
            (None, _) => json!([site("cpu", all.0, all.1)]),
        }
    }

    /// `plan` of the contract's JSON.
    pub fn plan_json(&self) -> Json {
        let [a, b, c] = self.homes.map(|(units, bytes)| json!({ "units": units, "bytes": bytes }));
        json!({ "a": a, "b": b, "c": c })
    }

    /// `links` of the contract's JSON.
    pub fn links_json(&self) -> Json {
        let l = &self.links;
        json!({
            "nvme": { "bytes": l.nvme_bytes, "gb_per_s": l.nvme_gb_per_s(), "ceiling_gb_per_s": l.nvme_ceiling.map(gb), "busy": l.nvme_busy(), "start_us": start_us(&l.nvme_starts) },
            "gpu": { "bytes": l.gpu_bytes, "gb_per_s": l.gpu_gb_per_s(), "ceiling_gb_per_s": l.gpu_ceiling.map(gb), "busy": l.gpu_busy(), "start_us": start_us(&l.gpu_starts) },
            "vram": { "bytes": null, "gb_per_s": null, "busy": null, "ceiling_gb_per_s": l.vram_ceiling.map(gb) },
            "ram": { "bytes": l.ram_bytes, "gb_per_s": l.ram_gb_per_s(), "ceiling_gb_per_s": l.ram_ceiling.map(gb), "busy": null },
        })
    }

    /// Where the experts lay that generated tokens used, and what caches in RAM did; null without experts.
    pub fn experts_json(&self) -> Json {
        let l = &self.links;
        let Some([vram, ram, cache, storage]) = l.experts.shares() else { return Json::Null };
        let (used, c) = (&l.experts, l.experts.caches.counts);
        let (slots, experts, layers) = self.caches;
        let misses = (c.demands > 0).then(|| c.misses as f64 / c.demands as f64);
        let caches = (layers > 0).then(|| {
            json!({
                "layers": layers, "slots": slots, "experts": experts, "hits": c.hits, "misses": c.misses,
                "hit_rate": used.cache_hit_rate(), "misses_per_layer": misses, "misses_max": c.misses_max,
                "in_flight": used.caches.depth(),
            })
        });
        json!({
            "uses": used.homes.iter().sum::<u64>(), "vram": vram, "ram": ram, "cache": cache, "storage": storage,
            "caches": caches,
            "slots": self.slots.map(|(slots, experts)| {
                json!({ "slots": slots, "experts": experts, "uses": used.slot_uses, "hits": used.slot_hits, "hit_rate": used.slot_hit_rate() })
            }),
        })
    }

    /// Stall time by cause, in seconds of the passes, and the seconds of those passes.
    pub fn stall_json(&self) -> Json {
        let s = self.links.stalls();
        json!({ "storage_s": s.storage_s, "link_s": s.link_s, "compute_s": s.compute_s, "passes_s": self.links.pass_s })
    }

    /// `roofline` of the contract's JSON, for passes that yield one token.
    pub fn roofline_json(&self) -> Json {
        match self.links.roofline() {
            None => json!({ "predicted_tokens_per_s": null, "bound_by": null, "achieved": null, "ceilings": null }),
            Some((tokens_per_s, bound_by)) => json!({
                "predicted_tokens_per_s": tokens_per_s,
                "bound_by": bound_by,
                "achieved": self.decode_tokens_per_s.map(|t| t / tokens_per_s),
                "ceilings": self.links.ceilings_from,
            }),
        }
    }

    /// The simulator's prediction and the share of it that was reached; null where a rate that it needs was not measured.
    pub fn prediction_json(&self) -> Json {
        let Some(p) = &self.predicted else { return Json::Null };
        let tokens_per_s = 1.0 / p.pass.seconds;
        let busy = |l| p.pass.busy(l, &p.rates);
        json!({
            "tokens_per_s": tokens_per_s,
            "bound_by": p.pass.bound_by(&p.rates),
            "achieved": self.decode_tokens_per_s.map(|t| t / tokens_per_s),
            "busy": { "nvme": busy(LinkName::Nvme), "gpu": busy(LinkName::Gpu), "ram": busy(LinkName::Ram), "flops": busy(LinkName::Flops), "chain": busy(LinkName::Chain), "beside": p.pass.beside() },
        })
    }

    /// The contract's JSON of `nt run`.
    pub fn json(&self, g: &Generation) -> Json {
        let mut all = generation_json(g);
        if let (Json::Object(all), Json::Object(session)) = (&mut all, self.session_json()) {
            all.extend(session);
        }
        all
    }

    /// The part of it that is not one generation's.
    pub fn session_json(&self) -> Json {
        json!({
            "backend": self.backend,
            "reader": self.reader,
            "device": self.device,
            "site": self.site(),
            "sites": self.sites_json(),
            "n_buffers": self.n_buffers,
            "batch": self.batch,
            "plan": self.plan_json(),
            "plan_id": self.plan_id,
            "links": self.links_json(),
            "stall": self.stall_json(),
            "experts": self.experts_json(),
            "roofline": self.roofline_json(),
            "prediction": self.prediction_json(),
            "peak_rss_bytes": self.peak_rss_bytes,
            "vram_bytes": self.vram_bytes,
            "fallback": self.fallback,
            "requant": requant_json(self.requant.as_ref(), None),
            "warnings": self.notes,
        })
    }

    /// The report for people, on stderr; nothing with `-q`.
    pub fn print(&self) {
        if !tracing::enabled!(tracing::Level::WARN) {
            return;
        }
        let mut text = Vec::new();
        // A closed stderr takes nothing from the result, which is printed already; writing to memory cannot fail.
        let _ = self.write(&mut text);
        let _ = Stderr.write_all(printable(&String::from_utf8_lossy(&text)).as_bytes());
    }

    fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        let [(a, a_bytes), (b, b_bytes), (c, c_bytes)] = self.homes;
        let in_vram = match &self.device {
            Some(device) => {
                writeln!(out, "\ndevice    {device}")?;
                format!("{a} units in VRAM ({}), ", format_bytes(a_bytes))
            }
            None => {
                writeln!(out)?;
                String::new()
            }
        };
        writeln!(
            out,
            "plan      {in_vram}{b} units in RAM ({}), {c} on storage ({}; {} of {} blocks), {} buffers, {} backend",
            format_bytes(b_bytes),
            format_bytes(c_bytes),
            self.blocks.0,
            self.blocks.1,
            self.n_buffers,
            self.backend
        )?;
        writeln!(out, "plan id   {}", self.plan_id)?;
        if self.batch.alone > Options::BATCH {
            writeln!(out, "prompts   {}", self.batch)?;
        }
        if let Some((units, bytes, threads)) = self.beside {
            let bytes = format_bytes(bytes);
            match (self.part_of_choices, self.part_of_each) {
                (None, Some(part)) => write!(out, "sites     {}", of_each(threads, part, &bytes))?,
                (None, None) => write!(
                    out,
                    "sites     while generating, {threads} processors compute {units} of the units in RAM ({bytes})"
                )?,
                (Some(part), _) => write!(
                    out,
                    "sites     while generating, {threads} processors compute {:.0} % of what tokens choose of {units} units in RAM ({bytes}), the GPU the rest ({} per token brought)",
                    part * 100.0,
                    format_bytes(self.links.gpu_bytes_per_pass)
                )?,
            }
            if let (Some(rate), Some((busy, waits))) = (self.links.beside_gb_per_s(), self.links.beside_busy()) {
                let (busy, waits) = (busy * 100.0, waits * 100.0);
                write!(out, ", {rate:.2} GB/s, busy {busy:.0} %, waiting for the GPU {waits:.0} %")?;
            }
            writeln!(out)?;
        }
        if let Some((slots, experts)) = self.slots {
            let rate = self.links.experts.slot_hit_rate().unwrap_or(0.0) * 100.0;
            writeln!(
                out,
                "slots     VRAM keeps {slots} of {experts} experts of each layer, the last that were chosen: {rate:.1} % of the GPU's choices while generating were there"
            )?;
        }
        if let Some(requant) = &self.requant {
            writeln!(out, "requant   {}", requant.line())?;
        }
        if let Some((n_ctx, reach)) = self.beyond {
            writeln!(out, "context   {n_ctx} tokens, {reach} of them trained: text gets worse beyond")?;
        }
        if let Some(why) = &self.fallback {
            writeln!(out, "backend   {why}")?;
        }
        if let Some((n, s)) = self.prompt {
            match per_s(n, s) {
                Some(rate) => writeln!(out, "prefill   {n} tokens in {s:.2} s, {rate:.1} tokens/s")?,
                None => writeln!(out, "prefill   interrupted, of {n} tokens")?,
            }
        }
        // A benchmark prints its own medians.
        if let Some(rate) = self.decode_tokens_per_s.filter(|_| self.prompt.is_some()) {
            let first = self.first_token_s.map_or(String::new(), |s| format!(", first token after {s:.2} s"));
            writeln!(out, "decode    {} tokens, {rate:.2} tokens/s{first}", self.generated)?;
        }
        if let (Some(rate), Some(reader)) = (self.links.nvme_gb_per_s(), self.reader) {
            let busy = self.links.nvme_busy().map_or(String::new(), |b| format!(", busy {:.0} %", b * 100.0));
            writeln!(
                out,
                "storage   {} read through {reader}, {rate:.2} GB/s{busy}",
                format_bytes(self.links.nvme_bytes)
            )?;
        }
        if let Some(rate) = self.links.gpu_gb_per_s() {
            let busy = self.links.gpu_busy().map_or(String::new(), |b| format!(", busy {:.0} %", b * 100.0));
            writeln!(out, "link      {} copied to VRAM, {rate:.2} GB/s{busy}", format_bytes(self.links.gpu_bytes))?;
        }
        self.write_experts(out)?;
        self.write_waits(out)?;
        if let Some((tokens_per_s, bound_by)) = self.links.roofline() {
            let from = self.links.ceilings_from.map_or(String::new(), |f| format!(" ({f})"));
            let share = self.decode_tokens_per_s.map_or(String::new(), |t| reached(t / tokens_per_s));
            writeln!(out, "roofline  {tokens_per_s:.2} tokens/s, bound by {bound_by}{share}{from}")?;
        }
        if let Some(p) = &self.predicted {
            let tokens_per_s = 1.0 / p.pass.seconds;
            let share = self.decode_tokens_per_s.map_or(String::new(), |t| reached(t / tokens_per_s));
            writeln!(
                out,
                "predicted {tokens_per_s:.2} tokens/s by the ring's simulator, most busy is {}{share}",
                p.pass.bound_by(&p.rates).name(),
            )?;
        }
        if let Some(rss) = self.peak_rss_bytes {
            let vram =
                self.vram_bytes.filter(|v| *v > 0).map_or(String::new(), |v| format!(", {} of VRAM", format_bytes(v)));
            writeln!(out, "memory    {} at most{vram}", format_bytes(rss))?;
        }
        Ok(())
    }
}

/// Which share of a prediction a run reached, for the end of a line. More than [`SHARE_MAX`] says nothing of the run.
fn reached(share: f64) -> String {
    match share <= SHARE_MAX {
        true => format!(", reached {:.0} %", share * 100.0),
        false => "; the run was faster than what this counts with: if the machine was busy when `nt probe` or `nt bench` measured it, they measure it again".into(),
    }
}

impl Report {
    fn write_experts(&self, out: &mut impl Write) -> std::io::Result<()> {
        let l = &self.links;
        let (slots, experts, layers) = self.caches;
        // Where all experts rest there is nothing to tell.
        let Some(shares) = l.experts.shares().filter(|s| layers > 0 || s[3] > 0.0) else { return Ok(()) };
        let names = ["in VRAM", "in RAM", "in RAM's caches", "from storage"];
        let told = shares.iter().zip(names).filter(|(s, _)| **s > 0.0);
        let told: Vec<String> = told.map(|(s, name)| format!("{:.1} % {name}", s * 100.0)).collect();
        write!(out, "experts   {}", told.join(", "))?;
        let c = l.experts.caches.counts;
        if layers > 0 && c.demands > 0 {
            let rate = l.experts.cache_hit_rate().unwrap_or(0.0) * 100.0;
            let misses = c.misses as f64 / c.demands as f64;
            let flight = l.experts.caches.depth().map_or(String::new(), |d| format!(", {d:.1} in flight"));
            let (slots, experts, most) = (slots / layers, experts / layers, c.misses_max);
            write!(
                out,
                "; caches of {slots} of {experts} per layer hit {rate:.1} %, {misses:.2} misses per layer and token (at most {most}){flight}"
            )?;
        }
        writeln!(out)
    }

    fn write_waits(&self, out: &mut impl Write) -> std::io::Result<()> {
        let (s, l) = (self.links.stalls(), &self.links);
        let streams = self.homes[2].0 > 0 || l.on_device && self.homes[1].0 > 0;
        let reader = if l.on_device { "copies for storage" } else { "computing for storage" };
        let last = if l.on_device { "the link for computing" } else { "storage for computing" };
        let waits = [(reader, s.storage_s), ("computing for the link", s.link_s), (last, s.compute_s)];
        let told: Vec<String> = waits
            .iter()
            // Where nothing streams nobody waits for it.
            .filter_map(|(who, s)| {
                s.filter(|_| streams && l.pass_s > 0.0).map(|s| format!("{who} {:.0} %", s / l.pass_s * 100.0))
            })
            .collect();
        if told.is_empty() { Ok(()) } else { writeln!(out, "waits     {}", told.join(", ")) }
    }
}

/// The part of the contract's JSON that is one generation's.
pub fn generation_json(g: &Generation) -> Json {
    let decode = (g.decode_passes > 0).then(|| g.decode_passes as f64 / g.decode_s);
    // A prompt that was interrupted has no time.
    let prefilled = g.prefill_s > 0.0;
    json!({
        "text": g.text,
        "tokens": g.tokens,
        "prompt_tokens": g.prompt_tokens,
        "generated_tokens": g.tokens.len(),
        "stop": g.stop,
        "prefill": { "seconds": prefilled.then_some(g.prefill_s), "tokens_per_s": per_s(g.prompt_tokens, g.prefill_s), "first_token_s": g.first_token_s },
        "decode": { "seconds": prefilled.then_some(g.decode_s), "tokens_per_s": decode },
    })
}

/// Blocks whose feed-forward part (or shared part) lives on storage, and blocks in all.
fn blocks_on_storage(session: &Session) -> (usize, usize) {
    let blocks = &session.model().blocks;
    (blocks.iter().filter(|b| session.homes()[b.ffn_unit] == Home::C).count(), blocks.len())
}

/// Microseconds from the moment at which a move could start to its start: null where none was waited for.
fn start_us(starts: &Latencies) -> Json {
    let us = |share| starts.quantile(share).map(|d| d.as_secs_f64() * 1e6);
    json!({ "n": starts.count(), "p50": us(0.5), "p99": us(0.99) })
}

/// Which types became what, and how much a text's probabilities change where that was measured; null without `--requant`.
pub(super) fn requant_json(requant: Option<&RequantReport>, kl: Option<f64>) -> Json {
    let Some(r) = requant else { return Json::Null };
    let turned = r.turned.iter().map(|t| {
        json!({ "from": t.from.name(), "to": t.to.name(), "matrices": t.matrices, "bytes_before": t.before, "bytes_after": t.after })
    });
    json!({
        "type": r.ty.name(),
        "turned": turned.collect::<Vec<_>>(),
        "left": { "units": r.left.0, "bytes": r.left.1 },
        "kl_divergence": kl,
    })
}

fn gb(bytes_per_s: f64) -> f64 {
    bytes_per_s / 1e9
}

fn per_s(n: usize, seconds: f64) -> Option<f64> {
    (seconds > 0.0).then(|| n as f64 / seconds)
}

/// Prints a line of results on stdout, control characters shown as such.
pub fn print_line(line: &str) -> Result<(), Failure> {
    Stdout.write_all(format!("{}\n", printable(line)).as_bytes()).map_err(|e| Failure::output("stdout", &e))
}

/// Prints a text that a program reads to the byte; on a terminal, control characters are shown as such.
pub fn print_text(text: &str) -> Result<(), Failure> {
    let mut out = Text::stdout();
    out.piece(text);
    out.end()
}

/// A text that is printed on stdout as it comes. A pipe or file gets its bytes; on a terminal control characters are
/// shown as such, since what a model writes may act on it.
pub struct Text {
    terminal: Option<Shown>,
    written: std::io::Result<()>,
}

impl Text {
    /// Nothing printed yet.
    pub fn stdout() -> Text {
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stdout()).then(Shown::default);
        Text { terminal, written: Ok(()) }
    }

    /// Prints the next piece. Returns whether all was written so far; after a failure nothing more is.
    pub fn piece(&mut self, text: &str) -> bool {
        let text = match &mut self.terminal {
            Some(shown) => shown.piece(text),
            None => text.into(),
        };
        self.write(&text);
        self.written.is_ok()
    }

    fn write(&mut self, text: &str) {
        if self.written.is_ok() {
            self.written = Stdout.write_all(text.as_bytes());
        }
    }

    /// Ends the text with a newline.
    ///
    /// # Errors
    /// If any of it could not be written.
    pub fn end(mut self) -> Result<(), Failure> {
        let rest = self.terminal.as_mut().map_or("", Shown::rest);
        self.write(&format!("{rest}\n"));
        self.written.map_err(|e| Failure::output("stdout", &e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::StopReason;

    /// After a probe under load a run was said to have reached 298 % of what was predicted.
    #[test]
    fn a_run_that_beats_its_prediction_shows_that_this_is_wrong() {
        assert_eq!((reached(0.934), reached(1.04)), (", reached 93 %".into(), ", reached 104 %".into()));
        for share in [2.98, f64::INFINITY] {
            let said = reached(share);
            assert!(said.contains("nt probe") && !said.contains('%'), "{said}");
        }
    }

    /// A prompt that was interrupted was said to have been evaluated in 0.00 s.
    #[test]
    fn a_prompt_that_was_interrupted_has_no_time() {
        let g = Generation {
            tokens: Vec::new(),
            text: String::new(),
            plain: String::new(),
            stop_text: None,
            stop: StopReason::Interrupt,
            prompt_tokens: 7,
            prefill_s: 0.0,
            first_token_s: None,
            decode_passes: 0,
            decode_s: 0.0,
            context_full: false,
        };
        let json = generation_json(&g);
        assert!(json["prefill"]["seconds"].is_null() && json["decode"]["seconds"].is_null(), "{json}");
        let json = generation_json(&Generation { prefill_s: 0.5, ..g });
        assert_eq!((json["prefill"]["seconds"].as_f64(), json["decode"]["seconds"].as_f64()), (Some(0.5), Some(0.0)));
    }
}
