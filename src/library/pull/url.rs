//! Addresses of files: `http` and `https` alone, without a user's name in them.

use std::fmt;

use ureq::http::Uri;

use super::PullError;

/// An address that may be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Url {
    uri: Uri,
}

impl Url {
    /// Reads one; a fragment is left out.
    pub fn parse(text: &str) -> Result<Url, &'static str> {
        let text = text.split('#').next().unwrap_or_default();
        let uri: Uri = text.parse().map_err(|_| "it is no address")?;
        match uri.scheme_str() {
            Some("http" | "https") => {}
            Some(_) => return Err("its scheme is neither https nor http"),
            None => return Err("it has no scheme"),
        }
        let authority = uri.authority().filter(|a| !a.host().is_empty()).ok_or("it names no host")?;
        if authority.as_str().contains('@') {
            return Err("it has a user's name or password in it, which may end up in logs");
        }
        Ok(Url { uri })
    }

    /// Where a redirect leads.
    pub fn join(&self, location: &str) -> Result<Url, &'static str> {
        let location = escaped(location);
        let scheme = self.uri.scheme_str().unwrap_or_default();
        let origin = format!("{scheme}://{}", self.authority());
        let is_whole = location.split_once(':').is_some_and(|(scheme, _)| {
            scheme.starts_with(|c: char| c.is_ascii_alphabetic())
                && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
        });
        let whole = if is_whole {
            location
        } else if location.starts_with("//") {
            format!("{scheme}:{location}")
        } else if location.starts_with('/') {
            format!("{origin}{location}")
        } else if location.starts_with('?') {
            format!("{origin}{}{location}", self.path())
        } else {
            let folder = self.path().rsplit_once('/').map_or("", |(folder, _)| folder);
            format!("{origin}{folder}/{location}")
        };
        let url = Url::parse(&whole)?;
        match (self.is_secure(), url.is_secure()) {
            (true, false) => Err("it leads from https to http, where others could change the file"),
            _ => Ok(url),
        }
    }

    /// The address at `path` below this one.
    pub fn below(&self, path: &str) -> Result<Url, PullError> {
        self.with_path(&format!("{}{path}", self.path().trim_end_matches('/')))
    }

    /// The same with another path; a query stays.
    pub fn with_path(&self, path: &str) -> Result<Url, PullError> {
        let query = self.uri.query().map_or_else(String::new, |q| format!("?{q}"));
        let text = format!("{}://{}{path}{query}", self.uri.scheme_str().unwrap_or_default(), self.authority());
        Url::parse(&text).map_err(|why| PullError::Usage(format!("{}: {why}", shown(&text))))
    }

    /// Whether it is https.
    pub fn is_secure(&self) -> bool {
        self.uri.scheme_str() == Some("https")
    }

    /// Whether it is this machine.
    pub fn is_local(&self) -> bool {
        let host = self.host().trim_matches(['[', ']']);
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    /// Scheme, host and port are the same.
    pub fn same_origin(&self, other: &Url) -> bool {
        let of = |u: &Url| {
            let port = u.uri.port_u16().unwrap_or(if u.is_secure() { 443 } else { 80 });
            (u.is_secure(), u.host().to_ascii_lowercase(), port)
        };
        of(self) == of(other)
    }

    /// The host, without its port.
    pub fn host(&self) -> &str {
        self.uri.host().unwrap_or_default()
    }

    /// The path, percent-encoded.
    pub fn path(&self) -> &str {
        self.uri.path()
    }

    /// For people and records: without the query, which may hold a key.
    pub fn shown(&self) -> String {
        shown(&self.to_string())
    }

    fn authority(&self) -> &str {
        self.uri.authority().map_or("", |a| a.as_str())
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.uri.fmt(f)
    }
}

/// An address without its query and without a user in it.
pub(super) fn shown(text: &str) -> String {
    let text = text.split(['?', '#']).next().unwrap_or_default();
    let text = match text.split_once("://") {
        Some((scheme, rest)) => {
            let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            format!("{scheme}://{}{path}", host.rsplit('@').next().unwrap_or_default())
        }
        None => text.to_owned(),
    };
    super::super::printable(&text)
}

/// Bytes that no address may have, percent-encoded; what is encoded already stays so.
fn escaped(text: &str) -> String {
    let keep = |b: u8| b.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(&b);
    text.trim().bytes().map(|b| if keep(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// A name as it stands in a path; `slashes` keeps those.
pub(super) fn encoded(text: &str, slashes: bool) -> String {
    let keep = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b) || slashes && b == b'/';
    text.bytes().map(|b| if keep(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// A name of a path without its encoding; bytes that are no UTF-8 become question marks.
pub(super) fn decoded(text: &str) -> String {
    let (bytes, mut out, mut at) = (text.as_bytes(), Vec::with_capacity(text.len()), 0);
    while let Some(&b) = bytes.get(at) {
        let hex = |i: usize| bytes.get(i).and_then(|b| char::from(*b).to_digit(16));
        match (b, hex(at + 1), hex(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 3;
            }
            _ => {
                out.push(b);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(from: &str, to: &str) -> Result<String, &'static str> {
        Url::parse(from).unwrap().join(to).map(|u| u.to_string())
    }

    #[test]
    fn redirects_lead_where_they_say() {
        let from = "https://h:8/a/b?q=1";
        for (to, found) in [
            ("https://o/x?y=1#z", "https://o/x?y=1"),
            ("//o/x", "https://o/x"),
            ("/x", "https://h:8/x"),
            ("x/y", "https://h:8/a/x/y"),
            ("?k", "https://h:8/a/b?k"),
            ("/a b|é", "https://h:8/a%20b%7C%C3%A9"),
        ] {
            assert_eq!(join(from, to).unwrap(), found, "{to}");
        }
        for wrong in ["http://o/x", "ftp://o/x", "file:///etc/passwd", "https://u:p@o/x", "javascript:x", "//"] {
            assert!(join(from, wrong).is_err(), "{wrong}");
        }
        assert_eq!(join("http://h/a", "https://o/x").unwrap(), "https://o/x");
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same = |a: &str, b: &str| Url::parse(a).unwrap().same_origin(&Url::parse(b).unwrap());
        assert!(same("https://H/a", "https://h:443/b") && same("http://h", "http://h:80/b"));
        for other in ["http://h/", "https://h:444/", "https://h.o/", "https://oh/"] {
            assert!(!same("https://h/", other), "{other}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        assert_eq!(shown("https://u:p@h/x@y?key=1"), "https://h/x@y");
        assert_eq!(decoded("a%2Fb%zz%"), "a/b%zz%");
    }
}
