//! Attacks on files that a privileged command reads or writes: what others may lie in their place, and races
//! against each step.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// Puts something at a path.
type Lay<'a> = &'a dyn Fn(&Path);

/// Tries of a race.
const TRIES: usize = 1000;

/// A folder in memory where there is one: syncing to a disk would make these tests slow.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn fifo(path: &Path) {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
}

/// Things that may lie in place of a file, by what they are.
fn traps(folder: &Path) -> Vec<(&'static str, PathBuf)> {
    let at = |name: &str| folder.join(name);
    fifo(&at("fifo"));
    symlink(at("fifo"), at("link to a fifo")).unwrap();
    symlink("/dev/zero", at("link to zeros")).unwrap();
    symlink("/dev/tty", at("link to a terminal")).unwrap();
    symlink(at("nowhere"), at("dangling link")).unwrap();
    symlink(at("loop"), at("loop")).unwrap();
    fs::create_dir(at("folder")).unwrap();
    symlink(at("folder"), at("link to a folder")).unwrap();
    drop(UnixListener::bind(at("socket")).unwrap());
    [
        "fifo",
        "link to a fifo",
        "link to zeros",
        "link to a terminal",
        "dangling link",
        "loop",
        "folder",
        "link to a folder",
        "socket",
    ]
    .map(|name| (name, at(name)))
    .into()
}

/// Runs `attack` over and over in a thread while `step` is taken many times.
fn race(attack: impl Fn(usize) + Sync, mut step: impl FnMut(usize)) {
    /// A failed step ends the attack as well.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let attacker = scope.spawn(|| {
            for n in 0.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                attack(n);
            }
        });
        let end = Over(&over);
        (0..TRIES).for_each(&mut step);
        drop(end);
        attacker.join().unwrap();
    });
}

/// Puts the file at `from` to `to` in one step, as `mv` does.
fn swap(make: impl Fn(&Path), to: &Path, n: usize) {
    let from = to.with_extension(format!("swap{}", n % 2));
    let _ = fs::remove_file(&from);
    make(&from);
    fs::rename(&from, to).unwrap();
}

#[test]
fn nothing_but_a_plain_file_is_read() {
    let folder = scratch();
    for (what, path) in traps(folder.path()) {
        assert!(read(&path, 1 << 20).is_err(), "{what}");
        assert!(open(&path).is_err(), "{what}");
    }
    // A link is followed where a user names a file, not where a record is expected.
    let file = folder.path().join("file");
    fs::write(&file, b"words").unwrap();
    symlink(&file, folder.path().join("link")).unwrap();
    assert!(open(&folder.path().join("link")).is_ok());
    assert!(read(&folder.path().join("link"), 1 << 20).is_err());
    assert_eq!(read(&file, 5).unwrap().bytes, b"words");
    assert!(read(&file, 4).unwrap_err().to_string().contains("more than 4 bytes"));
    // Sparse: it takes no room on the disk, but would in memory.
    let huge = File::create(folder.path().join("huge")).unwrap();
    huge.set_len(1 << 40).unwrap();
    assert!(read(&folder.path().join("huge"), 1 << 20).is_err());
}

#[test]
fn a_file_is_replaced_and_what_lay_there_is_not_written() {
    let folder = scratch();
    let victim = folder.path().join("victim");
    fs::write(&victim, b"theirs").unwrap();
    let target = folder.path().join("record");
    let hard = |to: &Path| fs::hard_link(&victim, to).unwrap();
    let soft = |to: &Path| symlink(&victim, to).unwrap();
    let traps: [(&str, Lay<'_>); 4] = [
        ("hard link", &hard),
        ("link", &soft),
        ("fifo", &|to| fifo(to)),
        ("dangling link", &|to| symlink("/nowhere/x", to).unwrap()),
    ];
    for (what, lay) in traps {
        lay(&target);
        // Under the name that older versions wrote to first.
        let _ = fs::remove_file(target.with_extension("part"));
        soft(&target.with_extension("part"));
        replace(&target, b"ours", 0o644, ".nt-").unwrap();
        assert_eq!(read(&target, 100).unwrap().bytes, b"ours", "{what}");
        assert_eq!(fs::read(&victim).unwrap(), b"theirs", "{what}");
        fs::remove_file(&target).unwrap();
    }
    fs::create_dir(&target).unwrap();
    assert!(replace(&target, b"ours", 0o644, ".nt-").is_err());
    let left = fs::read_dir(folder.path())
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with(".nt-"));
    assert_eq!(left.count(), 0, "nothing half written is left");
    let mode = fs::metadata(&victim).unwrap().permissions().mode();
    replace(&victim, b"x", 0o644, ".nt-").unwrap();
    assert!(
        fs::metadata(&victim).unwrap().permissions().mode() & 0o777 == 0o644,
        "whatever the umask; it was {mode:o}"
    );
}

#[test]
fn a_folder_is_ours_or_refused() {
    let folder = scratch();
    for (what, path) in traps(folder.path()) {
        if what != "folder" {
            assert!(own_folder(&path, true).is_err(), "{what}");
        }
    }
    assert!(!folder.path().join("nowhere").exists(), "a dangling link is not filled");
    let open = folder.path().join("open");
    fs::create_dir(&open).unwrap();
    for (mode, shared, private) in [(0o2775, 0o755, 0o2755), (0o777, 0o755, 0o755), (0o700, 0o755, 0o700)] {
        for (wanted, is) in [(true, shared), (false, private)] {
            fs::set_permissions(&open, Permissions::from_mode(mode)).unwrap();
            own_folder(&open, wanted).unwrap();
            assert_eq!(fs::metadata(&open).unwrap().permissions().mode() & 0o7777, is, "{mode:o}");
        }
    }
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(&open, Some(1000), None).unwrap();
        assert!(own_folder(&open, true).unwrap_err().to_string().contains("belongs to user 1000"));
    }
    // Renamed away after it was checked: what is written goes there and not to what lies in its place.
    let place = folder.path().join("place");
    let held = own_folder(&place, false).unwrap();
    fs::rename(&place, folder.path().join("moved")).unwrap();
    symlink(folder.path().join("open"), &place).unwrap();
    replace(&held.at("record"), b"ours", 0o644, ".nt-").unwrap();
    assert!(folder.path().join("moved/record").exists());
    assert!(!folder.path().join("open/record").exists());
}

#[test]
fn what_others_can_change_is_not_ours_alone() {
    let folder = scratch();
    let inner = folder.path().join("a/b");
    fs::create_dir_all(&inner).unwrap();
    let set = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    set(&inner, 0o755);
    set(inner.parent().unwrap(), 0o755);
    assert!(is_ours_alone(&inner));
    set(inner.parent().unwrap(), 0o777);
    assert!(!is_ours_alone(&inner), "others could put another folder there");
    set(inner.parent().unwrap(), 0o1777);
    assert!(is_ours_alone(&inner), "a sticky folder, as /tmp is");
    set(&inner, 0o775);
    assert!(!is_ours_alone(&inner));
    set(&inner, 0o1777);
    assert!(!is_ours_alone(&inner), "others could put files there");
    assert!(!is_ours_alone(&folder.path().join("nowhere")));
}

/// Race 1: the final name is a link to the victim, or not, while root writes.
#[test]
fn race_of_a_link_at_the_target() {
    let folder = scratch();
    let (victim, target) = (folder.path().join("victim"), folder.path().join("record"));
    fs::write(&victim, b"theirs").unwrap();
    race(
        |n| {
            swap(|p| if n % 2 == 0 { symlink(&victim, p).unwrap() } else { fs::write(p, b"bait").unwrap() }, &target, n)
        },
        |_| replace(&target, b"ours", 0o644, ".nt-").unwrap(),
    );
    assert_eq!(fs::read(&victim).unwrap(), b"theirs");
}

/// Race 2: links lie under every name that is seen to appear while root writes.
#[test]
fn race_of_links_at_the_random_names() {
    let folder = scratch();
    let outside = scratch();
    let (victim, target) = (outside.path().join("victim"), folder.path().join("record"));
    fs::write(&victim, b"theirs").unwrap();
    race(
        |_| {
            for entry in fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                if entry.file_name().to_string_lossy().starts_with(".nt-") {
                    let _ = fs::remove_file(entry.path());
                    let _ = symlink(&victim, entry.path());
                }
            }
        },
        // Who may delete here may make it fail, and more not.
        |_| drop(replace(&target, b"ours", 0o644, ".nt-")),
    );
    assert_eq!(fs::read(&victim).unwrap(), b"theirs");
    assert_ne!(fs::metadata(&victim).unwrap().permissions().mode() & 0o777, 0o600);
}

/// Race 3: a record is a link to a secret, or not, while root reads.
#[test]
fn race_of_a_link_to_a_secret() {
    let folder = scratch();
    let (secret, target) = (folder.path().join("secret"), folder.path().join("record"));
    fs::write(&secret, b"secret").unwrap();
    fs::write(&target, b"record").unwrap();
    race(
        |n| {
            swap(
                |p| if n % 2 == 0 { symlink(&secret, p).unwrap() } else { fs::write(p, b"record").unwrap() },
                &target,
                n,
            )
        },
        |_| {
            if let Ok(found) = read(&target, 100) {
                assert_eq!(found.bytes, b"record");
            }
        },
    );
}

/// Race 4: a record is a FIFO, or not, while root reads. Nobody ever writes to the FIFO.
#[test]
fn race_of_a_fifo_against_a_read() {
    let folder = scratch();
    let target = folder.path().join("record");
    fs::write(&target, b"record").unwrap();
    race(
        |n| swap(|p| if n % 2 == 0 { fifo(p) } else { fs::write(p, b"record").unwrap() }, &target, n),
        |_| {
            if let Ok(found) = read(&target, 100) {
                assert_eq!(found.bytes, b"record");
            }
        },
    );
}

/// Race 5: a file that is named by a table is a FIFO, or not.
#[test]
fn race_of_a_fifo_against_an_open() {
    let folder = scratch();
    let target = folder.path().join("model");
    fs::write(&target, b"GGUF").unwrap();
    race(
        |n| swap(|p| if n % 2 == 0 { fifo(p) } else { fs::write(p, b"GGUF").unwrap() }, &target, n),
        |_| {
            if let Ok(file) = open(&target) {
                assert!(file.metadata().unwrap().is_file());
            }
        },
    );
}

/// Race 6: a file that is named is a link to a device without end, or not.
#[test]
fn race_of_a_device_against_an_open() {
    let folder = scratch();
    let target = folder.path().join("model");
    fs::write(&target, b"GGUF").unwrap();
    race(
        |n| {
            swap(
                |p| if n % 2 == 0 { symlink("/dev/zero", p).unwrap() } else { fs::write(p, b"GGUF").unwrap() },
                &target,
                n,
            )
        },
        |_| {
            if let Ok(mut file) = open(&target) {
                let mut bytes = Vec::new();
                (&mut file).take(10).read_to_end(&mut bytes).unwrap();
                assert_eq!(bytes, b"GGUF");
            }
        },
    );
}

/// Race 7: a record grows while it is read.
#[test]
fn race_of_a_record_that_grows() {
    let folder = scratch();
    let target = folder.path().join("record");
    let file = File::create(&target).unwrap();
    race(
        |n| file.set_len(if n % 2 == 0 { 1 << 40 } else { 10 }).unwrap(),
        |_| {
            if let Ok(found) = read(&target, 4096) {
                assert!(found.bytes.len() <= 4096);
            }
        },
    );
}

/// Race 8: the folder is renamed and a link laid in its place between the check and the write.
#[test]
fn race_of_a_link_in_place_of_the_folder() {
    let base = scratch();
    let (place, away, target) = (base.path().join("S1"), base.path().join("away"), base.path().join("target"));
    fs::create_dir(&target).unwrap();
    race(
        |_| {
            if fs::rename(&place, &away).is_ok() {
                let _ = symlink(&target, &place);
                let _ = fs::remove_file(&place);
                let _ = fs::rename(&away, &place);
            }
        },
        |_| {
            if let Ok(folder) = own_folder(&place, false) {
                drop(replace(&folder.at("record"), b"ours", 0o644, ".nt-"));
            }
        },
    );
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
}

/// Race 9: who reads while root replaces sees one whole record or the other.
#[test]
fn race_of_a_reader_against_a_replacement() {
    let folder = scratch();
    let target = folder.path().join("record");
    let texts = [vec![b'a'; 9000], vec![b'b'; 7000]];
    replace(&target, &texts[0], 0o644, ".nt-").unwrap();
    race(
        |_| {
            let found = read(&target, 1 << 20).unwrap().bytes;
            assert!(texts.contains(&found), "{} bytes", found.len());
        },
        |n| replace(&target, &texts[n % 2], 0o644, ".nt-").unwrap(),
    );
}

/// What is no file of the user's is not opened for writing, however it is named.
#[test]
fn a_file_is_made_or_emptied_and_no_device_is_opened() {
    use std::io::Write;
    use std::os::unix::fs::lchown;
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    let text = |name: &str| fs::read_to_string(at(name)).unwrap();
    create(&at("new")).unwrap().write_all(b"ours").unwrap();
    assert_eq!(text("new"), "ours");
    create(&at("new")).unwrap().write_all(b"x").unwrap();
    assert_eq!(text("new"), "x");
    symlink("new", at("link")).unwrap();
    symlink(at("made"), at("dangling")).unwrap();
    create(&at("link")).unwrap().write_all(b"by a link").unwrap();
    create(&at("dangling")).unwrap().write_all(b"made").unwrap();
    assert_eq!((text("new").as_str(), text("made").as_str()), ("by a link", "made"));
    assert!(at("link").is_symlink());
    symlink("circle", at("circle")).unwrap();
    assert!(create(&at("circle")).is_err() && create(folder.path()).is_err() && create(&at("no/folder")).is_err());
    // Whatever stdout is, /dev/stdout leads there by a link of /proc.
    let (mut read, write) = std::io::pipe().unwrap();
    for name in [format!("/proc/self/fd/{}", write.as_raw_fd()), format!("/dev/fd/{}", write.as_raw_fd())] {
        create(Path::new(&name)).unwrap().write_all(b"piped").unwrap();
    }
    drop(write);
    let mut piped = String::new();
    read.read_to_string(&mut piped).unwrap();
    assert_eq!(piped, "pipedpiped");
    assert!(create(Path::new("/dev/null")).unwrap().write_all(b"x").is_ok());
    // Only root can make nodes, and has links of others before it.
    if nix::unistd::geteuid().is_root() {
        node(&at("disk"));
        symlink("disk", at("to a disk")).unwrap();
        for name in ["disk", "to a disk"] {
            assert!(create(&at(name)).unwrap_err().to_string().contains("block device"), "{name}");
        }
        lchown(at("link"), Some(1000), None).unwrap();
        let e = create(&at("link")).unwrap_err().to_string();
        assert!(e.contains("a link of user 1000") && may_create(&at("link")).is_err(), "{e}");
        assert_eq!(text("new"), "by a link");
    }
}

/// A node of a block device that no driver has, so that opening it fails.
fn node(path: &Path) {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    mknod(path, SFlag::S_IFBLK, Mode::from_bits_truncate(0o666), makedev(240, 4095)).unwrap();
}

/// Race 10: a file that was checked long before it is written becomes a link to a block device, or not.
#[test]
fn race_of_a_device_against_an_output() {
    let folder = scratch();
    let target = folder.path().join("timeline");
    fs::write(&target, b"").unwrap();
    let is_root = nix::unistd::geteuid().is_root();
    let disk = folder.path().join("disk");
    if is_root {
        node(&disk)
    } else {
        fs::create_dir(&disk).unwrap()
    }
    race(
        |n| swap(|p| if n % 2 == 0 { symlink(&disk, p).unwrap() } else { fs::write(p, b"").unwrap() }, &target, n),
        |_| match create(&target) {
            Ok(file) => assert!(file.metadata().unwrap().is_file()),
            // A device that was opened would have no driver.
            Err(e) => assert_ne!(e.raw_os_error(), Some(libc::ENXIO), "the device was opened"),
        },
    );
}

/// Race 11: the name is that of the right file, or of another one, while it is opened as the right one.
#[test]
fn race_of_another_node_under_the_name() {
    let folder = scratch();
    let (right, target) = (folder.path().join("right"), folder.path().join("nvme1n1"));
    fs::write(&right, b"right").unwrap();
    fs::hard_link(&right, &target).unwrap();
    let number = fs::metadata(&right).unwrap().ino();
    let is_right = |meta: &Metadata| if meta.ino() == number { Ok(()) } else { Err(refuse("another one")) };
    race(
        |n| {
            swap(
                |p| if n % 2 == 0 { fs::hard_link(&right, p).unwrap() } else { fs::write(p, b"wrong").unwrap() },
                &target,
                n,
            )
        },
        |_| {
            if let Ok(file) = open_if(&target, 0, &is_right) {
                assert_eq!(file.metadata().unwrap().ino(), number);
            }
        },
    );
}
