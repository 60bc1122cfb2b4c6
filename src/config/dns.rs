//! The settings of names.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::DnsConfig;
use super::check::Check;
use crate::dns::{DomainName, PORT};

/// Where every network answers by default, in the range for what is not routed (RFC 3927).
const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 53, 53);

/// What systemd-resolved has (systemd-resolved.service(8)).
const RESOLVED: [Ipv4Addr; 2] = [Ipv4Addr::new(127, 0, 0, 53), Ipv4Addr::new(127, 0, 0, 54)];

/// Checks the settings of names.
pub(super) fn check(check: &mut Check<'_>) -> DnsConfig {
    let default = DomainName::parse("netctl.internal").unwrap_or_default();
    let domain = check.value("dns.domain", default, domain);
    let ttl = check.duration("dns.ttl", "5s", "0s", "1h");
    if ttl.subsec_nanos() != 0 {
        check.report("dns.ttl", "give whole seconds".to_owned());
    }
    let address = check.value("dns.address", Some(ADDRESS), link_local);
    let host = check.value("dns.host", None, loopback);
    let rate = check.value("dns.rate", 10_000, rate);
    let mut upstreams = Vec::new();
    for text in check.list("dns.upstreams").unwrap_or_default() {
        match server(&text) {
            Ok(server) => upstreams.push(server),
            Err(message) => check.report("dns.upstreams", message),
        }
    }
    let mut forward: BTreeMap<DomainName, Vec<SocketAddr>> = BTreeMap::new();
    for text in check.list("dns.forward").unwrap_or_default() {
        let parsed = match text.split_once('=') {
            Some((name, at)) => domain_and_server(name, at),
            None => Err(format!("{text:?} is not DOMAIN=ADDRESS[:PORT]")),
        };
        match parsed {
            Ok((name, server)) => forward.entry(name).or_default().push(server),
            Err(message) => check.report("dns.forward", message),
        }
    }
    DnsConfig { domain, ttl, address, host, rate, upstreams, forward }
}

fn domain_and_server(name: &str, at: &str) -> Result<(DomainName, SocketAddr), String> {
    Ok((domain(name)?, server(at)?))
}

fn domain(text: &str) -> Result<DomainName, String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let parsed = DomainName::parse(text).filter(|_| text.bytes().all(allowed));
    parsed.ok_or_else(|| format!("{text:?} is not a domain: give such as corp.example"))
}

fn server(text: &str) -> Result<SocketAddr, String> {
    let alone = || text.parse().ok().map(|address: IpAddr| SocketAddr::new(address, PORT));
    let server = text.parse().ok().or_else(alone);
    let usable = server.filter(|server| server.port() != 0 && !server.ip().is_unspecified());
    usable.ok_or_else(|| {
        format!("{text:?} is not ADDRESS[:PORT]: give such as 192.0.2.53 or [2001:db8::53]:5353")
    })
}

fn rate(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|number| *number <= 1_000_000);
    number.ok_or_else(|| format!("{text:?} is not a number of packets: give 1 to 1000000, or 0 for all"))
}

fn loopback(text: &str) -> Result<Option<IpAddr>, String> {
    if text == "none" {
        return Ok(None);
    }
    let address: Option<IpAddr> = text.parse().ok();
    match address.filter(IpAddr::is_loopback) {
        Some(IpAddr::V4(address)) if RESOLVED.contains(&address) => {
            Err(format!("{address} is systemd-resolved's own: give another, such as 127.0.0.110"))
        }
        Some(address) => Ok(Some(address)),
        None => Err(format!(
            "{text:?} is not a loopback address: give one of 127.0.0.0/8, such as 127.0.0.110, or ::1, or none"
        )),
    }
}

fn link_local(text: &str) -> Result<Option<Ipv4Addr>, String> {
    if text == "none" {
        return Ok(None);
    }
    let address = text.parse().ok().filter(Ipv4Addr::is_link_local);
    // The first and the last 256 are reserved (RFC 3927, 2.1); uplinks have the range in the middle.
    let usable = address.filter(|address| !matches!(address.octets()[2], 0 | 64..=127 | 255));
    let expected = || {
        format!(
            "{text:?} cannot be used: give a link-local address from 169.254.1.0 to 169.254.63.255 or \
             from 169.254.128.0 to 169.254.254.255, or none"
        )
    };
    usable.map(Some).ok_or_else(expected)
}
