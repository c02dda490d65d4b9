//! The rooms that read outside data, compiled without the rest of the engine.

#[path = "../../tests/common/checks.rs"]
pub mod checks;
#[path = "../../src/gguf/mod.rs"]
pub mod gguf;
#[path = "../../src/tokenizer/mod.rs"]
pub mod tokenizer;
#[path = "../../tests/common/vocab.rs"]
pub mod vocab;
