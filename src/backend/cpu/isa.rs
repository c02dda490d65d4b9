//! Instruction sets and which of them this machine has.

/// What the kernels are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Portable code.
    Scalar,
    /// AVX2 with FMA, F16C and BMI2.
    Avx2,
    /// AVX-512 F, BW, DQ, VL with VNNI, and all of [`Isa::Avx2`].
    Avx512,
    /// AMX with bfloat16 for bulk rows, and all of [`Isa::Avx512`] for the rest.
    Amx,
}

impl Isa {
    /// All sets, the plainest first.
    pub const ALL: [Isa; 4] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Amx];

    /// The name that `NT_CPU` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }

    /// The largest set of this machine: asks for every feature that `kernel::dispatch` compiles for.
    pub fn detect() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
                && is_x86_feature_detected!("bmi2");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            if avx2 && avx512 {
                return if super::x86::amx::available() { Isa::Amx } else { Isa::Avx512 };
            }
            if avx2 {
                return Isa::Avx2;
            }
        }
        Isa::Scalar
    }

    /// The set to use: the one that `NT_CPU` names, as far as the machine has it, or the largest; up to AVX-512 where rows may
    /// not be rounded to `bfloat`s, as AMX does.
    pub fn choose(bfloat: bool) -> Isa {
        let wanted = std::env::var("NT_CPU").unwrap_or_default();
        let largest = if bfloat { Isa::Amx } else { Isa::Avx512 };
        let named = Isa::ALL.into_iter().find(|i| i.name() == wanted);
        if named.is_none() && !wanted.is_empty() {
            let names = Isa::ALL.map(Isa::name).join(", ");
            tracing::warn!("NT_CPU names no set of instructions ({names}), so that it is not followed");
        }
        named.unwrap_or(largest).min(Isa::detect())
    }
}
