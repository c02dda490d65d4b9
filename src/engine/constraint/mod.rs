//! Texts of a given form: a JSON Schema, a grammar or a regular expression says which tokens may come next.
//!
//! The crate `llguidance` does the work, on the bytes that the tokenizer's tokens stand for. [`Grammars`] belongs to a
//! tokenizer and compiles a [`Form`], within limits of size, memory and time, to a [`Grammar`]; a sampler that has one
//! in its parameters makes itself a [`Constraint`] and asks it before each token. `schema` refuses what llguidance
//! would follow otherwise than JSON Schema says, and `gbnf` reads the grammars of llama.cpp. Nothing here reads a file
//! or a network.

mod before;
mod gbnf;
mod lark;
mod live;
mod schema;
mod tokens;
mod vet;

use before::{Before, Piece};
pub use before::{Marks, Reasoning};
pub use lark::quoted;
pub use live::Constraint;
use live::Matcher;
pub use vet::{ARGUMENT as VET_ARGUMENT, main as vet_main};
use vet::{Refused, Source};

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use llguidance::ParserFactory;
use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use serde_json::Value as Json;

use crate::memory::bounded::{self, Exceeded};
use crate::tokenizer::Tokenizer;

/// Why a form cannot be had, or a text cannot go on in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// The schema has what is not followed, or nothing conforms to it.
    #[error("the JSON schema cannot be followed: {0}")]
    Schema(String),
    /// The grammar or expression cannot be read.
    #[error("the grammar cannot be followed: {0}")]
    Grammar(String),
    /// The tokenizer's tokens cannot be looked up by their bytes.
    #[error("texts of this model cannot be held to a grammar: {0}")]
    Tokens(String),
    /// Compiling takes too much.
    #[error("the schema or grammar is too complex: {0}; make it smaller")]
    TooComplex(String),
    /// So many were given up on, whose memory is lost, that others are compiled by another process first, and there is none.
    #[error(
        "{given_up} schemas or grammars took too much memory or time, so that others are compiled in a process of their own first, which failed: {why}"
    )]
    Exhausted {
        /// How many.
        given_up: usize,
        /// What was wrong with it.
        why: String,
    },
    /// All tokens are banned, without a schema or grammar.
    #[error("no token is left to draw: all are banned (logit_bias, ignore_eos, the file's suppress_tokens)")]
    AllBanned,
    /// No token may follow.
    #[error("no token is left that the schema or grammar allows here: {0}")]
    NothingLeft(String),
    /// A step takes too much, or failed.
    #[error("the text cannot go on as the schema or grammar demands: {0}")]
    Step(String),
}

/// A mark of a model in Lark, such as `<tool_call>`: the token of that name where the tokenizer has it as a control token, else
/// its text.
pub fn mark(tokenizer: &Tokenizer, name: &str) -> String {
    Piece::mark(tokenizer, name).lark()
}

/// What a text is to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// JSON that conforms to a schema (draft 2020-12, or an earlier one that `$schema` names).
    Schema(Json),
    /// A text of a grammar: llguidance's Lark, or llama.cpp's GBNF, which is known by its `::=`.
    Grammar(String),
    /// A text that a regular expression matches as a whole.
    Regex(String),
    /// A text of a grammar in Lark that nt itself makes, which refers to other forms by their names, as `@NAME`.
    Made {
        /// The grammar.
        lark: String,
        /// Names and forms.
        parts: Vec<(String, Form)>,
    },
}

/// Most bytes of a grammar.
const GRAMMAR_MAX: usize = 64 << 10;
/// Most bytes of an expression.
const REGEX_MAX: usize = 8 << 10;
/// Most bytes of the JSON of a schema.
const SCHEMA_MAX: usize = 1 << 20;
/// Stack that compiling takes for a subschema, where each refers to the next.
const STACK_OF_A_SUBSCHEMA: usize = 24 << 10;
/// Stack for a byte of a grammar, where each rule consists of the next.
const STACK_OF_A_BYTE: usize = 4 << 10;
/// Stack in any case.
const STACK_BYTES: usize = 16 << 20;
/// Memory of compiling.
const HEAP_BYTES: usize = 128 << 20;
/// Time of a processor for compiling.
const CPU: Duration = Duration::from_secs(4);
/// How many compilations are given up on here: each keeps its memory. From then on another process compiles first.
const ABANDONED_MAX: usize = 16;
/// How many at most, those among them that went well in the other process.
const ABANDONED_LIMIT: usize = 2 * ABANDONED_MAX;

static ABANDONED: AtomicUsize = AtomicUsize::new(0);

/// Compiles forms for a tokenizer. Making one takes some tenths of a second for a large vocabulary.
pub struct Grammars {
    factory: Arc<ParserFactory>,
    eog: Arc<[u32]>,
    /// What may stand before a form, for each kind of reasoning.
    before: Vec<(Reasoning, Before)>,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").field("eog", &self.eog).finish_non_exhaustive()
    }
}

impl Grammars {
    /// For texts of this tokenizer.
    ///
    /// # Errors
    /// If its tokens cannot be looked up by their bytes.
    pub fn new(tokenizer: &Tokenizer) -> Result<Grammars, ConstraintError> {
        let mut factory = tokens::factory(tokenizer).map_err(ConstraintError::Tokens)?;
        *factory.limits_mut() = limits();
        factory.quiet();
        let before = Reasoning::kinds().filter_map(|kind| Some((kind, Before::new(tokenizer, kind)?))).collect();
        Ok(Grammars { factory: Arc::new(factory), eog: tokenizer.eog_ids().into(), before })
    }

    /// Compiles a form, which a text has from its beginning or behind its reasoning.
    ///
    /// # Errors
    /// What is wrong with it or not followed, or which limit it exceeds.
    pub fn compile(&self, form: &Form, reasoning: Reasoning) -> Result<Grammar, ConstraintError> {
        if let Form::Grammar(text) = form
            && gbnf::is_gbnf(text)
        {
            return self.compile_gbnf(text, reasoning);
        }
        let mut parts = Parts { all: Vec::new(), stack: STACK_BYTES };
        parts.add(BODY, form)?;
        if let Some(before) = self.before(reasoning) {
            parts.all.insert(0, named("start", GrammarWithLexer::from_lark(before.lark(BODY))));
        }
        let stack_bytes = parts.stack;
        let grammar = TopLevelGrammar { grammars: parts.all, max_tokens: None };
        let wrong: fn(String) -> ConstraintError = match form {
            Form::Schema(_) | Form::Made { .. } => ConstraintError::Schema,
            Form::Grammar(_) | Form::Regex(_) => ConstraintError::Grammar,
        };
        let factory = self.factory.clone();
        let source = || Source::Lexemes(grammar.clone());
        self.vetted(stack_bytes, wrong, &source)?;
        self.bounded(stack_bytes, wrong, move || compiled_lexemes(&factory, grammar))
    }

    fn before(&self, reasoning: Reasoning) -> Option<&Before> {
        self.before.iter().find(|(kind, _)| *kind == reasoning).map(|(_, before)| before)
    }

    fn compile_gbnf(&self, text: &str, reasoning: Reasoning) -> Result<Grammar, ConstraintError> {
        if text.len() > GRAMMAR_MAX {
            return Err(too_long(text, GRAMMAR_MAX));
        }
        let (factory, text) = (self.factory.clone(), text.to_owned());
        let before = self.before(reasoning).cloned();
        self.vetted(STACK_BYTES, ConstraintError::Grammar, &|| Source::Characters(text.clone()))?;
        self.bounded(STACK_BYTES, ConstraintError::Grammar, move || compiled_gbnf(&factory, &text, before.as_ref()))
    }

    /// Has a form compiled by another process, once many were given up on in this one.
    fn vetted(
        &self,
        stack_bytes: usize,
        wrong: fn(String) -> ConstraintError,
        source: &dyn Fn() -> Source,
    ) -> Result<(), ConstraintError> {
        let given_up = ABANDONED.load(Ordering::Relaxed);
        if given_up < ABANDONED_MAX && std::env::var_os("NT_VET_FORMS").is_none() {
            return Ok(());
        }
        if given_up >= ABANDONED_LIMIT {
            let why = "forms that went well there were given up on here too; start nt again".to_owned();
            return Err(ConstraintError::Exhausted { given_up, why });
        }
        match vet::vet(&self.factory, &self.eog, &source(), stack_bytes) {
            Ok(()) => Ok(()),
            Err(Refused::Wrong(said)) => Err(wrong(lark::sentence(&said))),
            Err(Refused::TooMuch(said)) => Err(ConstraintError::TooComplex(said)),
            Err(Refused::Nobody(why)) => Err(ConstraintError::Exhausted { given_up, why }),
        }
    }

    /// Lets `work` compile within limits, and looks whether anything may come first.
    fn bounded(
        &self,
        stack_bytes: usize,
        wrong: fn(String) -> ConstraintError,
        work: impl FnOnce() -> Result<Matcher, String> + Send + 'static,
    ) -> Result<Grammar, ConstraintError> {
        let limits = bounded::Limits { stack_bytes, heap_bytes: HEAP_BYTES, cpu: CPU };
        let compiled = bounded::run(&limits, &|| false, move || {
            let matcher = work()?;
            // What allows no token at all is found now, not after the prompt.
            match matcher.clone().allowed()? {
                (mask, false) if mask.is_zero() => Err("nothing conforms to it".to_owned()),
                _ => Ok(matcher),
            }
        });
        match compiled {
            Ok(Ok(matcher)) => Ok(Grammar { matcher: Arc::new(Mutex::new(matcher)), eog: self.eog.clone() }),
            Ok(Err(said)) => Err(wrong(lark::sentence(&said))),
            Err(e) => Err(given_up(e)),
        }
    }
}

/// What compiling a form comes down to.
fn compiled_lexemes(factory: &ParserFactory, grammar: TopLevelGrammar) -> Result<Matcher, String> {
    let matcher = llguidance::Matcher::new(factory.create_parser(grammar));
    match matcher.get_error() {
        Some(e) => Err(e),
        None => Ok(Matcher::Lexemes(Box::new(matcher))),
    }
}

/// The same for GBNF.
fn compiled_gbnf(factory: &ParserFactory, text: &str, before: Option<&Before>) -> Result<Matcher, String> {
    let env = factory.tok_env().clone();
    let gbnf = Arc::new(gbnf::Gbnf::new(text, env.tok_trie(), before)?);
    Ok(Matcher::Characters(Box::new(gbnf::Matcher::new(gbnf)?), env))
}

/// Limits of a parser: a grammar that exceeds one is refused, and a step that does ends the text with an error. With
/// them a step takes tens of milliseconds, and a grammar tens of MiB, at most.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_lexer_states: 30_000,
        max_grammar_size: 500_000,
        precompute_large_lexemes: true,
        verbose_errors: false,
    }
}

/// The name of the form itself.
const BODY: &str = "nt_body";

/// The grammars that a form consists of, and the stack that compiling them may take.
struct Parts {
    all: Vec<GrammarWithLexer>,
    stack: usize,
}

impl Parts {
    fn add(&mut self, name: &str, form: &Form) -> Result<(), ConstraintError> {
        let grammar = match form {
            Form::Schema(schema) => {
                let (schema, subschemas) = schema::prepared(schema).map_err(ConstraintError::Schema)?;
                self.stack += subschemas * STACK_OF_A_SUBSCHEMA;
                GrammarWithLexer::from_json_schema(schema)
            }
            Form::Made { lark, .. } => GrammarWithLexer::from_lark(lark.clone()),
            Form::Grammar(text) if text.len() > GRAMMAR_MAX => return Err(too_long(text, GRAMMAR_MAX)),
            Form::Regex(text) if text.len() > REGEX_MAX => return Err(too_long(text, REGEX_MAX)),
            Form::Grammar(text) if gbnf::is_gbnf(text) => {
                let what = "one of llama.cpp (GBNF) cannot be part of another; write it in Lark";
                return Err(ConstraintError::Grammar(what.to_owned()));
            }
            Form::Grammar(text) => {
                let lark = lark::checked(text).map_err(ConstraintError::Grammar)?;
                self.stack += lark.len() * STACK_OF_A_BYTE;
                GrammarWithLexer::from_lark(lark)
            }
            Form::Regex(text) => {
                lark::check_regex(text).map_err(ConstraintError::Grammar)?;
                self.stack += text.len() * STACK_OF_A_BYTE;
                GrammarWithLexer::from_regex(text)
            }
        };
        self.all.push(named(name, grammar));
        if let Form::Made { parts, .. } = form {
            parts.iter().try_for_each(|(name, part)| self.add(name, part))?;
        }
        Ok(())
    }
}

fn too_long(text: &str, most: usize) -> ConstraintError {
    ConstraintError::Grammar(format!("it has {} bytes, more than the {most} that one may have", text.len()))
}

fn named(name: &str, grammar: GrammarWithLexer) -> GrammarWithLexer {
    GrammarWithLexer { name: Some(name.to_owned()), ..grammar }
}

fn given_up(e: Exceeded) -> ConstraintError {
    let abandoned = |what: String| {
        ABANDONED.fetch_add(1, Ordering::Relaxed);
        ConstraintError::TooComplex(what)
    };
    match e {
        Exceeded::Heap => abandoned(format!("it takes more than {} MiB to compile", HEAP_BYTES >> 20)),
        Exceeded::Cpu | Exceeded::Stopped => abandoned(format!("it takes more than {CPU:.0?} to compile")),
        Exceeded::Thread(e) => ConstraintError::TooComplex(format!("no thread can be had to compile it ({e})")),
        Exceeded::Panicked(said) => ConstraintError::TooComplex(lark::sentence(&said)),
    }
}

/// A compiled form, which any number of texts may have.
#[derive(Clone)]
pub struct Grammar {
    matcher: Arc<Mutex<Matcher>>,
    eog: Arc<[u32]>,
}

impl Grammar {
    /// The constraint of a text that begins.
    pub fn begin(&self) -> Constraint {
        let matcher = self.matcher.lock().unwrap_or_else(|e| e.into_inner()).clone();
        Constraint::new(matcher, self.eog.clone())
    }
}

impl PartialEq for Grammar {
    /// Whether both are the same compiled form.
    fn eq(&self, other: &Grammar) -> bool {
        Arc::ptr_eq(&self.matcher, &other.matcher)
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammar")
    }
}
