//! The decode loop allocates nothing: a counting allocator watches one-token passes.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use nt::engine::{Opened, Options, Session};
use nt::gguf::TensorType;
use nt::model::Outputs;
use nt::storage::ReaderKind;

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

#[test]
fn one_token_passes_allocate_nothing() {
    let d = tempfile::tempdir().unwrap();
    let path = common::tiny(6).write(d.path(), "m.gguf");
    let opened = Opened::open(&path).unwrap();
    for ram in [64 << 20, 900 << 10] {
        let options = Options {
            backend: nt::backend::BackendKind::Cpu,
            vram: None,
            threads: 2,
            ram: Some(ram),
            storage: true,
            copies: Vec::new(),
            reader: ReaderKind::Auto,
            verify: false,
            kv_type: TensorType::F16,
            n_buffers: None,
            tiers: None,
            stacked: false,
            n_ctx: 200,
            max_batch: 16,
            outputs: 1,
            timeline: false,
        };
        let mut session = Session::new(&opened, options, &mut |_, _| ()).unwrap();
        let decode = |session: &mut Session, n: u32| {
            for t in 0..n {
                session.eval(&[t % 258], Outputs::Last, &|| false).unwrap();
                assert!(session.logits().unwrap()[0].is_finite());
            }
        };
        decode(&mut session, 30);
        let before = ALLOCATIONS.load(Ordering::SeqCst);
        decode(&mut session, 100);
        assert_eq!(ALLOCATIONS.load(Ordering::SeqCst) - before, 0, "with {ram} bytes of RAM");
    }
}
