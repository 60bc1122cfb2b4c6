//! Who is asked for names that are not ours.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nix::net::if_::if_nametoindex;
use resolv_conf::ScopedIp;
use tracing::{debug, warn};

use crate::config::DnsConfig;
use crate::dns::{DomainName, PORT};

/// Whom the host asks.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// How often it is looked whether that has changed, at most.
const LOOK: Duration = Duration::from_secs(1);

/// Which servers are asked.
pub(super) struct Upstreams {
    /// Where we answer the host ourselves: that is no outside.
    own: Option<SocketAddr>,
    configured: Vec<SocketAddr>,
    /// Those for names below a domain.
    forward: Vec<(DomainName, Vec<SocketAddr>)>,
    host: Mutex<HostFile>,
}

impl Upstreams {
    pub(super) fn new(config: &DnsConfig) -> Self {
        Self {
            own: config.host.map(|address| (address, PORT).into()),
            configured: config.upstreams.clone(),
            forward: config.forward.iter().map(|(d, servers)| (d.clone(), servers.clone())).collect(),
            host: Mutex::new(HostFile::new(RESOLV_CONF.into())),
        }
    }

    /// The servers to ask for a name, the first one first.
    pub(super) fn of(&self, name: &DomainName) -> Vec<SocketAddr> {
        let below = self.forward.iter().filter(|(domain, _)| name.before(domain).is_some());
        match below.max_by_key(|(domain, _)| domain.count()) {
            Some((_, servers)) => servers.clone(),
            None if self.configured.is_empty() => {
                let mut host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
                let mut servers = host.servers(Instant::now());
                servers.retain(|server| Some(*server) != self.own);
                servers
            }
            None => self.configured.clone(),
        }
    }
}

/// The host's file, as it was read last.
struct HostFile {
    path: PathBuf,
    looked: Option<Instant>,
    /// When it was written, and its length: a file that is put in its place differs in that.
    seen: Option<(SystemTime, u64)>,
    servers: Vec<SocketAddr>,
}

impl HostFile {
    fn new(path: PathBuf) -> Self {
        Self { path, looked: None, seen: None, servers: Vec::new() }
    }

    fn servers(&mut self, now: Instant) -> Vec<SocketAddr> {
        if self.looked.is_none_or(|looked| now.duration_since(looked) >= LOOK) {
            self.looked = Some(now);
            let metadata = std::fs::metadata(&self.path);
            let seen = metadata.and_then(|metadata| Ok((metadata.modified()?, metadata.len()))).ok();
            if seen != self.seen {
                (self.seen, self.servers) = (seen, read(&self.path));
                debug!(servers = ?self.servers, "whom the host asks for names");
            }
        }
        self.servers.clone()
    }
}

/// The servers that a file names; none where it cannot be read.
fn read(path: &Path) -> Vec<SocketAddr> {
    let parsed = std::fs::read(path)
        .map_err(|error| error.to_string())
        .and_then(|text| resolv_conf::Config::parse(text).map_err(|error| error.to_string()));
    let config = match parsed {
        Ok(config) => config,
        Err(error) => {
            warn!(file = %path.display(), error, "nobody is known to ask for names of others");
            return Vec::new();
        }
    };
    config.nameservers.iter().filter_map(address).collect()
}

fn address(server: &ScopedIp) -> Option<SocketAddr> {
    match server {
        ScopedIp::V4(address) => Some((*address, PORT).into()),
        ScopedIp::V6(address, None) => Some((*address, PORT).into()),
        ScopedIp::V6(address, Some(scope)) => {
            let index = scope.parse().ok().or_else(|| if_nametoindex(scope.as_str()).ok())?;
            Some(std::net::SocketAddrV6::new(*address, PORT, 0, index).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_file_is_read_again_when_it_has_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        let mut file = HostFile::new(path.clone());
        let start = Instant::now();
        assert_eq!(file.servers(start), [], "there is none");
        std::fs::write(&path, "search a\nnameserver 192.0.2.1\nnameserver 2001:db8::1\n").unwrap();
        assert_eq!(file.servers(start), [], "it is not looked at all the time");
        let both: Vec<SocketAddr> =
            ["192.0.2.1:53", "[2001:db8::1]:53"].map(|text| text.parse().unwrap()).into();
        assert_eq!(file.servers(start + LOOK), both);
        std::fs::write(&path, "nameserver fe80::1%1\nnameserver 127.0.0.53\noptions edns0\n").unwrap();
        let scoped: Vec<SocketAddr> =
            ["[fe80::1%1]:53", "127.0.0.53:53"].map(|text| text.parse().unwrap()).into();
        assert_eq!(file.servers(start + 2 * LOOK), scoped);
        std::fs::write(&path, "nameserver \u{0}\n").unwrap();
        assert_eq!(file.servers(start + 3 * LOOK), [], "nonsense names nobody");
    }

    #[test]
    fn the_longest_domain_decides() {
        let name = |text| DomainName::parse(text).unwrap();
        let server = |text: &str| -> SocketAddr { text.parse().unwrap() };
        let config = DnsConfig {
            domain: name("netctl.internal"),
            ttl: Duration::ZERO,
            address: None,
            host: None,
            rate: 0,
            upstreams: vec![server("192.0.2.1:53")],
            forward: [("corp", "192.0.2.2:53"), ("lab.corp", "192.0.2.3:5353")]
                .map(|(domain, at)| (name(domain), vec![server(at)]))
                .into(),
        };
        let upstreams = Upstreams::new(&config);
        for (asked, expected) in [
            ("a.lab.corp", "192.0.2.3:5353"),
            ("LAB.corp", "192.0.2.3:5353"),
            ("a.corp", "192.0.2.2:53"),
            ("xcorp", "192.0.2.1:53"),
        ] {
            assert_eq!(upstreams.of(&name(asked)), [server(expected)], "{asked}");
        }
    }
}
