//! Where the operations of a forward pass run: `cpu` here, `cuda` on a GPU.
//!
//! The trait's operations are as coarse as fusion pays (norm + quantise + several products, norm +
//! gate/up + SwiGLU, …) and as fine as the architectures differ. Activations live in the backend
//! under fixed names; weights are addressed where the ring has brought them. Nothing outside this
//! room asks which backend runs.

mod both;
pub mod cpu;
pub mod cuda;
mod device;
mod op;
pub mod quantise;
pub mod reference;
mod reuse;
mod slots;

pub use both::{Beside, Both, Brought, Hands, Worked, low_of};
pub use device::{CopyEngine, DeviceAlloc, DeviceMemory, MemoryUse, Pinned};
pub use op::{
    Act, Activation, DeltaNet, Gating, KvShape, Latent, LinearOf, Mask, NormKind, NormOf, Op, Router, Scan, Scores,
};
pub use reuse::Reuse;
pub use slots::{Given, SlotsAt};

use crate::gguf::TensorType;
use crate::state::{PAGE, PageId, Pages, Recent, StateOp};

/// A weight matrix where the backend can read it: `rows` × `cols`, rows back to back, from an address in the
/// memory of the backend's device (host memory for `cpu`). No alignment beyond the file's is promised (32 bytes
/// in ordinary files, less with a smaller `general.alignment`).
#[derive(Clone, Copy, Debug)]
pub struct Weight {
    addr: u64,
    ty: TensorType,
    rows: usize,
    cols: usize,
}

impl Weight {
    /// The matrix at `addr`: `rows` outputs of `cols` inputs each.
    ///
    /// # Safety
    /// `rows * row_bytes(cols)` bytes must be readable at `addr` until the last operation that uses the weight has
    /// run: from the acquire of its unit until its release, and on a device until what was called meanwhile has run. They must not be
    /// written meanwhile. The weight is used in operations of a backend that was opened for these rows and columns there: an
    /// operation reads and writes as many activations as its weights say.
    pub unsafe fn new(addr: u64, ty: TensorType, rows: usize, cols: usize) -> Weight {
        Weight { addr, ty, rows, cols }
    }

    /// Where it begins, in the memory of the backend that it is for.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Type of its elements.
    pub fn ty(&self) -> TensorType {
        self.ty
    }

    /// Outputs of the product.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs of the product.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

/// A weight matrix with its optional bias, one F32 row of `weight.rows` columns.
pub type Linear = LinearOf<Weight>;

/// RMS norm: `x / sqrt(mean(x²) + eps) * weight`.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// One F32 row.
    pub weight: Weight,
    /// Added to the mean of squares.
    pub eps: f32,
}

/// What a row of a pass is, which decides the order in which its sums are added up. A row's result depends on the
/// model, the tokens before it, its class and where it is computed: never on the rows next to it, nor on how a prompt
/// was cut into passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Generated and drafted tokens, up to [`EXACT_ROWS`] rows per pass.
    Exact,
    /// Prompt tokens, any number of rows per pass.
    Bulk,
}

/// Most rows of a pass of class [`Class::Exact`].
pub const EXACT_ROWS: usize = 8;

/// Rows of one sequence in a pass: tokens that follow each other.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// What they are.
    pub class: Class,
    /// Position of the first.
    pub first_pos: usize,
    /// How many.
    pub rows: usize,
    /// The pages of the cache ([`crate::state::Pages`]) that hold the sequence: positions `PAGE * i..` lie in `table[i]`.
    pub table: &'a [PageId],
    /// Where the sequence's recurrent state is read from; the state behind the run is written to this number with its
    /// lowest bit turned. Nothing is read where `first_pos` is 0. The number without that bit also says which pages of recent
    /// positions are the sequence's ([`RecentLayers`]).
    pub state: u32,
}

impl Run<'_> {
    /// Checks the runs of a pass against what was allocated: exact rows come first. Returns the rows of each class.
    ///
    /// # Errors
    /// [`BackendError::Pass`] says what exceeds what.
    pub fn check(runs: &[Run<'_>], dims: &Dims, backend: &'static str) -> Result<[usize; 2], BackendError> {
        let fails = |what: String| Err(BackendError::Pass { backend, what });
        let of = |class| runs.iter().filter(|r| r.class == class).map(|r| r.rows).sum::<usize>();
        let (exact, bulk) = (of(Class::Exact), of(Class::Bulk));
        let (rows, max) = (exact.saturating_add(bulk), dims.max_batch);
        if rows == 0 || rows > max || runs.iter().any(|r| r.rows == 0) {
            return fails(format!("a pass of {rows} tokens exceeds the batch of {max}, or a sequence has none in it"));
        }
        if exact > EXACT_ROWS {
            return fails(format!("an exact pass of {exact} tokens exceeds {EXACT_ROWS} rows"));
        }
        if !runs.iter().is_sorted_by_key(|r| r.class == Class::Bulk) {
            return fails("tokens of a prompt come before generated ones".into());
        }
        let (n_ctx, all) = (dims.n_ctx, dims.pages());
        for r in runs {
            let end = r.first_pos.saturating_add(r.rows);
            if end > n_ctx {
                return fails(format!("position {end} exceeds the context of {n_ctx}"));
            }
            if Pages::of(end) > r.table.len() {
                return fails(format!("{} pages of the cache hold less than {end} positions", r.table.len()));
            }
            if let Some(page) = r.table.iter().find(|p| **p as usize >= all) {
                return fails(format!("page {page} of the cache does not exist; it has {all}"));
            }
            let sequences = dims.recent.as_ref().map_or(usize::MAX, |k| k.sequences);
            if (r.state >> 1) as usize >= sequences {
                return fails(format!(
                    "there are recent positions of {sequences} sequences, and this is {}",
                    r.state >> 1
                ));
            }
        }
        Ok([exact, bulk])
    }
}

/// How rotary embedding pairs the elements of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeKind {
    /// Pairs (2i, 2i+1): llama.
    Norm,
    /// Pairs (i, i + n_rot/2): qwen2, qwen3.
    Neox,
}

/// Rotary embedding with every scaling folded into one frequency a pair.
#[derive(Clone, Debug)]
pub struct Rope {
    /// How elements pair.
    pub kind: RopeKind,
    /// Angle per position for each of the `n_rot / 2` pairs: `theta = position * freqs[i]`.
    pub freqs: Vec<f32>,
    /// Multiplies sine and cosine (YaRN's magnitude correction; 1 otherwise).
    pub magnitude: f32,
}

/// Sizes that are fixed for a session; every workspace buffer follows from them.
#[derive(Clone, Debug)]
pub struct Dims {
    /// Layers with a KV cache, one each.
    pub n_layers: usize,
    /// Blocks of the model; those with recurrences have no KV cache.
    pub n_blocks: usize,
    /// Bytes of the largest expert; 0 if there are none.
    pub expert_bytes: u64,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Heads of each layer with a cache, where layers differ; `n_kv_heads` and `head_dim` are the largest then. Empty where
    /// all are alike.
    pub shapes: Vec<KvShape>,
    /// Elements of [`Act::PerBlock`]; 0 for none.
    pub n_per_block: usize,
    /// Elements of the values that latent vectors are expanded to; 0 without such.
    pub value_of_latent: usize,
    /// Largest FFN width of a dense block (0 if all blocks are mixtures of experts).
    pub n_ff: usize,
    /// Experts (0 for dense models).
    pub n_experts: usize,
    /// Experts a token is routed to.
    pub n_experts_used: usize,
    /// FFN width of one expert.
    pub n_ff_expert: usize,
    /// Rows of the output head.
    pub n_vocab: usize,
    /// Tokens a pass may carry.
    pub max_batch: usize,
    /// Rows of logits a pass may ask for.
    pub max_outputs: usize,
    /// Positions the KV cache holds.
    pub n_ctx: usize,
    /// Layers that keep the last positions of each sequence alone; `None` if all keep all.
    pub recent: Option<RecentLayers>,
    /// Whether processors may round bulk rows and the weights that they meet to bfloat16.
    pub bfloat: bool,
    /// Type of the KV cache: F16, F32 or Q8_0.
    pub kv_type: TensorType,
    /// Rotary embeddings; the first is the one of [`Backend::qkv`].
    pub ropes: Vec<Rope>,
    /// The widest rows of [`Act::Mix`]; 0 for none.
    pub n_mix: usize,
    /// The widest rows of [`Act::Attn`], at least the query heads together.
    pub n_attn: usize,
    /// Recurrences; `None` for a model without.
    pub recurrent: Option<Recurrent>,
    /// What passes do that no fused call covers; `None` if there is nothing of the kind, and [`Backend::op`] is not
    /// called.
    pub beyond: Option<&'static str>,
    /// What of it has no kernel on a GPU.
    pub no_kernel: Option<&'static str>,
}

/// Layers whose windows hide all but the last positions, so that of each sequence these alone are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecentLayers {
    /// Which layers with a cache they are.
    pub layers: Vec<bool>,
    /// What they keep of a sequence.
    pub each: Recent,
    /// Sequences that they keep it of.
    pub sequences: usize,
}

/// Layers with a cache whose pages are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layers {
    /// Those that keep all positions.
    Whole,
    /// Those of [`Dims::recent`].
    Recent,
}

/// Most elements of a head of a delta net, and most inputs that a convolution sees: processors keep as many on their stacks.
pub const DELTA_DIM_MAX: usize = 1024;
/// See [`DELTA_DIM_MAX`].
pub const TAPS_MAX: usize = 64;

/// Sizes of a model's recurrences, and how many states there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recurrent {
    /// Layers that have one.
    pub layers: usize,
    /// Sequences that have a state at once; each has two copies of it, so that a pass that fails damages none.
    pub sequences: usize,
    /// Inputs that a convolution sees, [`TAPS_MAX`] at most.
    pub taps: usize,
    /// Its channels; with a delta net its queries, keys and values.
    pub channels: usize,
    /// Key heads of a delta net; 0 without one.
    pub n_keys: usize,
    /// Its value heads, a multiple of the key heads.
    pub n_values: usize,
    /// Elements of a head, of a delta net [`DELTA_DIM_MAX`] at most.
    pub dim: usize,
    /// Numbers of the state for each of them: as many with a delta net.
    pub state: usize,
    /// Whether heads are state spaces, whose groups are the key heads, rather than delta nets.
    pub scans: bool,
}

impl Recurrent {
    /// Floats of the last inputs of a layer.
    pub fn inputs(&self) -> usize {
        (self.taps - 1) * self.channels
    }

    /// Floats of the state of a layer's heads.
    pub fn matrices(&self) -> usize {
        self.n_values * self.dim * self.state
    }

    /// Floats of one copy of a state, of all layers.
    pub fn floats(&self) -> usize {
        self.layers * (self.inputs() + self.matrices())
    }
}

impl Dims {
    /// The rotary embedding of [`Backend::qkv`].
    pub fn rope(&self) -> &Rope {
        &self.ropes[0]
    }

    /// Heads of a layer with a cache.
    pub fn shape(&self, layer: usize) -> KvShape {
        self.shapes.get(layer).copied().unwrap_or(KvShape::new(self.n_kv_heads, self.head_dim))
    }

    /// Heads of all layers with a cache; those of the largest where all are alike.
    pub fn all_shapes(&self) -> impl Iterator<Item = KvShape> {
        self.shapes.iter().copied().chain(self.shapes.is_empty().then(|| self.shape(0)))
    }

    /// Bytes that the cache takes for the key of a head of so many elements at a position, and for its value.
    pub fn kv_bytes(&self, dim: usize) -> usize {
        let ty = self.kv_type;
        dim.div_ceil(ty.block_elems()).saturating_mul(ty.block_bytes())
    }

    /// Bytes that the cache takes for the keys of a layer at a position, and for its values.
    pub fn kv_bytes_of(&self, layer: usize) -> [usize; 2] {
        let shape = self.shape(layer);
        let bytes = shape.heads.saturating_mul(self.kv_bytes(shape.dim));
        [bytes, if shape.of_keys > 0 { 0 } else { bytes }]
    }

    /// Bytes of the keys of the first `layers` layers, and of their values.
    pub fn cache_before(&self, layers: usize) -> [usize; 2] {
        if self.shapes.is_empty() && self.recent.is_none() {
            return self.kv_bytes_of(0).map(|bytes| layers.saturating_mul(bytes).saturating_mul(self.places(0)));
        }
        (0..layers).fold([0; 2], |[keys, values], layer| {
            let [k, v] = self.kv_bytes_of(layer).map(|bytes| bytes.saturating_mul(self.places(layer)));
            [keys.saturating_add(k), values.saturating_add(v)]
        })
    }

    /// Bytes of a page of layers: keys and values.
    pub fn page_bytes(&self, layers: Layers) -> usize {
        PAGE * self.layers(layers).flat_map(|layer| self.kv_bytes_of(layer)).sum::<usize>()
    }

    /// Those of the layers with a cache.
    pub fn layers(&self, layers: Layers) -> impl Iterator<Item = usize> {
        (0..self.n_layers).filter(move |layer| self.layers_of(*layer) == layers)
    }

    /// What a layer keeps.
    pub fn layers_of(&self, layer: usize) -> Layers {
        let recent = self.recent.as_ref().is_some_and(|r| r.layers.get(layer) == Some(&true));
        if recent { Layers::Recent } else { Layers::Whole }
    }

    /// Pages of the cache.
    pub fn pages(&self) -> usize {
        Pages::of(self.n_ctx)
    }

    /// Pages that layers have.
    pub fn pages_of(&self, layers: Layers) -> usize {
        match (layers, &self.recent) {
            (Layers::Whole, _) => self.pages(),
            (Layers::Recent, None) => 0,
            (Layers::Recent, Some(r)) => r.each.pages.saturating_mul(r.sequences),
        }
    }

    /// Positions that the pages of a layer hold: the context, in whole pages, or what it keeps of all sequences.
    pub fn places(&self, layer: usize) -> usize {
        self.pages_of(self.layers_of(layer)).saturating_mul(PAGE)
    }
}

/// The three matrices of one routed expert.
#[derive(Clone, Copy, Debug)]
pub struct Expert {
    /// Which expert of its block.
    pub id: u32,
    /// Gate, `n_ff_expert` × `n_embd`.
    pub gate: Linear,
    /// Up, `n_ff_expert` × `n_embd`.
    pub up: Linear,
    /// Down, `n_embd` × `n_ff_expert`.
    pub down: Linear,
    /// What makes its hidden state.
    pub how: Activation,
}

/// How a router's scores become weights.
#[derive(Clone, Copy, Debug)]
pub struct RouterParams {
    /// Divide the chosen weights by their sum.
    pub normalize: bool,
    /// Multiply the chosen weights by this (1 for none).
    pub scale: f32,
}

/// How the experts of a block are chosen, and where their sum goes.
#[derive(Clone, Copy, Debug)]
pub enum Routing {
    /// [`Backend::route`] and [`Backend::combine_experts`].
    Softmax {
        /// Of what router and experts read.
        norm: Norm,
        /// The router.
        router: Weight,
        /// Its weights.
        params: RouterParams,
    },
    /// [`Op::Route`] and [`Op::Combine`]. Weights do not multiply what experts read.
    By {
        /// Scores.
        w: Linear,
        /// Added to probabilities where experts are chosen.
        choose: Option<Weight>,
        /// The rest.
        how: Router,
        /// [`Op::WeighExperts`] behind it.
        weigh: Option<Weight>,
        /// The norm of X that experts read, where the router reads something else.
        reads: Option<NormOf<Weight>>,
        /// The activations that the sum goes to, in their place or added to them.
        sum: (Act, bool),
    },
}

/// How many of the experts in RAM that a row has chosen are for processors, in 256ths; a device reads the others over its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share(pub u32);

impl Share {
    /// All of them.
    pub const ALL: Share = Share(256);

    /// Of so many choices, rounded.
    pub fn of(self, choices: usize) -> usize {
        ((choices as u64 * u64::from(self.0) + 128) >> 8) as usize
    }
}

/// Why a backend could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A tensor's type has no kernel.
    #[error("tensor type {ty} cannot be computed on {backend}; supported are {supported}")]
    UnsupportedType {
        /// The type.
        ty: TensorType,
        /// The backend's name.
        backend: &'static str,
        /// The list of types with kernels.
        supported: String,
    },
    /// The architecture needs what the backend has no kernels for.
    #[error("{backend} has no kernels for {what}, which this architecture has; processors have (--backend cpu)")]
    Beyond {
        /// The backend's name.
        backend: &'static str,
        /// What it is.
        what: &'static str,
    },
    /// A type of the KV cache that the backend has no kernels for.
    #[error("{backend} has no kernels for a KV cache of {ty} (--kv); processors have (--backend cpu)")]
    Cache {
        /// The backend's name.
        backend: &'static str,
        /// The type.
        ty: TensorType,
    },
    /// A buffer could not be allocated.
    #[error("{backend}: {what} of {bytes} bytes could not be allocated")]
    OutOfMemory {
        /// The backend's name.
        backend: &'static str,
        /// What it was for.
        what: &'static str,
        /// Its size.
        bytes: u64,
    },
    /// The system refused threads to compute with.
    #[error(
        "{threads} threads could not be started: {source}; give a smaller --threads, or raise the limits on processes and memory (ulimit -u, ulimit -v)"
    )]
    Threads {
        /// Threads that were asked for.
        threads: usize,
        /// The system's words.
        source: std::io::Error,
    },
    /// A pass asks for more rows of logits than the session was started for.
    #[error("{backend}: logits of {tokens} tokens were asked for, but the session holds {max} rows of them")]
    Outputs {
        /// The backend's name.
        backend: &'static str,
        /// Tokens whose logits were asked for.
        tokens: usize,
        /// Rows there are.
        max: usize,
    },
    /// A pass that exceeds what the session was started for.
    #[error("{backend}: {what}")]
    Pass {
        /// The backend's name.
        backend: &'static str,
        /// What exceeds what.
        what: String,
    },
    /// A kernel was asked to write beyond its buffer: a size of the workspace is wrong.
    #[error(
        "{backend}: {what} would take {bytes} bytes of a buffer with {room} left; the workspace was sized for less"
    )]
    Overrun {
        /// The backend's name.
        backend: &'static str,
        /// What was to be written.
        what: &'static str,
        /// Bytes to be written.
        bytes: u64,
        /// Bytes that the buffer has from there on; 0 for an address in no buffer.
        room: u64,
    },
    /// The device answers this process no more, whatever is asked.
    #[error(
        "{backend}: {what}; the GPU answers this process no more, so that nt has to be started again (`dmesg` may say why, in lines with Xid)"
    )]
    Lost {
        /// The backend's name.
        backend: &'static str,
        /// Its words.
        what: String,
    },
    /// The device or its driver reported an error.
    #[error("{backend}: {what}")]
    Device {
        /// The backend's name.
        backend: &'static str,
        /// Its words.
        what: String,
    },
}

/// Which backend is wished for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// A GPU if there is one that can, else processors.
    Auto,
    /// Processors.
    Cpu,
    /// A GPU, or fail.
    Cuda,
}

/// Whether every value is finite.
pub fn all_finite(values: &[f32]) -> bool {
    // The exponent of what is not finite is the largest there is. No branch, so that many are compared at once.
    values.iter().fold(0, |most: u32, v| most.max(v.to_bits() & 0x7fff_ffff)) < f32::INFINITY.to_bits()
}

/// Whether some backend has kernels for matrices of this type.
pub fn computable(ty: TensorType) -> bool {
    cpu::CpuBackend::supports_type(ty) || cuda::CudaBackend::supports_type(ty)
}

/// Makes a backend for sessions of these sizes; `threads` compute on processors, and `beside` of them beside a GPU, if not 0. With
/// [`BackendKind::Auto`], the second result says why there is no GPU.
pub fn open(
    kind: BackendKind,
    dims: &Dims,
    threads: usize,
    beside: usize,
) -> Result<(Box<dyn Backend>, Option<String>), BackendError> {
    let gpu = || -> Result<Box<dyn Backend>, BackendError> {
        let gpu = cuda::CudaBackend::new(&cuda::Device::open(0)?, dims)?;
        Ok(if beside > 0 && gpu.hands_over() {
            Box::new(Both::new(Box::new(gpu), dims, beside)?)
        } else {
            Box::new(gpu)
        })
    };
    let cpu = || cpu::CpuBackend::new(dims.clone(), threads);
    match kind {
        BackendKind::Cpu => Ok((Box::new(cpu()?), None)),
        BackendKind::Cuda => Ok((gpu()?, None)),
        BackendKind::Auto => match gpu() {
            Ok(backend) => Ok((backend, None)),
            Err(e @ BackendError::OutOfMemory { .. }) => Err(e),
            Err(e) => Ok((Box::new(cpu()?), Some(format!("computing on processors: {e}")))),
        },
    }
}

/// The operations of a forward pass. `T` is the number of tokens of the pass, of the class at hand.
///
/// The order is that of `model::forward`; all sizes were fixed by [`Dims`]. Operations may be
/// asynchronous: only `route` and `logits` wait. Shapes are checked by the model's loader, so a
/// mismatch here is a bug and may panic.
pub trait Backend {
    /// `cpu`, `cuda`.
    fn name(&self) -> &'static str;

    /// Whether matrices of this type can be computed.
    fn supports(&self, ty: TensorType) -> bool;

    /// The memory that weights must be brought to; `None` where they are computed from RAM.
    fn device(&self) -> Option<std::sync::Arc<dyn DeviceMemory>> {
        None
    }

    /// Processors next to the device that compute feed-forward parts and experts of exact rows from weights in RAM; `None`
    /// where there are none.
    fn computes_in_ram(&self) -> Option<usize> {
        None
    }

    /// How those spent their time so far.
    fn beside(&self) -> Beside {
        Beside::default()
    }

    /// Keeps when those compute which units from now on, at most `capacity` of them between two calls of [`Backend::worked`].
    fn trace_work(&mut self, _capacity: usize) {}

    /// Hands out what was kept since the last call, in the order of time.
    fn worked(&mut self, _each: &mut dyn FnMut(Worked)) {}

    /// Operations called from here on, until [`Backend::end_part`], are of a feed-forward part whose weights are in RAM, of
    /// this unit: they read and write X alone, and all that they write for others is X.
    ///
    /// # Errors
    /// Where [`Backend::computes_in_ram`] says no.
    fn begin_part(&mut self, _unit: usize) -> Result<(), BackendError> {
        Err(BackendError::Beyond { backend: self.name(), what: "parts in RAM" })
    }

    /// Some of the experts that [`Backend::route`], called next, may choose are in RAM: what they read is handed over at once.
    fn expect_experts_in_ram(&mut self) {}

    /// Ends a part in RAM.
    fn end_part(&mut self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Does what was put off, before the caller waits for something else.
    fn catch_up(&mut self) -> Result<(), BackendError> {
        Ok(())
    }

    /// The pass has failed: nothing is to wait for the rest of it.
    fn abandon(&mut self) {}

    /// Why every pass will fail from now on; `None` if the next may well succeed. Asked when one has failed.
    fn lost(&self) -> Option<BackendError> {
        None
    }

    /// Most runs that a pass may have. Where it is more than one, they may be of both classes.
    fn runs_max(&self) -> usize {
        1
    }

    /// Starts a pass over the rows of `runs`, exact ones first. Operations are of the first run's class, until
    /// [`Backend::turn_to`] says otherwise: their `T` are the rows of that class.
    ///
    /// # Errors
    /// [`BackendError::Pass`], if it exceeds the batch, the context, the cache, [`EXACT_ROWS`] or [`Backend::runs_max`].
    fn begin(&mut self, runs: &[Run<'_>]) -> Result<(), BackendError>;

    /// Operations called from here on are of the pass's rows of this class, which there are.
    fn turn_to(&mut self, _class: Class) {}

    /// Begins a stretch of operations that are the same in every pass that has one: passes of one row of class
    /// [`Class::Exact`], with the same weights at the same addresses. `true`: it was repeated from a recording, and its operations must
    /// not be called. `false`: they are to be called, and then [`Backend::end_stretch`]. None of them may wait.
    fn begin_stretch(&mut self) -> Result<bool, BackendError> {
        Ok(false)
    }

    /// Ends a stretch; `complete` if all its operations were called without an error. `false`: they were
    /// neither recorded nor run, and are to be called again outside of a stretch.
    fn end_stretch(&mut self, _complete: bool) -> Result<bool, BackendError> {
        Ok(true)
    }

    /// `X[t] = dequantised rows[t]`. `rows` is in host memory: a row of `ty` for each row of the pass, of all classes, back
    /// to back.
    fn embed(&mut self, rows: &[u8], ty: TensorType) -> Result<(), BackendError>;

    /// `PerBlock[t] = dequantised rows[t]`, as [`Backend::embed`] does X.
    ///
    /// # Errors
    /// [`BackendError::Beyond`] where there are none.
    fn embed_per_block(&mut self, _rows: &[u8], _ty: TensorType) -> Result<(), BackendError> {
        Err(BackendError::Beyond { backend: self.name(), what: "embeddings for each block" })
    }

    /// `Q, K, V = W · norm(X) + bias`, then the optional per-head norms of Q and K, then rotary
    /// embedding of both, then K and V are stored to the cache of `layer` at the pass's positions.
    #[allow(clippy::too_many_arguments, reason = "one fused operation with its weights")]
    fn qkv(
        &mut self,
        layer: usize,
        norm: &Norm,
        q: &Linear,
        k: &Linear,
        v: &Linear,
        q_norm: Option<&Norm>,
        k_norm: Option<&Norm>,
    ) -> Result<(), BackendError>;

    /// `Attn = softmax(Q · Kᵀ / sqrt(head_dim)) · V` over the cache of `layer`, causal.
    fn attend(&mut self, layer: usize) -> Result<(), BackendError>;

    /// Keeps only the rows `rows` of `X` and `Attn`, which ascend (moved to rows `0..`): the last block's remainder and the
    /// head are computed for the wanted outputs alone. `T` becomes their number, which may not be 0.
    fn keep(&mut self, rows: &[usize]) -> Result<(), BackendError>;

    /// `X += W · Attn + bias`.
    fn attn_output(&mut self, w: &Linear) -> Result<(), BackendError>;

    /// `X += down · (silu(gate · h) * (up · h))` with `h = norm(X)`.
    fn ffn(&mut self, norm: &Norm, gate: &Linear, up: &Linear, down: &Linear) -> Result<(), BackendError>;

    /// `Slice = down · (silu(gate · h) * (up · h))` with `h = norm(X)`, which waits for [`Backend::add_slice`]: the columns of a
    /// feed-forward part that processors next to a device have, called before the others.
    ///
    /// # Errors
    /// Where a backend cannot.
    fn slice(&mut self, _norm: &Norm, _gate: &Linear, _up: &Linear, _down: &Linear) -> Result<(), BackendError> {
        Err(BackendError::Beyond { backend: self.name(), what: "slices of feed-forward parts" })
    }

    /// `X += Slice`.
    ///
    /// # Errors
    /// As [`Backend::slice`].
    fn add_slice(&mut self) -> Result<(), BackendError> {
        Err(BackendError::Beyond { backend: self.name(), what: "slices of feed-forward parts" })
    }

    /// `h = norm(X)` is kept for the experts; softmax of `router · h`, the `n_experts_used` largest
    /// (ties to the lower id) with their weights are kept for [`Backend::expert`]. Returns, for
    /// each token in order, its experts' ids (`T * n_experts_used`). Waits for the device.
    fn route(&mut self, norm: &Norm, router: &Weight, params: &RouterParams) -> Result<&[u32], BackendError>;

    /// Computes one expert for the tokens that were routed to it, into a buffer a (token, choice).
    /// Called once for each distinct id that `route` returned, in any order.
    fn expert(&mut self, e: &Expert) -> Result<(), BackendError>;

    /// [`Backend::expert`] for several of them, at most once each; their weights are all there until the call returns, or until what a device was
    /// called has run.
    fn experts(&mut self, list: &[Expert]) -> Result<(), BackendError> {
        list.iter().try_for_each(|e| self.expert(e))
    }

    /// `X[t] += Σ weight[t][j] * out[t][j]`, in the fixed order of `j`, after all experts.
    fn combine_experts(&mut self) -> Result<(), BackendError>;

    /// Keeps where the experts of block `layer` lie, all of them, which rest there as long as the backend is. Returns whether
    /// [`Backend::mixture`] may be called for the block. Not called during a stretch.
    fn hold_experts(&mut self, _layer: usize, _list: &[Expert]) -> Result<bool, BackendError> {
        Ok(false)
    }

    /// What chooses experts, [`Backend::experts`] with all that were chosen, and their sum, with the bits of these calls and without
    /// waiting for the device. Only for a block whose experts are held.
    ///
    /// # Errors
    /// [`BackendError::Pass`] for any other.
    fn mixture(&mut self, layer: usize, _routing: &Routing) -> Result<(), BackendError> {
        Err(BackendError::Pass { backend: self.name(), what: format!("the experts of block {layer} are not held") })
    }

    /// Keeps where the experts of block `layer` lie that both sites compute: `list` as the device reads them, all of them, and
    /// `of_host` those in RAM as processors do, of which the device may keep some in `slots`; `first` is the unit of the first. Returns whether
    /// [`Backend::shared_mixture`] may be called for the block.
    fn share_experts(
        &mut self,
        _layer: usize,
        _first: usize,
        _list: &[Expert],
        _of_host: &[Option<Expert>],
        _share: Share,
        _slots: Option<SlotsAt>,
    ) -> Result<bool, BackendError> {
        Ok(false)
    }

    /// [`Backend::mixture`] of exact rows by both sites: of a row's choices in RAM processors compute as many as [`Share`] says, the
    /// last ones; the device the others.
    ///
    /// # Errors
    /// [`BackendError::Pass`] for a block whose experts are not shared.
    fn shared_mixture(&mut self, layer: usize, _routing: &Routing) -> Result<(), BackendError> {
        Err(BackendError::Pass { backend: self.name(), what: format!("the experts of block {layer} are not shared") })
    }

    /// `h = norm(X)` for the head; the rows present are the outputs. Called once for each class that has outputs, exact
    /// rows first, with the class's slices of the head behind it.
    fn output_norm(&mut self, norm: &Norm) -> Result<(), BackendError>;

    /// [`Backend::expert`] of weights in RAM, those of this unit, before those of the others.
    ///
    /// # Errors
    /// Where [`Backend::computes_in_ram`] says no.
    fn expert_in_ram(&mut self, _unit: usize, _expert: &Expert) -> Result<(), BackendError> {
        Err(BackendError::Beyond { backend: self.name(), what: "experts in RAM" })
    }

    /// The next of the experts in RAM has to be waited for: those that were called may be computed meanwhile.
    ///
    /// # Errors
    /// As [`Backend::catch_up`].
    fn experts_so_far(&mut self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Whether [`Backend::hidden`] can be asked for.
    fn gives_hidden(&self) -> bool {
        false
    }

    /// Appends `h`, or `norm(X)` where a norm is given, of the rows of the class at hand to `out`: `T` × `n_embd`, what the
    /// head would be given. Waits for the device.
    ///
    /// # Errors
    /// Where [`Backend::gives_hidden`] says no.
    fn hidden(&mut self, _norm: Option<&Norm>, _out: &mut Vec<f32>) -> Result<(), BackendError> {
        let what = "final hidden states are not given by this backend; --backend cpu gives them".into();
        Err(BackendError::Pass { backend: self.name(), what })
    }

    /// `logits[o + t][first_row + r] = (w · h + bias)[r]` for one slice of the output head; `o` is the outputs of the class
    /// before, or 0.
    fn head(&mut self, w: &Linear, first_row: usize) -> Result<(), BackendError>;

    /// An operation by itself. Called only where [`Dims::beyond`] says so; [`Op::Keep`] is [`Backend::keep`].
    ///
    /// # Errors
    /// [`BackendError::Beyond`] where it has no kernel.
    fn op(&mut self, op: &Op<Weight>) -> Result<(), BackendError> {
        Err(BackendError::Beyond { backend: self.name(), what: op.what() })
    }

    /// The experts of the rows at hand become these, `T` × choices, no two of a row the same, with the weights of those that the
    /// router has just chosen: for benchmarks.
    ///
    /// # Errors
    /// Where a backend cannot.
    fn choose_instead(&mut self, _ids: &[u32]) -> Result<(), BackendError> {
        Err(BackendError::Beyond { backend: self.name(), what: "a routing that is forced" })
    }

    /// By expert of block `layer`, the address of the slot that has it and the one in RAM of which the slot's first byte is; nothing
    /// for a block without slots. They stay until the next [`Backend::shared_mixture`].
    fn in_slots(&self, _layer: usize, _to: &mut Vec<Option<(u64, u64)>>) {}

    /// Takes all slots of experts back, as when they were given, between passes.
    ///
    /// # Errors
    /// If the device is gone.
    fn empty_slots(&mut self) -> Result<(), BackendError> {
        Ok(())
    }

    /// How soon single rows chose experts again that both sites compute.
    fn reuse(&self) -> Option<&Reuse> {
        None
    }

    /// The rows of the next pass choose these experts of block `layer` in [`Backend::shared_mixture`], `T` × choices, in place of what
    /// its router chooses, with the weights of that. Called before each such pass or for none. False where it cannot be.
    fn force(&mut self, _layer: usize, _ids: &[u32]) -> Result<bool, BackendError> {
        Ok(false)
    }

    /// The experts that [`Op::Route`] has chosen, as [`Backend::route`] returns them.
    fn chosen(&mut self) -> &[u32] {
        &[]
    }

    /// Whether every value of `X` is finite. Waits for the device; no part of an ordinary pass.
    fn finite(&mut self) -> Result<bool, BackendError>;

    /// The first block of which a finite key or value became infinite in an F16 cache since
    /// [`Backend::forget_overflow`], where the backend watches for it: such a key may be overlooked, and the logits stay finite.
    fn overflow(&self) -> Option<usize> {
        None
    }

    /// The logits of the pass in host memory: outputs × `n_vocab`. Waits for the device the first time.
    fn logits(&mut self) -> Result<&[f32], BackendError>;

    /// Forgets what [`Backend::overflow`] says: no sequence that goes on has such a key or value.
    fn forget_overflow(&mut self) {}

    /// Does to pages what a sequence needs before its next pass.
    fn apply(&mut self, op: &StateOp) -> Result<(), BackendError>;

    /// Bytes of a page of layers: keys and values, each `[layer][kv head][position][head_dim]`.
    fn page_bytes(&self, layers: Layers) -> usize;

    /// Copies a page of [`Backend::page_bytes`] bytes to `to`. Waits for the device.
    fn read_page(&mut self, layers: Layers, page: PageId, to: &mut [u8]) -> Result<(), BackendError>;

    /// Replaces a page by what [`Backend::read_page`] gave.
    fn write_page(&mut self, layers: Layers, page: PageId, from: &[u8]) -> Result<(), BackendError>;

    /// Bytes this backend holds on its device, weights apart.
    fn workspace_bytes(&self) -> u64;
}
