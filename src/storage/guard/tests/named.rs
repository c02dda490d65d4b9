//! Tables that name a drive by what it says of itself, in the words of each table. No row has links
//! below `/dev/disk`: what they would say is read from the drive.

use super::*;

/// A UUID as bytes and as tables have it.
const ID: [u8; 16] = [0x6f, 0x1d, 0x2c, 0x3b, 0x4a, 0x59, 0x48, 0x67, 0x96, 0xa5, 0xb4, 0xc3, 0xd2, 0xe1, 0xf0, 0x0f];
const UUID: &str = "6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f";

/// What the first partition holds.
type Holds = fn(&Fake);

fn ext4(f: &Fake) {
    f.stamp(P1, 0x438, &[0x53, 0xef]);
    f.stamp(P1, 0x468, &ID);
    f.stamp(P1, 0x478, b"my disk");
}

/// A label with a blank that is not of ASCII.
fn spaced(f: &Fake) {
    ext4(f);
    f.stamp(P1, 0x478, "my\u{a0}disk\0".as_bytes());
}

fn xfs(f: &Fake) {
    f.stamp(P1, 0, b"XFSB");
    f.stamp(P1, 32, &ID);
    f.stamp(P1, 108, b"scratch");
}

fn btrfs(f: &Fake) {
    f.stamp(P1, 0x10040, b"_BHRfS_M");
    f.stamp(P1, 0x10020, &[7; 16]);
    f.stamp(P1, 0x1010b, &ID);
    f.stamp(P1, 0x1012b, b"pool one");
}

fn f2fs(f: &Fake) {
    f.stamp(P1, 0x400, &[0x10, 0x20, 0xf5, 0xf2]);
    f.stamp(P1, 0x46c, &ID);
    f.stamp(P1, 0x47c, b"f\0l\0a\0s\0h\0");
}

fn fat(f: &Fake) {
    f.stamp(P1, 82, b"FAT32   ");
    // 512 bytes a sector, 1 a cluster, 32 reserved, 2 tables of 8 sectors, root in cluster 2.
    f.stamp(P1, 11, &[0, 2, 1, 32, 0, 2]);
    f.stamp(P1, 36, &[8]);
    f.stamp(P1, 44, &[2]);
    f.stamp(P1, 67, &[0x34, 0x12, 0xcd, 0xab]);
    f.stamp(P1, 71, b"NO NAME    ");
    f.stamp(P1, 48 * 512, b"ROOTLABEL  \x08");
}

fn exfat(f: &Fake) {
    f.stamp(P1, 3, b"EXFAT   ");
    f.stamp(P1, 88, &[64]);
    f.stamp(P1, 96, &[2]);
    f.stamp(P1, 100, &[0x34, 0x12, 0xcd, 0xab]);
    f.stamp(P1, 108, &[9, 0]);
    f.stamp(P1, 64 * 512, b"\x83\x04c\0a\0r\0d\0");
}

fn ntfs(f: &Fake) {
    f.stamp(P1, 3, b"NTFS    ");
    f.stamp(P1, 11, &[0, 2, 8]);
    f.stamp(P1, 48, &[4]);
    f.stamp(P1, 64, &[0xf6]);
    f.stamp(P1, 72, &[8, 7, 6, 5, 4, 3, 2, 1]);
    // Record 3 of the table of files in cluster 4, records of 1 KiB.
    let record = 4 * 4096 + 3 * 1024;
    f.stamp(P1, record, b"FILE");
    f.stamp(P1, record + 20, &[56]);
    f.stamp(P1, record + 56, &[0x60, 0, 0, 0, 40, 0, 0, 0]);
    f.stamp(P1, record + 56 + 16, &[10, 0, 0, 0, 24]);
    f.stamp(P1, record + 56 + 24, b"g\0a\0m\0e\0s\0");
}

fn swap(f: &Fake) {
    f.stamp(P1, 16384 - 10, b"SWAPSPACE2");
    f.stamp(P1, 0x40c, &ID);
    f.stamp(P1, 0x41c, b"swap-a");
}

fn luks(f: &Fake) {
    f.stamp(P1, 0, b"LUKS\xba\xbe\0\x02");
    f.stamp(P1, 6, &[0, 2]);
    f.stamp(P1, 24, b"secrets");
    f.stamp(P1, 168, UUID.as_bytes());
}

fn second_luks(f: &Fake) {
    f.stamp(P1, 0x4000, b"SKUL\xba\xbe\0\x02");
    f.stamp(P1, 0x4000 + 168, UUID.as_bytes());
}

fn lvm(f: &Fake) {
    f.stamp(P1, 1024, b"LABELONE");
    f.stamp(P1, 1024 + 20, &[32]);
    f.stamp(P1, 1024 + 32, b"AbCdEf0123GhIj4567KlMn89OpQrStUv");
    let group = "vg-data {\nid = \"aaaaaa-bbbb-cccc-dddd-eeee-ffff-gggggg\"\nseqno = 4\n";
    f.stamp(P1, 4608, group.as_bytes());
}

fn md(f: &Fake) {
    f.stamp(P1, 4096, &[0xfc, 0x4e, 0x2b, 0xa9, 1]);
    f.stamp(P1, 4096 + 16, &ID);
    f.stamp(P1, 4096 + 32, b"host:archive");
}

fn md_old(f: &Fake) {
    let at = (2 << 20) - (64 << 10);
    f.stamp(P1, at, &[0xfc, 0x4e, 0x2b, 0xa9]);
    // Words 5, 13, 14 and 15, little-endian.
    f.stamp(P1, at + 20, &[4, 3, 2, 1]);
    f.stamp(P1, at + 52, &[8, 7, 6, 5, 0xc, 0xb, 0xa, 9, 0x10, 0xf, 0xe, 0xd]);
}

fn zfs(f: &Fake) {
    f.stamp(P1, 128 << 10, &0x00ba_b10c_u64.to_le_bytes());
    let mut list = vec![1u8, 1, 0, 0];
    list.extend([0, 0, 0, 4]);
    list.extend(b"name");
    list.extend([0, 0, 0, 9, 0, 0, 0, 1, 0, 0, 0, 4]);
    list.extend(b"tank");
    list.extend([0, 0, 0, 9]);
    list.extend(b"pool_guid\0\0\0");
    list.extend([0, 0, 0, 8, 0, 0, 0, 1]);
    list.extend(1_234_567_890_123_456_789_u64.to_be_bytes());
    f.stamp(P1, 16 << 10, &list);
}

fn bcache(f: &Fake) {
    f.stamp(P1, 0x1018, &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca]);
    f.stamp(P1, 0x1038, &ID);
}

fn nothing(_: &Fake) {}

const P1: &str = "/dev/nvme1n1p1";

/// What the drive holds, a table, its text, and the reason.
const NAMED: &[(Holds, &str, &str, Check)] = &[
    // The escapes and quotes of fstab.
    (ext4, "/etc/fstab", "UUID=6F1D2C3B-4A59-4867-96A5-B4C3D2E1F00F /data ext4 noauto 0 0\n", Check::Configured),
    (ext4, "/etc/fstab", "UUID=\"6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f\" /data ext4\n", Check::Configured),
    (ext4, "/etc/fstab", "LABEL=my\\040disk /data ext4 noauto 0 0\n", Check::Configured),
    (ext4, "/etc/fstab", "LABEL=\"my disk\" /data ext4 noauto 0 0\n", Check::Configured),
    (ext4, "/etc/fstab", "LABEL='my disk'\t/data ext4 noauto 0 0\n", Check::Configured),
    (ext4, "/etc/fstab", "\"LABEL=my disk\" /data ext4 noauto 0 0\n", Check::Configured),
    (ext4, "/etc/fstab", "LABEL=my\\134x20disk /data ext4 noauto 0 0\n", Check::Configured),
    (ext4, "/etc/fstab", "/dev/disk/by-label/my\\134x20disk /data ext4\n", Check::Configured),
    (ext4, "/etc/fstab", "/dev/disk/by-label/my\\x20disk /data ext4\n", Check::Configured),
    (ext4, "/etc/fstab", "/dev/disk/by-uuid/6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f /data ext4\n", Check::Configured),
    (ext4, "/etc/fstab", "UUID=6f1d2c3b-4a59-\\\n4867-96a5-b4c3d2e1f00f /data ext4\n", Check::Configured),
    (ext4, "/etc/fstab", "# old \\\nLABEL=my\\040disk /data ext4\n", Check::Configured),
    (ext4, "/etc/fstab", "/dev/sda1 / ext4 rw,journal_path=/dev//nvme1n1p1\n", Check::Configured),
    (nothing, "/etc/fstab", "PARTLABEL=nt\\040models /data ext4\n", Check::Configured),
    (nothing, "/etc/fstab", "PARTLABEL=\"nt models\" /data ext4\n", Check::Configured),
    (nothing, "/etc/fstab", "/dev/mine /data ext4\n", Check::Configured),
    (nothing, "/etc/fstab", "/root/link\\040to\\040it /data ext4\n", Check::Configured),
    (nothing, "/etc/fstab", "/dev/disk/by-id/nvme-Model_X_EXP-part1 /data ext4\n", Check::Configured),
    (nothing, "/etc/fstab", "/dev/disk/by-path/pci-0000:02:00.0-nvme-1-part1 /data ext4\n", Check::Configured),
    (nothing, "/etc/fstab", "/dev/disk/by-id/nvme-eui.0025385b91d0e2f1 /data ext4\n", Check::Configured),
    (nothing, "/etc/fstab.d/more", "/dev/nvme1n1p1 /data ext4\n", Check::Configured),
    (spaced, "/etc/fstab", "LABEL=my\u{a0}disk /data ext4\n", Check::Configured),
    (nothing, "/boot/grub/grub.cfg", "; linux /vmlinuz root=/dev/nvme1n1p1\n", Check::Boot),
    (nothing, "/etc/fstab", "/dev/disk/by-id/nvme-Model_X_EXP_1-part1 /data ext4\n", Check::Configured),
    // File systems.
    (xfs, "/etc/fstab", "LABEL=scratch /data xfs\n", Check::Configured),
    (btrfs, "/etc/fstab", "LABEL=pool\\040one /data btrfs\n", Check::Configured),
    (btrfs, "/etc/fstab", "UUID=07070707-0707-0707-0707-070707070707 /data btrfs\n", Check::Configured),
    (btrfs, "/etc/crypttab", "a UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f none\n", Check::Configured),
    (f2fs, "/etc/fstab", "LABEL=flash /data f2fs\n", Check::Configured),
    (fat, "/etc/fstab", "UUID=ABCD-1234 /data vfat\n", Check::Configured),
    (fat, "/etc/fstab", "LABEL=ROOTLABEL /data vfat\n", Check::Configured),
    (exfat, "/etc/fstab", "UUID=abcd-1234 /data exfat\n", Check::Configured),
    (exfat, "/etc/fstab", "LABEL=card /data exfat\n", Check::Configured),
    (ntfs, "/etc/fstab", "UUID=0102030405060708 /data ntfs-3g\n", Check::Configured),
    (ntfs, "/etc/fstab", "LABEL=games /data ntfs-3g\n", Check::Configured),
    (swap, "/etc/fstab", "UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f none swap\n", Check::Configured),
    (swap, "/etc/initramfs-tools/conf.d/resume", "RESUME=LABEL=swap-a\n", Check::Boot),
    // Encryption.
    (luks, "/etc/crypttab", "data LABEL=secrets none luks\n", Check::Configured),
    (luks, "/etc/crypttab.initramfs", "data UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f none\n", Check::Configured),
    (second_luks, "/etc/crypttab", "data UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f none\n", Check::Configured),
    (
        luks,
        "/etc/initramfs-tools/conf.d/cryptroot",
        "target=data,source=UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f,key=none\n",
        Check::Boot,
    ),
    (nothing, "/etc/crypttab", "data /dev/sda1 /key:LABEL=none luks,header=/dev/nvme1n1p1\n", Check::Configured),
    (luks, "/proc/cmdline", "rd.luks.name=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f=data\n", Check::Boot),
    (
        luks,
        "/etc/fstab",
        "/dev/disk/by-id/dm-uuid-CRYPT-LUKS2-6f1d2c3b4a59486796a5b4c3d2e1f00f-x /d\n",
        Check::Configured,
    ),
    // Volumes, arrays, pools.
    (
        lvm,
        "/etc/lvm/devices/system.devices",
        "IDTYPE=x IDNAME=y DEVNAME=/dev/sdz PVID=AbCdEf0123GhIj4567KlMn89OpQrStUv\n",
        Check::Configured,
    ),
    (lvm, "/etc/lvm/backup/vg", "pv0 {\n\tid = \"AbCdEf-0123-GhIj-4567-KlMn-89Op-QrStUv\"\n", Check::Configured),
    (lvm, "/etc/fstab", "/dev/vg-data/home /home2 ext4\n", Check::Configured),
    (lvm, "/etc/fstab", "/dev/mapper/vg--data-home /home2 ext4\n", Check::Configured),
    (lvm, "/proc/cmdline", "rd.lvm.lv=vg-data/root quiet\n", Check::Boot),
    (lvm, "/proc/cmdline", "rd.lvm.vg=vg-data quiet\n", Check::Boot),
    (
        nothing,
        "/etc/lvm/devices/system.devices",
        "IDTYPE=sys_wwid IDNAME=eui.0025385b91d0e2f1 DEVNAME=/dev/nvme7n1\n",
        Check::Configured,
    ),
    (nothing, "/etc/multipath/wwids", "/eui.0025385b91d0e2f1/\n", Check::Configured),
    (md, "/etc/mdadm/mdadm.conf", "ARRAY /dev/md0 UUID=6f1d2c3b:4a594867:96a5b4c3:d2e1f00f\n", Check::Configured),
    (md, "/etc/mdadm.conf", "ARRAY /dev/md/x name=host:archive\n", Check::Configured),
    (md, "/etc/fstab", "/dev/md/archive /data ext4\n", Check::Configured),
    (md, "/etc/mdadm.conf.d/a.conf", "ARRAY <ignore> uuid=6f1d2c3b:4a594867:96a5b4c3:d2e1f00f\n", Check::Configured),
    (md, "/proc/cmdline", "rd.md.uuid=6f1d2c3b:4a594867:96a5b4c3:d2e1f00f\n", Check::Boot),
    (md_old, "/etc/mdadm.conf", "ARRAY /dev/md0 UUID=01020304:05060708:090a0b0c:0d0e0f10\n", Check::Configured),
    (zfs, "/etc/fstab", "tank/data /data zfs\n", Check::Configured),
    (zfs, "/etc/zfs/zpool.cache", "\0\0\0\x04name\0\0\0\x09\0\0\0\x01\0\0\0\x04tank\0\0\0\x05", Check::Configured),
    (zfs, "/proc/cmdline", "root=ZFS=tank/root\n", Check::Boot),
    (bcache, "/etc/fstab", "UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f /data x\n", Check::Configured),
    // Units, in all their places.
    (ext4, "/usr/lib/systemd/system/data.mount", "[Mount]\nWhere=/data\nWhat=LABEL=my disk\n", Check::Configured),
    (ext4, "/lib/systemd/system/data.mount", "[Mount]\nWhat=/dev/disk/by-label/my\\x20disk\n", Check::Configured),
    (nothing, "/run/systemd/system/data.mount", UNIT_NODE, Check::Configured),
    (nothing, "/run/systemd/transient/data.mount", UNIT_NODE, Check::Configured),
    (nothing, "/run/systemd/generator/data.mount", UNIT_NODE, Check::Configured),
    (nothing, "/etc/systemd/system/data.mount.d/over.conf", UNIT_NODE, Check::Configured),
    (nothing, "/usr/lib/systemd/system/mount.d/all.conf", UNIT_NODE, Check::Configured),
    (nothing, "/run/systemd/generator.late/x.swap", "[Swap]\nWhat=/dev/nvme1n1p1\n", Check::Configured),
    (
        luks,
        "/run/systemd/generator/systemd-cryptsetup@data.service",
        "ExecStart=x attach 'data' '/dev/disk/by-uuid/6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f'\n",
        Check::Configured,
    ),
    (nothing, "/etc/systemd/system/data.mount", "[Mount]\nWhat=/dev/%m\n", Check::Unreadable),
    (nothing, "/etc/systemd/system/data.mount", "[Mount]\nWhat=\\\n  /dev/nvme1n1p1\n", Check::Configured),
    (nothing, "/etc/systemd/system/data.mount", "[Mount]\nWhat=\\\n/dev/disk/by-label/%m\n", Check::Unreadable),
    // Services that mount by a command.
    (
        nothing,
        "/etc/systemd/system/a.service",
        "[Service]\nExecStart=/bin/mount /dev/nvme1n1p1 /srv\n",
        Check::Configured,
    ),
    (nothing, "/etc/systemd/system/a.service", "ExecStart=/bin/mount \\\n  /dev/nvme1n1p1 /srv\n", Check::Configured),
    (nothing, "/usr/lib/systemd/system/a.service.d/b.conf", "ExecStartPre=mkswap /dev/nvme1n1\n", Check::Configured),
    (ext4, "/lib/systemd/system/a.service", "ExecStart=mount LABEL='my disk' /srv\n", Check::Configured),
    // Guests.
    (nothing, "/etc/libvirt/qemu/vm.xml", "<disk><source dev='/dev/mine'/></disk>", Check::Configured),
    (nothing, "/etc/libvirt/qemu/vm.xml", "<source dev=\"/dev/nvme1n&#49;\"/>", Check::Configured),
    (nothing, "/run/libvirt/qemu/vm.xml", "<source dev='/dev/disk/by-id/nvme-Model_X_EXP'/>", Check::Configured),
    (
        nothing,
        "/etc/libvirt/qemu/vm.xml",
        "<hostdev mode='subsystem' type='pci'><source>\n<address domain='0x0000' bus='0x02' slot='0x00' function='0x0'/>\n</source>",
        Check::Configured,
    ),
    (nothing, "/etc/libvirt/storage/p.xml", "<source><device path='/dev/nvme1n1'/></source>", Check::Configured),
    (nothing, "/etc/pve/qemu-server/100.conf", "scsi1: /dev/disk/by-id/nvme-Model_X_EXP,size=1T\n", Check::Configured),
    (nothing, "/etc/pve/qemu-server/100.conf", "hostpci0: 0000:02:00.0,pcie=1\n", Check::Configured),
    (nothing, "/etc/pve/qemu-server/100.conf", "hostpci0: host=02:00.0,pcie=1\n", Check::Configured),
    (nothing, "/etc/pve/qemu-server/100.conf", "hostpci0: 01:00;02:00,x-vga=1\n", Check::Configured),
    (nothing, "/etc/pve/mapping/pci.cfg", "x\n  map id=1:2,node=a,path=0000:02:00,iommugroup=9\n", Check::Configured),
    (nothing, "/etc/xen/a.cfg", "pci = [ '0000:02:00.0' ]\n", Check::Configured),
    (nothing, "/etc/xen/a.cfg", "pci = [ '02:00.*,permissive=1' ]\n", Check::Configured),
    (nothing, "/etc/driverctl.d/0000:02:00.0", "vfio-pci\n", Check::Configured),
    (nothing, "/etc/spdk/bdev.json", "{\"traddr\": \"0000:02:00.0\"}", Check::Configured),
    (nothing, "/proc/cmdline", "xen-pciback.hide=(01:00.0)(02:00.0)\n", Check::Boot),
    (
        nothing,
        "/etc/security/pam_mount.conf.xml",
        "<volume user=\"u\" path=\"/dev/nvme1n1\" mountpoint=\"/home/u\" fstype=\"crypt\"/>",
        Check::Configured,
    ),
    (nothing, "/etc/xen/a.cfg", "disk = [ 'phy:nvme1n1p1,xvda,w' ]\n", Check::Configured),
    // Exports that come back at the next start.
    (nothing, "/etc/target/saveconfig.json", "{\"dev\": \"\\/dev\\/nvme1n1\"}", Check::Exported),
    (nothing, "/etc/rtslib-fb-target/saveconfig.json", "{\"dev\": \"/dev/mine\"}", Check::Exported),
    (nothing, "/etc/nvmet/config.json", "{\"device\": {\"path\": \"/dev/nvme1n1\"}}", Check::Exported),
    (nothing, "/etc/tgt/conf.d/a.conf", "<target x>\n backing-store /dev/nvme1n1\n</target>\n", Check::Exported),
    (nothing, "/etc/nbd-server/config", "[a]\nexportname = /dev/nvme1n1\n", Check::Exported),
    (nothing, "/etc/drbd.d/r0.res", "resource r0 {\n disk /dev/nvme1n1p1;\n}\n", Check::Configured),
    // What boots.
    (ext4, "/boot/loader/entries/a.conf", "options root=UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f rw\n", Check::Boot),
    (ext4, "/efi/loader/entries/a.conf", "options root=\"LABEL=my disk\" rw\n", Check::Boot),
    (
        ext4,
        "/boot/grub/grub.cfg",
        "search --no-floppy --fs-uuid --set=root 6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f\n",
        Check::Boot,
    ),
    (xfs, "/boot/grub2/grub.cfg", "search --no-floppy --set=root --label scratch\n", Check::Boot),
    (
        ext4,
        "/etc/default/grub",
        "GRUB_CMDLINE_LINUX=\"resume=UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f\"\n",
        Check::Boot,
    ),
    (nothing, "/var/cache/debconf/config.dat", "Value: /dev/disk/by-id/nvme-Model_X_EXP\n", Check::Boot),
    (nothing, "/etc/kernel/cmdline", "root=259:11\n", Check::Boot),
    (nothing, "/proc/cmdline", "root=103:0b\n", Check::Boot),
    (nothing, "/proc/cmdline", "resume=1030b\n", Check::Boot),
    (nothing, "/proc/cmdline", "md=0,/dev/nvme1n1p1\n", Check::Boot),
    // What formats a disk at the next start, or writes to one in a crash.
    (
        nothing,
        "/etc/cloud/cloud.cfg.d/50-disks.cfg",
        "fs_setup:\n - {device: /dev/nvme1n1, filesystem: ext4}\n",
        Check::Configured,
    ),
    (ext4, "/etc/kdump.conf", "ext4 LABEL=my\\x20disk\n", Check::Configured),
    (nothing, "/etc/kdump.conf", "raw /dev/nvme1n1p1\n", Check::Configured),
    (nothing, "/sys/module/pstore_blk/parameters/blkdev", "259:11\n", Check::Configured),
    (nothing, "/etc/systemd/zram-generator.conf", "[zram0]\nwriteback-device = /dev/nvme1n1p1\n", Check::Configured),
    (
        nothing,
        "/var/lib/pacemaker/cib/cib.xml",
        "<nvpair name=\"device\" value=\"/dev/nvme1n1p1\"/>\n",
        Check::Configured,
    ),
    (
        nothing,
        "/etc/docker/daemon.json",
        "{\"storage-opts\": [\"dm.directlvm_device=/dev/nvme1n1\"]}",
        Check::Configured,
    ),
    // Hibernation by a program, systems without systemd, commands of root's.
    (swap, "/etc/uswsusp.conf", "resume device = /dev/nvme1n1p1\n", Check::Swap),
    (swap, "/etc/suspend.conf", "resume device = UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f\n", Check::Swap),
    (
        luks,
        "/etc/conf.d/dmcrypt",
        "target=d\nsource=UUID=\"6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f\"\n",
        Check::Configured,
    ),
    (nothing, "/etc/conf.d/dmcrypt", "swap=a\nsource='/dev/nvme1n1p1'\n", Check::Configured),
    (nothing, "/etc/vdoconf.yml", "    device: /dev/nvme1n1p1\n", Check::Configured),
    (ext4, "/etc/rc.local", "#!/bin/sh\nmount LABEL='my disk' /srv\n", Check::Configured),
    (nothing, "/etc/rc.d/rc.local", "nt device bind nvme0n1; mount \\\n  /dev/nvme1n1 /srv\n", Check::Configured),
    (nothing, "/etc/local.d/a.start", "swapon /dev/nvme1n1p1 && nt run m\n", Check::Configured),
    (nothing, "/etc/crontab", "5 4 * * * root dd if=/dev/sda of=/dev/nvme1n1\n", Check::Configured),
    (nothing, "/etc/cron.d/trim", "@daily root blkdiscard /dev/mine\n", Check::Configured),
    (
        ext4,
        "/var/spool/cron/crontabs/root",
        "@reboot mount UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f\n",
        Check::Configured,
    ),
    // A folder, a label, a user of nt's name does not make a command nt's.
    (nothing, "/etc/crontab", "@reboot root mount /dev/nvme1n1p1 /mnt/nt\n", Check::Configured),
    (nothing, "/etc/cron.d/a", "@daily nt dd if=/dev/zero of=/dev/nvme1n1p1\n", Check::Configured),
    (nothing, "/etc/rc.local", "mkfs.ext4 -L nt /dev/nvme1n1p1\n", Check::Configured),
    (nothing, "/etc/rc.local", "cp /opt/nt /x && cp device /dev/nvme1n1p1\n", Check::Configured),
    (ext4, "/etc/local.d/a.start", "mount LABEL='my disk' /srv/nt\n", Check::Configured),
    // A comment ends with its line, and a line of cron goes on nowhere.
    (nothing, "/etc/cron.daily/backup", "# backup: \\\nmount /dev/nvme1n1p1 /x\n", Check::Configured),
    (nothing, "/etc/cron.daily/backup", "nt list \\\n# x\nmount /dev/nvme1n1p1 /x\n", Check::Configured),
    (
        nothing,
        "/etc/cron.d/a",
        "0 0 * * * root nt list \\\n0 1 * * * root mount /dev/nvme1n1p1 /x\n",
        Check::Configured,
    ),
    (nothing, "/etc/cron.d/a", "0 0 * * * root sh % nt list % mount /dev/nvme1n1p1 /x\n", Check::Configured),
    (nothing, "/etc/udev/rules.d/9.rules", "# x \\\nKERNEL==\"nvme1n1\", RUN+=\"/bin/x\"\n", Check::Configured),
    (
        nothing,
        "/etc/systemd/system/a.service",
        "[Service]\n; x \\\nExecStart=/bin/mount /dev/nvme1n1p1 /x\n",
        Check::Configured,
    ),
    // A command of nt's whose output goes to the drive, or which has another within it.
    (nothing, "/etc/cron.daily/a", "nt list >/dev/nvme1n1\n", Check::Configured),
    (nothing, "/etc/cron.daily/a", "nt list 2>/dev/null > /dev/nvme1n1 --json\n", Check::Configured),
    (nothing, "/etc/cron.daily/a", "nt run $(mount /dev/nvme1n1p1 /m | cat)\n", Check::Configured),
    (nothing, "/etc/cron.daily/a", "nt run `mount /dev/nvme1n1p1 /m`\n", Check::Configured),
    (nothing, "/etc/rc.local", "mkfs.ext4 -L nt -d run /dev/nvme1n1p1\n", Check::Configured),
    (
        nothing,
        "/etc/systemd/system/a.service",
        "[Service]\nExecStart=/usr/bin/nt list ; /bin/mount /dev/nvme1n1p1 /x\n",
        Check::Configured,
    ),
    // Options in place of a tag, other drivers, images of services.
    (ext4, "/etc/cron.daily/a", "mount -U 6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f /x\n", Check::Configured),
    (ext4, "/etc/rc.local", "mount --uuid 6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f /x\n", Check::Configured),
    (
        ext4,
        "/etc/rc.local",
        "mount -L 'my disk' /x || mount --label=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f\n",
        Check::Configured,
    ),
    (nothing, "/etc/cron.d/a", "@reboot root qemu -device vfio-pci,host=02:00.0\n", Check::Configured),
    (nothing, "/etc/rc.local", "echo 0000:02:00.0 > /sys/bus/pci/drivers/nvme/unbind\n", Check::Configured),
    (nothing, "/etc/systemd/system/a.service", "[Service]\nRootImage=/dev/nvme1n1p1\n", Check::Configured),
    // Rules that jump over what they do not mean, that give the drive to a group, to all, or run a program to ask.
    (
        nothing,
        "/etc/udev/rules.d/9.rules",
        "KERNEL!=\"nvme1n1\", GOTO=\"end\"\nRUN+=\"/bin/x\"\nLABEL=\"end\"\n",
        Check::Configured,
    ),
    (nothing, "/etc/udev/rules.d/9.rules", "KERNEL==\"nvme1n1\", OWNER=\"grid\", GROUP=\"root\"\n", Check::Configured),
    (nothing, "/etc/udev/rules.d/9.rules", "KERNEL==\"nvme1n1\", GROUP := \"dba\", MODE=\"0660\"\n", Check::Configured),
    (nothing, "/etc/udev/rules.d/9.rules", "KERNEL==\"nvme1n1\", MODE=\"0666\"\n", Check::Configured),
    (nothing, "/etc/udev/rules.d/9.rules", "KERNEL==\"nvme1n1\", PROGRAM=\"/bin/x %k\"\n", Check::Configured),
    (nothing, "/etc/cron.daily/backup", "#!/bin/sh\nmount /dev/nvme1n1p1 /backup\n", Check::Configured),
    (ext4, "/etc/cron.weekly/b", "mount UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f /b\n", Check::Configured),
    (
        ext4,
        "/etc/timeshift/timeshift.json",
        "{\"backup_device_uuid\" : \"6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f\"}",
        Check::Configured,
    ),
    (ext4, "/etc/rear/local.conf", "OUTPUT_URL=usb:///dev/disk/by-label/my\\x20disk\n", Check::Configured),
    // Other tables of systemd and of modules, other guests, other loaders.
    (nothing, "/etc/veritytab", "usr /dev/nvme1n1p1 /dev/sda2 00ff\n", Check::Configured),
    (nothing, "/etc/veritytab", "usr /dev/sda1 PARTLABEL=\"nt models\" 00ff\n", Check::Configured),
    (luks, "/etc/integritytab", "a UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f -\n", Check::Configured),
    (nothing, "/etc/modprobe.d/a.conf", "options block2mtd block2mtd=/dev/nvme1n1,65536\n", Check::Configured),
    (nothing, "/run/modprobe.d/a.conf", "options g_mass_storage file=/dev/nvme1n1 removable=1\n", Check::Configured),
    (nothing, "/etc/libvirt/libxl/vm.xml", "<source dev='/dev/nvme1n1'/>", Check::Configured),
    (nothing, "/etc/libvirt/lxc/box.xml", "<source><block>/dev/nvme1n1p1</block></source>", Check::Configured),
    (nothing, "/run/libvirt/ch/vm.xml", "<source dev='/dev/mine'/>", Check::Configured),
    (nothing, "/etc/xen/auto/a", "disk = [ 'phy:/dev/nvme1n1,xvda,w' ]\n", Check::Configured),
    (nothing, "/etc/cluster/cluster.conf", "<quorumd device=\"/dev/nvme1n1p1\"/>\n", Check::Configured),
    (ext4, "/boot/limine.conf", "    cmdline: root=UUID=6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f rw\n", Check::Boot),
    (
        ext4,
        "/efi/EFI/limine/limine.cfg",
        "path: fslabel(my disk):/x\npath: uuid(6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f):/x\n",
        Check::Boot,
    ),
    (ext4, "/boot/efi/EFI/refind/refind.conf", "volume 6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f\n", Check::Boot),
    (nothing, "/proc/cmdline", "root=/dev/sda1 dm-mod.create=\"v,,,ro,0 8 linear /dev/nvme1n1p1 0\"\n", Check::Boot),
    // Rules of udev that mount, start a unit, or give a drive to a database.
    (
        nothing,
        "/etc/udev/rules.d/99-backup.rules",
        "ACTION==\"add\", KERNEL==\"nvme1n1p1\", RUN+=\"/usr/local/bin/backup\"\n",
        Check::Configured,
    ),
    (
        ext4,
        "/etc/udev/rules.d/9.rules",
        "ENV{ID_FS_UUID}==\"6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f\", \\\n  RUN{program} += \"/bin/x\"\n",
        Check::Configured,
    ),
    (
        nothing,
        "/run/udev/rules.d/9.rules",
        "ATTRS{wwid}==\"eui.0025385b91d0e2f1\", ENV{SYSTEMD_WANTS}+=\"a.service\"\n",
        Check::Configured,
    ),
    (
        nothing,
        "/etc/udev/rules.d/asm.rules",
        "KERNEL==\"nvme1n1p1\", SYMLINK+=\"asm1\", OWNER=\"grid\", MODE=\"0660\"\n",
        Check::Configured,
    ),
    // Mounts on demand.
    (nothing, "/etc/auto.misc", "data -fstype=ext4 :/dev/nvme1n1p1\n", Check::Configured),
    (
        ext4,
        "/etc/auto.master.d/a.autofs",
        "/x file /dev/disk/by-uuid/6f1d2c3b-4a59-4867-96a5-b4c3d2e1f00f\n",
        Check::Configured,
    ),
];
const UNIT_NODE: &str = "[Mount]\nWhat=/dev/nvme1n1p1\n";

/// A drive that is named in any table, in any of its words, is refused for that table.
#[test]
fn tables_are_searched_for_what_the_drive_says_itself() {
    let mut missed = Vec::new();
    for (holds, path, text, check) in NAMED {
        let fake = named_fake();
        holds(&fake);
        fake.put(path, text);
        let reasons = fake.reasons(&accepting());
        if !reasons.iter().any(|r| r.check == *check && r.path.as_os_str() == *path) {
            missed.push(format!("{path}: {text:?}: {check:?} was expected, {reasons:?} was found"));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

/// Nodes of other names, an EUI of its own, a partition with a name.
fn named_fake() -> Fake {
    let fake = clean();
    fake.put("/sys/class/block/nvme1n1/eui", "00 25 38 5b 91 d0 e2 f1\n");
    fake.put("/dev/mine", "b 259:11");
    fake.link("/root/link to it", "/dev/nvme1n1p1");
    fake
}

/// A list that accepts whatever the drive holds.
fn accepting() -> Result<Allowlist, String> {
    let mut list = list().unwrap();
    let kinds = [
        "ext4",
        "xfs",
        "btrfs",
        "f2fs",
        "fat",
        "exfat",
        "ntfs",
        "swap",
        "luks",
        "lvm",
        "md",
        "zfs",
        "bcache",
        "unknown data",
    ];
    list.drive[0].holds.extend(kinds.map(String::from));
    Ok(list)
}

/// The number of a pool stands in its cache as eight bytes.
#[test]
fn a_pool_is_found_by_its_number() {
    let fake = named_fake();
    zfs(&fake);
    fs::create_dir_all(fake.dir.path().join("etc/zfs")).unwrap();
    let mut cache = vec![0, 0, 0, 8];
    cache.extend(1_234_567_890_123_456_789_u64.to_be_bytes());
    fs::write(fake.dir.path().join("etc/zfs/zpool.cache"), cache).unwrap();
    let reasons = fake.reasons(&accepting());
    assert_eq!(reasons.iter().map(|r| r.check).collect::<Vec<_>>(), [Check::Configured]);
}

/// Two drives may carry one UUID, of which a link leads to one: the other is refused as well.
#[test]
fn a_clone_is_refused_whichever_drive_a_link_leads_to() {
    let fake = named_fake();
    ext4(&fake);
    fake.link(&format!("/dev/disk/by-uuid/{UUID}"), "../../nvme0n1p1");
    fake.put("/etc/fstab", &format!("UUID={UUID} /data ext4 0 0\n"));
    assert!(fake.reasons(&accepting()).iter().any(|r| r.check == Check::Configured));
}

/// Comments, other drives' words, and words that only look alike are no reason.
#[test]
fn what_names_other_drives_is_no_reason() {
    let fake = named_fake();
    ext4(&fake);
    fake.link("/dev/other", "/dev/nvme0n1p1");
    let fstab = format!(
        "# UUID={UUID} /old ext4\n  # LABEL=my\\040disk /old ext4\nUUID=aaaaaaaa-4a59-4867-96a5-b4c3d2e1f00f / ext4\n\
         LABEL=my /a ext4\nLABEL=disk /b ext4\n/dev/other /c ext4 rw,errors=remount-ro\n/dev/nvme1n10 /d ext4\n\
         server:/export/nvme1n1/x /e nfs\nPARTLABEL=nt /f ext4\n/dev/disk/by-id/nvme-Model_X_EXP2 /g ext4\n\
         /dev/disk/by-path/pci-0000:03:00.0-nvme-1 /h ext4\ntmpfs /tmp tmpfs size=259m 0 0\n"
    );
    fake.put("/etc/fstab", &fstab);
    fake.put("/etc/crypttab", &format!("# data UUID={UUID} none\n"));
    fake.put("/etc/systemd/system/a.mount", "[Mount]\n# What=/dev/nvme1n1\nWhat=tmpfs\nOptions=size=50%%\n");
    fake.put("/etc/systemd/system/nt.service", "[Service]\nExecStart=/usr/bin/nt device bind /dev/nvme1n1\n");
    fake.put("/etc/rc.local", "# mount /dev/nvme1n1 /x\nsudo /usr/local/bin/nt device bind /dev/nvme1n1\n");
    fake.put("/etc/cron.d/nt", "@reboot root /opt/nt/scripts/bind-vfio.sh /dev/nvme1n1 && mount /dev/nvme0n1p1 /y\n");
    // Nobody but root can use a drive by what is in his.
    fake.put("/var/spool/cron/crontabs/user", "@reboot mount /dev/nvme1n1 /x\n");
    fake.put("/etc/cron.daily/nt", "#!/bin/sh\nsudo nt -v verify m --tier-c /dev/nvme1n1\nnt stage m --tier-c /dev/nvme1n1 --erase --serial EXP\n/opt/nt/nt run m --tier-c=/dev/nvme1n1\n");
    // Rules that only name it, or lead nowhere.
    let rules = "KERNEL==\"nvme1n1\", ATTR{queue/scheduler}=\"none\"\nKERNEL==\"nvme1n1\", OWNER=\"root\", SYMLINK+=\"spare\"\n\
         # KERNEL==\"nvme1n1\", RUN+=\"/bin/x\"\nKERNEL==\"nvme0n1\", RUN+=\"/bin/x\"\n";
    fake.put("/etc/udev/rules.d/60.rules", rules);
    fake.put("/etc/modprobe.d/vfio.conf", "options vfio-pci ids=144d:a808\nblacklist nvme1n1x\n");
    fake.put("/etc/conf.d/localmount", "no_umounts=\"/x\"\n");
    fake.link("/etc/systemd/system/tmp.mount", "/dev/null");
    fake.put("/proc/cmdline", "root=/dev/nvme0n1p1 quiet nvme_core.default_ps_max_latency_us=0 my disk\n");
    let guest = "<address type='pci' domain='0x0000' bus='0x02' slot='0x00' function='0x0'/>";
    fake.put("/etc/libvirt/qemu/vm.xml", guest);
    fake.put("/boot/grub/grub.cfg", "search --label --set=root other\nset gfxmode=auto\n");
    assert_eq!(fake.reasons(&accepting()), vec![]);
}

/// Tables as Debian, Ubuntu and Fedora write them, with what snap, flatpak, Docker and tools for saving power put there, and
/// commands of nt's as somebody would write them.
#[test]
fn tables_of_ordinary_systems_are_no_reason() {
    let fake = named_fake();
    ext4(&fake);
    for (path, text) in [
        (
            "/etc/fstab",
            "# <file system> <mount point> <type> <options> <dump> <pass>\n# / was on /dev/nvme0n1p2 during installation\n\
             UUID=1b0e4d6c-5a3f-49f3-8a8f-1f1c0b3c6d11 / ext4 errors=remount-ro 0 1\nUUID=7A3C-19F2 /boot/efi vfat umask=0077 0 1\n\
             /swap.img none swap sw 0 0\n/dev/mapper/vg-home /home xfs defaults,x-systemd.device-timeout=0 0 0\n\
             UUID=2c0e4d6c-5a3f-49f3-8a8f-1f1c0b3c6d12 /home btrfs subvol=home,compress=zstd:1 0 0\n/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0\n",
        ),
        (
            "/etc/crontab",
            "SHELL=/bin/sh\nPATH=/usr/local/sbin:/usr/bin\n# m h dom mon dow user command\n17 *\t* * *\troot\tcd / && run-parts --report /etc/cron.hourly\n\
             25 6\t* * *\troot\ttest -x /usr/sbin/anacron || { cd / && run-parts --report /etc/cron.daily; }\n",
        ),
        ("/etc/anacrontab", "RANDOM_DELAY=45\n1\t5\tcron.daily\tnice run-parts /etc/cron.daily\n"),
        (
            "/etc/cron.d/e2scrub_all",
            "30 3 * * 0 root test -e /run/systemd/system || SERVICE_MODE=1 /usr/lib/x86_64-linux-gnu/e2fsprogs/e2scrub_all_cron\n",
        ),
        (
            "/etc/cron.daily/man-db",
            "#!/bin/sh\nset -e\nif [ -d /run/systemd/system ]; then\n  exit 0\nfi\nfind /var/cache/man -type f -name '*.gz' -atime +6 -print0 2>/dev/null | \\\n  xargs -r0 rm -f >/dev/null 2>&1\n",
        ),
        ("/etc/cron.weekly/fstrim", "#!/bin/sh\n/sbin/fstrim --fstab --verbose --quiet-unsupported || true\n"),
        ("/etc/cron.hourly/clock", "echo 02:00 \"$(date +%H:%M)\" >>/var/log/x\n"),
        (
            "/etc/rc.local",
            "#!/bin/sh -e\necho auto > /sys/bus/pci/devices/0000:02:00.0/power/control\necho none > /sys/block/nvme1n1/queue/scheduler\nexit 0\n",
        ),
        (
            "/etc/udev/rules.d/70-snap.firefox.rules",
            "# This file is automatically generated.\nKERNEL==\"fuse\", TAG+=\"snap_firefox_firefox\"\nSUBSYSTEM==\"block\", KERNEL==\"nvme[0-9]*\", TAG+=\"snap_x_x\"\n\
             TAG==\"snap_firefox_firefox\", SUBSYSTEM!=\"module\", RUN+=\"/usr/lib/snapd/snap-device-helper $env{ACTION} snap_firefox_firefox $devpath $major:$minor\"\n",
        ),
        (
            "/etc/udev/rules.d/60-scheduler.rules",
            "ACTION==\"add|change\", KERNEL==\"nvme1n1\", ATTR{queue/scheduler}=\"none\", GROUP=\"disk\", MODE=\"0660\"\n\
             ACTION!=\"add\", GOTO=\"end\"\nKERNEL==\"sda\", RUN+=\"/sbin/hdparm -B 254 /dev/%k\"\nLABEL=\"end\"\n",
        ),
        (
            "/etc/modprobe.d/blacklist.conf",
            "blacklist evbug\nalias net-pf-10 off\noptions nvme_core default_ps_max_latency_us=0\n",
        ),
        ("/etc/docker/daemon.json", "{\"data-root\": \"/var/lib/docker\", \"storage-driver\": \"overlay2\"}"),
        (
            "/etc/timeshift/timeshift.json",
            "{\"backup_device_uuid\" : \"\", \"parent_device_uuid\" : \"\", \"btrfs_mode\" : \"false\"}",
        ),
        (
            "/etc/systemd/system/snap-core22-1122.mount",
            "[Unit]\nDescription=Mount unit for core22\n[Mount]\nWhat=/var/lib/snapd/snaps/core22_1122.snap\nWhere=/snap/core22/1122\nType=squashfs\nOptions=nodev,ro,x-gdu.hide\n",
        ),
        (
            "/usr/lib/systemd/system/docker.service",
            "[Service]\nExecStart=/usr/bin/dockerd -H fd:// --containerd=/run/containerd/containerd.sock\nExecReload=/bin/kill -s HUP $MAINPID\n",
        ),
        (
            "/etc/systemd/system/nt-bind.service",
            "[Service]\nExecStart=/opt/nt/scripts/bind-vfio.sh /dev/nvme1n1\nExecStop=-/usr/bin/nt device release /dev/nvme1n1\n",
        ),
        (
            "/etc/cron.d/nt",
            "@reboot root nt device bind /dev/nvme1n1 >/var/log/nt 2>&1 && echo nvme1n1 is bound\n0 3 * * 0 root nt -q verify \"$(cat /etc/m)\" --tier-c /dev/nvme1n1 2>/dev/null\n",
        ),
        (
            "/etc/cron.daily/nt",
            "#!/bin/sh\n# daily \\\n\nnt -v run m \\\n  --tier-c /dev/nvme1n1 \\\n  --prompt x >/dev/null\n",
        ),
    ] {
        fake.put(path, text);
        assert_eq!(fake.reasons(&accepting()), vec![], "{path}");
    }
}

/// A table in one line, with any number of keys: as many copies of its rest as it has keys would be more than there is memory.
#[test]
fn a_long_line_takes_no_more_memory_than_a_table() {
    let fake = named_fake();
    let keys = "a=".repeat(200_000);
    fake.put("/etc/target/saveconfig.json", &format!("{keys}/dev/nvme0n1,{keys}b"));
    assert_eq!(fake.reasons(&accepting()), vec![]);
    for named in ["b=/dev/nvme1n1p1", "x:/dev/nvme1n1,y", "PARTLABEL=nt models"] {
        fake.put("/etc/target/saveconfig.json", &format!("{keys},\"{named}\",{keys}"));
        let reasons = fake.reasons(&accepting());
        assert!(reasons.iter().any(|r| r.check == Check::Exported), "{named}: {reasons:?}");
    }
}

/// What is no regular file is not read as a table: a FIFO would make every command wait.
#[test]
fn a_table_that_is_a_fifo_refuses_and_does_not_hang() {
    let fake = clean();
    fake.folder("/etc");
    let path = fake.dir.path().join("etc/fstab");
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    assert!(fake.reasons(&list()).iter().any(|r| r.check == Check::Unreadable && r.path.ends_with("fstab")));
}

/// Whoever could write to a drive, as members of the group can while it is bound, could fill it with superblocks: telling
/// each from all others took hours, and their labels more memory than there is.
#[test]
fn more_identifiers_than_tables_are_searched_for_refuse() {
    let mut head = vec![0u8; 4 << 20];
    for (i, block) in head.chunks_mut(512).enumerate() {
        block[..8].copy_from_slice(&[0xfc, 0x4e, 0x2b, 0xa9, 1, 0, 0, 0]);
        block[16..20].copy_from_slice(&(i as u32 + 1).to_le_bytes());
        block[32..36].copy_from_slice(b"md: ");
    }
    let said = superblocks::said(&head, &head, &mut |_, _| Vec::new());
    assert_eq!(said.len(), 8192 + 2);
    let fake = clean();
    fake.stamp("/dev/nvme1n1", 0, &head[..2 << 20]);
    let reasons = fake.reasons(&list());
    assert!(reasons.iter().any(|r| r.check == Check::Unreadable && r.what.contains("more than 4096")), "{reasons:?}");
    // A record of NTFS whose attributes are names, each of which goes on to the end.
    let mut head = vec![0u8; 1 << 20];
    head[3..11].copy_from_slice(b"NTFS    ");
    head[11..14].copy_from_slice(&[0, 2, 1]);
    head[64] = 128;
    let mut record = vec![1u8; 64 << 10];
    record[..4].copy_from_slice(b"FILE");
    record[20..22].copy_from_slice(&[24, 0]);
    for at in record[24..].chunks_mut(24) {
        at[..8].copy_from_slice(&[0x60, 0, 0, 0, 24, 0, 0, 0]);
        at.get_mut(16..22).into_iter().for_each(|to| to.copy_from_slice(&[0, 0xff, 0, 0, 0, 0]));
    }
    let said = superblocks::said(&head, &[], &mut |_, _| record.clone());
    assert!(said.iter().map(|s| s.text.len()).sum::<usize>() < 8 << 20, "{} labels", said.len());
}
