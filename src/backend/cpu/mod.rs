//! The CPU backend: kernels chosen at run time for AVX-512/VNNI, AVX2 or plain Rust.
