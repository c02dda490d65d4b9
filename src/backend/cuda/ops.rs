//! Operations one by one, for what no fused call covers.
//!
//! Some wait for what follows, so that a chain of them is few launches: products of one input for each other, norms and
//! rotary embeddings of heads for the store to the cache, an activation for the product that reads it. Nothing waits
//! beyond the stage it belongs to, whose weights may go then.

use smallvec::SmallVec;

use super::args::{ADD, ActArgs, RouteByArgs, STORE, SumArgs};
use super::driver::{RowsOf, device_error};
use super::modules::Func;
use super::product::{Form, Inputs, Prep, Raw, Rows, Target, form};
use super::workspace::float_bytes;
use super::{CudaBackend, no_experts};
use crate::backend::{
    Act, Activation, Backend, BackendError, Class, Gating, Linear, Mask, Norm, NormKind, NormOf, Op, Router, Routing,
    Weight,
};
use crate::gguf::TensorType;

type Result<T = ()> = std::result::Result<T, BackendError>;

/// Most products that wait for each other, as many as one launch takes.
const TOGETHER: usize = 3;

/// What operations leave to later ones.
#[derive(Default)]
pub(super) struct Waiting {
    /// Products of one input, with what they read and write.
    products: SmallVec<[(Act, Act, Linear); TOGETHER]>,
    /// What becomes of the hidden state that the products above make, and whether there is Up.
    activation: Option<(Activation, bool)>,
    /// What is done to queries and keys.
    heads: Heads,
    /// The activations that lie quantised in `input_q`.
    pub quantised: Option<Act>,
    /// The activations that lie in `halves`.
    halves: Option<Act>,
    /// First row of H that is still wanted.
    pub h_row0: usize,
    /// H is there in floats: fused calls make it in the forms alone that they read.
    h_there: bool,
    /// Whether weights of experts multiply what they read.
    pub on_input: bool,
}

impl Waiting {
    /// The forms in which activations lie are no longer theirs.
    pub fn forget_forms(&mut self) {
        (self.quantised, self.halves) = (None, None);
    }

    /// A fused call makes H, in the forms alone that it reads.
    pub fn begin_fused(&mut self) {
        self.forget_forms();
        self.h_there = false;
    }

    /// A hidden state in this form has been made, where activations may have lain.
    pub fn made_hidden(&mut self, hidden: &Inputs) {
        if hidden.h != 0 {
            self.halves = None;
        }
    }

    /// `act` is written: its forms are those of what it was.
    pub fn written(&mut self, act: Act) {
        for ready in [&mut self.quantised, &mut self.halves] {
            if *ready == Some(act) {
                *ready = None;
            }
        }
    }
}

/// What is done to the heads of queries (0) and keys (1) before keys are stored.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Heads {
    pub norms: [Option<HeadNorm>; 2],
    /// Number of the rotary embedding.
    pub ropes: [Option<usize>; 2],
    /// [`Op::ScaleByPosition`] of queries: by, every, offset.
    pub scale: Option<(f32, f32, f32)>,
    /// Added to the mean of squares in the norm of values, which has no weight, where there is one.
    pub values: Option<f32>,
}

/// RMS norm of each head.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeadNorm {
    /// Address of the weight, or 0.
    pub weight: u64,
    pub eps: f32,
    /// Whether it comes behind the rotary embedding.
    pub behind: bool,
}

impl Heads {
    /// Those of [`crate::backend::Backend::qkv`].
    pub fn fused(norms: [Option<&Norm>; 2]) -> Heads {
        let norm = |n: &Norm| HeadNorm { weight: n.weight.addr, eps: n.eps, behind: false };
        Heads { norms: norms.map(|n| n.map(norm)), ropes: [Some(0); 2], scale: None, values: None }
    }

    pub fn is_empty(&self) -> bool {
        matches!(self, Heads { norms: [None, None], ropes: [None, None], scale: None, values: None })
    }
}

fn number_of(gating: Gating) -> i32 {
    match gating {
        Gating::Softmax => 0,
        Gating::Sigmoid => 1,
        Gating::SoftmaxOfChosen => 2,
        Gating::SigmoidOfChosen => 3,
    }
}

/// The lengths of a window and of a chunk, 0 for none.
pub(super) fn lengths(mask: Mask) -> (i32, i32) {
    let int = |n: usize| i32::try_from(n.max(1)).unwrap_or(i32::MAX);
    match mask {
        Mask::Full => (0, 0),
        Mask::Window(n) => (int(n), 0),
        Mask::Chunk(n) => (0, int(n)),
    }
}

/// Whether a product's result waits for others of the same input: something that reads it follows in the same stage.
fn waits(to: Act) -> bool {
    !matches!(to, Act::X | Act::Out | Act::H)
}

impl CudaBackend {
    /// Whether there are kernels for an operation.
    pub fn can<W>(op: &Op<W>) -> bool {
        match op {
            Op::HeadNorm { act: Act::Q | Act::K, norm } => norm.kind == NormKind::Rms && norm.bias.is_none(),
            Op::HeadNorm { act: Act::V, norm } => {
                norm.kind == NormKind::Rms && norm.weight.is_none() && norm.bias.is_none()
            }
            Op::HeadNorm { act, norm } => *act == Act::Mix && norm.weight.is_some(),
            Op::Scan(s) => s.norm.kind == NormKind::Rms && s.norm.bias.is_none(),
            Op::Combine { to, .. } => matches!(to, Act::X | Act::Out | Act::H),
            Op::Rope { act, .. } => matches!(act, Act::Q | Act::K),
            Op::ScaleByPosition { act, .. } => *act == Act::Q,
            _ => true,
        }
    }

    pub(super) fn run(&mut self, op: &Op<Weight>) -> Result {
        match *op {
            Op::Linear { to, from, w, add } => return self.linear(to, from, w, add),
            Op::Activate { how, gated, .. } if self.makes_hidden(gated) => {
                self.waiting.activation = Some((how, gated));
                return Ok(());
            }
            _ => self.settle()?,
        }
        let of_heads = matches!(
            op,
            Op::HeadNorm { act: Act::Q | Act::K | Act::V, .. }
                | Op::Rope { .. }
                | Op::ScaleByPosition { .. }
                | Op::Store { .. }
                | Op::Attend { .. }
        );
        if !of_heads && !self.waiting.heads.is_empty() {
            return Err(device_error("queries and keys that were normed or rotated were not stored"));
        }
        match *op {
            Op::Norm { to, from, norm } => self.norm_act(to, from, norm)?,
            Op::Shape(shape) => self.shape = shape,
            Op::HeadNorm { act: Act::Mix, norm } => self.norm_parts(norm)?,
            Op::HeadNorm { act: Act::V, norm } => self.waiting.heads.values = Some(norm.eps),
            Op::HeadNorm { act, norm } => {
                let i = usize::from(act == Act::K);
                let behind = self.waiting.heads.ropes[i].is_some();
                let weight = norm.weight.map_or(0, |w| w.addr);
                self.waiting.heads.norms[i] = Some(HeadNorm { weight, eps: norm.eps, behind });
            }
            Op::Rope { act, rope } => self.waiting.heads.ropes[usize::from(act == Act::K)] = Some(rope),
            Op::ScaleByPosition { by, every, offset, .. } => self.waiting.heads.scale = Some((by, every, offset)),
            Op::AddPosition { table } => self.add_position(table)?,
            Op::SplitHeads => self.split_heads()?,
            Op::GateAttn => {
                let (x, width) = self.act(Act::Attn);
                self.each_element(
                    self.engine.kernels.acts.gate,
                    ActArgs { x, y: self.act(Act::Gates).0, ..ActArgs::default() },
                    width,
                )?;
            }
            Op::GateOut => {
                let (x, width) = self.act(Act::Out);
                self.each_element(
                    self.engine.kernels.acts.gate_row,
                    ActArgs { x, y: self.act(Act::Beta).0, ..ActArgs::default() },
                    width,
                )?;
            }
            Op::Store { layer } => {
                let heads = std::mem::take(&mut self.waiting.heads);
                self.rope_store(Some(layer), &heads)?;
            }
            Op::Attend { layer, scores, sinks } => {
                let heads = std::mem::take(&mut self.waiting.heads);
                if !heads.is_empty() {
                    // Keys and values are those of an earlier block.
                    self.rope_store(None, &heads)?;
                    self.waiting.written(Act::Q);
                }
                self.waiting.written(Act::Attn);
                self.attend_scores(layer, &scores, sinks.map_or(0, |w| w.addr))?;
            }
            Op::Keep => {}
            Op::Add { to, from } => {
                let (x, width) = self.act(to);
                self.each_element(
                    self.engine.kernels.acts.add,
                    ActArgs { x, y: self.act(from).0, ..ActArgs::default() },
                    width,
                )?;
            }
            Op::AddNormed { norm } => {
                let norm = norm.map(&mut |w: Weight| w.addr);
                let forms = Inputs { f: self.x(), ..Inputs::default() };
                let (out, n) = self.act(Act::Out);
                self.engine.prepare(Prep::AddNormed(norm), out, 0, n, self.tokens, forms)?;
            }
            Op::Scale { act, by } => {
                let (x, width) = self.act(act);
                self.each_element(self.engine.kernels.acts.scale, ActArgs { x, by, ..ActArgs::default() }, width)?;
            }
            Op::Activate { how, gated, width } => self.activate(how, gated, width)?,
            Op::Route { ref w, choose, how } => {
                self.route_by(w, choose, how)?;
                self.wait_for_choices()?;
            }
            Op::Combine { to, add } => self.sum_experts(to, add)?,
            Op::Copy { to, from } => {
                let (x, width) = self.act(to);
                self.each_of(self.engine.kernels.acts.copy, x, self.act(from).0, (self.tokens, width), 0)?;
            }
            Op::Multiply { act, by } => {
                let (x, width) = self.act(act);
                self.each_of(self.engine.kernels.acts.multiply, x, by.addr, (self.tokens, width), by.cols)?;
            }
            Op::TakePart { part, width } => {
                let (from, all) = self.act(Act::PerBlock);
                let (up, from) = (self.act(Act::Up).0, from + float_bytes(1, part * width));
                self.each_of(self.engine.kernels.acts.part, up, from, (self.tokens, width), all)?;
            }
            Op::WeighExperts { by } => self.weigh_experts(by)?,
            Op::SplitGroups => self.split_groups()?,
            Op::Latent(ref l) => self.latent(l)?,
            Op::OfLatent { width, w } => self.of_latent(width, w)?,
            Op::Scan(ref s) => self.scan(s)?,
            Op::Join => self.join()?,
            Op::Outputs => self.check_outputs()?,
            Op::Head { ref w, first_row, scale, cap } => self.head_by(w, first_row, scale, cap)?,
            Op::Conv { state, w, bias } => self.convolve(state, w, bias, false)?,
            Op::ShortConv { state, w } => self.convolve(state, w, None, true)?,
            Op::DeltaNet(ref net) => self.delta_net(net)?,
            // Above.
            Op::Linear { .. } => {}
        }
        if let Some(to) = writes(op) {
            self.waiting.written(to);
        }
        Ok(())
    }

    /// Where the rows at hand begin, and how wide they are. Hidden states and numbers of heads are as wide as their
    /// products say.
    pub(super) fn act(&self, act: Act) -> (u64, usize) {
        let (d, ws, shape) = (&self.dims, &self.engine.ws, self.shape);
        let (n_embd, kv) = (d.n_embd, shape.heads * shape.dim);
        match act {
            Act::X => (self.x(), n_embd),
            Act::H => (ws.norm_f.addr() + (self.waiting.h_row0 * n_embd * 4) as u64, n_embd),
            Act::Q => (ws.q.addr(), d.n_heads * shape.dim),
            Act::K => (ws.k.addr(), kv),
            Act::V => (ws.v.addr(), kv),
            Act::Attn => (self.attn(), self.heads_width()),
            Act::Hidden => (ws.gate.addr(), 0),
            Act::Up => (ws.up.addr(), 0),
            Act::Out => (ws.acts.out.addr(), n_embd),
            Act::Mix => (ws.acts.mix.addr(), d.n_mix),
            Act::Gates => (ws.acts.gates.addr(), d.n_attn),
            Act::Beta => (ws.acts.beta.addr(), 0),
            Act::Alpha => (ws.acts.alpha.addr(), 0),
            Act::PerBlock => (ws.acts.per_block.addr() + float_bytes(self.row0, d.n_per_block), d.n_per_block),
        }
    }

    /// Launches a kernel of one thread an element of `width` columns of the rows at hand.
    ///
    /// # Errors
    /// If there is no room for these rows.
    fn each_element(&self, f: Func, a: ActArgs, width: usize) -> Result {
        let pitch = a.each.max(width as i32) as usize;
        let bytes = float_bytes(self.tokens - 1, pitch) + float_bytes(1, width);
        self.engine.ws.rooms.check("activations", a.x, bytes)?;
        self.engine.ws.rooms.check("activations", a.z, bytes)?;
        let a = ActArgs { pass: self.engine.ws.pass.addr(), rows: self.tokens as i32, n: width as i32, ..a };
        let blocks = (self.tokens * width).div_ceil(256) as u32;
        // SAFETY: ActArgs is what act_* declare; there is room for the rows, as checked above.
        unsafe { self.engine.launch(f, (blocks, 1, 1), 256, 0, &a) }
    }

    /// Launches a kernel of one thread an element of `rows` × `width` floats at `x`, of which `y` is the other operand; `each` is the
    /// kernel's.
    ///
    /// # Errors
    /// If there is no room for these rows.
    pub(super) fn each_of(&self, f: Func, x: u64, y: u64, (rows, width): (usize, usize), each: usize) -> Result {
        self.engine.ws.rooms.check("activations", x, float_bytes(rows, width))?;
        let pass = self.engine.ws.pass.addr();
        let a = ActArgs { x, y, pass, rows: rows as i32, n: width as i32, each: each as i32, ..ActArgs::default() };
        // SAFETY: ActArgs is what act_* declare; there is room for the rows, as checked above.
        unsafe { self.engine.launch(f, ((rows * width).div_ceil(256) as u32, 1, 1), 256, 0, &a) }
    }

    /// The rows of `from` in the forms that weights of these types take.
    fn inputs(&mut self, from: Act, cols: usize, types: &[TensorType]) -> Result<Inputs> {
        if from == Act::H && !self.waiting.h_there {
            return Err(device_error("the input of a fused call is read by an operation behind it"));
        }
        let (x, _) = self.act(from);
        let wanted = self.engine.forms(types);
        let mut input = Inputs::default();
        if wanted.q != 0 && self.waiting.quantised == Some(from) {
            input.q = wanted.q;
        } else if wanted.q != 0 {
            input = self.engine.quantised(Raw { x, norm: 0, eps: 0.0 }, cols, self.tokens, wanted.q)?;
            self.waiting.quantised = if input.q != 0 { Some(from) } else { self.waiting.quantised };
        }
        if wanted.h != 0 {
            input.h = wanted.h;
            if self.waiting.halves != Some(from) {
                self.engine.prepare(
                    Prep::Copy,
                    x,
                    0,
                    cols,
                    self.tokens,
                    Inputs { h: wanted.h, ..Inputs::default() },
                )?;
                self.waiting.halves = Some(from);
            }
        }
        // Floats are read where they lie.
        input.f = if wanted.f != 0 { x } else { 0 };
        Ok(input)
    }

    fn linear(&mut self, to: Act, from: Act, w: Linear, add: bool) -> Result {
        if from == Act::Hidden && self.waiting.activation.is_some() {
            return self.linear_of_hidden(to, &w, add);
        }
        if self.waiting.activation.is_some() {
            self.settle()?;
        }
        if !add && waits(to) {
            let products = &self.waiting.products;
            let apart = products.iter().any(|(read, written, _)| *read != from || *written == from);
            if apart || products.len() == TOGETHER {
                self.flush()?;
            }
            self.waiting.products.push((from, to, w));
            return Ok(());
        }
        self.flush()?;
        let input = self.inputs(from, w.weight.cols, &[w.weight.ty])?;
        self.product(to, &w, add, input)
    }

    fn product(&mut self, to: Act, w: &Linear, add: bool, input: Inputs) -> Result {
        let target = Target::new(w, self.act(to).0);
        let mode = if add { ADD } else { STORE };
        self.engine.products(&[target], self.tokens, mode, input, Rows::default())?;
        self.waiting.written(to);
        Ok(())
    }

    /// The product of a hidden state whose activation has waited for it.
    fn linear_of_hidden(&mut self, to: Act, w: &Linear, add: bool) -> Result {
        let (Some((how, gated)), products) =
            (self.waiting.activation.take(), std::mem::take(&mut self.waiting.products))
        else {
            return Ok(());
        };
        let (from, _, gate) = products[0];
        let up = products.get(1).filter(|_| gated).map(|p| p.2);
        let types = [gate.weight.ty, up.unwrap_or(gate).weight.ty];
        let input = self.inputs(from, gate.weight.cols, &types)?;
        let hidden = self.engine.hidden_by(how, &gate, up.as_ref(), w.weight.ty, self.tokens, input, 0)?;
        self.waiting.made_hidden(&hidden);
        self.product(to, w, add, hidden)
    }

    /// Whether the products that wait are those of a hidden state, with or without Up.
    fn makes_hidden(&self, gated: bool) -> bool {
        match self.waiting.products[..] {
            [(_, Act::Hidden, _)] => !gated,
            [(_, Act::Hidden, _), (_, Act::Up, _)] => gated,
            _ => false,
        }
    }

    /// Launches the products that wait.
    fn flush(&mut self) -> Result {
        let products = std::mem::take(&mut self.waiting.products);
        let Some((from, _, first)) = products.first() else { return Ok(()) };
        let types: SmallVec<[TensorType; TOGETHER]> = products.iter().map(|p| p.2.weight.ty).collect();
        let input = self.inputs(*from, first.weight.cols, &types)?;
        let targets: SmallVec<[Target; TOGETHER]> =
            products.iter().map(|(_, to, w)| Target::new(w, self.act(*to).0)).collect();
        self.engine.products(&targets, self.tokens, STORE, input, Rows::default())?;
        products.iter().for_each(|(_, to, _)| self.waiting.written(*to));
        Ok(())
    }

    /// Launches what waits for products.
    pub(super) fn settle(&mut self) -> Result {
        let width = self.waiting.products.first().map_or(0, |p| p.2.weight.rows);
        self.flush()?;
        match self.waiting.activation.take() {
            Some((how, gated)) => self.activate(how, gated, width),
            None => Ok(()),
        }
    }

    /// `Hidden = f(Hidden) * Up`, in place.
    fn activate(&mut self, how: Activation, gated: bool, width: usize) -> Result {
        let (hidden, up) = (self.act(Act::Hidden).0, self.act(Act::Up).0);
        let prep = Prep::Activate(how, if gated { up } else { 0 });
        self.waiting.written(Act::Hidden);
        self.engine.prepare(prep, hidden, 0, width, self.tokens, Inputs { f: hidden, ..Inputs::default() })
    }

    /// Norms of any kind. H comes in floats and in the form that products of the class read.
    fn norm_act(&mut self, to: Act, from: Act, norm: NormOf<Weight>) -> Result {
        let (x, width) = self.act(from);
        // Hidden states are as wide as their norm.
        let width = norm.weight.map_or(width, |w| w.cols);
        let norm = norm.map(&mut |w: Weight| w.addr);
        let mut forms = Inputs::default();
        if to == Act::H {
            (self.waiting.h_row0, self.waiting.h_there) = (0, true);
        }
        // Forms beside floats would be made of what has been written in place.
        if to == Act::H && from != Act::H {
            match self.engine.class {
                Class::Exact if width.is_multiple_of(32) => forms.q = self.engine.ws.input_q.addr(),
                Class::Exact => {}
                Class::Bulk => forms.h = self.engine.ws.halves.addr(),
            }
        }
        forms.f = self.act(to).0;
        self.engine.prepare(Prep::Norms(norm), x, 0, width, self.tokens, forms)?;
        self.waiting.written(to);
        if forms.q != 0 {
            self.waiting.quantised = Some(to);
        }
        if forms.h != 0 {
            self.waiting.halves = Some(to);
        }
        Ok(())
    }

    /// `Mix = [H | PerBlock]`.
    fn join(&self) -> Result {
        let width = 4 * self.dims.n_embd;
        let to = self.act(Act::Mix).0;
        self.engine.ws.rooms.check("activations", to, float_bytes(self.tokens, 2 * self.dims.n_embd))?;
        for (part, act) in [Act::H, Act::PerBlock].into_iter().enumerate() {
            let from = self.act(act);
            if from.1 != self.dims.n_embd || act == Act::H && !self.waiting.h_there {
                return Err(device_error("rows that are joined are not there"));
            }
            let rows = |addr: u64, pitch: usize| RowsOf { addr, width, pitch, rows: self.tokens };
            let to = rows(to + (part * width) as u64, 2 * width);
            // SAFETY: both buffers hold the pass's rows, Mix as checked above, and are not the same one.
            unsafe { self.engine.stream.copy_rows(rows(from.0, width), to)? };
        }
        Ok(())
    }

    /// The norm of each part of Mix that is as wide as the norm.
    fn norm_parts(&mut self, norm: NormOf<Weight>) -> Result {
        let (x, width) = self.act(Act::Mix);
        let n = norm.weight.map_or(width, |w| w.cols);
        let norm = norm.map(&mut |w: Weight| w.addr);
        let forms = Inputs { f: x, ..Inputs::default() };
        self.engine.prepare(Prep::Norms(norm), x, 0, n, self.tokens * (width / n), forms)
    }

    /// `norm(X)` as H, in floats too, and in the forms that weights of these types want.
    pub(super) fn normed_for_all(&mut self, norm: &Norm, types: &[TensorType]) -> Result<Inputs> {
        let norm = NormOf { kind: NormKind::Rms, weight: Some(norm.weight), bias: None, eps: norm.eps };
        self.norm_act(Act::H, Act::X, norm)?;
        self.inputs(Act::H, self.dims.n_embd, types)
    }

    fn add_position(&self, table: Weight) -> Result {
        let (x, width) = self.act(Act::X);
        if table.cols < self.dims.n_ctx * width {
            return Err(device_error(format!(
                "the table of positions has {}, fewer than the context of {}",
                table.cols / width,
                self.dims.n_ctx
            )));
        }
        self.each_element(self.engine.kernels.acts.position, ActArgs { x, y: table.addr, ..ActArgs::default() }, width)
    }

    fn split_heads(&self) -> Result {
        let (x, width) = self.act(Act::Q);
        let (y, z) = (self.act(Act::Mix).0, self.act(Act::Gates).0);
        let a = ActArgs { x, y, z, each: self.shape.dim as i32, ..ActArgs::default() };
        self.each_element(self.engine.kernels.acts.split, a, width)
    }

    fn route_by(&mut self, w: &Linear, choose: Option<Weight>, how: Router) -> Result {
        if self.waiting.h_row0 != 0 || !self.waiting.h_there {
            return Err(device_error("a router behind a norm of other rows"));
        }
        let (experts, used) = (self.dims.n_experts, self.dims.n_experts_used);
        // What experts of exact rows read.
        if self.engine.class == Class::Exact
            && self.dims.n_embd.is_multiple_of(32)
            && self.waiting.quantised != Some(Act::H)
        {
            let q = self.engine.ws.input_q.addr();
            let (x, n) = self.act(Act::H);
            self.engine.prepare(Prep::Copy, x, 0, n, self.tokens, Inputs { q, ..Inputs::default() })?;
            self.waiting.quantised = Some(Act::H);
        }
        let moe = self.engine.ws.moe.as_ref().ok_or_else(no_experts)?;
        let a = RouteByArgs {
            scores: moe.scores.addr(),
            bias: choose.map_or(0, |w| w.addr),
            ids: moe.ids.addr(),
            weights: moe.weights.addr(),
            tokens: self.tokens as i32,
            experts: experts as i32,
            used: used as i32,
            gating: number_of(how.gating),
            normalize: i32::from(how.normalize),
            groups: if experts.is_multiple_of(how.groups.0.max(1)) { how.groups.0 as i32 } else { 1 },
            kept: how.groups.1 as i32,
            scale: how.scale,
        };
        let target = Target { stride: experts, ..Target::new(w, moe.scores.addr()) };
        if form(w.weight.ty, Class::Exact) == Form::Float {
            self.engine.plain(&target, self.tokens, STORE, self.act(Act::H).0, Rows::default())?;
        } else {
            let input = self.inputs(Act::H, w.weight.cols, &[w.weight.ty])?;
            self.engine.products(&[target], self.tokens, STORE, input, Rows::default())?;
        }
        self.waiting.on_input = how.on_input;
        let shared = 4 * (experts + a.groups as usize);
        let f = self.engine.kernels.acts.route_by;
        // SAFETY: RouteByArgs is what route_by declares; scores, ids and weights have rows for every token of a batch, and
        // there are no more choices than experts.
        unsafe { self.engine.launch(f, (self.tokens as u32, 1, 1), 32, shared, &a) }
    }

    fn weigh_experts(&self, by: Weight) -> Result {
        let moe = self.engine.ws.moe.as_ref().ok_or_else(no_experts)?;
        let (x, z) = (moe.weights.addr(), moe.ids.addr());
        let a = ActArgs { x, y: by.addr, z, ..ActArgs::default() };
        self.each_element(self.engine.kernels.acts.weigh, a, self.dims.n_experts_used)
    }

    /// The choices of a router of any kind to the workspace, with what experts read in the forms that the kernels of `moe.cu` want.
    pub(super) fn choose_by(&mut self, routing: &Routing) -> Result {
        let Routing::By { ref w, choose, how, weigh, reads, .. } = *routing else {
            return Err(device_error("a router that norms its input itself"));
        };
        if how.on_input {
            return Err(device_error("experts that are held, and whose inputs are weighed"));
        }
        self.settle()?;
        self.route_by(w, choose, how)?;
        if let Some(by) = weigh {
            self.weigh_experts(by)?;
        }
        if let Some(norm) = reads {
            self.norm_act(Act::H, Act::X, norm)?;
        }
        if self.engine.class == Class::Bulk && self.waiting.halves != Some(Act::H) {
            let (x, n) = self.act(Act::H);
            let h = self.engine.ws.halves.addr();
            self.engine.prepare(Prep::Copy, x, 0, n, self.tokens, Inputs { h, ..Inputs::default() })?;
        }
        self.waiting.forget_forms();
        Ok(())
    }

    /// The rows that an expert reads, times their weights: `n` of them, by the numbers of tokens and of choices.
    pub(super) fn weighed_inputs(
        &mut self,
        types: &[TensorType],
        tokens: u64,
        choices: u64,
        n: usize,
    ) -> Result<Inputs> {
        let ws = &self.engine.ws;
        let moe = ws.moe.as_ref().ok_or_else(no_experts)?;
        let mut to = self.engine.forms(types);
        if to.f != 0 {
            // Where a router's weights multiply inputs, outputs are added to X at once: Out is nobody's.
            to.f = ws.acts.out.addr();
        }
        self.engine.prepare(
            Prep::Scaled(moe.weights.addr(), choices),
            ws.norm_f.addr(),
            tokens,
            self.dims.n_embd,
            n,
            to,
        )?;
        self.waiting.forget_forms();
        Ok(to)
    }

    pub(super) fn sum_experts(&mut self, to: Act, add: bool) -> Result {
        let (x, n) = self.act(to);
        let moe = self.engine.ws.moe.as_ref().ok_or_else(no_experts)?;
        if self.waiting.on_input && to == Act::Out {
            return Err(device_error("experts whose inputs are weighed, and whose outputs wait"));
        }
        self.engine.ws.rooms.check("outputs of experts", x, float_bytes(self.tokens, n))?;
        let a = SumArgs {
            x,
            out: moe.out.addr(),
            weights: if self.waiting.on_input { 0 } else { moe.weights.addr() },
            tokens: self.tokens as i32,
            used: self.dims.n_experts_used as i32,
            n: n as i32,
            add: i32::from(add),
        };
        let blocks = (self.tokens * n).div_ceil(256) as u32;
        // SAFETY: SumArgs is what act_sum declares; there is room for the rows, as checked above.
        unsafe { self.engine.launch(self.engine.kernels.acts.sum, (blocks, 1, 1), 256, 0, &a) }
    }

    fn head_by(&mut self, w: &Linear, first_row: usize, scale: f32, cap: f32) -> Result {
        let x = self.engine.ws.logits.addr() + 4 * first_row as u64;
        self.head(w, first_row)?;
        let a = ActArgs { x, each: self.dims.n_vocab as i32, by: scale, cap, ..ActArgs::default() };
        self.each_element(self.engine.kernels.acts.logits, a, w.weight.rows)
    }
}

/// What an operation writes whose forms may lie somewhere; those that are written by functions above say it themselves.
fn writes(op: &Op<Weight>) -> Option<Act> {
    match *op {
        Op::Add { to, .. } | Op::Combine { to, .. } => Some(to),
        Op::Scale { act, .. } => Some(act),
        Op::AddPosition { .. } | Op::AddNormed { .. } => Some(Act::X),
        Op::GateAttn => Some(Act::Attn),
        Op::GateOut => Some(Act::Out),
        Op::SplitHeads | Op::Store { .. } => Some(Act::Q),
        Op::Conv { .. } | Op::SplitGroups | Op::OfLatent { .. } | Op::Join | Op::HeadNorm { act: Act::Mix, .. } => {
            Some(Act::Mix)
        }
        Op::Copy { to, .. } => Some(to),
        Op::Multiply { act, .. } => Some(act),
        Op::TakePart { .. } => Some(Act::Up),
        Op::Latent(_) => Some(Act::Q),
        Op::ShortConv { .. } | Op::DeltaNet(_) | Op::Scan(_) => Some(Act::Attn),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::modules::TAPS_MAX;
    use super::super::product::activation;
    use super::*;

    /// Guards against a router or an activation that the two sides number differently.
    #[test]
    fn kernels_have_the_same_numbers() {
        let acts = include_str!("../../../kernels/acts.cu");
        let common = include_str!("../../../kernels/common.cuh");
        let has = |source: &str, name: &str, n: i32| {
            assert!(source.contains(&format!("#define {name} {n}\n")), "no {name} {n}");
        };
        has(acts, "GATING_SOFTMAX", number_of(Gating::Softmax));
        has(acts, "GATING_SIGMOID", number_of(Gating::Sigmoid));
        has(acts, "GATING_SOFTMAX_OF_CHOSEN", number_of(Gating::SoftmaxOfChosen));
        has(acts, "GATING_SIGMOID_OF_CHOSEN", number_of(Gating::SigmoidOfChosen));
        has(acts, "TAPS_MAX", TAPS_MAX as i32);
        has(common, "ACTIVATE_SILU", activation(Activation::Silu).0);
        has(common, "ACTIVATE_GELU", activation(Activation::Gelu).0);
        has(common, "ACTIVATE_RELU2", activation(Activation::ReluSquared).0);
        has(common, "ACTIVATE_CLAMPED", activation(Activation::ClampedSwiglu { limit: 7.0 }).0);
    }

    #[test]
    fn what_has_no_kernel_is_refused_by_name() {
        let plain: NormOf<usize> = NormOf { kind: NormKind::Rms, weight: None, bias: None, eps: 1e-5 };
        assert!(CudaBackend::can(&Op::HeadNorm { act: Act::Q, norm: plain }));
        let layer = NormOf { kind: NormKind::Layer, ..plain };
        assert!(!CudaBackend::can(&Op::HeadNorm { act: Act::Q, norm: layer }));
        assert!(!CudaBackend::can(&Op::<usize>::ScaleByPosition { act: Act::K, by: 1.0, every: 1.0, offset: 0.0 }));
        assert!(!CudaBackend::can(&Op::HeadNorm { act: Act::V, norm: NormOf { weight: Some(0), ..plain } }));
        assert!(!CudaBackend::can(&Op::<usize>::Combine { to: Act::Q, add: false }));
    }
}
