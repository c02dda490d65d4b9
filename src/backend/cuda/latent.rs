//! Keys and values of latent vectors: what `backend/cpu/latent.rs` does. The matrices that each head has are multiplied by the
//! kernels that experts have: a head stands for an expert, which every row chose.

use super::args::{GroupedArgs, LatentArgs, OfHeadsArgs, STORE};
use super::driver::device_error;
use super::moe::{TILES, tile_bytes};
use super::product::{Inputs, Prep, Rows, THIN_ROWS, Target, any_index, plain_index, unsupported};
use super::workspace::{float_bytes, head_lists, pitch};
use super::{CudaBackend, modules};
use crate::backend::{Act, BackendError, Latent, RopeKind, Weight};

type Result<T = ()> = std::result::Result<T, BackendError>;

impl CudaBackend {
    /// Q, K and V of the rows at hand.
    pub(super) fn latent(&mut self, l: &Latent<Weight>) -> Result {
        let (d, ws, shape) = (&self.dims, &self.engine.ws, self.shape);
        let rope = d.ropes.get(l.rope).ok_or_else(|| device_error("a rotary embedding that is not there"))?;
        let (heads, dim, rot, value) = (d.n_heads, shape.dim, 2 * rope.freqs.len(), d.value_of_latent);
        let expanded = l.absorbed.is_none();
        let (q, k, v) = (ws.q.addr(), ws.k.addr(), ws.v.addr());
        // What does not rotate waits where attention's output will be.
        let still = if expanded { 0 } else { ws.attn.addr() };
        let fits = if expanded { dim == l.nope + rot && value <= dim } else { dim == l.rank + rot };
        if !fits {
            return Err(device_error(format!("heads of {dim} elements are no latent vectors of {} and {rot}", l.rank)));
        }
        ws.rooms.check("queries of latent vectors", q, float_bytes(self.tokens * heads, dim))?;
        ws.rooms.check("keys of latent vectors", k, float_bytes(self.tokens * shape.heads, dim))?;
        ws.rooms.check("queries of latent vectors", still, float_bytes(self.tokens * heads, l.nope))?;
        if expanded {
            ws.rooms.check("values of latent vectors", v, float_bytes(self.tokens * shape.heads, dim))?;
        }
        let a = LatentArgs {
            mix: self.act(Act::Mix).0,
            up: self.act(Act::Up).0,
            turning: self.act(Act::Hidden).0,
            gates: if expanded { self.act(Act::Gates).0 } else { 0 },
            q,
            k,
            v,
            still,
            freqs: self.freqs_before(l.rope),
            pass: ws.pass.addr(),
            rows: self.tokens as i32,
            heads: heads as i32,
            dim: dim as i32,
            rank: l.rank as i32,
            nope: l.nope as i32,
            rot: rot as i32,
            value: value as i32,
            neox: i32::from(rope.kind == RopeKind::Neox),
            magnitude: rope.magnitude,
        };
        let warps = self.tokens * (heads + usize::from(!expanded));
        let f = self.engine.kernels.acts.latent;
        // SAFETY: LatentArgs is what latent declares; there is room for the rows, as checked above.
        unsafe { self.engine.launch(f, (warps.div_ceil(4) as u32, 1, 1), 128, 0, &a)? };
        self.waiting.written(Act::Attn);
        match l.absorbed {
            Some(w) => self.by_head(w, still, q, dim),
            None => Ok(()),
        }
    }

    /// Mix = the values that attention has mixed, `width` of each head.
    pub(super) fn of_latent(&mut self, width: usize, w: Option<Weight>) -> Result {
        let (attn, mix) = (self.act(Act::Attn).0, self.act(Act::Mix).0);
        if let Some(w) = w {
            return self.by_head(w, attn, mix, width);
        }
        let rows = self.tokens * self.dims.n_heads;
        self.each_of(self.engine.kernels.acts.part, mix, attn, (rows, width), self.shape.value_dim())
    }

    /// Products of each head's rows at `x`, which lie back to back, with its part of the rows of `w`: to `out`, whose rows are
    /// `stride` floats apart.
    fn by_head(&mut self, w: Weight, x: u64, out: u64, stride: usize) -> Result {
        let (heads, tokens) = (self.dims.n_heads, self.tokens);
        let (rows, cols) = (w.rows / heads, w.cols);
        let kind = any_index(w.ty).ok_or_else(|| unsupported(w.ty))?;
        let bytes = (rows * w.ty.row_bytes(cols).ok_or_else(|| unsupported(w.ty))?) as u64;
        let size = TILES.iter().position(|(each, _)| tokens * 4 <= each * 3).unwrap_or(TILES.len() - 1);
        let shared = self.engine.device.info.shared_bytes as usize;
        let fits = |size: &usize| tile_bytes(w.ty, *size) + modules::grid_bytes(w.ty) <= shared;
        let size = (0..=size).rev().find(fits).unwrap_or(0);
        let each = TILES[size].0;
        let lists = self.engine.ws.acts.lists.addr();
        let [tables, tiles, list] = head_lists(&self.dims).map(|words| 4 * words as u64);
        let (tiles_at, list_at) = (lists + tables, lists + tables + tiles);
        let tiles_here = heads * tokens.div_ceil(each);
        let rooms = &self.engine.ws.rooms;
        rooms.check("products of heads", out, float_bytes(tokens * heads - 1, stride) + float_bytes(1, rows))?;
        rooms.check("tiles of heads", tiles_at, 12 * tiles_here as u64)?;
        rooms.check("rows of heads", list_at, float_bytes(heads, tokens))?;
        if 12 * tiles_here as u64 > tiles || float_bytes(heads, tokens) > list {
            return Err(device_error("heads of latent vectors whose lists have no room"));
        }
        let a = OfHeadsArgs {
            table: lists,
            tiles: tiles_at,
            list: list_at,
            w: w.addr,
            bytes,
            heads: heads as i32,
            rows: tokens as i32,
            each: each as i32,
        };
        let f = self.engine.kernels.acts.of_heads;
        // SAFETY: OfHeadsArgs is what of_heads declares; the lists have room, as checked above.
        unsafe { self.engine.launch(f, (heads as u32, 1, 1), 128, 0, &a)? };
        if let (Some(_), false) = (plain_index(w.ty), cols.is_multiple_of(32) && w.addr.is_multiple_of(16)) {
            return self.by_each_head((w, bytes), x, (out, stride), list_at);
        }
        let halves = Inputs { h: self.engine.ws.halves.addr(), ..Inputs::default() };
        self.engine.prepare(Prep::Copy, x, 0, cols, tokens * heads, halves)?;
        self.waiting.forget_forms();
        let a = GroupedArgs {
            table: lists,
            tiles: tiles_at,
            x: halves.h,
            scale: self.engine.ws.halves_scale.addr(),
            from: list_at,
            to: list_at,
            out: [out, 0],
            rows: rows as i32,
            cols: cols as i32,
            pitch: pitch(cols) as i32,
            stride: stride as i32,
            first: 0,
        };
        let grid = (tiles_here as u32, rows.div_ceil(THIN_ROWS) as u32, 1);
        let f = self.engine.kernels.experts.grouped[kind][size];
        // SAFETY: GroupedArgs is what grouped_* declare; tiles name rows and heads that there are, matrices of these types are read
        // where they lie, and there is room for the results, as checked above.
        unsafe { self.engine.launch(f, grid, 512, tile_bytes(w.ty, size), &a) }
    }

    /// The same head by head, of weights that are not quantised and of a number of columns that those kernels do not take.
    fn by_each_head(&mut self, (w, bytes): (Weight, u64), x: u64, (out, stride): (u64, usize), list: u64) -> Result {
        let (heads, tokens) = (self.dims.n_heads, self.tokens);
        for head in 0..heads as u64 {
            let weight = Weight { addr: w.addr + head * bytes, rows: w.rows / heads, ..w };
            let target = Target { weight, bias: 0, out, stride };
            let of_head = list + head * float_bytes(1, tokens);
            self.engine.plain(&target, tokens, STORE, x, Rows { from: of_head, to: of_head })?;
        }
        Ok(())
    }
}
