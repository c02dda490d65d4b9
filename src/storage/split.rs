//! Requests cut into chunks, and chunks put together again: what every reader shares.

use std::collections::VecDeque;

use super::{CHUNK_BYTES, Completion, DirectFile, ReadError, ReadRequest};

/// One read that is to be made, or made anew from where it stopped short.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    /// Index of the request.
    pub request: usize,
    pub file: usize,
    pub offset: u64,
    pub len: u64,
    pub dst: *mut u8,
}

// SAFETY: a chunk's address is only dereferenced by the read it describes; `Reader::submit`'s
// contract keeps the memory valid and unshared until the completion.
unsafe impl Send for Chunk {}

#[derive(Debug)]
struct Open {
    tag: u64,
    chunks_left: usize,
    bytes: u64,
    error: Option<ReadError>,
    used: bool,
}

/// Requests in progress and chunks not yet issued. Grows to the most that was ever in progress.
#[derive(Debug, Default)]
pub(super) struct Requests {
    open: Vec<Open>,
    pending: VecDeque<Chunk>,
    done: VecDeque<Completion>,
    outstanding: usize,
}

impl Requests {
    /// Takes a request; returns what is wrong with it.
    pub fn add(&mut self, r: &ReadRequest<'_>) -> Result<(), ReadError> {
        for e in r.extents {
            let end = e.dst_offset.checked_add(e.len);
            if end.is_none_or(|end| end > r.dst_len as u64) {
                return Err(ReadError::Failed {
                    name: format!("request {}", r.tag),
                    offset: e.offset,
                    len: e.len,
                    what: format!("the extent does not fit the buffer of {} bytes", r.dst_len),
                });
            }
        }
        let request = self.open.iter().position(|o| !o.used).unwrap_or(self.open.len());
        let mut chunks = 0;
        let before = self.pending.len();
        for e in r.extents {
            let mut at = 0;
            while at < e.len {
                let len = (e.len - at).min(CHUNK_BYTES);
                // SAFETY: the extent lies within the request's buffer, as checked above.
                let dst = unsafe { r.dst.add((e.dst_offset + at) as usize) };
                self.pending.push_back(Chunk { request, file: usize::from(e.file.0), offset: e.offset + at, len, dst });
                at += len;
                chunks += 1;
            }
        }
        if r.urgent {
            // In front of what waits, in its own order.
            self.pending.rotate_right(self.pending.len() - before);
        }
        let open = Open { tag: r.tag, chunks_left: chunks, bytes: 0, error: None, used: true };
        match self.open.get_mut(request) {
            Some(slot) => *slot = open,
            None => self.open.push(open),
        }
        self.outstanding += 1;
        if chunks == 0 {
            self.finish(request);
        }
        Ok(())
    }

    /// The next chunk to issue. Chunks of requests that failed already are not worth issuing.
    pub fn next(&mut self) -> Option<Chunk> {
        while let Some(c) = self.pending.pop_front() {
            if self.open[c.request].error.is_none() {
                return Some(c);
            }
            self.chunk_over(c.request);
        }
        None
    }

    /// Puts a chunk back to the front, for reads that must be made anew.
    pub fn again(&mut self, c: Chunk) {
        self.pending.push_front(c);
    }

    /// A chunk ended with `result` bytes read from `file`. A read that stopped short is put back from
    /// its last aligned byte; one that met the end of a file too early is an error.
    pub fn chunk_done(&mut self, c: Chunk, result: Result<u64, String>, file: &DirectFile) {
        let name = || file.path.display().to_string();
        // The last aligned unit may reach beyond the end of the file.
        let needed = c.len.min(file.len.saturating_sub(c.offset));
        match result {
            Err(what) => self.fail(c.request, ReadError::Failed { name: name(), offset: c.offset, len: c.len, what }),
            Ok(n) if n >= needed => self.open[c.request].bytes += needed,
            Ok(n) => {
                let whole = n / u64::from(file.alignment.offset) * u64::from(file.alignment.offset);
                let end = file.current_len();
                if n == 0 || whole == 0 || end < c.offset + needed {
                    self.fail(c.request, ReadError::Truncated { name: name(), offset: c.offset, len: needed, end });
                } else {
                    // SAFETY: `whole` is at most `n`, which is less than the chunk's length.
                    let dst = unsafe { c.dst.add(whole as usize) };
                    self.open[c.request].bytes += whole;
                    self.again(Chunk { offset: c.offset + whole, len: c.len - whole, dst, ..c });
                    return;
                }
            }
        }
        self.chunk_over(c.request);
    }

    fn fail(&mut self, request: usize, e: ReadError) {
        self.open[request].error.get_or_insert(e);
    }

    fn chunk_over(&mut self, request: usize) {
        self.open[request].chunks_left -= 1;
        if self.open[request].chunks_left == 0 {
            self.finish(request);
        }
    }

    fn finish(&mut self, request: usize) {
        let o = &mut self.open[request];
        o.used = false;
        let result = o.error.take().map_or(Ok(o.bytes), Err);
        self.done.push_back(Completion { tag: o.tag, result });
    }

    /// Moves completions to `out`; whether there were any.
    pub fn drain_done(&mut self, out: &mut Vec<Completion>) -> bool {
        let any = !self.done.is_empty();
        self.outstanding -= self.done.len();
        out.extend(self.done.drain(..));
        any
    }

    pub fn has_done(&self) -> bool {
        !self.done.is_empty()
    }

    pub fn outstanding(&self) -> usize {
        self.outstanding
    }
}
