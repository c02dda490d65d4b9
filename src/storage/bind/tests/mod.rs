//! Bind and release on a machine of plain files; never on this one.

mod fake;
mod udev;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fake::{BOOT, Blow, Fake, Killed, SPARE};

use super::*;
use crate::storage::guard::{Check, Reason};

/// Brings a machine into a state.
type Make = fn(&Fake);

/// What became of a command.
#[derive(Debug)]
enum End {
    Done,
    Failed(DeviceError),
    Killed,
}

fn ended(command: impl FnOnce() -> Result<(), DeviceError>) -> End {
    match catch_unwind(AssertUnwindSafe(command)) {
        Ok(Ok(())) => End::Done,
        Ok(Err(e)) => End::Failed(e),
        Err(payload) if payload.is::<Killed>() => End::Killed,
        Err(payload) => std::panic::resume_unwind(payload),
    }
}

impl Fake {
    /// Runs a command, which meets `blow` at that one of its changes.
    fn run(&self, blow: Option<(u32, Blow)>, command: impl FnOnce(&Machine<'_>) -> Result<(), DeviceError>) -> End {
        self.changes.set(0);
        self.stopped.set(false);
        self.blow.set(blow);
        let stopped = || self.stopped.get();
        ended(|| command(&Machine { host: &self.host, kernel: self, stopped: &stopped }))
    }

    fn bind(&self, name: &str, blow: Option<(u32, Blow)>) -> End {
        self.run(blow, |m| take::bind(m, name, &|_, _, _| Vec::new(), false, &mut |_| ()))
    }

    fn release(&self, name: &str, blow: Option<(u32, Blow)>) -> End {
        self.run(blow, |m| m.release(Some(name), None, false, &mut |_| ()))
    }

    fn release_at(&self, pci: &str, blow: Option<(u32, Blow)>) -> End {
        self.run(blow, |m| m.release(None, Some(pci), false, &mut |_| ()))
    }

    /// The drive is the kernel's and nothing of ours is left.
    fn is_the_kernels(&self, pci: &str) {
        assert_eq!(self.driver(pci).as_deref(), Some("nvme"));
        assert_eq!(self.forced(pci), "(null)");
        assert!(!self.record(pci).exists());
        let left = self.host.list("/run/nt").unwrap();
        assert!(left.iter().all(|n| n.ends_with(".lock")), "{left:?}");
        assert_eq!(self.host.list("/dev/vfio").unwrap(), [""; 0]);
    }
}

fn words(end: &End, words: &[&str]) {
    let End::Failed(e) = end else { panic!("{end:?}") };
    assert!(words.iter().all(|w| e.to_string().contains(w)), "{words:?} in: {e}");
}

#[test]
fn a_drive_is_bound_used_and_given_back() {
    let fake = Fake::new();
    assert!(matches!(fake.bind("nvme1n1", None), End::Done));
    assert_eq!(fake.driver(SPARE).as_deref(), Some("vfio-pci"));
    let (drive, namespace) = find_bound(&fake.host, "/dev/nvme1n1").unwrap();
    assert_eq!((drive.pci.as_str(), drive.serial.as_str(), drive.state), (SPARE, "S 0000:02:00.0", State::Bound));
    assert_eq!((namespace.name.as_str(), namespace.size), ("nvme1n1", 4096 * 512));
    for name in ["nvme1", "nvme1n1p3", "02:00.0", SPARE] {
        assert_eq!(find_bound(&fake.host, name).unwrap().0.pci, SPARE, "{name}");
    }
    assert!(matches!(find_bound(&fake.host, "nvme1n1x"), Err(DeviceError::NotBound(_))));
    words(&fake.bind("nvme1n1", None), &["it is bound", "sudo nt device release --pci 0000:02:00.0"]);
    assert!(matches!(fake.release("nvme1n1", None), End::Done));
    fake.is_the_kernels(SPARE);
    words(&fake.release("nvme1n1", None), &["nvme1n1 is not bound"]);
    words(&fake.release("nvme7", None), &["there is no NVMe drive of this name"]);
    assert!(fake.log.borrow().iter().all(|l| !l.contains(BOOT)), "{:?}", fake.log.borrow());
}

#[test]
fn a_dry_run_changes_nothing() {
    let fake = Fake::new();
    let mut said = Vec::new();
    take::bind(&fake.machine(), "nvme1n1", &|_, _, _| Vec::new(), true, &mut |l| said.push(l.to_owned())).unwrap();
    assert!(said.iter().any(|l| l.contains("would write vfio-pci to")), "{said:?}");
    assert!(said.iter().any(|l| l.starts_with("claimed and let go after ")), "{said:?}");
    assert_eq!(fake.changes.get(), 0);
    assert!(!fake.real("/run/nt").exists());
    fake.bind("nvme1n1", None);
    let changes = fake.changes.get();
    fake.machine().release(Some("nvme1n1"), None, true, &mut |_| ()).unwrap();
    assert_eq!((fake.changes.get(), fake.driver(SPARE).as_deref()), (changes, Some("vfio-pci")));
}

/// Whatever a bind leaves when it ends at any change, in whichever way: a killed one is refused by the next bind
/// with the command that helps, and `release` puts it right by name and by address; a failed or interrupted
/// one has put it right itself.
#[test]
fn a_bind_that_ends_at_any_change_is_undone() {
    for blow in [Blow::Kill, Blow::Fail, Blow::Signal] {
        for by_address in [false, true] {
            let mut n = 0;
            loop {
                n += 1;
                let fake = Fake::new();
                let end = fake.bind("nvme1n1", Some((n, blow)));
                if fake.changes.get() < n {
                    break;
                }
                match &end {
                    End::Killed if n == 1 => fake.is_the_kernels(SPARE),
                    End::Killed => {
                        words(&fake.bind(SPARE, None), &["sudo nt device release --pci 0000:02:00.0"]);
                        let released =
                            if by_address { fake.release_at("02:00.0", None) } else { fake.release("nvme1n1", None) };
                        assert!(matches!(released, End::Done), "{n}: {released:?}");
                    }
                    End::Failed(e) => assert_eq!(matches!(e, DeviceError::Interrupted(_)), blow == Blow::Signal, "{e}"),
                    End::Done => panic!("{blow:?} at {n} went unnoticed"),
                }
                fake.is_the_kernels(SPARE);
                assert!(matches!(fake.bind("nvme1n1", None), End::Done), "{blow:?} at {n}");
            }
            assert!(n > 7, "a bind has at least seven changes: {n}");
        }
    }
}

/// The same of a release, with a record and without, any number of times over.
#[test]
fn a_release_that_ends_at_any_change_is_finished_by_the_next() {
    for blow in [Blow::Kill, Blow::Fail, Blow::Signal] {
        for recorded in [true, false] {
            let mut n = 0;
            loop {
                n += 1;
                let fake = Fake::new();
                fake.bind("nvme1n1", None);
                if !recorded {
                    fs::remove_file(fake.record(SPARE)).unwrap();
                }
                let first = fake.log.borrow().len();
                let end = fake.release_at(SPARE, Some((n, blow)));
                if fake.changes.get() < n {
                    break;
                }
                if let (Blow::Signal, End::Failed(e)) = (blow, &end) {
                    assert!(matches!(e, DeviceError::Interrupted(_)), "{e}");
                    fake.is_the_kernels(SPARE);
                } else {
                    // Where only the journal fails, the drive is back.
                    let journal = fake.log.borrow()[n as usize - 1 + first].contains("/run/nt/") && blow == Blow::Fail;
                    assert_eq!(matches!(end, End::Done), journal, "{n}: {end:?}");
                    if journal {
                        assert_eq!((fake.driver(SPARE).as_deref(), &*fake.forced(SPARE)), (Some("nvme"), "(null)"));
                    }
                    let again = fake.release_at(SPARE, None);
                    assert!(matches!(again, End::Done | End::Failed(DeviceError::NotBound(_))), "{again:?}");
                }
                fake.is_the_kernels(SPARE);
            }
            assert!(n > 3, "{n}");
        }
    }
}

/// 300 trials from seeds: binds and releases that end anywhere in any way, by any of the drive's names, until
/// one release goes through.
#[test]
fn any_history_of_ends_is_undone_by_one_release() {
    for seed in 1..=300u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut draw = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        let fake = Fake::new();
        for _ in 0..1 + draw(6) {
            let blow = [Blow::Kill, Blow::Kill, Blow::Fail, Blow::Signal][draw(4) as usize];
            let at = Some((1 + draw(9) as u32, blow));
            let name = ["nvme1n1", "nvme1", "/dev/nvme1n1", "02:00.0", SPARE][draw(5) as usize];
            match draw(3) {
                0 => drop(fake.release(name, at)),
                1 => drop(fake.release_at(SPARE, at)),
                _ => drop(fake.bind(name, at)),
            }
            for drive in bound(&fake.host) {
                assert_eq!((drive.state, fake.driver(&drive.pci).as_deref()), (State::Bound, Some("vfio-pci")));
            }
        }
        let end = fake.release_at(SPARE, None);
        assert!(matches!(end, End::Done | End::Failed(DeviceError::NotBound(_))), "seed {seed}: {end:?}");
        fake.is_the_kernels(SPARE);
        assert_eq!(fake.driver(BOOT).as_deref(), Some("nvme"));
        assert!(fake.log.borrow().iter().all(|l| !l.contains(BOOT)), "seed {seed}: {:?}", fake.log.borrow());
        assert!(matches!(fake.bind("nvme1n1", None), End::Done), "seed {seed}");
    }
}

/// A drive that somebody else half bound, or bound for a guest, without any record.
#[test]
fn release_needs_no_record() {
    let states: [(&str, Make); 5] = [
        ("override alone", |f| f.put(&format!("{}/driver_override", device(SPARE)), "vfio-pci")),
        ("another override", |f| f.put(&format!("{}/driver_override", device(SPARE)), "pci-stub")),
        ("no driver", |f| f.unbind(SPARE)),
        ("no driver and an override", |f| {
            f.put(&format!("{}/driver_override", device(SPARE)), "vfio-pci");
            f.unbind(SPARE);
        }),
        ("vfio-pci", |f| {
            f.put(&format!("{}/driver_override", device(SPARE)), "vfio-pci");
            f.unbind(SPARE);
            f.probe(SPARE);
        }),
    ];
    for (what, make) in states {
        let fake = Fake::new();
        make(&fake);
        let said = if what == "vfio-pci" { "by no bind of nt's" } else { "release --pci 0000:02:00.0" };
        words(&fake.bind(SPARE, None), &[said]);
        assert!(matches!(fake.release("02:00.0", None), End::Done), "{what}");
        fake.is_the_kernels(SPARE);
    }
    let fake = Fake::new();
    fake.unbind(SPARE);
    fake.put(&format!("{}/driver_override", device(SPARE)), "uio_pci_generic");
    fake.probe(SPARE);
    words(&fake.release(SPARE, None), &["uio_pci_generic holds it"]);
    assert_eq!(fake.driver(SPARE).as_deref(), Some("uio_pci_generic"));
    words(&fake.release_at("0000:09:00.0", None), &["there is no NVMe drive"]);
    words(&fake.release_at("nvme1", None), &["a PCI address such as"]);
    fake.put("/sys/bus/pci/devices/0000:05:00.0/class", "0x030000\n");
    words(&fake.release_at("0000:05:00.0", None), &["NVMe, was expected, 0x030000 was found"]);
}

/// Two drives that had one name while each was bound: `release nvme1n1` gave back the one that came first.
#[test]
fn a_name_of_two_drives_is_refused_with_both_addresses() {
    let fake = Fake::new();
    fake.add("0000:03:00.0", 16);
    assert!(matches!(fake.bind("nvme1n1", None), End::Done));
    // The other drive comes back, and is given the name that is free.
    fake.unbind("0000:03:00.0");
    fake.probe("0000:03:00.0");
    assert!(fake.host.exists("/sys/bus/pci/devices/0000:03:00.0/nvme/nvme1"));
    words(&fake.release("nvme1n1", None), &["given the name to another one", "0000:02:00.0"]);
    assert!(matches!(fake.bind("nvme1n1", None), End::Done));
    for end in [fake.release("nvme1n1", None), fake.run(None, |m| find_bound(m.host, "nvme1").map(|_| ()))] {
        words(&end, &["several drives", "0000:02:00.0", "0000:03:00.0"]);
        assert!(matches!(&end, End::Failed(e) if e.is_refusal()));
    }
    let both = fake.run(None, |m| m.release(Some("nvme1n1"), Some("03:00.0"), false, &mut |_| ()));
    assert!(matches!(both, End::Done), "{both:?}");
    let other = fake.run(None, |m| m.release(Some("nvme0n1"), Some(SPARE), false, &mut |_| ()));
    words(&other, &["it is not the drive at 0000:02:00.0"]);
    assert_eq!(fake.driver(SPARE).as_deref(), Some("vfio-pci"));
}

/// `bind` took a drive by any link below `/dev`, and `release` knew those below `by-id` alone. A record of more links than are
/// read could not be used.
#[test]
fn a_drive_is_given_back_by_the_link_that_it_was_bound_by() {
    for link in ["/dev/disk/by-path/pci-0000:02:00.0-nvme-1", "/dev/disk/by-label/data", "/dev/fast/models"] {
        let fake = Fake::new();
        fake.link(link, "../../nvme1n1");
        fake.link("/dev/disk/by-uuid/1234", "../../nvme1n1");
        for i in 0..3000 {
            fake.link(&format!("/dev/disk/by-id/nvme-Model_X_and_a_long_name_of_it-part{i}"), "../../nvme1n1p1");
        }
        assert!(matches!(fake.bind(link, None), End::Done), "{link}");
        std::fs::remove_dir_all(fake.real("/dev/disk")).unwrap();
        assert!(find_bound(&fake.host, "/dev/disk/by-uuid/1234").is_ok(), "{link}");
        // Another drive has it now.
        fake.link(link, "../../nvme0n1");
        words(&fake.release(link, None), &["given the name to another one", "0000:02:00.0"]);
        // It is there, and leads nowhere.
        fake.link(link, "../../nvme1n1");
        let end = fake.release(link, None);
        assert!(matches!(end, End::Done), "{link}: {end:?}");
        fake.is_the_kernels(SPARE);
    }
}

/// Records of another boot, of a drive that is gone, and of one in whose place another was put.
#[test]
fn stale_records_name_nobody_and_are_removed() {
    let stale: [(&str, Make); 3] = [
        ("another boot", |f| f.put("/proc/sys/kernel/random/boot_id", "another\n")),
        ("gone", |f| f.unplug(SPARE)),
        ("replaced", |f| {
            f.unplug(SPARE);
            // The old inode number must not be used again at once.
            f.folder("/taken");
            f.add_function(SPARE, 15);
            f.put(&format!("{}/driver_override", device(SPARE)), "vfio-pci");
            f.probe(SPARE);
        }),
    ];
    for (what, make) in stale {
        let fake = Fake::new();
        fake.bind("nvme1n1", None);
        make(&fake);
        assert!(bound(&fake.host).is_empty(), "{what}");
        assert!(matches!(find_bound(&fake.host, "nvme1n1"), Err(DeviceError::NotBound(_))), "{what}");
        let end = fake.release("nvme1n1", None);
        assert!(matches!(end, End::Done), "{what}: {end:?}");
        assert!(!fake.record(SPARE).exists(), "{what}");
    }
    // The next bind of another drive removes what is left of one that is gone, unless somebody works on it.
    let fake = Fake::new();
    fake.add("0000:03:00.0", 16);
    fake.bind("nvme1n1", None);
    fake.unplug(SPARE);
    let held = lock::lock(&fake.host, SPARE).unwrap();
    assert!(matches!(fake.bind("0000:03:00.0", None), End::Done));
    assert!(fake.record(SPARE).exists());
    drop(held);
    fake.release("0000:03:00.0", None);
    assert!(matches!(fake.bind("0000:03:00.0", None), End::Done));
    assert!(!fake.record(SPARE).exists() && fake.record("0000:03:00.0").exists());
    // Given back by hand: the next bind writes over it.
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    fake.put(&format!("{}/driver_override", device(SPARE)), "(null)");
    fake.unbind(SPARE);
    fake.probe(SPARE);
    assert!(bound(&fake.host).is_empty());
    assert!(matches!(fake.bind("nvme1n1", None), End::Done));
}

/// A stale record whose name or address is another device's by now: the record goes, and no drive is touched. The
/// drive at its address was taken from whoever had it, or the drive of its name lost its `driver_override`.
#[test]
fn a_stale_name_touches_no_drive() {
    const THIRD: &str = "0000:03:00.0";
    let untouched = |fake: &Fake, what: &str| {
        let log = fake.log.borrow();
        assert!(log.iter().all(|l| l.starts_with("removing ")), "{what}: {log:?}");
    };
    let guests = |fake: &Fake, pci: &str| {
        fake.unbind(pci);
        fake.put(&format!("{}/driver_override", device(pci)), "vfio-pci");
        fake.probe(pci);
    };
    type Stale = (&'static str, fn(&Fake, &dyn Fn(&Fake, &str)));
    let cases: [Stale; 4] = [
        ("another boot, and a guest has the drive now", |f, guests| {
            f.put("/proc/sys/kernel/random/boot_id", "another\n");
            f.put(&format!("{}/driver_override", device(SPARE)), "(null)");
            guests(f, SPARE);
        }),
        ("another drive was put in its place, and a guest has it", |f, guests| {
            f.unplug(SPARE);
            f.folder("/taken");
            f.add_function(SPARE, 15);
            guests(f, SPARE);
        }),
        ("gone, and the name is that of a drive that is about to be somebody's", |f, _| {
            f.unplug(SPARE);
            f.add(THIRD, 16);
            f.put(&format!("{}/driver_override", device(THIRD)), "vfio-pci");
        }),
        ("given back by hand under another name", |f, _| {
            f.add(THIRD, 16);
            assert!(f.host.exists(&format!("{}/nvme/nvme1", device(THIRD))));
            f.put(&format!("{}/driver_override", device(THIRD)), "vfio-pci");
            f.unbind(SPARE);
            f.put(&format!("{}/driver_override", device(SPARE)), "(null)");
            f.probe(SPARE);
        }),
    ];
    for (what, make) in cases {
        let fake = Fake::new();
        assert!(matches!(fake.bind("nvme1n1", None), End::Done));
        make(&fake, &guests);
        let before: Vec<_> = [SPARE, THIRD]
            .map(|pci| (fake.driver(pci), fake.host.read(&format!("{}/driver_override", device(pci))).ok()))
            .into();
        fake.log.borrow_mut().clear();
        let mut said = Vec::new();
        let end = fake.run(None, |m| m.release(Some("nvme1n1"), None, true, &mut |l| said.push(l.to_owned())));
        assert!(matches!(end, End::Done) && fake.record(SPARE).exists(), "{what}: {end:?}");
        assert!(said[0].contains("would remove a stale record"), "{what}: {said:?}");
        let end = fake.run(None, |m| m.release(Some("/dev/nvme1n1"), None, false, &mut |l| said.push(l.to_owned())));
        assert!(matches!(end, End::Done), "{what}: {end:?}");
        assert!(said[1].starts_with("removed a stale record of M"), "{what}: {said:?}");
        assert!(!fake.record(SPARE).exists(), "{what}");
        untouched(&fake, what);
        let after: Vec<_> = [SPARE, THIRD]
            .map(|pci| (fake.driver(pci), fake.host.read(&format!("{}/driver_override", device(pci))).ok()))
            .into();
        assert_eq!(before, after, "{what}");
    }
    // Nor does a stale record prove that a name and an address are the same drive's.
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    fake.put("/proc/sys/kernel/random/boot_id", "another\n");
    let end = fake.run(None, |m| m.release(Some("nvme1n1"), Some(SPARE), false, &mut |_| ()));
    words(&end, &["it is not the drive at 0000:02:00.0"]);
    assert_eq!(fake.driver(SPARE).as_deref(), Some("vfio-pci"));
}

/// A drive that somebody gave back by hand and binds by hand later, for a guest: no record of nt's may speak for it
/// then, or the group could open it.
#[test]
fn records_of_drives_given_back_by_hand_are_forgotten() {
    let fake = Fake::new();
    fake.add("0000:03:00.0", 16);
    fake.bind("nvme1n1", None);
    let by_hand = |forced: &str| {
        fake.unbind(SPARE);
        fake.put(&format!("{}/driver_override", device(SPARE)), forced);
        fake.probe(SPARE);
    };
    by_hand("(null)");
    assert!(matches!(fake.bind("0000:03:00.0", None), End::Done));
    assert!(!fake.record(SPARE).exists());
    by_hand("vfio-pci");
    assert!(bound(&fake.host).iter().all(|r| r.pci != SPARE));
    // And if no command of nt's saw it in between: the group of each taking is another one.
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    for forced in ["(null)", "vfio-pci"] {
        fake.unbind(SPARE);
        fake.folder("/taken/1/2/3"); // the old inode number must not be used again at once
        fake.put(&format!("{}/driver_override", device(SPARE)), forced);
        fake.probe(SPARE);
    }
    assert_eq!(record::load(&fake.host, SPARE).unwrap().standing(&fake.host), Standing::Retaken);
    assert!(bound(&fake.host).is_empty());
    assert!(matches!(find_bound(&fake.host, "nvme1n1"), Err(DeviceError::NotBound(_))));
    words(&fake.bind(SPARE, None), &["by no bind of nt's"]);
    assert!(matches!(fake.release("nvme1n1", None), End::Done));
    assert_eq!((fake.driver(SPARE).as_deref(), fake.record(SPARE).exists()), (Some("vfio-pci"), false));
    assert!(matches!(fake.release_at(SPARE, None), End::Done));
    fake.is_the_kernels(SPARE);
    // Its own, although the bind is refused afterwards.
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    fake.put(&format!("{}/driver_override", device(SPARE)), "(null)");
    fake.unbind(SPARE);
    fake.probe(SPARE);
    let reason = |_: &Host, _: &[_], d: &crate::storage::guard::Controller| {
        vec![Reason { check: Check::Mounted, path: d.pci_path().into(), what: "it is in use".into() }]
    };
    words(&fake.run(None, |m| take::bind(m, "nvme1n1", &reason, false, &mut |_| ())), &["it is in use"]);
    assert!(!fake.record(SPARE).exists());
}

/// A member of the group who keeps only the device's descriptor is not seen in /proc, but the kernel knows.
#[test]
fn a_group_in_use_is_refused_before_anything_changes() {
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    fake.busy.set(true);
    let end = fake.release("nvme1n1", None);
    words(&end, &["a process uses it (EBUSY) without the group's node open", "cannot be seen from here"]);
    assert!(matches!(&end, End::Failed(e) if e.is_refusal()));
    assert_eq!(fake.changes.get(), 0);
    // One that keeps the device alone is told of, though not which device it is.
    fake.put("/proc/66/comm", "qemu\n");
    fake.folder("/proc/66/fd");
    std::os::unix::fs::symlink("anon_inode:[vfio-device]", fake.real("/proc/66/fd/4")).unwrap();
    words(&fake.release("nvme1n1", None), &["VFIO devices open: process 66 (qemu)"]);
    // Seen by the number of its node, whatever its name, and in a thread's own table.
    // A process may call itself anything, and must not write lines of ours.
    fake.put("/proc/77/comm", "qemu\nnt: it is\x1b[2J\n");
    fake.folder("/proc/77/task/78/fd");
    std::os::unix::fs::symlink("/dev/vfio/15", fake.real("/proc/77/task/78/fd/9")).unwrap();
    let end = fake.release("nvme1n1", None);
    words(&end, &["process 77 (qemu\\nnt: it is\\u{1b}[2J) uses it", "/proc/77/task/78/fd/9"]);
    let dry = fake.run(None, |m| m.release(Some("nvme1n1"), None, true, &mut |_| ()));
    words(&dry, &["process 77"]);
    fake.busy.set(false);
    assert!(matches!(fake.release("nvme1n1", None), End::Done));
}

/// An unbind that the kernel does not finish: the command ends with a sentence, and other drives can be bound.
#[test]
fn a_stuck_unbind_holds_up_nobody() {
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    fake.stuck.set(true);
    words(&fake.release("nvme1n1", None), &["the kernel did not answer", "goes on by itself"]);
    words(&fake.bind("nvme1n1", None), &["a release has begun", "release --pci 0000:02:00.0"]);
    assert!(bound(&fake.host).is_empty(), "a drive that is being given back is not used");
    let held = lock::lock(&fake.host, SPARE).unwrap();
    fake.stuck.set(false);
    fake.add("0000:03:00.0", 16);
    assert!(matches!(fake.bind("0000:03:00.0", None), End::Done), "each drive has its own lock");
    words(&fake.release(SPARE, None), &["another nt command"]);
    drop(held);
    assert!(matches!(fake.release(SPARE, None), End::Done));
}

#[test]
fn modules_are_there_before_anything_changes() {
    for missing in ["/sys/bus/pci/drivers/vfio-pci", "/sys/module/vfio_iommu_type1"] {
        let fake = Fake::new();
        fs::remove_dir(fake.real(missing)).unwrap();
        fake.loadable.set(false);
        words(&fake.bind("nvme1n1", None), &["loading the module", "not found in directory"]);
        fake.is_the_kernels(SPARE);
        fake.loadable.set(true);
        assert!(matches!(fake.bind("nvme1n1", None), End::Done), "{missing}");
    }
}

#[test]
fn a_failure_after_the_probe_is_undone() {
    let fake = Fake::new();
    fake.no_node.set(true);
    words(&fake.bind("nvme1n1", None), &["waiting for /dev/vfio/15", "did not appear"]);
    fake.is_the_kernels(SPARE);
    // Nor is a drive that the kernel does not want back called given back.
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    fake.rejected.set(true);
    words(&fake.release("nvme1n1", None), &["giving 0000:02:00.0 back to the nvme driver failed"]);
    assert!(!fake.record(SPARE).exists());
    fake.rejected.set(false);
    assert!(matches!(fake.release(SPARE, None), End::Done));
    fake.is_the_kernels(SPARE);
}

#[test]
fn every_reason_and_every_change_under_the_claim_refuses() {
    let fake = Fake::new();
    let reason = |host: &Host, _: &[crate::storage::guard::Controller], d: &crate::storage::guard::Controller| {
        let _ = host;
        vec![Reason { check: Check::Mounted, path: d.pci_path().into(), what: "it is in use".into() }]
    };
    let end = fake.run(None, |m| take::bind(m, "nvme1n1", &reason, false, &mut |_| ()));
    words(&end, &["mounted: it is in use"]);
    // Asked to stop meanwhile, it is not called refused: what was not looked at then is no reason.
    let end = fake.run(None, |m| {
        let stop = |host: &Host, all: &[_], d: &crate::storage::guard::Controller| {
            fake.stopped.set(true);
            reason(host, all, d)
        };
        take::bind(m, "nvme1n1", &stop, false, &mut |_| ())
    });
    assert!(matches!(end, End::Failed(DeviceError::Interrupted(_))), "{end:?}");
    // At the second check it has grown.
    let times = std::cell::Cell::new(0);
    let end = fake.run(None, |m| {
        let grow = |_: &Host, _: &[_], _: &crate::storage::guard::Controller| {
            times.set(times.get() + 1);
            fake.put("/sys/class/block/nvme1n1/size", "8192");
            Vec::new()
        };
        take::bind(m, "nvme1n1", &grow, false, &mut |_| ())
    });
    words(&end, &["it changed while it was being checked"]);
    assert_eq!(times.get(), 2);
    assert_eq!(fake.changes.get(), 0);
}

#[test]
fn addresses_are_read_strictly() {
    for (text, found) in [
        ("02:00.0", Some("0000:02:00.0")),
        ("0000:0A:1f.7", Some("0000:0a:1f.7")),
        ("10000:02:00.0", Some("10000:02:00.0")),
        ("0000:02:00.8", None),
        ("0000:02:00.00", None),
        ("0000:02:00", None),
        ("../02:00.0", None),
        ("nvme0", None),
        ("", None),
        ("0:02:00.0", None),
        ("0000:02:00.0:1", None),
    ] {
        assert_eq!(record::address(text).as_deref(), found, "{text}");
    }
}

/// Who holds the lock is alone with the drive: two threads, 1,000 tries each.
#[test]
fn race_of_two_commands_on_one_drive() {
    let fake = Fake::new();
    let inside = std::sync::atomic::AtomicU32::new(0);
    let taken = std::sync::atomic::AtomicU32::new(0);
    let host = fake.host.clone();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..1000 {
                    let Ok(held) = lock::lock(&host, SPARE) else { continue };
                    assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                    taken.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    drop(held);
                }
            });
        }
    });
    assert!(taken.into_inner() > 0);
    let mode = fs::metadata(fake.real("/run/nt/0000:02:00.0.lock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "anybody could hold the lock of a file that he can open");
}

/// Whoever lists drives while they are bound and released sees whole records.
#[test]
fn race_of_a_reader_against_the_journal() {
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    let mut record = record::load(&fake.host, SPARE).unwrap();
    let host = fake.host.clone();
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                let found = record::load(&host, SPARE).expect("a whole record");
                assert!(matches!(found.state, State::Bound | State::Releasing));
            }
        });
        for n in 0..1000 {
            record.state = if n % 2 == 0 { State::Bound } else { State::Releasing };
            record::save(&fake.host, &record).unwrap();
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

/// What may lie in the folder of records is neither used nor followed, and hangs nobody.
#[test]
fn odd_records_are_passed_over() {
    use std::os::unix::fs::symlink;
    type Lay = fn(&std::path::Path);
    let cases: [(&str, Lay); 9] = [
        ("a FIFO", |p| nix::unistd::mkfifo(p, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap()),
        ("zeros", |p| symlink("/dev/zero", p).unwrap()),
        ("a terminal", |p| symlink("/dev/tty", p).unwrap()),
        ("a dangling link", |p| symlink("/nowhere", p).unwrap()),
        ("a folder", |p| fs::create_dir(p).unwrap()),
        ("nothing in it", |p| fs::write(p, "").unwrap()),
        ("a TB", |p| fs::File::create(p).unwrap().set_len(1 << 40).unwrap()),
        ("no TOML", |p| fs::write(p, [0xff; 100]).unwrap()),
        ("deep TOML", |p| fs::write(p, format!("a = {}", "[".repeat(60_000))).unwrap()),
    ];
    for (what, lay) in cases {
        let fake = Fake::new();
        fake.bind("nvme1n1", None);
        fs::remove_file(fake.record(SPARE)).unwrap();
        lay(&fake.record(SPARE));
        assert!(bound(&fake.host).is_empty(), "{what}");
        let end = fake.release(SPARE, None);
        assert!(matches!(end, End::Done), "{what}: {end:?}");
        assert_eq!(fake.driver(SPARE).as_deref(), Some("nvme"), "{what}");
        assert_eq!(fake.record(SPARE).exists(), what == "a folder", "{what}");
    }
    // A link in place of the whole folder, or a folder of somebody else's.
    let fake = Fake::new();
    fake.folder("/elsewhere");
    fake.folder("/run");
    symlink(fake.real("/elsewhere"), fake.real("/run/nt")).unwrap();
    words(&fake.bind("nvme1n1", None), &["making /run/nt", "a link lies in place"]);
    assert_eq!(fs::read_dir(fake.real("/elsewhere")).unwrap().count(), 0);
    if nix::unistd::geteuid().is_root() {
        let fake = Fake::new();
        fake.folder("/run/nt");
        std::os::unix::fs::chown(fake.real("/run/nt"), Some(1000), None).unwrap();
        words(&fake.bind("nvme1n1", None), &["belongs to user 1000"]);
        let fake = Fake::new();
        fake.bind("nvme1n1", None);
        std::os::unix::fs::chown(fake.record(SPARE), Some(1000), None).unwrap();
        assert!(bound(&fake.host).is_empty(), "a record that a user wrote");
        // A link in place of the lock, which root would have made elsewhere.
        let fake = Fake::new();
        fake.folder("/run/nt");
        symlink(fake.real("/made"), fake.real("/run/nt/0000:02:00.0.lock")).unwrap();
        words(&fake.bind("nvme1n1", None), &["locking /run/nt/0000:02:00.0.lock"]);
        assert!(!fake.real("/made").exists());
    }
}

/// With `/run` full, or only to be read, a release ended before its first step and left the drive bound: going back needs
/// neither the journal nor room for a lock.
#[test]
fn a_release_needs_no_room_for_its_journal() {
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    let mut said = Vec::new();
    let end = fake.run(Some((1, Blow::Fail)), |m| {
        m.release(Some("nvme1n1"), None, false, &mut |line| said.push(line.to_owned()))
    });
    assert!(matches!(end, End::Done), "{end:?}");
    assert!(said.iter().any(|l| l.contains("the record could not be moved forward")), "{said:?}");
    fake.is_the_kernels(SPARE);
    // And where the record cannot be removed either, it is known as stale: it names nobody, and the next bind goes on.
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    let bytes = fs::read(fake.record(SPARE)).unwrap();
    assert!(matches!(fake.release("nvme1n1", None), End::Done));
    fs::write(fake.record(SPARE), bytes).unwrap();
    assert_eq!(record::load(&fake.host, SPARE).unwrap().standing(&fake.host), Standing::Undone);
    assert!(matches!(fake.bind("nvme1n1", None), End::Done));
}

/// The lock of a release where no file can be made or written: the one that is there, never another command's.
#[test]
fn a_lock_that_cannot_be_made_is_told_from_one_that_is_held() {
    let fake = Fake::new();
    let held = lock::lock(&fake.host, SPARE).unwrap();
    words(&fake.release_at(SPARE, None), &["another nt command"]);
    drop(held);
    let existing = lock::existing(&fake.host, SPARE).unwrap();
    assert!(existing.is_some());
    words(&fake.release_at(SPARE, None), &["another nt command"]);
    let Err(e) = lock::existing(&fake.host, SPARE) else { panic!("two have it") };
    words(&End::Failed(e), &["another nt command"]);
    assert!(lock::existing(&fake.host, BOOT).unwrap().is_none());
}

/// A bound drive that somebody unbound by hand, its `driver_override` left: it was called somebody else's, and `release`
/// by its name left it without a driver.
#[test]
fn a_drive_that_was_unbound_by_hand_is_given_back() {
    for by_address in [false, true] {
        let fake = Fake::new();
        fake.bind("nvme1n1", None);
        fake.unbind(SPARE);
        assert_eq!(record::load(&fake.host, SPARE).unwrap().standing(&fake.host), Standing::Holds);
        assert!(bound(&fake.host).is_empty());
        let used = fake.run(None, |m| find_bound(m.host, "nvme1n1").map(|_| ()));
        words(&used, &["somebody has unbound it since", "release --pci 0000:02:00.0"]);
        words(&fake.bind(SPARE, None), &["somebody has unbound it since"]);
        let end = if by_address { fake.release_at(SPARE, None) } else { fake.release("nvme1n1", None) };
        assert!(matches!(end, End::Done), "{end:?}");
        fake.is_the_kernels(SPARE);
    }
}

/// A kill between the two left a group's node handed over by no record: it is handed over last.
#[test]
fn a_node_is_handed_over_after_the_record_says_so() {
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    let at = fake.log.borrow().iter().position(|change| change.starts_with("handing")).unwrap();
    assert_eq!(at + 1, fake.log.borrow().len(), "{:?}", fake.log.borrow());
    let fake = Fake::new();
    assert!(matches!(fake.bind("nvme1n1", Some((at as u32 + 1, Blow::Kill))), End::Killed));
    let record = record::load(&fake.host, SPARE).unwrap();
    assert_eq!((record.state, record.standing(&fake.host)), (State::Bound, Standing::Holds));
    assert!(matches!(fake.release("nvme1n1", None), End::Done));
    fake.is_the_kernels(SPARE);
}

/// A record that is empty or damaged made `release` by name say that there is no such drive, and nothing told of it.
#[test]
fn a_damaged_record_is_told_of() {
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    assert!(damaged_records(&fake.host).is_empty());
    fs::write(fake.record(SPARE), "").unwrap();
    assert_eq!(damaged_records(&fake.host), [SPARE]);
    let helps = ["/run/nt/0000:02:00.0.toml", "damaged", "sudo nt device release --pci 0000:02:00.0"];
    words(&fake.release("nvme1n1", None), &helps);
    words(&fake.bind("nvme1n1", None), &helps);
    assert!(matches!(fake.release_at(SPARE, None), End::Done));
    fake.is_the_kernels(SPARE);
    // With nothing else to give back, the record alone is removed.
    fs::write(fake.record(SPARE), "").unwrap();
    assert!(matches!(fake.release_at(SPARE, None), End::Done));
    fake.is_the_kernels(SPARE);
    words(&fake.release_at(SPARE, None), &["is not bound"]);
}

/// A stage that was killed after it had the kernel forget the partitions: that they are there is known by the table.
#[test]
fn forgotten_partitions_are_known_by_the_table() {
    let fake = Fake::new();
    let forgotten = |fake: &Fake| {
        let all = super::super::guard::sysfs::controllers(&fake.host).unwrap();
        claim::are_forgotten(&fake.host, all.iter().find(|c| c.bdf == SPARE).unwrap())
    };
    let mut bytes = vec![0; 4096 * 512];
    assert!(!forgotten(&fake), "an empty drive has none");
    bytes[446 + 4] = 0x83;
    bytes[446 + 8..446 + 16].copy_from_slice(&[0, 8, 0, 0, 0, 4, 0, 0]);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(fake.real("/dev/nvme1n1"), bytes).unwrap();
    assert!(forgotten(&fake));
    for base in ["/sys/class/block/nvme1n1/nvme1n1p1", "/sys/class/block/nvme1n1p1"] {
        for (file, text) in [("partition", "1"), ("start", "2048"), ("size", "1024"), ("dev", "259:7")] {
            fake.put(&format!("{base}/{file}"), text);
        }
    }
    assert!(!forgotten(&fake));
}

/// A drive that is half bound is not staged on either.
#[test]
fn a_half_bound_drive_is_not_claimed_to_write() {
    let fake = Fake::new();
    fake.bind("nvme1n1", Some((3, Blow::Kill)));
    let end = fake.run(None, |m| claim_to_write(m.host, "nvme1n1", "S", None, &Err("no list".into())).map(|_| ()));
    words(&end, &["a bind has begun", "release --pci 0000:02:00.0"]);
    let fake = Fake::new();
    fake.put(&format!("{}/driver_override", device(SPARE)), "vfio-pci");
    let end = fake.run(None, |m| claim_to_write(m.host, "nvme1n1", "S", None, &Err("no list".into())).map(|_| ()));
    words(&end, &["its driver_override is vfio-pci"]);
    let held = lock::lock(&fake.host, SPARE).unwrap();
    let end = fake.run(None, |m| claim_to_write(m.host, "nvme1n1", "S", None, &Err("no list".into())).map(|_| ()));
    words(&end, &["another nt command binds, releases or stages this drive"]);
    drop(held);
}

/// A drive was erased whose node had been given the name of the one that was meant: claims go by number.
#[test]
fn a_node_of_another_drive_is_not_claimed() {
    let fake = Fake::new();
    let node = fake.real("/dev/nvme1n1");
    for target in ["nvme0n1", "../srv/file"] {
        fake.put("/srv/file", "");
        fs::remove_file(&node).unwrap();
        std::os::unix::fs::symlink(target, &node).unwrap();
        words(&fake.bind("nvme1n1", None), &["cannot be claimed", "259:1", "udevadm"]);
        fake.is_the_kernels(SPARE);
        let all = super::super::guard::sysfs::controllers(&fake.host).unwrap();
        let drive = all.iter().find(|c| c.bdf == SPARE).unwrap();
        let opened = claim::open_to_write(&fake.host, "nvme1n1", &drive.namespaces[0].whole);
        words(&End::Failed(opened.unwrap_err()), &["cannot be claimed for writing", "259:1"]);
    }
}

/// The refusal of a stage names the line that lets data be erased, not the one that lets it be read.
#[test]
fn a_stage_says_that_what_it_holds_will_be_erased() {
    let fake = Fake::new();
    fs::write(fake.real("/dev/nvme1n1"), vec![7; 2 << 20]).unwrap();
    let claimed = claim_to_write(&fake.host, "nvme1n1", "S 0000:02:00.0", None, &Err("no list".into()));
    let Err(e) = claimed else { panic!("it was claimed") };
    words(
        &End::Failed(e),
        &["it holds unknown data; if all of it may be lost, its entry needs the line erase = [\"unknown data\"]"],
    );
}

/// A node of another group, left under the name of the drive's, is not handed to anybody.
#[test]
fn a_node_of_another_group_is_not_handed_over() {
    let fake = Fake::new();
    fake.put("/sys/class/vfio/15/dev", "244:0\n");
    words(&fake.bind("nvme1n1", None), &["/dev/vfio/15", "character device 244:0"]);
    fake.is_the_kernels(SPARE);
    assert!(!fake.log.borrow().iter().any(|change| change.starts_with("handing")));
    // Nor is it opened by who reads the drive, or asks for its health.
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    assert!(group_node_is_right(&fake.host, SPARE).is_ok());
    fake.put("/sys/class/vfio/15/dev", "244:0\n");
    let e = group_node_is_right(&fake.host, SPARE).unwrap_err().to_string();
    assert!(e.contains("/dev/vfio/15") && e.contains("character device 244:0"), "{e}");
    let (drive, _) = find_bound(&fake.host, "nvme1n1").unwrap();
    assert_eq!(crate::storage::health::of_bound(&fake.host, &drive), Err(e));
}

/// Between the examination under the claim and the unbind somebody opened the drive, or wrote to it and was gone again: the
/// drive stays with the kernel, and nothing of the bind is left.
#[test]
fn whoever_comes_before_the_unbind_keeps_the_drive() {
    let comes: [(&str, Make); 4] = [
        ("has /dev/nvme1n1 open", |f| {
            f.folder("/proc/77/fd");
            std::os::unix::fs::symlink("/dev/nvme1n1", f.real("/proc/77/fd/3")).unwrap();
        }),
        ("has /dev/nvme1n1 mapped", |f| f.put("/proc/77/map_files/1000-2000", "b 259:1")),
        ("somebody wrote to it", |f| f.put("/sys/class/block/nvme1n1/stat", "0 0 0 0 1 0 8 0 0 0 0\n")),
        ("has I/O under way", |f| f.put("/sys/class/block/nvme1n1/inflight", "0 1\n")),
    ];
    for (what, act) in comes {
        let fake = Fake::new();
        // Changes of a bind: the first note, driver_override, the second note; the look comes after that.
        fake.meanwhile.set(Some((3, act)));
        let end = fake.bind("nvme1n1", None);
        words(&end, &[what]);
        assert!(matches!(&end, End::Failed(e) if e.is_refusal()), "{what}");
        fake.is_the_kernels(SPARE);
        assert!(fake.log.borrow().iter().all(|l| !l.contains("/driver/unbind")), "{what}: {:?}", fake.log.borrow());
    }
}

/// Ten thousand changes from a seed of a record: none panics, none is of another address, and what was no bound drive by
/// the record as it was written is none by a changed one.
#[test]
fn a_changed_record_binds_nothing() {
    use rand::{RngExt, SeedableRng};
    let fake = Fake::new();
    assert!(matches!(fake.bind("nvme1n1", None), End::Done));
    let mut record = record::load(&fake.host, SPARE).unwrap();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(17);
    for state in [State::Begun, State::Override, State::Unbound, State::Bound, State::Releasing] {
        record.state = state;
        let original = toml::to_string(&record).unwrap().into_bytes();
        let mut usable = 0;
        for round in 0..2000 {
            let mut bytes = original.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..bytes.len().max(1)).min(bytes.len().saturating_sub(1));
                match rng.random_range(0..5) {
                    _ if bytes.is_empty() => {}
                    0 => bytes[at] ^= 1 << rng.random_range(0..8),
                    1 => bytes[at] = b"0123456789abcdef#\n\"=[]"[rng.random_range(0..22)],
                    2 => drop(bytes.remove(at)),
                    3 => bytes.truncate(at + 1),
                    _ => bytes.insert(at, b"#\n\"x"[rng.random_range(0..4)]),
                }
            }
            fs::write(fake.record(SPARE), &bytes).unwrap();
            let found = record::load(&fake.host, SPARE);
            assert!(found.is_none_or(|r| r.pci == SPARE), "round {round}");
            let _ = find_bound(&fake.host, "nvme1n1");
            let bound = bound(&fake.host);
            usable += bound.len();
            assert!(bound.is_empty() || state == State::Bound, "{state:?}: {}", String::from_utf8_lossy(&bytes));
        }
        assert_eq!(usable > 0, state == State::Bound);
    }
}
