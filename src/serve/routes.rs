//! Paths and what answers them; who may ask.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use hyper::body::Body as _;
use serde_json::{Value as Json, json};
use tokio::sync::Semaphore;

use super::budget::{Budget, Claim};
use super::connection::Connection;
use super::error::{ApiError, Form};
use super::fields::Fields;
use super::job::{Client, Event, Job, Ticket, Work};
use super::outbox::outbox;
use super::queue::{Phase, Queue, loading};
use super::served::{Models, Served};
use super::steps::{Answers, Prepared, Steps};
use super::stream::{Stream, whole};
use super::tokens::Tokens;
use super::vectors::{self, Asked};
use super::{anthropic, info, native, ollama, openai, page, responses};

/// The longest that a body may take to come.
const BODY: Duration = Duration::from_secs(60);
/// Requests that are read at once: each may take many times its body's bytes.
const READ_AT_ONCE: usize = 4;
/// Bodies of the largest size that may be held at once, beyond what each request may hold in any case.
const BODIES: u64 = 8;
/// Bytes that these take at least.
const BODIES_MIN: u64 = 64 << 20;

/// Who may ask.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Keys; none for everybody.
    pub keys: Vec<String>,
    /// Whether the server listens at this machine's own address alone.
    pub loopback: bool,
    /// What this machine is called.
    pub name: String,
}

/// What every handler has.
pub struct App {
    models: Arc<Models>,
    queue: Arc<Queue>,
    access: Access,
    jobs: AtomicU64,
    readers: Arc<Semaphore>,
    /// Bytes of bodies.
    bodies: Arc<Budget>,
    /// Bytes of answers that wait to be read.
    unread: Arc<AtomicUsize>,
}

type Shared = State<Arc<App>>;
/// Reads a request: its fields, an id for the answer, and whether to stop reading.
type Read = fn(&Arc<Served>, Fields, &str, &dyn Fn() -> bool) -> Result<Prepared, ApiError>;

/// All paths.
pub fn router(models: Arc<Models>, queue: Arc<Queue>, access: Access) -> Router {
    let bodies = usize::try_from(models.limits().body.saturating_mul(BODIES).max(BODIES_MIN)).unwrap_or(usize::MAX);
    let app = Arc::new(App {
        models,
        queue,
        access,
        jobs: AtomicU64::new(0),
        readers: Arc::new(Semaphore::new(READ_AT_ONCE)),
        bodies: Budget::new(bodies),
        unread: Arc::default(),
    });
    Router::new()
        .route("/", get(root))
        .route("/health", get(health))
        .route("/v1/health", get(health))
        .route("/v1/models", get(all_models))
        .route("/models", get(all_models))
        .route("/v1/models/{*name}", get(one_model))
        .route("/v1/chat/completions", post(chat))
        .route("/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/completions", post(completions))
        .route("/completion", post(completion))
        .route("/metrics", get(metrics))
        .route("/slots", get(slots))
        .route("/props", get(props))
        .route("/machine", get(machine))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/apply-template", post(apply_template))
        .route("/v1/messages", post(messages))
        .route("/v1/messages/count_tokens", post(count_tokens))
        .route("/v1/responses", post(responses))
        .route("/api/chat", post(ollama_chat))
        .route("/api/generate", post(ollama_generate))
        .route("/api/tags", get(ollama_tags))
        .route("/api/ps", get(ollama_ps))
        .route("/api/show", post(ollama_show))
        .route("/api/version", get(ollama_version))
        .route("/api/pull", any(ollama_library))
        .route("/api/push", any(ollama_library))
        .route("/api/create", any(ollama_library))
        .route("/api/copy", any(ollama_library))
        .route("/api/delete", any(ollama_library))
        .route("/api/embed", post(ollama_embed))
        .route("/api/embeddings", post(ollama_embed_one))
        .route("/v1/embeddings", post(embeddings))
        .route("/embeddings", post(embeddings))
        .fallback(no_path)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(app.clone(), allowed))
        .with_state(app)
}

/// Whose form errors of a path have.
fn form(path: &str) -> Form {
    if path.starts_with("/api/") {
        Form::Ollama
    } else if path.starts_with("/v1/messages") {
        Form::Anthropic
    } else {
        Form::OpenAi
    }
}

/// Lets a request through whose sender may ask.
async fn allowed(State(app): Shared, mut request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let form = form(path);
    let free = matches!(path, "/" | "/health" | "/v1/health");
    match check_origin(request.headers(), &app.access).and_then(|()| match free {
        true => Ok(None),
        false => check_key(request.headers(), &app.access.keys),
    }) {
        Ok(key) => {
            if let Some(key) = key {
                request.extensions_mut().insert(Client::Key(key));
            }
            let mut response = next.run(request).await;
            let headers = response.headers_mut();
            headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
            let name = header::HeaderName::from_static("cross-origin-resource-policy");
            headers.insert(name, header::HeaderValue::from_static("same-origin"));
            response
        }
        Err(e) => failed(&e, form),
    }
}

/// Keeps pages of other sites that a browser shows from asking: they have an origin of their own, or a name of their
/// own for this machine.
fn check_origin(headers: &HeaderMap, access: &Access) -> Result<(), ApiError> {
    let text = |name| headers.get(name).map(|v| v.to_str().unwrap_or("?"));
    let host = text(header::HOST).unwrap_or("");
    let origin = text(header::ORIGIN).map(|o| o.split_once("://").map_or(o, |o| o.1));
    // What a browser says of a request without an origin, such as that for a picture; a link to here is none of those.
    let site = headers.get("sec-fetch-site").is_some_and(|v| v == "cross-site" || v == "same-site");
    let link = headers.get("sec-fetch-mode").is_some_and(|v| v == "navigate");
    if origin.is_some_and(|origin| origin != host) || site && !link {
        return Err(ApiError::forbidden("pages of other origins may not ask this server (there is no CORS)"));
    }
    if headers.get_all(header::HOST).iter().count() > 1 {
        return Err(ApiError::forbidden("the request has two hosts"));
    }
    let name = host_name(host);
    let is_local =
        || name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
    // Without keys, a name that somebody else chose for this machine is not taken: a page may have that name.
    let is_ours = || {
        let given = name.strip_suffix(".local").unwrap_or(name);
        !access.loopback && (name.parse::<std::net::IpAddr>().is_ok() || given.eq_ignore_ascii_case(&access.name))
    };
    if access.keys.is_empty() && !name.is_empty() && !is_local() && !is_ours() {
        return Err(ApiError::forbidden(format!(
            "this server answers for names of this machine only, not for {:?} (keys change that)",
            name.chars().take(100).collect::<String>()
        )));
    }
    Ok(())
}

/// The name or address of a `Host` header without its port; one that is none stays as it is.
fn host_name(host: &str) -> &str {
    let (name, rest) = match host.strip_prefix('[').and_then(|h| h.split_once(']')) {
        Some(found) => found,
        None => host.split_at(host.find(':').unwrap_or(host.len())),
    };
    let port = rest.strip_prefix(':').unwrap_or(rest);
    let is_port = rest.is_empty() || rest.len() > port.len() && port.bytes().all(|b| b.is_ascii_digit());
    if is_port { name } else { host }
}

/// Which key a request has; `None` where none is needed.
fn check_key(headers: &HeaderMap, keys: &[String]) -> Result<Option<usize>, ApiError> {
    if keys.is_empty() {
        return Ok(None);
    }
    let scheme = |v: &[u8]| v.len() > 7 && v[..7].eq_ignore_ascii_case(b"Bearer ");
    let bearer = headers.get(header::AUTHORIZATION).map(|v| v.as_bytes()).filter(|v| scheme(v)).map(|v| &v[7..]);
    let given = bearer.or_else(|| headers.get("x-api-key").map(|v| v.as_bytes())).unwrap_or(b"");
    // All of all keys is compared, so that the time says nothing of them.
    let known =
        |found: Option<usize>, (i, key): (usize, &String)| if same(key.as_bytes(), given) { Some(i) } else { found };
    keys.iter().enumerate().fold(None, known).map(Some).ok_or_else(ApiError::key)
}

fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |d, (a, b)| d | (a ^ b)) == 0
}

/// A JSON answer.
fn answer(status: u16, json: &Json) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, [(header::CONTENT_TYPE, "application/json")], json.to_string()).into_response()
}

fn failed(e: &ApiError, form: Form) -> Response {
    let mut response = answer(e.status, &e.json(form));
    if let Some(s) = e.retry_after_s {
        response.headers_mut().insert(header::RETRY_AFTER, s.into());
    }
    if e.status == 401 {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    }
    response
}

async fn no_path(request: Request) -> Response {
    let path: String = request.uri().path().chars().take(100).collect();
    failed(&ApiError::path(format!("there is no {path} here; docs/clients.md lists what there is")), form(&path))
}

async fn no_method(method: Method, request: Request) -> Response {
    let path = request.uri().path();
    failed(&ApiError::method(format!("{path} does not take {method}")), form(path))
}

async fn embeddings(State(app): Shared, request: Request) -> Response {
    embed(&app, request, Form::OpenAi, vectors::openai).await
}

async fn root(headers: HeaderMap) -> Response {
    page::root(&headers)
}

async fn health(State(app): Shared) -> Response {
    match app.queue.view().phase {
        Phase::Open => answer(200, &json!({ "status": "ok" })),
        Phase::Loading => failed(&loading(), Form::OpenAi),
        Phase::Closing | Phase::Over => failed(&super::queue::closing(), Form::OpenAi),
    }
}

fn model_json(served: &Served, state: &str) -> Json {
    let h = &served.opened.model.hparams;
    json!({
        "id": served.name(),
        "object": "model",
        "created": served.started_unix_s,
        "owned_by": "nt",
        "aliases": &served.names[1..],
        "status": { "value": state },
        "meta": {
            "n_vocab": served.opened.model.n_vocab,
            "n_ctx": served.n_ctx,
            "n_ctx_train": h.n_ctx_train,
            "n_embd": h.n_embd,
            "size": served.opened.gguf.tensor_bytes(),
        },
    })
}

async fn all_models(State(app): Shared) -> Response {
    let view = app.queue.view();
    let all = app.models.all().iter().enumerate().map(|(i, served)| model_json(served, info::state(&view, i)));
    answer(200, &json!({ "object": "list", "data": all.collect::<Vec<_>>() }))
}

async fn one_model(State(app): Shared, axum::extract::Path(name): axum::extract::Path<String>) -> Response {
    match app.models.find(Some(&name)) {
        Ok(i) => answer(200, &model_json(&app.models.all()[i], info::state(&app.queue.view(), i))),
        Err(e) => failed(&e, Form::OpenAi),
    }
}

async fn chat(State(app): Shared, request: Request) -> Response {
    generate(app, request, Form::OpenAi, openai::chat).await
}

async fn completions(State(app): Shared, request: Request) -> Response {
    generate(app, request, Form::OpenAi, |served, f, id, _| openai::completions(served, f, id)).await
}

async fn completion(State(app): Shared, request: Request) -> Response {
    generate(app, request, Form::OpenAi, |served, f, _, _| native::completion(served, f)).await
}

async fn messages(State(app): Shared, request: Request) -> Response {
    generate(app, request, Form::Anthropic, anthropic::messages).await
}

async fn count_tokens(State(app): Shared, request: Request) -> Response {
    told(with_fields(&app, request, |served, f, stop| anthropic::count_tokens(served, f, stop)).await, Form::Anthropic)
}

async fn responses(State(app): Shared, request: Request) -> Response {
    generate(app, request, Form::OpenAi, responses::responses).await
}

async fn ollama_chat(State(app): Shared, request: Request) -> Response {
    generate(app, request, Form::Ollama, ollama::chat).await
}

async fn ollama_generate(State(app): Shared, request: Request) -> Response {
    generate(app, request, Form::Ollama, ollama::generate).await
}

async fn ollama_tags(State(app): Shared) -> Response {
    answer(200, &ollama::tags(&app.models))
}

async fn ollama_ps(State(app): Shared) -> Response {
    answer(200, &ollama::ps(&app.models, &app.queue.view().present))
}

async fn ollama_show(State(app): Shared, request: Request) -> Response {
    told(with_fields(&app, request, |served, f, _| ollama::show(served, f)).await, Form::Ollama)
}

async fn ollama_version() -> Response {
    answer(200, &ollama::version())
}

async fn ollama_library() -> Response {
    let message =
        "this server serves the models that it was started with, and changes no files; `nt list` shows what is there";
    failed(&ApiError::not_built(message), Form::Ollama)
}

async fn ollama_embed(State(app): Shared, request: Request) -> Response {
    embed(&app, request, Form::Ollama, vectors::ollama).await
}

async fn ollama_embed_one(State(app): Shared, request: Request) -> Response {
    embed(&app, request, Form::Ollama, vectors::ollama_one).await
}

async fn metrics(State(app): Shared) -> Response {
    let text = info::metrics(&app.queue.view(), &app.models);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

async fn slots(State(app): Shared) -> Response {
    answer(200, &info::slots(&app.queue.view(), &app.models))
}

async fn props(State(app): Shared) -> Response {
    answer(200, &info::props(&app.queue.view(), &app.models))
}

async fn machine(State(app): Shared) -> Response {
    answer(200, &info::machine(&app.queue.view(), &app.models))
}

async fn tokenize(State(app): Shared, request: Request) -> Response {
    let tokens = with_fields(&app, request, |served, f, _| info::tokenize(served, f)).await;
    let mut claim = app.bodies.claim();
    let body = tokens.and_then(|(model, tokens)| {
        claim.grow(size_of_val(&tokens.ids[..]))?;
        Ok(Body::new(Tokens::new(app.models.all()[model].clone(), tokens, claim)))
    });
    match body {
        Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(e) => failed(&e, Form::OpenAi),
    }
}

async fn detokenize(State(app): Shared, request: Request) -> Response {
    told(with_fields(&app, request, |served, f, _| info::detokenize(served, f)).await, Form::OpenAi)
}

async fn apply_template(State(app): Shared, request: Request) -> Response {
    told(with_fields(&app, request, |served, f, stop| info::apply_template(served, f, stop)).await, Form::OpenAi)
}

/// An answer that is there at once.
fn told(result: Result<(usize, Json), ApiError>, form: Form) -> Response {
    match result {
        Ok((_, json)) => answer(200, &json),
        Err(e) => failed(&e, form),
    }
}

/// Answers a request that generates.
async fn generate(app: Arc<App>, request: Request, form: Form, read: Read) -> Response {
    match generated(&app, request, read).await {
        Ok(response) => response,
        Err(e) => failed(&e, form),
    }
}

/// The connection of a request, and whose it is.
fn sender(request: &Request) -> (Option<Connection>, Client) {
    let connection = request.extensions().get::<Connection>().cloned();
    let key = request.extensions().get::<Client>().copied();
    let address = || connection.as_ref().map_or(Client::Key(0), Connection::client);
    let client = key.unwrap_or_else(address);
    (connection, client)
}

async fn generated(app: &Arc<App>, request: Request, read: Read) -> Result<Response, ApiError> {
    let number = app.jobs.fetch_add(1, Ordering::Relaxed) + 1;
    let id = format!("{:x}{number:08x}", app.models.all()[0].started_unix_s);
    let since = Instant::now();
    let (connection, client) = sender(&request);
    let (model, prepared) = with_fields(app, request, move |served, f, stop| read(served, f, &id, stop)).await?;
    let limits = app.models.limits();
    let end = (tokio::time::Instant::from_std(since) + limits.time, limits.time);
    let (out, events) = outbox(&app.unread);
    let Prepared { task, looks, mut dialect, stream, keep, gives_up } = prepared;
    if gives_up {
        app.queue.give_up(model);
        return Ok(answer(200, &dialect.whole(&Answers::default())));
    }
    let steps = Steps::new(&looks, task.answers());
    let at_work = connection.map(|c| c.at_work());
    let ticket = Ticket { id: number, client, out, since, limit: limits.time };
    app.queue.push(Job { ticket, model, keep, work: Work::Answer(task) })?;
    if !stream {
        return whole(events, steps, dialect.as_mut(), end).await.map(|json| answer(200, &json));
    }
    let headers = [
        (header::CONTENT_TYPE, dialect.content_type()),
        (header::CACHE_CONTROL, "no-cache"),
        // Proxies such as nginx pass on what comes at once.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    let body = Body::new(Stream::new(events, steps, dialect, limits.ping, end, at_work));
    Ok((headers, body).into_response())
}

/// Answers a request for vectors.
async fn embed(
    app: &Arc<App>,
    request: Request,
    form: Form,
    read: fn(&Served, Fields) -> Result<Asked, ApiError>,
) -> Response {
    match embedded(app, request, read).await {
        Ok(json) => ([(header::CONTENT_TYPE, "application/json")], json).into_response(),
        Err(e) => failed(&e, form),
    }
}

async fn embedded(
    app: &Arc<App>,
    request: Request,
    read: fn(&Served, Fields) -> Result<Asked, ApiError>,
) -> Result<String, ApiError> {
    let since = Instant::now();
    let limits = app.models.limits();
    let (connection, client) = sender(&request);
    let (model, asked) = with_fields(app, request, move |served, f, _| read(served, f)).await?;
    let served = &app.models.all()[model];
    if served.embeds.get() == Some(&false) {
        return Err(ApiError::no_hidden_states());
    }
    let mut claim = app.bodies.claim();
    claim.grow(asked.bytes(served.opened.model.hparams.n_embd))?;
    let Asked { texts, written, since: read_at, keep } = asked;
    let (out, mut events) = outbox(&app.unread);
    let _at_work = connection.map(|c| c.at_work());
    let number = app.jobs.fetch_add(1, Ordering::Relaxed) + 1;
    let ticket = Ticket { id: number, client, out, since, limit: limits.time };
    app.queue.push(Job { ticket, model, keep, work: Work::Embed(texts) })?;
    let all = async {
        let mut found = Vec::new();
        while let Some(event) = events.hear().await {
            match event {
                Event::Vectors(vectors) => found = vectors,
                Event::Done(summary) => return Ok((found, summary)),
                Event::Failed(e) => return Err(e),
                Event::Text { .. } | Event::Finished { .. } => {}
            }
        }
        Err(ApiError::failed("the answer ended without a reason"))
    };
    let end = tokio::time::Instant::from_std(since) + limits.time;
    let result = tokio::time::timeout_at(end, all).await;
    let (found, summary) = result.unwrap_or_else(|_| Err(ApiError::timed_out(limits.time.as_secs())))?;
    Ok(vectors::answer(&found, written, read_at, &summary, served))
}

/// Reads a body and lets `work` read its fields against the model that they name, where it keeps nobody else from being
/// served. Returns the model's number, and what came of it. The last argument of `work` says when the client has gone.
async fn with_fields<T: Send + 'static>(
    app: &Arc<App>,
    request: Request,
    work: impl FnOnce(&Arc<Served>, Fields, &dyn Fn() -> bool) -> Result<T, ApiError> + Send + 'static,
) -> Result<(usize, T), ApiError> {
    let limit = app.models.limits().body;
    // Older clients of Ollama ask so for what is to be shown.
    let other_name = (request.uri().path() == "/api/show").then_some("name");
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|n| n > limit) {
        return Err(ApiError::too_large(limit));
    }
    let body = read_body(request.into_body(), limit, app.bodies.claim());
    let (body, claim) = tokio::time::timeout(BODY, body).await.unwrap_or_else(|_| Err(ApiError::slow()))?;
    let place = app.readers.clone().acquire_owned().await.map_err(|e| ApiError::failed(e.to_string()))?;
    let gone = Gone::default();
    let (flag, models) = (gone.0.clone(), app.models.clone());
    let read = tokio::task::spawn_blocking(move || {
        // Bodies of clients that are gone are held until a thread comes to them: as few as are read at once.
        let _place = place;
        if flag.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("the client is gone"));
        }
        let mut fields = Fields::parse(&body)?;
        drop((body, claim));
        let mut name = fields.text("model")?;
        if let (None, Some(other)) = (&name, other_name) {
            name = fields.text(other)?;
        }
        let model = models.find(name.as_deref())?;
        Ok((model, work(&models.all()[model], fields, &|| flag.load(Ordering::Relaxed))?))
    });
    read.await.map_err(|_| ApiError::failed("the request could not be read"))?
}

/// A body, and the claim to its bytes.
async fn read_body(mut body: Body, limit: u64, mut claim: Claim) -> Result<(Vec<u8>, Claim), ApiError> {
    let mut bytes = Vec::new();
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame.map_err(|e| ApiError::request(format!("the body of the request broke off: {e}")))?;
        let Ok(data) = frame.into_data() else { continue };
        let n = bytes.len() + data.len();
        if n as u64 > limit {
            return Err(ApiError::too_large(limit));
        }
        claim.grow(n)?;
        bytes.extend_from_slice(&data);
    }
    Ok((bytes, claim))
}

/// Says, once it is dropped, that its future was: the client is gone.
#[derive(Default)]
struct Gone(Arc<AtomicBool>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (header::HeaderName::from_static(k), header::HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn a_key_is_needed_where_there_are_keys() {
        let keys = ["abc".to_owned(), "xyz".to_owned()];
        assert_eq!(check_key(&headers(&[]), &[]), Ok(None));
        assert_eq!(check_key(&headers(&[("authorization", "Bearer xyz")]), &keys), Ok(Some(1)));
        assert_eq!(check_key(&headers(&[("authorization", "bearer xyz")]), &keys), Ok(Some(1)));
        assert_eq!(check_key(&headers(&[("x-api-key", "abc")]), &keys), Ok(Some(0)));
        for wrong in ["Bearer ab", "Bearer abcd", "abc", "Basic abc", "Bearer "] {
            let map: HeaderMap =
                [(header::AUTHORIZATION, header::HeaderValue::from_static(wrong))].into_iter().collect();
            assert_eq!(check_key(&map, &keys).unwrap_err().status, 401, "{wrong}");
        }
    }

    #[test]
    fn pages_of_other_sites_may_not_ask() {
        let local = Access { keys: vec![], loopback: true, name: "box".into() };
        for host in ["localhost:8080", "127.0.0.1", "[::1]:8080", "LOCALHOST", "127.0.0.9:1"] {
            check_origin(&headers(&[("host", host)]), &local).unwrap();
        }
        assert!(check_origin(&headers(&[("host", "evil.example:8080")]), &local).is_err());
        // At another address without keys: addresses and this machine's name, as no page elsewhere has them.
        let open = Access { loopback: false, ..local.clone() };
        for host in ["10.0.0.7:8080", "box:8080", "BOX.local", "localhost"] {
            check_origin(&headers(&[("host", host)]), &open).unwrap();
        }
        let evil = headers(&[("host", "evil.example:8080"), ("origin", "http://evil.example:8080")]);
        assert!(check_origin(&evil, &open).is_err() && check_origin(&evil, &local).is_err());
        check_origin(&headers(&[("host", "box.example")]), &Access { keys: vec!["k".into()], ..open }).unwrap();
        let same = headers(&[("host", "localhost:8080"), ("origin", "http://localhost:8080")]);
        check_origin(&same, &local).unwrap();
        for origin in ["http://evil.example", "null", "http://localhost:3000"] {
            let h = headers(&[("host", "localhost:8080"), ("origin", origin)]);
            assert_eq!(check_origin(&h, &local).unwrap_err().status, 403, "{origin}");
        }
    }
}
