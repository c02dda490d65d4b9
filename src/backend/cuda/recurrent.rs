//! Recurrences: convolutions, delta nets and state spaces. A pass reads one copy of a state and writes the other.

use super::CudaBackend;
use super::args::{BiasedConvArgs, ConvArgs, DeltaArgs, GroupsArgs, PartNormArgs, ScanArgs, States};
use super::driver::device_error;
use super::modules::{DELTA_DIMS, SCAN_STATES, TAPS_MAX};
use super::workspace::float_bytes;
use crate::backend::{Act, BackendError, Class, DeltaNet, Recurrent, Scan, Weight};

type Result<T = ()> = std::result::Result<T, BackendError>;

/// Elements of a head that a warp of `scan_*` has.
const SCAN_ELEMENTS: usize = 4;
/// Columns of a state that a block of `delta_columns_*` has: `COLUMNS` of `delta.cu`.
const DELTA_COLUMNS: usize = 32;

impl CudaBackend {
    pub(super) fn copy_state(&self, from: u32, to: u32) -> Result {
        let bytes = self.dims.recurrent.map_or(0, |r| 4 * r.floats() as u64);
        let at = |state: u32| self.engine.ws.acts.states.addr() + u64::from(state) * bytes;
        self.engine.ws.rooms.check("a recurrent state", at(from), bytes)?;
        self.engine.ws.rooms.check("a recurrent state", at(to), bytes)?;
        // SAFETY: both copies lie in the buffer, as checked above, and are not the same one, since nobody reads `to` yet.
        unsafe { self.engine.stream.copy(at(from), at(to), bytes as usize) }
    }

    /// The states as kernels of a layer see them, `inner` floats behind the beginning of its part.
    fn states(&self, sizes: &Recurrent, layer: usize, inner: usize) -> States {
        let ws = &self.engine.ws;
        States {
            all: ws.acts.states.addr(),
            pass: ws.pass.addr(),
            state: self.state_word(),
            floats: sizes.floats() as i32,
            offset: (layer * (sizes.inputs() + sizes.matrices()) + inner) as i32,
        }
    }

    /// A convolution; of Mix in place with its bias, if there is one, or a short one of its parts.
    pub(super) fn convolve(&mut self, layer: usize, w: Weight, bias: Option<Weight>, short: bool) -> Result {
        let sizes = self.dims.recurrent.ok_or_else(no_state)?;
        let (mix, out) = (self.act(Act::Mix).0, self.act(Act::Attn).0);
        let (channels, rooms) = (sizes.channels, &self.engine.ws.rooms);
        let written = if short { out } else { mix };
        rooms.check("a convolution", written, float_bytes(self.tokens, channels))?;
        let a = ConvArgs {
            states: self.states(&sizes, layer, 0),
            mix,
            out,
            w: w.addr,
            rows: self.tokens as i32,
            channels: channels as i32,
            taps: sizes.taps as i32,
        };
        let acts = &self.engine.kernels.acts;
        let grid = (channels.div_ceil(128) as u32, 1, 1);
        if let Some(bias) = bias {
            let a = BiasedConvArgs { of: a, bias: bias.addr };
            // SAFETY: as below, and there is a bias for each channel.
            return unsafe { self.engine.launch(acts.conv_biased, grid, 128, 0, &a) };
        }
        let f = if short { acts.short_conv } else { acts.conv };
        // SAFETY: ConvArgs is what the kernels declare; `refuses` has checked the number of inputs, `begin` the state's
        // number, and the room for results is checked above.
        unsafe { self.engine.launch(f, grid, 128, 0, &a) }
    }

    pub(super) fn delta_net(&mut self, net: &DeltaNet<Weight>) -> Result {
        let sizes = self.dims.recurrent.ok_or_else(no_state)?;
        let (dim, heads) = (sizes.dim, sizes.n_values);
        let kernel = DELTA_DIMS.iter().position(|d| *d == dim).ok_or_else(no_state)?;
        let (beta, alpha, out) = (self.act(Act::Beta).0, self.act(Act::Alpha).0, self.act(Act::Attn).0);
        self.engine.ws.rooms.check("a delta net", out, float_bytes(self.tokens, heads * dim))?;
        let a = DeltaArgs {
            states: self.states(&sizes, net.state, sizes.inputs()),
            mix: self.act(Act::Mix).0,
            beta,
            alpha: if net.tiled { alpha } else { beta },
            gates: self.act(Act::Gates).0,
            out,
            decay: net.decay.addr,
            bias: net.bias.addr,
            norm: net.norm.weight.map_or(0, |w| w.addr),
            rows: self.tokens as i32,
            channels: sizes.channels as i32,
            n_keys: sizes.n_keys as i32,
            n_values: heads as i32,
            each: if net.tiled { heads } else { 2 * heads } as i32,
            tiled: i32::from(net.tiled),
            eps: net.norm.eps,
            dim: dim as i32,
        };
        let acts = &self.engine.kernels.acts;
        if self.engine.class == Class::Exact {
            // SAFETY: DeltaArgs is what delta_* declare; `begin` has checked the state's number, and the room for results is
            // checked above.
            return unsafe { self.engine.launch(acts.delta[kernel], (heads as u32, 1, 1), 4 * dim as u32, 0, &a) };
        }
        let rooms = &self.engine.ws.rooms;
        rooms.check("queries and keys of a delta net", a.mix, float_bytes(self.tokens, sizes.channels))?;
        for numbers in [a.beta, a.alpha] {
            rooms.check("numbers of a delta net", numbers, float_bytes(self.tokens, a.each as usize))?;
        }
        let of_rows = self.tokens * (2 * sizes.n_keys + heads.div_ceil(32));
        let blocks = |warps: usize| (warps.div_ceil(8) as u32, 1, 1);
        let slices = (heads * (dim / DELTA_COLUMNS)) as u32;
        // SAFETY: as above; the rows of Mix, Beta and Alpha that are written are there, as just checked.
        unsafe {
            self.engine.launch(acts.delta_rows, blocks(of_rows), 256, 0, &a)?;
            self.engine.launch(acts.delta_columns[kernel], (slices, 1, 1), 4 * DELTA_COLUMNS as u32, 0, &a)?;
            self.engine.launch(acts.delta_norm, blocks(self.tokens * heads), 256, 0, &a)
        }
    }

    /// A state space, and the norm of each group.
    pub(super) fn scan(&mut self, s: &Scan<Weight>) -> Result {
        let sizes = self.dims.recurrent.ok_or_else(no_state)?;
        let (heads, dim, n, groups) = (sizes.n_values, sizes.dim, sizes.state, s.groups);
        let kernel = scan_of(n).ok_or_else(no_state)?;
        let (out, inner) = (self.act(Act::Attn).0, heads * dim);
        self.engine.ws.rooms.check("a state space", out, float_bytes(self.tokens, inner))?;
        let a = ScanArgs {
            states: self.states(&sizes, s.state, sizes.inputs()),
            mix: self.act(Act::Mix).0,
            rates: self.act(Act::Alpha).0,
            gates: self.act(Act::Gates).0,
            out,
            decay: s.decay.addr,
            bias: s.bias.addr,
            skip: s.skip.addr,
            rows: self.tokens as i32,
            channels: sizes.channels as i32,
            heads: heads as i32,
            groups: groups as i32,
            dim: dim as i32,
            n: n as i32,
        };
        let acts = &self.engine.kernels.acts;
        let warps = heads * dim.div_ceil(SCAN_ELEMENTS);
        // SAFETY: ScanArgs is what scan_* declare; `begin` has checked the state's number, and the room for results is checked
        // above.
        unsafe { self.engine.launch(acts.scan[kernel], (warps.div_ceil(4) as u32, 1, 1), 128, 0, &a)? };
        let (w, eps) = (s.norm.weight.map_or(0, |w| w.addr), s.norm.eps);
        let a = PartNormArgs { x: out, w, n: (inner / groups) as i32, parts: groups as i32, eps };
        // SAFETY: PartNormArgs is what part_norm declares; the rows are those that were written above.
        unsafe { self.engine.launch(acts.part_norm, ((self.tokens * groups) as u32, 1, 1), 256, 0, &a) }
    }

    /// Of each row of Mix, the parts of each key head to where those of all heads lie, and to Gates.
    pub(super) fn split_groups(&mut self) -> Result {
        let r = self.dims.recurrent.filter(|r| !r.scans && r.n_keys > 0).ok_or_else(no_state)?;
        let (keys, values) = (r.dim, r.n_values / r.n_keys * r.dim);
        let (from, to) = (2 * r.n_keys * (keys + values), r.channels);
        let (mix, gates) = (self.act(Act::Mix).0, self.act(Act::Gates).0);
        let scratch = &self.engine.ws.scratch;
        let fit = (scratch.bytes() / float_bytes(1, from)) as usize;
        let (copy, split) = (self.engine.kernels.acts.copy, self.engine.kernels.acts.split_groups);
        // Rows get narrower: those that follow are not overwritten.
        for first in (0..self.tokens).step_by(fit.max(1)) {
            let rows = fit.min(self.tokens - first);
            self.each_of(copy, scratch.addr(), mix + float_bytes(first, from), (rows, from), 0)?;
            let a = GroupsArgs {
                mix: mix + float_bytes(first, to),
                gates: gates + float_bytes(first, r.n_values * r.dim),
                from: scratch.addr(),
                rows: rows as i32,
                n_keys: r.n_keys as i32,
                keys: keys as i32,
                values: values as i32,
            };
            let rooms = &self.engine.ws.rooms;
            rooms.check("parts of a delta net", a.mix, float_bytes(rows, to))?;
            rooms.check("gates of a delta net", a.gates, float_bytes(rows, r.n_values * r.dim))?;
            let blocks = (rows * from).div_ceil(256) as u32;
            // SAFETY: GroupsArgs is what split_groups declares; there is room for the rows, as checked above.
            unsafe { self.engine.launch(split, (blocks, 1, 1), 256, 0, &a)? };
        }
        Ok(())
    }
}

fn no_state() -> BackendError {
    device_error("the model has no such recurrence")
}

/// What of a model's recurrences has no kernel.
pub(super) fn refuses(r: &Recurrent) -> Option<&'static str> {
    if r.taps > TAPS_MAX {
        return Some("convolutions of more than 8 inputs");
    }
    match (r.scans, r.n_values) {
        (_, 0) => None,
        (true, _) => scan_of(r.state).is_none().then_some("state spaces of more than 256 numbers for an element"),
        (false, _) => (!DELTA_DIMS.contains(&r.dim))
            .then_some("delta nets with heads of other sizes than 32, 64 and 128 elements"),
    }
}

/// The kernel of state spaces with so many numbers for an element.
fn scan_of(state: usize) -> Option<usize> {
    SCAN_STATES.iter().position(|most| state <= *most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recurrences_without_kernels_are_refused_by_name() {
        let sizes = Recurrent {
            layers: 1,
            sequences: 1,
            taps: 4,
            channels: 512,
            n_keys: 1,
            n_values: 2,
            dim: 128,
            state: 128,
            scans: false,
        };
        assert_eq!(refuses(&sizes), None);
        assert!(refuses(&Recurrent { dim: 48, ..sizes }).is_some_and(|what| what.contains("delta nets")));
        assert!(refuses(&Recurrent { taps: 9, ..sizes }).is_some_and(|what| what.contains("convolutions")));
        let scans = Recurrent { dim: 48, scans: true, ..sizes };
        assert_eq!(refuses(&scans), None);
        assert!(refuses(&Recurrent { state: 257, ..scans }).is_some_and(|what| what.contains("state spaces")));
    }
}
