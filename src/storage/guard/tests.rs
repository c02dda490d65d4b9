//! Each row of the refusal list on a fake machine; never on this one.

use super::*;
use std::fs;
use std::os::unix::fs::symlink;

const BDF: &str = "0000:02:00.0";

struct Fake {
    dir: tempfile::TempDir,
}

impl Fake {
    fn put(&self, path: &str, text: &str) {
        let at = self.dir.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::write(at, text).unwrap();
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
            self.put(&format!("{base}/transport"), "pcie\n");
        }
        self.folder(&format!("{pci}/nvme/nvme{n}/nvme{n}n1"));
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
            self.put(&node, &"\0".repeat(2 << 20));
        }
    }

    fn stamp(&self, node: &str, at: usize, magic: &[u8]) {
        let path = self.dir.path().join(node.trim_start_matches('/'));
        let mut bytes = fs::read(&path).unwrap();
        bytes[at..at + magic.len()].copy_from_slice(magic);
        fs::write(path, bytes).unwrap();
    }

    fn reasons(&self, allowed: &Result<Allowlist, String>) -> Vec<Reason> {
        let host = Host::at(self.dir.path());
        let all = sysfs::controllers(&host).unwrap();
        let drive = sysfs::find(&host, &all, "nvme1n1").unwrap();
        examine(&host, &all, drive, allowed)
    }
}

fn clean() -> Fake {
    let fake = Fake { dir: tempfile::tempdir().unwrap() };
    fake.drive("0000:01:00.0", 0, "BOOT", 14);
    fake.drive(BDF, 1, "EXP", 15);
    fake.put("/proc/self/mountinfo", "21 1 259:1 / / rw - ext4 /dev/nvme0n1p1 rw\n");
    fake.put("/proc/77/mountinfo", "21 1 259:1 / / rw - ext4 /dev/nvme0n1p1 rw\n");
    fake.link("/proc/77/fd/0", "/dev/null");
    fake.put("/proc/swaps", "Filename Type Size Used Priority\n");
    fake.put("/proc/cmdline", "quiet root=/dev/nvme0n1p1\n");
    fake
}

fn list() -> Result<Allowlist, String> {
    Allowlist::parse(
        "[[drive]]\npci = \"0000:02:00.0\"\nserial = \"EXP\"\nmodel = \"Model X\"\nnamespace = 1\nsize = 2097152\n",
    )
}

#[test]
fn a_clean_listed_drive_passes() {
    assert_eq!(clean().reasons(&list()), vec![]);
}

/// One row of the refusal list.
type Row = (&'static str, Check, fn(&Fake));

const ROWS: &[Row] = &[
    ("mounted partition", Check::Mounted, |f| {
        f.put("/proc/self/mountinfo", "21 1 259:11 / /data rw - ext4 /dev/nvme1n1p1 rw\n")
    }),
    ("mounted in another namespace", Check::Mounted, |f| {
        f.put("/proc/77/mountinfo", "21 1 259:11 / /data rw - ext4 /dev/x rw\n")
    }),
    ("root", Check::Boot, |f| f.put("/proc/self/mountinfo", "21 1 259:11 / / rw - ext4 /dev/nvme1n1p1 rw\n")),
    ("efi", Check::Boot, |f| f.put("/proc/self/mountinfo", "21 1 259:11 / /boot/efi rw - vfat /dev/nvme1n1p1 rw\n")),
    ("command line", Check::Boot, |f| f.put("/proc/cmdline", "root=/dev/nvme1n1p1")),
    ("command line by uuid", Check::Boot, |f| {
        f.link("/dev/disk/by-uuid/ab-12", "../../nvme1n1p1");
        f.put("/proc/cmdline", "root=UUID=ab-12");
    }),
    ("fstab", Check::Configured, |f| f.put("/etc/fstab", "/dev/nvme1n1p1 /data ext4 noauto 0 0\n")),
    ("crypttab by uuid", Check::Configured, |f| {
        f.link("/dev/disk/by-uuid/ab-12", "../../nvme1n1p1");
        f.put("/etc/crypttab", "data UUID=ab-12 none\n");
    }),
    ("swap", Check::Swap, |f| f.put("/proc/swaps", "Filename Type\n/dev/nvme1n1p1 partition 1 0 -2\n")),
    ("hibernation", Check::Swap, |f| f.put("/sys/power/resume", "259:11\n")),
    ("zram backing", Check::Swap, |f| f.put("/sys/block/zram0/backing_dev", "/dev/nvme1n1\n")),
    ("LVM", Check::Stacked, |f| {
        f.folder("/sys/class/block/nvme1n1p1/holders/dm-0");
        f.folder("/sys/class/block/dm-0/holders");
        f.put("/sys/class/block/dm-0/dm/uuid", "LVM-abc");
        f.put("/sys/class/block/dm-0/dm/name", "vg-root");
    }),
    ("LUKS open", Check::Stacked, |f| {
        f.folder("/sys/class/block/nvme1n1/holders/dm-1");
        f.folder("/sys/class/block/dm-1/holders");
        f.put("/sys/class/block/dm-1/dm/uuid", "CRYPT-LUKS2-abc");
        f.put("/sys/class/block/dm-1/dm/name", "secret");
    }),
    ("MD", Check::Stacked, |f| f.put("/sys/block/md127/md/dev-nvme1n1p1/state", "in_sync")),
    ("btrfs member", Check::Mounted, |f| f.folder("/sys/fs/btrfs/feed/devices/nvme1n1p1")),
    ("open file", Check::Open, |f| f.link("/proc/77/fd/3", "/dev/nvme1n1")),
    ("generic node open", Check::Open, |f| f.link("/proc/77/fd/3", "/dev/ng1n1")),
    ("in flight", Check::Open, |f| f.put("/sys/class/block/nvme1n1/inflight", "1 0")),
    ("nvmet export", Check::Exported, |f| {
        f.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/1/device_path", "/dev/nvme1n1")
    }),
    ("ext4 signature", Check::Contents, |f| f.stamp("/dev/nvme1n1p1", 0x438, &[0x53, 0xef])),
    ("LUKS signature", Check::Contents, |f| f.stamp("/dev/nvme1n1p1", 0, b"LUKS\xba\xbe")),
    ("LVM signature", Check::Contents, |f| f.stamp("/dev/nvme1n1", 512, b"LABELONE")),
    ("MD 1.0 at the end", Check::Contents, |f| f.stamp("/dev/nvme1n1", (2 << 20) - 8192, &[0xfc, 0x4e, 0x2b, 0xa9])),
    ("ZFS label", Check::Contents, |f| f.stamp("/dev/nvme1n1p1", 128 << 10, &0x00ba_b10c_u64.to_le_bytes())),
    ("GPT", Check::Contents, |f| f.stamp("/dev/nvme1n1", 512, b"EFI PART")),
    ("unknown data", Check::Contents, |f| f.stamp("/dev/nvme1n1", 5000, b"mine")),
    ("other size", Check::Allowlist, |f| f.put("/sys/class/block/nvme1n1/size", "8192")),
    ("other model", Check::Allowlist, |f| f.put(&format!("/sys/bus/pci/devices/{BDF}/nvme/nvme1/model"), "Model Y")),
    ("twin", Check::Twin, |f| f.drive("0000:03:00.0", 2, "EXP", 16)),
    ("no IOMMU", Check::Iommu, |f| f.drop_file(&format!("/sys/bus/pci/devices/{BDF}/iommu_group"))),
    ("no-IOMMU group", Check::Iommu, |f| f.put("/sys/kernel/iommu_groups/15/name", "vfio-noiommu")),
    ("sibling", Check::Sibling, |f| {
        f.folder("/sys/kernel/iommu_groups/15/devices/0000:02:00.1");
        f.put("/sys/bus/pci/devices/0000:02:00.1/class", "0x030000");
    }),
    ("vfio already", Check::Driver, |f| f.link(&format!("/sys/bus/pci/devices/{BDF}/driver"), "../drivers/vfio-pci")),
    ("fabrics", Check::Driver, |f| f.put("/sys/class/nvme/nvme1/transport", "tcp")),
    ("virtual functions", Check::Virtual, |f| f.put(&format!("/sys/bus/pci/devices/{BDF}/sriov_numvfs"), "2")),
    ("virtual function", Check::Virtual, |f| f.link(&format!("/sys/bus/pci/devices/{BDF}/physfn"), "../0000:00:00.0")),
    ("two controllers", Check::Shared, |f| {
        f.folder("/sys/class/nvme-subsystem/nvme-subsys1/nvme1");
        f.folder("/sys/class/nvme-subsystem/nvme-subsys1/nvme5");
    }),
    ("zoned", Check::Format, |f| f.put("/sys/class/block/nvme1n1/queue/zoned", "host-managed")),
    ("protection information", Check::Format, |f| {
        f.put("/sys/class/block/nvme1n1/integrity/format", "T10-DIF-TYPE1-CRC")
    }),
    ("block size", Check::Format, |f| f.put("/sys/class/block/nvme1n1/queue/logical_block_size", "1024")),
    ("unreadable mounts", Check::Unreadable, |f| f.drop_file("/proc/self/mountinfo")),
    ("unreadable node", Check::Unreadable, |f| f.drop_file("/dev/nvme1n1p1")),
];

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
fn hidden_multipath_paths_name_their_namespace() {
    assert_eq!(sysfs::namespace_node("nvme1", "nvme1c3n2").as_deref(), Some("nvme1n2"));
    assert_eq!(sysfs::namespace_node("nvme1", "nvme1n2p1"), None);
    assert_eq!(sysfs::namespace_node("nvme1", "power"), None);
}
