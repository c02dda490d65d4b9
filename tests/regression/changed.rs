//! Models that are written to while nt has them open.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nt::backend::{BackendKind, Class};
use nt::engine::{EngineError, Opened, Options, Session};
use nt::model::Outputs;
use nt::plan::Tiers;

use crate::common::{bin, tiny};

/// A model of three blocks.
fn model(dir: &Path) -> PathBuf {
    tiny(3).write(dir, "m.gguf")
}

/// Overwrites the file's last bytes, in place.
fn overwrite(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    let at = file.metadata().unwrap().len() - 4096;
    file.write_all_at(&[0x3c; 4096], at).unwrap();
}

/// A session with so many of the three blocks in memory; three are all.
fn started(opened: &Opened, blocks: usize) -> Result<Session, EngineError> {
    let tiers = (blocks < 3).then_some(Tiers { a: 0, b: blocks, c: 3 - blocks });
    let options = Options { threads: 1, tiers, max_batch: 8, ..Options::new(BackendKind::Cpu, 128) };
    Session::new(opened, options, &mut |_, _| ())
}

fn passes(s: &mut Session) -> Result<(), EngineError> {
    s.eval(&[5], Class::Exact, Outputs::Last, &|| false)
}

const SAID: &str = "m.gguf: the file has been written to since nt opened it";

/// Where weights stream, a pass that is not known to be of one model fails; what leaves a file's bytes alone is nothing.
#[test]
fn a_pass_over_a_file_that_is_written_to_fails() {
    let d = tempfile::tempdir().unwrap();
    let path = model(d.path());
    let opened = Opened::open(&path).unwrap();
    let mut s = started(&opened, 1).unwrap();
    assert!(s.reader_name().is_some(), "weights stream");
    passes(&mut s).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::hard_link(&path, d.path().join("link")).unwrap();
    let _ = std::fs::read(&path).unwrap();
    passes(&mut s).unwrap();
    // Another file under its name, as a download makes one.
    std::fs::rename(&path, d.path().join("before.gguf")).unwrap();
    model(d.path());
    passes(&mut s).unwrap();
    overwrite(&d.path().join("link"));
    for _ in 0..2 {
        let e = passes(&mut s).unwrap_err().to_string();
        assert!(e.contains(SAID), "{e}");
    }
}

/// Where all is in memory, nobody reads the file again.
#[test]
fn a_file_that_is_in_memory_may_be_written_to() {
    let d = tempfile::tempdir().unwrap();
    let path = model(d.path());
    let opened = Opened::open(&path).unwrap();
    let mut s = started(&opened, 3).unwrap();
    assert!(s.reader_name().is_none(), "nothing streams");
    passes(&mut s).unwrap();
    overwrite(&path);
    passes(&mut s).unwrap();
}

/// Weights are those of the header that was read before them.
#[test]
fn a_file_that_was_written_to_between_header_and_weights_is_refused() {
    let d = tempfile::tempdir().unwrap();
    let path = model(d.path());
    let opened = Opened::open(&path).unwrap();
    overwrite(&path);
    for blocks in [1, 3] {
        let e = started(&opened, blocks).err().unwrap().to_string();
        assert!(e.contains(SAID), "{e}");
    }
    started(&Opened::open(&path).unwrap(), 3).unwrap();
}

/// The text went on with the weights of two files, and the exit code was 0.
#[test]
fn a_run_ends_with_a_sentence() {
    let d = tempfile::tempdir().unwrap();
    let path = model(d.path());
    let args = ["run", path.to_str().unwrap(), "-p", "hello", "-n", "60000", "--ctx", "65536", "--ignore-eos"];
    let mut child = Command::new(bin())
        .args(args)
        .args(["--backend", "cpu", "--threads", "1", "--tiers", "0:1:2"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 1]).unwrap();
    overwrite(&path);
    std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!((out.status.code(), said.contains(SAID)), (Some(1), true), "{said}");
}
