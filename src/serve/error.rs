//! Why a request is not answered, in the forms that clients read.

use serde_json::{Value as Json, json};

/// A refusal or failure: one sentence, with a status of HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// Status code.
    pub status: u16,
    /// A short name for programs, where OpenAI has one.
    pub code: Option<&'static str>,
    /// The field of the request that is at fault.
    pub param: Option<String>,
    /// The sentence.
    pub message: String,
    /// Seconds until another attempt may succeed.
    pub retry_after_s: Option<u64>,
}

/// Whose form an answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// OpenAI's, which llama-server and vLLM share.
    OpenAi,
    /// Anthropic's.
    Anthropic,
    /// Ollama's.
    Ollama,
}

impl ApiError {
    fn new(status: u16, message: impl Into<String>) -> ApiError {
        ApiError { status, code: None, param: None, message: message.into(), retry_after_s: None }
    }

    /// 400: the request.
    pub fn request(message: impl Into<String>) -> ApiError {
        ApiError::new(400, message)
    }

    /// 400: a field of the request.
    pub fn field(param: &str, message: impl Into<String>) -> ApiError {
        ApiError { param: Some(param.to_owned()), ..ApiError::new(400, message) }
    }

    /// 400: a field that would change the text, which nt does not know or does not do.
    pub fn unsupported(param: &str, message: impl Into<String>) -> ApiError {
        ApiError { code: Some("unsupported_parameter"), ..ApiError::field(param, message) }
    }

    /// 400: the prompt has no room.
    pub fn too_long(message: impl Into<String>) -> ApiError {
        ApiError { code: Some("context_length_exceeded"), ..ApiError::request(message) }
    }

    /// 401: no key, or a wrong one.
    pub fn key() -> ApiError {
        let message = "this server needs an API key: send it as Authorization: Bearer KEY (or x-api-key: KEY); the one sent is not one of its keys";
        ApiError { code: Some("invalid_api_key"), ..ApiError::new(401, message) }
    }

    /// 403: where the request comes from.
    pub fn forbidden(message: impl Into<String>) -> ApiError {
        ApiError::new(403, message)
    }

    /// 404: another model.
    pub fn model(message: impl Into<String>) -> ApiError {
        ApiError { code: Some("model_not_found"), param: Some("model".into()), ..ApiError::new(404, message) }
    }

    /// 404: another path.
    pub fn path(message: impl Into<String>) -> ApiError {
        ApiError::new(404, message)
    }

    /// 405.
    pub fn method(message: impl Into<String>) -> ApiError {
        ApiError::new(405, message)
    }

    /// 408: the body did not come in time.
    pub fn slow() -> ApiError {
        ApiError::new(408, "the body of the request did not come in time")
    }

    /// 413: more bytes than a request may have.
    pub fn too_large(limit: u64) -> ApiError {
        ApiError::new(
            413,
            format!("the body of the request has more than the {limit} bytes that one may have (--max-body)"),
        )
    }

    /// 429: the queue is full.
    pub fn busy(waiting: usize, retry_after_s: u64) -> ApiError {
        let message = format!(
            "the queue is full: {waiting} requests wait; by the rates measured here a place is free in about {retry_after_s} s"
        );
        ApiError {
            code: Some("rate_limit_exceeded"),
            retry_after_s: Some(retry_after_s),
            ..ApiError::new(429, message)
        }
    }

    /// 429: one client has its share of the queue.
    pub fn share(waiting: usize, most: usize, retry_after_s: u64) -> ApiError {
        let message = format!(
            "{waiting} requests of this client wait, its share of the queue of {most}; by the rates measured here a place is free in about {retry_after_s} s"
        );
        ApiError { message, ..ApiError::busy(waiting, retry_after_s) }
    }

    /// 408: the answer is not read.
    pub fn unread() -> ApiError {
        ApiError::new(408, "the answer was stopped, since too much of it waits to be read")
    }

    /// 500: a pass failed.
    pub fn failed(message: impl Into<String>) -> ApiError {
        ApiError::new(500, message)
    }

    /// 501: what nt does not do.
    pub fn not_built(message: impl Into<String>) -> ApiError {
        ApiError { code: Some("not_implemented"), ..ApiError::new(501, message) }
    }

    /// 501: vectors where there are no hidden states.
    pub fn no_hidden_states() -> ApiError {
        ApiError::not_built(
            "vectors of texts need final hidden states, which the GPU's backend does not give; serve with --backend cpu",
        )
    }

    /// 503: not now.
    pub fn unavailable(message: impl Into<String>) -> ApiError {
        ApiError { retry_after_s: Some(1), ..ApiError::new(503, message) }
    }

    /// 504: the time that a request may take.
    pub fn timed_out(seconds: u64) -> ApiError {
        ApiError::new(
            504,
            format!("the request was stopped after {seconds} s, the longest that one may take (--timeout)"),
        )
    }

    /// What a client of `form` reads.
    pub fn json(&self, form: Form) -> Json {
        match form {
            Form::OpenAi => json!({ "error": {
                "message": self.message, "type": self.kind(form), "param": self.param, "code": self.code,
            } }),
            Form::Anthropic => {
                json!({ "type": "error", "error": { "type": self.kind(form), "message": self.message } })
            }
            Form::Ollama => json!({ "error": self.message }),
        }
    }

    fn kind(&self, form: Form) -> &'static str {
        match (self.status, form) {
            (401, Form::Anthropic) => "authentication_error",
            (403, Form::Anthropic) => "permission_error",
            (404, Form::Anthropic) => "not_found_error",
            (413, Form::Anthropic) => "request_too_large",
            (429, Form::OpenAi) => "requests",
            (429, _) => "rate_limit_error",
            (503, Form::Anthropic) => "overloaded_error",
            (500.., Form::OpenAi) => "server_error",
            (500.., _) => "api_error",
            _ => "invalid_request_error",
        }
    }
}
