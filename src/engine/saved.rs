//! A conversation in a file: its messages, its tokens, and the pages of the cache that hold them, so that it goes on
//! later without its prompt being computed again.
//!
//! Whether the pages are those that this session would have computed is not believed but shown: the first positions
//! are computed anew and must come out bit for bit. Where they do not, since the model, the backend or an option is
//! another, the messages are still of use and the pages are not. That they are those that were written is told by a
//! checksum of each page, behind all of them, and one of the description, which is the last.

use std::fs::{File, Metadata};
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::{EngineError, RequestError, SavedError, Session};
use crate::backend::{Class, Layers};
use crate::model::Outputs;
use crate::state::{PAGE, Pages};
use crate::storage::checksum::crc32c;

/// The first bytes of such a file, and the version of what follows.
const MAGIC: &[u8; 16] = b"nt conversation\n";
const VERSION: u32 = 3;
/// The version before, whose description has no checksum.
const WITHOUT_SUM: u32 = 2;
/// Most bytes of the description behind it: a million tokens and their text.
const DESCRIPTION_MAX: u64 = 64 << 20;

/// What a file of a conversation says of itself.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    version: u32,
    messages: Vec<Json>,
    /// Tokens whose keys and values follow.
    tokens: Vec<u32>,
    /// As many of the first tokens were evaluated as a prompt.
    prompt: usize,
    page: usize,
    page_bytes: usize,
    /// The type of the cache; files of earlier versions do not say it.
    #[serde(default)]
    kv: Option<String>,
    /// Pages of layers that keep recent positions alone, behind the others.
    #[serde(default)]
    recent: Option<RecentPages>,
}

/// Pages of recent positions: the last ones of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct RecentPages {
    window: usize,
    pages: usize,
    page_bytes: usize,
    /// Positions below which the sequence had written.
    written: usize,
}

impl RecentPages {
    /// The pages of a sequence of `tokens` positions, by their place in it.
    fn of(&self, tokens: usize) -> std::ops::Range<usize> {
        let all = Pages::of(tokens);
        all.saturating_sub(self.pages)..all
    }
}

/// A conversation that was read from a file.
#[derive(Debug)]
pub struct Saved {
    file: BufReader<File>,
    path: String,
    description: Description,
    /// Checksums of the pages.
    sums: Vec<u32>,
    /// Pages that were read.
    read: usize,
}

/// Bytes of a page's checksum.
const SUM_BYTES: u64 = 4;

impl Saved {
    /// Reads messages and tokens; pages stay in the file.
    ///
    /// # Errors
    /// If the file cannot be read, or is not whole.
    pub fn open(path: &Path) -> Result<Saved, SavedError> {
        let name = path.display().to_string();
        let io = |source| SavedError::Io { path: name.clone(), source };
        let damaged = |what: String| SavedError::Damaged { path: name.clone(), what };
        let (file, kind) = opened(path).map_err(io)?;
        if !kind.is_file() {
            return Err(damaged("it is not a regular file".into()));
        }
        let mut file = BufReader::new(file);
        let mut head = [0; 24];
        file.read_exact(&mut head).map_err(|_| damaged("it is too short".into()))?;
        if head[..16] != MAGIC[..] {
            return Err(damaged("it begins with other bytes".into()));
        }
        let bytes = u64::from_le_bytes(head[16..].try_into().unwrap_or_default());
        if bytes > DESCRIPTION_MAX {
            return Err(damaged(format!("its description would take {bytes} bytes")));
        }
        let mut text = vec![0; bytes as usize];
        file.read_exact(&mut text).map_err(|_| damaged("its description is cut off".into()))?;
        let d: Description =
            serde_json::from_slice(&text).map_err(|e| damaged(format!("its description cannot be read: {e}")))?;
        if d.version != VERSION && d.version != WITHOUT_SUM {
            return Err(damaged(format!("it is of version {}, and this nt reads {VERSION}", d.version)));
        }
        let pages = d.tokens.len().div_ceil(d.page.max(1)) as u64;
        let recent = d.recent.map_or(0, |r| r.of(d.tokens.len()).len() as u64);
        let of_pages = (d.page_bytes as u64).checked_add(SUM_BYTES).and_then(|n| pages.checked_mul(n));
        let of_recent = d.recent.map_or(Some(0), |r| recent.checked_mul((r.page_bytes as u64).checked_add(SUM_BYTES)?));
        let own_sum = if d.version == WITHOUT_SUM { 0 } else { SUM_BYTES };
        let all = of_pages.zip(of_recent).and_then(|(a, b)| a.checked_add(b)?.checked_add(24 + bytes + own_sum));
        let pages = pages + recent;
        if d.page == 0 || d.prompt > d.tokens.len() || all != Some(kind.len()) {
            return Err(damaged(format!("it has {} bytes, which is not what it describes", kind.len())));
        }
        let sums_bytes = pages * SUM_BYTES + own_sum;
        let mut sums = vec![0; sums_bytes as usize];
        file.get_ref().read_exact_at(&mut sums, kind.len() - sums_bytes).map_err(io)?;
        let mut sums: Vec<u32> = sums.chunks_exact(4).map(|s| u32::from_le_bytes([s[0], s[1], s[2], s[3]])).collect();
        if own_sum > 0 && sums.pop() != Some(crc32c(&text)) {
            return Err(damaged("its description is not the one that was written".into()));
        }
        if let Some(i) = d.messages.iter().position(|m| !m["role"].is_string()) {
            return Err(damaged(format!("message {} of it says nobody's role", i + 1)));
        }
        Ok(Saved { file, path: name, description: d, sums, read: 0 })
    }

    /// The messages.
    pub fn messages(&self) -> &[Json] {
        &self.description.messages
    }

    /// The tokens that it has pages of, and how many of the first were evaluated as a prompt.
    pub fn tokens(&self) -> (&[u32], usize) {
        (&self.description.tokens, self.description.prompt)
    }

    /// Reads the next page. Returns whether it is what was written.
    fn page(&mut self, to: &mut [u8]) -> Result<bool, SavedError> {
        let path = self.path.clone();
        if let Err(source) = self.file.read_exact(to) {
            return Err(SavedError::Io { path, source });
        }
        self.read += 1;
        Ok(self.sums.get(self.read - 1) == Some(&crc32c(to)))
    }
}

/// A file and what it is; a pipe or a device is not waited for.
fn opened(path: &Path) -> std::io::Result<(File, Metadata)> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let kind = file.metadata()?;
    Ok((file, kind))
}

/// An error without the name of the temporary file that it came from.
fn own_words(e: std::io::Error) -> std::io::Error {
    let inner = e.get_ref().and_then(std::error::Error::source).and_then(|s| s.downcast_ref::<std::io::Error>());
    match inner.and_then(std::io::Error::raw_os_error) {
        Some(n) => std::io::Error::from_raw_os_error(n),
        None => e,
    }
}

impl Session {
    /// Writes `messages` and the sequence, whose tokens are `tokens`, to a file. The first `prompt` of them were evaluated
    /// as a prompt. A file that was there is replaced when the new one is whole, if it is one of these.
    ///
    /// # Errors
    /// If another file is in the way, it cannot be written, or pages cannot be read.
    pub fn save(&mut self, path: &Path, messages: &[Json], tokens: &[u32], prompt: usize) -> Result<u64, EngineError> {
        if self.pages.recurrent() {
            return Err(RequestError::NotKept.into());
        }
        let name = path.display().to_string();
        let io = |source| SavedError::Io { path: name.clone(), source: own_words(source) };
        match opened(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(io(e).into()),
            Ok((_, kind)) if !kind.is_file() => return Err(SavedError::InTheWay(name).into()),
            Ok((mut there, _)) => {
                let mut head = [0; 16];
                if there.read_exact(&mut head).is_err() || head != *MAGIC {
                    return Err(SavedError::InTheWay(name).into());
                }
            }
        }
        let tokens = &tokens[..tokens.len().min(self.position())];
        let page_bytes = self.backend.page_bytes(Layers::Whole);
        let description = Description {
            version: VERSION,
            messages: messages.to_vec(),
            tokens: tokens.to_vec(),
            prompt: prompt.min(tokens.len()),
            page: PAGE,
            page_bytes,
            kv: Some(self.options.kv_type.to_string()),
            recent: self.recent_pages(self.pages.written(self.seq)?),
        };
        let text = serde_json::to_vec(&description).map_err(|e| io(e.into()))?;
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Only its owner can read it, and nobody sees a part of it.
        let temporary = tempfile::NamedTempFile::new_in(folder).map_err(io)?;
        let mut out = BufWriter::new(temporary.as_file());
        out.write_all(MAGIC).map_err(io)?;
        out.write_all(&(text.len() as u64).to_le_bytes()).map_err(io)?;
        out.write_all(&text).map_err(io)?;
        let (mut page, mut sums) = (vec![0; page_bytes], Vec::new());
        for i in 0..Pages::of(tokens.len()) {
            let id = self.pages.table(self.seq)?[i];
            self.backend.read_page(Layers::Whole, id, &mut page)?;
            out.write_all(&page).map_err(io)?;
            sums.extend(crc32c(&page).to_le_bytes());
        }
        if let Some((recent, of)) = self.pages.recent().zip(description.recent) {
            page.resize(of.page_bytes, 0);
            for i in of.of(tokens.len()) {
                let id = recent.page(self.pages.state(self.seq)?, i);
                self.backend.read_page(Layers::Recent, id, &mut page)?;
                out.write_all(&page).map_err(io)?;
                sums.extend(crc32c(&page).to_le_bytes());
            }
        }
        sums.extend(crc32c(&text).to_le_bytes());
        out.write_all(&sums).map_err(io)?;
        out.flush().map_err(io)?;
        drop(out);
        temporary.as_file().sync_all().map_err(io)?;
        let bytes = temporary.as_file().metadata().map_err(io)?.len();
        temporary.persist(path).map_err(|e| io(e.error))?;
        Ok(bytes)
    }

    /// What is to be said of pages of recent positions, where positions below `written` have been written.
    fn recent_pages(&self, written: usize) -> Option<RecentPages> {
        let recent = self.pages.recent()?;
        let page_bytes = self.backend.page_bytes(Layers::Recent);
        Some(RecentPages { window: recent.window, pages: recent.pages, page_bytes, written })
    }

    /// Takes the pages of a conversation over. `false`: they are damaged, or not what this session computes, or the
    /// context has no room for them; the sequence is empty then.
    ///
    /// # Errors
    /// If the file cannot be read, or a pass fails; the sequence is empty then too.
    pub fn load(&mut self, mut saved: Saved, stop: &dyn Fn() -> bool) -> Result<bool, EngineError> {
        self.truncate(0);
        let taken = self.take_over(&mut saved, stop);
        if !matches!(taken, Ok(true)) {
            self.truncate(0);
        }
        taken
    }

    fn take_over(&mut self, saved: &mut Saved, stop: &dyn Fn() -> bool) -> Result<bool, EngineError> {
        let d = &saved.description;
        let (n, bytes) = (d.tokens.len(), self.backend.page_bytes(Layers::Whole));
        let known = d.tokens.iter().all(|t| (*t as usize) < self.model.n_vocab);
        let other = d.kv.as_ref().is_some_and(|ty| *ty != self.options.kv_type.to_string());
        let recent = d.recent;
        let other = other || recent != self.recent_pages(recent.map_or(0, |r| r.written));
        // Further than that a sequence cannot have written and still have its last positions.
        let other = other || recent.is_some_and(|r| !(n..=n + r.pages * PAGE).contains(&r.written));
        if other || n == 0 || d.prompt == 0 || !known || n > self.n_ctx() || (d.page, d.page_bytes) != (PAGE, bytes) {
            return Ok(false);
        }
        // The first positions, computed here.
        let first = d.prompt.min(PAGE);
        self.eval(&d.tokens[..first], Class::Bulk, Outputs::None, stop)?;
        let (mut here, mut page) = (vec![0; bytes], vec![0; bytes]);
        let id = self.pages.table(self.seq)?[0];
        self.backend.read_page(Layers::Whole, id, &mut here)?;
        if !saved.page(&mut page)? {
            return Ok(false);
        }
        // A page is rows of positions, one for each head of each layer's keys, and then of its values.
        let ty = self.options.kv_type;
        let windows = self.model.windows();
        let heads = |values: bool| {
            let shapes = self.model.cache_shapes().zip(&windows).filter(|(_, w)| recent.is_none() || w.is_none());
            let shapes = shapes.map(|(s, _)| s).filter(move |s| !values || s.of_keys == 0);
            shapes.flat_map(|s| std::iter::repeat_n(s.dim, s.heads))
        };
        let (mut a, mut b) = (&here[..], &page[..]);
        for each in heads(false).chain(heads(true)).map(|dim| ty.row_bytes(dim).unwrap_or(0)) {
            let (ours, theirs) = (a.split_off(..PAGE * each), b.split_off(..PAGE * each));
            if ours.zip(theirs).is_none_or(|(a, b)| a[..first * each] != b[..first * each]) {
                return Ok(false);
            }
        }
        self.truncate(0);
        self.make_room(self.seq, n)?;
        for i in 0..Pages::of(n) {
            if i > 0 && !saved.page(&mut page)? {
                return Ok(false);
            }
            let id = self.pages.table(self.seq)?[i];
            self.backend.write_page(Layers::Whole, id, &page)?;
        }
        if let Some((here, of)) = self.pages.recent().zip(recent) {
            page.resize(of.page_bytes, 0);
            for i in of.of(n) {
                if !saved.page(&mut page)? {
                    return Ok(false);
                }
                let id = here.page(self.pages.state(self.seq)?, i);
                self.backend.write_page(Layers::Recent, id, &page)?;
            }
            self.pages.writes(self.seq, of.written)?;
        }
        self.pages.commit(self.seq, n)?;
        Ok(self.reach(n) == n)
    }
}
