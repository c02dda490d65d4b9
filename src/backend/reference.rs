//! Plain scalar versions of every kernel: slow, obvious, and what the fast ones are checked against.
