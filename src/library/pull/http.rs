//! Requests of `nt pull`: redirects followed one by one, and a body that comes in pieces from a thread of its own, so
//! that whoever waits for it hears when it is to stop.

use std::io::Read;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use ureq::http::{HeaderMap, StatusCode, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, Timeout};

use super::PullError;
use super::url::Url;

/// Redirects of one request at most.
const REDIRECTS_MAX: usize = 10;
/// Bytes of a piece.
const PIECE: usize = 128 << 10;
/// Pieces that wait to be written at most.
const PIECES_MAX: usize = 32;
/// How often the thread that waits looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(50);
/// A read without a byte for so long is a connection that is gone.
const READ_TIME: Duration = Duration::from_secs(60);
const CONNECT_TIME: Duration = Duration::from_secs(20);
/// Most bytes of a file of root certificates.
const ROOTS_MAX: u64 = 16 << 20;

/// Sends requests.
#[derive(Clone)]
pub(super) struct Client {
    agent: Agent,
    /// Past a proxy, for this machine.
    direct: Agent,
    /// A token, and whom it is for.
    token: Option<(Arc<str>, Url)>,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub url: Url,
    /// First byte, and the last one if not all behind it are wanted.
    pub range: Option<(u64, Option<u64>)>,
    /// The range is wanted of this version only.
    pub if_range: Option<String>,
}

/// What an answer says of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub status: u16,
    /// First byte of the body within the file, and bytes of the body.
    pub first: u64,
    pub len: Option<u64>,
    /// Bytes of the whole file.
    pub total: Option<u64>,
    /// What the first host calls its length and checksum, before it redirects.
    pub linked_size: Option<u64>,
    pub sha256: Option<String>,
    /// The version: an entity tag that is not weak.
    pub tag: Option<String>,
    /// The commit of a repository.
    pub commit: Option<String>,
    /// Seconds to wait.
    pub retry_after: Option<u64>,
}

/// Why there is no answer.
#[derive(Clone, Debug)]
pub(super) struct Trouble {
    /// A sentence without the address.
    pub what: String,
    /// Whether the same may go well a little later.
    pub passing: bool,
}

/// What comes from the thread.
enum Event {
    Head(Box<Head>),
    Bytes(Vec<u8>),
    Failed(Trouble),
}

/// An answer whose body comes piece by piece.
pub(super) struct Answer {
    pub head: Head,
    events: Receiver<Event>,
}

impl Client {
    /// A client that sends `token` to the host of `endpoint` and to no other.
    ///
    /// # Errors
    /// If the token cannot stand in a header, or `SSL_CERT_FILE` names no certificates.
    pub fn new(token: Option<&str>, endpoint: &Url) -> Result<Client, PullError> {
        let token = token.map(str::trim).filter(|t| !t.is_empty());
        if token.is_some_and(|t| !t.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(PullError::Usage("HF_TOKEN is no token; printable ASCII without spaces was expected".into()));
        }
        let roots =
            std::env::var_os("SSL_CERT_FILE").filter(|f| !f.is_empty()).map(|f| roots(f.as_ref())).transpose()?;
        let tls = TlsConfig::builder().root_certs(roots.unwrap_or(RootCerts::WebPki)).build();
        let config = || {
            Agent::config_builder()
                .http_status_as_error(false)
                .max_redirects(0)
                .user_agent(concat!("nt/", env!("CARGO_PKG_VERSION")))
                .accept_encoding("identity")
                .timeout_resolve(Some(CONNECT_TIME))
                .timeout_connect(Some(CONNECT_TIME))
                .timeout_recv_response(Some(READ_TIME))
                .timeout_per_read(Some(READ_TIME))
                .timeout_per_write(Some(READ_TIME))
                .tls_config(tls.clone())
        };
        Ok(Client {
            agent: config().build().into(),
            direct: config().proxy(None).build().into(),
            token: token.map(|t| (format!("Bearer {t}").into(), endpoint.clone())),
        })
    }

    /// Asks, and gives the answer once its head is there; `None` if it was told to stop.
    pub fn ask(&self, ask: &Ask, stop: &dyn Fn() -> bool) -> Result<Option<Answer>, Trouble> {
        let (out, events) = sync_channel(PIECES_MAX);
        let (client, ask) = (self.clone(), ask.clone());
        let thread = std::thread::Builder::new().name("nt-pull".into()).spawn(move || client.run(ask, &out));
        thread.map_err(|e| Trouble { what: format!("starting a thread failed: {e}"), passing: false })?;
        match next(&events, stop) {
            Step::Stopped => Ok(None),
            Step::Event(Event::Head(head)) => Ok(Some(Answer { head: *head, events })),
            Step::Event(Event::Failed(why)) => Err(why),
            Step::Event(Event::Bytes(_)) | Step::Ended => {
                Err(Trouble { what: "the connection ended without an answer".into(), passing: true })
            }
        }
    }

    /// The thread: it ends when nobody listens any more.
    fn run(&self, ask: Ask, out: &SyncSender<Event>) {
        let (head, body) = match self.follow(ask) {
            Ok(found) => found,
            Err(why) => return drop(out.send(Event::Failed(why))),
        };
        if out.send(Event::Head(Box::new(head))).is_err() {
            return;
        }
        let mut body = body.into_reader();
        loop {
            let mut piece = vec![0; PIECE];
            match body.read(&mut piece) {
                Ok(0) => return,
                Ok(n) => {
                    piece.truncate(n);
                    if out.send(Event::Bytes(piece)).is_err() {
                        return;
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => {
                    let what = format!("the connection broke off ({e})");
                    return drop(out.send(Event::Failed(Trouble { what, passing: true })));
                }
            }
        }
    }

    /// Asks where redirects lead.
    fn follow(&self, ask: Ask) -> Result<(Head, Body), Trouble> {
        let lasting = |what: String| Trouble { what, passing: false };
        let mut url = ask.url.clone();
        let mut token = self.token.as_ref().filter(|(_, to)| may_have(to, &url));
        let mut linked = Head::default();
        for _ in 0..=REDIRECTS_MAX {
            let agent = if url.is_local() { &self.direct } else { &self.agent };
            let mut request = agent.get(url.to_string());
            if let Some((from, to)) = ask.range {
                let to = to.map_or_else(String::new, |to| to.to_string());
                request = request.header(header::RANGE, format!("bytes={from}-{to}"));
            }
            if let Some(tag) = &ask.if_range {
                request = request.header(header::IF_RANGE, tag);
            }
            if let Some((token, _)) = token {
                request = request.header(header::AUTHORIZATION, &**token);
            }
            let answer = request.call().map_err(|e| trouble(&e, &url))?;
            linked.note(answer.headers());
            if !is_redirect(answer.status()) {
                return Ok((linked.of(answer.status(), answer.headers(), &ask)?, answer.into_body()));
            }
            let to = answer.headers().get(header::LOCATION).map(|l| String::from_utf8_lossy(l.as_bytes()).into_owned());
            let to = to.ok_or_else(|| lasting(format!("{} redirects to nowhere", url.shown())))?;
            let next = url.join(&to).map_err(|why| {
                lasting(format!(
                    "{} redirects to {}, which is not followed: {why}",
                    url.shown(),
                    super::url::shown(&to)
                ))
            })?;
            // Once it has left the host that the token is for, a chain of redirects gets it no more.
            token = token.filter(|(_, to)| may_have(to, &next));
            url = next;
        }
        Err(lasting(format!("more than {REDIRECTS_MAX} redirects, the last one to {}", url.shown())))
    }
}

/// Whether a host may see a token that is for `to`.
fn may_have(to: &Url, url: &Url) -> bool {
    to.same_origin(url) && (url.is_secure() || url.is_local())
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The root certificates of a file.
fn roots(path: &std::path::Path) -> Result<RootCerts, PullError> {
    let wrong = |why: String| PullError::Usage(format!("SSL_CERT_FILE={}: {why}", path.display()));
    let mut text = Vec::new();
    let read = std::fs::File::open(path).and_then(|f| f.take(ROOTS_MAX).read_to_end(&mut text));
    read.map_err(|e| wrong(e.to_string()))?;
    let certs: Vec<_> = parse_pem(&text)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(c)) => Some(c),
            _ => None,
        })
        .collect();
    if certs.is_empty() {
        return Err(wrong("it holds no certificate".into()));
    }
    Ok(RootCerts::new_with_certs(&certs))
}

fn trouble(e: &ureq::Error, url: &Url) -> Trouble {
    use ureq::Error as E;
    let host = url.host();
    let (what, passing) = match e {
        E::HostNotFound => (format!("there is no host {host}, or no network"), false),
        E::Timeout(Timeout::Resolve | Timeout::Connect) => (format!("{host} cannot be reached"), true),
        E::Timeout(_) => (format!("{host} said nothing for {} s", READ_TIME.as_secs()), true),
        E::Io(e) => {
            (format!("the connection to {host} failed ({e})"), e.kind() != std::io::ErrorKind::ConnectionRefused)
        }
        E::ConnectionFailed => (format!("the connection to {host} failed"), true),
        E::Rustls(e) => (format!("{host} is not who it says it is, or TLS failed ({e})"), false),
        other => (format!("{host} gave no usable answer ({other})"), false),
    };
    Trouble { what, passing }
}

impl Head {
    /// Takes what the first host that knows says of the file behind a redirect.
    fn note(&mut self, headers: &HeaderMap) {
        let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).map(str::trim);
        let number = |name: &str| text(name).and_then(|v| v.parse().ok());
        self.linked_size = self.linked_size.or(number("x-linked-size"));
        if self.sha256.is_none() {
            let tag = text("x-linked-etag").map(|t| t.trim_matches('"').to_ascii_lowercase());
            self.sha256 = tag.filter(|t| t.len() == 64 && t.bytes().all(|b| b.is_ascii_hexdigit()));
        }
        if self.commit.is_none() {
            let commit = text("x-repo-commit").map(str::to_ascii_lowercase);
            self.commit = commit.filter(|c| c.len() == 40 && c.bytes().all(|b| b.is_ascii_hexdigit()));
        }
    }

    /// Adds what the last host says.
    fn of(mut self, status: StatusCode, headers: &HeaderMap, ask: &Ask) -> Result<Head, Trouble> {
        let text = |name: header::HeaderName| headers.get(name).and_then(|v| v.to_str().ok()).map(str::trim);
        let lasting = |what: String| Trouble { what, passing: false };
        self.status = status.as_u16();
        if status.is_success() && text(header::CONTENT_ENCODING).is_some_and(|e| !e.eq_ignore_ascii_case("identity")) {
            return Err(lasting("the file comes compressed, though it was not to".into()));
        }
        self.tag = text(header::ETAG).filter(|t| t.starts_with('"') && t.len() > 2).map(str::to_owned);
        self.len = text(header::CONTENT_LENGTH).and_then(|v| v.parse().ok());
        self.retry_after = text(header::RETRY_AFTER).and_then(|v| v.parse().ok());
        let range = text(header::CONTENT_RANGE);
        match self.status {
            200 => self.total = self.len,
            206 => {
                let parsed = range.and_then(content_range);
                let (first, last, total) = parsed.ok_or_else(|| {
                    lasting(format!("a part of the file comes with the range {range:?}, which is none"))
                })?;
                let wanted = ask.range.map_or(0, |r| r.0);
                if first != wanted || last >= total || self.len.is_some_and(|len| len != last - first + 1) {
                    return Err(lasting(format!("bytes from {wanted} were asked for; {range:?} came")));
                }
                (self.first, self.len, self.total) = (first, Some(last - first + 1), Some(total));
            }
            416 => self.total = range.and_then(|r| r.strip_prefix("bytes */")?.parse().ok()),
            _ => {}
        }
        Ok(self)
    }
}

/// First and last byte and the length of `bytes 0-9/100`.
fn content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then_some((first, last, total.parse().ok()?))
}

/// What came, or why nothing did.
enum Step {
    Event(Event),
    Ended,
    Stopped,
}

fn next(events: &Receiver<Event>, stop: &dyn Fn() -> bool) -> Step {
    loop {
        if stop() {
            return Step::Stopped;
        }
        match events.recv_timeout(LOOK) {
            Ok(event) => return Step::Event(event),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Step::Ended,
        }
    }
}

impl Answer {
    /// The next piece of the body; `None` at its end, or if it was told to stop.
    pub fn piece(&mut self, stop: &dyn Fn() -> bool) -> Result<Option<Vec<u8>>, Trouble> {
        match next(&self.events, stop) {
            Step::Event(Event::Bytes(bytes)) => Ok(Some(bytes)),
            Step::Event(Event::Failed(why)) => Err(why),
            Step::Event(Event::Head(_)) | Step::Ended | Step::Stopped => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, 9, 10)));
        for wrong in ["", "bytes 5-9/*", "bytes 9-5/10", "bytes */10", "items 1-2/3", "bytes 5-/10", "bytes -1-2/3"] {
            assert_eq!(content_range(wrong), None, "{wrong}");
        }
    }
}
