//! Routings that a benchmark forces: which experts each token chooses in each layer, in place of its router's choices.
//!
//! Pure: the experts of a token follow from the seed, the layer and the token's number alone, so that runs, replays and the
//! simulator see the same. A trace is JSON lines, one per token: a list over layers of the lists of chosen experts, best
//! first; a first line may be an object that describes it: its `layers`, `experts` and `top_k` must be the model's.

/// Experts of a mixture as a routing sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mixture {
    /// Layers with routed experts.
    pub layers: usize,
    /// Experts of each.
    pub experts: usize,
    /// Those that a token chooses.
    pub used: usize,
}

/// How experts are chosen by chance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Routes {
    /// Each as likely.
    Uniform,
    /// The expert of rank `r` with a weight of `1 / r^s`, the ranks of each layer in an order of their own.
    Zipf(f64),
}

/// Experts that a token chose, by layer, best first.
type Chosen = Vec<Vec<u32>>;

/// How experts are chosen.
#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Uniform,
    Zipf {
        s: f64,
        /// Running sums of the weights of ranks.
        sums: Vec<f64>,
        /// By layer, the expert of each rank.
        ranks: Vec<Vec<u32>>,
    },
    /// As recorded, by token; over and over.
    Trace(Vec<Chosen>),
}

impl Mixture {
    fn check(&self) -> Result<(), RoutingError> {
        let none = self.layers == 0 || self.experts == 0 || self.used == 0;
        if none { Err(RoutingError::NoExperts) } else { Ok(()) }
    }

    /// Whether what the header of a trace says is so.
    fn check_header(&self, line: usize, text: &str) -> Result<(), RoutingError> {
        let header: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(text).map_err(|e| RoutingError::Header { line, why: e.to_string() })?;
        for (name, want) in [("layers", self.layers), ("experts", self.experts), ("top_k", self.used)] {
            if let Some(found) = header.get(name).filter(|n| n.as_u64() != Some(want as u64)) {
                return Err(RoutingError::OtherModel { line, name, found: found.to_string(), want });
            }
        }
        Ok(())
    }

    /// Whether a token of this mixture may have chosen these; else why not.
    fn check_token(&self, token: &Chosen) -> Result<(), String> {
        let &Mixture { layers, experts, used } = self;
        if token.len() != layers {
            return Err(format!("it has {} layers, the model {layers} with routed experts", token.len()));
        }
        for chosen in token {
            let chosen = &chosen[..used.min(chosen.len())];
            let twice = chosen.iter().enumerate().any(|(i, e)| chosen[..i].contains(e));
            if chosen.len() < used || twice {
                return Err(format!("{chosen:?} are not {used} experts"));
            }
            if let Some(e) = chosen.iter().find(|e| **e as usize >= experts) {
                return Err(format!("expert {e} is none of the model's {experts}"));
            }
        }
        Ok(())
    }
}

/// Why a routing cannot be forced on a model.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RoutingError {
    /// The model routes nothing.
    #[error("the model has no routed experts")]
    NoExperts,
    /// A line of a trace that is none.
    #[error("line {line} of the trace is no list of a token's layers, each a list of {used} or more experts: {why}")]
    Line {
        /// From 1.
        line: usize,
        /// Choices that a token of the model has.
        used: usize,
        /// What is wrong.
        why: String,
    },
    /// A trace's header that is none.
    #[error("line {line} of the trace begins as its header and is no JSON object: {why}")]
    Header {
        /// From 1.
        line: usize,
        /// What is wrong.
        why: String,
    },
    /// A trace of another model.
    #[error("line {line} of the trace, its header, says {name:?}: {found}, but the model has {want}")]
    OtherModel {
        /// From 1.
        line: usize,
        /// The name of what differs.
        name: &'static str,
        /// What the header has, as it is written there.
        found: String,
        /// What the model has.
        want: usize,
    },
    /// A trace without a token.
    #[error("the trace has no token")]
    Empty,
}

/// A routing for a mixture.
#[derive(Clone, Debug, PartialEq)]
pub struct ForcedRouting {
    mixture: Mixture,
    kind: Kind,
    seed: u64,
}

/// Draws for each choice before an expert is taken in turn.
const DRAWS: usize = 64;

/// A number that looks drawn by chance, of four others.
fn hash(seed: u64, layer: u64, token: u64, draw: u64) -> u64 {
    let mut x = seed;
    for part in [layer, token, draw] {
        // splitmix64 (Steele, Lea, Flood 2014).
        x = (x ^ part).wrapping_add(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^= x >> 31;
    }
    x
}

/// Of 0 up to, not including, 1.
fn unit(x: u64) -> f64 {
    (x >> 11) as f64 / (1u64 << 53) as f64
}

impl ForcedRouting {
    /// A routing of this mixture.
    ///
    /// # Errors
    /// Where the model has no experts.
    pub fn new(mixture: Mixture, routes: Routes, seed: u64) -> Result<ForcedRouting, RoutingError> {
        mixture.check()?;
        let Mixture { layers, experts, .. } = mixture;
        let kind = match routes {
            Routes::Uniform => Kind::Uniform,
            Routes::Zipf(s) => {
                let sums = (1..=experts).scan(0.0, |sum, r| {
                    *sum += (r as f64).powf(-s);
                    Some(*sum)
                });
                let ranks = (0..layers).map(|layer| {
                    let mut order: Vec<u32> = (0..experts as u32).collect();
                    for i in (1..experts).rev() {
                        let j = hash(seed, layer as u64, u64::MAX, i as u64) % (i as u64 + 1);
                        order.swap(i, j as usize);
                    }
                    order
                });
                Kind::Zipf { s, sums: sums.collect(), ranks: ranks.collect() }
            }
        };
        Ok(ForcedRouting { mixture, kind, seed })
    }

    /// What a trace recorded, for the model that it is of.
    ///
    /// # Errors
    /// Where the model has no experts or, of a trace, other layers or fewer choices or experts, and where a line is no list of lists
    /// of numbers.
    pub fn trace(mixture: Mixture, text: &str) -> Result<ForcedRouting, RoutingError> {
        mixture.check()?;
        let mut lines = (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()).peekable();
        if let Some((line, text)) = lines.next_if(|(_, text)| text.trim_start().starts_with('{')) {
            mixture.check_header(line, text)?;
        }
        let token = |(line, text): (usize, &str)| {
            let error = |why| RoutingError::Line { line, used: mixture.used, why };
            let token: Chosen = serde_json::from_str(text).map_err(|e| error(e.to_string()))?;
            mixture.check_token(&token).map_err(error)?;
            Ok(token)
        };
        let tokens = lines.map(token).collect::<Result<Vec<_>, _>>()?;
        if tokens.is_empty() {
            return Err(RoutingError::Empty);
        }
        Ok(ForcedRouting { mixture, kind: Kind::Trace(tokens), seed: 0 })
    }

    /// What it is a routing of.
    pub fn mixture(&self) -> Mixture {
        self.mixture
    }

    /// In a few words.
    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::Uniform => "each expert as likely".into(),
            Kind::Zipf { s, .. } => format!("by Zipf's law, s = {s}"),
            Kind::Trace(tokens) => format!("by a trace of {} tokens", tokens.len()),
        }
    }

    /// The experts that a token chooses in a layer of those with experts, best first; `to` has room for all choices.
    pub fn choose(&self, layer: usize, token: u64, to: &mut [u32]) {
        if let Kind::Trace(tokens) = &self.kind {
            let chosen = &tokens[(token % tokens.len() as u64) as usize][layer % self.mixture.layers];
            return to.iter_mut().zip(chosen).for_each(|(to, e)| *to = *e);
        }
        let n = self.mixture.experts as u32;
        let mut draw = 0;
        for i in 0..to.len() {
            let (chosen, rest) = to.split_at_mut(i);
            let mut tries = 0;
            rest[0] = loop {
                let x = hash(self.seed, layer as u64, token, draw);
                draw += 1;
                tries += 1;
                let expert = match &self.kind {
                    _ if tries > DRAWS => (0..n).find(|e| !chosen.contains(e)).unwrap_or(0),
                    Kind::Zipf { sums, ranks, .. } => of_rank(sums, &ranks[layer % ranks.len()], unit(x)),
                    _ => (unit(x) * f64::from(n)) as u32,
                };
                if !chosen.contains(&expert) {
                    break expert;
                }
            };
        }
    }
}

/// The expert at this share of all weights, by the running sums of the ranks' weights.
fn of_rank(sums: &[f64], ranks: &[u32], share: f64) -> u32 {
    let all = sums.last().copied().unwrap_or(1.0);
    ranks[sums.partition_point(|s| *s <= share * all).min(ranks.len() - 1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIXTURE: Mixture = Mixture { layers: 3, experts: 32, used: 4 };

    fn counts(routing: &ForcedRouting, layer: usize) -> Vec<u32> {
        let mut counts = vec![0; 32];
        for token in 0..2000 {
            let mut chosen = [99; 4];
            routing.choose(layer, token, &mut chosen);
            for (i, e) in chosen.iter().enumerate() {
                assert!(!chosen[..i].contains(e), "{chosen:?}");
                counts[*e as usize] += 1;
            }
        }
        counts
    }

    #[test]
    fn the_same_seed_gives_the_same_experts_spread_as_asked_for() {
        let of = |routes, seed| ForcedRouting::new(MIXTURE, routes, seed).unwrap();
        for routes in [Routes::Uniform, Routes::Zipf(1.0)] {
            let (a, b) = (of(routes, 1), of(routes, 1));
            assert_eq!(counts(&a, 2), counts(&b, 2));
            assert_ne!(counts(&a, 2), counts(&a, 1), "layers have orders of their own");
            assert_ne!(counts(&a, 2), counts(&of(routes, 2), 2));
        }
        let uniform = counts(&of(Routes::Uniform, 1), 0);
        assert!(uniform.iter().all(|n| (180..320).contains(n)), "250 each: {uniform:?}");
        let mut zipf = counts(&of(Routes::Zipf(1.2), 1), 0);
        zipf.sort_unstable();
        assert!(zipf[31] > 1500 && zipf[0] < 60, "{zipf:?}");
        // However uneven, a token has as many as it is to have.
        counts(&of(Routes::Zipf(40.0), 1), 0);
    }

    #[test]
    fn a_trace_is_read_and_held_to_the_model() {
        let text = "{\"layers\": 2, \"experts\": 4, \"top_k\": 2, \"seed\": 1}\n[[0,1],[2,3]]\n\n[[1,0],[3,0]]\n";
        let small = Mixture { layers: 2, experts: 4, used: 2 };
        let routing = ForcedRouting::trace(small, text).unwrap();
        let mut chosen = [9; 2];
        for (token, want) in [(0, [2, 3]), (1, [3, 0]), (2, [2, 3])] {
            routing.choose(1, token, &mut chosen);
            assert_eq!(chosen, want);
        }
        for (text, m, word) in [
            ("[[0,1]]", small, "1 layers"),
            ("[[0,1],[2]]", small, "are not 2"),
            ("[[0,1],[2,2]]", small, "are not 2"),
            ("[[0,1],[2,4]]", small, "expert 4"),
            ("[[0,1],[2,3]]\n[0]", small, "line 2"),
            // Lines are those of the file, whatever stands between tokens and before them.
            ("{}\n\n[[0,1],[2,3]]\n[[0,1],[2,4]]", small, "line 4 "),
            ("\n{\"layers\": 2}\n[[0,1]]", small, "line 3 "),
            ("[[0,1],[2,3]]\n{}", small, "line 2 "),
            (
                "{\"layers\": 3}\n[[0,1],[2,3]]",
                small,
                "line 1 of the trace, its header, says \"layers\": 3, but the model has 2",
            ),
            ("{\"experts\": 8}\n[[0,1],[2,3]]", small, "\"experts\": 8, but the model has 4"),
            ("{\"top_k\": 1}\n[[0,1],[2,3]]", small, "\"top_k\": 1, but the model has 2"),
            ("{\"top_k\": \"2\"}\n[[0,1],[2,3]]", small, "\"top_k\": \"2\", but"),
            ("{\"layers\": \n[[0,1],[2,3]]", small, "line 1 of the trace begins as its header"),
            ("{\"layers\": 2}", small, "no token"),
            ("", small, "no token"),
            ("[[0,1],[2,3]]", Mixture { layers: 0, ..small }, "no routed"),
        ] {
            let e = ForcedRouting::trace(m, text).unwrap_err().to_string();
            assert!(e.contains(word), "{text}: {e}");
        }
    }
}
