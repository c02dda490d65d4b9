//! `nt verify`: a model against its record.

mod common;

use common::{record, tiny};
use nt::storage::checksum::CHUNK;
use nt::storage::image::{Drive, Identity, Source, Staging, Steps};
use nt::storage::manifest::Manifest;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

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

/// An image with the model as another machine's `nt stage` writes it.
fn stage(model: &Path, image: &Path) -> Vec<Manifest> {
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(image).unwrap();
    let size = 32 << 20;
    file.set_len(size).unwrap();
    let identity = Identity { serial: "ELSEWHERE".to_owned(), model: "Model".to_owned(), namespace: 1 };
    let mut drive = Drive { file: &file, size, block: 512 };
    let sources = [Source::open(model).unwrap()];
    let staging = Staging::plan(&mut drive, &sources, &identity, &[]).unwrap();
    staging.write(&mut drive, &mut Steps::new(&mut |_, _| (), &|| false)).unwrap()
}

#[test]
fn a_staged_model_runs_by_name_without_any_record() {
    let d = tempfile::tempdir().unwrap();
    let model = tiny(4).write(d.path(), "m.gguf");
    let (image, data) = (d.path().join("drive.img"), d.path().join("none"));
    let manifests = stage(&model, &image);
    let place = image.display().to_string();
    let nt = |args: &[&str]| {
        let run = Command::new(env!("CARGO_BIN_EXE_nt")).env("XDG_DATA_HOME", &data).args(args).output().unwrap();
        (
            run.status.code(),
            String::from_utf8_lossy(&run.stdout).into_owned(),
            String::from_utf8_lossy(&run.stderr).into_owned(),
        )
    };
    let same = ["-p", "hello", "-n", "8", "--temp", "0"];
    let expected = nt(&[&["run", model.to_str().unwrap()], &same[..]].concat());
    assert_eq!(expected.0, Some(0), "{}", expected.2);
    // While the file is there, the image is a copy of it; striped with it, too.
    let striped = format!("auto,{place}");
    for tier_c in [&place, &striped] {
        let m = model.to_str().unwrap();
        let (code, out, err) = nt(&[&["run", m, "--tier-c", tier_c, "--tiers", "0:0:4"], &same[..]].concat());
        assert_eq!((code, &out), (Some(0), &expected.1), "{err}");
    }
    let another = tiny(3).write(d.path(), "other.gguf");
    std::fs::rename(&model, d.path().join("away")).unwrap();
    std::fs::rename(&another, &model).unwrap();
    let (code, _, err) = nt(&[&["run", model.to_str().unwrap(), "--tier-c", &place], &same[..]].concat());
    assert!(code == Some(2) && err.contains("another length") && err.contains("drive.img"), "{err}");
    std::fs::remove_file(&model).unwrap();

    for (name, more) in [("m", vec![]), ("m.gguf", vec!["--tiers", "0:0:4", "--verify"])] {
        let (code, out, err) = nt(&[&["run", name, "--tier-c", &place], &more[..], &same[..]].concat());
        assert_eq!((code, &out), (Some(0), &expected.1), "{name}: {err}");
    }
    let (code, out, err) = nt(&["verify", "m", "--tier-c", &place]);
    assert!(code == Some(0) && out.contains("all as recorded"), "{out}{err}");
    let (code, _, err) = nt(&["run", "n", "-p", "x", "--tier-c", &place]);
    assert!(code == Some(2) && err.contains("no n is staged there; the drive holds m.gguf"), "{err}");

    // A wrong byte is named by its tensor.
    let at = manifests[0].extents[0].1 + manifests[0].size - 1;
    let file = std::fs::File::options().read(true).write(true).open(&image).unwrap();
    let mut last = [0];
    file.read_exact_at(&mut last, at).unwrap();
    file.write_all_at(&[last[0] ^ 1], at).unwrap();
    let (code, out, err) = nt(&["verify", "m", "--tier-c", &place]);
    assert!(code == Some(1) && out.contains("output.weight: ") && err.contains("drive ELSEWHERE"), "{out}{err}");
    let (code, _, err) = nt(&[&["run", "m", "--tier-c", &place, "--verify"], &same[..]].concat());
    assert!(code == Some(1) && err.contains("output.weight: "), "{err}");
}
