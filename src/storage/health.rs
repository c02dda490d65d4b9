//! What a drive says of its health: a bound one through VFIO, another through the kernel's driver.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind};

use super::admin;
use super::bind::{self, Bound};
use super::guard::node::Node;
use super::guard::{Controller, Host};
use super::smart::Health;
use super::vfio::VfioReader;

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
    let asked = open_controller(host, name).and_then(|file| admin::health_log(&file));
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
