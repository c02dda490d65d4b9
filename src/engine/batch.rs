//! How many tokens of a prompt a pass evaluates, where nobody says: a rule over sizes that were weighed. Pure: times come from a
//! forecast.
//!
//! A pass carries each unit that streams once, however many tokens it has, and fills a GPU's products better; a larger one needs a
//! larger workspace, which takes memory from weights, so that each generated token may take longer.

/// Tokens of a pass unless told or chosen, and most: results do not depend on how a prompt is cut.
pub(super) const USUAL: usize = 512;
pub(super) const MOST: usize = 4096;

/// What a size does for a prompt as long as is to be expected, all by the least times that links and products allow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Weighed {
    /// Tokens of a pass.
    pub batch: usize,
    /// Seconds per token of the prompt.
    pub prompt_s: f64,
    /// Seconds of a pass with that many tokens.
    pub pass_s: f64,
    /// Seconds of a pass of one token.
    pub decode_s: f64,
    /// Seconds of computing from a request to stop until it is heard.
    pub stop_s: f64,
    /// Layers whose experts have caches in RAM or slots in VRAM; one more if parts are cut that were to be.
    pub caches: usize,
}

/// Sizes that were chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct BatchSizes {
    /// Most tokens of a pass.
    pub alone: usize,
    /// Most tokens of prompts in a pass while other texts wait for theirs.
    pub shared: usize,
}

impl std::fmt::Display for BatchSizes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let BatchSizes { alone, shared } = self;
        match shared < alone {
            true => write!(f, "{alone} tokens per pass, {shared} while other texts wait"),
            false => write!(f, "{alone} tokens per pass"),
        }
    }
}

/// Of a request that fills the context, tokens of the prompt for each that is generated.
const PROMPT_PER_GENERATED: f64 = 7.0;
/// A larger size is worth its memory if a prompt takes no more than this share of the time.
const WORTH: f64 = 0.92;
/// How much longer a generated token may take because of a prompt's workspace.
const SLOWER_MAX: f64 = 1.05;
/// Most seconds until a request to stop is heard, unless it is so with the smallest size.
const STOP_MAX_S: f64 = 1.0;
/// A pass of several texts may take so many times as long as with the smallest size.
const SHARED_MAX: f64 = 1.5;

/// Sizes to weigh for prompts of up to `prompt` tokens, the smallest first: each twice that before, and one that has all.
pub(super) fn sizes(prompt: usize) -> Vec<usize> {
    let most = prompt.min(MOST);
    let doubled = std::iter::successors(Some(USUAL), |b| Some(2 * b)).take_while(|b| *b < most);
    let mut all: Vec<usize> = doubled.collect();
    all.push(most.max(USUAL));
    all
}

/// The best of these, the smallest first; `None` of none.
pub(super) fn best(all: &[Weighed]) -> Option<BatchSizes> {
    let (first, larger) = all.split_first()?;
    let request_s = |w: &Weighed| PROMPT_PER_GENERATED * w.prompt_s + w.decode_s;
    let quick_enough =
        |w: &Weighed| w.decode_s <= first.decode_s * SLOWER_MAX && w.stop_s <= STOP_MAX_S.max(first.stop_s);
    // A workspace that takes all the room of caches is not made up for: how often they would hit is a guess.
    let bearable = |w: &Weighed| quick_enough(w) && w.caches >= first.caches;
    let mut best = first;
    for w in larger.iter().filter(|w| bearable(w)) {
        if w.prompt_s <= best.prompt_s * WORTH && request_s(w) <= request_s(best) {
            best = w;
        }
    }
    let quick = |w: &&Weighed| w.batch <= best.batch && w.pass_s <= first.pass_s * SHARED_MAX;
    let shared = all.iter().filter(quick).map(|w| w.batch).max().unwrap_or(first.batch);
    Some(BatchSizes { alone: best.batch, shared })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pass of `carried` seconds for what streams, next to `each` seconds of computing per token.
    fn weighed(carried: f64, each: f64, decode_s: impl Fn(usize) -> f64) -> Vec<Weighed> {
        let of = |batch: usize| {
            let pass_s = carried.max(each * batch as f64);
            let (prompt_s, decode_s) = (pass_s / batch as f64, decode_s(batch));
            Weighed { batch, prompt_s, pass_s, decode_s, stop_s: 0.01, caches: 0 }
        };
        sizes(4096).into_iter().map(of).collect()
    }

    #[test]
    fn sizes_are_doubled_up_to_the_prompt() {
        assert_eq!(sizes(10), [512]);
        assert_eq!(sizes(512), [512]);
        assert_eq!(sizes(513), [512, 513]);
        assert_eq!(sizes(2100), [512, 1024, 2048, 2100]);
        assert_eq!(sizes(usize::MAX), [512, 1024, 2048, 4096]);
    }

    #[test]
    fn a_pass_grows_until_computing_binds_it() {
        let alone = |carried, each| best(&weighed(carried, each, |_| 0.02)).unwrap().alone;
        assert_eq!(alone(0.3, 0.3 / 4096.0), 4096);
        assert_eq!(alone(0.3, 0.3 / 2048.0), 2048);
        assert_eq!(alone(0.3, 0.3 / 300.0), 512);
        assert_eq!(best(&[]), None);
    }

    #[test]
    fn generated_tokens_bound_what_a_workspace_takes() {
        let alone = |slower: f64| {
            let decode_s = move |b: usize| 0.02 * (1.0 + slower * (b as f64 / 512.0 - 1.0));
            best(&weighed(0.3, 0.3 / 4096.0, decode_s)).unwrap().alone
        };
        assert_eq!([0.0, 0.006, 0.01, 0.03, 0.1].map(alone), [4096, 4096, 2048, 1024, 512]);
        // A prompt that gains little pays for nothing.
        let of = |batch, prompt_s, decode_s| Weighed { batch, prompt_s, pass_s: 0.1, decode_s, stop_s: 0.0, caches: 0 };
        assert_eq!(best(&[of(512, 1e-4, 0.1), of(1024, 0.5e-4, 0.102)]).unwrap().alone, 512);
    }

    /// Guards against a prompt's workspace in place of the caches that generated tokens live on.
    #[test]
    fn caches_stay() {
        let mut all = weighed(0.3, 0.3 / 4096.0, |_| 0.02);
        all.iter_mut().for_each(|w| w.caches = if w.batch <= 1024 { 48 } else { 0 });
        assert_eq!(best(&all).unwrap().alone, 1024);
        all.iter_mut().for_each(|w| w.caches = if w.batch <= 512 { 0 } else { 48 });
        assert_eq!(best(&all).unwrap().alone, 4096);
    }

    #[test]
    fn a_request_to_stop_is_heard_and_others_wait_little_longer() {
        let mut all = weighed(0.3, 0.3 / 1500.0, |_| 0.02);
        assert_eq!(best(&all), Some(BatchSizes { alone: 2048, shared: 2048 }));
        all.iter_mut().filter(|w| w.batch == 2048).for_each(|w| w.pass_s = 0.5);
        assert_eq!(best(&all), Some(BatchSizes { alone: 2048, shared: 1024 }));
        all.iter_mut().for_each(|w| w.stop_s = w.batch as f64 / 1024.0);
        assert_eq!(best(&all), Some(BatchSizes { alone: 1024, shared: 1024 }));
        all.iter_mut().for_each(|w| w.stop_s = 9.0);
        assert_eq!(best(&all).unwrap().alone, 2048);
    }
}
