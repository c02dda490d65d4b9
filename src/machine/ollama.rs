//! Asks a local Ollama to unload its models, so that their memory is free for a run.
//!
//! Two calls of its HTTP interface: `GET /api/ps` names what is loaded, and `POST /api/generate` with
//! `keep_alive` 0 and no prompt unloads one model. Only this machine is asked, with short time-outs and
//! bounded answers; nothing of an answer is trusted beyond the models' names.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

const PORT: u16 = 11434;
const CONNECT_TIME: Duration = Duration::from_millis(500);
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// Unloading goes on after the answer.
const UNLOAD_TIME: Duration = Duration::from_secs(10);
const ANSWER_BYTES_MAX: u64 = 1 << 20;
const MODELS_MAX: usize = 64;

/// Why Ollama could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum OllamaError {
    /// The address is none of this machine's.
    #[error("OLLAMA_HOST={0}: only an Ollama of this machine is asked; expected HOST:PORT such as 127.0.0.1:11434")]
    Address(String),
    /// It answered, but not as expected.
    #[error("Ollama at {address}: {what}")]
    Answer {
        /// Where.
        address: SocketAddr,
        /// What was wrong.
        what: String,
    },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Eviction {
    /// Nobody answers at this address.
    NotThere(SocketAddr),
    /// These models are unloaded; none if none was loaded.
    Unloaded(Vec<String>),
    /// These were asked to go and are still there.
    StillLoaded(Vec<String>),
}

/// Where Ollama listens: `OLLAMA_HOST` as Ollama itself reads it (scheme, host and port are optional),
/// or its default.
///
/// # Errors
/// If that is no address of this machine, or asks for TLS.
pub fn address(ollama_host: Option<&str>) -> Result<SocketAddr, OllamaError> {
    let text = ollama_host.map_or("", str::trim).trim_end_matches('/');
    let wrong = || OllamaError::Address(text.chars().take(100).collect());
    let rest = text.strip_prefix("http://").unwrap_or(text);
    if rest.contains("://") || rest.contains('/') {
        return Err(wrong());
    }
    let rest = if rest.is_empty() { "127.0.0.1" } else { rest };
    let parsed = if let Ok(ip) = rest.trim_matches(['[', ']']).parse::<IpAddr>() {
        Some(SocketAddr::new(ip, PORT))
    } else {
        let (host, port) = rest.rsplit_once(':').unwrap_or((rest, ""));
        let port = if port.is_empty() { PORT } else { port.parse().map_err(|_| wrong())? };
        match host.trim_matches(['[', ']']) {
            "" => Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)),
            "localhost" => (host, port).to_socket_addrs().ok().and_then(|mut all| all.find(SocketAddr::is_ipv4)),
            ip => ip.parse().ok().map(|ip| SocketAddr::new(ip, port)),
        }
    };
    let mut at = parsed.ok_or_else(wrong)?;
    // A server that listens everywhere is reached here.
    if at.ip().is_unspecified() {
        at.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    if at.ip().is_loopback() { Ok(at) } else { Err(wrong()) }
}

/// Unloads all models and waits until they are gone, a few seconds at most.
///
/// # Errors
/// If something answers that is not Ollama, or refuses.
pub fn evict(at: SocketAddr) -> Result<Eviction, OllamaError> {
    let Some(models) = loaded(at)? else { return Ok(Eviction::NotThere(at)) };
    for model in &models {
        let body = json!({ "model": model, "keep_alive": 0, "stream": false }).to_string();
        call(at, "POST", "/api/generate", &body)?;
    }
    let began = Instant::now();
    loop {
        let left: Vec<String> = loaded(at)?.unwrap_or_default().into_iter().filter(|m| models.contains(m)).collect();
        if left.is_empty() {
            return Ok(Eviction::Unloaded(models));
        }
        if began.elapsed() > UNLOAD_TIME {
            return Ok(Eviction::StillLoaded(left));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Names of the loaded models; `None` if nobody listens.
fn loaded(at: SocketAddr) -> Result<Option<Vec<String>>, OllamaError> {
    let Some(answer) = call(at, "GET", "/api/ps", "")? else { return Ok(None) };
    let wrong = |what: &str| OllamaError::Answer { address: at, what: what.into() };
    let answer: Json = serde_json::from_str(&answer).map_err(|_| wrong("/api/ps did not answer with JSON"))?;
    let models = answer.get("models").and_then(Json::as_array).ok_or_else(|| wrong("/api/ps names no models"))?;
    let names = models.iter().filter_map(|m| m.get("name")?.as_str().map(str::to_owned));
    Ok(Some(names.take(MODELS_MAX).collect()))
}

/// One request; the body of the answer, or `None` if nobody listens.
fn call(at: SocketAddr, method: &str, path: &str, body: &str) -> Result<Option<String>, OllamaError> {
    let Ok(mut stream) = TcpStream::connect_timeout(&at, CONNECT_TIME) else { return Ok(None) };
    let wrong = |what: String| OllamaError::Answer { address: at, what };
    // HTTP 1.0: the answer comes in one piece and ends with the connection.
    let request = format!(
        "{method} {path} HTTP/1.0\r\nHost: {at}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = exchange(&mut stream, request.as_bytes()).map_err(|e| wrong(format!("{path}: {e}")))?;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| wrong(format!("{path}: that is no HTTP")))?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    if !head.starts_with("HTTP/1.") || status != "200" {
        let line: String =
            head.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).take(80).collect();
        return Err(wrong(format!("{path} answered {line:?}")));
    }
    Ok(Some(body.to_owned()))
}

/// Sends, and reads until the end, a limit or the time is reached.
fn exchange(stream: &mut TcpStream, request: &[u8]) -> std::io::Result<Vec<u8>> {
    let until = Instant::now() + ANSWER_TIME;
    stream.set_write_timeout(Some(ANSWER_TIME))?;
    stream.write_all(request)?;
    let (mut answer, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(std::io::Error::other(format!("no whole answer within {} s", ANSWER_TIME.as_secs())));
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part)? {
            0 => return Ok(answer),
            n => answer.extend_from_slice(&part[..n]),
        }
        if answer.len() as u64 > ANSWER_BYTES_MAX {
            return Err(std::io::Error::other("the answer is longer than 1 MiB"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::sync::mpsc;

    use super::*;

    /// Answers each request by `answer`, which gets its first line and its body; tells what was asked.
    fn server(
        mut answer: impl FnMut(&str, &str) -> String + Send + 'static,
    ) -> (SocketAddr, mpsc::Receiver<(String, String)>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.unwrap());
                let (mut first, mut len) = (String::new(), 0);
                stream.read_line(&mut first).unwrap();
                loop {
                    let mut line = String::new();
                    stream.read_line(&mut line).unwrap();
                    if let Some(n) = line.strip_prefix("Content-Length: ") {
                        len = n.trim().parse().unwrap();
                    }
                    if line.trim().is_empty() {
                        break;
                    }
                }
                let mut body = vec![0; len];
                stream.read_exact(&mut body).unwrap();
                let body = String::from_utf8(body).unwrap();
                let text = answer(&first, &body);
                let _ = stream.get_mut().write_all(text.as_bytes());
                if tell.send((first, body)).is_err() {
                    return;
                }
            }
        });
        (at, told)
    }

    fn ok(body: &str) -> String {
        format!("HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{body}")
    }

    #[test]
    fn each_loaded_model_is_asked_to_go() {
        let mut loaded = vec!["a:7b".to_owned(), "b\"x".to_owned()];
        let (at, told) = server(move |first, body| {
            if first.starts_with("POST /api/generate ") {
                let body: Json = serde_json::from_str(body).unwrap();
                assert_eq!(body["keep_alive"], 0);
                loaded.retain(|m| body["model"] != m.as_str());
                return ok("{\"done\":true}");
            }
            ok(&json!({ "models": loaded.iter().map(|m| json!({ "name": m })).collect::<Vec<_>>() }).to_string())
        });
        assert_eq!(evict(at).unwrap(), Eviction::Unloaded(vec!["a:7b".into(), "b\"x".into()]));
        let lines: Vec<_> =
            told.try_iter().map(|(first, _)| first.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(lines[..3], ["GET /api/ps", "POST /api/generate", "POST /api/generate"]);
    }

    #[test]
    fn nothing_loaded_and_nobody_there_are_told_apart() {
        let (at, _told) = server(|_, _| ok("{\"models\":[]}"));
        assert_eq!(evict(at).unwrap(), Eviction::Unloaded(Vec::new()));
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert_eq!(evict(gone).unwrap(), Eviction::NotThere(gone));
    }

    #[test]
    fn strangers_are_named() {
        for (answer, words) in [
            ("SSH-2.0-x\r\n".to_owned(), "no HTTP"),
            ("HTTP/1.1 404 Not Found\r\n\r\n".into(), "404"),
            (ok("<html>"), "JSON"),
            (ok("{}"), "no models"),
            (ok(&"x".repeat(2 << 20)), "1 MiB"),
        ] {
            let (at, _told) = server(move |_, _| answer.clone());
            let e = evict(at).unwrap_err().to_string();
            assert!(e.contains(words), "{e}");
        }
    }

    #[test]
    fn only_this_machine_is_asked() {
        let at = |s: &str| address(Some(s)).map(|a| a.to_string()).ok();
        assert_eq!(address(None).unwrap().to_string(), "127.0.0.1:11434");
        for (text, wanted) in [
            ("", "127.0.0.1:11434"),
            ("127.0.0.1", "127.0.0.1:11434"),
            ("0.0.0.0:8080", "127.0.0.1:8080"),
            (":9", "127.0.0.1:9"),
            ("http://localhost:12/", "127.0.0.1:12"),
            ("[::1]:7", "[::1]:7"),
        ] {
            assert_eq!(at(text).as_deref(), Some(wanted), "{text}");
        }
        for bad in ["10.0.0.1", "https://127.0.0.1", "example.org:11434", "127.0.0.1:x", "127.0.0.1/path"] {
            assert!(at(bad).is_none(), "{bad}");
        }
    }
}
