//! What no client sends by mistake: floods of headers, bodies of two lengths, nesting without an end, names of this
//! machine that are somebody else's.

use std::io::{Read, Write};
use std::time::Duration;

use serde_json::json;

use super::hostile::{served, short};
use super::http::{Reply, Server};

/// Sends bytes as they are and reads to the end; the status, or `None` where the connection just ended.
fn raw(server: &Server, bytes: &[u8]) -> (Option<u16>, String) {
    let mut stream = server.connect();
    // A request that never gets whole has no answer, which is one too.
    stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let text = String::from_utf8_lossy(&answer).into_owned();
    (text.split(' ').nth(1).and_then(|s| s.parse().ok()), text)
}

#[test]
fn heads_that_are_none_or_have_no_end_are_refused() {
    let (_dir, server) = served(&[]);
    let at = server.at;
    let many = (0..5000).map(|i| format!("x-{i}: 1\r\n")).collect::<String>();
    let long = format!("x: {}\r\n", "y".repeat(1 << 20));
    for (head, body) in [
        (format!("GET /health HTTP/1.1\r\nConnection: close\r\nHost: {at}\r\n{many}\r\n"), ""),
        (format!("GET /health HTTP/1.1\r\nConnection: close\r\nHost: {at}\r\n{long}\r\n"), ""),
        (format!("GET /{} HTTP/1.1\r\nConnection: close\r\nHost: {at}\r\n\r\n", "a".repeat(1 << 20)), ""),
        (
            format!(
                "POST /v1/completions HTTP/1.1\r\nConnection: close\r\nHost: {at}\r\nContent-Length: 2\r\nContent-Length: 200\r\n\r\n"
            ),
            "{}",
        ),
        (
            format!("POST /v1/completions HTTP/1.1\r\nConnection: close\r\nHost: {at}\r\nContent-Length: -2\r\n\r\n"),
            "{}",
        ),
        (
            format!(
                "POST /v1/completions HTTP/1.1\r\nConnection: close\r\nHost: {at}\r\nContent-Length: 18446744073709551616\r\n\r\n"
            ),
            "{}",
        ),
        (
            format!(
                "POST /v1/completions HTTP/1.1\r\nConnection: close\r\nHost: {at}\r\nContent-Length: 18446744073709551615\r\n\r\n"
            ),
            "{}",
        ),
        (
            format!(
                "POST /v1/completions HTTP/1.1\r\nConnection: close\r\nHost: {at}\r\nTransfer-Encoding: chunked\r\n\r\n"
            ),
            "fffffffffffffffff\r\nx",
        ),
        (
            format!(
                "POST /v1/completions HTTP/1.1\r\nConnection: close\r\nHost: {at}\r\nTransfer-Encoding: chunked\r\n\r\n"
            ),
            "zz\r\nx\r\n0\r\n\r\n",
        ),
        (
            format!(
                "POST /v1/completions HTTP/1.1\r\nConnection: close\r\nHost: {at}\r\nTransfer-Encoding: gzip\r\n\r\n"
            ),
            "{}",
        ),
        (format!("CONNECT evil.example:443 HTTP/1.1\r\nConnection: close\r\nHost: {at}\r\n\r\n"), ""),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), ""),
    ] {
        let (status, text) = raw(&server, [head.as_bytes(), body.as_bytes()].concat().as_slice());
        let shown: String = head.chars().take(100).collect();
        assert!(
            status.is_none_or(|s| (400..500).contains(&s)),
            "{shown}: {}",
            text.chars().take(300).collect::<String>()
        );
    }
    // A chunk whose extension has no end.
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nConnection: close\r\nHost: {at}\r\nTransfer-Encoding: chunked\r\n\r\n2;"
    );
    let (status, _) = raw(&server, [head.as_bytes(), &b"e".repeat(4 << 20)].concat().as_slice());
    assert!(status.is_none_or(|s| (400..500).contains(&s)), "{status:?}");
    // Two requests in one by two lengths: only one of them is a request.
    let smuggled = "POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}";
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nConnection: close\r\nHost: {at}\r\nContent-Length: {}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}",
        smuggled.len() + 5
    );
    let (_, text) = raw(&server, head.as_bytes());
    assert!(text.matches("HTTP/1.1 200").count() == 0, "{text}");
    server.ok("/v1/completions", &short());
}

#[test]
fn many_requests_on_one_connection_are_answered_in_turn() {
    let (_dir, server) = served(&[]);
    let one = format!("GET /health HTTP/1.1\r\nHost: {}\r\n\r\n", server.at);
    let last = one.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n");
    let (_, text) = raw(&server, (one.repeat(500) + &last).as_bytes());
    assert_eq!(text.matches("HTTP/1.1 200").count(), 501);
}

#[test]
fn no_path_reaches_a_file() {
    let (_dir, server) = served(&[]);
    for path in [
        "/../../../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/etc/passwd",
        "/v1/models/../../../etc/passwd",
        "/v1/models/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/models//etc/passwd",
        "/page.html",
        "/src/serve/page.html",
        "/.git/config",
        "/m.gguf",
        "/v1/models/%00",
        "/?file=/etc/passwd",
        "/v1/models/%ff%fe",
        "http://evil.example/etc/passwd",
        "/slots/0?action=save&filename=../../x",
    ] {
        let reply = server.get(path);
        assert!(matches!(reply.status, 400 | 403 | 404 | 405) || path.starts_with("/?"), "{path}: {}", reply.status);
        assert!(!reply.body.contains("root:") && reply.body.len() < 600, "{path}: {}", reply.body);
    }
    // A model's name is a name.
    for name in ["../../etc/passwd", "/etc/passwd", "m\u{0}", "file:///etc/passwd"] {
        let mut request = short();
        request["model"] = name.into();
        assert_eq!(server.post("/v1/completions", &request).status, 404, "{name}");
    }
}

/// A page of another site that gives this machine a name of its own, or that a browser sends here without an origin.
#[test]
fn names_and_pages_of_others_are_refused() {
    let (_dir, server) = served(&[]);
    let port = server.at.port();
    let ask = |head: &str| raw(&server, format!("GET /props HTTP/1.1\r\nConnection: close\r\n{head}\r\n").as_bytes()).0;
    for host in [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1.nip.io",
        "0.0.0.0",
        "[::]",
        "10.0.0.1",
        "localhost.",
        "evil@localhost",
        "[::1].evil.example",
        "[::1]evil",
        "localhost:x",
        "127.0.0.1:80@evil.example",
        "2130706433.x",
    ] {
        assert_eq!(ask(&format!("Host: {host}\r\n")), Some(403), "{host}");
    }
    for host in ["localhost", "127.0.0.1", "[::1]", "LocalHost", "127.1.2.3"] {
        assert_eq!(ask(&format!("Host: {host}:{port}\r\n")), Some(200), "{host}");
    }
    let host = format!("Host: localhost:{port}\r\n");
    for head in [
        "Origin: null\r\n",
        "Origin: http://localhost:1\r\n",
        "Origin: http://evil\u{e9}.example\r\n",
        "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\n",
        "Sec-Fetch-Site: same-site\r\nSec-Fetch-Mode: cors\r\n",
        "Host: evil.example\r\n",
    ] {
        let status = ask(&format!("{host}{head}"));
        assert!(matches!(status, Some(400 | 403)), "{head}: {status:?}");
    }
    // Its own page, a link to it, and clients that are no browsers.
    for head in [
        format!("Origin: http://localhost:{port}\r\nSec-Fetch-Site: same-origin\r\n"),
        "Sec-Fetch-Site: none\r\nSec-Fetch-Mode: navigate\r\n".to_owned(),
        "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\n".to_owned(),
    ] {
        assert_eq!(ask(&format!("{host}{head}")), Some(200), "{head}");
    }
}

#[test]
fn json_that_is_deep_wide_or_odd_is_answered() {
    let (_dir, server) = served(&[]);
    let deep = |open: &str, close: &str, n: usize| format!("{}1{}", open.repeat(n), close.repeat(n));
    let nested = deep("{\"a\":", "}", 100_000);
    let list = deep("[", "]", 100_000);
    let tool = |args: &str| {
        let call = json!({ "id": "x", "type": "function", "function": { "name": "f", "arguments": args } });
        json!({ "messages": [
            { "role": "user", "content": "x" }, { "role": "assistant", "content": null, "tool_calls": [call] },
            { "role": "tool", "tool_call_id": "x", "content": "y" },
        ], "max_tokens": 2 })
        .to_string()
    };
    for body in [
        nested.clone(),
        list.clone(),
        format!("{{\"prompt\":{list}}}"),
        format!("{{\"messages\":[{{\"role\":\"user\",\"content\":{list}}}]}}"),
        format!(
            "{{\"messages\":[{{\"role\":\"user\",\"content\":\"x\"}}],\"response_format\":{{\"type\":\"json_schema\",\"json_schema\":{{\"name\":\"x\",\"schema\":{nested}}}}}}}"
        ),
        format!("{{\"messages\":[{{\"role\":\"user\",\"content\":\"x\"}}],\"chat_template_kwargs\":{nested}}}"),
        tool(&nested),
        tool(&list),
        tool("{\"a\":1e999}"),
        "{\"prompt\":\"\\ud800\"}".into(),
        "{\"prompt\":\"x\",\"prompt\":\"y\",\"max_tokens\":1e400}".into(),
        "{\"prompt\":\"x\",\"max_tokens\":99999999999999999999999}".into(),
        "{\"prompt\":\"x\",\"seed\":-99999999999999999999999}".into(),
        "\u{feff}{\"prompt\":\"x\",\"max_tokens\":1}".into(),
        "{\"prompt\":\"x\",\"max_tokens\":1}{".into(),
        format!(
            "{{{}\"prompt\":\"x\",\"max_tokens\":1}}",
            (0..50_000).map(|i| format!("\"k{i}\":0,")).collect::<String>()
        ),
    ] {
        for path in [
            "/v1/completions",
            "/v1/chat/completions",
            "/v1/responses",
            "/v1/messages",
            "/api/chat",
            "/api/show",
            "/apply-template",
        ] {
            let reply = Reply::read(server.send("POST", path, "", body.as_bytes()));
            let shown: String = body.chars().take(80).collect();
            assert!(
                matches!(reply.status, 200 | 400 | 404 | 422 | 501),
                "{path} {shown}: {} {}",
                reply.status,
                reply.body
            );
            assert!(reply.body.len() < 8000, "{path} {shown}: {} bytes", reply.body.len());
        }
    }
    server.ok("/v1/completions", &short());
}
