//! A session: prefill, decode, sampling, stop conditions.
