//! A machine as a plan sees it: sizes and rates, each rate measured or a guess, with its source.
//!
//! Written as TOML for machines that one does not have; some are shipped.

use serde::{Deserialize, Deserializer, Serialize};

use super::{Costs, parse_size};
use crate::units::is_rate;

/// What a link carries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// 10⁹ bytes per second.
    pub gb_per_s: f64,
    /// Measured on this machine or one like it; else a guess.
    #[serde(default)]
    pub measured: bool,
    /// Where the figure comes from.
    #[serde(default)]
    pub source: String,
}

impl Rate {
    /// A measured rate.
    pub fn measured(bytes_per_s: f64, source: impl Into<String>) -> Rate {
        Rate { gb_per_s: bytes_per_s / 1e9, measured: true, source: source.into() }
    }

    /// A guessed rate.
    pub fn guess(bytes_per_s: f64, source: impl Into<String>) -> Rate {
        Rate { gb_per_s: bytes_per_s / 1e9, measured: false, source: source.into() }
    }

    /// Bytes a second.
    pub fn bytes_per_s(&self) -> f64 {
        self.gb_per_s * 1e9
    }
}

/// What products of matrices reach in prefill.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Speed {
    /// 10¹² multiplications and additions a second, each counted.
    pub tflops: f64,
    /// As for [`Rate`].
    #[serde(default)]
    pub measured: bool,
    /// As for [`Rate`].
    #[serde(default)]
    pub source: String,
}

/// A GPU and its link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuSide {
    /// Name.
    pub name: String,
    /// Bytes of VRAM.
    #[serde(deserialize_with = "size")]
    pub vram: u64,
    /// Of those, taken by others: a desktop, the driver.
    #[serde(default, deserialize_with = "size")]
    pub vram_taken: u64,
    /// Multiprocessors, which some buffers are sized by.
    pub multiprocessors: usize,
    /// Rate at which VRAM is read.
    pub memory: Rate,
    /// Rate of copies from pinned memory to it.
    pub link: Rate,
    /// The same while processors read memory; estimated if absent.
    #[serde(default)]
    pub link_beside: Option<Rate>,
    /// Products in prefill; unknown if absent.
    pub gemm: Option<Speed>,
    /// Times of its one-token passes that no rate tells.
    #[serde(default)]
    pub costs: Costs,
}

/// Memory of the processors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RamSide {
    /// Bytes installed.
    #[serde(deserialize_with = "size")]
    pub size: u64,
    /// Bytes that programs may take; 15/16 of `size` if absent.
    #[serde(default, deserialize_with = "optional_size")]
    pub available: Option<u64>,
    /// Bytes that a plan may take, where more is known than `available`: of this machine, with the limits on
    /// this process.
    #[serde(skip)]
    pub budget: Option<u64>,
    /// Rate at which all processors read it together.
    pub read: Rate,
    /// The same, by all processors but one, while the link to a GPU carries what it can; estimated if absent.
    #[serde(default)]
    pub beside: Option<Rate>,
    /// What fewer processors read meanwhile; estimated if absent.
    #[serde(default)]
    pub fewer: Vec<Fewer>,
}

/// Some processors that read memory while the link to a GPU carries what it can.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fewer {
    /// How many.
    pub threads: usize,
    /// Rate at which they read it together.
    pub read: Rate,
    /// What the link carries meanwhile.
    pub link: Rate,
}

/// Storage that tier C is read from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageSide {
    /// Rate of one drive.
    pub read: Rate,
    /// Drives that are read side by side.
    #[serde(default = "one")]
    pub drives: usize,
    /// Reads are copies by processors, as from a memory file system.
    #[serde(default)]
    pub copies: bool,
}

/// Processors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuSide {
    /// Threads that compute.
    pub threads: usize,
    /// Weights that one-token passes compute; what memory carries if absent.
    pub decode: Option<Rate>,
    /// Products in prefill; unknown if absent.
    pub gemm: Option<Speed>,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// What to call it.
    pub name: String,
    /// Memory.
    pub ram: RamSide,
    /// Processors.
    pub cpu: CpuSide,
    /// Storage; none if absent.
    pub storage: Option<StorageSide>,
    /// The GPU; none if absent.
    pub gpu: Option<GpuSide>,
}

/// Profiles that are shipped, by name.
pub const PROFILES: [(&str, &str); 7] = [
    ("rtx-5060-ti", include_str!("../../profiles/rtx-5060-ti.toml")),
    ("rtx-3090-gen3x8", include_str!("../../profiles/rtx-3090-gen3x8.toml")),
    ("rtx-4080-64gb", include_str!("../../profiles/rtx-4080-64gb.toml")),
    ("rtx-4090", include_str!("../../profiles/rtx-4090.toml")),
    ("h100", include_str!("../../profiles/h100.toml")),
    ("laptop-8gb", include_str!("../../profiles/laptop-8gb.toml")),
    ("cpu-only", include_str!("../../profiles/cpu-only.toml")),
];

impl Machine {
    /// Reads a machine from TOML.
    ///
    /// # Errors
    /// What is wrong with the text, or a rate or size that cannot be.
    pub fn parse(text: &str) -> Result<Machine, String> {
        // In one line, without the text around it: a file of another kind has lines of any length.
        let machine: Machine = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |s| 1 + text[..s.start.min(text.len())].matches('\n').count());
            format!("line {line}: {}", e.message().replace('\n', ", "))
        })?;
        for (name, rate) in machine.rates() {
            if !is_rate(rate.bytes_per_s()) {
                return Err(format!("{name}: {} GB/s is no rate of a machine", rate.gb_per_s));
            }
        }
        // What is measured differs from one time to the next.
        let beyond = |beside: Option<&Rate>, alone: &Rate| beside.is_some_and(|r| r.gb_per_s > 1.5 * alone.gb_per_s);
        if beyond(machine.ram.beside.as_ref(), &machine.ram.read) {
            return Err("RAM beside the link is faster than RAM alone".into());
        }
        if machine.gpu.as_ref().is_some_and(|g| beyond(g.link_beside.as_ref(), &g.link)) {
            return Err("the link to the GPU beside reads of RAM is faster than alone".into());
        }
        let gemm = [machine.cpu.gemm.as_ref(), machine.gpu.as_ref().and_then(|g| g.gemm.as_ref())];
        if let Some(s) = gemm.into_iter().flatten().find(|s| !(1e-6..1e6).contains(&s.tflops)) {
            return Err(format!("gemm: {} TFLOPS is no speed", s.tflops));
        }
        let times = machine.gpu.iter().flat_map(|g| g.costs.all());
        if let Some((name, t)) = times.into_iter().find(|(_, t)| !(0.0..1e9).contains(&t.us)) {
            return Err(format!("costs: {} us of {name} is no time", t.us));
        }
        if let Some(f) = machine.ram.fewer.iter().find(|f| f.threads == 0 || f.threads >= machine.cpu.threads) {
            return Err(format!("{} threads are not fewer than the processors, or none", f.threads));
        }
        if machine.cpu.threads == 0 || machine.storage.as_ref().is_some_and(|s| s.drives == 0) {
            return Err("threads and drives must be at least 1".into());
        }
        Ok(machine)
    }

    /// The shipped profile of that name.
    pub fn profile(name: &str) -> Option<Result<Machine, String>> {
        PROFILES.iter().find(|p| p.0 == name).map(|(_, text)| Machine::parse(text))
    }

    /// All rates, named as messages call them.
    pub fn rates(&self) -> Vec<(&'static str, &Rate)> {
        let gpu = self.gpu.iter().flat_map(|g| [("VRAM", &g.memory), ("link to the GPU", &g.link)]);
        let link_beside = self.gpu.iter().filter_map(|g| Some(("link beside reads of RAM", g.link_beside.as_ref()?)));
        let beside = self.ram.beside.iter().map(|r| ("RAM beside the link", r));
        let storage = self.storage.iter().map(|s| ("storage", &s.read));
        let decode = self.cpu.decode.iter().map(|r| ("decode by processors", r));
        let fewer = self.ram.fewer.iter();
        let fewer =
            fewer.flat_map(|f| [("RAM beside the link, by fewer threads", &f.read), ("link beside them", &f.link)]);
        let alone = gpu.chain(storage).chain([("RAM", &self.ram.read)]).chain(decode);
        alone.chain(link_beside).chain(beside).chain(fewer).collect()
    }

    /// Bytes a second that processors and the link to the GPU read of RAM at once; `None` where they were not measured together.
    pub fn ram_and_link(&self) -> Option<f64> {
        let (ram, link) = (self.ram.beside.as_ref()?, self.gpu.as_ref()?.link_beside.as_ref()?);
        // Less than processors alone read is no bound.
        Some((ram.bytes_per_s() + link.bytes_per_s()).max(self.ram.read.bytes_per_s()))
    }

    /// Bytes a second of all drives together.
    pub fn storage_bytes_per_s(&self) -> Option<f64> {
        self.storage.as_ref().map(|s| s.read.bytes_per_s() * s.drives as f64)
    }
}

/// The largest share of a prediction that the spread of rates explains. A run that exceeds it shows that the rates which the prediction
/// counts with are not the machine's: it was busy when they were measured.
pub const SHARE_MAX: f64 = 1.15;

fn one() -> usize {
    1
}

fn size<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Given {
        Bytes(u64),
        Text(String),
    }
    match Given::deserialize(d)? {
        Given::Bytes(n) => Ok(n),
        Given::Text(t) => parse_size(&t).map_err(serde::de::Error::custom),
    }
}

fn optional_size<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
    size(d).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_parses_and_says_where_its_rates_come_from() {
        for (name, _) in PROFILES {
            let m = Machine::profile(name).unwrap().unwrap_or_else(|e| panic!("{name}: {e}"));
            for (what, rate) in m.rates() {
                assert!(!rate.source.is_empty(), "{name}: {what} has no source");
            }
            for (what, time) in m.gpu.iter().flat_map(|g| g.costs.all()) {
                assert!(!time.source.is_empty(), "{name}: {what} has no source");
            }
        }
        assert!(Machine::profile("no-such").is_none());
    }

    #[test]
    fn what_is_no_machine_is_refused_with_a_reason() {
        let good = "name = 'm'\n[ram]\nsize = '8GiB'\nread = { gb_per_s = 10.0 }\n[cpu]\nthreads = 2\n";
        assert_eq!(Machine::parse(good).unwrap().ram.size, 8 << 30);
        for (from, to, word) in [
            ("10.0", "-1.0", "no rate"),
            ("10.0", "5e-324", "no rate"),
            ("10.0", "1e300", "no rate"),
            ("10.0 }", "10.0 }\nbeside = { gb_per_s = 1000.0 }", "RAM beside the link"),
            ("8GiB", "8 parsecs", "size"),
            ("threads = 2", "threads = 0", "at least 1"),
            (
                "10.0 }",
                "10.0 }\nfewer = [{ threads = 2, read = { gb_per_s = 9.0 }, link = { gb_per_s = 9.0 } }]",
                "not fewer",
            ),
            ("name", "nmae", "nmae"),
        ] {
            let e = Machine::parse(&good.replace(from, to)).unwrap_err();
            assert!(e.contains(word), "{e}");
        }
    }
}
