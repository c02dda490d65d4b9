//! llama-server's own `/completion`: a text that is continued, under that server's names.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::error::{ApiError, Form};
use super::fields::Fields;
use super::job::{Finish, Summary, TokenLogprob};
use super::openai::{TOP_MAX, check_entries, finite, one_prompt, timings};
use super::params::{self, HARMLESS};
use super::served::Served;
use super::split::Looks;
use super::steps::{Answers, Dialect, Prepared, Step, data};
use super::{grammar, info, prompt};
use crate::engine::SamplerParams;

/// Reads a request to `/completion`.
///
/// # Errors
/// What is wrong with it.
pub fn completion(served: &Arc<Served>, mut f: Fields) -> Result<Prepared, ApiError> {
    let stream = f.flag("stream")?.unwrap_or(false);
    let given =
        f.any("prompt").ok_or_else(|| ApiError::field("prompt", "prompt: a text was expected, found nothing"))?;
    let tokens = one_prompt(given, served)?;
    let most = params::max_tokens(&mut f, &["max_tokens", "n_predict"])?;
    let stops = params::stops(&mut f, "stop")?;
    let reuse = f.flag("cache_prompt")?.unwrap_or(true);
    let top = f.whole("n_probs", 0, TOP_MAX)?.unwrap_or(0) as usize;
    let ids = f.flag("return_tokens")?.unwrap_or(false);
    f.only("n", &[json!(1)], "a request has one answer here; /v1/completions has several")?;
    f.only("n_cmpl", &[json!(1)], "a request has one answer here; /v1/completions has several")?;
    f.only("response_fields", &[json!([])], "all fields are answered")?;
    f.only("n_indent", &[json!(0)], "a least indentation is not built")?;
    f.ignore(&HARMLESS);
    let wanted = grammar::wanted(&mut f)?;
    let mut params = params::sampling(&mut f, served)?;
    f.finish()?;
    grammar::hold(served, &mut params, wanted, None, "")?;
    let settings = params.clone();
    let mut task = prompt::task(served, tokens, params, most, stops)?;
    (task.reuse, task.logprobs) = (reuse, (top > 0 || ids).then_some(top));
    check_entries(&task)?;
    let dialect =
        Native { served: served.clone(), settings, ids, top: top > 0, prompt: task.tokens(), told: 0, finish: None };
    Ok(Prepared::new(task, Looks::default(), dialect, stream))
}

/// llama-server's form of answers.
struct Native {
    served: Arc<Served>,
    settings: SamplerParams,
    /// Whether ids of tokens are told.
    ids: bool,
    /// Whether probabilities are.
    top: bool,
    /// Tokens of the prompt.
    prompt: usize,
    /// Tokens that were told of, where they are told at all.
    told: usize,
    finish: Option<Finish>,
}

impl Native {
    fn piece(&self, text: &str, tokens: &[TokenLogprob]) -> Json {
        let ids = if self.ids { tokens } else { &[] };
        let mut piece = json!({
            "index": 0,
            "content": text,
            "tokens": ids.iter().map(|t| t.id).collect::<Vec<_>>(),
            "stop": false,
            "tokens_predicted": self.told,
            "tokens_evaluated": self.prompt,
        });
        if self.top && !tokens.is_empty() {
            piece["completion_probabilities"] = tokens.iter().map(|t| self.token(t)).collect();
        }
        piece
    }

    fn token(&self, t: &TokenLogprob) -> Json {
        let one = |id: u32, logprob: f32| {
            let bytes = self.served.opened.tokenizer.token_bytes(id);
            let token = String::from_utf8_lossy(bytes);
            json!({ "id": id, "token": token, "bytes": bytes, "logprob": finite(logprob) })
        };
        let mut of = one(t.id, t.logprob);
        of["top_logprobs"] = t.top.iter().map(|&(id, l)| one(id, l)).collect();
        of
    }

    /// The last piece of a stream, or the only one.
    fn last(&self, text: &str, tokens: &[TokenLogprob], s: &Summary) -> Json {
        let mut last = self.piece(text, tokens);
        let (kind, word) = match &self.finish {
            Some(Finish::Stop(word)) => ("word", word.as_str()),
            Some(Finish::Length) => ("limit", ""),
            Some(Finish::End) => ("eos", ""),
            None => ("none", ""),
        };
        last["stop"] = true.into();
        last["model"] = self.served.name().into();
        last["tokens_predicted"] = s.generated.into();
        last["stop_type"] = kind.into();
        last["stopping_word"] = word.into();
        // A prompt that has no room is refused.
        last["truncated"] = false.into();
        last["tokens_cached"] = s.cached.into();
        last["generation_settings"] = info::params(&self.settings);
        last["timings"] = timings(s, &self.served);
        last
    }
}

impl Dialect for Native {
    fn begin(&mut self, _: &mut String) {}

    fn step(&mut self, step: Step, out: &mut String) {
        match step {
            Step::Words { text, logprobs, .. } => {
                self.told += logprobs.len();
                data(&self.piece(&text, &logprobs), out);
            }
            Step::Finished { finish, .. } => self.finish = Some(finish),
            Step::Done(summary) => data(&self.last("", &[], &summary), out),
            Step::Failed(e) => data(&e.json(Form::OpenAi), out),
            // Nothing is told apart in a text that is continued.
            Step::Thought { .. } | Step::Call { .. } => {}
        }
    }

    fn whole(&mut self, answers: &Answers) -> Json {
        let answer = answers.all.first().cloned().unwrap_or_default();
        self.finish = answer.finish;
        self.last(&answer.text, &answer.logprobs, &answers.summary)
    }

    fn ping(&self) -> Option<&'static str> {
        Some(": ping\n\n")
    }
}
