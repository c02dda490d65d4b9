//! The length of every buffer of a session: what the backend allocates, and what a plan counts before it.

#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::kernel::{self, Activation, Paired};
use super::panel::Panel;
#[cfg(target_arch = "x86_64")]
use super::x86::amx;
use super::{EXPERTS_AT_ONCE, attention, packets};
use crate::backend::{Dims, EXACT_ROWS, KvShape};

/// Elements of each buffer. Products that exceed the address space saturate: no such buffer can be had.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lens {
    pub x: usize,
    pub quantised: usize,
    /// Packets of the exact rows of a pass, of which there are two sets.
    pub row: usize,
    pub q: usize,
    pub kv: usize,
    pub hidden: usize,
    /// What a gate is multiplied with and the output of a part, where operations come one by one.
    pub up: usize,
    pub part: usize,
    pub expert_up: usize,
    /// Of recurrences, and of attention with gates.
    pub mix: usize,
    pub gates: usize,
    pub heads: usize,
    /// What each block is given beside X.
    pub per_block: usize,
    /// Recurrent states, each twice.
    pub states: usize,
    pub logits: usize,
    /// Bytes of the keys of all layers, and of the values.
    pub cache: [usize; 2],
    pub rotary: usize,
    pub scratch_each: usize,
    pub scratch: usize,
    pub panels_each: usize,
    pub panels: usize,
    /// Most rows of weights of a task whose activations are in tiles.
    pub task_rows: usize,
    pub scores: usize,
    pub choices: usize,
    pub expert_out: usize,
    pub expert_in: usize,
    pub expert_hidden: usize,
    pub expert_quantised: usize,
    /// Packets of the hidden states of the experts of one token that are computed together, or of the exact rows of
    /// one expert.
    pub expert_row: usize,
}

fn product(factors: &[usize]) -> usize {
    factors.iter().fold(1, |a, b| usize::saturating_mul(a, *b))
}

impl Lens {
    pub fn new(d: &Dims, threads: usize) -> Lens {
        let t = d.max_batch.max(1);
        let threads = threads.max(1);
        let exact = t.min(EXACT_ROWS);
        let most = |of: &dyn Fn(KvShape) -> usize| d.all_shapes().map(of).max().unwrap_or(0);
        let (q_dim, kv_dim) = (product(&[d.n_heads, d.head_dim]), most(&|s| product(&[s.heads, s.dim])));
        let widest = d.n_embd.max(q_dim).max(d.n_ff).max(d.n_attn);
        let mixes = d.n_mix > 0;
        let attending = most(&|s| attention::scratch_len(s.dim, d.n_heads / s.heads.max(1)));
        let scratch_each = attending.max(widest).max(d.n_ff_expert);
        let mut panels_each = kernel::panel_scratch(widest.max(d.n_ff_expert));
        let mut quantised = product(&[t, packets(widest)]);
        let mut task_rows = 0;
        #[cfg(target_arch = "x86_64")]
        if Isa::detect() == Isa::Amx && d.n_experts == 0 {
            quantised = quantised.max(amx::input_len(t, packets(widest)));
            task_rows = amx::task_rows(d.n_vocab.max(d.n_ff), threads);
            panels_each = panels_each.max(amx::scratch_len(t, task_rows));
        }
        let choices = product(&[t, d.n_experts_used]);
        let of_expert = |n: usize| if choices > 0 { product(&[t, n]) } else { 0 };
        Lens {
            x: product(&[t, d.n_embd]),
            quantised,
            task_rows,
            row: product(&[exact, packets(widest)]),
            // What slices of feed-forward parts add waits there.
            q: product(&[t, q_dim.max(d.n_attn).max(d.n_embd)]),
            kv: product(&[t, kv_dim]),
            hidden: product(&[t, d.n_ff]),
            up: if d.beyond.is_some() { product(&[t, d.n_ff]) } else { 0 },
            part: if d.beyond.is_some() { product(&[t, d.n_embd]) } else { 0 },
            mix: product(&[t, d.n_mix]),
            gates: if mixes { product(&[t, d.n_attn]) } else { 0 },
            per_block: product(&[t, d.n_per_block]),
            heads: if mixes { product(&[t, d.recurrent.map_or(1, |r| 2 * r.n_values)]) } else { 0 },
            states: d.recurrent.map_or(0, |r| product(&[2, r.sequences, r.floats()])),
            expert_up: if d.beyond.is_some() { product(&[t, d.n_ff_expert]) } else { 0 },
            logits: product(&[d.max_outputs.max(1), d.n_vocab]),
            cache: d.cache_before(d.n_layers),
            rotary: product(&[t, d.ropes.iter().map(|r| r.freqs.len()).sum()]),
            scratch_each,
            scratch: product(&[scratch_each, threads]),
            panels_each,
            panels: product(&[panels_each, threads]),
            scores: product(&[t, d.n_experts]),
            choices,
            expert_out: product(&[choices, d.n_embd]),
            expert_in: of_expert(d.n_embd),
            // Also the hidden states of the experts that one token chose.
            expert_hidden: product(&[t.max(d.n_experts_used), d.n_ff_expert]),
            expert_quantised: of_expert(packets(d.n_embd.max(d.n_ff_expert))),
            expert_row: product(&[d.n_experts_used.min(EXPERTS_AT_ONCE), packets(d.n_ff_expert)]).max(if choices > 0 {
                product(&[exact, packets(d.n_embd.max(d.n_ff_expert))])
            } else {
                0
            }),
        }
    }

    /// Bytes of all buffers together.
    pub fn bytes(&self) -> u64 {
        let l = self;
        // X and the input, queries and the attention output, keys and values, cosines and sines come in pairs.
        let floats = [
            l.x,
            l.x,
            l.q,
            l.q,
            l.kv,
            l.kv,
            l.hidden,
            l.up,
            l.part,
            l.expert_up,
            l.mix,
            l.gates,
            l.heads,
            l.heads,
            l.per_block,
            l.states,
            l.logits,
            l.rotary,
            l.rotary,
            l.scratch,
            l.scores,
            l.choices,
            l.expert_out,
            l.expert_in,
            l.expert_in,
            l.expert_hidden,
        ];
        let of = |n: usize, bytes: usize| (n as u64).saturating_mul(bytes as u64);
        let others = [
            of(l.choices, size_of::<u32>()),
            of(l.quantised, size_of::<Activation>()),
            of(l.row, 2 * (size_of::<Activation>() + size_of::<Paired>())),
            of(l.expert_row, size_of::<Activation>() + size_of::<Paired>()),
            of(l.expert_quantised, size_of::<Activation>()),
            of(l.panels, size_of::<Panel>()),
            of(l.cache[0], 1),
            of(l.cache[1], 1),
        ];
        floats.iter().map(|n| of(*n, size_of::<f32>())).chain(others).fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;
    use crate::backend::{Backend, Rope, RopeKind};
    use crate::gguf::TensorType;

    fn dims(n_experts: usize, n_ctx: usize) -> Dims {
        Dims {
            n_layers: 3,
            n_blocks: 3,
            expert_bytes: 0,
            n_embd: 96,
            n_heads: 6,
            n_kv_heads: 2,
            head_dim: 16,
            shapes: Vec::new(),
            n_per_block: 0,
            value_of_latent: 0,
            n_ff: 200,
            n_experts,
            n_experts_used: n_experts.min(2),
            n_ff_expert: if n_experts > 0 { 72 } else { 0 },
            n_vocab: 301,
            max_batch: 7,
            max_outputs: 3,
            n_ctx,
            recent: None,
            bfloat: false,
            kv_type: TensorType::F16,
            ropes: vec![Rope { kind: RopeKind::Norm, freqs: vec![1.0; 8], magnitude: 1.0 }],
            n_mix: 0,
            n_attn: 0,
            recurrent: None,
            beyond: None,
            no_kernel: None,
        }
    }

    /// Guards against a plan that counts other bytes than the backend takes.
    #[test]
    fn what_is_counted_is_what_is_allocated() {
        for (experts, beyond) in [(0, None), (5, None), (0, Some("windows")), (5, Some("windows"))] {
            for threads in [1, 3] {
                let d = Dims { beyond, ..dims(experts, 50) };
                let backend = CpuBackend::new(d.clone(), threads).unwrap();
                assert_eq!(backend.workspace_bytes(), CpuBackend::workspace_bytes_of(&d, threads));
            }
        }
    }

    #[test]
    fn sizes_beyond_the_address_space_saturate_and_cannot_be_had() {
        let d = dims(0, usize::MAX / 4);
        assert_eq!(CpuBackend::workspace_bytes_of(&d, 2), u64::MAX);
        assert!(CpuBackend::new(d, 1).is_err());
    }
}
