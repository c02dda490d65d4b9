//! Drives that might be taken for each other, the address that decides then, and the last claim.

use super::*;

const OTHER: &str = "0000:03:00.0";

/// A function of NVMe with this driver and nothing that the kernel shows of it.
fn function(f: &Fake, driver: Option<&str>) {
    f.put(&format!("/sys/bus/pci/devices/{OTHER}/class"), "0x010802\n");
    if let Some(driver) = driver {
        f.link(&format!("/sys/bus/pci/devices/{OTHER}/driver"), &format!("../../../bus/pci/drivers/{driver}"));
    }
}

fn record(f: &Fake, serial: &str, more: &str) {
    let text = format!(
        "pci = \"{OTHER}\"\nserial = \"{serial}\"\ncontroller = \"nvme2\"\nmodel = \"M\"\ngroup = \"16\"\n{more}namespace = []\n"
    );
    f.put(&format!("/run/nt/{OTHER}.toml"), &text);
}

type Spoil = fn(&Fake);

/// What there is of another drive, and whether it may be a twin of ours.
const TWINS: &[(&str, bool, Spoil)] = &[
    ("the kernel rejected it", true, |f| function(f, None)),
    ("the kernel's driver shows no controller of it", true, |f| function(f, Some("nvme"))),
    ("bound, and its record has the serial", true, |f| {
        function(f, Some("vfio-pci"));
        record(f, "EXP", "");
    }),
    ("half bound, without a driver, and its record has the serial", true, |f| {
        function(f, None);
        record(f, "EXP ", "state = \"unbound\"\n");
    }),
    ("a record that cannot be read", true, |f| {
        function(f, Some("vfio-pci"));
        f.put(&format!("/run/nt/{OTHER}.toml"), "pci = ");
    }),
    ("a record of another address in its place", true, |f| {
        function(f, None);
        record(f, "OTHER", "");
        let text = fs::read_to_string(f.dir.path().join(format!("run/nt/{OTHER}.toml"))).unwrap();
        f.put(&format!("/run/nt/{OTHER}.toml"), &text.replace(OTHER, BDF));
    }),
    ("no driver, and its record is of another boot", true, |f| {
        function(f, None);
        f.put("/proc/sys/kernel/random/boot_id", "now\n");
        record(f, "OTHER", "boot = \"then\"\n");
    }),
    ("no driver, and another device was in that slot when it was recorded", true, |f| {
        function(f, None);
        record(f, "OTHER", "instance = 1\n");
    }),
    ("a dead controller whose serial is empty", true, |f| {
        f.drive(OTHER, 2, "", 16);
        f.put(&format!("/sys/bus/pci/devices/{OTHER}/nvme/nvme2/serial"), "\n");
    }),
    ("a controller over a network", true, |f| f.put("/sys/class/nvme/nvme7/serial", "EXP\n")),
    ("held for a guest", false, |f| function(f, Some("vfio-pci"))),
    ("held by a driver of another program", false, |f| function(f, Some("uio_pci_generic"))),
    ("bound, of another serial", false, |f| {
        function(f, Some("vfio-pci"));
        record(f, "OTHER", "");
    }),
    ("half bound, of another serial", false, |f| {
        function(f, None);
        record(f, "OTHER", "");
    }),
    ("back with the kernel, with a record that is stale", false, |f| {
        f.drive(OTHER, 2, "OTHER", 16);
        record(f, "EXP", "");
    }),
    ("a record of a drive that is gone", false, |f| record(f, "EXP", "")),
    ("another class of device without a driver", false, |f| {
        f.put(&format!("/sys/bus/pci/devices/{OTHER}/class"), "0x010700\n");
    }),
];

/// Linux shows one of two drives of a serial, whichever came first; nt must not take what is left.
#[test]
fn twins_refuse_also_where_the_kernel_shows_one() {
    for (name, twin, spoil) in TWINS {
        let fake = clean();
        spoil(&fake);
        let reasons = fake.reasons(&list());
        let found = reasons.iter().any(|r| matches!(r.check, Check::Twin | Check::Unreadable));
        assert_eq!(found, *twin, "{name}: {reasons:?}");
    }
}

/// Where a serial may be two drives', only the address of the entry and of the user decides.
#[test]
fn the_address_decides_between_twins() {
    let decide = |fake: &Fake, allowed: &Result<Allowlist, String>, pci: Option<&str>| {
        let host = Host::at(fake.dir.path());
        let all = sysfs::controllers(&host).unwrap();
        let drive = sysfs::find(&host, &all, "nvme1n1").unwrap();
        let mut reasons = examine(&host, &all, drive, allowed, Purpose::Read);
        address_decides(&host, &all, drive, allowed, pci, &mut reasons);
        reasons
    };
    let fake = clean();
    assert_eq!(decide(&fake, &list(), None), vec![]);
    assert_eq!(decide(&fake, &list(), Some(BDF)), vec![]);
    assert_eq!(decide(&fake, &list(), Some("0000:03:00.0")).len(), 1, "an address of another drive");

    function(&fake, None);
    let without = decide(&fake, &list(), None);
    assert!(without.iter().any(|r| r.what.contains("add --pci 0000:02:00.0")), "{without:?}");
    assert_eq!(decide(&fake, &list(), Some("02:00.0")), vec![]);
    assert!(decide(&fake, &list(), Some("03:00.0")).len() >= 2);
    let mut moved = list().unwrap();
    moved.drive[0].pci = "0000:05:00.0".into();
    assert!(decide(&fake, &Ok(moved), Some(BDF)).iter().any(|r| r.check == Check::Allowlist));

    // It decides nothing else: not a serial that identifies nothing, not an EUI that two have, not a mount.
    let fake = clean();
    function(&fake, None);
    fake.mount("30 21 259:11 / /data rw - ext4 /dev/nvme1n1p1 rw");
    assert!(decide(&fake, &list(), Some(BDF)).iter().any(|r| r.check == Check::Mounted));
    let fake = clean();
    fake.drive(OTHER, 2, "EXP", 16);
    for n in [1, 2] {
        fake.put(&format!("/sys/class/block/nvme{n}n1/eui"), "00 25 38 5b 91 d0 e2 f1\n");
    }
    assert!(decide(&fake, &list(), Some(BDF)).iter().any(|r| r.check == Check::Twin));
    // A record that cannot be read hides a serial, which no address tells.
    let fake = clean();
    function(&fake, Some("vfio-pci"));
    fake.put(&format!("/run/nt/{OTHER}.toml"), "pci = ");
    assert!(decide(&fake, &list(), Some(BDF)).iter().any(|r| r.check == Check::Unreadable));
}

/// A drive that is with vfio-pci for a guest tells nobody its serial number, which may be ours: the address in the entry
/// must be right then. Where the other's serial is known, or no other is hidden, it stays a hint.
#[test]
fn the_entrys_address_counts_while_a_serial_is_hidden() {
    let hidden: [(&str, Spoil); 4] = [
        ("held for a guest", |f| function(f, Some("vfio-pci"))),
        ("held by a driver of another program", |f| function(f, Some("uio_pci_generic"))),
        ("its record is of another boot", |f| {
            function(f, Some("vfio-pci"));
            f.put("/proc/sys/kernel/random/boot_id", "now\n");
            record(f, "OTHER", "boot = \"then\"\n");
        }),
        ("its record is of what was in the slot before", |f| {
            function(f, Some("vfio-pci"));
            record(f, "OTHER", "instance = 1\n");
        }),
    ];
    let known: [(&str, Spoil); 3] = [
        ("no other drive", |_| ()),
        ("with the kernel", |f| f.drive(OTHER, 2, "OTHER", 16)),
        ("bound by nt, of another serial", |f| {
            function(f, Some("vfio-pci"));
            record(f, "OTHER", "");
        }),
    ];
    let moved = |pci: &str| {
        let mut list = list().unwrap();
        list.drive[0].pci = pci.into();
        Ok(list)
    };
    for (name, spoil) in hidden {
        let fake = clean();
        spoil(&fake);
        assert_eq!(fake.reasons(&list()), vec![], "{name}");
        assert_eq!(fake.reasons(&moved("02:00.0")), vec![], "{name}");
        let reasons = fake.reasons(&moved("0000:05:00.0"));
        assert!(
            matches!(&reasons[..], [r] if r.check == Check::Allowlist && r.what.contains(OTHER)),
            "{name}: {reasons:?}"
        );
    }
    for (name, spoil) in known {
        let fake = clean();
        spoil(&fake);
        assert_eq!(fake.reasons(&moved("0000:05:00.0")), vec![], "{name}");
    }
}

/// The last claim takes every namespace, says how long, and names what cannot be claimed.
#[test]
fn a_claim_takes_every_namespace_and_lets_go() {
    let fake = clean();
    let host = Host::at(fake.dir.path());
    let claimed = |host: &Host| {
        let all = sysfs::controllers(host).unwrap();
        claim::moment(host, sysfs::find(host, &all, "nvme1n1").unwrap())
    };
    assert!(matches!(claimed(&host), claim::Claim::Made(_)));
    fake.drop_file("/dev/nvme1n1");
    match claimed(&host) {
        claim::Claim::Refused(reasons) => assert_eq!(reasons[0].check, Check::Open),
        other => panic!("{other:?}"),
    }
}

/// The list is judged by the file that was opened, and only a regular one is read.
#[test]
fn a_list_is_read_and_judged_once() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for path in [fifo.as_path(), std::path::Path::new("/dev/zero"), folder.path()] {
        let e = Allowlist::load(path).unwrap_err();
        assert!(e.contains("regular file") || e.contains("cannot be read") || e.contains("belong to root"), "{e}");
    }
    let open = folder.path().join("open.toml");
    fs::write(&open, "").unwrap();
    fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    assert!(Allowlist::load(&open).unwrap_err().contains("writable by nobody else"));
}
