//! `nt pull`: a model's files over HTTP, into the library.
//!
//! Each file is asked for by its first byte, so that its length, version and checksum are known before anything is
//! written. Its bytes go to `NAME.part`; once all files of the model are whole, durable, of the right checksum and have
//! headers that fit each other, they get their names, the first shard last. What breaks off stays, and the next run
//! goes on from there if the server still has the same file.

mod http;
mod part;
mod source;
mod url;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use http::{Answer, Ask, Client, Head, Trouble};
use part::{Identity, Part};
use source::{Place, Remote};
use url::Url;

use super::printable;
use crate::gguf::Gguf;
use crate::units::format_bytes;

/// Where Hugging Face is.
const ENDPOINT: &str = "https://huggingface.co";
/// Requests for a file that bring nothing, one after the other, at most.
const TRIES: u32 = 5;
/// How often a file may be begun again at most.
const RESTARTS_MAX: u32 = 3;
/// Seconds that a server may ask to wait for.
const WAIT_MAX_S: u64 = 120;
/// Bytes of the file system that are left free.
const SPARE: u64 = 64 << 20;
/// What a GGUF file begins with.
const MAGIC: &[u8] = b"GGUF";

/// What is to be fetched.
#[derive(Clone, Debug)]
pub struct Request {
    /// `https://…`, `http://…` or `hf:OWNER/NAME:FILE`.
    pub reference: String,
    /// The library's folder.
    pub folder: PathBuf,
    /// Branch, tag or commit of a repository of Hugging Face's.
    pub revision: String,
    /// Checksums that the files must have, in order; none if empty.
    pub sha256: Vec<String>,
    /// Where Hugging Face is, if not where it usually is.
    pub endpoint: Option<String>,
    /// Token for it.
    pub token: Option<String>,
    /// The first pause after a request that brought nothing; each further one is twice as long.
    pub pause: Duration,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Number of the file, from 1, and their count.
    pub file: (usize, usize),
    /// Bytes of all files that are there, and that there are to be.
    pub bytes: (u64, u64),
}

/// A file of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PulledFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its checksum; `None` if it was there before and nobody said what it is to be.
    pub sha256: Option<String>,
    /// Whether the checksum was compared with one that the server or the user said.
    pub compared: bool,
}

/// What was fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// What the library calls the model.
    pub name: String,
    /// Its files.
    pub files: Vec<PulledFile>,
    /// Bytes that came over the network.
    pub fetched: u64,
}

/// Why nothing, or not all, was fetched.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    /// There is no room for it.
    #[error("{0}")]
    Room(String),
    /// It failed.
    #[error("{0}")]
    Failed(String),
    /// It was told to stop.
    #[error("stopped; {kept} of {total} are kept, and the same command goes on from there")]
    Stopped {
        /// What is there, as text.
        kept: String,
        /// What there is to be.
        total: String,
    },
}

/// One file, and what is known of it.
struct Wanted {
    remote: Remote,
    to: PathBuf,
    identity: Identity,
    state: State,
}

enum State {
    /// It lies under its name.
    There(Option<String>),
    /// It is to be fetched.
    Missing,
    /// All of it is there, under another name.
    Whole(Box<Part>),
}

struct Pull<'a> {
    request: &'a Request,
    client: Client,
    place: Place,
    progress: &'a mut dyn FnMut(Progress),
    stop: &'a dyn Fn() -> bool,
    fetched: u64,
}

/// Fetches a model into the library. `progress` hears how far it is, and `stop` is asked some twenty times per second.
///
/// # Errors
/// If the reference is none, the file is not to be had or not what it should be, there is no room, or `stop` said so.
pub fn pull(
    request: &Request,
    progress: &mut dyn FnMut(Progress),
    stop: &dyn Fn() -> bool,
) -> Result<Pulled, PullError> {
    let endpoint = request.endpoint.as_deref().filter(|e| !e.trim().is_empty()).unwrap_or(ENDPOINT);
    let endpoint = Url::parse(endpoint.trim()).map_err(|why| {
        PullError::Usage(format!(
            "HF_ENDPOINT={}: {why}; an address such as {ENDPOINT} was expected",
            url::shown(endpoint)
        ))
    })?;
    let revision = &request.revision;
    if revision.is_empty() || revision.chars().any(char::is_control) || revision.split('/').any(|p| p == "..") {
        return Err(PullError::Usage(format!("{revision:?} is no branch, tag or commit")));
    }
    let (place, remotes) = source::files(&request.reference, &endpoint, revision)?;
    let sums = checksums(&request.sha256, &remotes)?;
    let client = Client::new(request.token.as_deref(), &endpoint)?;
    let mut pull = Pull { request, client, place, progress, stop, fetched: 0 };
    let mut wanted = pull.look_at(remotes, &sums)?;
    check_room(&request.folder, &wanted)?;
    pull.fetch_all(&mut wanted)?;
    check_headers(&wanted)?;
    let name = name_of(&wanted[0].remote.to);
    // The first shard last: a model is seen when all of it is there.
    let mut files = Vec::new();
    for w in wanted.into_iter().rev() {
        files.push(w.publish()?);
    }
    files.reverse();
    Ok(Pulled { name, files, fetched: pull.fetched })
}

/// The checksums that the user gave, one for each file or none.
fn checksums(given: &[String], remotes: &[Remote]) -> Result<Vec<Option<String>>, PullError> {
    if given.is_empty() {
        return Ok(vec![None; remotes.len()]);
    }
    if let Some(wrong) = given.iter().find(|s| s.len() != 64 || !s.bytes().all(|b| b.is_ascii_hexdigit())) {
        return Err(PullError::Usage(format!("--sha256 {wrong}: 64 hexadecimal digits were expected")));
    }
    if given.len() != remotes.len() {
        return Err(PullError::Usage(format!(
            "--sha256: {} checksums were given; the model has {} files, and one for each was expected",
            given.len(),
            remotes.len()
        )));
    }
    Ok(given.iter().map(|s| Some(s.to_ascii_lowercase())).collect())
}

/// What the library calls a file: its path below the folder without the end and without the number of its shard.
fn name_of(to: &Path) -> String {
    let text = to.with_extension("").to_string_lossy().into_owned();
    let stem = match text.rsplit_once("-of-") {
        Some((rest, count)) if count.len() == 5 => rest.rsplit_once('-').map(|(model, _)| model.to_owned()),
        _ => None,
    };
    printable(&stem.unwrap_or(text))
}

impl Pull<'_> {
    /// Asks for each file what it is, and looks at what is there of it.
    fn look_at(&mut self, remotes: Vec<Remote>, sums: &[Option<String>]) -> Result<Vec<Wanted>, PullError> {
        let mut wanted: Vec<Wanted> = Vec::new();
        let mut commit: Option<String> = None;
        for (remote, sum) in remotes.into_iter().zip(sums) {
            let remote = match &commit {
                // All shards of one version of the repository.
                Some(commit) => Remote { url: self.pinned(&remote, commit)?, ..remote },
                None => remote,
            };
            let (identity, found) = self.identify(&remote, sum.as_deref())?;
            if matches!(self.place, Place::Hub { .. }) {
                commit = commit.or(found);
            }
            let to = self.request.folder.join(&remote.to);
            let state = self.present(&to, &identity)?;
            wanted.push(Wanted { remote, to, identity, state });
        }
        Ok(wanted)
    }

    /// The address of a repository's file at a commit.
    fn pinned(&self, remote: &Remote, commit: &str) -> Result<Url, PullError> {
        let from = format!("/resolve/{}/", url::encoded(&self.request.revision, false));
        remote.url.with_path(&remote.url.path().replacen(&from, &format!("/resolve/{commit}/"), 1))
    }

    /// What a file is, as the server has it now, and the commit it is of.
    fn identify(&mut self, remote: &Remote, sum: Option<&str>) -> Result<(Identity, Option<String>), PullError> {
        let ask = Ask { url: remote.url.clone(), range: Some((0, Some(0))), if_range: None };
        let head = self.patiently(remote, &ask)?.head;
        let failed = |what: String| Err(PullError::Failed(format!("{}: {what}", remote.url.shown())));
        let total = head.total.or(head.linked_size).filter(|_| matches!(head.status, 200 | 206 | 416));
        let Some(total) = total else {
            return failed(
                "the server does not say how long the file is, so that nobody could tell whether all of it came".into(),
            );
        };
        if head.linked_size.is_some_and(|size| size != total) {
            let size = head.linked_size.unwrap_or_default();
            return failed(format!("the file is to have {size} bytes, and the server that has it says {total}"));
        }
        if total < MAGIC.len() as u64 {
            return failed(format!("it has {total} bytes, and is no GGUF file"));
        }
        if let (Some(said), Some(given)) = (&head.sha256, sum)
            && said != given
        {
            return failed(format!("its sha256 is {said} as the server has it, and {given} was expected"));
        }
        let sha256 = sum.map(str::to_owned).or(head.sha256);
        Ok((Identity { from: remote.url.shown(), total, sha256, tag: head.tag }, head.commit))
    }

    /// Whether the file lies under its name already.
    fn present(&self, to: &Path, identity: &Identity) -> Result<State, PullError> {
        let Ok(meta) = fs::metadata(to) else {
            return match fs::symlink_metadata(to) {
                Ok(_) => Err(PullError::Failed(format!("{}: it is a link to nothing; remove it first", to.display()))),
                Err(_) => Ok(State::Missing),
            };
        };
        let other = |why: String| {
            Err(PullError::Failed(format!(
                "{}: there is another file of this name ({why}); remove it, or name another folder with --dir",
                to.display()
            )))
        };
        if !meta.is_file() {
            return other("no regular one".into());
        }
        if meta.len() != identity.total {
            return other(format!("{} bytes; {} were expected", meta.len(), identity.total));
        }
        let Some(expected) = &identity.sha256 else { return Ok(State::There(None)) };
        let sum = part::sha256_of(to, self.stop);
        match sum.map_err(|e| PullError::Failed(format!("{}: {e}", to.display())))? {
            None => Err(stopped(0, identity.total)),
            Some(sum) if sum == *expected => Ok(State::There(Some(sum))),
            Some(sum) => other(format!("sha256 {sum}; {expected} was expected")),
        }
    }

    fn fetch_all(&mut self, wanted: &mut [Wanted]) -> Result<(), PullError> {
        let total: u64 = wanted.iter().map(|w| w.identity.total).sum();
        let (count, mut before) = (wanted.len(), 0);
        for (i, w) in wanted.iter_mut().enumerate() {
            if matches!(w.state, State::Missing) {
                let base = Progress { file: (i + 1, count), bytes: (before, total) };
                let folder = w.to.parent().unwrap_or(Path::new("."));
                fs::create_dir_all(folder)
                    .map_err(|e| PullError::Failed(format!("making the folder {} failed: {e}", folder.display())))?;
                w.state = State::Whole(Box::new(self.fetch(w, base)?));
            }
            before += w.identity.total;
        }
        Ok(())
    }

    /// Fetches one file, with as many requests as it takes.
    fn fetch(&mut self, w: &mut Wanted, base: Progress) -> Result<Part, PullError> {
        let (progress, stop) = (&mut *self.progress, self.stop);
        let at = |len: u64| Progress { bytes: (base.bytes.0 + len, base.bytes.1), ..base };
        let part = Part::open(&w.to, &w.identity, &mut |len| progress(at(len)), stop)?;
        let Some(mut part) = part else { return Err(stopped(base.bytes.0, base.bytes.1)) };
        let (mut failures, mut restarts) = (0, 0);
        while part.len() < part.identity().total {
            let (before, tries) = (part.len(), restarts);
            let ended = self.attempt(w, &mut part, &mut restarts, base);
            if (self.stop)() {
                part.record()?;
                return Err(stopped(base.bytes.0 + part.len(), base.bytes.1));
            }
            let why = match ended {
                Ok(()) if part.len() == part.identity().total => break,
                Ok(()) => passing(format!("the file ended at byte {}", part.len())),
                Err(Ended::Broken(why)) => why,
                Err(Ended::Lost(e)) => {
                    // What cannot be written now may be on the drive nevertheless.
                    let _ = part.record();
                    return Err(e);
                }
            };
            failures = if part.len() > before && restarts == tries { 0 } else { failures + 1 };
            part.record()?;
            if restarts > RESTARTS_MAX || failures >= TRIES || !why.passing {
                let total = part.identity().total;
                let kept =
                    format!("{} of {} bytes are kept, and the same command goes on from there", part.len(), total);
                return Err(PullError::Failed(format!("{}: {}; {kept}", w.remote.url.shown(), why.what)));
            }
            tracing::info!("{}: {}; asking again", w.remote.url.shown(), why.what);
            self.wait(self.request.pause * 2u32.pow(failures.saturating_sub(1)));
        }
        part.record()?;
        w.identity = part.identity().clone();
        let (sum, expected) = (part.sha256(), w.identity.sha256.clone());
        if let Some(expected) = expected.filter(|e| *e != sum) {
            part.discard();
            return Err(PullError::Failed(format!(
                "{}: sha256 {sum} came, and {expected} was expected; what came was removed",
                w.remote.url.shown()
            )));
        }
        Ok(part)
    }

    /// One request for what is missing.
    fn attempt(&mut self, w: &Wanted, part: &mut Part, restarts: &mut u32, base: Progress) -> Result<(), Ended> {
        let from = part.len();
        let ask = Ask {
            url: w.remote.url.clone(),
            range: (from > 0).then_some((from, None)),
            if_range: part.identity().tag.clone().filter(|_| from > 0),
        };
        let mut answer = self.send(w, &ask)?;
        let head = &answer.head;
        let same = head.total.is_none_or(|t| t == part.identity().total)
            && (head.tag.is_none() || part.identity().tag.is_none() || head.tag == part.identity().tag);
        if !same || head.status == 416 {
            *restarts += 1;
            tracing::warn!("{}: the file has changed; it is fetched from its beginning", w.remote.url.shown());
            let sum = part.identity().sha256.clone().filter(|_| !self.request.sha256.is_empty());
            let (identity, _) = self.identify(&w.remote, sum.as_deref())?;
            part.restart(&identity)?;
            return Err(passing("the file has changed".into()).into());
        }
        if head.first != from {
            // A server that knows no ranges.
            *restarts += 1;
            part.restart(&part.identity().clone())?;
        }
        self.body(&mut answer, part, base)
    }

    /// Writes what comes.
    fn body(&mut self, answer: &mut Answer, part: &mut Part, base: Progress) -> Result<(), Ended> {
        let total = part.identity().total;
        while let Some(bytes) = answer.piece(self.stop)? {
            self.fetched += bytes.len() as u64;
            if part.len() == 0 && bytes.len() >= MAGIC.len() && !bytes.starts_with(MAGIC) {
                let head = String::from_utf8_lossy(&bytes[..bytes.len().min(16)]).into_owned();
                let what = format!("it is no GGUF file: it begins with {head:?}");
                return Err(Trouble { what, passing: false }.into());
            }
            if bytes.len() as u64 > total - part.len() {
                let what = format!("more than the {total} bytes that were announced came");
                return Err(Trouble { what, passing: false }.into());
            }
            part.write(&bytes)?;
            (self.progress)(Progress { bytes: (base.bytes.0 + part.len(), base.bytes.1), ..base });
        }
        Ok(())
    }

    /// A request whose answer is wanted now or with a reason.
    fn send(&mut self, w: &Wanted, ask: &Ask) -> Result<Answer, Ended> {
        match self.client.ask(ask, self.stop)? {
            None => Err(passing("stopped".into()).into()),
            Some(answer) => match self.refusal(&w.remote, &answer.head) {
                None => Ok(answer),
                Some(why) => {
                    if why.passing {
                        self.wait(Duration::from_secs(answer.head.retry_after.unwrap_or(0)));
                    }
                    Err(why.into())
                }
            },
        }
    }

    /// The same before anything was fetched: tried again a few times.
    fn patiently(&mut self, remote: &Remote, ask: &Ask) -> Result<Answer, PullError> {
        let (mut pause, mut tries) = (self.request.pause, 0);
        loop {
            tries += 1;
            let why = match self.client.ask(ask, self.stop) {
                Ok(None) => return Err(PullError::Stopped { kept: "0 B".into(), total: "what is to come".into() }),
                Ok(Some(answer)) => match self.refusal(remote, &answer.head) {
                    None => return Ok(answer),
                    Some(why) => {
                        pause = pause.max(Duration::from_secs(answer.head.retry_after.unwrap_or(0)));
                        why
                    }
                },
                Err(why) => why,
            };
            if !why.passing || tries >= TRIES {
                return Err(PullError::Failed(format!("{}: {}", remote.url.shown(), why.what)));
            }
            self.wait(pause);
            pause *= 2;
        }
    }

    /// Why an answer is none that can be used.
    fn refusal(&self, remote: &Remote, head: &Head) -> Option<Trouble> {
        let lasting = |what: String| Some(Trouble { what, passing: false });
        match head.status {
            200 | 206 | 416 => None,
            401 | 403 => lasting(match &self.place {
                Place::Hub { repo } => format!(
                    "the server refuses ({}): {repo} may ask for its terms to be accepted on its page; then set HF_TOKEN to a token of yours",
                    head.status
                ),
                Place::Address => format!("the server refuses ({})", head.status),
            }),
            404 | 410 => lasting(match &self.place {
                Place::Hub { repo } => format!(
                    "there is no such file ({}); the page of {repo} lists its files, and --revision names a branch other than main",
                    head.status
                ),
                Place::Address => format!("there is no such file ({})", head.status),
            }),
            408 | 425 | 429 | 500..=599 => {
                let wait = head.retry_after.unwrap_or(0);
                let again = if wait > 0 { format!(", and asks to come again in {wait} s") } else { String::new() };
                let what = format!("the server is busy or broken ({}){again}", head.status);
                Some(Trouble { what, passing: wait <= WAIT_MAX_S })
            }
            other => lasting(format!("the server answered with the status {other} to {}", remote.url.shown())),
        }
    }

    /// Waits, unless it is to stop.
    fn wait(&self, time: Duration) {
        let until = Instant::now() + time;
        while !(self.stop)() {
            match until.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return,
                left => std::thread::sleep(left.min(Duration::from_millis(50))),
            }
        }
    }
}

/// How a request ended before the file did.
enum Ended {
    /// It may go on.
    Broken(Trouble),
    /// Here something went wrong.
    Lost(PullError),
}

impl From<Trouble> for Ended {
    fn from(why: Trouble) -> Ended {
        Ended::Broken(why)
    }
}

impl From<PullError> for Ended {
    fn from(e: PullError) -> Ended {
        Ended::Lost(e)
    }
}

fn passing(what: String) -> Trouble {
    Trouble { what, passing: true }
}

fn stopped(kept: u64, total: u64) -> PullError {
    PullError::Stopped { kept: format_bytes(kept), total: format_bytes(total) }
}

/// Refuses what does not fit the file system, before anything is written.
fn check_room(folder: &Path, wanted: &[Wanted]) -> Result<(), PullError> {
    let missing = wanted.iter().filter(|w| matches!(w.state, State::Missing));
    let needed: u64 = missing.map(|w| w.identity.total - part::kept(&w.to, &w.identity)).sum();
    // The folder, or what it is to be made in.
    let Some(there) = folder.ancestors().find(|f| f.is_dir()) else { return Ok(()) };
    let Ok(stat) = nix::sys::statvfs::statvfs(there) else { return Ok(()) };
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    if needed == 0 || needed.saturating_add(SPARE) <= free {
        return Ok(());
    }
    Err(PullError::Room(format!(
        "{} has {} free; {} are to come, and {} stay free; name another folder with --dir or NT_MODELS",
        there.display(),
        format_bytes(free),
        format_bytes(needed),
        format_bytes(SPARE)
    )))
}

/// Reads the header of each file before it gets its name, and compares shards with each other.
fn check_headers(wanted: &[Wanted]) -> Result<(), PullError> {
    let mut tensors = 0;
    let mut expected = None;
    for w in wanted {
        let (file, len) = match &w.state {
            State::Whole(part) => part.reader()?,
            _ => super::open_regular(&w.to).map_err(|e| PullError::Failed(format!("{}: {e}", w.to.display())))?,
        };
        let unusable = |what: String| {
            PullError::Failed(format!("{what}; it stays as {}.part, and has not become a model", w.to.display()))
        };
        let gguf = Gguf::parse(&w.to, std::io::BufReader::new(file), len).map_err(|e| unusable(e.to_string()))?;
        let (no, count) = w.remote.shard.unwrap_or((0, 1));
        let said = |key: &str, default: u64| gguf.metadata.uint(key).unwrap_or(default);
        let found = (said("split.no", 0), said("split.count", 1).max(1));
        if found != (no.into(), count.into()) {
            let (found_no, found_count) = (found.0.saturating_add(1), found.1);
            let name = w.remote.to.display();
            return Err(unusable(format!(
                "{name} says that it is shard {found_no} of {found_count}; by its name it is {} of {count}",
                no + 1
            )));
        }
        tensors += gguf.tensors.len() as u64;
        expected = expected.or(gguf.metadata.uint("split.tensors.count"));
    }
    match expected.filter(|e| *e != tensors && wanted.len() > 1) {
        None => Ok(()),
        Some(e) => Err(PullError::Failed(format!(
            "{}: split.tensors.count is {e}, but the {} shards hold {tensors} tensors; they stay as .part",
            wanted[0].to.display(),
            wanted.len()
        ))),
    }
}

impl Wanted {
    /// Gives the file its name.
    fn publish(self) -> Result<PulledFile, PullError> {
        let (path, bytes, compared) = (self.to, self.identity.total, self.identity.sha256.is_some());
        let sha256 = match self.state {
            State::There(sum) => sum,
            State::Missing => None,
            State::Whole(part) => {
                let sum = part.sha256();
                part.publish()?;
                Some(sum)
            }
        };
        Ok(PulledFile { path, bytes, sha256, compared })
    }
}

#[cfg(test)]
mod tests;
