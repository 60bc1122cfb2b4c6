//! Settings below /proc/sys/net of the calling thread's network namespace.

use std::io;
use std::path::Path;

use super::Error;

const ROOT: &str = "/proc/sys/net";

/// Reads a setting, such as `ipv4/ip_forward`.
pub(super) fn read(setting: &str) -> Result<String, Error> {
    let path = Path::new(ROOT).join(setting);
    let value = std::fs::read_to_string(&path).map_err(Error::path("read", &path))?;
    Ok(value.trim_end().to_owned())
}

/// Sets a setting where it differs.
pub(super) fn write(setting: &str, value: &str) -> Result<(), Error> {
    if read(setting)? == value {
        return Ok(());
    }
    let path = Path::new(ROOT).join(setting);
    std::fs::write(&path, value).map_err(Error::path("write", &path))
}

/// Has packets that come by an interface forwarded, whatever holds for the others. It gets no address by
/// itself when it comes up.
pub(super) fn forward_from(interface: &str) -> Result<(), Error> {
    write(&format!("ipv4/conf/{interface}/forwarding"), "1")?;
    if has_ipv6() {
        write(&format!("ipv6/conf/{interface}/addr_gen_mode"), "1")?;
        write(&format!("ipv6/conf/{interface}/forwarding"), "1")?;
    }
    Ok(())
}

/// Whether the kernel has IPv6 at all (it has not with `ipv6.disable=1`).
pub(super) fn has_ipv6() -> bool {
    Path::new(ROOT).join("ipv6/conf").exists()
}

/// The interfaces for which the IPv6 settings exist, without `all` and `default`.
pub(super) fn ipv6_interfaces() -> Result<Vec<String>, Error> {
    interfaces("ipv6/conf")
}

/// The same of IPv4.
pub(super) fn ipv4_interfaces() -> Result<Vec<String>, Error> {
    interfaces("ipv4/conf")
}

fn interfaces(folder: &str) -> Result<Vec<String>, Error> {
    let path = Path::new(ROOT).join(folder);
    let entries = match std::fs::read_dir(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.map_err(Error::path("list", &path))?,
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter(|name| name != "all" && name != "default").collect())
}
