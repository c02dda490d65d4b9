//! The reference's dequantisation against values that gguf-py computed (`fixtures/make_dequant.py`).

use nt::backend::reference;
use nt::gguf::TensorType;

#[test]
fn agrees_with_gguf_py() {
    let mut rest: &[u8] = include_bytes!("fixtures/dequant.bin");
    let mut seen = 0;
    while !rest.is_empty() {
        let word = |i: usize| u32::from_le_bytes(rest[4 * i..4 * i + 4].try_into().unwrap());
        let ty = TensorType::from_id(word(0)).unwrap();
        let (elems, bytes) = (word(1) as usize, word(2) as usize);
        let (raw, values) = rest[12..].split_at(bytes);
        let mut y = vec![0f32; elems];
        assert!(reference::dequantize(ty, raw, &mut y), "{ty}");
        for (i, (y, want)) in y.iter().zip(values.chunks_exact(4)).enumerate() {
            let want = f32::from_le_bytes(want.try_into().unwrap());
            assert!((y - want).abs() <= 1e-6 * want.abs().max(1e-38), "{ty} {i}: {y} {want}");
        }
        rest = &values[4 * elems..];
        seen += 1;
    }
    assert_eq!(seen, 22);
}
