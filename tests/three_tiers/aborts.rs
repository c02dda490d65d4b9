//! Passes that end before they should: a link that dies, a drive that ends early, a part that panics, Ctrl-C, a lost device, each at
//! every tenth step of a pass from a step that the seed says. An error with its cause, the next pass right, no wait for ever.

use super::*;
use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Instant, SystemTime};

/// How long a pass that has failed may take before it counts as one that waits for ever.
const FOR_EVER: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Interrupt,
    /// A copy to the device is refused.
    Upload,
    /// A copy to the device fails on its way.
    Copy,
    /// The file ends before the weights do.
    Storage,
    Panic,
    Device,
}

const FAULTS: [Fault; 6] = [Fault::Interrupt, Fault::Upload, Fault::Copy, Fault::Storage, Fault::Panic, Fault::Device];

impl Fault {
    /// Words of its error.
    fn cause(self) -> &'static str {
        match self {
            Fault::Interrupt => "interrupted",
            Fault::Upload | Fault::Copy => "the copy engine is gone",
            Fault::Storage => "m.gguf",
            Fault::Panic => "a processor panics",
            Fault::Device => "the device is gone",
        }
    }

    fn begins(self, memory: &Memory, path: &Path) {
        match self {
            Fault::Interrupt => {}
            Fault::Upload => *memory.fail_at.lock().unwrap() = 1,
            Fault::Copy => *memory.fail_late.lock().unwrap() = 1,
            Fault::Storage => std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(0).unwrap(),
            Fault::Panic => *memory.panics_at.lock().unwrap() = *memory.handed.lock().unwrap() + 1,
            Fault::Device => *memory.gone_in.lock().unwrap() = Some(0),
        }
    }

    fn ends(self, memory: &Memory, path: &Path, file: &[u8], of: SystemTime) {
        match self {
            Fault::Upload => *memory.fail_at.lock().unwrap() = 0,
            Fault::Copy => *memory.fail_late.lock().unwrap() = 0,
            Fault::Storage => {
                // As the drive had it: what is written to is another model.
                let written = std::fs::OpenOptions::new().write(true).truncate(true).open(path).unwrap();
                (&written).write_all(file).unwrap();
                written.set_modified(of).unwrap();
            }
            Fault::Panic => *memory.panics_at.lock().unwrap() = 0,
            Fault::Interrupt | Fault::Device => {}
        }
    }
}

/// A placement on which faults are tried.
#[derive(Clone)]
struct Trial {
    path: PathBuf,
    options: Options,
    ahead: bool,
    shares: bool,
    class: Class,
    want: Arc<Vec<f32>>,
}

impl Trial {
    fn memory(&self) -> Arc<Memory> {
        Arc::new(Memory { ahead: self.ahead, shares: self.shares, ..Memory::default() })
    }

    /// A pass behind three tokens; `at` is called at each of its steps.
    fn pass(&self, session: &mut Session, at: &dyn Fn() -> bool) -> Result<(), EngineError> {
        session.truncate(0);
        session.eval(&[1, 2, 3], Class::Bulk, Outputs::None, &|| false)?;
        let tokens: &[u32] = if self.class == Class::Exact { &[7] } else { &[7, 9, 11, 200, 31] };
        session.eval(tokens, self.class, Outputs::Last, at)?;
        session.logits().map(|_| ())
    }

    /// Steps of an undisturbed pass, and whether it copies, reads and hands parts over.
    fn steps(&self) -> (usize, [bool; 3]) {
        let opened = Opened::open(&self.path).unwrap();
        let memory = self.memory();
        let mut session = start(&opened, self.options.clone(), &memory).unwrap();
        for _ in 0..3 {
            self.pass(&mut session, &|| false).unwrap();
        }
        let asked = std::cell::Cell::new(0);
        let handed = *memory.handed.lock().unwrap();
        let at = || {
            asked.set(asked.get() + 1);
            false
        };
        self.pass(&mut session, &at).unwrap();
        let hands = *memory.handed.lock().unwrap() > handed;
        let links = session.links();
        (asked.get(), [links.gpu_bytes_per_pass > 0, links.nvme_bytes_per_pass > 0, hands])
    }

    /// The fault at this step of a pass; returns how long its error took, `None` if no pass met it.
    fn run(&self, fault: Fault, step: usize) -> Option<Duration> {
        let what = format!("{fault:?} at step {step} of {:?} {:?}", self.options.tiers, self.options.vram);
        let file = std::fs::read(&self.path).unwrap();
        let modified = std::fs::metadata(&self.path).unwrap().modified().unwrap();
        let opened = Opened::open(&self.path).unwrap();
        let memory = self.memory();
        let mut session = start(&opened, self.options.clone(), &memory).unwrap();
        assert!(logits(&mut session).unwrap() == *self.want, "{what}: before it");
        let (asked, began) = (std::cell::Cell::new(0), std::cell::Cell::new(None));
        let at = || {
            if asked.replace(asked.get() + 1) != step {
                return false;
            }
            began.set(Some(Instant::now()));
            fault.begins(&memory, &self.path);
            fault == Fault::Interrupt
        };
        // What is brought ahead is met by a later pass.
        let met = (0..4).find_map(|_| Some((self.pass(&mut session, &at).err()?, began.get()?.elapsed())));
        fault.ends(&memory, &self.path, &file, modified);
        let took = met.map(|(e, took)| {
            let mut words = e.to_string();
            let mut source = std::error::Error::source(&e);
            while let Some(e) = source {
                words = format!("{words}: {e}");
                source = e.source();
            }
            assert!(words.contains(fault.cause()), "{what}: {words}");
            took
        });
        if fault == Fault::Device {
            assert!(self.pass(&mut session, &|| false).is_err(), "{what}: a pass after the device was gone");
        } else {
            // A drive that was away when the next pass's units were asked for is told once more, by that pass.
            let again = fault == Fault::Storage && logits(&mut session).is_err();
            for _ in 0..2 {
                let next = logits(&mut session).unwrap_or_else(|e| panic!("{what}, next pass, {again}: {e}"));
                assert!(next == *self.want, "{what}: another result behind it");
            }
        }
        drop(session);
        assert_eq!(*memory.used.lock().unwrap(), 0, "{what}");
        took
    }
}

/// What `f` returns; a panic if it waits for ever.
fn watched<T: Send + 'static>(what: &str, f: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, end) = channel();
    let thread = std::thread::spawn(move || done.send(f()).unwrap());
    match end.recv_timeout(FOR_EVER) {
        Ok(value) => value,
        Err(RecvTimeoutError::Timeout) => panic!("{what} waits for ever"),
        Err(RecvTimeoutError::Disconnected) => std::panic::resume_unwind(thread.join().unwrap_err()),
    }
}

#[test]
fn a_pass_that_is_cut_off_anywhere_is_an_error_with_its_cause_and_the_next_is_right() {
    let d = tempfile::tempdir().unwrap();
    let tiers = |a, b, c| Options { tiers: Some(Tiers { a, b, c }), n_buffers: Some(3), ..options() };
    let rooms = |vram: u64| Options { vram: Some(vram << 10), ..options() };
    let both = |o| Options { sites: Sites::Both, ..o };
    // Model, placement, whether the device is called ahead, and whether experts are divided. What is called ahead needs attention and
    // the cache in the second memory.
    let cut = |o| Options { sites: Sites::Auto, slices: Slices::Of(128), ..o };
    let placements: [(bool, Options, bool, bool); 10] = [
        (false, tiers(3, 3, 4), false, false),
        (false, both(tiers(2, 4, 4)), false, false),
        (false, both(rooms(900)), true, false),
        (true, tiers(3, 3, 4), false, false),
        (true, both(tiers(2, 5, 3)), false, false),
        (true, both(tiers(2, 5, 3)), false, true),
        (true, both(rooms(1100)), true, false),
        (true, both(rooms(1100)), true, true),
        (false, cut(rooms(900)), false, false),
        (false, cut(rooms(1150)), true, false),
    ];
    let (mut met, mut longest) = ([0; FAULTS.len()], (Duration::ZERO, String::new()));
    for (i, (routed, options, ahead, shares)) in placements.into_iter().enumerate() {
        let file = if routed { common::tiny_moe(10) } else { tiny(10) };
        let dir = d.path().join(i.to_string());
        std::fs::create_dir(&dir).unwrap();
        let path = file.write(&dir, "m.gguf");
        let opened = Opened::open(&path).unwrap();
        // Cut parts add up in an order of their own.
        let mut undisturbed = match options.slices {
            Slices::Off => Session::new(&opened, super::options(), &mut |_, _| ()).unwrap(),
            _ => start(&opened, options.clone(), &Arc::default()).unwrap(),
        };
        assert_eq!(undisturbed.slices().is_some(), options.slices != Slices::Off, "placement {i}");
        let want = Arc::new(logits(&mut undisturbed).unwrap());
        drop(undisturbed);
        for class in [Class::Exact, Class::Bulk] {
            let (path, options, want) = (path.clone(), options.clone(), want.clone());
            let trial = Trial { path, options, ahead, shares, class, want };
            let (steps, [copies, reads, hands]) = trial.steps();
            for (n, fault) in FAULTS.into_iter().enumerate() {
                let happens = match fault {
                    Fault::Interrupt | Fault::Device => true,
                    Fault::Upload | Fault::Copy => copies,
                    Fault::Storage => reads,
                    Fault::Panic => hands,
                };
                // Another step of the ten for each placement, class and fault.
                let first = (i * 7 + n * 3 + class as usize * 5) % 10;
                for step in (first..steps).step_by(10).filter(|_| happens) {
                    let what = format!("placement {i}, {class:?}, {fault:?} at step {step} of {steps}");
                    let trial = trial.clone();
                    let took = watched(&what, move || trial.run(fault, step));
                    met[n] += usize::from(took.is_some());
                    longest = longest.max((took.unwrap_or_default(), what));
                }
            }
        }
    }
    println!("passes that met a fault, of {FAULTS:?}: {met:?}; the error that took longest: {longest:?}");
    assert!(met.iter().all(|n| *n > 5), "{met:?}");
}
