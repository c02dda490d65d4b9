//! Requests cut into chunks, and chunks put together again: what every reader shares.

use std::collections::VecDeque;

use super::{Alignment, CHUNK_BYTES, Completion, DirectFile, FileId, ReadError, ReadRequest, STRIPE_BYTES};

/// Passing shortages (memory, queue space) that one chunk may meet before they count as a failure.
const RETRIES_MAX: u8 = 64;

/// One read that is to be made, or made anew from where it stopped short.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    /// Index of the request.
    pub request: usize,
    pub file: usize,
    pub offset: u64,
    pub len: u64,
    pub dst: *mut u8,
    /// Goes before those that are not.
    pub urgent: bool,
    /// Times it was put off by a passing shortage.
    pub retries: u8,
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
    /// Copies over which reads are dealt, and the files of each.
    stripes: Option<(usize, usize)>,
}

impl Requests {
    /// Requests over `n_files` files, which are `copies` times the same files, copy by copy.
    pub fn over(n_files: usize, copies: usize) -> Requests {
        Requests { stripes: (copies > 1).then(|| (copies, n_files / copies)), ..Requests::default() }
    }

    /// The strictest alignment of a file's copies.
    pub fn alignment(&self, files: &[DirectFile], file: FileId) -> Alignment {
        let (copies, n) = self.stripes.unwrap_or((1, 0));
        let of = |copy: usize| files[copy * n + usize::from(file.0)].alignment;
        (1..copies)
            .map(of)
            .fold(of(0), |a, b| Alignment { memory: a.memory.max(b.memory), offset: a.offset.max(b.offset) })
    }

    /// The file that byte `offset` of `file` is read from, and the bytes up to where another's turn
    /// comes, or the next chunk begins.
    fn deal(&self, file: usize, offset: u64) -> (usize, u64) {
        match self.stripes {
            None => (file, CHUNK_BYTES),
            Some((copies, n)) => {
                let copy = (offset / STRIPE_BYTES) as usize % copies;
                (copy * n + file, STRIPE_BYTES - offset % STRIPE_BYTES)
            }
        }
    }

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
                let (file, most) = self.deal(usize::from(e.file.0), e.offset + at);
                let len = (e.len - at).min(most);
                // SAFETY: the extent lies within the request's buffer, as checked above.
                let dst = unsafe { r.dst.add((e.dst_offset + at) as usize) };
                self.pending.push_back(Chunk {
                    request,
                    file,
                    offset: e.offset + at,
                    len,
                    dst,
                    urgent: r.urgent,
                    retries: 0,
                });
                at += len;
                chunks += 1;
            }
        }
        if r.urgent {
            // In front of what waits, in its own order, behind what was urgent before.
            let waits = self.pending.iter().take(before).rposition(|c| c.urgent).map_or(0, |i| i + 1);
            self.pending.make_contiguous()[waits..].rotate_left(before - waits);
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

    /// Puts a chunk back that met a passing shortage, as long as it did not meet too many.
    pub fn put_off(&mut self, c: Chunk, what: String, file: &DirectFile) {
        match c.retries {
            RETRIES_MAX.. => self.chunk_done(c, Err(what), file),
            n => self.again(Chunk { retries: n + 1, ..c }),
        }
    }

    /// A chunk ended with `result` bytes read from `file`. A read that stopped short is put back from
    /// its last aligned byte; one that met the end of a file too early is an error.
    pub fn chunk_done(&mut self, c: Chunk, result: Result<u64, String>, file: &DirectFile) {
        let name = || file.path.display().to_string();
        let align = u64::from(file.alignment.offset);
        // The last aligned unit may reach beyond the end of the file; nothing else may.
        let beyond = (c.offset + c.len).saturating_sub(file.len);
        let needed = if beyond < align { c.len - beyond } else { c.len };
        let truncated = |end| ReadError::Truncated { name: name(), offset: c.offset, len: needed, end };
        match result {
            Err(what) => self.fail(c.request, ReadError::Failed { name: name(), offset: c.offset, len: c.len, what }),
            Ok(n) if n >= needed => self.open[c.request].bytes += needed,
            Ok(n) => {
                let whole = n / align * align;
                let end = file.current_len();
                if end < c.offset + needed {
                    self.fail(c.request, truncated(end));
                } else if whole == 0 {
                    let what = format!("the read stopped after {n} bytes");
                    self.fail(c.request, ReadError::Failed { name: name(), offset: c.offset, len: c.len, what });
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Extent;
    use std::sync::Arc;

    fn file(len: u64, align: u32) -> DirectFile {
        let f = tempfile::NamedTempFile::new().unwrap();
        f.as_file().set_len(len).unwrap();
        let alignment = Alignment { memory: align, offset: align };
        DirectFile {
            path: "model".into(),
            file: Arc::new(f.reopen().unwrap()),
            alignment,
            start: 0,
            len,
            copies: false,
            watched: None,
        }
    }

    fn requests(offset: u64, len: u64) -> Requests {
        let mut r = Requests::default();
        let extents = [Extent { file: FileId(0), offset, len, dst_offset: 0 }];
        let dst = std::ptr::without_provenance_mut(1 << 30);
        r.add(&ReadRequest { tag: 5, extents: &extents, dst, urgent: false, dst_len: len as usize }).unwrap();
        r
    }

    fn outcome(mut r: Requests) -> Result<u64, ReadError> {
        let mut out = Vec::new();
        assert!(r.next().is_none());
        r.drain_done(&mut out);
        assert_eq!((out.len(), r.outstanding(), out[0].tag), (1, 0, 5));
        out.remove(0).result
    }

    #[test]
    fn a_short_read_goes_on_from_its_last_aligned_byte() {
        let f = file(64 << 10, 4096);
        let mut r = requests(4096, 16 << 10);
        let c = r.next().unwrap();
        r.chunk_done(c, Ok(9000), &f);
        let rest = r.next().unwrap();
        assert_eq!((rest.offset, rest.len, rest.dst as usize - c.dst as usize), (4096 + 8192, 8192, 8192));
        r.chunk_done(rest, Ok(8192), &f);
        assert_eq!(outcome(r).unwrap(), 16 << 10);
    }

    #[test]
    fn the_last_unit_may_be_partial_and_nothing_more() {
        let f = file(10_000, 4096);
        let mut r = requests(8192, 4096);
        let c = r.next().unwrap();
        r.chunk_done(c, Ok(10_000 - 8192), &f);
        assert_eq!(outcome(r).unwrap(), 10_000 - 8192);

        for (offset, len, got) in [(8192, 8192, 10_000 - 8192), (12_288, 4096, 0), (1 << 20, 4096, 0)] {
            let mut r = requests(offset, len);
            let c = r.next().unwrap();
            r.chunk_done(c, Ok(got), &f);
            assert!(matches!(outcome(r), Err(ReadError::Truncated { end: 10_000, .. })), "{offset}");
        }
    }

    #[test]
    fn a_read_that_stops_within_the_file_is_no_truncation() {
        let f = file(1 << 20, 4096);
        let mut r = requests(0, 8192);
        let c = r.next().unwrap();
        r.chunk_done(c, Ok(0), &f);
        assert!(matches!(outcome(r), Err(ReadError::Failed { .. })));
    }

    #[test]
    fn shortages_are_waited_out_but_not_for_ever() {
        let f = file(1 << 20, 4096);
        let mut r = requests(0, 4096);
        let mut n = 0;
        while let Some(c) = r.next() {
            r.put_off(c, "no memory".into(), &f);
            n += 1;
        }
        assert_eq!(n, usize::from(RETRIES_MAX) + 1);
        assert!(outcome(r).unwrap_err().to_string().contains("no memory"));
    }

    #[test]
    fn urgent_chunks_overtake_in_their_own_order() {
        let mut r = requests(0, 4 * CHUNK_BYTES);
        let extents = [0, 1].map(|i| Extent { file: FileId(0), offset: i * 4096, len: 4096, dst_offset: i * 4096 });
        let dst = std::ptr::without_provenance_mut(1 << 40);
        r.add(&ReadRequest { tag: 6, extents: &extents, dst, urgent: true, dst_len: 8192 }).unwrap();
        let order: Vec<(u64, u64)> = std::iter::from_fn(|| r.next()).map(|c| (c.offset, c.len)).collect();
        assert_eq!(order[..3], [(0, 4096), (4096, 4096), (0, CHUNK_BYTES)]);
        assert_eq!(order.len(), 6);
    }

    /// Guards against demanded units that overtake each other: the first is needed first.
    #[test]
    fn urgent_requests_keep_their_own_order() {
        let mut r = requests(0, 2 * CHUNK_BYTES);
        let dst = std::ptr::without_provenance_mut(1 << 40);
        for tag in 6..9 {
            let extents = [Extent { file: FileId(0), offset: tag * 4096, len: 4096, dst_offset: 0 }];
            r.add(&ReadRequest { tag, extents: &extents, dst, urgent: true, dst_len: 8192 }).unwrap();
        }
        let order: Vec<u64> = std::iter::from_fn(|| r.next()).map(|c| c.offset).collect();
        assert_eq!(order, [6 * 4096, 7 * 4096, 8 * 4096, 0, CHUNK_BYTES]);
    }

    #[test]
    fn stripes_go_to_the_copies_in_turn() {
        let mut r = Requests::over(6, 3);
        let extents = [Extent { file: FileId(1), offset: STRIPE_BYTES - 4096, len: 3 * STRIPE_BYTES, dst_offset: 0 }];
        let dst = std::ptr::without_provenance_mut(1 << 30);
        let request = ReadRequest { tag: 1, extents: &extents, dst, urgent: false, dst_len: extents[0].len as usize };
        r.add(&request).unwrap();
        let got: Vec<_> = std::iter::from_fn(|| r.next()).map(|c| (c.file, c.offset, c.len)).collect();
        let m = STRIPE_BYTES;
        assert_eq!(got, [(1, m - 4096, 4096), (3, m, m), (5, 2 * m, m), (1, 3 * m, m - 4096)]);
        let files: Vec<_> = (0..6).map(|i| file(10, if i == 5 { 4096 } else { 512 })).collect();
        assert_eq!(r.alignment(&files, FileId(1)).offset, 4096);
        assert_eq!(r.alignment(&files, FileId(0)).offset, 512);
    }
}
