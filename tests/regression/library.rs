//! The model library and what the benchmark prints.
