//! `nt verify`: a model against its record.

mod common;

use common::tiny;
use nt::storage::extents::{CHUNK, Manifest, sums};
use nt::storage::library::{Library, Recorded};
use std::path::Path;
use std::process::{Command, Output};

/// Records the model as it is now, as if it lay on a drive.
fn record(model: &Path, data: &Path) {
    let bytes = std::fs::read(model).unwrap();
    let size = bytes.len() as u64;
    let manifest = Manifest {
        file: model.file_name().unwrap().to_string_lossy().into_owned(),
        path: model.into(),
        size,
        serial: "S1".into(),
        model: "Model".into(),
        namespace: 1,
        extents: vec![(0, 1 << 20, size.next_multiple_of(4096))],
        crc32c: sums(&bytes[..]).unwrap(),
    };
    let header = bytes[..4096].to_vec();
    Library::at(vec![data.join("nt")]).save(&Recorded { manifest, header }).unwrap();
}

fn verify(model: &Path, data: &Path, more: &[&str]) -> (Option<i32>, String, String) {
    let run: Output = Command::new(env!("CARGO_BIN_EXE_nt"))
        .env("XDG_DATA_HOME", data)
        .arg("verify")
        .arg(model)
        .args(more)
        .output()
        .unwrap();
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (run.status.code(), text(&run.stdout), text(&run.stderr))
}

#[test]
fn a_model_as_recorded_and_one_that_was_changed() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(2).write(d.path(), "m.gguf");
    let data = d.path().join("data");
    record(&model, &data);
    for reader in ["auto", "pread"] {
        let (code, out, err) = verify(&model, &data, &["--reader", reader]);
        assert_eq!(code, Some(0), "{err}");
        assert!(out.lines().count() == 1 && out.contains("all as recorded"), "{out}");
    }
    let (_, out, _) = verify(&model, &data, &["-v"]);
    assert!(out.contains("blk.1.ffn_down.weight: ") && out.lines().count() == tiny(2).tensors.len() + 1, "{out}");

    // The last byte of the data is the last tensor's.
    let mut bytes = std::fs::read(&model).unwrap();
    let at = bytes.len() - 1;
    bytes[at] ^= 1;
    std::fs::write(&model, &bytes).unwrap();
    let (code, out, err) = verify(&model, &data, &[]);
    assert_eq!(code, Some(1), "{out}{err}");
    let chunk = (at / CHUNK * CHUNK).to_string();
    assert!(out.contains("output.weight: ") && out.contains(&chunk) && out.contains("was recorded"), "{out}");
    assert!(err.contains("output.weight") && err.contains(&chunk) && err.contains("m.gguf"), "{err}");
}

#[test]
fn another_length_is_told() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(1).write(d.path(), "m.gguf");
    let data = d.path().join("data");
    record(&model, &data);
    let mut bytes = std::fs::read(&model).unwrap();
    let len = bytes.len();
    bytes.push(0);
    std::fs::write(&model, &bytes).unwrap();
    let (code, _, err) = verify(&model, &data, &[]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains(&format!("has {} bytes, but {len} were recorded", len + 1)), "{err}");
}

#[test]
fn without_a_record_the_command_that_makes_one_is_named() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(1).write(d.path(), "m.gguf");
    let (code, out, err) = verify(&model, &d.path().join("none"), &[]);
    assert_eq!((code, out.as_str()), (Some(2), ""), "{err}");
    assert!(err.contains(&format!("`nt device extents {}`", model.display())), "{err}");
}
