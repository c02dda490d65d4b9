//! An answer that lists tokens, written as it is sent: as text it takes many times their bytes.

use std::fmt::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Bytes;
use hyper::body::{Body, Frame};

use super::budget::Claim;
use super::info::Tokenized;
use super::served::Served;

/// Bytes after which what there is to say is sent.
const FRAME_BYTES: usize = 16 << 10;

/// The body of an answer of `/tokenize`.
pub struct Tokens {
    served: Arc<Served>,
    tokens: Tokenized,
    /// Tokens that are written; `None` before the list's beginning.
    at: Option<usize>,
    ended: bool,
    /// Of the tokens' bytes.
    _claim: Claim,
}

impl Tokens {
    /// Of these tokens, whose bytes are claimed.
    pub fn new(served: Arc<Served>, tokens: Tokenized, claim: Claim) -> Tokens {
        Tokens { served, tokens, at: None, ended: false, _claim: claim }
    }

    /// Appends a token.
    fn write(&self, i: usize, out: &mut String) {
        let id = self.tokens.ids[i];
        if i > 0 {
            out.push(',');
        }
        if !self.tokens.pieces {
            // Writing to a text cannot fail.
            let _ = write!(out, "{id}");
            return;
        }
        let bytes = self.served.opened.tokenizer.token_bytes(id);
        // What is no text is given as bytes.
        let piece = std::str::from_utf8(bytes).map_or_else(|_| serde_json::json!(bytes), serde_json::Value::from);
        let _ = write!(out, "{{\"id\":{id},\"piece\":{piece}}}");
    }
}

impl Body for Tokens {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::convert::Infallible>>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        let mut out = String::new();
        if this.at.is_none() {
            out.push_str("{\"tokens\":[");
        }
        let mut at = this.at.unwrap_or(0);
        while at < this.tokens.ids.len() && out.len() < FRAME_BYTES {
            this.write(at, &mut out);
            at += 1;
        }
        if at == this.tokens.ids.len() {
            out.push_str("]}");
            this.ended = true;
        }
        this.at = Some(at);
        Poll::Ready(Some(Ok(Frame::data(out.into()))))
    }
}
