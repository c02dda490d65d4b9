//! A model whose matrices are made smaller when they are loaded: which become what, and the model that comes of it.
//!
//! A matrix is requantised where its type has more bits an element than the one that is wanted. Routers, vectors, and
//! the embedding stay as they are; an embedding that is the head too is requantised with it. What stays on storage is
//! read as the file has it, so the model depends on where its units live ([`Requantised::at`]).

use super::program::{Model, Role, TensorRef};
use crate::gguf::TensorType;

/// Why a model cannot be requantised.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequantError {
    /// Every matrix has fewer bits than the type.
    #[error("--requant {to} would make matrices larger: the model's largest are {largest}; leave --requant away")]
    Raises {
        /// The type that was asked for.
        to: TensorType,
        /// The model's type with most bits.
        largest: TensorType,
    },
    /// Of no matrix are rows a whole number of the type's blocks, nor of those of the type in its place.
    #[error("--requant {to}: {unit} has a matrix of {cols} columns, which blocks of {} do not divide; no smaller type takes such a model", .to.block_elems())]
    Blocks {
        /// The type that was asked for.
        to: TensorType,
        /// The unit.
        unit: String,
        /// Columns of its matrix.
        cols: usize,
    },
}

/// The type that matrices get whose rows are no whole number of `to`'s blocks: as llama.cpp chooses, the next larger one with
/// blocks of 32.
fn in_place_of(to: TensorType) -> TensorType {
    match to {
        TensorType::Q4_K => TensorType::Q5_0,
        TensorType::Q5_K => TensorType::Q5_1,
        TensorType::Q6_K => TensorType::Q8_0,
        to => to,
    }
}

/// Bits an element.
fn bits(ty: TensorType) -> f64 {
    8.0 * ty.block_bytes() as f64 / ty.block_elems() as f64
}

/// What becomes of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Its type in the file.
    pub from: TensorType,
    /// The type that it gets.
    pub to: TensorType,
    /// Elements of a row.
    pub cols: usize,
}

/// Matrices of one type that were requantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turned {
    /// Their type in the file.
    pub from: TensorType,
    /// The type that they got.
    pub to: TensorType,
    /// How many: an expert's count one by one, slices of the head too.
    pub matrices: usize,
    /// Their bytes in the file.
    pub before: u64,
    /// Their bytes now.
    pub after: u64,
}

/// A model, and the same with smaller matrices.
#[derive(Clone, Debug)]
pub struct Requantised {
    /// The type that larger ones get.
    pub ty: TensorType,
    file: Model,
    small: Model,
    /// By unit and span.
    turns: Vec<Vec<Option<Turn>>>,
}

impl Requantised {
    /// The model with all its larger matrices as `ty`, or, where its blocks do not divide their rows, as the next larger type
    /// whose blocks do.
    ///
    /// # Errors
    /// If all are smaller than that already, or blocks divide no matrix's rows.
    pub fn new(model: &Model, ty: TensorType) -> Result<Requantised, RequantError> {
        let mut turns: Vec<Vec<Option<Turn>>> = model.units.iter().map(|u| vec![None; u.spans.len()]).collect();
        let mut largest: Option<TensorType> = None;
        let (mut some, mut unfit) = (false, None);
        for (role, _, t) in model.matrices() {
            if role == Role::Router || t.rows == 1 && role != Role::Head {
                continue;
            }
            if largest.is_none_or(|l| bits(t.ty) > bits(l)) {
                largest = Some(t.ty);
            }
            let to = if ty.row_bytes(t.cols).is_some() { ty } else { in_place_of(ty) };
            if bits(t.ty) <= bits(to) {
                continue;
            }
            if to.row_bytes(t.cols).is_none() {
                unfit.get_or_insert((t.unit, t.cols));
                continue;
            }
            some = true;
            turns[t.unit][t.span] = Some(Turn { from: t.ty, to, cols: t.cols });
        }
        if let Some((unit, cols)) = unfit.filter(|_| !some) {
            return Err(RequantError::Blocks { to: ty, unit: model.units[unit].name.clone(), cols });
        }
        if let Some(largest) = largest.filter(|l| bits(*l) < bits(ty)) {
            return Err(RequantError::Raises { to: ty, largest });
        }
        let mut small = model.clone();
        for (unit, turns) in small.units.iter_mut().zip(&turns) {
            for (span, turn) in unit.spans.iter_mut().zip(turns) {
                span.bytes = turn.map_or(span.bytes, |t| t.bytes(span.bytes));
            }
        }
        small.for_each_matrix(&mut |t| t.ty = turns[t.unit][t.span].map_or(t.ty, |turn| turn.to));
        if model.tied
            && let Some(head) = small.head.first().filter(|h| h.weight.ty != model.embedding.ty)
        {
            let turn = Turn { from: model.embedding.ty, to: head.weight.ty, cols: model.hparams.n_embd };
            small.embedding.bytes = turn.bytes(model.embedding.bytes);
            small.embedding.ty = turn.to;
        }
        Ok(Requantised { ty, file: model.clone(), small, turns })
    }

    /// As the file has it.
    pub fn file(&self) -> &Model {
        &self.file
    }

    /// All of it requantised.
    pub fn whole(&self) -> &Model {
        &self.small
    }

    /// Requantised, but for the units that stay as the file has them.
    pub fn at(&self, stays: impl Fn(usize) -> bool) -> Model {
        let mut model = self.small.clone();
        let units = model.units.iter_mut().zip(&self.file.units).enumerate();
        units.filter(|(u, _)| stays(*u)).for_each(|(_, (unit, file))| unit.spans.clone_from(&file.spans));
        let as_in_file = |t: &mut TensorRef| {
            if let Some(turn) = self.turns[t.unit][t.span].filter(|_| stays(t.unit)) {
                t.ty = turn.from;
            }
        };
        model.for_each_matrix(&mut |t| as_in_file(t));
        model
    }

    /// What becomes of the embedding's rows, where that is the head too.
    pub fn embedding(&self) -> Option<Turn> {
        let (from, to) = (self.file.embedding.ty, self.small.embedding.ty);
        (from != to).then_some(Turn { from, to, cols: self.file.hparams.n_embd })
    }

    /// What becomes of each span of a unit; `None` for those that stay.
    pub fn turns(&self, unit: usize) -> &[Option<Turn>] {
        &self.turns[unit]
    }

    /// Whether a unit has a matrix that is requantised.
    pub fn changes(&self, unit: usize) -> bool {
        self.turns[unit].iter().any(Option::is_some)
    }

    /// Which types became what, of the units that do not stay as the file has them, largest bytes first; and the number and
    /// bytes of the units that do stay though they have larger matrices.
    pub fn summary(&self, stays: impl Fn(usize) -> bool) -> (Vec<Turned>, (usize, u64)) {
        let (mut all, mut left): (Vec<Turned>, _) = (Vec::new(), (0, 0));
        for u in (0..self.turns.len()).filter(|u| self.changes(*u)) {
            if stays(u) {
                left = (left.0 + 1, left.1 + self.file.units[u].bytes());
                continue;
            }
            let spans = self.file.units[u].spans.iter().zip(&self.small.units[u].spans).zip(&self.turns[u]);
            for ((file, small), turn) in spans {
                let Some(turn) = turn else { continue };
                let i = all.iter().position(|t| (t.from, t.to) == (turn.from, turn.to)).unwrap_or_else(|| {
                    all.push(Turned { from: turn.from, to: turn.to, matrices: 0, before: 0, after: 0 });
                    all.len() - 1
                });
                let t = &mut all[i];
                (t.matrices, t.before, t.after) = (t.matrices + 1, t.before + file.bytes, t.after + small.bytes);
            }
        }
        all.sort_by_key(|t| std::cmp::Reverse(t.before));
        (all, left)
    }
}

impl Turn {
    /// Bytes of as many rows as take `bytes` in the file.
    pub fn bytes(&self, bytes: u64) -> u64 {
        let row = |ty: TensorType| ty.row_bytes(self.cols).unwrap_or(0) as u64;
        bytes / row(self.from).max(1) * row(self.to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_rows() {
        let t = Turn { from: TensorType::Q6_K, to: TensorType::Q4_K, cols: 512 };
        assert_eq!(t.bytes(7 * 420), 7 * 288);
    }
}
