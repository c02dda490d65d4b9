//! What a drive says of its health: temperature, wear, spare blocks, warnings. Of a bound drive through VFIO, of
//! another through the kernel's ioctl for admin commands, which sends Get Log Page and Identify here and nothing else.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind};
use std::os::fd::AsRawFd;

use super::bind::{self, Bound};
use super::guard::node::Node;
use super::guard::{Controller, Host};
use super::vfio::VfioReader;

/// Bytes of the health log.
pub const LOG_BYTES: usize = 512;
/// Bytes that Identify answers.
pub const IDENTIFY_BYTES: usize = 4096;

/// The part of the SMART / Health Information log that is shown. NVMe Base 2.0 §5.16.1.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    /// Critical warnings, one per bit.
    pub critical_warning: u8,
    /// Composite temperature, kelvin; 0 if it is not told.
    pub temperature_k: u16,
    /// Spare blocks that are left, percent.
    pub spare: u8,
    /// Spare below which a warning is due, percent.
    pub spare_threshold: u8,
    /// Part of its life that is used, percent; may pass 100.
    pub used: u8,
}

const WARNINGS: [&str; 6] = [
    "spare below its threshold",
    "temperature out of range",
    "reliability degraded",
    "read-only",
    "backup of its memory failed",
    "persistent memory read-only",
];

impl Health {
    /// Reads the log page. `None` unless there are 512 bytes.
    pub fn parse(log: &[u8]) -> Option<Health> {
        let log = log.get(..LOG_BYTES)?;
        Some(Health {
            critical_warning: log[0],
            temperature_k: u16::from_le_bytes([log[1], log[2]]),
            spare: log[3],
            spare_threshold: log[4],
            used: log[5],
        })
    }

    /// The critical warnings in words.
    pub fn warnings(&self) -> Vec<String> {
        let set = (0..8).filter(|bit| self.critical_warning >> bit & 1 == 1);
        set.map(|bit| WARNINGS.get(bit).map_or_else(|| format!("bit {bit}"), |w| (*w).to_owned())).collect()
    }
}

impl std::fmt::Display for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.temperature_k {
            0 => write!(f, "temperature not told")?,
            kelvin => write!(f, "{} °C", i32::from(kelvin) - 273)?,
        }
        write!(f, ", {} % of its life used, {} % spare", self.used, self.spare)?;
        match self.warnings() {
            none if none.is_empty() => write!(f, ", no critical warning"),
            some => write!(f, ", CRITICAL: {}", some.join(", ")),
        }
    }
}

/// The health of a bound drive. The drive is opened for a moment, unless somebody uses it.
///
/// # Errors
/// That it is in use, that this user may not open it, or what the drive answers.
pub fn of_bound(host: &Host, drive: &Bound) -> Result<Health, String> {
    bind::group_node_is_right(host, &drive.pci).map_err(|e| e.to_string())?;
    let node = format!("/dev/vfio/{}", drive.group);
    match File::options().read(true).write(true).open(host.real(&node)) {
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            return Err("in use, so it is not asked now".into());
        }
        Err(e) if e.kind() == ErrorKind::PermissionDenied => {
            return Err(format!("{node} may not be opened by this user, who is not in the group nt"));
        }
        Err(e) => return Err(format!("{node}: {e}")),
        Ok(_) => {}
    }
    let namespace = drive.namespace.first().ok_or("it has no namespace")?;
    let reader = VfioReader::open_bound(drive, namespace).map_err(|e| e.to_string())?;
    Ok(reader.drive().controller.health)
}

/// The health of a drive that the kernel drives. A plain user is told the temperature alone, where the kernel
/// shows it in sysfs.
///
/// # Errors
/// What the system or the drive answers.
pub fn of_kernel(host: &Host, drive: &Controller) -> Result<String, String> {
    let name = drive.name.as_deref().ok_or("the kernel's driver does not hold it")?;
    let node = format!("/dev/{name}");
    let asked = open_controller(host, name).and_then(|file| log_page(&file));
    match asked {
        Ok(log) => Health::parse(&log).map(|h| h.to_string()).ok_or_else(|| "the log is short".into()),
        Err(e) if matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::NotFound) => {
            let warm = temperature(host, name).ok_or_else(|| format!("{node}: {e}"))?;
            Ok(format!("{warm} °C (wear and warnings: run it as root)"))
        }
        Err(e) => Err(format!("{node}: {e}")),
    }
}

/// Opens the node of a controller, if it is that by its number.
fn open_controller(host: &Host, name: &str) -> std::io::Result<File> {
    let number = host.read(&format!("/sys/class/nvme/{name}/dev")).map_err(|e| Error::new(e.kind, e))?;
    let number = number.parse().map_err(|()| Error::other(format!("sysfs gives it the number {number:?}")))?;
    host.open_node(&format!("/dev/{name}"), Node::Char(number), OpenOptions::new().read(true))
}

/// `struct nvme_admin_cmd` of `linux/nvme_ioctl.h`.
#[repr(C)]
#[derive(Default)]
struct AdminCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}
const _: () = assert!(size_of::<AdminCommand>() == 72);

/// Sends Get Log Page 02h (opcode 02h, which reads) to the controller whose character device is open.
fn log_page(file: &File) -> std::io::Result<[u8; LOG_BYTES]> {
    let cdw10 = 0x02 | (LOG_BYTES as u32 / 4 - 1) << 16;
    ask(file, AdminCommand { opcode: 0x02, nsid: u32::MAX, cdw10, ..AdminCommand::default() })
}

/// Sends Identify Controller (opcode 06h, CNS 01h, which reads) to the controller whose character device is open.
///
/// # Errors
/// What the system or the drive answers.
pub fn identify(file: &File) -> std::io::Result<[u8; IDENTIFY_BYTES]> {
    ask(file, AdminCommand { opcode: 0x06, cdw10: 1, ..AdminCommand::default() })
}

/// Sends a command whose answer is `N` bytes.
fn ask<const N: usize>(file: &File, command: AdminCommand) -> std::io::Result<[u8; N]> {
    let mut answer = [0u8; N];
    let (addr, data_len) = (answer.as_mut_ptr() as u64, N as u32);
    let mut command = AdminCommand { addr, data_len, timeout_ms: 5000, ..command };
    // SAFETY: the structure is the ioctl's own, and the buffer it names is as long as it says and outlives
    // the call, which returns when the command has ended.
    match unsafe { ioctl::admin_command(file.as_raw_fd(), &raw mut command)? } {
        0 => Ok(answer),
        status => Err(std::io::Error::other(format!("the drive answered with status {status:#x}"))),
    }
}

/// `linux/nvme_ioctl.h`.
mod ioctl {
    nix::ioctl_readwrite!(admin_command, b'N', 0x41, super::AdminCommand);
}

/// Degrees Celsius by sysfs.
fn temperature(host: &Host, name: &str) -> Option<i64> {
    let class = format!("/sys/class/nvme/{name}");
    let folders = [class.clone(), format!("{class}/hwmon"), format!("{class}/device/hwmon")];
    let mut files = folders.iter().flat_map(|folder| {
        let inside = host.list(folder).unwrap_or_default().into_iter().filter(|n| n.starts_with("hwmon"));
        inside.map(move |n| format!("{folder}/{n}/temp1_input"))
    });
    files.find_map(|path| host.read(&path).ok()?.trim().parse::<i64>().ok()).map(|milli| milli / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_told_in_words() {
        let mut log = [0u8; LOG_BYTES];
        log[..6].copy_from_slice(&[0, 0x37, 0x01, 100, 10, 3]);
        let health = Health::parse(&log).unwrap();
        assert_eq!(health.to_string(), "38 °C, 3 % of its life used, 100 % spare, no critical warning");
        log[0] = 0x83;
        (log[1], log[2]) = (0, 0);
        assert_eq!(
            Health::parse(&log).unwrap().to_string(),
            "temperature not told, 3 % of its life used, 100 % spare, CRITICAL: spare below its threshold, temperature out of range, bit 7"
        );
        assert_eq!(Health::parse(&log[..511]), None);
    }

    #[test]
    fn a_plain_user_is_told_the_temperature() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::at(root.path());
        let drive = |name: Option<&str>| Controller {
            bdf: "0000:02:00.0".into(),
            driver: Some("nvme".into()),
            name: name.map(str::to_owned),
            serial: String::new(),
            model: String::new(),
            firmware: String::new(),
            namespaces: Vec::new(),
            hidden: Vec::new(),
        };
        assert!(of_kernel(&host, &drive(None)).unwrap_err().contains("does not hold it"));
        assert!(of_kernel(&host, &drive(Some("nvme1"))).unwrap_err().starts_with("/dev/nvme1: "));
        let sensor = root.path().join("sys/class/nvme/nvme1/hwmon3");
        std::fs::create_dir_all(&sensor).unwrap();
        std::fs::write(sensor.join("temp1_input"), "41850\n").unwrap();
        let said = of_kernel(&host, &drive(Some("nvme1"))).unwrap();
        assert_eq!(said, "41 °C (wear and warnings: run it as root)");
    }
}
