//! The decode loop allocates nothing: a counting allocator watches one-token passes.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::families;
use nt::backend::{BackendKind, Class};
use nt::engine::{Opened, Options, Session};
use nt::model::Outputs;
use nt::plan::{Home, Tiers};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn options(ram: u64) -> Options {
    Options { threads: 2, ram: Some(ram), max_batch: 16, ..Options::new(BackendKind::Cpu, 200) }
}

/// Rounds of passes, of which one must allocate nothing: threads that the system starts late allocate once.
const ROUNDS: usize = 5;

/// Decodes `tokens`, thirty of them to warm up; what comes after must allocate nothing.
fn decode_allocates_nothing(what: &str, session: &mut Session, tokens: impl Fn(u32) -> u32) {
    let decode = |session: &mut Session, range: std::ops::Range<u32>| {
        for t in range {
            session.eval(&[tokens(t)], Class::Exact, Outputs::Last, &|| false).unwrap();
            assert!(session.logits().unwrap()[0].is_finite());
        }
    };
    let mut rounds = (0..ROUNDS).map(|_| {
        session.truncate(0);
        decode(session, 0..30);
        let before = ALLOCATIONS.load(Ordering::SeqCst);
        decode(session, 30..130);
        ALLOCATIONS.load(Ordering::SeqCst) - before
    });
    assert!(rounds.any(|allocated| allocated == 0), "{what}");
}

/// A dense model, one of experts, newer architectures, and models whose reads are compared with a record, each resident
/// and streamed.
/// One test, since the allocator counts for the whole process.
#[test]
fn one_token_passes_allocate_nothing() {
    let d = tempfile::tempdir().unwrap();
    let data = d.path().join("data");
    // SAFETY: this is the only test, and no thread of its own runs yet that reads the environment.
    unsafe { std::env::set_var("XDG_DATA_HOME", &data) };
    let models = [
        ("dense", common::tiny(6)),
        ("experts", common::tiny_moe(6)),
        ("windows", families::gemma3(6)),
        ("experts with biases and sinks", families::gpt_oss(6)),
        ("short convolutions", families::lfm2(6)),
        ("delta nets", families::qwen35(6)),
    ];
    for (name, file) in models {
        let path = file.write(d.path(), &format!("{name}.gguf"));
        let opened = Opened::open(&path).unwrap();
        for ram in [64 << 20, 1250 << 10] {
            let mut session = Session::new(&opened, options(ram), &mut |_, _| ()).unwrap();
            let streams = session.homes().contains(&Home::C);
            assert_eq!(streams, ram < 64 << 20, "{name} with {ram} bytes of RAM");
            decode_allocates_nothing(&format!("{name} with {ram} bytes of RAM"), &mut session, |t| t % 258);
        }
        if name == "experts" {
            let path = common::many_experts(6).write(d.path(), "cached.gguf");
            let opened = Opened::open(&path).unwrap();
            let mut session = Session::new(&opened, options(6 << 20), &mut |_, _| ()).unwrap();
            assert!(!session.caches().is_empty());
            decode_allocates_nothing("experts with caches", &mut session, |t| t * 37 % 258);
            assert!(session.links().experts.caches.counts.misses > 0);
        }
        common::record(&path, &data);
        // Compared reads are of whole chunks, so that the buffers alone take megabytes: the tiers are given.
        let tiers = Some(Tiers { a: 0, b: 2, c: 4 });
        let compared = Options { verify: true, tiers, ..options(64 << 20) };
        let mut session = Session::new(&opened, compared, &mut |_, _| ()).unwrap();
        assert!(session.homes().contains(&Home::C));
        decode_allocates_nothing(&format!("{name}, compared with its record"), &mut session, |t| t % 258);
    }
}
