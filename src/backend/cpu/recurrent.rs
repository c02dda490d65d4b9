//! Recurrences: each row follows from the one before, in whatever pass that was, so that a prompt's bits do not depend on
//! how it is cut.

use super::kernel::{Body, Dot, dispatch, dot_f32};
use super::ops::Normed;
use super::{CpuBackend, RunRows, Shared, norm_scale};
use crate::backend::{DELTA_DIM_MAX, DeltaNet, NormOf, Scan, TAPS_MAX, Weight};

/// Channels of a task of a convolution.
const CHANNELS: usize = 64;

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

impl CpuBackend {
    /// Of each head of Mix, the first half to Q and the second one to Gates.
    pub(super) fn split_heads(&mut self) {
        let (heads, each) = (self.dims.n_heads, self.dims.head_dim);
        for i in 0..self.n_tokens() * heads {
            let (from, to) = (2 * i * each, i * each);
            self.q[to..to + each].copy_from_slice(&self.mix[from..from + each]);
            self.gates[to..to + each].copy_from_slice(&self.mix[from + each..from + 2 * each]);
        }
    }

    /// Of each row of Mix, the parts of each key head to where those of all heads lie, and to Gates.
    pub(super) fn split_groups(&mut self) {
        let Some(r) = self.dims.recurrent else { return };
        let (keys, values) = (r.dim, r.n_values / r.n_keys * r.dim);
        let group = 2 * (keys + values);
        let (from, gates) = (r.n_keys * group, r.n_values * r.dim);
        for t in 0..self.n_tokens() {
            // Rows get narrower: those that follow are not overwritten.
            self.mix_row.clear();
            self.mix_row.extend_from_slice(&self.mix[t * from..(t + 1) * from]);
            let to = &mut self.mix[t * r.channels..(t + 1) * r.channels];
            let (queries, rest) = to.split_at_mut(r.n_keys * keys);
            let (to_keys, to_values) = rest.split_at_mut(r.n_keys * keys);
            let to_gates = &mut self.gates[t * gates..(t + 1) * gates];
            for (i, group) in self.mix_row.chunks_exact(group).enumerate() {
                let (q, rest) = group.split_at(keys);
                let (k, rest) = rest.split_at(keys);
                let (v, z) = rest.split_at(values);
                queries[i * keys..(i + 1) * keys].copy_from_slice(q);
                to_keys[i * keys..(i + 1) * keys].copy_from_slice(k);
                to_values[i * values..(i + 1) * values].copy_from_slice(v);
                to_gates[i * values..(i + 1) * values].copy_from_slice(z);
            }
        }
    }

    pub(super) fn gate_attn(&mut self) {
        let n = self.n_tokens() * self.dims.n_heads * self.dims.head_dim;
        self.attn[..n].iter_mut().zip(&self.gates[..n]).for_each(|(x, g)| *x *= sigmoid(*g));
    }

    pub(super) fn gate_out(&mut self) {
        let (d, first) = (self.dims.n_embd, self.first());
        for t in 0..self.n_tokens() {
            let gate = sigmoid(self.beta[t]);
            self.part[(first + t) * d..(first + t + 1) * d].iter_mut().for_each(|x| *x *= gate);
        }
    }

    /// Where a layer's part of a state begins.
    fn state_at(&self, state: u32, layer: usize) -> usize {
        let Some(r) = self.dims.recurrent else { return 0 };
        state as usize * r.floats() + layer * (r.inputs() + r.matrices())
    }

    /// Run `i` of the pass, if it is of the class at hand, with the places of a layer's state: read, and written.
    fn run_here(&self, i: usize, layer: usize) -> Option<(RunRows, usize, usize)> {
        let r = self.runs[i].clone();
        let (from, to) = (self.state_at(r.state, layer), self.state_at(r.state ^ 1, layer));
        (r.class == self.class).then_some((r, from, to))
    }

    pub(super) fn conv(&mut self, layer: usize, w: Weight, bias: Option<Weight>) {
        let width = self.dims.recurrent.map_or(0, |r| r.channels);
        let mix = Shared(self.mix.ptr());
        // SAFETY: Mix has these rows and channels; a channel is read and written by its task alone.
        let x = move |t: usize, c: usize| unsafe { &mut *mix.get().add(t * width + c) };
        let bias = Shared(bias.map_or(std::ptr::null_mut(), |w| w.addr as *mut f32));
        let bias = move |c: usize| match bias.get().is_null() {
            true => 0.0,
            // SAFETY: there is a bias for each channel, at any alignment, where there are any.
            false => unsafe { bias.get().add(c).read_unaligned() },
        };
        self.convolve(layer, w, &|t, c| *x(t, c), &|t, c, y| *x(t, c) = silu(y + bias(c)));
    }

    pub(super) fn short_conv(&mut self, layer: usize, w: Weight) {
        let width = self.dims.recurrent.map_or(0, |r| r.channels);
        let (mix, out) = (Shared(self.mix.ptr()), Shared(self.attn.ptr()));
        // SAFETY: a row of Mix has three parts of these channels, which nobody writes.
        let part = move |t: usize, part: usize, c: usize| unsafe { *mix.get().add((3 * t + part) * width + c) };
        // SAFETY: a row of Attn has room for the channels; each is written by its task alone.
        let put = move |t: usize, c: usize, y: f32| unsafe { *out.get().add(t * width + c) = y };
        self.convolve(layer, w, &|t, c| part(t, 0, c) * part(t, 2, c), &|t, c, y| put(t, c, part(t, 1, c) * y));
    }

    /// Convolves each channel of a layer with its last inputs: `output` gets what becomes of a row's `input`. A channel is
    /// one task's alone.
    fn convolve(
        &mut self,
        layer: usize,
        w: Weight,
        input: &(dyn Fn(usize, usize) -> f32 + Sync),
        output: &(dyn Fn(usize, usize, f32) + Sync),
    ) {
        let Some(sizes) = self.dims.recurrent else { return };
        let (width, taps) = (sizes.channels, sizes.taps);
        let (states, weights) = (Shared(self.states.ptr()), Shared(w.addr as *mut f32));
        for i in 0..self.runs.len() {
            let Some((run, from, to)) = self.run_here(i, layer) else { continue };
            self.pool.run(width.div_ceil(CHANNELS), &|_, task| {
                for c in task * CHANNELS..((task + 1) * CHANNELS).min(width) {
                    // SAFETY: this task alone has the channel in the state that is written; the state that is read and
                    // the weights are written by nobody. All have `width` channels.
                    unsafe {
                        let conv = Convolution {
                            rows: run.rows.clone(),
                            width,
                            taps,
                            weights: weights.get().add(c * taps),
                            old: if run.first { std::ptr::null() } else { states.get().add(from + c) },
                            new: states.get().add(to + c),
                        };
                        conv.run(|t| input(t, c), |t, y| output(t, c, y));
                    }
                }
            });
        }
    }

    pub(super) fn scan(&mut self, s: &Scan<Weight>) {
        let Some(sizes) = self.dims.recurrent else { return };
        let (heads, dim, n, inputs) = (sizes.n_values, sizes.dim, sizes.state, sizes.inputs());
        let (inner, width) = (heads * dim, sizes.channels);
        let isa = self.isa;
        let states = Shared(self.states.ptr());
        let (mix, gates, out) = (Shared(self.mix.ptr()), Shared(self.gates.ptr()), Shared(self.attn.ptr()));
        let rates = Shared(self.alpha.ptr());
        let vectors = [s.decay, s.bias, s.skip].map(|w| Shared(w.addr as *mut f32));
        let (groups, norm) = (s.groups, s.norm);
        for i in 0..self.runs.len() {
            let Some((run, from, to)) = self.run_here(i, s.state) else { continue };
            let (rows, first) = (run.rows.clone(), run.first);
            self.pool.run(heads, &|_, head| {
                let group = head * groups / heads;
                let at = inputs + head * dim * n;
                // SAFETY: this task alone has the head in the state that is written and in Attn; all else is read. Vectors have
                // an element for each head, at any alignment.
                unsafe {
                    let [decay, bias, skip] = vectors.map(|v| v.get().add(head).read_unaligned());
                    let step = Space {
                        dim,
                        n,
                        width,
                        x: head * dim,
                        b: inner + group * n,
                        c: inner + (groups + group) * n,
                        mix: mix.get(),
                        rows: rows.clone(),
                        old: if first { std::ptr::null() } else { states.get().add(from + at) },
                        state: states.get().add(to + at),
                        rates: rates.get().add(head),
                        heads,
                        decay,
                        bias,
                        skip,
                        gates: gates.get().add(head * dim),
                        out: out.get().add(head * dim),
                    };
                    dispatch(isa, step);
                }
            });
        }
        let each = inner / groups;
        let weights = norm.weight.map(|w| w.addr);
        let like = s.decay;
        self.pool.run(self.n_tokens() * groups, &|_, task| {
            let group = task % groups;
            let weight = weights.map(|addr| Weight { addr: addr + (4 * group * each) as u64, cols: each, ..like });
            // SAFETY: the groups of a row lie one behind the other, and their weights too; each is its task's alone.
            let x = unsafe { out.get().add(task / groups * inner + group * each) };
            dispatch(isa, Normed { x, out: x, width: each, norm: NormOf { weight, ..norm } });
        });
    }

    pub(super) fn delta_net(&mut self, net: &DeltaNet<Weight>) {
        let Some(sizes) = self.dims.recurrent else { return };
        let inputs = sizes.inputs();
        let (heads, dim) = (sizes.n_values, sizes.dim);
        let share = heads / sizes.n_keys;
        let (states, isa) = (Shared(self.states.ptr()), self.isa);
        let (mix, gates, out) = (Shared(self.mix.ptr()), Shared(self.gates.ptr()), Shared(self.attn.ptr()));
        let (beta, alpha) = (Shared(self.beta.ptr()), Shared(self.alpha.ptr()));
        let layer = net.state;
        let net = Shared(std::ptr::from_ref(net).cast_mut());
        for i in 0..self.runs.len() {
            let Some((run, from, to)) = self.run_here(i, layer) else { continue };
            let (rows, first) = (run.rows.clone(), run.first);
            self.pool.run(heads, &|_, head| {
                // SAFETY: the description outlives the job. This task alone has the head in the state that is written and
                // in Attn; all else is read.
                unsafe {
                    let net = &*net.get();
                    let at = inputs + head * dim * dim;
                    let key = if net.tiled { head % sizes.n_keys } else { head / share };
                    // Of a key head's numbers in Beta, those of its value heads come first, then their decays.
                    let grouped = key * 2 * share + head % share;
                    let (each, b, a) = match net.tiled {
                        true => (heads, beta.get().add(head), alpha.get().add(head)),
                        false => (2 * heads, beta.get().add(grouped), beta.get().add(grouped + share)),
                    };
                    let of = |w: Weight| (w.addr as *const f32).add(head).read_unaligned();
                    let step = Head {
                        dim,
                        width: sizes.channels,
                        query: key * dim,
                        key: (sizes.n_keys + key) * dim,
                        value: (2 * sizes.n_keys + head) * dim,
                        mix: mix.get(),
                        rows: rows.clone(),
                        old: if first { std::ptr::null() } else { states.get().add(from + at) },
                        state: states.get().add(to + at),
                        beta: b,
                        alpha: a,
                        each,
                        decay: of(net.decay),
                        bias: of(net.bias),
                        eps: net.norm.eps,
                        norm: net.norm.weight.map_or(std::ptr::null(), |w| w.addr as *const f32),
                        gates: gates.get().add(head * dim),
                        out: out.get().add(head * dim),
                        out_width: heads * dim,
                    };
                    dispatch(isa, step);
                }
            });
        }
    }
}

/// One channel of a convolution over the rows of a run.
struct Convolution {
    rows: std::ops::Range<usize>,
    width: usize,
    taps: usize,
    weights: *const f32,
    /// The last inputs before, `width` apart; null for zeros.
    old: *const f32,
    new: *mut f32,
}

impl Convolution {
    /// Gives `output` what becomes of each row, once its `input` has been asked for.
    ///
    /// # Safety
    /// The addresses are of `taps` weights and `taps - 1` inputs; `new` is written by nobody else.
    unsafe fn run(self, input: impl Fn(usize) -> f32, output: impl Fn(usize, f32)) {
        let Convolution { rows, width, taps, weights, old, new } = self;
        let before = taps - 1;
        // SAFETY: the caller's promise.
        unsafe {
            let mut window = [0.0f32; TAPS_MAX];
            for (i, w) in window[..before].iter_mut().enumerate() {
                *w = if old.is_null() { 0.0 } else { *old.add(i * width) };
            }
            for t in rows {
                window[before] = input(t);
                let mut sum = 0.0;
                for (i, w) in window[..taps].iter().enumerate() {
                    sum += w * weights.add(i).read_unaligned();
                }
                output(t, sum);
                window.copy_within(1..taps, 0);
            }
            for (i, w) in window[..before].iter().enumerate() {
                *new.add(i * width) = *w;
            }
        }
    }
}

/// One head of a state space over the rows of a run.
struct Space {
    /// Elements of the head, and numbers of the state for each.
    dim: usize,
    n: usize,
    /// Columns of Mix, and where the head's parts begin in a row.
    width: usize,
    x: usize,
    b: usize,
    c: usize,
    mix: *const f32,
    rows: std::ops::Range<usize>,
    /// The state before, `[element][number]`; null for zeros.
    old: *const f32,
    state: *mut f32,
    rates: *const f32,
    /// From one row of rates to the next; of Gates and Attn, times the elements.
    heads: usize,
    decay: f32,
    bias: f32,
    skip: f32,
    gates: *const f32,
    out: *mut f32,
}

impl Body for Space {
    #[inline(always)]
    fn run<D: Dot>(self) {
        let (dim, n) = (self.dim, self.n);
        // SAFETY: the caller gives addresses of rows and of a state that this task alone writes.
        let state = unsafe { std::slice::from_raw_parts_mut(self.state, dim * n) };
        if self.old.is_null() {
            state.fill(0.0);
        } else {
            // SAFETY: the other copy of the state is as long, and is not this one.
            state.copy_from_slice(unsafe { std::slice::from_raw_parts(self.old, dim * n) });
        }
        for t in self.rows.clone() {
            // SAFETY: Mix, Gates and Attn have these rows, Alpha an entry for each.
            let (x, b, c, gates, out, rate) = unsafe {
                let row = self.mix.add(t * self.width);
                let at = t * self.heads * dim;
                (
                    std::slice::from_raw_parts(row.add(self.x), dim),
                    std::slice::from_raw_parts(row.add(self.b), n),
                    std::slice::from_raw_parts(row.add(self.c), n),
                    std::slice::from_raw_parts(self.gates.add(at), dim),
                    std::slice::from_raw_parts_mut(self.out.add(at), dim),
                    *self.rates.add(t * self.heads),
                )
            };
            let rate = softplus(rate + self.bias);
            let keep = (rate * self.decay).exp();
            for (((s, x), gate), out) in state.chunks_exact_mut(n).zip(x).zip(gates).zip(out) {
                let new = rate * x;
                s.iter_mut().zip(b).for_each(|(s, b)| *s = D::fma(new, *b, *s * keep));
                *out = (dot_f32::<D>(s, c) + self.skip * x) * silu(*gate);
            }
        }
    }
}

/// One value head of a delta net over the rows of a run.
struct Head {
    dim: usize,
    /// Columns of Mix, and where the head's parts begin in a row.
    width: usize,
    query: usize,
    key: usize,
    value: usize,
    mix: *const f32,
    rows: std::ops::Range<usize>,
    /// The state before, `[key][value]`; null for zeros.
    old: *const f32,
    state: *mut f32,
    beta: *const f32,
    alpha: *const f32,
    /// From one row to the next, of both.
    each: usize,
    decay: f32,
    bias: f32,
    eps: f32,
    norm: *const f32,
    gates: *const f32,
    out: *mut f32,
    /// Columns of Gates and Attn.
    out_width: usize,
}

impl Body for Head {
    #[inline(always)]
    fn run<D: Dot>(self) {
        let dim = self.dim;
        // SAFETY: the caller gives addresses of rows and of a state that this task alone writes.
        let state = unsafe { std::slice::from_raw_parts_mut(self.state, dim * dim) };
        if self.old.is_null() {
            state.fill(0.0);
        } else {
            // SAFETY: the other copy of the state is as long, and is not this one.
            state.copy_from_slice(unsafe { std::slice::from_raw_parts(self.old, dim * dim) });
        }
        let unit = |x: &[f32]| 1.0 / (dot_f32::<D>(x, x) + self.eps).sqrt();
        let mut delta = [0.0f32; DELTA_DIM_MAX];
        let delta = &mut delta[..dim];
        for t in self.rows.clone() {
            // SAFETY: Mix, Gates and Attn have these rows, Beta and Alpha an entry for each.
            let (q, k, v, gates, out, beta, alpha) = unsafe {
                let row = self.mix.add(t * self.width);
                let part = |at: usize| std::slice::from_raw_parts(row.add(at), dim);
                let at = t * self.out_width;
                (
                    part(self.query),
                    part(self.key),
                    part(self.value),
                    std::slice::from_raw_parts(self.gates.add(at), dim),
                    std::slice::from_raw_parts_mut(self.out.add(at), dim),
                    *self.beta.add(t * self.each),
                    *self.alpha.add(t * self.each),
                )
            };
            let (q_unit, k_unit) = (unit(q), unit(k));
            let rate = softplus(alpha + self.bias);
            let keep = (self.decay * rate).exp();
            delta.fill(0.0);
            for (row, k) in state.chunks_exact_mut(dim).zip(k) {
                let k = k * k_unit;
                for (s, d) in row.iter_mut().zip(delta.iter_mut()) {
                    *s *= keep;
                    *d = D::fma(*s, k, *d);
                }
            }
            let beta = sigmoid(beta);
            delta.iter_mut().zip(v).for_each(|(d, v)| *d = beta * (v - *d));
            out.fill(0.0);
            for ((row, k), q) in state.chunks_exact_mut(dim).zip(k).zip(q) {
                let (k, q) = (k * k_unit, q * q_unit);
                for ((s, d), o) in row.iter_mut().zip(delta.iter()).zip(out.iter_mut()) {
                    *s = D::fma(k, *d, *s);
                    *o = D::fma(*s, q, *o);
                }
            }
            let root = 1.0 / (dim as f32).sqrt();
            out.iter_mut().for_each(|o| *o *= root);
            let scale = norm_scale(dot_f32::<D>(out, out) / dim as f32, self.eps);
            for (i, (o, g)) in out.iter_mut().zip(gates).enumerate() {
                // SAFETY: the norm has `dim` weights, at any alignment.
                let w = if self.norm.is_null() { 1.0 } else { unsafe { self.norm.add(i).read_unaligned() } };
                *o *= scale * w * silu(*g);
            }
        }
    }
}
