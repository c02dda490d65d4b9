//! Machine facts and limits to homes, buffers and predicted speed; pure functions, no I/O.
