//! Checks that the system has what the agent needs, and what a service does.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use super::ipvs::{self, Change, Ipvs, Protocol, Reason, Service, ServiceKey};
use super::message::{self, VethEnd};
use super::netlink::{Netlink, NetlinkError, Request};
use super::netns::Netns;
use super::{Error, nft};
use crate::model::{MacAddr, Vni};

/// The oldest kernel that is supported: it has all we use (IPv4 routes through IPv6 next hops came
/// with 5.2), and is the oldest with long-term support.
const OLDEST: (u32, u32) = (5, 10);
/// From this kernel on an address keeps our mark (`IFA_PROTO`).
const ADDRESS_PROTOCOL: (u32, u32) = (5, 18);
/// What the namespace is called in which something is tried.
const PROBE: &str = "probe";
/// Capability numbers (include/uapi/linux/capability.h).
const CAPABILITIES: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN")];

/// Checks the system; tries nothing outside a namespace of its own.
///
/// # Errors
///
/// [`Error::Probe`] names everything that is missing, with what to do about it.
pub fn probe() -> Result<(), Error> {
    let mut missing = Vec::new();
    match release() {
        Some(release) if release >= OLDEST => {}
        Some((major, minor)) => missing.push(format!(
            "Linux {major}.{minor} is too old: {}.{} or newer is needed",
            OLDEST.0, OLDEST.1
        )),
        None => missing.push("the kernel's release cannot be read (uname)".to_owned()),
    }
    let lacking = lacking_capabilities()?;
    if lacking.is_empty() {
        let thread = std::thread::Builder::new().spawn(try_devices);
        let tried = thread.map_err(Error::system("start a thread"))?.join();
        match tried.unwrap_or_else(|_| Err(Error::system("try devices")(Errno::EIO))) {
            Ok(found) => missing.extend(found),
            Err(error) => missing.push(error.to_string()),
        }
    } else {
        missing.push(format!("{} missing: run the agent as root", lacking.join(" and ")));
    }
    if missing.is_empty() { Ok(()) } else { Err(Error::Probe(missing)) }
}

/// Whether IPVS has a scheduler, by its name; the kernel loads its module where it can.
///
/// # Errors
///
/// When it cannot be tried.
pub fn has_scheduler(name: &str) -> Result<bool, Error> {
    if Path::new("/sys/module").join(format!("ip_vs_{name}")).exists() {
        return Ok(true);
    }
    let scheduler = ipvs::Scheduler::from(name);
    let thread = std::thread::Builder::new().spawn(move || try_scheduler(scheduler));
    let tried = thread.map_err(Error::system("start a thread"))?.join();
    tried.unwrap_or_else(|_| Err(Error::system("try a scheduler of IPVS")(Errno::EIO)))
}

/// Makes a service with it in a namespace of this thread's own, which ends with it.
fn try_scheduler(scheduler: ipvs::Scheduler) -> Result<bool, Error> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(Error::system("make a network namespace"))?;
    let mut ipvs = Ipvs::open().map_err(Error::ipvs(PROBE))?;
    let address = std::net::Ipv4Addr::LOCALHOST.into();
    let key = ServiceKey::Address { protocol: Protocol::Tcp, address, port: 1 };
    match ipvs.apply(&[Change::AddService(Service::new(key, scheduler))]).remove(0) {
        Ok(()) => Ok(true),
        Err(error) if error.reason() == Some(Reason::NoScheduler) => Ok(false),
        Err(error) => Err(Error::ipvs(PROBE)(error)),
    }
}

/// Whether addresses keep our mark.
pub(super) fn reports_address_protocol() -> bool {
    static KNOWN: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *KNOWN.get_or_init(|| release().is_some_and(|release| release >= ADDRESS_PROTOCOL))
}

fn release() -> Option<(u32, u32)> {
    parse_release(nix::sys::utsname::uname().ok()?.release().to_str()?)
}

fn parse_release(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn lacking_capabilities() -> Result<Vec<&'static str>, Error> {
    let path = "/proc/thread-self/status";
    let status = std::fs::read_to_string(path).map_err(Error::path("read", path))?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = line.and_then(|line| u64::from_str_radix(line.trim(), 16).ok());
    let malformed = || Error::path("understand", path)(io::Error::from(io::ErrorKind::InvalidData));
    let held = held.ok_or_else(malformed)?;
    Ok(CAPABILITIES.iter().filter(|(bit, _)| held & (1 << bit) == 0).map(|(_, name)| *name).collect())
}

/// Makes one of each in a namespace of this thread's own, which ends with it.
fn try_devices() -> Result<Vec<String>, Error> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(Error::system("make a network namespace"))?;
    let netns = Netns::current()?;
    let mut netlink = Netlink::open().map_err(Error::system("open a netlink socket"))?;
    let mut missing = Vec::new();
    let mut check = |what: &str, module: &str, result: Result<(), NetlinkError>| {
        if let Err(error) = result {
            let hint = format!("load the module {module} (modprobe {module})");
            missing.push(format!("{what} devices cannot be made: {error}; {hint}"));
        }
    };
    let end = |name| VethEnd { name, mac: None };
    let pair = message::veth(&end("probe0"), &end("probe1"), &netns, 1500);
    check("veth", "veth", netlink.request(Request::create(pair)).map(drop));
    // The first VNI and any local address: nothing is sent.
    let (vni, mac) = (Vni::new(1), MacAddr([2, 0, 0, 0, 0, 1]));
    let parameters = vni.map(|vni| (vni, std::net::Ipv4Addr::LOCALHOST.into(), 4789));
    let vxlan = parameters.map(|parameters| message::vxlan("probe2", &netns, 1450, mac, parameters));
    let made = vxlan.map_or(Ok(Vec::new()), |vxlan| netlink.request(Request::create(vxlan)));
    check("VXLAN", "vxlan", made.map(drop));
    match nft::install(
        &netns,
        "table inet netctl { chain probe { type filter hook input priority 0; log group 1 drop; }; }",
    ) {
        Ok(()) => {}
        Err(error @ Error::NftMissing) => missing.push(error.to_string()),
        Err(error) => {
            missing.push(format!(
                "nftables does not work: {error}; load the modules nf_tables, nft_log and nfnetlink_log"
            ));
        }
    }
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_distributions_are_understood() {
        assert_eq!(parse_release("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(parse_release("5.15.153.1-microsoft-standard-WSL2"), Some((5, 15)));
        assert_eq!(parse_release("7.0-rc1"), Some((7, 0)));
        assert_eq!(parse_release("six"), None);
    }
}
