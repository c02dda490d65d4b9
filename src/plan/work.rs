//! What a pass asks of each unit: bytes to move and time to compute.

use super::{Costs, Machine, UnitSize};
use crate::gguf::TensorType;

/// A unit and its part of a pass.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitWork {
    /// Where it belongs, and what it takes in memory.
    pub size: UnitSize,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Bytes of its matrices by type, and their elements.
    pub matrices: Vec<(TensorType, u64, u64)>,
    /// Share of one-token passes that use it: 1, or for a routed expert the chosen ones' part of all.
    pub share: f64,
    /// Share of its uses in which a cache in RAM has it not, where its home is storage: 1 without a cache.
    pub miss: f64,
    /// Operations of its part that have no fused call.
    pub operations: usize,
}

/// Share of what VRAM carries at which one-token products read weights of a type, on an H100
/// (docs/benchmarks.md: decode of 8B Q8_0 and 32B Q4_K_M all in VRAM, less what a pass costs anyhow).
fn gpu_share(ty: TensorType) -> f64 {
    match ty {
        TensorType::F32 | TensorType::F16 | TensorType::BF16 => 0.75,
        TensorType::Q8_0 => 0.76,
        TensorType::Q4_K | TensorType::Q5_K | TensorType::Q6_K => 0.67,
        // gpt-oss-20b all in VRAM: what is left of its layers beside [`super::Costs`].
        TensorType::MXFP4 => 0.36,
        _ => 0.55,
    }
}

/// Weights of a type that one of a GPU's multiprocessors multiplies in a nanosecond in one-token products; `None` where memory binds. An
/// H200 with the 70B shape, all in VRAM: 4.9 and 3.7 weights a picosecond of Q2_K and Q3_K, and 5.4 of the types with grids, on 132
/// multiprocessors (docs/benchmarks.md).
fn gpu_weights_per_ns(ty: TensorType) -> Option<f64> {
    use TensorType as T;
    match ty {
        T::Q2_K => Some(37.0),
        T::Q3_K => Some(28.0),
        T::IQ1_S | T::IQ1_M | T::IQ2_XXS | T::IQ2_XS | T::IQ2_S | T::IQ3_XXS | T::IQ3_S => Some(41.0),
        _ => None,
    }
}

/// How fast processors compute weights of a type, beside those that memory binds: K-quants keep fewer reads in flight (15 of 16 processors
/// of an H200's machine: 82 GB/s of Q4_K_M beside 92 of Q8_0, with 12 and 8 of them 72 beside 75 and 56 beside 57), and gpt-oss-20b on 16
/// processors came to 44 GB/s of MXFP4 (docs/benchmarks.md).
fn cpu_share(ty: TensorType) -> f64 {
    match ty {
        TensorType::Q4_K | TensorType::Q5_K | TensorType::Q6_K => 0.95,
        TensorType::MXFP4 => 0.5,
        _ => 1.0,
    }
}

/// Tokens of the passes by which the speed of a GPU's products is given, and those at which it is half of what very long ones reach:
/// each pass turns weights to halves, and reads them, once. On an H100 two sizes of pass give 395 for 8B Q8_0 and 247 for 30B-A3B
/// (docs/benchmarks.md, larger batches).
const SPEED_TOKENS: f64 = 512.0;
const HALF_SPEED_TOKENS: f64 = 300.0;
/// The share of that speed that a GPU's products with experts reach, whose rows are few for each: 30B-A3B and gpt-oss-20b, all in an
/// H100's VRAM (docs/benchmarks.md).
const EXPERTS_SHARE: f64 = 0.25;

/// Fixed overhead per pass on a GPU, excluding units: logits to the host, and the next token's row back.
const GPU_PASS_S: f64 = 100e-6;
/// The same on processors, whose threads only meet.
const CPU_PASS_S: f64 = 20e-6;
/// Share of what memory carries that one-token products on processors reach where nothing is measured.
const CPU_SHARE: f64 = 0.85;

/// Where weights are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Site {
    /// In VRAM.
    Gpu,
    /// In RAM.
    Cpu,
}

/// Seconds that a pass takes beside its units.
pub fn pass_s(site: Site) -> f64 {
    match site {
        Site::Gpu => GPU_PASS_S,
        Site::Cpu => CPU_PASS_S,
    }
}

impl UnitWork {
    /// Seconds of computing it for one token; of an expert, as its bytes take.
    pub fn decode_s(&self, machine: &Machine, site: Site) -> f64 {
        match (site, &machine.gpu) {
            (Site::Gpu, Some(gpu)) => self.on_gpu_s(gpu.memory.bytes_per_s(), gpu.multiprocessors, &gpu.costs),
            _ => self.on_processors_s(cpu_decode_bytes_per_s(machine)),
        }
    }

    /// Seconds of computing it for one token on a GPU that reads so many bytes of its memory a second and has so many multiprocessors; 0
    /// where that is not known.
    pub fn on_gpu_s(&self, bytes_per_s: f64, multiprocessors: usize, costs: &Costs) -> f64 {
        let read = |&(ty, bytes, weights): &(TensorType, u64, u64)| {
            let a_ns = gpu_weights_per_ns(ty).filter(|_| multiprocessors > 0);
            let multiplied = a_ns.map_or(0.0, |n| weights as f64 / (n * 1e9 * multiprocessors as f64));
            (bytes as f64 / (bytes_per_s * gpu_share(ty))).max(multiplied)
        };
        let s: f64 = self.matrices.iter().map(read).sum();
        s.max(costs.least_s(self.size.part, self.operations))
    }

    /// Seconds of computing it for one token on processors that compute so many bytes of weights a second.
    pub fn on_processors_s(&self, bytes_per_s: f64) -> f64 {
        let slower = |&(ty, bytes, _): &(TensorType, u64, u64)| bytes as f64 * (1.0 / cpu_share(ty) - 1.0);
        (self.bytes as f64 + self.matrices.iter().map(slower).sum::<f64>()) / bytes_per_s
    }

    /// Seconds of computing it for those of `tokens` tokens that use it, if any does; `None` if the speed
    /// of products is not known. The head computes one row.
    pub fn prefill_s(&self, machine: &Machine, site: Site, tokens: usize) -> Option<f64> {
        let speed = match site {
            Site::Gpu => machine.gpu.as_ref()?.gemm.as_ref()?,
            Site::Cpu => machine.cpu.gemm.as_ref()?,
        };
        let once = self.decode_s(machine, site);
        if self.size.block.is_none() {
            return Some(once);
        }
        let weights: u64 = self.matrices.iter().map(|m| m.2).sum();
        let part = if site == Site::Gpu { self.share_of_speed(tokens) } else { 1.0 };
        let tokens = tokens as f64 * self.share / self.used_by(tokens);
        Some((2.0 * weights as f64 * tokens / (speed.tflops * 1e12 * part)).max(once))
    }

    /// What a GPU's products reach of their speed in a pass of so many tokens.
    fn share_of_speed(&self, tokens: usize) -> f64 {
        let tokens = tokens as f64;
        let filled = tokens / (tokens + HALF_SPEED_TOKENS) * (SPEED_TOKENS + HALF_SPEED_TOKENS) / SPEED_TOKENS;
        filled * if self.size.routed() { EXPERTS_SHARE } else { 1.0 }
    }

    /// Chance that any of `tokens` tokens uses it, each choosing by itself.
    pub fn used_by(&self, tokens: usize) -> f64 {
        1.0 - (1.0 - self.share).powi(tokens.min(1 << 20) as i32)
    }
}

/// Bytes of weights a second that processors compute in one-token passes.
pub fn cpu_decode_bytes_per_s(machine: &Machine) -> f64 {
    let measured = machine.cpu.decode.as_ref().map(|r| r.bytes_per_s());
    measured.unwrap_or(machine.ram.read.bytes_per_s() * CPU_SHARE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::UnitPart;

    fn machine(name: &str) -> Machine {
        Machine::profile(name).unwrap().unwrap()
    }

    fn unit(bytes: u64, share: f64, block: Option<usize>) -> UnitWork {
        let part = match block {
            None => UnitPart::Head,
            Some(_) if share < 1.0 => UnitPart::Expert,
            Some(_) => UnitPart::FeedForward,
        };
        let size = UnitSize::new(bytes, block, part);
        UnitWork {
            size,
            bytes,
            matrices: vec![(TensorType::Q8_0, bytes, bytes * 32 / 34)],
            share,
            miss: 1.0,
            operations: 0,
        }
    }

    #[test]
    fn large_blocks_are_bound_by_memory_and_small_ones_by_launches() {
        let m = machine("h100");
        let s = unit(1 << 30, 1.0, Some(0)).decode_s(&m, Site::Gpu);
        assert!((s - (1u64 << 30) as f64 / (2985e9 * gpu_share(TensorType::Q8_0))).abs() < 1e-9);
        let small = unit(1000, 1.0, Some(0));
        let least = m.gpu.as_ref().unwrap().costs.feed_forward.s();
        assert_eq!(small.decode_s(&m, Site::Gpu), least);
        assert!(UnitWork { operations: 3, ..small }.decode_s(&m, Site::Gpu) > least);
    }

    /// 8 blocks of Llama-3-70B's shape in Q2_K took 2.04 ms a token on an H200 whose memory would have brought them in 1.5.
    #[test]
    fn types_of_few_bits_are_bound_by_instructions_on_fast_memory() {
        let of = |parts: &[(TensorType, u64, f64)], bytes_per_s| {
            let matrices = parts.iter().map(|&(ty, n, bits)| (ty, (n as f64 * bits / 8.0) as u64, n)).collect();
            UnitWork { matrices, ..unit(1, 1.0, Some(0)) }.on_gpu_s(bytes_per_s, 132, &Costs::default())
        };
        let (q2, q3) = ((TensorType::Q2_K, 545_259_520, 2.625), (TensorType::Q3_K, 301_989_888, 3.4375));
        let block = of(&[q2, q3, (TensorType::Q4_K, 8_388_608, 4.5)], 4.2e12);
        let head = of(&[(TensorType::Q6_K, 1_050_673_152, 6.5625)], 4.2e12);
        let ms = 1e3 * (8.0 * block + head + GPU_PASS_S);
        assert!((1.85..2.05).contains(&ms), "{ms}");
        // Slower memory binds first.
        assert_eq!(of(&[q3], 4e11), (301_989_888.0 * 3.4375 / 8.0f64).floor() / (4e11 * gpu_share(TensorType::Q3_K)));
    }

    #[test]
    fn prefill_grows_with_tokens_except_for_the_head() {
        let m = machine("h100");
        let block = unit(200 << 20, 1.0, Some(0));
        let s = |tokens| block.prefill_s(&m, Site::Gpu, tokens).unwrap();
        // Longer ones fill the GPU better: 8B Q8_0 at 512 and 4096 tokens per pass is 1.6 times as fast.
        let faster = 8.0 * s(512) / s(4096);
        assert!((1.3..1.7).contains(&faster) && s(512) > 1.5 * s(128), "{faster}");
        let expert = unit(200 << 20, 0.5, Some(0));
        assert!(expert.prefill_s(&m, Site::Gpu, 512).unwrap() > 1.5 * s(512));
        let head = unit(200 << 20, 1.0, None);
        assert_eq!(head.prefill_s(&m, Site::Gpu, 512), Some(head.decode_s(&m, Site::Gpu)));
        let unknown = Machine { cpu: crate::plan::CpuSide { threads: 1, decode: None, gemm: None }, ..m };
        assert_eq!(block.prefill_s(&unknown, Site::Cpu, 512), None);
    }

    #[test]
    fn an_expert_is_used_more_surely_the_more_tokens_there_are() {
        let e = unit(1 << 20, 0.0625, Some(0));
        assert_eq!(e.used_by(1), 0.0625);
        assert!(e.used_by(512) > 0.999);
    }
}
