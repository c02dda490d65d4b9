//! Vocabulary and merges from GGUF metadata, pre-tokenizers, chat templates.
