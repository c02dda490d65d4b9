//! The last look before a drive is changed: whoever opened it, or wrote to it, since the examination.

use super::*;

const STAT: &str = "/sys/class/block/nvme1n1/stat";
/// Counts of the kernel: reads, merged, sectors, time; writes likewise; three of the queue; discards; flushes.
const BEFORE: &str = "  10 0 80 1  20 0 160 2  0 3 3  4 0 32 1  5 1\n";

type Act = fn(&Fake);

/// What somebody does between the examination and the first step that changes the drive.
const MEANWHILE: &[(&str, Option<Check>, Act)] = &[
    ("nothing", None, |_| ()),
    ("reads", None, |f| f.put(STAT, "  99 9 800 9  20 0 160 2  0 9 9  4 0 32 1  5 1\n")),
    ("a flush, which counts as a write of nothing", None, |f| {
        f.put(STAT, "  10 0 80 1  21 0 160 2  0 3 3  4 0 32 1  6 2\n")
    }),
    ("another drive is written", None, |f| f.put("/sys/class/block/nvme0n1/stat", "1 1 1 1 1 1 1 1 1 1 1")),
    ("a write, the node closed again", Some(Check::Open), |f| {
        f.put(STAT, "  10 0 80 1  21 0 168 2  0 3 3  4 0 32 1  5 1\n")
    }),
    ("a discard", Some(Check::Open), |f| f.put(STAT, "  10 0 80 1  20 0 160 2  0 3 3  5 0 64 1  5 1\n")),
    ("a write on a kernel that counts no discards", Some(Check::Open), |f| {
        f.put(STAT, "  10 0 80 1  21 0 168 2  0 3 3\n")
    }),
    ("the counts are gone", Some(Check::Open), |f| f.drop_file(STAT)),
    ("the counts cannot be read", Some(Check::Unreadable), |f| {
        f.drop_file(STAT);
        f.folder(STAT);
    }),
    ("counting is switched off", Some(Check::Unreadable), |f| f.put("/sys/class/block/nvme1n1/queue/iostats", "0\n")),
    ("counting stays on", None, |f| f.put("/sys/class/block/nvme1n1/queue/iostats", "1\n")),
    ("opened", Some(Check::Open), |f| f.link("/proc/77/fd/3", "/dev/nvme1n1")),
    ("a partition opened by another name", Some(Check::Open), |f| {
        f.put("/tmp/other", "b 259:11");
        f.link("/proc/77/fd/3", "/tmp/other");
    }),
    ("mapped", Some(Check::Open), |f| f.put("/proc/77/map_files/1000-2000", "b 259:10")),
    ("the node for commands opened", Some(Check::Open), |f| f.link("/proc/77/fd/3", "/dev/ng1n1")),
    ("under way", Some(Check::Open), |f| f.put("/sys/class/block/nvme1n1/inflight", "0 1")),
    ("a loop device over it", Some(Check::Stacked), |f| {
        f.put("/sys/block/loop3/loop/backing_file", "/tmp/other (deleted)\n");
        f.put("/dev/loop3", "loop 259:10 0:5");
    }),
    ("an export", Some(Check::Exported), |f| {
        f.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/1/device_path", "/dev/nvme1n1");
    }),
    ("the heartbeat of a cluster", Some(Check::Open), |f| {
        f.put("/sys/kernel/config/cluster/c1/heartbeat/0123456789ABCDEF/dev", "nvme1n1\n");
    }),
    ("another drive at the address", Some(Check::Driver), |f| {
        f.put(&format!("/sys/bus/pci/devices/{BDF}/nvme/nvme1/serial"), "OTHER\n");
    }),
    ("a namespace that was neither examined nor claimed", Some(Check::Driver), |f| {
        f.folder(&format!("/sys/bus/pci/devices/{BDF}/nvme/nvme1/nvme1n2"));
    }),
    ("its partitions are forgotten, as a stage does", None, |f| {
        fs::remove_dir_all(f.dir.path().join("sys/class/block/nvme1n1/nvme1n1p1")).unwrap();
    }),
    ("asleep", Some(Check::Driver), |f| f.put(&format!("/sys/bus/pci/devices/{BDF}/power_state"), "D3hot\n")),
];

#[test]
fn whoever_comes_after_the_examination_is_seen() {
    for (name, check, act) in MEANWHILE {
        let fake = clean();
        fake.put(STAT, BEFORE);
        let host = Host::at(fake.dir.path());
        let all = sysfs::controllers(&host).unwrap();
        let drive = sysfs::find(&host, &all, "nvme1n1").unwrap();
        let before = LastLook::begin(&host, drive).unwrap();
        act(&fake);
        let reasons = before.reasons(&host, drive, &[]);
        assert_eq!(reasons.first().map(|r| r.check), *check, "{name}: {reasons:?}");
    }
}

/// Both namespaces of a drive count, each for itself.
#[test]
fn every_namespace_is_counted() {
    let fake = clean();
    fake.put(STAT, BEFORE);
    let host = Host::at(fake.dir.path());
    let all = sysfs::controllers(&host).unwrap();
    let mut drive = sysfs::find(&host, &all, "nvme1n1").unwrap().clone();
    drive.namespaces.push(all[0].namespaces[0].clone());
    fake.put("/sys/class/block/nvme0n1/stat", BEFORE);
    let before = LastLook::begin(&host, &drive).unwrap();
    let written = || before.reasons(&host, &drive, &[]).iter().filter(|r| r.check == Check::Open).count();
    assert_eq!(written(), 0);
    fake.put("/sys/class/block/nvme0n1/stat", &BEFORE.replace(" 20 0 160 ", " 21 0 161 "));
    assert_eq!(written(), 1);
}
