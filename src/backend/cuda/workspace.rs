//! Every buffer of a session, allocated once from its sizes.

use std::sync::Arc;

use super::args::XBLK_BYTES;
use super::driver::{Device, DeviceBuffer, PinnedBuffer};
use crate::backend::{BackendError, Dims, EXACT_ROWS, KvShape};

/// Ranges into which the decoding kernels of attention divide `keys` keys, as `range_begin` of `kernels/attn.cu` lays
/// them out: 64 of 64 keys, then 32 of each size twice that before.
pub(super) fn key_ranges(keys: usize) -> usize {
    let (mut ranges, mut end, mut each) = (keys.min(4096).div_ceil(64), 4096, 128);
    while end < keys {
        ranges += (keys - end).min(32 * each).div_ceil(each);
        (end, each) = (2 * end, 2 * each);
    }
    ranges
}

/// Ranges into which those of prompts divide them: each is eight times as long.
pub(super) fn prompt_ranges(keys: usize) -> usize {
    key_ranges(keys.div_ceil(8))
}

/// Most bytes between the pieces of an expert in RAM.
const LANDING_GAPS: u64 = 64 << 10;
/// Room for weights as halves, the unit of the tensor-core products: at least the first, and up to
/// the second if the widest matrix needs it for one tile a multiprocessor.
const SCRATCH_BYTES: (u64, u64) = (64 << 20, 256 << 20);

/// Halves from row to row of a matrix with `cols` columns, as the products want it.
pub(super) fn pitch(cols: usize) -> usize {
    cols.next_multiple_of(64)
}

/// Bytes of `rows` rows of `cols` floats.
pub(super) fn float_bytes(rows: usize, cols: usize) -> u64 {
    (rows as u64).saturating_mul(cols as u64).saturating_mul(4)
}

/// Bytes of `rows` rows of `cols` quantised activations.
pub(super) fn quant_bytes(rows: usize, cols: usize) -> u64 {
    (rows as u64).saturating_mul((cols.div_ceil(32) * XBLK_BYTES) as u64)
}

/// Bytes of `rows` rows of `cols` halves, padded to their pitch.
pub(super) fn half_bytes(rows: usize, cols: usize) -> u64 {
    (rows as u64).saturating_mul(pitch(cols) as u64).saturating_mul(2)
}

/// Where the buffers lie that kernels write to: every launch is checked against them.
#[derive(Debug, Default)]
pub(super) struct Rooms(Vec<(u64, u64)>);

impl Rooms {
    /// Makes sure that `bytes` at `addr` lie within one buffer; an address of 0 stands for nothing to write.
    ///
    /// # Errors
    /// [`BackendError::Overrun`] if they do not.
    pub fn check(&self, what: &'static str, addr: u64, bytes: u64) -> Result<(), BackendError> {
        if addr == 0 {
            return Ok(());
        }
        let inside = self.0.iter().find(|(base, len)| (*base..*base + *len).contains(&addr));
        let room = inside.map_or(0, |(base, len)| base + len - addr);
        if bytes <= room { Ok(()) } else { Err(BackendError::Overrun { backend: "cuda", what, bytes, room }) }
    }
}

pub(super) struct Workspace {
    pub rooms: Rooms,
    pub x: DeviceBuffer,
    pub q: DeviceBuffer,
    pub k: DeviceBuffer,
    pub v: DeviceBuffer,
    pub attn: DeviceBuffer,
    /// Gate, and after SwiGLU the hidden state, where it is wanted in F32.
    pub gate: DeviceBuffer,
    pub up: DeviceBuffer,
    /// Normed input in F32.
    pub norm_f: DeviceBuffer,
    /// Inputs quantised.
    pub input_q: DeviceBuffer,
    /// Hidden state quantised.
    pub hidden_q: DeviceBuffer,
    /// Inputs as halves, with a factor a row.
    pub halves: DeviceBuffer,
    pub halves_scale: DeviceBuffer,
    pub scratch: DeviceBuffer,
    pub partial: DeviceBuffer,
    pub partial_ml: DeviceBuffer,
    /// Layer by layer; each as large as its heads.
    pub k_cache: DeviceBuffer,
    pub v_cache: DeviceBuffer,
    pub freqs: DeviceBuffer,
    /// Position of the pass's first token, then the page of each [`PAGE`](crate::state::PAGE) positions, then the number of
    /// the recurrent state that is read, where kernels read them; then position and pages of recent positions.
    pub pass: DeviceBuffer,
    pub logits: DeviceBuffer,
    pub logits_host: PinnedBuffer<f32>,
    /// Raw rows of the embedding on their way in, and behind [`per_block_at`] those of what each block is given.
    pub rows: DeviceBuffer,
    pub rows_host: PinnedBuffer<u8>,
    pub moe: Option<MoeBuffers>,
    pub acts: ActBuffers,
}

/// Activations of single operations; empty where a program has none.
pub(super) struct ActBuffers {
    /// Outputs of parts before they are added to X.
    pub out: DeviceBuffer,
    pub mix: DeviceBuffer,
    pub gates: DeviceBuffer,
    pub beta: DeviceBuffer,
    pub alpha: DeviceBuffer,
    /// Recurrent states: `[state][layer]`, the last inputs of convolutions and then the heads' matrices.
    pub states: DeviceBuffer,
    /// What each block is given beside X.
    pub per_block: DeviceBuffer,
    /// Heads of latent vectors as `of_heads` of `kernels/mixers.cu` lists them: addresses, tiles, rows.
    pub lists: DeviceBuffer,
}

/// Where rows of what each block is given begin among raw rows: behind those of the embedding.
pub(super) fn per_block_at(d: &Dims) -> u64 {
    float_bytes(d.max_batch, d.n_embd).next_multiple_of(256)
}

/// Words of the addresses of the matrices of all heads, of tiles of 16 rows, and of rows by head; 0 without latent vectors.
pub(super) fn head_lists(d: &Dims) -> [usize; 3] {
    if d.value_of_latent == 0 {
        return [0; 3];
    }
    // Each list begins at a multiple of four words.
    [12 * d.n_heads, 3 * d.n_heads * d.max_batch.div_ceil(16), d.n_heads * d.max_batch].map(|n| n.next_multiple_of(4))
}

impl ActBuffers {
    /// Bytes of outputs, Mix, Gates, Beta, Alpha, states, what blocks are given and lists.
    fn sizes(d: &Dims) -> [u64; 8] {
        let batch = d.max_batch;
        let rows = |wanted: bool, width| if wanted { float_bytes(batch, width) } else { 0 };
        let mixes = d.n_mix > 0;
        let numbers = rows(mixes, d.recurrent.map_or(1, |r| 2 * r.n_values.max(1)));
        let states = d.recurrent.map_or(0, |r| float_bytes(2 * r.sequences, r.floats()));
        let lists = float_bytes(1, head_lists(d).iter().sum());
        let per_block = float_bytes(batch, d.n_per_block);
        let [mix, gates] = [d.n_mix, d.n_attn].map(|width| rows(mixes, width));
        [rows(d.beyond.is_some(), d.n_embd), mix, gates, numbers, numbers, states, per_block, lists]
    }

    fn new(device: &Arc<Device>, d: &Dims) -> Result<ActBuffers, BackendError> {
        let [out, mix, gates, beta, alpha, states, per_block, lists] = ActBuffers::sizes(d);
        Ok(ActBuffers {
            out: device.alloc(out, "outputs of parts")?,
            mix: device.alloc(mix, "activations")?,
            gates: device.alloc(gates, "gates")?,
            beta: device.alloc(beta, "gates")?,
            alpha: device.alloc(alpha, "gates")?,
            states: device.alloc(states, "recurrent states")?,
            per_block: device.alloc(per_block, "embeddings for each block")?,
            lists: device.alloc(lists, "heads of latent vectors")?,
        })
    }

    fn all(&self) -> [&DeviceBuffer; 8] {
        [&self.out, &self.mix, &self.gates, &self.beta, &self.alpha, &self.states, &self.per_block, &self.lists]
    }
}

pub(super) struct MoeBuffers {
    pub scores: DeviceBuffer,
    pub ids: DeviceBuffer,
    pub ids_host: PinnedBuffer<u32>,
    pub weights: DeviceBuffer,
    /// Token of each (token, choice), grouped by expert; then the pair's own number.
    pub lists: DeviceBuffer,
    pub lists_host: PinnedBuffer<u32>,
    /// One row a (token, choice).
    pub out: DeviceBuffer,
    /// Addresses of gate, up and down of each expert of each layer and of their biases, where they rest.
    pub tables: DeviceBuffer,
    /// Expert, first place in the lists and rows of each tile of bulk rows.
    pub tiles: DeviceBuffer,
    /// Experts that a row has chosen and that are brought, [`landing_slot`] bytes each.
    pub landing: DeviceBuffer,
    /// By block and expert, its slot or [`NO_SLOT`]; and the slots that choices of the rows at hand had when they were made.
    pub slots: DeviceBuffer,
    pub kept: DeviceBuffer,
    /// Addresses of experts of bulk rows that are brought together, then their tiles; and the same in host memory.
    pub few: DeviceBuffer,
    pub few_host: PinnedBuffer<u32>,
}

/// Bytes of every buffer of a session in device memory.
struct Sizes {
    x: u64,
    q: u64,
    attn: u64,
    kv: u64,
    ff: u64,
    norm_f: u64,
    quants: u64,
    halves: u64,
    halves_scale: u64,
    scratch: u64,
    partial: u64,
    partial_ml: u64,
    /// Of keys and of values.
    cache: [u64; 2],
    freqs: u64,
    pass: u64,
    logits: u64,
    rows: u64,
}

impl Sizes {
    fn new(d: &Dims, multiprocessors: usize) -> Sizes {
        let batch = d.max_batch;
        let most = |of: fn(KvShape) -> usize| d.all_shapes().map(of).max().unwrap_or(0);
        let heads = d.n_heads * most(|s| s.dim);
        let kv = most(|s| s.heads * s.dim);
        // Latent vectors are made of a part of each head of Mix by itself.
        let of_heads = match d.value_of_latent {
            0 => 0,
            _ => half_bytes(batch * d.n_heads, most(KvShape::value_dim).max(d.n_mix / d.n_heads.max(1))),
        };
        let still = if of_heads > 0 { d.n_mix } else { 0 };
        let ff = d.n_ff.max(d.n_ff_expert).max(1);
        // All choices of a pass are computed at once where the experts rest.
        let pairs = batch.saturating_mul(d.n_experts_used);
        // What a block for further tokens joins is the input of a product.
        let joined = if d.n_per_block == d.n_embd { 2 * d.n_embd } else { 0 };
        let wide = d.n_embd.max(heads).max(ff).max(d.n_attn).max(joined);
        let few = batch.min(EXACT_ROWS);
        let tile_rows = multiprocessors.div_ceil(batch.div_ceil(128).max(1)) * 128;
        let (least, most) = SCRATCH_BYTES;
        Sizes {
            x: float_bytes(batch, d.n_embd),
            q: float_bytes(batch, heads),
            // What slices of feed-forward parts add waits there.
            attn: float_bytes(batch, heads.max(d.n_attn).max(still).max(d.n_embd)),
            kv: float_bytes(batch, kv),
            ff: float_bytes(batch, ff).max(float_bytes(pairs, d.n_ff_expert)),
            norm_f: float_bytes(batch, d.n_embd).max(float_bytes(few, wide)),
            quants: quant_bytes(few, wide),
            halves: half_bytes(batch, wide).max(half_bytes(pairs, d.n_ff_expert)).max(of_heads),
            halves_scale: float_bytes(batch.max(pairs).max(if of_heads > 0 { batch * d.n_heads } else { 0 }), 1),
            scratch: half_bytes(tile_rows, wide).clamp(least, most).max(half_bytes(128, wide)),
            partial: float_bytes(few * key_ranges(d.n_ctx), heads),
            partial_ml: float_bytes(few * key_ranges(d.n_ctx), d.n_heads * 2),
            cache: d.cache_before(d.n_layers).map(|bytes| bytes as u64),
            freqs: float_bytes(1, d.ropes.iter().map(|r| r.freqs.len()).sum::<usize>().max(1)),
            pass: float_bytes(1, recent_at(d) + d.recent.as_ref().map_or(0, |_| 1 + d.pages())),
            logits: float_bytes(d.max_outputs, d.n_vocab),
            rows: match d.n_per_block {
                0 => float_bytes(batch, d.n_embd),
                n => per_block_at(d).saturating_add(float_bytes(batch, n)),
            },
        }
    }

    /// All buffers together. Keys and values, gate and up, and so on come in pairs.
    fn total(&self) -> u64 {
        let once = [
            self.x,
            self.q,
            self.attn,
            self.norm_f,
            self.halves,
            self.halves_scale,
            self.scratch,
            self.partial,
            self.partial_ml,
            self.freqs,
            self.pass,
            self.logits,
            self.rows,
        ];
        let pairs = [self.kv, self.ff, self.quants];
        once.iter()
            .chain(&self.cache)
            .chain(&pairs)
            .chain(&pairs)
            .fold(0, |sum, bytes| u64::saturating_add(sum, *bytes))
    }
}

/// Words of `pass` before the second position and table, of layers that keep recent positions alone: behind a position, a table
/// and the number of a state.
pub(super) fn recent_at(d: &Dims) -> usize {
    2 + d.pages()
}

/// Bytes of device memory that the buffers of a session with these sizes take, weights apart, on a GPU
/// with that many multiprocessors.
pub(super) fn bytes_needed(d: &Dims, multiprocessors: usize) -> u64 {
    let moe = if d.n_experts > 0 { MoeBuffers::words(d).iter().sum::<usize>() as u64 * 4 } else { 0 };
    let acts = ActBuffers::sizes(d).iter().fold(0, |sum, bytes| u64::saturating_add(sum, *bytes));
    Sizes::new(d, multiprocessors).total().saturating_add(moe).saturating_add(acts)
}

impl Workspace {
    pub fn new(device: &Arc<Device>, d: &Dims) -> Result<Workspace, BackendError> {
        let s = Sizes::new(d, device.info.multiprocessors as usize);
        let freqs = device.alloc(s.freqs, "rotary frequencies")?;
        let all: Vec<f32> = d.ropes.iter().flat_map(|r| &r.freqs).copied().collect();
        freqs.write(0, &all)?;
        let pass = device.alloc(s.pass, "position and pages")?;
        // Position 0, then every page in order, then state 0; of recent positions the same without a state.
        let mut words: Vec<u32> = std::iter::once(0).chain(0..d.pages() as u32).chain(std::iter::once(0)).collect();
        if let Some(recent) = d.recent.as_ref().map(|r| r.each) {
            words.extend(std::iter::once(0).chain((0..d.pages()).map(|i| recent.page(0, i))));
        }
        pass.write(0, &words)?;
        let mut ws = Workspace {
            rooms: Rooms::default(),
            x: device.alloc(s.x, "residual stream")?,
            q: device.alloc(s.q, "queries")?,
            k: device.alloc(s.kv, "keys")?,
            v: device.alloc(s.kv, "values")?,
            attn: device.alloc(s.attn, "attention output")?,
            gate: device.alloc(s.ff, "hidden state")?,
            up: device.alloc(s.ff, "hidden state")?,
            norm_f: device.alloc(s.norm_f, "normed input")?,
            input_q: device.alloc(s.quants, "quantised input")?,
            hidden_q: device.alloc(s.quants, "quantised hidden state")?,
            halves: device.alloc(s.halves, "input as halves")?,
            halves_scale: device.alloc(s.halves_scale, "factors of the input")?,
            scratch: device.alloc(s.scratch, "weights as halves")?,
            partial: device.alloc(s.partial, "attention partial sums")?,
            partial_ml: device.alloc(s.partial_ml, "attention partial sums")?,
            k_cache: device.alloc(s.cache[0], "KV cache")?,
            v_cache: device.alloc(s.cache[1], "KV cache")?,
            freqs,
            pass,
            logits: device.alloc(s.logits, "logits")?,
            logits_host: device.alloc_pinned(d.max_outputs * d.n_vocab, "logits")?,
            rows: device.alloc(s.rows, "embedding rows")?,
            rows_host: device.alloc_pinned(s.rows as usize, "embedding rows")?,
            moe: if d.n_experts > 0 { Some(MoeBuffers::new(device, d)?) } else { None },
            acts: ActBuffers::new(device, d)?,
        };
        ws.rooms = Rooms(ws.buffers().map(|b| (b.addr(), b.bytes())).collect());
        Ok(ws)
    }

    fn buffers(&self) -> impl Iterator<Item = &DeviceBuffer> {
        let moe = self.moe.iter().flat_map(|m| {
            [
                &m.scores, &m.ids, &m.weights, &m.lists, &m.out, &m.tables, &m.tiles, &m.landing, &m.few, &m.slots,
                &m.kept,
            ]
        });
        let own = [
            &self.x,
            &self.q,
            &self.k,
            &self.v,
            &self.attn,
            &self.gate,
            &self.up,
            &self.norm_f,
            &self.input_q,
            &self.hidden_q,
            &self.halves,
            &self.halves_scale,
            &self.scratch,
            &self.partial,
            &self.partial_ml,
            &self.k_cache,
            &self.v_cache,
            &self.freqs,
            &self.pass,
            &self.logits,
            &self.rows,
        ];
        own.into_iter().chain(moe).chain(self.acts.all())
    }

    pub fn bytes(&self) -> u64 {
        self.buffers().map(DeviceBuffer::bytes).sum()
    }
}

/// Most tiles of `each` rows into which the rows of `pairs` choices fall by expert.
pub(super) fn tiles_most(pairs: usize, experts: usize, each: usize) -> usize {
    pairs.min(pairs / each + experts)
}

/// The slot of an expert that has none.
pub(super) const NO_SLOT: u32 = u32::MAX;

/// Room for an expert as it lies in RAM: three pieces, each in whole pages.
pub(super) fn landing_slot(d: &Dims) -> u64 {
    if d.expert_bytes == 0 { 0 } else { (d.expert_bytes + LANDING_GAPS).next_multiple_of(256) }
}

impl MoeBuffers {
    /// Words of scores, ids, weights, lists, outputs, tables, tiles, landing, experts at hand, slots and kept choices.
    fn words(d: &Dims) -> [usize; 11] {
        let pairs = d.max_batch * d.n_experts_used;
        let tables = d.n_blocks * d.n_experts * 6 * 2;
        let tiles = 3 * tiles_most(pairs, d.n_experts, 16);
        [
            d.max_batch * d.n_experts,
            pairs,
            pairs,
            2 * pairs,
            pairs * d.n_embd,
            tables,
            tiles,
            d.n_experts_used * landing_slot(d) as usize / 4,
            // Each list of tiles begins at a multiple of four words.
            d.n_experts * (6 * 2 + 4) + tiles,
            d.n_blocks * d.n_experts,
            pairs,
        ]
    }

    fn new(device: &Arc<Device>, d: &Dims) -> Result<MoeBuffers, BackendError> {
        let [scores, ids, weights, lists, out, tables, tiles, landing, few, slots, kept] = MoeBuffers::words(d);
        let words = |n: usize, what| device.alloc(n as u64 * 4, what);
        Ok(MoeBuffers {
            scores: words(scores, "router scores")?,
            ids: words(ids, "routed experts")?,
            ids_host: device.alloc_pinned(ids, "routed experts")?,
            weights: words(weights, "router weights")?,
            lists: words(lists, "tokens of experts")?,
            lists_host: device.alloc_pinned(lists, "tokens of experts")?,
            out: words(out, "outputs of experts")?,
            tables: words(tables, "addresses of experts")?,
            tiles: words(tiles, "tiles of experts")?,
            landing: words(landing.max(1), "experts that are brought")?,
            slots: words(slots.max(1), "slots of experts")?,
            kept: words(kept.max(1), "choices with slots")?,
            few: words(few, "experts at hand")?,
            few_host: device.alloc_pinned(few, "experts at hand")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_keys_are_those_of_the_kernel() {
        let begin = |i: usize| if i < 64 { 64 * i } else { (4096 + 128 * ((i - 64) % 32)) << ((i - 64) / 32) };
        for keys in (1..5000).chain([8191, 8192, 8193, 40_000, 131_072, 131_073, 1 << 20]) {
            let n = key_ranges(keys);
            assert!(begin(n - 1) < keys && begin(n) >= keys, "{keys}: {n}");
        }
        assert_eq!(key_ranges(131_072), 224);
        assert!(key_ranges(i32::MAX as usize) <= 16 * 48, "groups of attn_merge");
        assert_eq!([1, 512, 513, 16_384, 16_385, 131_072].map(prompt_ranges), [1, 1, 2, 32, 33, 128]);
    }

    /// Guards against kernels that write behind a buffer which was sized for fewer rows or columns: the two forms
    /// of eight rows of 28672 are what the workspace of 4352 columns has no room for.
    #[test]
    fn what_is_written_must_lie_within_one_buffer() {
        let rooms = Rooms(vec![(4096, quant_bytes(32, 4352)), (1 << 20, half_bytes(200, 4352))]);
        assert!(rooms.check("input", 4096, quant_bytes(32, 4352)).is_ok());
        assert!(rooms.check("input", 0, u64::MAX).is_ok());
        for (addr, bytes) in [
            (4096, quant_bytes(8, 28672)),
            (4096 + 40, quant_bytes(32, 4352)),
            (4095, 1),
            (4096 + quant_bytes(32, 4352), 1),
            ((1 << 20) + 2, half_bytes(200, 4352)),
            (4096, u64::MAX),
        ] {
            let e = rooms.check("quantised input", addr, bytes).unwrap_err();
            assert!(matches!(e, BackendError::Overrun { what: "quantised input", .. }), "{e}");
        }
    }
}
