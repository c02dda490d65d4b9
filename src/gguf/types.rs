//! Tensor types: id, name, elements per block and bytes per block, as ggml defines them.

use std::fmt;

/// A ggml tensor type.
///
/// Every type that llama.cpp has ever written is known by id and block size, so that a file's
/// extents can be checked; which of them can be computed is each backend's own list.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorType(u32);

macro_rules! tensor_types {
    ($($id:literal $name:ident $elems:literal $bytes:literal;)*) => {
        #[allow(missing_docs, non_upper_case_globals, reason = "the names are ggml's own")]
        impl TensorType {
            $(pub const $name: TensorType = TensorType($id);)*
            /// Every known type.
            pub const ALL: &[TensorType] = &[$(TensorType($id)),*];
        }
        const fn facts(id: u32) -> Option<(&'static str, u32, u32)> {
            match id { $($id => Some((stringify!($name), $elems, $bytes)),)* _ => None }
        }
    };
}

// Source: ggml/include/ggml.h (ids) and ggml/src/ggml-common.h (block sizes).
tensor_types! {
    0 F32 1 4;
    1 F16 1 2;
    2 Q4_0 32 18;
    3 Q4_1 32 20;
    6 Q5_0 32 22;
    7 Q5_1 32 24;
    8 Q8_0 32 34;
    9 Q8_1 32 36;
    10 Q2_K 256 84;
    11 Q3_K 256 110;
    12 Q4_K 256 144;
    13 Q5_K 256 176;
    14 Q6_K 256 210;
    15 Q8_K 256 292;
    16 IQ2_XXS 256 66;
    17 IQ2_XS 256 74;
    18 IQ3_XXS 256 98;
    19 IQ1_S 256 50;
    20 IQ4_NL 32 18;
    21 IQ3_S 256 110;
    22 IQ2_S 256 82;
    23 IQ4_XS 256 136;
    24 I8 1 1;
    25 I16 1 2;
    26 I32 1 4;
    27 I64 1 8;
    28 F64 1 8;
    29 IQ1_M 256 56;
    30 BF16 1 2;
    34 TQ1_0 256 54;
    35 TQ2_0 256 66;
    39 MXFP4 32 17;
    40 NVFP4 64 36;
    41 Q1_0 128 18;
    42 Q2_0 64 18;
}

/// Types that ggml has removed from files: id, name, and what to take instead.
const REMOVED: [(u32, &str, &str); 8] = [
    (4, "Q4_2", "another quantization"),
    (5, "Q4_3", "another quantization"),
    (31, "Q4_0_4_4", "Q4_0"),
    (32, "Q4_0_4_8", "Q4_0"),
    (33, "Q4_0_8_8", "Q4_0"),
    (36, "IQ4_NL_4_4", "IQ4_NL"),
    (37, "IQ4_NL_4_8", "IQ4_NL"),
    (38, "IQ4_NL_8_8", "IQ4_NL"),
];

impl TensorType {
    /// What to say of an id that is none of a known type.
    pub(super) fn unknown(id: u32) -> String {
        match REMOVED.iter().find(|r| r.0 == id) {
            Some((_, name, instead)) => {
                format!("type {name}, which ggml has removed from files; take the model in {instead}")
            }
            None => {
                format!("the unknown type {id}; {} types of ggml up to id {} are known", Self::ALL.len(), Self::LAST)
            }
        }
    }

    /// The largest id.
    const LAST: u32 = Self::ALL[Self::ALL.len() - 1].0;

    /// The type with ggml's `id`, if it is known.
    pub const fn from_id(id: u32) -> Option<TensorType> {
        if facts(id).is_some() { Some(TensorType(id)) } else { None }
    }

    /// ggml's id of the type, as the file stores it.
    pub const fn id(self) -> u32 {
        self.0
    }

    /// ggml's name of the type, for example `Q4_K`.
    pub const fn name(self) -> &'static str {
        match facts(self.0) {
            Some((name, ..)) => name,
            None => "?",
        }
    }

    /// Elements in one block (1 for plain types).
    pub const fn block_elems(self) -> usize {
        match facts(self.0) {
            Some((_, elems, _)) => elems as usize,
            None => 1,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match facts(self.0) {
            Some((.., bytes)) => bytes as usize,
            None => 1,
        }
    }

    /// Bytes of a row of `cols` elements; `None` if the row is no whole number of blocks or the
    /// product overflows.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_elems()) {
            return None;
        }
        (cols / self.block_elems()).checked_mul(self.block_bytes())
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Debug for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
