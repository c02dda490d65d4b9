//! Which of the models is loaded, and for how long. Pure: what the time is, the caller says.
//!
//! One is loaded at a time. While requests for another wait, those for the loaded one go first for its turn, which is
//! twice the time that loading it took; then it begins none, and those at hand end. So no model waits without a bound,
//! and at most about a third of the time goes to loading.

use std::time::{Duration, Instant};

/// The least turn.
const TURN_MIN: Duration = Duration::from_secs(1);
/// Times that loading took, in a turn.
const TURN_LOADS: u32 = 2;
/// The least time for which a model that could not be loaded is not tried again.
const REST_MIN: Duration = Duration::from_secs(10);

/// How long a model is to stay behind a request's end, if no other is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    /// As the server says (`--keep-alive`).
    #[default]
    Server,
    /// Until another is asked for.
    Always,
    /// So long.
    For(Duration),
}

impl Keep {
    /// Reads a time as Ollama's clients write it: seconds, or numbers with units, as `1h30m`; below zero is always.
    pub fn read(text: &str) -> Option<Keep> {
        let text = text.trim();
        let (below, mut rest) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        let mut seconds = 0.0;
        let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        if digits(rest) == rest.len() {
            seconds = rest.parse::<f64>().ok()?;
            rest = "";
        }
        while !rest.is_empty() {
            let (number, after) = rest.split_at(digits(rest));
            let unit = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
            let (unit, after) = after.split_at(unit);
            let each = match unit {
                "ns" => 1e-9,
                "us" | "µs" | "μs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
            seconds += number.parse::<f64>().ok()? * each;
            rest = after;
        }
        Some(Keep::of_seconds(if below { -seconds } else { seconds }))
    }

    /// So many seconds; below zero is always.
    pub fn of_seconds(seconds: f64) -> Keep {
        // What is longer than any clock tells is always.
        match Duration::try_from_secs_f64(seconds) {
            Ok(time) => Keep::For(time),
            Err(_) => Keep::Always,
        }
    }

    /// The time, where the server says `server`; `None` for no bound.
    pub fn time(self, server: Option<Duration>) -> Option<Duration> {
        match self {
            Keep::Server => server,
            Keep::Always => None,
            Keep::For(time) => Some(time),
        }
    }
}

/// What is in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Present {
    /// No model.
    #[default]
    Nothing,
    /// A model that is being loaded.
    Loading {
        /// Which.
        model: usize,
        /// Since when.
        since: Instant,
    },
    /// A model that requests are answered with.
    Loaded {
        /// Which.
        model: usize,
        /// Since when.
        since: Instant,
        /// How long loading it took.
        took: Duration,
        /// Whether a request of it has begun.
        used: bool,
        /// When it is given up if nothing comes; `None` for never.
        until: Option<Instant>,
    },
}

impl Present {
    /// The model that requests are answered with.
    pub fn loaded(&self) -> Option<usize> {
        match self {
            Present::Loaded { model, .. } => Some(*model),
            _ => None,
        }
    }

    /// The model that is loaded, or is being loaded.
    pub fn model(&self) -> Option<usize> {
        match self {
            Present::Loaded { model, .. } | Present::Loading { model, .. } => Some(*model),
            Present::Nothing => None,
        }
    }

    /// Whether the loaded model begins no more requests, since one of another has waited since `other` for its turn.
    pub fn gives_way(&self, other: Option<Instant>, now: Instant) -> bool {
        let Present::Loaded { since, took, used: true, .. } = *self else { return false };
        let turn = TURN_MIN.max(took * TURN_LOADS);
        other.is_some_and(|other| now.saturating_duration_since(other.max(since)) >= turn)
    }

    /// A request of the loaded model begins.
    pub fn begin(&mut self) {
        if let Present::Loaded { used, .. } = self {
            *used = true;
        }
    }

    /// The loaded model stays until then, if nothing comes.
    pub fn stay(&mut self, time: Option<Duration>, now: Instant) {
        if let Present::Loaded { until, .. } = self {
            // A time that no clock has is none.
            *until = time.and_then(|time| now.checked_add(time));
        }
    }

    /// Whether the loaded model, of which nothing runs or waits, is to be given up.
    pub fn is_over(&self, now: Instant) -> bool {
        matches!(self, Present::Loaded { until: Some(until), .. } if *until <= now)
    }
}

/// How long a model is not tried again that could not be loaded, which took so long.
pub fn rest(took: Duration) -> Duration {
    REST_MIN.max(took * TURN_LOADS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn a_model_has_its_turn_and_then_gives_way() {
        let t = Instant::now();
        let mut p = Present::Loaded { model: 0, since: t, took: 5 * S, used: false, until: None };
        // Not before it has served anybody, and not while nobody else waits.
        assert!(!p.gives_way(Some(t), t + 60 * S));
        p.begin();
        assert!(!p.gives_way(None, t + 60 * S));
        // Whoever waited while it was loaded waits for a turn, too.
        assert!(!p.gives_way(Some(t - 9 * S), t + 9 * S) && p.gives_way(Some(t - 9 * S), t + 10 * S));
        assert!(!p.gives_way(Some(t + 20 * S), t + 29 * S) && p.gives_way(Some(t + 20 * S), t + 30 * S));
    }

    #[test]
    fn times_are_read_as_clients_of_ollama_write_them() {
        for (text, keep) in [
            ("0", Some(Keep::For(Duration::ZERO))),
            ("0s", Some(Keep::For(Duration::ZERO))),
            ("300", Some(Keep::For(300 * S))),
            ("5m", Some(Keep::For(300 * S))),
            ("1h30m", Some(Keep::For(5400 * S))),
            ("1.5s", Some(Keep::For(Duration::from_millis(1500)))),
            ("250ms", Some(Keep::For(Duration::from_millis(250)))),
            ("-1", Some(Keep::Always)),
            ("-1m", Some(Keep::Always)),
            ("1e3h", None),
            ("99999999999999999999999h", Some(Keep::Always)),
            ("", None),
            ("m", None),
            ("5 m", None),
            ("5x", None),
            ("1h30", None),
        ] {
            assert_eq!(Keep::read(text), keep, "{text}");
        }
    }

    #[test]
    fn a_model_is_given_up_when_its_time_is_over() {
        let t = Instant::now();
        let mut p = Present::Loaded { model: 0, since: t, took: S, used: true, until: None };
        assert!(!p.is_over(t + 9 * S));
        p.stay(Keep::For(2 * S).time(None), t);
        assert!(!p.is_over(t + S) && p.is_over(t + 2 * S));
        p.stay(Keep::Always.time(Some(S)), t);
        assert!(!p.is_over(t + 9 * S));
        p.stay(Keep::Server.time(Some(S)), t);
        assert!(p.is_over(t + S));
        p.stay(Some(Duration::MAX), t);
        assert!(!p.is_over(t + 9 * S));
    }
}
