//! Tests of a benchmark, and how each is measured.
//!
//! Where a model has caches or slots of experts, a test of generated tokens is followed by another one: the first of them from
//! empty caches, since what repetitions find there is what earlier ones left.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::super::{Failure, codes, start};
use crate::backend::Class;
use crate::engine::{ExpertUses, Part, Session};
use crate::machine::pressure::Watch;
use crate::model::Outputs;
use crate::state::{PAGE, SeqId};

/// Most tokens that are generated from empty caches.
pub(super) const COLD_TOKENS: usize = 64;

/// What is measured: `prompt` tokens at once or `generated` one at a time, in so many texts, behind `depth` others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Test {
    pub prompt: usize,
    pub generated: usize,
    pub depth: usize,
    /// Texts at once; 0 is one.
    pub parallel: usize,
}

/// What caches and slots of experts had when a test began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Caches {
    /// What the same tokens had left there.
    Warm,
    /// Nothing.
    Cold,
}

/// A test and the seconds of each repetition.
#[derive(Clone, Debug, Default)]
pub(super) struct Measured {
    pub test: Test,
    /// `None` of prompts, which pass caches by, and where a model has no caches or slots.
    pub caches: Option<Caches>,
    pub seconds: Vec<f64>,
    /// When it began, in seconds since 1970.
    pub began_unix_s: u64,
    /// Experts that the repetitions used.
    pub experts: ExpertUses,
}

impl Test {
    pub(super) fn tokens(&self) -> usize {
        self.prompt + self.generated * self.texts()
    }

    pub(super) fn texts(&self) -> usize {
        self.parallel.max(1)
    }

    /// Positions of the cache that it takes: texts share what lies before them, but for the page in which they part.
    pub(super) fn positions(&self) -> usize {
        let each = self.prompt.saturating_add(self.generated);
        match self.texts() {
            1 => self.depth.saturating_add(each),
            n => self.depth.saturating_add(each.saturating_add(2 * PAGE).saturating_mul(n)),
        }
    }

    /// `pp512`, `tg128 @ d4096`, `tg128 x4`.
    pub(super) fn name(&self) -> String {
        let texts = if self.texts() > 1 { format!(" x{}", self.parallel) } else { String::new() };
        let depth = if self.depth > 0 { format!(" @ d{}", self.depth) } else { String::new() };
        match self.prompt {
            0 => format!("tg{}{depth}{texts}", self.generated),
            prompt => format!("pp{prompt}{depth}"),
        }
    }
}

impl Measured {
    fn new(test: Test, caches: Option<Caches>) -> Measured {
        let began_unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Measured { test, caches, began_unix_s, ..Measured::default() }
    }

    /// Tokens per second of each repetition.
    pub(super) fn rates(&self) -> Vec<f64> {
        self.seconds.iter().map(|s| self.test.tokens() as f64 / s).collect()
    }

    /// The test's name, and whether its caches were empty: `tg64 cold`.
    pub(super) fn name(&self) -> String {
        let cold = if self.caches == Some(Caches::Cold) { " cold" } else { "" };
        format!("{}{cold}", self.test.name())
    }
}

/// What tests are measured with.
pub(super) struct Stand<'a> {
    pub session: &'a mut Session,
    /// As many as the longest test has positions.
    pub tokens: &'a [u32],
    pub repetitions: u16,
    pub watch: &'a Watch,
}

impl Stand<'_> {
    /// Repeats a test, and measures the first tokens of a generation from empty caches, where the model has any. `tell` gets what
    /// was measured, also before a failure.
    pub(super) fn measure(
        &mut self,
        test: Test,
        tell: &mut dyn FnMut(Measured) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let cached = !(self.session.caches().is_empty() && self.session.device_caches().is_empty());
        let of = |caches| Some(caches).filter(|_| cached && test.generated > 0);
        let mut measured = Measured::new(test, of(Caches::Warm));
        let ended = self.repeat(&mut measured);
        if !measured.seconds.is_empty() {
            tell(measured)?;
        }
        ended?;
        let Some(cold) = of(Caches::Cold) else { return Ok(()) };
        let mut measured = Measured::new(Test { generated: test.generated.min(COLD_TOKENS), ..test }, Some(cold));
        // What the report says of links and experts is of warm caches.
        self.uncounted(|stand| {
            stand.begin(&test)?;
            stand.session.empty_caches().map_err(codes::failure)?;
            stand.once(&mut measured)
        })?;
        tell(measured)
    }

    /// What `work` evaluates is in none of the figures of the session.
    fn uncounted<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        self.session.count(false);
        let done = work(self);
        self.session.count(true);
        done
    }

    /// The first time warms caches and settles the ring, and is not counted.
    fn repeat(&mut self, measured: &mut Measured) -> Result<(), Failure> {
        let test = measured.test;
        self.session.truncate(0);
        for round in 0..=self.repetitions {
            self.begin(&test)?;
            if round == 0 {
                self.uncounted(|stand| stand.once(&mut Measured { test, ..Measured::default() }))?;
                continue;
            }
            if test.generated > 0 && test.texts() == 1 {
                self.session.start_measuring();
            }
            self.once(measured)?;
        }
        Ok(())
    }

    /// Goes back to the tokens before a test, or evaluates them.
    fn begin(&mut self, test: &Test) -> Result<(), Failure> {
        let before = &self.tokens[..test.depth];
        if self.session.truncate(test.depth) < before.len() {
            self.session.truncate(0);
            start::evaluate(self.session, before, Class::Bulk, Outputs::None, self.watch)?;
        }
        Ok(())
    }

    /// Evaluates the tokens of a test behind those before it, and adds what that took.
    fn once(&mut self, measured: &mut Measured) -> Result<(), Failure> {
        let Test { prompt, generated, depth, .. } = measured.test;
        let tokens = &self.tokens[depth..];
        let before = self.session.expert_uses();
        let began = Instant::now();
        if prompt > 0 {
            self.evaluate(&tokens[..prompt], Class::Bulk)?;
        }
        match measured.test.texts() {
            1 => tokens[..generated].iter().try_for_each(|&t| self.evaluate(&[t], Class::Exact))?,
            n => self.at_once(n, &tokens[..generated])?,
        }
        measured.seconds.push(began.elapsed().as_secs_f64());
        measured.experts.add(&self.session.expert_uses().since(&before));
        Ok(())
    }

    /// Evaluates tokens one at a time in `n` texts at once, and waits for the logits of each pass.
    fn at_once(&mut self, n: usize, tokens: &[u32]) -> Result<(), Failure> {
        let (session, watch) = (&mut *self.session, self.watch);
        let depth = session.position();
        let forks = (0..n).map(|_| session.fork_at(depth)).collect::<Result<Vec<_>, _>>().map_err(codes::failure)?;
        let evaluated = tokens.iter().try_for_each(|token| {
            let tokens = std::slice::from_ref(token);
            let part = |&seq: &SeqId| Part { seq, class: Class::Exact, tokens, outputs: Outputs::Last };
            let parts: Vec<Part<'_>> = forks.iter().map(part).collect();
            session.eval_parts(&parts, &|| start::to_stop(watch)).map_err(|e| start::stopped(e, watch))?;
            session.logits().map(|_| ()).map_err(codes::failure)
        });
        forks.into_iter().try_for_each(|seq| session.close(seq)).map_err(codes::failure)?;
        evaluated
    }

    /// Evaluates tokens and waits for the logits, as sampling does.
    fn evaluate(&mut self, tokens: &[u32], class: Class) -> Result<(), Failure> {
        start::evaluate(self.session, tokens, class, Outputs::Last, self.watch)?;
        self.session.logits().map(|_| ()).map_err(codes::failure)
    }
}
