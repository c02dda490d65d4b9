//! A device that answers no more ends what computes with it, and nothing else does.

use super::*;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use nt::engine::SamplerParams;
use nt::serve::{Access, Limits, Loaded, Loader, Models, NotLoaded, Over, Pooling, Served, Server};
use nt::tokenizer::ChatTemplate;

/// Loads nothing.
struct Nothing;

impl Loader for Nothing {
    fn load(&mut self, _: usize, _: &dyn Fn() -> bool) -> Result<Loaded, NotLoaded> {
        Err(NotLoaded::Failed("a model is loaded again".into()))
    }

    fn unload(&mut self, _: usize, session: Session) {
        drop(session);
    }
}

fn served(opened: Opened) -> Served {
    Served {
        template: ChatTemplate::new("{{ messages[0].content }}", String::new(), String::new()).unwrap(),
        opened,
        template_source: String::new(),
        names: vec!["m".into()],
        defaults: SamplerParams { temp: 0.0, ..SamplerParams::default() },
        seed: Some(1),
        n_ctx: 64,
        token_bytes_max: 16,
        limits: Limits {
            body: 1 << 20,
            connections: 8,
            queue: 8,
            time: Duration::from_secs(60),
            ping: Duration::from_secs(5),
            tokens: None,
            grace: Duration::from_secs(5),
            keep: None,
        },
        started_unix_s: 0,
        modified_unix_s: 0,
        grammars: std::sync::OnceLock::new(),
        shelf: None,
        pooling: Pooling::Mean,
        embeds: std::sync::OnceLock::new(),
        session: std::sync::RwLock::new(None),
    }
}

/// The answer to a request for a few tokens; none where the server has ended.
fn ask(at: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect(at).ok()?;
    let body = r#"{"prompt":"ab","max_tokens":4}"#;
    let n = body.len();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {at}\r\nContent-Type: application/json\r\nContent-Length: {n}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all((head + body).as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    (!answer.is_empty()).then_some(answer)
}

/// Requests fail one by one where a pass fails; where all will, the server ends and says why.
#[test]
fn a_server_whose_device_answers_no_more_ends() {
    let d = tempfile::tempdir().unwrap();
    let path = tiny(6).write(d.path(), "m.gguf");
    for (tiers, sites) in [(Some(Tiers { a: 1, b: 2, c: 3 }), Sites::One), (None, Sites::Both)] {
        let vram = tiers.is_none().then_some(700 << 10);
        let o = Options { tiers, vram, sites, recent: false, outputs: 4, ..options() };
        let opened = Opened::open(&path).unwrap();
        let memory = Arc::new(Memory { ahead: sites == Sites::Both, ..Memory::default() });
        let session = start(&opened, o, &memory).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let access = Access { keys: Vec::new(), loopback: true, name: "here".into() };
        let server = Server::start(listener, Models::new(vec![served(opened)]).unwrap(), access).unwrap();
        let (fail_at, gone_in) = (memory.fail_at.clone(), memory.gone_in.clone());
        let client = std::thread::spawn(move || {
            let fine = ask(at).unwrap();
            *fail_at.lock().unwrap() = 1;
            let failed = ask(at).unwrap();
            let again = ask(at).unwrap();
            *gone_in.lock().unwrap() = Some(0);
            (fine, failed, again, ask(at).unwrap())
        });
        let loaded = Loaded { session, slots: 1, about: serde_json::Value::Null };
        let over = server.serve(loaded, &mut Nothing, &|| false, &|| false);
        server.end();
        let (fine, failed, again, last) = client.join().unwrap();
        assert!(fine.starts_with("HTTP/1.1 200") && again.starts_with("HTTP/1.1 200"), "{fine}\n{again}");
        assert!(failed.starts_with("HTTP/1.1 500") && failed.contains("the copy engine is gone"), "{failed}");
        assert!(last.starts_with("HTTP/1.1 500") && last.contains("the device is gone"), "{last}");
        let Over::Lost(e) = over else { panic!("{over:?}") };
        let e = e.to_string();
        assert!(e.contains("the device is gone") && e.contains("started again"), "{e}");
        assert_eq!(*memory.used.lock().unwrap(), 0);
    }
}
