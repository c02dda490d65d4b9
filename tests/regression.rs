//! Faults that users of such programs reported, each with the right behaviour. A test's doc names what it guards
//! against; `NT_BIN=<an earlier nt> cargo test --test regression` shows which of them that build has
//! (`tests/regression/e0040bb.txt` is the list for commit e0040bb).

mod common;

#[path = "regression/changed.rs"]
mod changed;
#[path = "regression/commands.rs"]
mod commands;
#[path = "regression/engine.rs"]
mod engine;
#[path = "regression/files.rs"]
mod files;
#[path = "regression/forms.rs"]
mod forms;
#[path = "regression/library.rs"]
mod library;
#[path = "regression/text.rs"]
mod text;
