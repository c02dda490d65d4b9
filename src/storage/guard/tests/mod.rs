//! Each row of the refusal list on a fake machine; never on this one.

mod booted;
mod consent;
mod documented;
mod held;
mod last;
mod mutations;
mod named;
mod rows;
mod twinned;

use super::*;
use crate::storage::gpt;
use rows::ROWS;
use std::fs;
use std::os::unix::fs::{FileExt, symlink};

const BDF: &str = "0000:02:00.0";

struct Fake {
    dir: tempfile::TempDir,
}

impl Fake {
    fn put(&self, path: &str, text: &str) {
        let at = self.dir.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&at);
        fs::write(at, text).unwrap();
    }

    /// Adds a line to the mounts that this process sees.
    fn mount(&self, line: &str) {
        let path = self.dir.path().join("proc/self/mountinfo");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(path, format!("{text}{line}\n")).unwrap();
    }

    /// Sets when a file or folder was last changed, in seconds.
    fn changed(&self, path: &str, at: u64) {
        let file = fs::File::open(self.dir.path().join(path.trim_start_matches('/'))).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(at)).unwrap();
    }

    /// A namespace that NVMe-oF hands on, by this path; the machine started in second 1000.
    fn nvmet(&self, exported: &str) {
        let base = "/sys/kernel/config/nvmet/subsystems/s/namespaces/1";
        self.put(&format!("{base}/device_path"), exported);
        self.put(&format!("{base}/enable"), "1\n");
        self.put("/proc/stat", "cpu 1 2\nbtime 1000\n");
    }

    /// A file that LIO hands on, by this path; the machine started in second 1000.
    fn fileio(&self, exported: &str) {
        let base = "/sys/kernel/config/target/core/fileio_0/disk";
        let text = format!(
            "Status: ACTIVATED  Max Queue Depth: 128  SectorSize: 512  HwMaxSectors: 16384\n        TCM FILEIO ID: 0        File: {exported}  Size: 9  Mode: Buffered-WCE Async: 0\n"
        );
        self.put(&format!("{base}/info"), &text);
        self.put("/proc/stat", "cpu 1 2\nbtime 1000\n");
    }

    /// An io_uring of process 77 in which these files are registered.
    fn ring(&self, files: &[&str]) {
        self.link("/proc/77/fd/9", "anon_inode:[io_uring]");
        let lines: String = files.iter().enumerate().map(|(i, f)| format!("{i:5}: {f}\n")).collect();
        self.put("/proc/77/fdinfo/9", &format!("UserFiles:\t{}\n{lines}UserBufs:\t0\n", files.len()));
    }

    fn folder(&self, path: &str) {
        fs::create_dir_all(self.dir.path().join(path.trim_start_matches('/'))).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        let at = self.dir.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&at);
        symlink(target, at).unwrap();
    }

    /// Moves a folder below `/sys/devices` and leaves a link, as the kernel has it.
    fn move_to(&self, path: &str, to: &str) {
        let real = |p: &str| self.dir.path().join(p.trim_start_matches('/'));
        fs::create_dir_all(real(to).parent().unwrap()).unwrap();
        fs::rename(real(path), real(to)).unwrap();
        let up = "../".repeat(path.matches('/').count() - 1);
        symlink(format!("{up}{}", to.trim_start_matches('/')), real(path)).unwrap();
    }

    fn drop_file(&self, path: &str) {
        fs::remove_file(self.dir.path().join(path.trim_start_matches('/'))).unwrap();
    }

    fn drive(&self, bdf: &str, n: u32, serial: &str, group: u32) {
        let pci = format!("/sys/bus/pci/devices/{bdf}");
        self.put(&format!("{pci}/class"), "0x010802\n");
        self.link(&format!("{pci}/driver"), "../../../bus/pci/drivers/nvme");
        self.link(&format!("{pci}/iommu_group"), &format!("../../../kernel/iommu_groups/{group}"));
        self.folder(&format!("/sys/kernel/iommu_groups/{group}/devices/{bdf}"));
        for base in [format!("{pci}/nvme/nvme{n}"), format!("/sys/class/nvme/nvme{n}")] {
            self.put(&format!("{base}/serial"), &format!("{serial}   \n"));
            self.put(&format!("{base}/model"), "Model X\n");
            self.put(&format!("{base}/firmware_rev"), "1.0\n");
            self.put(&format!("{base}/dev"), &format!("241:{n}\n"));
            self.put(&format!("{base}/transport"), "pcie\n");
        }
        self.folder(&format!("{pci}/nvme/nvme{n}/nvme{n}n1"));
        self.put(&format!("/sys/class/nvme-generic/ng{n}n1/dev"), &format!("240:{n}\n"));
        let block = format!("/sys/class/block/nvme{n}n1");
        for (base, dev) in [
            (block.clone(), format!("259:{}", n * 10)),
            (format!("{block}/nvme{n}n1p1"), format!("259:{}", n * 10 + 1)),
            (format!("/sys/class/block/nvme{n}n1p1"), format!("259:{}", n * 10 + 1)),
        ] {
            self.put(&format!("{base}/dev"), &dev);
            self.put(&format!("{base}/size"), "4096");
            self.folder(&format!("{base}/holders"));
        }
        for base in [format!("{block}/nvme{n}n1p1"), format!("/sys/class/block/nvme{n}n1p1")] {
            self.put(&format!("{base}/partition"), "1");
            self.put(&format!("{base}/start"), "2048");
        }
        self.put(&format!("{block}/nsid"), "1");
        self.put(&format!("{block}/inflight"), "       0        0");
        self.put(&format!("{block}/queue/logical_block_size"), "512");
        self.put(&format!("{block}/queue/zoned"), "none");
        for node in [format!("/dev/nvme{n}n1"), format!("/dev/nvme{n}n1p1")] {
            self.put(&node, "");
            let file = fs::OpenOptions::new().write(true).open(self.dir.path().join(&node[1..])).unwrap();
            file.set_len(2 << 20).unwrap();
        }
    }

    /// A GPT with one partition of this type.
    fn table(&self, node: &str, kind: [u8; 16]) {
        for (at, bytes) in gpt::table(2 << 20, 512) {
            self.stamp(node, at as usize, &bytes);
        }
        self.stamp(node, 1024, &kind);
    }

    fn stamp(&self, node: &str, at: usize, magic: &[u8]) {
        let file = fs::OpenOptions::new().write(true).open(self.dir.path().join(node.trim_start_matches('/')));
        file.unwrap().write_all_at(magic, at as u64).unwrap();
    }

    /// What the drive answers to Identify Controller, to the list of security protocols, and to Level 0 Discovery with
    /// these bits of locking.
    fn encrypts_itself(&self, bits: u8) {
        let mut answers = vec![0; 4096 + 512 + 2048];
        answers[256] = 1;
        // Two protocols, the list's own and TCG's.
        answers[4096 + 7..][..3].copy_from_slice(&[2, 0, 1]);
        // A header of 48 bytes, and the locking feature of 12 more than its head.
        answers[4608 + 3] = 44 + 16;
        answers[4608 + 48..][..5].copy_from_slice(&[0, 2, 0x10, 12, bits]);
        fs::write(self.dir.path().join("dev/nvme1"), answers).unwrap();
    }

    /// What the drive answers to Identify Controller.
    fn identifies(&self, cmic: u8) {
        let mut answer = vec![0; 4096];
        answer[76] = cmic;
        fs::write(self.dir.path().join("dev/nvme1"), answer).unwrap();
    }

    fn reasons(&self, allowed: &Result<Allowlist, String>) -> Vec<Reason> {
        self.reasons_for(allowed, Purpose::Read)
    }

    fn reasons_for(&self, allowed: &Result<Allowlist, String>, purpose: Purpose) -> Vec<Reason> {
        let host = Host::at(self.dir.path());
        let all = sysfs::controllers(&host).unwrap();
        let drive = sysfs::find(&host, &all, "nvme1n1").unwrap();
        examine(&host, &all, drive, allowed, purpose)
    }
}

fn clean() -> Fake {
    let fake = Fake { dir: tempfile::tempdir().unwrap() };
    fake.drive("0000:01:00.0", 0, "BOOT", 14);
    fake.drive(BDF, 1, "EXP", 15);
    fake.put("/proc/self/mountinfo", "21 1 259:1 / / rw - ext4 /dev/nvme0n1p1 rw\n");
    fake.put("/proc/77/mountinfo", "21 1 259:1 / / rw - ext4 /dev/nvme0n1p1 rw\n");
    fake.link("/proc/77/fd/0", "/dev/null");
    fake.put("/proc/1/mountinfo", "21 1 259:1 / / rw - ext4 /dev/nvme0n1p1 rw\n");
    fake.folder("/proc/1/fd");
    fake.link("/proc/1/root", "/");
    fake.link("/proc/self/ns/pid", "pid:[4026531836]");
    fake.link("/proc/self/ns/user", "user:[4026531837]");
    fake.folder("/sys/block");
    fake.folder("/sys/module");
    fake.table("/dev/nvme1n1", gpt::TYPE);
    fake.put("/sys/module/nvme_core/parameters/multipath", "Y\n");
    fake.put("/proc/filesystems", "nodev\ttmpfs\nnodev\toverlay\nnodev\tfuse\nnodev\tnfs4\n\text4\n\tfuseblk\n");
    fake.put("/proc/swaps", "Filename Type Size Used Priority\n");
    fake.put("/proc/cmdline", "quiet root=/dev/nvme0n1p1\n");
    fake
}

fn list() -> Result<Allowlist, String> {
    Allowlist::parse(
        "[[drive]]\npci = \"0000:02:00.0\"\nserial = \"EXP\"\nmodel = \"Model X\"\nnamespace = 1\nsize = 2097152\nholds = [\"gpt\"]\n",
    )
}

#[test]
fn a_clean_listed_drive_passes() {
    assert_eq!(clean().reasons(&list()), vec![]);
}

#[test]
fn each_row_refuses() {
    for (name, check, spoil) in ROWS {
        let fake = clean();
        spoil(&fake);
        let reasons = fake.reasons(&list());
        assert!(reasons.iter().any(|r| r.check == *check), "{name}: {check:?} was expected, {reasons:?} was found");
        assert!(reasons.iter().all(|r| !r.path.as_os_str().is_empty()), "{name}");
    }
}

#[test]
fn a_partition_table_is_contents_too() {
    let mut list = list().unwrap();
    list.drive[0].holds.clear();
    let reasons = clean().reasons(&Ok(list));
    assert!(reasons.iter().any(|r| r.check == Check::Contents && r.what.contains("gpt")), "{reasons:?}");
}

#[test]
fn all_reasons_are_told_at_once() {
    let fake = clean();
    for (name, _, spoil) in ROWS {
        if matches!(*name, "swap" | "fstab" | "in flight" | "sibling") {
            spoil(&fake);
        }
    }
    let reasons = fake.reasons(&Err("no list".into()));
    for check in [Check::Swap, Check::Configured, Check::Open, Check::Sibling, Check::Allowlist] {
        assert!(reasons.iter().any(|r| r.check == check), "{check:?} is missing in {reasons:?}");
    }
}

#[test]
fn contents_named_in_the_entry_are_accepted() {
    let fake = clean();
    fake.stamp("/dev/nvme1n1p1", 0x438, &[0x53, 0xef]);
    let mut list = list().unwrap();
    list.drive[0].holds.push("ext4".into());
    assert_eq!(fake.reasons(&Ok(list)), vec![]);
}

#[test]
fn what_never_passes_is_refused_with_its_contents_listed() {
    let mut list = list().unwrap();
    list.drive[0].holds.push("zfs".into());
    let fake = clean();
    assert_eq!(fake.reasons(&Ok(list.clone())), vec![]);
    fake.table("/dev/nvme1n1", gpt::BIOS_BOOT);
    assert_eq!(fake.reasons(&Ok(list.clone())).iter().map(|r| r.check).collect::<Vec<_>>(), [Check::Boot]);

    let fake = clean();
    fake.stamp("/dev/nvme1n1p1", 128 << 10, &0x00ba_b10c_u64.to_le_bytes());
    assert_eq!(fake.reasons(&Ok(list.clone())), vec![]);
    fake.put("/proc/spl/kstat/zfs/tank/state", "ONLINE");
    assert_eq!(fake.reasons(&Ok(list)).iter().map(|r| r.check).collect::<Vec<_>>(), [Check::Stacked]);
}

#[test]
fn other_drives_users_are_no_reason() {
    let fake = clean();
    fake.put("/sys/block/loop0/loop/backing_file", "/var/lib/x.img\n");
    fake.put("/dev/loop0", "loop 0:0 259:1");
    fake.put("/sys/block/ublkb0/size", "8");
    fake.put("/run/ublksrvd/0000.pid", "{\"backing_file\": \"/dev/nvme0n1\"}");
    fake.put("/sys/kernel/config/target/core/iblock_0/d/udev_path", "/dev/nvme0n1\n");
    fake.put("/etc/zfs/zpool.cache", "\0\0\0\x04path\0\0\0\x0e/dev/nvme0n1p1\0\0");
    fake.put("/proc/mdstat", "Personalities : [raid1]\nmd0 : active raid1 nvme0n1p1[0]\n");
    fake.link("/proc/77/fd/9", "anon_inode:[io_uring]");
    fake.put("/proc/77/fdinfo/9", "UserFiles:\t1\n    0: /dev/nvme0n1\n");
    for (n, id) in [(0, "00000000-0000-0000-0000-000000000000"), (1, "00000000-0000-0000-0000-000000000000")] {
        fake.put(&format!("/sys/class/block/nvme{n}n1/nguid"), id);
        fake.put(&format!("/sys/class/block/nvme{n}n1/eui"), "01 02 03 04 05 06 07 08");
    }
    assert_eq!(fake.reasons(&list()), vec![]);
}

/// A namespace that the kernel hides (zoned, of an unknown format) has no device number. One such drive made every command
/// fail for every other drive: it is refused itself, by its own name too, and makes no other odd but a twin.
#[test]
fn a_hidden_namespace_refuses_its_own_drive_alone() {
    let hide = |fake: &Fake, n: u32| {
        let bdf = if n == 0 { "0000:01:00.0" } else { BDF };
        fake.folder(&format!("/sys/bus/pci/devices/{bdf}/nvme/nvme{n}/nvme{n}n2"));
        fake.put(&format!("/sys/class/block/nvme{n}n2/size"), "0");
        fake.put(&format!("/sys/class/block/nvme{n}n2/eui"), "00 25 38 5b 91 d0 e2 f1");
    };
    let fake = clean();
    hide(&fake, 0);
    assert_eq!(fake.reasons(&list()), vec![]);
    let host = Host::at(fake.dir.path());
    let all = sysfs::controllers(&host).unwrap();
    assert_eq!(sysfs::find(&host, &all, "nvme0n2").map(|c| c.bdf.as_str()), Some("0000:01:00.0"));
    // Its identifiers count, and so does its serial number.
    fake.put("/sys/class/block/nvme1n1/eui", "00 25 38 5b 91 d0 e2 f1");
    assert_eq!(fake.reasons(&list()).iter().map(|r| r.check).collect::<Vec<_>>(), [Check::Twin]);
    let fake = clean();
    hide(&fake, 0);
    fake.put("/sys/bus/pci/devices/0000:01:00.0/nvme/nvme0/serial", "EXP\n");
    assert!(fake.reasons(&list()).iter().any(|r| r.check == Check::Twin));
    let fake = clean();
    fake.drop_file("/sys/bus/pci/devices/0000:01:00.0/nvme/nvme0/serial");
    assert!(fake.reasons(&list()).iter().any(|r| r.check == Check::Twin), "it may be anyone's twin");
    // The drive itself, for either purpose.
    let fake = clean();
    hide(&fake, 1);
    for purpose in [Purpose::Read, Purpose::Erase] {
        let reasons = fake.reasons_for(&list(), purpose);
        let told = |r: &Reason| r.check == Check::Format && r.what.contains("the kernel does not show nvme1n2 whole");
        assert!(reasons.iter().any(told), "{reasons:?}");
    }
}

#[test]
fn identifiers_that_many_drives_carry_are_known() {
    for bogus in [
        "",
        "0",
        "0000",
        "00000000-0000-0000-0000-000000000000",
        "ffffffffffffffff",
        "0000000000000001",
        "0100000000000000",
        "0123456789ABCDEF",
        "1234567890",
        "0102030405060708",
        "S/N",
        "To Be Filled By O.E.M.",
    ] {
        assert!(identity::is_bogus(bogus), "{bogus}");
    }
    for real in ["S4EWNX0R123456", "EXP0001", "0025385b91d0e2f1", "01000000000000005cd2e4a1b2c35051"] {
        assert!(!identity::is_bogus(real), "{real}");
    }
}

#[test]
fn an_entry_may_name_identifiers() {
    let fake = clean();
    fake.put("/sys/class/block/nvme1n1/eui", "00 25 38 5b 91 d0 e2 f1");
    let mut list = list().unwrap();
    list.drive[0].eui = Some("0025385b91d0e2f1".into());
    assert_eq!(fake.reasons(&Ok(list.clone())), vec![]);
    list.drive[0].eui = Some("0025385b91d0e2f2".into());
    assert!(fake.reasons(&Ok(list.clone())).iter().any(|r| r.check == Check::Allowlist));
    // One that proves nothing is no proof.
    fake.put("/sys/class/block/nvme1n1/eui", "00 00 00 00 00 00 00 01");
    list.drive[0].eui = Some("0000000000000001".into());
    assert!(fake.reasons(&Ok(list)).iter().any(|r| r.check == Check::Allowlist));
}

#[test]
fn a_lone_path_is_no_reason_where_all_drives_have_one() {
    let fake = clean();
    fake.folder(&format!("/sys/bus/pci/devices/{BDF}/nvme/nvme1/nvme1c1n1"));
    assert!(fake.reasons(&list()).iter().any(|r| r.check == Check::Shared));
    fake.put("/sys/module/nvme_core/parameters/multipath_always_on", "Y\n");
    fake.identifies(0);
    assert_eq!(fake.reasons(&list()), vec![]);
}

/// Where the kernel's multipath is not there, off, or on for all drives, sysfs shows a drive with two ports like any other:
/// the drive itself is asked, and one that cannot be asked is refused.
#[test]
fn a_drive_that_sysfs_cannot_tell_of_is_asked() {
    type Spoil = fn(&Fake);
    let off: [(&str, Spoil); 3] = [
        ("no multipath", |f| f.drop_file("/sys/module/nvme_core/parameters/multipath")),
        ("off", |f| f.put("/sys/module/nvme_core/parameters/multipath", "N\n")),
        ("for all", |f| f.put("/sys/module/nvme_core/parameters/multipath_always_on", "Y\n")),
    ];
    for (name, spoil) in off {
        let fake = clean();
        spoil(&fake);
        assert!(fake.reasons(&list()).iter().any(|r| r.check == Check::Unreadable), "{name}: no answer");
        fake.identifies(0);
        assert_eq!(fake.reasons(&list()), vec![], "{name}");
        for cmic in [1, 2, 3, 0x0b] {
            fake.identifies(cmic);
            let checks: Vec<_> = fake.reasons(&list()).iter().map(|r| r.check).collect();
            assert_eq!(checks, [Check::Shared], "{name}: {cmic}");
        }
    }
}

/// A drive whose data cannot be seen looks empty: a shadow MBR stands before it, or what is locked reads as zeros.
#[test]
fn a_drive_that_hides_its_data_is_neither_bound_nor_erased() {
    let both = [Purpose::Read, Purpose::Erase];
    let told = |fake: &Fake, purpose| {
        let list = Allowlist::parse(
            "[[drive]]\npci = \"0000:02:00.0\"\nserial = \"EXP\"\nmodel = \"Model X\"\nnamespace = 1\nsize = 2097152\nholds = [\"gpt\"]\nerase = [\"gpt\"]\n",
        );
        fake.reasons_for(&list, purpose)
    };
    for (bits, word) in [(0b1111, "is locked"), (0b0001_1011, "shadow MBR")] {
        for purpose in both {
            let fake = clean();
            fake.encrypts_itself(bits);
            let reasons = told(&fake, purpose);
            assert!(
                matches!(&reasons[..], [r] if r.check == Check::Unreadable && r.what.contains(word)),
                "{reasons:?}"
            );
        }
    }
    for bits in [0, 0b1, 0b1001, 0b1011, 0b0011_1011] {
        for purpose in both {
            let fake = clean();
            fake.encrypts_itself(bits);
            assert_eq!(told(&fake, purpose), vec![], "{bits:b}");
        }
    }
    // One that is in use is not asked.
    let fake = clean();
    fake.encrypts_itself(0b1111);
    fake.mount("30 1 259:11 / /data rw - ext4 /dev/nvme1n1p1 rw");
    assert!(told(&fake, Purpose::Read).iter().all(|r| r.check == Check::Mounted), "{:?}", told(&fake, Purpose::Read));
    // It has security commands and gives no answer to them.
    let fake = clean();
    let mut answer = vec![0; 4096];
    answer[256] = 1;
    fs::write(fake.dir.path().join("dev/nvme1"), answer).unwrap();
    for purpose in both {
        let reasons = told(&fake, purpose);
        assert!(matches!(&reasons[..], [r] if r.check == Check::Unreadable && r.what.contains("without an answer")));
    }
}

/// Write protection is no obstacle to reading; who protects one partition does not want the drive erased.
#[test]
fn what_is_write_protected_is_not_erased() {
    for device in ["nvme1n1", "nvme1n1p1"] {
        let fake = clean();
        let mut list = list().unwrap();
        list.drive[0].erase = vec!["gpt".into()];
        let list = Ok(list);
        fake.put(&format!("/sys/class/block/{device}/ro"), "0\n");
        assert_eq!(fake.reasons_for(&list, Purpose::Erase), vec![], "{device}");
        fake.put(&format!("/sys/class/block/{device}/ro"), "1\n");
        assert_eq!(fake.reasons_for(&list, Purpose::Read), vec![], "{device}");
        let reasons = fake.reasons_for(&list, Purpose::Erase);
        assert!(matches!(&reasons[..], [r] if r.check == Check::Format && r.what.contains("--setrw")), "{reasons:?}");
    }
}

/// Another drive was erased: everything was judged by sysfs, and then the node was opened by its name, which somebody had
/// given to another drive, or a file of `dd` before the drive was plugged in.
#[test]
fn a_node_that_is_not_the_drives_is_never_opened() {
    for (what, target) in [("another drive's", "nvme0n1"), ("a file", "../srv/file"), ("a partition's", "nvme1n1p1")] {
        let fake = clean();
        fake.put("/srv/file", &"x".repeat(2 << 20));
        fake.link("/dev/nvme1n1", target);
        let reasons = fake.reasons(&list());
        let wrong = |r: &&Reason| r.check == Check::Unreadable && r.what.contains("259:10");
        assert!(reasons.iter().any(|r| wrong(&r)), "{what}: {reasons:?}");
        let host = Host::at(fake.dir.path());
        assert!(host.read_at("/dev/nvme1n1", 0, 512).unwrap_err().why.contains("259:10"), "{what}");
        let all = sysfs::controllers(&host).unwrap();
        let drive = sysfs::find(&host, &all, "nvme1n1").unwrap();
        assert!(matches!(claim::moment(&host, drive), claim::Claim::Refused(_)), "{what}");
    }
    // The nodes for commands, which are asked about the drive.
    let fake = clean();
    fake.link("/dev/nvme1", "nvme0");
    fake.put("/dev/nvme0", "");
    assert!(fake.reasons(&list()).iter().any(|r| r.check == Check::Unreadable && r.what.contains("241:1")));
}

/// Whoever names a partition, by whatever name, does not mean the drive that would be erased.
#[test]
fn partitions_are_told_from_their_drive() {
    let fake = clean();
    fake.link("/dev/disk/by-id/nvme-EXP-part1", "../../nvme1n1p1");
    fake.link("/dev/disk/by-id/nvme-EXP", "../../nvme1n1");
    let host = Host::at(fake.dir.path());
    let all = sysfs::controllers(&host).unwrap();
    for (name, part) in [
        ("nvme1n1p1", true),
        ("/dev/nvme1n1p1", true),
        ("/dev/disk/by-id/nvme-EXP-part1", true),
        ("/dev/disk/by-id/nvme-EXP", false),
        ("nvme1n1", false),
        ("nvme1", false),
        (BDF, false),
    ] {
        let drive = sysfs::find(&host, &all, name).unwrap();
        assert_eq!((drive.bdf.as_str(), sysfs::partition(&host, drive, name).is_some()), (BDF, part), "{name}");
    }
}

#[test]
fn hidden_multipath_paths_name_their_namespace() {
    assert_eq!(sysfs::namespace_node("nvme1", "nvme1c3n2").as_deref(), Some("nvme1n2"));
    assert_eq!(sysfs::namespace_node("nvme1", "nvme0c1n2").as_deref(), Some("nvme0n2"));
    assert_eq!(sysfs::namespace_node("nvme1", "nvme1n2p1"), None);
    assert_eq!(sysfs::namespace_node("nvme1", "power"), None);
}
