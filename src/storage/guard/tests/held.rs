//! Holders whose node has another name, or none any more, and holders that cannot be seen. Each row was
//! bound, or is a sibling of one that was, while a holder was known by the name of its node.

use super::*;

/// What a row does to a clean machine, and the reason it must give.
type Row = (&'static str, Check, fn(&Fake));

/// A thread's folder of process 77.
fn thread(f: &Fake, tid: u32) -> String {
    f.link("/proc/77/task/77/fd/0", "/dev/null");
    f.put("/proc/77/task/77/mountinfo", "21 1 259:1 / / rw - ext4 x rw\n");
    let folder = format!("/proc/77/task/{tid}");
    f.put(&format!("{folder}/mountinfo"), "21 1 259:1 / / rw - ext4 x rw\n");
    folder
}

/// Sockets of a machine at rest: one that listens, one that is connected, one that is not.
const UNIX: &str = "Num       RefCount Protocol Flags    Type St Inode Path\n\
    0000000000000000: 00000002 00000000 00010000 0001 01 17842 /run/x\n\
    0000000000000000: 00000003 00000000 00000000 0001 03 22002\n\
    0000000000000000: 00000002 00000000 00000000 0002 01 20202 @02 0\n";

const HELD: &[Row] = &[
    ("open through a node of another name", Check::Open, |f| {
        f.put("/tmp/other", "b 259:11");
        f.link("/proc/77/fd/3", "/tmp/other");
    }),
    ("open through a node of another folder that was deleted", Check::Open, |f| {
        // The kernel follows the link of a deleted file too.
        f.put("/proc/77/fd/3", "b 259:10");
    }),
    ("node for commands of another name", Check::Open, |f| {
        f.put("/tmp/generic", "c 240:1");
        f.link("/proc/77/fd/3", "/tmp/generic");
    }),
    ("node of the controller of another name", Check::Open, |f| {
        f.put("/srv/jail/dev/ctl", "c 241:1");
        f.link("/proc/77/fd/3", "/srv/jail/dev/ctl");
    }),
    ("descriptor of a second thread", Check::Open, |f| f.link(&format!("{}/fd/5", thread(f, 78)), "/dev/nvme1n1")),
    ("descriptor of a thread whose first one ended", Check::Open, |f| {
        f.put("/tmp/other", "b 259:11");
        f.link(&format!("{}/fd/5", thread(f, 79)), "/tmp/other");
        fs::remove_dir_all(f.dir.path().join("proc/77/task/77/fd")).unwrap();
    }),
    ("mapping whose descriptor is closed", Check::Open, |f| {
        f.put("/proc/77/map_files/7f0000000000-7f0000001000", "b 259:11");
    }),
    ("mapping of a process whose first thread ended", Check::Open, |f| {
        thread(f, 78);
        f.folder("/proc/77/map_files");
        f.put("/proc/78/map_files/7f0000000000-7f0000001000", "b 259:11");
        fs::rename(f.dir.path().join("proc/78"), f.dir.path().join("proc/78x")).unwrap();
        f.link("/proc/78", "78x");
    }),
    ("descriptors in a connection that nobody accepted", Check::Unreadable, |f| {
        f.put("/proc/sys/kernel/osrelease", "6.1.0-56-amd64\n");
        f.put(
            "/proc/77/net/unix",
            &format!("{UNIX}0000000000000000: 00000003 00000000 00000000 0001 02     0 /run/x\n"),
        );
    }),
    ("and in the network of a thread alone", Check::Unreadable, |f| {
        let folder = thread(f, 78);
        f.put("/proc/77/task/77/net/unix", UNIX);
        f.link("/proc/77/task/77/ns/net", "net:[1]");
        f.put(&format!("{folder}/net/unix"), &format!("{UNIX}0: 00000003 00000000 00000000 0005 02 0\n"));
        f.link(&format!("{folder}/ns/net"), "net:[2]");
    }),
    ("io_uring with a node of another name", Check::Open, |f| {
        f.put("/tmp/other", "b 259:11");
        f.link("/proc/77/fd/9", "anon_inode:[io_uring]");
        f.put("/proc/77/fdinfo/9", "SqMask:\t0x7\nUserFiles:\t1\n    0: /tmp/other\nUserBufs:\t0\n");
    }),
    ("io_uring of an older kernel, which tells a short name", Check::Open, |f| {
        f.link("/proc/77/fd/9", "anon_inode:[io_uring]");
        f.put("/proc/77/fdinfo/9", "SqMask:\t0x7\nUserFiles:\t1\n    0: nvme1n1p1\nUserBufs:\t0\n");
    }),
    ("io_uring with a file that cannot be told", Check::Unreadable, |f| {
        f.link("/proc/77/fd/9", "anon_inode:[io_uring]");
        f.put("/proc/77/fdinfo/9", "SqMask:\t0x7\nUserFiles:\t1\n    0: other\nUserBufs:\t0\n");
    }),
    ("io_uring with a node that is called like a protocol", Check::Unreadable, |f| f.ring(&["DISK"])),
    ("io_uring with a node that is called like a socket", Check::Unreadable, |f| f.ring(&["TCP"])),
    ("io_uring with a node that is called like no file", Check::Unreadable, |f| f.ring(&["[x"])),
    ("io_uring with a node whose name is too long", Check::Unreadable, |f| f.ring(&[""])),
    ("io_uring with a node that is called like an open file, which is there, too", Check::Unreadable, |f| {
        f.link("/proc/77/fd/5", "/srv/data");
        f.ring(&["data", "data"]);
    }),
    ("io_uring with a path that leads elsewhere for us", Check::Open, |f| {
        f.put("/tmp/other", "b 259:11");
        f.folder("/proc/77/root/tmp");
        f.put("/proc/77/root/tmp/other", "b 8:0");
        f.ring(&["/tmp/other"]);
    }),
    ("io_uring that is in use, so that its files are left out", Check::Unreadable, |f| {
        f.ring(&[]);
        f.put("/proc/77/fdinfo/9", "SqMask:\t0x7\nUserFiles:\t1\nUserBufs:\t0\n");
    }),
    ("io_uring that is in use, of a kernel that leaves out everything then", Check::Unreadable, |f| {
        f.ring(&[]);
        f.put("/proc/sys/kernel/osrelease", "6.18.44-1\n");
        f.put("/proc/77/fdinfo/9", "pos:\t0\nflags:\t02\n");
    }),
    ("io_uring with a name of several lines", Check::Unreadable, |f| f.ring(&["<none>\nx", "DISK"])),
    ("io_uring that is only mapped", Check::Unreadable, |f| {
        f.link("/proc/77/map_files/1000-2000", "anon_inode:[io_uring]");
    }),
    ("second io_uring that is only mapped", Check::Unreadable, |f| {
        f.ring(&[]);
        f.link("/proc/77/map_files/1000-2000", "anon_inode:[io_uring]");
        let map = |at: &str| format!("{at} rw-s 00000000 00:0f 1057    anon_inode:[io_uring]\n");
        f.put("/proc/77/maps", &format!("{}{}", map("1000-2000"), map("3000-4000")));
    }),
    ("descriptor under way in a socket", Check::Unreadable, |f| {
        f.link("/proc/77/fd/4", "socket:[4711]");
        f.put("/proc/77/fdinfo/4", "pos:\t0\nflags:\t02\nscm_fds: 1\n");
    }),
    ("loop over a node of another name", Check::Stacked, |f| {
        f.put("/tmp/other", "b 259:11");
        f.put("/sys/block/loop3/loop/backing_file", "/tmp/other\n");
    }),
    ("loop over a node that was deleted", Check::Stacked, |f| {
        f.put("/sys/block/loop3/loop/backing_file", "/tmp/other (deleted)\n");
        f.put("/dev/loop3", "loop 259:11 0:5");
    }),
    ("loop over a file of the drive in another mount namespace", Check::Stacked, |f| {
        f.put("/sys/block/loop3/loop/backing_file", "/inside/disk.img\n");
        f.put("/dev/loop3", "loop 0:0 259:11");
    }),
    ("loop whose node is gone", Check::Unreadable, |f| {
        f.put("/sys/block/loop5/loop/backing_file", "/tmp/other (deleted)\n");
    }),
    ("loop over what is gone, with the node of another device", Check::Unreadable, |f| {
        f.put("/sys/block/loop5/loop/backing_file", "/tmp/other (deleted)\n");
        f.put("/dev/loop5", "b 7:6");
    }),
    ("loop that cannot be asked, before another", Check::Stacked, |f| {
        f.put("/sys/block/loop5/loop/backing_file", "/tmp/other\n");
        f.put("/sys/block/loop6/loop/backing_file", "/tmp/other (deleted)\n");
        f.put("/dev/loop6", "loop 259:11 0:5");
    }),
    ("nvmet export of a node of another name", Check::Exported, |f| {
        f.put("/tmp/other", "b 259:11");
        f.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/1/device_path", "/tmp/other");
    }),
    ("nvmet export whose node is gone", Check::Unreadable, |f| {
        f.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/1/device_path", "/tmp/other");
        f.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/1/enable", "1\n");
    }),
    ("nvmet export by a path from the root without a slash", Check::Exported, |f| {
        f.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/1/device_path", "dev/nvme1n1");
    }),
    ("nvmet export by a path from below /dev", Check::Exported, |f| {
        f.link("/dev/disk/by-id/nvme-X", "../../nvme1n1");
        f.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/1/device_path", "disk/by-id/nvme-X\n");
    }),
    ("nvmet export by a path from an unknown folder", Check::Unreadable, |f| {
        f.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/1/device_path", "../x");
        f.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/1/enable", "1\n");
    }),
    ("SCST export by a path from an unknown folder", Check::Unreadable, |f| {
        f.put("/sys/kernel/scst_tgt/devices/d/filename", "x/disk.img\n\n[key]\n");
    }),
    ("LIO file by a path from below /dev", Check::Exported, |f| f.fileio("nvme1n1")),
    ("LIO file by a path from an unknown folder", Check::Unreadable, |f| f.fileio("disk")),
    ("LIO file by a path with spaces", Check::Exported, |f| {
        f.put("/tmp/a Size: b", "b 259:11");
        f.fileio("/tmp/a Size: b");
    }),
    ("nvmet export whose node gave way to a file", Check::Unreadable, |f| {
        f.put("/tmp/other", "");
        f.nvmet("/tmp/other");
    }),
    ("nvmet export whose node gave way to another one", Check::Unreadable, |f| {
        f.put("/tmp/other", "b 8:0");
        f.changed("/tmp/other", 1001);
        f.nvmet("/tmp/other");
    }),
    ("nvmet export through a link that was made since", Check::Unreadable, |f| {
        f.put("/tmp/old", "b 8:0");
        f.changed("/tmp/old", 999);
        f.link("/tmp/other", "old");
        f.nvmet("/tmp/other");
    }),
    ("nvmet export through a link that leads to another drive now", Check::Unreadable, |f| {
        f.link("/tmp/other", "../dev/nvme0n1");
        f.nvmet("/tmp/other");
    }),
    ("nvmet export through a link below /dev that is not udev's", Check::Unreadable, |f| {
        f.link("/dev/disk/by-label/data", "../../nvme0n1");
        f.nvmet("/dev/disk/by-label/data");
    }),
    ("nvmet export through a link of udev's that is this drive's, too", Check::Unreadable, |f| {
        f.link("/dev/disk/by-label/data", "../../nvme0n1");
        f.put("/run/udev/data/b259:0", "S:disk/by-label/data\n");
        f.put("/run/udev/data/b259:11", "S:disk/by-label/data\n");
        f.nvmet("/dev/disk/by-label/data");
    }),
    ("LIO file through a link that leads to another drive now", Check::Unreadable, |f| {
        f.link("/tmp/other", "/dev/nvme0n1");
        f.fileio("/tmp/other");
    }),
    ("LIO file that is set up and handed on to nobody, whose node is gone", Check::Unreadable, |f| {
        let base = "/sys/kernel/config/target/core/fileio_0/disk";
        f.put(
            &format!("{base}/info"),
            "Status: DEACTIVATED  Max\n TCM FILEIO ID: 0        File: /tmp/other  Size: 9\n",
        );
        f.put(&format!("{base}/enable"), "1\n");
    }),
    ("LIO file whose node gave way to a file", Check::Unreadable, |f| {
        f.put("/tmp/other", "");
        f.fileio("/tmp/other");
    }),
    ("USB gadget whose node gave way to a file", Check::Unreadable, |f| {
        f.put("/tmp/other", "");
        f.put("/sys/kernel/config/usb_gadget/g1/functions/mass_storage.0/lun.0/file", "/tmp/other (deleted)\n");
    }),
    ("heartbeat of OCFS2", Check::Open, |f| {
        f.put("/sys/kernel/config/cluster/c1/heartbeat/0123456789ABCDEF/dev", "nvme1n1\n");
    }),
    ("heartbeat of OCFS2 on a partition", Check::Open, |f| {
        f.put("/sys/kernel/config/cluster/c1/heartbeat/0123456789ABCDEF/dev", "nvme1n1p1\n");
    }),
    ("nvmet passes the controller through", Check::Exported, |f| {
        f.put("/tmp/ctl", "c 241:1");
        f.put("/sys/kernel/config/nvmet/subsystems/s/passthru/device_path", "/tmp/ctl");
    }),
    ("LIO by number", Check::Exported, |f| {
        let info = "iBlock device: x  UDEV PATH: /gone readonly: 0\n        Major: 259 Minor: 11  CLAIMED: IBLOCK\n";
        f.put("/sys/kernel/config/target/core/iblock_0/disk/info", info);
    }),
    ("USB gadget", Check::Exported, |f| {
        f.put("/tmp/other", "b 259:10");
        f.put("/sys/kernel/config/usb_gadget/g1/functions/mass_storage.0/lun.0/file", "/tmp/other\n");
    }),
    ("USB gadget of a module", Check::Exported, |f| {
        f.put("/sys/module/g_mass_storage/parameters/file", "/dev/nvme1n1\n");
    }),
    ("LIO through a program", Check::Exported, |f| {
        f.put("/sys/kernel/config/target/core/user_0/disk/info", "Config: file//dev/nvme1n1 Size: 9\n");
    }),
    ("guest of Xen", Check::Exported, |f| {
        f.put("/sys/bus/xen-backend/devices/vbd-1-51712/physical_device", "103:b\n");
    }),
    ("swap through a node of another name", Check::Swap, |f| {
        f.put("/tmp/my swap", "b 259:11");
        f.put("/proc/swaps", "Filename Type\n/tmp/my\\040swap partition 1 0 -2\n");
    }),
    ("swap through a node that was deleted", Check::Unreadable, |f| {
        f.put("/proc/swaps", "Filename Type\n/tmp/other\\040(deleted) partition 1 0 -2\n");
    }),
    ("zram backed by a node of another name", Check::Swap, |f| {
        f.put("/tmp/other", "b 259:11");
        f.put("/sys/block/zram0/backing_dev", "/tmp/other\n");
    }),
    ("mounted in a thread's own namespace", Check::Mounted, |f| {
        f.put(&format!("{}/mountinfo", thread(f, 78)), "21 1 259:11 / /deep rw - ext4 /dev/x rw\n");
    }),
    ("log of another file system", Check::Mounted, |f| {
        f.mount("30 21 8:1 / /srv rw - xfs /dev/sda1 rw,logdev=/dev/nvme1n1p1,noquota");
    }),
    ("second device of a file system of several", Check::Mounted, |f| {
        f.put("/tmp/other", "b 259:11");
        f.mount("30 21 0:44 / /srv rw - bcachefs /dev/sda1:/tmp/other rw");
    }),
    ("mounted through FUSE, on the drive itself", Check::Mounted, |f| {
        f.mount("30 21 259:11 / /srv rw - fuseblk /dev/nvme1n1p1 rw,user_id=0");
    }),
    ("a file system of a kind that the kernel does not list", Check::Mounted, |f| {
        f.mount("30 21 0:44 / /srv rw - manyfs /dev/sda1:/dev/nvme1n1p1 rw");
    }),
    ("mounted where no namespace in use shows it", Check::Mounted, |f| f.folder("/sys/fs/ext4/nvme1n1p1")),
    ("member of a mounted bcachefs", Check::Stacked, |f| {
        f.link("/sys/fs/bcachefs/feed/dev-0/block", "../../../../class/block/nvme1n1p1");
    }),
];

const HIDDEN: &[Row] = &[
    ("a PID namespace of its own", Check::Unreadable, |f| f.link("/proc/self/ns/pid", "pid:[4026532999]")),
    ("a user namespace of its own", Check::Unreadable, |f| f.link("/proc/self/ns/user", "user:[4026532998]")),
    ("a time namespace of its own", Check::Unreadable, |f| f.link("/proc/self/ns/time", "time:[4026532997]")),
    ("namespaces that cannot be told", Check::Unreadable, |f| f.drop_file("/proc/self/ns/pid")),
    ("nvmet without configfs", Check::Unreadable, |f| f.folder("/sys/module/nvmet")),
    ("LIO without configfs", Check::Unreadable, |f| f.folder("/sys/module/target_core_mod")),
    ("USB gadgets without configfs", Check::Unreadable, |f| f.folder("/sys/module/usb_f_mass_storage")),
    ("OCFS2's heartbeat without configfs", Check::Unreadable, |f| f.folder("/sys/module/ocfs2_nodemanager")),
    ("a mount namespace of its own", Check::Unreadable, |f| {
        f.link("/proc/self/ns/mnt", "mnt:[4026532999]");
        f.link("/proc/1/ns/mnt", "mnt:[4026531841]");
    }),
    ("ZFS without its statistics", Check::Unreadable, |f| f.folder("/sys/module/zfs")),
    ("nvmet built in, without configfs", Check::Unreadable, |f| {
        f.put("/proc/sys/kernel/osrelease", "6.1.0-9\n");
        f.put("/lib/modules/6.1.0-9/modules.builtin", "kernel/fs/ext4/ext4.ko\nkernel/drivers/nvme/target/nvmet.ko\n");
    }),
    ("LIO built in, by the list in another place", Check::Unreadable, |f| {
        f.put("/proc/sys/kernel/osrelease", "6.1.0-9\n");
        f.put("/usr/lib/modules/6.1.0-9/modules.builtin", "kernel/drivers/target/target_core_mod.ko\n");
    }),
    ("configfs built in and not mounted, and no list of what else is", Check::Unreadable, |f| {
        f.put("/proc/filesystems", "nodev\tsysfs\nnodev\tconfigfs\n\text4\n");
        f.folder("/sys/kernel/config");
    }),
    ("processes hidden by hidepid", Check::Unreadable, |f| {
        fs::remove_dir_all(f.dir.path().join("proc/1")).unwrap();
    }),
    ("a proc that shows a part", Check::Unreadable, |f| {
        f.mount("22 21 0:20 / /proc rw,nosuid - proc proc rw,subset=pid")
    }),
    ("a table of swaps that is covered", Check::Unreadable, |f| {
        f.mount("40 22 0:50 / /proc/swaps rw - fuse.lxcfs lxcfs rw")
    }),
    ("a process that is covered", Check::Unreadable, |f| f.mount("40 22 0:50 / /proc/77 rw - tmpfs none rw")),
    ("a sysfs that is covered", Check::Unreadable, |f| f.mount("40 22 0:50 / /sys/block rw - tmpfs none rw")),
    ("a chroot", Check::Unreadable, |f| {
        f.folder("/srv/real");
        f.link("/proc/1/root", "/srv/real");
    }),
    ("a sysfs without block devices", Check::Unreadable, |f| {
        fs::remove_dir_all(f.dir.path().join("sys/block")).unwrap()
    }),
];

/// A holder by any name refuses; so does a view in which holders could hide.
#[test]
fn holders_are_known_by_number_and_blind_spots_refuse() {
    for (name, check, spoil) in HELD.iter().chain(HIDDEN) {
        let fake = clean();
        spoil(&fake);
        let reasons = fake.reasons(&list());
        assert!(reasons.iter().any(|r| r.check == *check), "{name}: {check:?} was expected, {reasons:?} was found");
    }
}

/// A loaded configfs is a module's: what else is built in cannot need it.
#[test]
fn configfs_that_was_loaded_hides_nothing_built_in() {
    let fake = clean();
    fake.put("/proc/filesystems", "nodev\tconfigfs\n");
    fake.put("/proc/modules", "configfs 57344 1 - Live 0x0\n");
    assert_eq!(fake.reasons(&list()), vec![]);
    fake.put("/proc/modules", "nvme 57344 1 - Live 0x0\n");
    assert!(fake.reasons(&list()).iter().all(|r| r.check == Check::Unreadable && r.what.contains("mount configfs")));
    fake.mount("31 21 0:40 / /sys/kernel/config rw - configfs configfs rw");
    assert_eq!(fake.reasons(&list()), vec![]);
}

/// A search that any user can make long is ended by a signal, and what it did not see is no permission.
#[test]
fn a_signal_ends_the_search_of_processes() {
    let fake = clean();
    let host = Host::at(fake.dir.path()).until(|| true);
    let all = sysfs::controllers(&host).unwrap();
    let reasons = examine(&host, &all, sysfs::find(&host, &all, "nvme1n1").unwrap(), &list(), Purpose::Read);
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert!(reasons.iter().all(|r| r.check == Check::Unreadable && r.what.contains("by a signal")), "{reasons:?}");
}

/// Sockets are looked at together, whoever has how many; each process is a reason once.
#[test]
fn sockets_with_descriptors_under_way_are_few_reasons() {
    let fake = clean();
    for fd in 10..20 {
        fake.link(&format!("/proc/77/fd/{fd}"), "socket:[4711]");
        fake.put(&format!("/proc/77/fdinfo/{fd}"), "scm_fds: 2\n");
    }
    assert_eq!(fake.reasons(&list()).len(), 1);
    for fd in 20..300 {
        fake.link(&format!("/proc/77/fd/{fd}"), "socket:[4711]");
        fake.put(&format!("/proc/77/fdinfo/{fd}"), "scm_fds: 2\n");
    }
    let reasons = fake.reasons(&list());
    assert!(reasons.iter().any(|r| r.what.contains("more than 256 sockets")), "{reasons:?}");
}

/// Empty places say nothing: of a kernel that leaves them out, and of rings that have none.
/// Where the kernel counts what waits with the socket that listens, connections are no reason; nor is a machine at rest.
#[test]
fn connections_that_wait_are_no_reason_where_the_kernel_counts_them() {
    let fake = clean();
    fake.put("/proc/77/net/unix", UNIX);
    assert_eq!(fake.reasons(&list()), vec![]);
    fake.put("/proc/77/net/unix", &format!("{UNIX}0: 00000003 00000000 00000000 0001 02 0\n"));
    assert_eq!(fake.reasons(&list()).iter().map(|r| r.check).collect::<Vec<_>>(), [Check::Unreadable]);
    for release in ["6.3.0", "6.12.9-arch1-1", "7.0.1"] {
        fake.put("/proc/sys/kernel/osrelease", release);
        assert_eq!(fake.reasons(&list()), vec![], "{release}");
    }
}

#[test]
fn an_io_uring_without_files_is_no_reason() {
    let fake = clean();
    fake.ring(&[]);
    assert_eq!(fake.reasons(&list()), vec![]);
    fake.put("/proc/sys/kernel/osrelease", "6.18.44-1\n");
    fake.put("/proc/77/fdinfo/9", "UserFiles:\t4096\nUserBufs:\t0\n");
    assert_eq!(fake.reasons(&list()), vec![]);
}

/// A drive was erased while a process had it open that forked every few milliseconds and ended: the list of processes was
/// read once, and the holder was always one that came after it.
#[test]
fn processes_that_come_after_the_list_are_looked_at() {
    let fake = clean();
    let host = Host::at(fake.dir.path());
    let mut seen = Vec::new();
    open::each_process(&host, |pid| {
        seen.push(pid.to_owned());
        if pid == "77" {
            fs::remove_dir_all(fake.dir.path().join("proc/77")).unwrap();
            fake.folder("/proc/780/fd");
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(seen, ["1", "77", "780"]);
    let mut next = 0;
    let list = || {
        next += 1;
        Ok(vec![next.to_string()])
    };
    let e = open::each_of("/proc", list, |_| Ok(())).unwrap_err();
    assert!(e.why.contains("begin faster"), "{e}");
}

/// `check` waited for ever at a FIFO in the place of a loop device's node.
#[test]
fn a_fifo_in_the_place_of_a_node_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("loop5");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let node = node::Node::Block(node::Number { major: 7, minor: 5 });
    let opened = Host::default().open_node(path.to_str().unwrap(), node, fs::OpenOptions::new().read(true));
    assert!(opened.unwrap_err().to_string().contains("7:5"));
    let fake = clean();
    fake.put("/sys/block/loop5/loop/backing_file", "/srv/x.img\n");
    nix::unistd::mkfifo(&fake.dir.path().join("dev/loop5"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(fake.reasons(&list()).iter().all(|r| r.check == Check::Unreadable));
    assert!(!fake.reasons(&list()).is_empty());
}

/// The users of another drive, by whatever name, are no reason.
#[test]
fn nodes_of_other_drives_are_no_reason() {
    let fake = clean();
    fake.put("/tmp/other", "b 259:1");
    fake.link("/proc/77/fd/3", "/tmp/other");
    // A node of the drive's name that is another device.
    fake.put("/srv/jail/dev/nvme1n1", "b 8:0");
    fake.link("/proc/77/fd/4", "/srv/jail/dev/nvme1n1");
    fake.put("/proc/77/map_files/1000-2000", "b 259:1");
    fake.put("/sys/block/loop3/loop/backing_file", "/tmp/other\n");
    fake.put("/dev/loop3", "loop 259:1 0:5");
    fake.put("/sys/block/loop4/loop/backing_file", "/var/lib/x (deleted)\n");
    fake.put("/dev/loop4", "loop 0:0 259:1");
    fake.put("/proc/swaps", "Filename Type\n/tmp/other partition 1 0 -2\n/swap.img file 1 0 -3\n");
    fake.link("/proc/77/fd/5", "socket:[4711]");
    fake.put("/proc/77/fdinfo/5", "scm_fds: 0\n");
    fake.link("/proc/77/fd/6", "anon_inode:[eventfd]");
    fake.link("/proc/77/fd/7", "pipe:[4712]");
    fake.link("/proc/77/fd/8", "/srv/gone (deleted)");
    let old = ["/tmp/other", "other", "TCP", "[eventfd]", "", "gone", "<none>", "<none>"];
    fake.ring(&[&old[..], &["socket:[4713]", "pipe:[4714]", "anon_inode:[eventpoll]"]].concat());
    // Older than the machine's start in second 1000, or the kernel's.
    for old in ["/tmp/other", "/srv/old.img"] {
        fake.put(old, "b 259:1");
        fake.changed(old, 999);
    }
    fake.nvmet("/tmp/other");
    fake.fileio("/tmp/other");
    fake.put("/sys/kernel/config/nvmet/subsystems/t/namespaces/1/device_path", "/dev/nvme0n1");
    fake.link("/dev/disk/by-id/nvme-Y", "../../nvme0n1");
    fake.put("/run/udev/data/b259:0", "S:disk/by-id/nvme-Y\n");
    fake.put("/sys/kernel/config/nvmet/subsystems/t/namespaces/2/device_path", "/dev/disk/by-id/nvme-Y");
    fake.put("/sys/kernel/config/nvmet/subsystems/t/namespaces/2/enable", "1");
    fake.link("/proc/77/map_files/7000-8000", "anon_inode:[io_uring]");
    fake.link("/proc/77/map_files/8000-9000", "anon_inode:[io_uring]");
    fake.put(
        "/proc/77/maps",
        "7000-8000 rw-s 00000000 00:0f 1057    anon_inode:[io_uring]\n8000-9000 rw-s 10000000 00:0f 1057    anon_inode:[io_uring]\n",
    );
    fake.put("/sys/kernel/config/nvmet/subsystems/t/namespaces/1/enable", "1");
    fake.put(
        "/sys/kernel/config/target/core/fileio_7/off/info",
        "Status: DEACTIVATED  Max\n TCM FILEIO ID: 7        File: x  Size: 9\n",
    );
    fake.put("/sys/kernel/config/target/core/rd_mcp_1/ram/info", "Status: ACTIVATED\n  PAGES/PAGE_SIZE: 4096*4096\n");
    fake.put("/sys/kernel/config/usb_gadget/g1/functions/mass_storage.0/lun.0/file", "/srv/old.img\n");
    fake.put("/sys/kernel/config/target/core/alua/lu_gps/x", "1");
    fake.put("/sys/kernel/config/cluster/c1/heartbeat/0123456789ABCDEF/dev", "nvme0n1\n");
    fake.put("/sys/kernel/config/cluster/c1/heartbeat/dead_threshold", "31\n");
    // Not set up, and switched off.
    fake.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/1/device_path", "(null)\n");
    fake.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/2/device_path", "dev/nvme0n1\n");
    fake.put("/sys/kernel/config/nvmet/subsystems/s/namespaces/2/enable", "0\n");
    // Other functions, and words that look like addresses.
    fake.put("/etc/pve/qemu-server/100.conf", "hostpci0: 0000:02:00.1\nhostpci1: 02:01\nnet0: 00:02:00.0:02:00\n");
    fake.put("/etc/cloud/cloud.cfg", "at: 02:00\non: 2026-11-26T00:02:00.0\n");
    fake.link("/proc/self/ns/mnt", "mnt:[4026531841]");
    fake.link("/proc/1/ns/mnt", "mnt:[4026531841]");
    fake.put("/sys/kernel/config/target/core/iblock_0/hba_info", "HBA Index: 1 plugin: iblock version: 5\n");
    fake.mount("30 21 0:50 / /proc/sys/fs/binfmt_misc rw - binfmt_misc none rw");
    // Words of whoever mounted what stands on no device, and of a container's lower folders.
    fake.mount("31 21 0:51 / /srv/a rw - tmpfs /dev/nvme1n1 rw");
    fake.mount("32 21 0:52 / /srv/b rw - overlay overlay rw,lowerdir=/dev/nvme1n1p1,upperdir=/u,workdir=/w");
    fake.mount("33 21 0:53 / /srv/c rw - fuse.sshfs /dev/nvme1n1 rw,user_id=1000");
    fake.mount("34 21 0:54 / /srv/d rw - nfs4 server:/dev/nvme1n1 rw,addr=10.0.0.1");
    // Modules of a kernel that is not the running one, and others that are built in.
    fake.put("/proc/sys/kernel/osrelease", "6.1.0-9\n");
    fake.put("/lib/modules/6.1.0-8/modules.builtin", "kernel/drivers/nvme/target/nvmet.ko\n");
    fake.put(
        "/lib/modules/6.1.0-9/modules.builtin",
        "kernel/drivers/nvme/target/nvmet-rdma.ko\nkernel/x/not_nvmet.ko\n",
    );
    assert_eq!(fake.reasons(&list()), vec![]);
}
