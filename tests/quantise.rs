//! The quantisers against llama.cpp's: bytes where the way is laid down, errors where scales are searched
//! (`fixtures/quantise.txt`; `fixtures/quantise.f16` are weights of SmolLM2-135M, 2048 from the middle of each of six tensors).

use nt::backend::quantise::{TYPES, Unfit, quantise};
use nt::backend::reference;
use nt::gguf::TensorType;

/// Knuth's generator, of which the highest 24 bits are taken.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / 16_777_216.0
    }

    fn normal(&mut self) -> f32 {
        (0..12).fold(0.0, |sum, _| sum + self.uniform()) - 6.0
    }
}

fn input(kind: &str) -> Vec<f32> {
    let mut random = Random(1);
    let mut all = |f: &dyn Fn(f32) -> f32| (0..1 << 15).map(|_| f(random.normal())).collect();
    match kind {
        "normal" => all(&|v| v),
        "heavy" => all(&|v| v * v * v),
        "small" => all(&|v| v * 0.01),
        "tiny" => all(&|v| v * 0.0001),
        "uniform" => (0..1 << 15).map(|_| random.uniform() - 0.5).collect(),
        _ => {
            let halves = include_bytes!("fixtures/quantise.f16").chunks_exact(2);
            halves.map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
    }
}

fn quantised(ty: TensorType, x: &[f32]) -> Vec<u8> {
    let mut out = vec![0xAA; ty.row_bytes(x.len()).unwrap()];
    quantise(ty, x, &mut out).unwrap();
    out
}

fn back(ty: TensorType, bytes: &[u8]) -> Vec<f32> {
    let mut y = vec![0.0; bytes.len() / ty.block_bytes() * ty.block_elems()];
    assert!(reference::dequantize(ty, bytes, &mut y));
    y
}

fn rms(x: &[f32], y: &[f32]) -> f64 {
    let sum: f64 = x.iter().zip(y).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum();
    (sum / x.len() as f64).sqrt()
}

fn fnv(bytes: &[u8]) -> u32 {
    bytes.iter().fold(2_166_136_261, |h, b| (h ^ u32::from(*b)).wrapping_mul(16_777_619))
}

#[test]
fn errors_are_no_larger_than_llama_cpps() {
    let mut seen = 0;
    for line in include_str!("fixtures/quantise.txt").lines().filter(|l| !l.starts_with('#')) {
        let fields: Vec<&str> = line.split(' ').collect();
        let [kind, name, reference, without, sum, _] = fields[..] else { panic!("{line}") };
        let ty = *TYPES.iter().find(|t| t.name() == name).unwrap();
        let x = input(kind);
        let bytes = quantised(ty, &x);
        let error = rms(&x, &back(ty, &bytes));
        let peer = reference.parse::<f64>().unwrap().min(without.parse().unwrap());
        println!("{kind} {name} {error:.4e} {:.4}", error / peer);
        assert!(error <= 1.01 * peer, "{kind} {name}: {error:e}, llama.cpp {peer:e}");
        let searched = ty.block_elems() == 256 || ty == TensorType::IQ4_NL;
        // Halves below 2^-14 are rounded in another way.
        if !searched && !matches!(kind, "small" | "tiny") {
            assert_eq!(format!("{:08x}", fnv(&bytes)), sum, "{kind} {name}: other bytes than llama.cpp's");
        }
        seen += 1;
    }
    assert_eq!(seen, 6 * TYPES.len());
}

/// Scales below the least normal half: the error stays in proportion until a code's step is a half's least step itself.
#[test]
fn small_weights_do_not_vanish() {
    let x = input("normal");
    for &ty in TYPES {
        let relative = |by: f32| {
            let x: Vec<f32> = x.iter().map(|v| v * by).collect();
            rms(&x, &back(ty, &quantised(ty, &x))) / f64::from(by)
        };
        let usual = relative(1.0);
        for by in [0.03, 0.01, 3e-3, 1e-3, 3e-4] {
            assert!(relative(by) <= 1.03 * usual, "{ty} {by}: {} {usual}", relative(by));
        }
        for by in [1e-4, 3e-5, 1e-5] {
            assert!(relative(by) <= 2.5 * usual.max(0.01), "{ty} {by}: {} {usual}", relative(by));
        }
        // Nothing is worse than leaving all of it out.
        for by in [1e-6, 1e-7, 1e-8, 1e-20, 1e-38, 1e-44] {
            let all: f64 = rms(&x.iter().map(|v| v * by).collect::<Vec<_>>(), &vec![0.0; x.len()]) / f64::from(by);
            assert!(relative(by) <= 1.01 * all.max(1.0), "{ty} {by}: {} {all}", relative(by));
        }
    }
}

#[test]
fn blocks_of_equal_elements_come_back() {
    for &ty in TYPES {
        for value in [0.0f32, -0.0, 1.0, -1.0, 0.25, -3.5, 1e-41] {
            let x = vec![value; ty.block_elems() * 2];
            let y = back(ty, &quantised(ty, &x));
            let most = if ty == TensorType::MXFP4 { 0.15 } else { 0.02 };
            y.iter().for_each(|y| assert!((y - value).abs() <= most * value.abs() + 1e-7, "{ty}: {value} {y}"));
        }
        // One element that is not zero, anywhere.
        for at in 0..ty.block_elems() {
            let mut x = vec![0.0; ty.block_elems()];
            x[at] = if at % 2 == 0 { 2.0 } else { -2.0 };
            let y = back(ty, &quantised(ty, &x));
            for (i, (x, y)) in x.iter().zip(&y).enumerate() {
                assert!((x - y).abs() <= 0.04, "{ty}: {x} at {i} became {y}");
            }
        }
    }
}

#[test]
fn what_no_block_holds_is_refused() {
    for &ty in TYPES {
        let n = ty.block_elems();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0; 3 * n];
            x[n + 5] = bad;
            let mut out = vec![0; ty.row_bytes(3 * n).unwrap()];
            assert_eq!(quantise(ty, &x, &mut out), Err(Unfit::NotFinite(n + 5)), "{ty}");
        }
        for huge in [3e38, -3e38] {
            let mut x = vec![0.0; 2 * n];
            (x[n], x[n + 1]) = (huge, -huge);
            let mut out = vec![0; ty.row_bytes(2 * n).unwrap()];
            match quantise(ty, &x, &mut out) {
                Err(e) => assert_eq!(e, Unfit::TooLarge(n, ty)),
                Ok(()) => assert!(back(ty, &out).iter().all(|v| v.is_finite()) && ty == TensorType::MXFP4, "{ty}"),
            }
        }
        assert_eq!(quantise(ty, &vec![0.0; n - 1], &mut vec![0; ty.block_bytes()]), Err(Unfit::Blocks(n - 1, ty)));
    }
    assert!(quantise(TensorType::Q2_K, &[0.0; 256], &mut [0; 84]).is_err());
}
