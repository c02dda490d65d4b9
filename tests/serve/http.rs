//! A server that a test starts, and a client of a few lines that can also misbehave.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value as Json;

use super::common::bin;

/// The longest that anything may take with a tiny model.
const PATIENCE: Duration = Duration::from_secs(60);

/// The longest that anything may take: a model that is soaked may be a large one, and many wait for it.
fn patience() -> Duration {
    std::env::var_os("NT_SOAK_MODEL").map_or(PATIENCE, |_| 60 * PATIENCE)
}

/// Where models are computed: on processors, unless NT_TEST_BACKEND says otherwise.
pub fn backend() -> String {
    std::env::var("NT_TEST_BACKEND").unwrap_or_else(|_| "cpu".into())
}

/// `nt serve` of a model; it ends with this.
pub struct Server {
    child: Child,
    pub at: SocketAddr,
}

impl Server {
    /// Serves on processors, with one thread, at a free port; returns once the model is there.
    pub fn start(model: &Path, more: &[&str]) -> Server {
        Server::start_with(model, more, &[])
    }

    /// The same with variables of its environment.
    pub fn start_with(model: &Path, more: &[&str], env: &[(&str, &str)]) -> Server {
        Server::start_all_with(&[model], more, env)
    }

    /// Serves several models; returns once the first is there.
    pub fn start_all(models: &[&Path], more: &[&str]) -> Server {
        Server::start_all_with(models, more, &[])
    }

    fn start_all_with(models: &[&Path], more: &[&str], env: &[(&str, &str)]) -> Server {
        let mut command = Command::new(bin());
        command.envs(env.iter().copied());
        command.arg("serve").args(models).args(["--port", "0", "--backend", &backend(), "--threads", "1"]).args(more);
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = String::new();
        let at = loop {
            let line = lines.next().unwrap_or_else(|| panic!("no address was told: {said}")).unwrap();
            if let Some(rest) = line.split("http://").nth(1) {
                break rest.split(' ').next().unwrap().parse().unwrap();
            }
            said.push_str(&line);
        };
        // What comes later is read, so that the server never waits for it.
        std::thread::spawn(move || lines.for_each(drop));
        let server = Server { child, at };
        let began = Instant::now();
        while server.get("/health").status != 200 {
            assert!(began.elapsed() < patience(), "the model is not loaded");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.at).unwrap();
        stream.set_read_timeout(Some(patience())).unwrap();
        stream.set_write_timeout(Some(patience())).unwrap();
        stream
    }

    /// Sends a request and leaves the answer to the caller.
    pub fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            self.at,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // A server that has refused already need not take it.
        let _ = stream.write_all(body);
        stream
    }

    pub fn get(&self, path: &str) -> Reply {
        Reply::read(self.send("GET", path, "", b""))
    }

    pub fn post(&self, path: &str, body: &Json) -> Reply {
        Reply::read(self.send("POST", path, "", body.to_string().as_bytes()))
    }

    /// An answer that is expected.
    pub fn ok(&self, path: &str, body: &Json) -> Json {
        let reply = self.post(path, body);
        assert_eq!(reply.status, 200, "{body}\n{}", reply.body);
        reply.json()
    }

    /// A metric.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until a metric has a value.
    pub fn until(&self, name: &str, wanted: impl Fn(f64) -> bool) {
        let began = Instant::now();
        loop {
            let found = self.metric(name);
            if wanted(found) {
                return;
            }
            assert!(began.elapsed() < patience(), "{name} stays {found}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// How it ends after a signal.
    pub fn ended(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(began.elapsed() < patience(), "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Files that it has open, connections among them.
    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Its threads.
    pub fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().count()
    }

    /// A client that sends one request after the other on a connection.
    pub fn client(&self) -> Client {
        Client { at: self.at, stream: None }
    }

    /// Resident memory, in bytes.
    pub fn rss(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client that keeps its connection.
pub struct Client {
    at: SocketAddr,
    stream: Option<BufReader<TcpStream>>,
}

impl Client {
    /// Sends a request and reads its answer.
    pub fn post(&mut self, path: &str, body: &[u8]) -> Reply {
        let mut stream = self.stream.take().unwrap_or_else(|| {
            let stream = TcpStream::connect(self.at).unwrap();
            stream.set_read_timeout(Some(patience())).unwrap();
            BufReader::new(stream)
        });
        let head = format!("POST {path} HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\r\n", self.at, body.len());
        stream.get_mut().write_all(&[head.as_bytes(), body].concat()).unwrap();
        let mut bytes = Vec::new();
        while !bytes.ends_with(b"\r\n\r\n") {
            assert!(
                stream.read_until(b'\n', &mut bytes).unwrap() > 0,
                "no answer to {}",
                String::from_utf8_lossy(body)
            );
        }
        let head = String::from_utf8_lossy(&bytes).to_lowercase();
        let length = head.split("content-length: ").nth(1).map(|l| l.lines().next().unwrap().parse::<usize>().unwrap());
        match length {
            Some(n) => {
                let at = bytes.len();
                bytes.resize(at + n, 0);
                stream.read_exact(&mut bytes[at..]).unwrap();
            }
            None => {
                while !bytes.ends_with(b"\r\n0\r\n\r\n") {
                    assert!(stream.read_until(b'\n', &mut bytes).unwrap() > 0, "an answer without an end");
                }
            }
        }
        if !head.contains("connection: close") {
            self.stream = Some(stream);
        }
        Reply::parse(&bytes)
    }
}

/// What a server answered.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Reply {
    /// Reads to the connection's end.
    pub fn read(mut stream: TcpStream) -> Reply {
        let mut bytes = Vec::new();
        // A server that has refused a body may reset the connection behind its answer.
        let ended = stream.read_to_end(&mut bytes);
        let waited = ended.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!waited, "nothing came for {:?}, behind {:?}", patience(), String::from_utf8_lossy(&bytes));
        Reply::parse(&bytes)
    }

    pub fn parse(bytes: &[u8]) -> Reply {
        let at = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| {
            panic!("no answer in {:?}", String::from_utf8_lossy(bytes));
        });
        let head = String::from_utf8_lossy(&bytes[..at]).to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = &bytes[at + 4..];
        let body = if head.contains("transfer-encoding: chunked") { unchunked(body) } else { body.to_vec() };
        Reply { status, head, body: String::from_utf8(body).unwrap() }
    }

    pub fn json(&self) -> Json {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The objects of a stream, and whether `[DONE]` ends it.
    pub fn events(&self) -> (Vec<Json>, bool) {
        let data: Vec<&str> = self.body.split("\n\n").filter_map(|e| e.strip_prefix("data: ")).collect();
        let done = data.last() == Some(&"[DONE]");
        let n = data.len() - usize::from(done);
        (data[..n].iter().map(|d| serde_json::from_str(d).unwrap()).collect(), done)
    }
}

fn unchunked(mut body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let Some(at) = body.windows(2).position(|w| w == b"\r\n") else { return out };
        let n = usize::from_str_radix(std::str::from_utf8(&body[..at]).unwrap(), 16).unwrap();
        body = &body[at + 2..];
        if n == 0 || n > body.len() {
            return out;
        }
        out.extend(&body[..n]);
        body = &body[(n + 2).min(body.len())..];
    }
}
