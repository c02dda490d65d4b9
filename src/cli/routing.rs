//! `--routing`: which experts tokens choose, in place of their routers' choices.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use super::{Failure, text};
use crate::engine::{Opened, mixture};
use crate::model::{ForcedRouting, Routes};

/// Largest S of `zipf:S`.
const ZIPF_MAX: f64 = 10.0;
/// Decides what is drawn by chance.
const SEED: u64 = 1;

/// `--routing`.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum RoutingArg {
    Uniform,
    Zipf(f64),
    Trace(PathBuf),
}

impl std::fmt::Display for RoutingArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RoutingArg::Uniform => f.write_str("uniform"),
            RoutingArg::Zipf(s) => write!(f, "zipf:{s}"),
            RoutingArg::Trace(path) => write!(f, "trace:{}", path.display()),
        }
    }
}

impl FromStr for RoutingArg {
    type Err = String;

    fn from_str(text: &str) -> Result<RoutingArg, String> {
        let zipf = |s: &str| s.parse::<f64>().ok().filter(|s| (0.0..=ZIPF_MAX).contains(s));
        match text.split_once(':') {
            None if text == "uniform" => Ok(RoutingArg::Uniform),
            Some(("trace", file)) if !file.is_empty() => Ok(RoutingArg::Trace(file.into())),
            Some(("zipf", s)) if zipf(s).is_some() => Ok(RoutingArg::Zipf(zipf(s).unwrap_or_default())),
            _ => Err(format!("uniform, zipf:S with S from 0 to {ZIPF_MAX}, or trace:FILE was expected")),
        }
    }
}

impl RoutingArg {
    /// The routing for a model.
    pub(super) fn of(&self, opened: &Opened) -> Result<Arc<ForcedRouting>, Failure> {
        let mixture = mixture(&opened.model);
        let routing = match self {
            RoutingArg::Uniform => ForcedRouting::new(mixture, Routes::Uniform, SEED),
            RoutingArg::Zipf(s) => ForcedRouting::new(mixture, Routes::Zipf(*s), SEED),
            RoutingArg::Trace(path) => ForcedRouting::trace(mixture, &text::read_text(path)?),
        };
        routing.map(Arc::new).map_err(|e| Failure::usage(format!("--routing: {e}")))
    }
}
