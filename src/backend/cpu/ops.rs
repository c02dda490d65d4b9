//! Operations one by one: what no fused call covers. Each row is computed by itself, so that its bits depend on nothing
//! beside it.

use super::kernel::{Body, Dot, Then, dispatch, dot_f32};
use super::{CpuBackend, Shared, norm_scale, rotate};
use crate::backend::{Act, Activation, BackendError, Expert, Gating, Linear, NormKind, NormOf, Op, Router, Weight};

impl CpuBackend {
    pub(super) fn run(&mut self, op: &Op<Weight>) -> Result<(), BackendError> {
        let to = writes(op);
        if to.is_some() && self.ready == to {
            self.ready = None;
        }
        self.attn_ready &= to != Some(Act::Attn);
        match *op {
            Op::Norm { to, from, norm } => self.norm(to, from, norm),
            Op::Shape(shape) => self.shape = shape,
            Op::HeadNorm { act, norm } => self.head_norm(act, norm),
            Op::Copy { to, from } => self.copy(to, from),
            Op::Latent(ref l) => self.latent(l),
            Op::OfLatent { width, w } => self.of_latent(width, w),
            Op::Join => self.join(),
            Op::Multiply { act, by } => self.multiply(act, by),
            Op::TakePart { part, width } => self.take_part(part, width),
            Op::Linear { to, from, w, add } => self.linear(to, from, &w, add),
            Op::Rope { act, rope } => self.rope(act, rope),
            Op::ScaleByPosition { act, by, every, offset } => self.scale_by_position(act, by, every, offset),
            Op::AddPosition { table } => self.add_position(table),
            Op::SplitHeads => self.split_heads(),
            Op::SplitGroups => self.split_groups(),
            Op::GateAttn => self.gate_attn(),
            Op::GateOut => self.gate_out(),
            Op::Conv { state, w, bias } => self.conv(state, w, bias),
            Op::Scan(ref s) => self.scan(s),
            Op::ShortConv { state, w } => self.short_conv(state, w),
            Op::DeltaNet(ref net) => self.delta_net(net),
            Op::Store { layer } => self.store(layer),
            Op::Attend { layer, scores, sinks } => self.attend_by(layer, scores, sinks),
            Op::Keep => {}
            Op::Add { to, from } => self.add(to, from),
            Op::AddNormed { norm } => {
                self.norm(Act::Out, Act::Out, norm);
                self.add(Act::X, Act::Out);
            }
            Op::Scale { act, by } => self.scale(act, by),
            Op::Activate { how, gated, width } => self.activate_hidden(how, gated, width),
            Op::Route { w, choose, how } => self.route_by(&w, choose, how),
            Op::WeighExperts { by } => self.weigh_experts(by),
            Op::Combine { to, add } => self.combine(to, add),
            Op::Outputs => self.begin_outputs()?,
            Op::Head { w, first_row, scale, cap } => self.head_by(&w, first_row, scale, cap),
        }
        Ok(())
    }

    /// Where the rows of the class at hand begin, and how wide they are. Hidden states are as wide as the operation says.
    fn rows_of(&mut self, act: Act) -> (Shared<f32>, usize) {
        let (d, shape) = (&self.dims, self.shape);
        let attn = d.n_heads * shape.value_dim();
        let (n_embd, q, kv, n_ff) = (d.n_embd, d.n_heads * shape.dim, shape.heads * shape.dim, d.n_ff);
        let given = d.n_per_block;
        let (first, first_given) = (self.first() * n_embd, self.first() * given);
        match act {
            Act::X => (Shared(self.x[first..].as_mut_ptr()), n_embd),
            Act::H => (Shared(self.input[first..].as_mut_ptr()), n_embd),
            Act::Out => (Shared(self.part[first..].as_mut_ptr()), n_embd),
            Act::Q => (Shared(self.q.ptr()), q),
            Act::K => (Shared(self.k.ptr()), kv),
            Act::V => (Shared(self.v.ptr()), kv),
            Act::Attn => (Shared(self.attn.ptr()), attn),
            Act::Hidden => (Shared(self.hidden.ptr()), n_ff),
            Act::Up => (Shared(self.up.ptr()), n_ff),
            Act::Mix => (Shared(self.mix.ptr()), self.dims.n_mix),
            Act::Gates => (Shared(self.gates.ptr()), self.dims.n_attn),
            Act::Beta => (Shared(self.beta.ptr()), 0),
            Act::Alpha => (Shared(self.alpha.ptr()), 0),
            Act::PerBlock => (Shared(self.per_block[first_given..].as_mut_ptr()), given),
        }
    }

    fn norm(&mut self, to: Act, from: Act, norm: NormOf<Weight>) {
        let ((x, width), (out, _)) = (self.rows_of(from), self.rows_of(to));
        let width = norm.weight.map_or(width, |w| w.cols());
        let isa = self.isa;
        self.pool.run(self.n_tokens(), &|_, t| {
            // SAFETY: task t reads and writes row t alone; both buffers have rows of this width.
            let (x, out) = unsafe { (x.get().add(t * width), out.get().add(t * width)) };
            dispatch(isa, Normed { x, out, width, norm });
        });
    }

    fn head_norm(&mut self, act: Act, norm: NormOf<Weight>) {
        let (x, width) = self.rows_of(act);
        let each = norm.weight.map_or(self.shape.dim, |w| w.cols());
        let isa = self.isa;
        self.pool.run(self.n_tokens(), &|_, t| {
            for head in (0..width).step_by(each) {
                // SAFETY: task t has row t alone, which is made of whole heads.
                let x = unsafe { x.get().add(t * width + head) };
                dispatch(isa, Normed { x, out: x, width: each, norm });
            }
        });
    }

    fn linear(&mut self, to: Act, from: Act, w: &Linear, add: bool) {
        let ((x, _), (out, _)) = (self.rows_of(from), self.rows_of(to));
        let attention = from == Act::Attn && self.attn_ready;
        if !attention && self.ready != Some(from) {
            self.prepare(x, x, w.weight.cols, self.n_tokens(), None);
            self.ready = Some(from);
        }
        let job = self.job(w, x.get(), out.get(), if add { Then::Add } else { Then::Store });
        self.jobs(&[job], None);
    }

    fn rope(&mut self, act: Act, rope: usize) {
        let ((x, width), each) = (self.rows_of(act), self.shape.dim);
        let before: usize = self.dims.ropes[..rope].iter().map(|r| r.freqs.len()).sum();
        let (kind, pairs) = (self.dims.ropes[rope].kind, self.dims.ropes[rope].freqs.len());
        let first = self.dims.max_batch.max(1) * before + self.first() * pairs;
        let (cos, sin) = (&self.cos[first..], &self.sin[first..]);
        self.pool.run(self.n_tokens(), &|_, t| {
            let at = t * pairs..(t + 1) * pairs;
            for head in (0..width).step_by(each) {
                // SAFETY: as in `head_norm`.
                let x = unsafe { std::slice::from_raw_parts_mut(x.get().add(t * width + head), each) };
                rotate(x, kind, &cos[at.clone()], &sin[at.clone()]);
            }
        });
    }

    /// Every row of `act` with its number.
    fn each_row(&mut self, act: Act, f: impl Fn(usize, &mut [f32])) {
        let (x, width) = self.rows_of(act);
        for t in 0..self.n_tokens() {
            // SAFETY: the buffer has these rows, and nobody else has them now.
            f(t, unsafe { std::slice::from_raw_parts_mut(x.get().add(t * width), width) });
        }
    }

    fn scale_by_position(&mut self, act: Act, by: f32, every: f32, offset: f32) {
        let (x, width) = self.rows_of(act);
        let first = self.first();
        for (t, place) in self.places[first..first + self.n_tokens()].iter().enumerate() {
            // SAFETY: the buffer has this row, and nobody else has it now.
            let row = unsafe { std::slice::from_raw_parts_mut(x.get().add(t * width), width) };
            let factor = 1.0 + by * (((place.position as f32 + offset) / every).floor() + 1.0).ln();
            row.iter_mut().for_each(|x| *x *= factor);
        }
    }

    fn add_position(&mut self, table: Weight) {
        let (first, width) = (self.first(), self.dims.n_embd);
        let (x, _) = self.rows_of(Act::X);
        for (t, place) in self.places[first..first + self.n_tokens()].iter().enumerate() {
            let at = place.position * width;
            assert!(at + width <= table.cols(), "a position beyond the table");
            for i in 0..width {
                // SAFETY: the row lies in X and nobody else has it now; the table has the element, at any alignment.
                unsafe { *x.get().add(t * width + i) += (table.addr as *const f32).add(at + i).read_unaligned() };
            }
        }
    }

    fn store(&mut self, layer: usize) {
        let mut rotation = self.rotation(layer, None, None);
        // What is to be rotated has been.
        rotation.pairs = 0;
        let (isa, overflow, n_tokens) = (self.isa, &self.overflow, self.n_tokens());
        self.pool.run(n_tokens, &|_, token| {
            (0..rotation.heads[1]).for_each(|kv_head| rotation.run(isa, token, kv_head, overflow));
        });
        self.rotation = None;
    }

    fn add(&mut self, to: Act, from: Act) {
        let (from, width) = self.rows_of(from);
        self.each_row(to, |t, row| {
            // SAFETY: both have rows of this width, of different buffers.
            let from = unsafe { std::slice::from_raw_parts(from.get().add(t * width), width) };
            row.iter_mut().zip(from).for_each(|(x, y)| *x += y);
        });
    }

    fn copy(&mut self, to: Act, from: Act) {
        let (from, width) = self.rows_of(from);
        self.each_row(to, |t, row| {
            // SAFETY: as in `add`.
            row.copy_from_slice(unsafe { std::slice::from_raw_parts(from.get().add(t * width), width) });
        });
    }

    fn join(&mut self) {
        let d = self.dims.n_embd;
        for (part, act) in [Act::H, Act::PerBlock].into_iter().enumerate() {
            let (from, width) = self.rows_of(act);
            assert_eq!(width, d, "rows that are joined");
            for t in 0..self.n_tokens() {
                // SAFETY: the row is there, in another buffer than Mix.
                let from = unsafe { std::slice::from_raw_parts(from.get().add(t * d), d) };
                self.mix[(2 * t + part) * d..(2 * t + part + 1) * d].copy_from_slice(from);
            }
        }
    }

    fn multiply(&mut self, act: Act, by: Weight) {
        let at = by.addr as *const f32;
        let last = by.cols() - 1;
        self.each_row(act, |_, row| {
            // One number stands for a vector of it.
            row.iter_mut().enumerate().for_each(|(i, x)| *x *= bias_of(at, i.min(last)));
        });
    }

    fn take_part(&mut self, part: usize, width: usize) {
        let (from, all) = self.rows_of(Act::PerBlock);
        assert!((part + 1) * width <= all, "part {part} of {all} elements");
        for t in 0..self.n_tokens() {
            // SAFETY: the row has the part, as asserted, and lies in another buffer.
            let from = unsafe { std::slice::from_raw_parts(from.get().add(t * all + part * width), width) };
            self.up[t * width..(t + 1) * width].copy_from_slice(from);
        }
    }

    fn weigh_experts(&mut self, by: Weight) {
        let choices = self.choices();
        let e = &mut self.experts;
        for (weight, id) in e.weights[choices.clone()].iter_mut().zip(&e.ids[choices]) {
            *weight *= bias_of(by.addr as *const f32, *id as usize);
        }
    }

    fn scale(&mut self, act: Act, by: f32) {
        self.each_row(act, |_, row| row.iter_mut().for_each(|x| *x *= by));
    }

    fn activate_hidden(&mut self, how: Activation, gated: bool, width: usize) {
        let (x, up) = (Shared(self.hidden.ptr()), Shared(self.up.ptr()));
        self.activate(x, gated.then_some(up), how, width, self.n_tokens());
    }

    /// `x = f(x) * up` of `n` rows, or `f(x)`.
    fn activate(&mut self, x: Shared<f32>, up: Option<Shared<f32>>, how: Activation, width: usize, n: usize) {
        self.pool.run(n, &|_, t| {
            // SAFETY: task t has row t alone; both buffers have rows of this width.
            let x = unsafe { std::slice::from_raw_parts_mut(x.get().add(t * width), width) };
            match up {
                Some(up) => {
                    // SAFETY: as above.
                    let up = unsafe { std::slice::from_raw_parts(up.get().add(t * width), width) };
                    x.iter_mut().zip(up).for_each(|(x, u)| *x = gated(how, *x, *u));
                }
                None => x.iter_mut().for_each(|x| *x = alone(how, *x)),
            }
        });
    }

    /// The hidden states of `n` rows of an expert, whose input is prepared at `x`.
    pub(super) fn expert_hidden(&mut self, e: &Expert, x: *const f32, n: usize) {
        let hidden = Shared(self.experts.hidden.ptr());
        if e.how == Activation::Silu {
            let jobs = [self.job(&e.gate, x, hidden.get(), Then::Silu), self.job(&e.up, x, hidden.get(), Then::Mul)];
            self.jobs(&jobs, None);
            return;
        }
        let up = Shared(self.experts.up.ptr());
        let jobs = [self.job(&e.gate, x, hidden.get(), Then::Store), self.job(&e.up, x, up.get(), Then::Store)];
        self.jobs(&jobs, None);
        self.activate(hidden, Some(up), e.how, e.gate.weight.rows(), n);
    }

    fn route_by(&mut self, w: &Linear, choose: Option<Weight>, how: Router) {
        let (input, scores) = (self.input_here(), self.experts.scores.ptr());
        self.prepare(Shared(input), Shared(input), self.dims.n_embd, self.n_tokens(), None);
        let job = self.job(w, input, scores, Then::Store);
        self.jobs(&[job], None);
        let (n, used) = (self.dims.n_experts, self.dims.n_experts_used);
        let choices = self.choices();
        let e = &mut self.experts;
        e.on_input = how.on_input;
        let bias = choose.map_or(std::ptr::null(), |w| w.addr as *const f32);
        e.chooser.begin(how, (0..n).map(|i| bias_of(bias, i)));
        for (t, first) in choices.step_by(used).enumerate() {
            let scores = &mut e.scores[t * n..(t + 1) * n];
            let choice = first..first + used;
            e.chooser.choose(scores, &mut e.ids[choice.clone()], &mut e.weights[choice]);
        }
    }

    /// Adds the outputs of experts to the rows of `to`, or stores their sums there.
    pub(super) fn combine(&mut self, to: Act, add: bool) {
        let (used, d) = (self.dims.n_experts_used, self.dims.n_embd);
        let (x, _) = self.rows_of(to);
        for (t, first) in self.choices().step_by(used).enumerate() {
            // SAFETY: the buffer has this row, and nobody else has it now.
            let x = unsafe { std::slice::from_raw_parts_mut(x.get().add(t * d), d) };
            if !add {
                x.fill(0.0);
            }
            for pair in first..first + used {
                let w = if self.experts.on_input { 1.0 } else { self.experts.weights[pair] };
                x.iter_mut().zip(&self.experts.out[pair * d..]).for_each(|(x, o)| *x += w * o);
            }
        }
    }

    /// The rows at hand are outputs, behind those of the class before.
    pub(super) fn begin_outputs(&mut self) -> Result<(), BackendError> {
        let (tokens, max) = (self.outputs + self.n_tokens(), self.dims.max_outputs);
        if tokens > max {
            return Err(BackendError::Outputs { backend: "cpu", tokens, max });
        }
        self.first_output[self.class as usize] = std::mem::replace(&mut self.outputs, tokens);
        Ok(())
    }

    fn head_by(&mut self, w: &Linear, first_row: usize, scale: f32, cap: f32) {
        let (input, _) = self.rows_of(Act::H);
        // Each slice comes with a unit of its own, and classes take turns.
        self.prepare(input, input, self.dims.n_embd, self.n_tokens(), None);
        let (first, n_vocab) = (self.first_output[self.class as usize], self.dims.n_vocab);
        let at = first * n_vocab + first_row;
        let out = self.logits[at..].as_mut_ptr();
        let (job, rows) = self.job(w, input.get(), out, Then::Store);
        self.jobs(&[(super::Job { stride: n_vocab, ..job }, rows)], None);
        for t in 0..self.n_tokens() {
            for x in &mut self.logits[at + t * n_vocab..][..rows] {
                *x *= scale;
                if cap != 0.0 {
                    *x = cap * (*x / cap).tanh();
                }
            }
        }
    }
}

/// What an operation writes.
fn writes(op: &Op<Weight>) -> Option<Act> {
    match *op {
        Op::Norm { to, .. } | Op::Linear { to, .. } | Op::Add { to, .. } | Op::Combine { to, .. } => Some(to),
        Op::HeadNorm { act, .. } | Op::Rope { act, .. } | Op::ScaleByPosition { act, .. } | Op::Scale { act, .. } => {
            Some(act)
        }
        Op::Copy { to, .. } => Some(to),
        Op::Join | Op::OfLatent { .. } => Some(Act::Mix),
        Op::Latent(_) => Some(Act::Q),
        Op::Multiply { act, .. } => Some(act),
        Op::TakePart { .. } => Some(Act::Up),
        Op::AddPosition { .. } | Op::AddNormed { .. } => Some(Act::X),
        Op::Attend { .. } | Op::GateAttn | Op::DeltaNet(_) | Op::Scan(_) | Op::ShortConv { .. } => Some(Act::Attn),
        Op::SplitHeads => Some(Act::Q),
        Op::GateOut => Some(Act::Out),
        Op::Conv { .. } | Op::SplitGroups => Some(Act::Mix),
        Op::Activate { .. } => Some(Act::Hidden),
        Op::Shape(_) | Op::Store { .. } | Op::Keep | Op::Route { .. } | Op::WeighExperts { .. } | Op::Outputs => None,
        Op::Head { .. } => None,
    }
}

fn gated(how: Activation, gate: f32, up: f32) -> f32 {
    match how {
        Activation::ClampedSwiglu { limit } => {
            let (g, u) = (gate.min(limit), up.clamp(-limit, limit));
            g / (1.0 + (-1.702 * g).exp()) * (u + 1.0)
        }
        _ => alone(how, gate) * up,
    }
}

fn alone(how: Activation, x: f32) -> f32 {
    match how {
        Activation::Gelu => 0.5 * x * (1.0 + (0.797_884_6 * x * (1.0 + 0.044_715 * x * x)).tanh()),
        Activation::ReluSquared => x.max(0.0) * x.max(0.0),
        Activation::Silu | Activation::ClampedSwiglu { .. } => x / (1.0 + (-x).exp()),
    }
}

/// A row of `width` floats normed to `out`, which may be the same.
pub(super) struct Normed {
    pub x: *const f32,
    pub out: *mut f32,
    pub width: usize,
    pub norm: NormOf<Weight>,
}

impl Body for Normed {
    #[inline(always)]
    fn run<D: Dot>(self) {
        let Normed { x, out, width, norm } = self;
        let vector = |w: Option<Weight>| w.map_or(std::ptr::null(), |w| w.addr as *const f32);
        let (weight, bias) = (vector(norm.weight), vector(norm.bias));
        // SAFETY: the caller's rows; reads of an element come before its write.
        let row = unsafe { std::slice::from_raw_parts(x, width) };
        let mean = match norm.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => row.iter().sum::<f32>() / width as f32,
        };
        let squares = match norm.kind {
            NormKind::Rms => dot_f32::<D>(row, row),
            NormKind::Layer => row.iter().map(|x| (x - mean) * (x - mean)).sum(),
        };
        let scale = norm_scale(squares / width as f32, norm.eps);
        for i in 0..width {
            // SAFETY: vectors have as many floats as the row, at any alignment.
            unsafe {
                let w = if weight.is_null() { 1.0 } else { weight.add(i).read_unaligned() };
                *out.add(i) = (*x.add(i) - mean) * scale * w + bias_of(bias, i);
            }
        }
    }
}

/// An element of a vector that may not be there.
fn bias_of(bias: *const f32, i: usize) -> f32 {
    // SAFETY: callers stay below the vector's length; it may lie at any alignment.
    if bias.is_null() { 0.0 } else { unsafe { bias.add(i).read_unaligned() } }
}

/// Chooses experts by scores. Its lists are kept, so that no token allocates any.
pub(super) struct Chooser {
    how: Router,
    /// Added to chances where experts are chosen.
    bias: Vec<f32>,
    /// By which experts are chosen; those that are no number, chosen already or of a group that is out come last.
    chances: Vec<f32>,
    /// Groups by what they are worth.
    groups: Vec<(f32, usize)>,
}

/// Least sum that weights are divided by.
const LEAST: f32 = 6.103_515_6e-5;

impl Chooser {
    /// With room for so many experts.
    pub fn new(experts: usize) -> Chooser {
        let list = || Vec::with_capacity(experts);
        Chooser { how: Router::softmax(true, 1.0), bias: list(), chances: list(), groups: Vec::with_capacity(experts) }
    }

    fn begin(&mut self, how: Router, bias: impl Iterator<Item = f32>) {
        self.how = how;
        self.bias.clear();
        self.bias.extend(bias);
    }

    fn choose(&mut self, scores: &mut [f32], ids: &mut [u32], weights: &mut [f32]) {
        let (n, how) = (scores.len(), self.how);
        match how.gating {
            Gating::Softmax => {
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                scores.iter_mut().for_each(|s| *s = (*s - most).exp());
                let sum: f32 = scores.iter().sum();
                scores.iter_mut().for_each(|s| *s /= sum);
            }
            Gating::Sigmoid => scores.iter_mut().for_each(|s| *s = 1.0 / (1.0 + (-*s).exp())),
            Gating::SoftmaxOfChosen | Gating::SigmoidOfChosen => {}
        }
        let chance = |c: f32| if c.is_nan() { f32::NEG_INFINITY } else { c };
        self.chances.clear();
        self.chances.extend(scores.iter().zip(&self.bias).map(|(s, b)| chance(s + b)));
        let (groups, kept) = how.groups;
        if groups > 1 && n.is_multiple_of(groups) {
            self.keep_groups(n / groups, groups, kept);
        }
        for (i, weight) in weights.iter_mut().enumerate() {
            let (chosen, rest) = ids.split_at_mut(i);
            let mut best: Option<usize> = None;
            for e in (0..n).filter(|e| !chosen.contains(&(*e as u32))) {
                if best.is_none_or(|b| self.chances[e] > self.chances[b]) {
                    best = Some(e);
                }
            }
            let best = best.unwrap_or(0);
            (rest[0], *weight) = (best as u32, scores[best]);
        }
        if how.gating == Gating::SoftmaxOfChosen {
            let most = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            weights.iter_mut().for_each(|w| *w = (*w - most).exp());
            let sum: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        if how.gating == Gating::SigmoidOfChosen {
            weights.iter_mut().for_each(|w| *w = 1.0 / (1.0 + (-*w).exp()));
        }
        if how.normalize {
            let sum = weights.iter().sum::<f32>().max(LEAST);
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        weights.iter_mut().for_each(|w| *w *= how.scale);
    }

    /// Takes away the experts of all but the best groups, by the sum of their two best chances.
    fn keep_groups(&mut self, each: usize, groups: usize, kept: usize) {
        let worth = |group: &[f32]| {
            let mut best = [f32::NEG_INFINITY; 2];
            for &c in group {
                if c > best[0] {
                    best = [c, best[0]];
                } else if c > best[1] {
                    best[1] = c;
                }
            }
            if each == 1 { best[0] } else { best[0] + best[1] }
        };
        self.groups.clear();
        self.groups.extend(self.chances.chunks_exact(each).take(groups).map(worth).zip(0..));
        self.groups.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for &(_, group) in self.groups.iter().skip(kept) {
            self.chances[group * each..(group + 1) * each].fill(f32::NEG_INFINITY);
        }
    }
}
