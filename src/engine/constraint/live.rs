//! A text that is held to a grammar, token by token.

use std::sync::Arc;

use llguidance::api::StopReason;
use llguidance::toktrie::{SimpleVob, TokEnv};

use super::lark::sentence;
use super::{ConstraintError, gbnf};

/// What follows a text byte by byte.
#[derive(Clone)]
pub(super) enum Matcher {
    /// Schemas, expressions, Lark.
    Lexemes(Box<llguidance::Matcher>),
    /// GBNF.
    Characters(Box<gbnf::Matcher>, TokEnv),
}

impl Matcher {
    /// The tokens that may come next, and whether the text may end here.
    pub(super) fn allowed(&mut self) -> Result<(SimpleVob, bool), String> {
        match self {
            Matcher::Lexemes(m) => {
                let whole = m.is_accepting().map_err(|e| e.to_string())?;
                m.compute_mask_or_eos().map(|mask| (mask, whole)).map_err(|e| e.to_string())
            }
            Matcher::Characters(m, env) => Ok((m.allowed(env.tok_trie())?, m.is_accepting())),
        }
    }

    fn push(&mut self, token: u32) -> Result<(), String> {
        match self {
            Matcher::Lexemes(m) => m.consume_token(token).map_err(|e| e.to_string()),
            Matcher::Characters(m, env) if (token as usize) < env.tok_trie().vocab_size() => {
                m.push(env.tok_trie().token(token))
            }
            Matcher::Characters(..) => Err("a token came that is not in the vocabulary".into()),
        }
    }

    fn has_no_way_on(&self) -> bool {
        matches!(self, Matcher::Lexemes(m) if m.stop_reason() == StopReason::NoExtensionBias)
    }
}

/// Which tokens may follow a text so far.
pub struct Constraint {
    matcher: Matcher,
    /// Whether the text may end here, as far as was asked last.
    whole: bool,
    eog: Arc<[u32]>,
    /// Why it cannot go on.
    failed: Option<ConstraintError>,
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint").field("failed", &self.failed).finish_non_exhaustive()
    }
}

/// The tokens that may come next.
#[derive(Debug)]
pub struct Allowed(SimpleVob);

impl Allowed {
    /// Whether a token is among them.
    pub fn has(&self, id: u32) -> bool {
        (id as usize) < self.0.len() && self.0.is_allowed(id)
    }
}

impl Constraint {
    pub(super) fn new(matcher: Matcher, eog: Arc<[u32]>) -> Constraint {
        Constraint { matcher, whole: false, eog, failed: None }
    }

    /// The tokens that may come next; those that end a text only where the text is whole.
    ///
    /// # Errors
    /// If nothing may, or finding out exceeds a limit.
    pub fn allowed(&mut self) -> Result<Allowed, ConstraintError> {
        if let Some(e) = &self.failed {
            return Err(e.clone());
        }
        match self.matcher.allowed() {
            Ok((mut mask, whole)) => {
                let n = mask.len();
                for &id in self.eog.iter().filter(|id| (**id as usize) < n) {
                    // A grammar of token ids may name them.
                    mask.set(id as usize, whole);
                }
                self.whole = whole;
                match mask.is_zero() && !whole {
                    true => Err(self.fail("none continues the text")),
                    false => Ok(Allowed(mask)),
                }
            }
            Err(said) => Err(self.fail(&said)),
        }
    }

    /// Goes on with a token that was drawn.
    pub fn accept(&mut self, token: u32) {
        if self.failed.is_some() || self.eog.binary_search(&token).is_ok() {
            return;
        }
        if let Err(said) = self.matcher.push(token) {
            self.fail(&said);
        }
    }

    /// Whether the text may end where it was asked last what may come.
    pub fn may_end(&self) -> bool {
        self.failed.is_none() && self.whole
    }

    fn fail(&mut self, said: &str) -> ConstraintError {
        let e = match said == "none continues the text" || self.matcher.has_no_way_on() {
            true => ConstraintError::NothingLeft("none continues the text".to_owned()),
            false => ConstraintError::Step(sentence(said)),
        };
        self.failed.insert(e).clone()
    }
}
