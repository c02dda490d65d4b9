#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nt_fuzz::checks::gguf(data));
