//! The models that are served, and the limits of requests: what every request is read against.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use serde_json::Value as Json;

use super::disk::Shelf;
use super::error::ApiError;
use super::job::Pooling;
use super::split::{self, Family};
use crate::engine::{ConstraintError, Grammars, Marks, Opened, SamplerParams};
use crate::tokenizer::ChatTemplate;

/// Bounds of what requests take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a body.
    pub body: u64,
    /// Connections at once.
    pub connections: usize,
    /// Jobs that wait.
    pub queue: usize,
    /// The longest that a request may take, waiting included.
    pub time: Duration,
    /// Time between signs of life where nothing else is sent.
    pub ping: Duration,
    /// Tokens of an answer; `None` until the context is full.
    pub tokens: Option<usize>,
    /// Time that running requests have when the server is asked to stop.
    pub grace: Duration,
    /// How long a model stays in memory behind a request that says nothing of it; `None` until another is asked for.
    pub keep: Option<Duration>,
}

/// Names of models that an error lists at most.
const LISTED: usize = 20;

/// The models of a server.
pub struct Models {
    all: Vec<Arc<Served>>,
}

impl Models {
    /// These, one or more; `None` for none.
    pub fn new(all: Vec<Served>) -> Option<Models> {
        let all: Vec<Arc<Served>> = all.into_iter().map(Arc::new).collect();
        (!all.is_empty()).then_some(Models { all })
    }

    /// All, in the order in which they were given.
    pub fn all(&self) -> &[Arc<Served>] {
        &self.all
    }

    /// The limits, which all have.
    pub fn limits(&self) -> &Limits {
        &self.all[0].limits
    }

    /// The number of the model that a request names; where it names none, the first.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn find(&self, name: Option<&str>) -> Result<usize, ApiError> {
        let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(0) };
        if let Some(found) = self.all.iter().position(|served| served.has_name(name)) {
            return Ok(found);
        }
        let shown: String = name.chars().take(100).collect();
        let mut names: Vec<String> = self.all.iter().take(LISTED).map(|s| format!("{:?}", s.name())).collect();
        names.extend((self.all.len() > LISTED).then(|| "others (GET /v1/models)".to_owned()));
        let message =
            format!("this server has no model {shown:?}; it serves {} (--alias gives more names)", names.join(", "));
        Err(ApiError::model(message))
    }
}

/// A model and how it is served.
pub struct Served {
    /// Header, tokenizer, structure.
    pub opened: Opened,
    /// Its chat template.
    pub template: ChatTemplate,
    /// The template's source.
    pub template_source: String,
    /// Names that requests may call it by; the first is the one that answers bear.
    pub names: Vec<String>,
    /// What sampling parameters are where a request says nothing.
    pub defaults: SamplerParams,
    /// The seed where a request gives none; `None` for one from the clock.
    pub seed: Option<u64>,
    /// Positions of a sequence.
    pub n_ctx: usize,
    /// Bytes of the longest token.
    pub token_bytes_max: usize,
    /// Bounds.
    pub limits: Limits,
    /// When the server started, in seconds since 1970.
    pub started_unix_s: u64,
    /// When the file was last changed, in seconds since 1970.
    pub modified_unix_s: u64,
    /// What holds answers to a form, once one was asked for.
    pub grammars: std::sync::OnceLock<Result<Grammars, ConstraintError>>,
    /// Where prompts are kept while no server runs.
    pub shelf: Option<Shelf>,
    /// How vectors of texts are made.
    pub pooling: Pooling,
    /// Whether they can be made, once that is known.
    pub embeds: std::sync::OnceLock<bool>,
    /// Where its weights lie and what computes them, once that is known: `session` of `nt run --json`. It stays when the
    /// model is given up, for what is told of its last requests.
    pub session: RwLock<Option<Json>>,
}

impl Served {
    /// The name that answers bear.
    pub fn name(&self) -> &str {
        self.names.first().map_or("model", String::as_str)
    }

    /// Whether requests may call it so.
    fn has_name(&self, name: &str) -> bool {
        let plain = name.strip_suffix(":latest").unwrap_or(name);
        self.names.iter().any(|n| n == name || n == plain)
    }

    /// Tells where its weights lie now, and whether vectors of texts can be made.
    pub fn set_session(&self, about: Json, embeds: bool) {
        *self.session.write().unwrap_or_else(PoisonError::into_inner) = Some(about);
        let _ = self.embeds.set(embeds);
    }

    /// What compiles forms of answers for this model's tokens.
    ///
    /// # Errors
    /// If its tokens cannot be held to a form.
    pub fn grammars(&self) -> Result<&Grammars, ConstraintError> {
        self.grammars.get_or_init(|| Grammars::new(&self.opened.tokenizer)).as_ref().map_err(Clone::clone)
    }

    /// Refuses text that no context has room for, before it is rendered and made tokens, which takes long for much.
    ///
    /// # Errors
    /// If it has more bytes than as many of the longest tokens as the context holds.
    pub fn check_bytes(&self, bytes: usize, field: &str) -> Result<(), ApiError> {
        let most = self.n_ctx.saturating_mul(self.token_bytes_max);
        if bytes <= most {
            return Ok(());
        }
        let message = format!(
            "{field}: {bytes} bytes of text are more than the {} tokens that the context holds, of at most {} bytes each; shorten it, or serve with a larger --ctx",
            self.n_ctx, self.token_bytes_max
        );
        Err(ApiError { param: Some(field.to_owned()), ..ApiError::too_long(message) })
    }

    /// A part of what is known of where its weights lie and what computes them; `null` before it was loaded.
    pub fn session(&self, key: &str) -> Json {
        let session = self.session.read().unwrap_or_else(PoisonError::into_inner);
        session.as_ref().and_then(|s| s.get(key)).cloned().unwrap_or_default()
    }

    /// Where its weights lie, once they do.
    pub fn plan(&self) -> Json {
        self.session("plan")
    }

    /// How the model writes calls of tools, if nt can read them.
    pub fn family(&self) -> Option<Family> {
        Family::of(&self.template_source)
    }

    /// Whether the model reasons apart from its answer, between marks or in a channel.
    pub fn thinks(&self) -> bool {
        Marks::of(&self.template_source).is_some() || split::in_channels(&self.template_source)
    }
}

/// Seconds since 1970.
pub fn unix_s() -> u64 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_secs())
}

/// A time in seconds since 1970, as RFC 3339 writes it, in UTC. Days to dates after Howard Hinnant, "chrono-Compatible
/// Low-Level Date Algorithms", `civil_from_days`.
pub fn rfc3339(unix_s: u64) -> String {
    let (days, s) = (unix_s / 86_400, unix_s % 86_400);
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", s / 3600, s / 60 % 60, s % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_dates() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(rfc3339(1_798_761_599), "2026-12-31T23:59:59Z");
    }
}
