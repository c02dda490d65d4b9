//! Every kernel on every instruction set of this machine against the plain reference.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::isa::Isa;
use super::kernel::{Activation, Job, Paired, Quantise, Rows, Then, dispatch, panel_scratch};
use super::panel::Panel;
use super::unpack::{PACKET, SUBS};
#[cfg(target_arch = "x86_64")]
use super::x86::amx;
use crate::backend::{Class, EXACT_ROWS, reference};
use crate::gguf::TensorType;

/// Error of a product of quantised activations, relative to its terms.
const QUANTISED_BOUND: f64 = 1.2e-2;
/// The same where what rounding left counts.
const FINE_BOUND: f64 = 6e-5;
/// The same where activations stay in single precision.
const FLOAT_BOUND: f64 = 2e-6;

/// Checks every type, set and a few shapes; prints a line a type and set.
pub fn selftest(out: &mut dyn FnMut(&str)) -> Result<(), String> {
    let mut failed = 0;
    for isa in Isa::ALL.into_iter().filter(|&i| i <= Isa::detect()) {
        for ty in reference::TYPES {
            let bounds: &[(bool, f64)] = match ty.block_elems() {
                1 => &[(false, FLOAT_BOUND)],
                _ => &[(false, QUANTISED_BOUND), (true, FINE_BOUND)],
            };
            for &(fine, bound) in bounds {
                let mut worst = 0.0f64;
                for (rows, blocks, tokens) in
                    [(1, 1, 1), (3, 5, 1), (2, 19, 1), (5, 3, 2), (33, 9, 3), (20, 2, 15), (7, 2, 17)]
                {
                    let cols = blocks * ty.block_elems().max(32);
                    worst = worst.max(product_error(isa, ty, (rows, cols), tokens, Class::Bulk, fine));
                    if tokens <= EXACT_ROWS {
                        worst = worst.max(product_error(isa, ty, (rows, cols), tokens, Class::Exact, fine));
                    }
                }
                let ok = worst <= bound;
                failed += usize::from(!ok);
                out(&format!(
                    "{} {:7} {:8}{} error {worst:.1e}, bound {bound:.0e}",
                    if ok { "ok  " } else { "FAIL" },
                    isa.name(),
                    ty,
                    if fine { " fine" } else { "" }
                ));
            }
        }
    }
    if failed > 0 { Err(format!("{failed} kernels are out of their bounds")) } else { Ok(()) }
}

/// Random blocks with scales of a sane size: all bytes random but for the half-precision fields.
fn random_rows(rng: &mut ChaCha8Rng, ty: TensorType, rows: usize, cols: usize) -> Vec<u8> {
    if ty.block_elems() == 1 {
        let values = (0..rows * cols).map(|_| rng.random_range(-1.0f32..1.0));
        return values
            .flat_map(|v| match ty {
                TensorType::F32 => v.to_le_bytes().to_vec(),
                TensorType::F16 => half::f16::from_f32(v).to_le_bytes().to_vec(),
                _ => half::bf16::from_f32(v).to_le_bytes().to_vec(),
            })
            .collect();
    }
    let fields: &[usize] = match ty {
        TensorType::Q4_1 | TensorType::Q5_1 | TensorType::Q4_K | TensorType::Q5_K => &[0, 2],
        TensorType::Q2_K => &[80, 82],
        TensorType::Q3_K => &[108],
        TensorType::Q6_K => &[208],
        _ => &[0],
    };
    let mut bytes = vec![0u8; rows * ty.row_bytes(cols).unwrap_or(0)];
    rng.fill(&mut bytes[..]);
    for block in bytes.chunks_exact_mut(ty.block_bytes()) {
        if ty == TensorType::MXFP4 {
            block[0] = rng.random_range(120..130);
            continue;
        }
        if ty == TensorType::IQ1_M {
            // The highest nibble of its scale, the others being random: from 2^-7 to 2^-3.
            block[55] = block[55] & 15 | 0x20;
            continue;
        }
        for &at in fields {
            block[at..at + 2].copy_from_slice(&half::f16::from_f32(rng.random_range(0.01f32..0.1)).to_le_bytes());
        }
    }
    bytes
}

/// A matrix and activations, both random.
struct Case {
    ty: TensorType,
    rows: usize,
    cols: usize,
    fine: bool,
    weights: Vec<u8>,
    x: Vec<f32>,
}

impl Case {
    fn new(ty: TensorType, rows: usize, cols: usize, tokens: usize, fine: bool) -> Case {
        let mut rng = ChaCha8Rng::seed_from_u64((rows * 31 + cols * 7 + tokens) as u64);
        let weights = random_rows(&mut rng, ty, rows, cols);
        let x = (0..tokens * cols).map(|_| rng.random_range(-2.0f32..2.0)).collect();
        Case { ty, rows, cols, fine, weights, x }
    }

    /// Products of all rows with tokens `which`: `[token][row]`.
    fn products(&self, isa: Isa, class: Class, which: std::ops::Range<usize>) -> Vec<f32> {
        self.products_in_tasks(isa, class, which, self.rows)
    }

    /// The same, so many rows of weights at a time.
    fn products_in_tasks(&self, isa: Isa, class: Class, which: std::ops::Range<usize>, each: usize) -> Vec<f32> {
        let (cols, tokens, fine) = (self.cols, which.len(), self.fine);
        let x = &self.x[which.start * cols..which.end * cols];
        let packets = cols.div_ceil(PACKET);
        let mut quantised: Vec<Activation> = vec![bytemuck::Zeroable::zeroed(); tokens * packets];
        let mut paired: Vec<Paired> = vec![bytemuck::Zeroable::zeroed(); tokens * packets];
        for ((x, q), p) in x.chunks(cols).zip(quantised.chunks_mut(packets)).zip(paired.chunks_mut(packets)) {
            let (to, out, pairs) = (packets * SUBS, q.as_mut_ptr(), p.as_mut_ptr());
            dispatch(isa, Quantise { x: x.as_ptr(), cols, from: 0, to, out, pairs, fine });
        }
        let tiled = isa == Isa::Amx && class == Class::Bulk && !fine && self.ty.block_elems() > 1;
        let mut panels: Vec<Panel> = vec![bytemuck::Zeroable::zeroed(); panel_scratch(cols)];
        #[cfg(target_arch = "x86_64")]
        if tiled {
            quantised.resize(amx::input_len(tokens, packets), bytemuck::Zeroable::zeroed());
            panels.resize(amx::scratch_len(tokens, self.rows), bytemuck::Zeroable::zeroed());
            for task in 0..tokens.div_ceil(amx::TOKENS) * packets {
                let (tile, packet, out) = (task / packets, task % packets, quantised.as_mut_ptr());
                dispatch(isa, amx::Tile { x: x.as_ptr(), cols, tokens, tile, packet, out });
            }
        }
        let mut out = vec![f32::NAN; tokens * self.rows];
        let job = Job {
            weights: self.weights.as_ptr(),
            ty: self.ty,
            cols,
            bias: std::ptr::null(),
            x: quantised.as_ptr(),
            pairs: if class == Class::Exact { paired.as_ptr() } else { std::ptr::null() },
            xf: x.as_ptr(),
            tokens,
            class,
            fine,
            tiled,
            out: out.as_mut_ptr(),
            stride: self.rows,
            then: Then::Store,
        };
        let scratch = &mut vec![0.0; cols];
        for from in (0..self.rows).step_by(each) {
            let to = self.rows.min(from + each);
            dispatch(isa, Rows { job: &job, from, to, scratch, panels: &mut panels });
        }
        out
    }
}

/// Error of a product of `(rows, cols)` against double precision, over the root of the sum of squared terms.
fn product_error(
    isa: Isa,
    ty: TensorType,
    (rows, cols): (usize, usize),
    tokens: usize,
    class: Class,
    fine: bool,
) -> f64 {
    let case = Case::new(ty, rows, cols, tokens, fine);
    let got = case.products(isa, class, 0..tokens);
    let (weights, x) = (&case.weights, &case.x);
    let mut exact = vec![0.0f32; rows * cols];
    reference::dequantize(ty, weights, &mut exact);
    let (mut error, mut norm) = (0.0, 0.0);
    for t in 0..tokens {
        for r in 0..rows {
            let products = (0..cols).map(|c| f64::from(exact[r * cols + c]) * f64::from(x[t * cols + c]));
            error += (f64::from(got[t * rows + r]) - products.clone().sum::<f64>()).powi(2);
            // The expected square of the sum if signs were random: a sum near zero says nothing.
            norm += products.map(|p| p * p).sum::<f64>();
        }
    }
    if error.is_nan() { f64::INFINITY } else { (error / norm).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each row of `case` alone gives the bits that it gives among others, in products of class `class`.
    fn rows_are_alone(case: &Case, isa: Isa, class: Class, most: usize) {
        let alone: Vec<f32> = (0..most).flat_map(|t| case.products(isa, class, t..t + 1)).collect();
        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        for n in 2..=most {
            for from in [0, most - n] {
                let among = case.products(isa, class, from..from + n);
                let want = &alone[from * case.rows..(from + n) * case.rows];
                let what = format!("{} {} fine {} {class:?}, {n} from {from}", isa.name(), case.ty, case.fine);
                assert!(bits(&among) == bits(want), "{what}");
            }
        }
    }

    /// Guards against products that add up in another order where more rows of activations are there.
    #[test]
    fn a_row_of_activations_gives_the_same_bits_alone_and_among_others() {
        for isa in Isa::ALL.into_iter().filter(|&i| i <= Isa::detect()) {
            for ty in reference::TYPES {
                for fine in [false, true] {
                    for (rows, blocks) in [(3, 1), (37, 9)] {
                        let cols = blocks * ty.block_elems().max(32);
                        let case = Case::new(ty, rows, cols, 19, fine);
                        rows_are_alone(&case, isa, Class::Exact, EXACT_ROWS);
                        rows_are_alone(&case, isa, Class::Bulk, 19);
                    }
                }
            }
        }
    }

    /// Guards against rows of weights that are computed together, and otherwise where a task begins with another row.
    #[test]
    fn a_row_of_weights_gives_the_same_bits_in_every_task() {
        for isa in Isa::ALL.into_iter().filter(|&i| i <= Isa::detect()) {
            for ty in reference::TYPES {
                for fine in [false, true] {
                    for blocks in [1, 18, 21] {
                        let case = Case::new(ty, 11, blocks * ty.block_elems().max(32), 2, fine);
                        let bits = |each| {
                            let sums = case.products_in_tasks(isa, Class::Exact, 0..2, each);
                            sums.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                        };
                        let want = bits(11);
                        for each in [1, 2, 5, 7] {
                            assert!(bits(each) == want, "{} {ty} fine {fine}, {each} rows at once", isa.name());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_kernel_is_within_its_bound() {
        let mut lines = Vec::new();
        let result = super::selftest(&mut |l| lines.push(l.to_owned()));
        assert!(result.is_ok(), "{}", lines.join("\n"));
    }
}
