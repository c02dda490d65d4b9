//! `nt serve` from outside: the binary, a tiny model, and clients that are well-behaved, rude, slow or gone.

#[path = "serve/attacks.rs"]
mod attacks;
mod common;
#[path = "serve/dialects.rs"]
mod dialects;
#[path = "serve/disk.rs"]
mod disk;
#[path = "serve/forms.rs"]
mod forms;
#[path = "serve/hostile.rs"]
mod hostile;
#[path = "serve/http.rs"]
mod http;
#[path = "serve/limits.rs"]
mod limits;
#[path = "serve/models.rs"]
mod models;
#[path = "serve/openai.rs"]
mod openai;
#[path = "serve/page.rs"]
mod page;
#[path = "serve/parallel.rs"]
mod parallel;
#[path = "serve/prompts.rs"]
mod prompts;
#[path = "serve/recurrent.rs"]
mod recurrent;
#[path = "serve/same_text.rs"]
mod same_text;
#[path = "serve/soak.rs"]
mod soak;
#[path = "serve/vectors.rs"]
mod vectors;
