//! The program that the udev rule asks, on machines of plain files.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use super::super::{State, record};
use super::fake::{BOOT, Blow, Fake, SPARE};

/// Whether the rule gives the group to `nt`.
fn given(fake: &Fake, group: &str) -> bool {
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/udev/nt-vfio-group");
    let mut command = Command::new("/bin/sh");
    command.arg(program).arg(group).arg(fake.root()).env_clear().current_dir("/");
    command.output().unwrap().status.success()
}

fn bound() -> Fake {
    let fake = Fake::new();
    fake.bind("nvme1n1", None);
    fake
}

#[test]
fn the_group_of_a_bound_drive_is_given() {
    let fake = bound();
    assert!(given(&fake, "15"));
    assert!(!given(&fake, "14"), "the boot drive's");
    fake.put("/sys/kernel/iommu_groups/15/devices/0000:00:1c.0/class", "0x060400\n");
    assert!(given(&fake, "15"), "a bridge does no harm");
}

/// Not before bind has noted which taking by vfio-pci is its own, since a bind that was killed before that may be followed
/// by somebody else's; and not longer than it is bound.
#[test]
fn the_group_is_given_while_the_drive_is_bound() {
    let fake = Fake::new();
    fake.bind("nvme1n1", Some((4, Blow::Kill)));
    assert_eq!(record::load(&fake.host, SPARE).unwrap().state, State::Override);
    assert!(!given(&fake, "15"));
    let fake = Fake::new();
    fake.bind("nvme1n1", Some((6, Blow::Kill)));
    assert_eq!(record::load(&fake.host, SPARE).unwrap().state, State::Unbound);
    assert!(!given(&fake, "15"));
    // By hand, after the kill.
    fake.put(&format!("/sys/bus/pci/devices/{SPARE}/driver_override"), "vfio-pci");
    fake.probe(SPARE);
    assert_eq!(fake.driver(SPARE).as_deref(), Some("vfio-pci"));
    assert!(!given(&fake, "15"));
    let fake = bound();
    fake.release(SPARE, Some((2, Blow::Kill)));
    assert_eq!(record::load(&fake.host, SPARE).unwrap().state, State::Releasing);
    assert!(!given(&fake, "15"));
}

/// A drive that somebody else bound to vfio-pci was given to members as soon as nt had one bound.
#[test]
fn no_other_group_is_given() {
    type Spoil = fn(&Fake);
    let cases: [(&str, Spoil); 15] = [
        ("given back and bound by hand since", |f| {
            f.unbind(SPARE);
            f.folder("/taken/1/2/3");
            f.probe(SPARE);
        }),
        ("a record of no taking", |f| {
            let text = fs::read_to_string(f.record(SPARE)).unwrap();
            let lines: Vec<_> = text.lines().filter(|l| !l.starts_with("taking")).collect();
            fs::write(f.record(SPARE), lines.join("\n")).unwrap();
        }),
        ("another boot", |f| f.put("/proc/sys/kernel/random/boot_id", "another\n")),
        ("no boot", |f| fs::remove_file(f.real("/proc/sys/kernel/random/boot_id")).unwrap()),
        ("an empty boot", |f| f.put("/proc/sys/kernel/random/boot_id", "\n")),
        ("no record", |f| fs::remove_file(f.record(SPARE)).unwrap()),
        ("a record of another drive", |f| {
            fs::rename(f.record(SPARE), f.record(BOOT)).unwrap();
        }),
        ("a record under another name", |f| {
            let text = fs::read_to_string(f.record(SPARE)).unwrap();
            fs::write(f.record(SPARE), text.replace(SPARE, BOOT)).unwrap();
        }),
        ("a link in place of the record", |f| {
            fs::rename(f.record(SPARE), f.real("/elsewhere")).unwrap();
            symlink(f.real("/elsewhere"), f.record(SPARE)).unwrap();
        }),
        ("a folder in place of the record", |f| {
            fs::remove_file(f.record(SPARE)).unwrap();
            f.folder("/run/nt/0000:02:00.0.toml");
        }),
        ("an empty record", |f| fs::write(f.record(SPARE), "").unwrap()),
        ("a second NVMe in the group", |f| {
            f.put("/sys/kernel/iommu_groups/15/devices/0000:02:00.1/class", "0x010802\n")
        }),
        ("another device in the group", |f| {
            f.put("/sys/kernel/iommu_groups/15/devices/0000:02:00.1/class", "0x030000\n");
        }),
        ("a device of no class", |f| f.folder("/sys/kernel/iommu_groups/15/devices/0000:02:00.1")),
        ("the device appeared anew", |f| {
            let text = fs::read_to_string(f.record(SPARE)).unwrap();
            let lines: Vec<_> =
                text.lines().map(|l| if l.starts_with("instance") { "instance = 7" } else { l }).collect();
            fs::write(f.record(SPARE), lines.join("\n")).unwrap();
        }),
    ];
    for (what, spoil) in cases {
        let fake = bound();
        assert!(given(&fake, "15"), "{what}");
        spoil(&fake);
        assert!(!given(&fake, "15"), "{what}");
    }
    // A drive beside it that somebody holds for a guest.
    let fake = bound();
    fake.add_function("0000:09:00.0", 21);
    fake.put("/sys/bus/pci/devices/0000:09:00.0/driver_override", "vfio-pci");
    fake.probe("0000:09:00.0");
    assert!(!given(&fake, "21"));
    assert!(!given(&fake, "22"), "no such group");
}

/// What a drive says of itself cannot pass for what nt says.
#[test]
fn a_serial_cannot_forge_a_record() {
    for serial in [
        "x\nstate = \"bound\"",
        "\"\nboot = \"b\"\nstate = \"bound\"\n",
        "'''\nstate = \"bound\"",
        "$(touch /tmp/nt-pwned)",
        "`id`",
    ] {
        let fake = bound();
        let mut record = record::load(&fake.host, SPARE).unwrap();
        (record.serial, record.model, record.controller) = (serial.into(), serial.into(), serial.into());
        record.links = vec![serial.into()];
        record.state = State::Releasing;
        record::save(&fake.host, &record).unwrap();
        assert_eq!(record::load(&fake.host, SPARE).unwrap(), record);
        assert!(!given(&fake, "15"), "{serial}");
        record.state = State::Bound;
        record::save(&fake.host, &record).unwrap();
        assert!(given(&fake, "15"), "{serial}");
    }
}

/// The argument is the kernel's name of a device; no other text does anything.
#[test]
fn odd_arguments_are_refused() {
    let fake = bound();
    for group in [
        "",
        "15/../15",
        "../iommu_groups/15",
        "15 ",
        " 15",
        "15;id",
        "$(id)",
        "*",
        "1*",
        "?5",
        "-e",
        "15\n",
        "vfio15",
        "noiommu-0",
    ] {
        assert!(!given(&fake, group), "{group:?}");
    }
}
