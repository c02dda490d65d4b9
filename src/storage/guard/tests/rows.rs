//! The refusal list as a table: what each row does to a clean machine, and the reason it must give.

use super::*;

/// One row of the refusal list.
pub type Row = (&'static str, Check, fn(&Fake));

pub const ROWS: &[Row] = &[
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
    ("fstab with quotes", Check::Configured, |f| {
        f.link("/dev/disk/by-partlabel/models", "../../nvme1n1p1");
        f.put("/etc/fstab", "PARTLABEL=\"models\" /data ext4 noauto 0 0\n");
    }),
    ("mdadm.conf", Check::Configured, |f| f.put("/etc/mdadm/mdadm.conf", "DEVICE /dev/nvme1n1p1\n")),
    ("LVM devices file", Check::Configured, |f| {
        f.put("/etc/lvm/devices/system.devices", "IDTYPE=devname IDNAME=/dev/nvme1n1p1 DEVNAME=/dev/nvme1n1p1\n")
    }),
    ("systemd unit", Check::Configured, |f| {
        f.put("/etc/systemd/system/data.mount", "[Mount]\nWhat=/dev/nvme1n1p1\nWhere=/data\n")
    }),
    ("zpool.cache by node", Check::Configured, |f| {
        f.put("/etc/zfs/zpool.cache", "\0\0\0\x04path\0\0\0\x09\0\0\0/dev/nvme1n1p1\0\0")
    }),
    ("zpool.cache by id", Check::Configured, |f| {
        f.link("/dev/disk/by-id/nvme-X_EXP-part1", "../../nvme1n1p1");
        // The length of the string looks like text.
        f.put("/etc/zfs/zpool.cache", "\0\0\0\x05devid\0\0\0\0\0\0\x21nvme-X_EXP-part1\0\0\0\x01");
    }),
    ("command line by LUKS uuid", Check::Boot, |f| {
        f.link("/dev/disk/by-uuid/0a1b2c3d-0000-4000-8000-00000000000f", "../../nvme1n1p1");
        f.put("/proc/cmdline", "rd.luks.uuid=luks-0a1b2c3d-0000-4000-8000-00000000000F quiet");
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
    ("root below LVM", Check::Boot, |f| {
        f.put("/proc/self/mountinfo", "21 1 253:0 / / rw - ext4 /dev/mapper/vg-root rw\n");
        f.put("/sys/class/block/dm-0/dev", "253:0");
        f.folder("/sys/class/block/dm-0/slaves/dm-1");
        f.folder("/sys/class/block/dm-1/slaves/nvme1n1p1");
    }),
    ("root that cannot be followed", Check::Unreadable, |f| {
        f.put("/proc/self/mountinfo", "21 1 8:1 / / rw - ext4 /dev/root rw\n")
    }),
    ("multipath device", Check::Stacked, |f| {
        f.folder("/sys/class/block/nvme1n1/holders/dm-2");
        f.folder("/sys/class/block/dm-2/holders");
        f.put("/sys/class/block/dm-2/dm/uuid", "mpath-3600");
        f.put("/sys/class/block/dm-2/dm/name", "mpatha");
    }),
    ("bcache", Check::Stacked, |f| {
        f.folder("/sys/class/block/nvme1n1/holders/bcache0");
        f.folder("/sys/class/block/bcache0/holders");
    }),
    ("slave of another device", Check::Stacked, |f| f.folder("/sys/class/block/nvme1n1/slaves/dm-4")),
    ("LUKS open", Check::Stacked, |f| {
        f.folder("/sys/class/block/nvme1n1/holders/dm-1");
        f.folder("/sys/class/block/dm-1/holders");
        f.put("/sys/class/block/dm-1/dm/uuid", "CRYPT-LUKS2-abc");
        f.put("/sys/class/block/dm-1/dm/name", "secret");
    }),
    ("MD", Check::Stacked, |f| f.put("/sys/block/md127/md/dev-nvme1n1p1/state", "in_sync")),
    ("inactive MD", Check::Stacked, |f| {
        f.put("/proc/mdstat", "Personalities :\nmd127 : inactive nvme1n1p1[0](S)\n      4096 blocks\n")
    }),
    ("imported ZFS pool", Check::Stacked, |f| {
        f.stamp("/dev/nvme1n1p1", 128 << 10, &0x00ba_b10c_u64.to_le_bytes());
        f.put("/proc/spl/kstat/zfs/tank/state", "ONLINE\n");
    }),
    ("btrfs member", Check::Mounted, |f| f.folder("/sys/fs/btrfs/feed/devices/nvme1n1p1")),
    ("open file", Check::Open, |f| f.link("/proc/77/fd/3", "/dev/nvme1n1")),
    ("generic node open", Check::Open, |f| f.link("/proc/77/fd/3", "/dev/ng1n1")),
    ("writes that are not counted", Check::Unreadable, |f| f.put("/sys/class/block/nvme1n1/queue/iostats", "0")),
    ("in flight", Check::Open, |f| f.put("/sys/class/block/nvme1n1/inflight", "1 0")),
    ("nvmet export", Check::Exported, |f| {
        f.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/1/device_path", "/dev/nvme1n1")
    }),
    ("nvmet export by link", Check::Exported, |f| {
        f.link("/dev/disk/by-id/nvme-X", "../../nvme1n1");
        f.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/1/device_path", "/dev/disk/by-id/nvme-X\n");
    }),
    ("LIO iblock export", Check::Exported, |f| {
        f.put("/sys/kernel/config/target/core/iblock_0/disk/udev_path", "/dev/nvme1n1\n")
    }),
    ("LIO fileio export", Check::Exported, |f| {
        f.put("/sys/kernel/config/target/core/fileio_1/disk/info", "TCM FILEIO ID: 0 File: /dev/nvme1n1p1 Size: 9\n")
    }),
    ("LIO file on the drive", Check::Exported, |f| {
        f.put("/proc/self/mountinfo", "21 1 259:1 / / rw - ext4 x rw\n22 21 259:11 / /data rw - ext4 x rw\n");
        f.put("/sys/kernel/config/target/core/fileio_1/disk/udev_path", "/data/lun.img\n");
    }),
    ("SCST export", Check::Exported, |f| f.put("/sys/kernel/scst_tgt/devices/d/filename", "/dev/nvme1n1\n\n[key]\n")),
    ("ublk export", Check::Exported, |f| {
        f.put("/sys/block/ublkb3/size", "8");
        f.put("/run/ublksrvd/0003.pid", "{\"target\": {\"backing_file\": \"/dev/nvme1n1\"}}");
    }),
    ("ublk without a record", Check::Unreadable, |f| f.put("/sys/block/ublkb3/size", "8")),
    ("loop over the drive", Check::Stacked, |f| f.put("/sys/block/loop7/loop/backing_file", "/dev/nvme1n1p1\n")),
    ("loop over a file on the drive", Check::Stacked, |f| {
        f.put("/proc/self/mountinfo", "21 1 259:1 / / rw - ext4 x rw\n22 21 259:11 / /data rw - ext4 x rw\n");
        f.put("/sys/block/loop7/loop/backing_file", "/data/disk.img (deleted)\n");
    }),
    ("io_uring registered file", Check::Open, |f| {
        f.link("/proc/77/fd/9", "anon_inode:[io_uring]");
        f.put("/proc/77/fdinfo/9", "SqMask:\t0x7\nUserFiles:\t1\n    0: /dev/nvme1n1\nUserBufs:\t0\n");
    }),
    ("EFI system partition", Check::Boot, |f| f.table("/dev/nvme1n1", gpt::EFI_SYSTEM)),
    ("BIOS boot partition", Check::Boot, |f| f.table("/dev/nvme1n1", gpt::BIOS_BOOT)),
    ("ext4 signature", Check::Contents, |f| f.stamp("/dev/nvme1n1p1", 0x438, &[0x53, 0xef])),
    ("LUKS signature", Check::Contents, |f| f.stamp("/dev/nvme1n1p1", 0, b"LUKS\xba\xbe")),
    ("LVM signature", Check::Contents, |f| f.stamp("/dev/nvme1n1", 512, b"LABELONE")),
    ("MD 1.0 at the end", Check::Contents, |f| f.stamp("/dev/nvme1n1", (2 << 20) - 8192, &[0xfc, 0x4e, 0x2b, 0xa9])),
    ("ZFS label", Check::Contents, |f| f.stamp("/dev/nvme1n1p1", 128 << 10, &0x00ba_b10c_u64.to_le_bytes())),
    ("unknown data", Check::Contents, |f| f.stamp("/dev/nvme1n1p1", 5000, b"mine")),
    // Both begin behind an empty MiB or two.
    ("VMFS's volume", Check::Contents, |f| f.stamp("/dev/nvme1n1p1", 1 << 20, &[0x0d, 0xd0, 0x01, 0xc0])),
    ("VMFS itself", Check::Contents, |f| f.stamp("/dev/nvme1n1p1", 2 << 20, &[0x5e, 0xf1, 0xab, 0x2f])),
    ("data behind two empty MiB", Check::Contents, |f| f.stamp("/dev/nvme1n1p1", 3 << 20, b"mine")),
    ("data 3 MiB before the end", Check::Contents, |f| {
        f.stamp("/dev/nvme1n1p1", (16 << 20) - 1, &[0]);
        f.stamp("/dev/nvme1n1p1", 13 << 20, b"mine");
    }),
    ("other size", Check::Allowlist, |f| f.put("/sys/class/block/nvme1n1/size", "8192")),
    ("other model", Check::Allowlist, |f| f.put(&format!("/sys/bus/pci/devices/{BDF}/nvme/nvme1/model"), "Model Y")),
    ("twin with another model", Check::Twin, |f| {
        f.drive("0000:03:00.0", 2, "EXP", 16);
        f.put("/sys/bus/pci/devices/0000:03:00.0/nvme/nvme2/model", "Model Y");
    }),
    ("no serial", Check::Twin, |f| f.put(&format!("/sys/bus/pci/devices/{BDF}/nvme/nvme1/serial"), "    \n")),
    ("serial of zeros", Check::Twin, |f| {
        f.put(&format!("/sys/bus/pci/devices/{BDF}/nvme/nvme1/serial"), "00000000000000000000\n")
    }),
    ("placeholder serial", Check::Twin, |f| {
        f.put(&format!("/sys/bus/pci/devices/{BDF}/nvme/nvme1/serial"), "To Be Filled By O.E.M.\n")
    }),
    ("same EUI", Check::Twin, |f| {
        for n in [0, 1] {
            f.put(&format!("/sys/class/block/nvme{n}n1/eui"), "00 25 38 5b 91 d0 e2 f1\n");
        }
    }),
    ("same NGUID", Check::Twin, |f| {
        for n in [0, 1] {
            f.put(&format!("/sys/class/block/nvme{n}n1/nguid"), "01000000-0000-0000-5cd2-e4a1b2c35051\n");
        }
    }),
    ("twin", Check::Twin, |f| f.drive("0000:03:00.0", 2, "EXP", 16)),
    ("no IOMMU", Check::Iommu, |f| f.drop_file(&format!("/sys/bus/pci/devices/{BDF}/iommu_group"))),
    ("no-IOMMU group", Check::Iommu, |f| f.put("/sys/kernel/iommu_groups/15/name", "vfio-noiommu")),
    ("blocked IOMMU domain", Check::Iommu, |f| f.put("/sys/kernel/iommu_groups/15/type", "blocked\n")),
    ("sibling", Check::Sibling, |f| {
        f.folder("/sys/kernel/iommu_groups/15/devices/0000:02:00.1");
        f.put("/sys/bus/pci/devices/0000:02:00.1/class", "0x030000");
    }),
    ("vfio already", Check::Driver, |f| f.link(&format!("/sys/bus/pci/devices/{BDF}/driver"), "../drivers/vfio-pci")),
    ("fabrics", Check::Driver, |f| f.put("/sys/class/nvme/nvme1/transport", "tcp")),
    ("asleep", Check::Driver, |f| f.put(&format!("/sys/bus/pci/devices/{BDF}/power_state"), "D3hot\n")),
    ("broken parity", Check::Driver, |f| f.put(&format!("/sys/bus/pci/devices/{BDF}/broken_parity_status"), "1\n")),
    ("resetting", Check::Driver, |f| f.put("/sys/class/nvme/nvme1/state", "resetting\n")),
    ("RAID controller above", Check::Raid, |f| {
        let below = "/sys/devices/pci0000:00/0000:00:0e.0";
        f.put(&format!("{below}/class"), "0x010400\n");
        f.move_to(&format!("/sys/bus/pci/devices/{BDF}"), &format!("{below}/{BDF}"));
    }),
    ("virtual functions", Check::Virtual, |f| f.put(&format!("/sys/bus/pci/devices/{BDF}/sriov_numvfs"), "2")),
    ("virtual function", Check::Virtual, |f| f.link(&format!("/sys/bus/pci/devices/{BDF}/physfn"), "../0000:00:00.0")),
    ("two controllers", Check::Shared, |f| {
        f.folder("/sys/class/nvme-subsystem/nvme-subsys1/nvme1");
        f.folder("/sys/class/nvme-subsystem/nvme-subsys1/nvme5");
    }),
    ("another controller's path", Check::Shared, |f| {
        f.folder(&format!("/sys/bus/pci/devices/{BDF}/nvme/nvme1/nvme1c1n1"));
        f.folder("/sys/bus/pci/devices/0000:01:00.0/nvme/nvme0/nvme1c0n1");
    }),
    ("CMIC says shared", Check::Shared, |f| f.folder(&format!("/sys/bus/pci/devices/{BDF}/nvme/nvme1/nvme1c1n1"))),
    ("metadata", Check::Format, |f| f.put("/sys/class/block/nvme1n1/metadata_bytes", "8\n")),
    ("zoned", Check::Format, |f| f.put("/sys/class/block/nvme1n1/queue/zoned", "host-managed")),
    ("protection information", Check::Format, |f| {
        f.put("/sys/class/block/nvme1n1/integrity/format", "T10-DIF-TYPE1-CRC")
    }),
    ("block size", Check::Format, |f| f.put("/sys/class/block/nvme1n1/queue/logical_block_size", "1024")),
    ("unreadable mounts", Check::Unreadable, |f| f.drop_file("/proc/self/mountinfo")),
    ("unreadable node", Check::Unreadable, |f| f.drop_file("/dev/nvme1n1p1")),
];
