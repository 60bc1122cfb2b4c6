//! What the command finds in `/etc` and in its environment.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::api::EndpointView;
use crate::model::NodeName;

/// Where the host has its resolver's configuration.
const HOST_RESOLV_CONF: &str = "/etc/resolv.conf";

/// All that process 1 needs to know once the network is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Setup {
    /// The host name.
    pub(super) hostname: String,
    /// Files of `/etc`: name and content.
    pub(super) files: Vec<(String, String)>,
    /// Variables for the environment.
    pub(super) environment: Vec<(String, String)>,
}

impl Setup {
    /// What an endpoint's command needs.
    pub(super) fn new(
        view: &EndpointView,
        hostname: Option<&NodeName>,
        environment: &[(String, String)],
    ) -> Self {
        let endpoint = &view.endpoint;
        let hostname = hostname.map_or(endpoint.name.as_str(), NodeName::as_str);
        // A host without the file has no resolver; so has the command.
        let resolver = std::fs::read_to_string(HOST_RESOLV_CONF).unwrap_or_default();
        let files = [
            ("hostname", format!("{hostname}\n")),
            ("hosts", hosts(&endpoint.addresses, hostname, endpoint.name.as_str())),
            ("resolv.conf", without_local_servers(&resolver)),
        ];
        let own = [
            ("NETCTL_ENDPOINT", endpoint.name.to_string()),
            ("NETCTL_NETWORK", view.network_name.to_string()),
            ("NETCTL_ADDRESS", crate::cli::output::joined(&endpoint.addresses)),
        ];
        let owned = |(key, value): (&str, String)| (key.to_owned(), value);
        Self {
            hostname: hostname.to_owned(),
            files: files.into_iter().map(owned).collect(),
            environment: environment.iter().cloned().chain(own.into_iter().map(owned)).collect(),
        }
    }
}

/// `/etc/hosts`: this host, and its own names.
fn hosts(addresses: &[IpAddr], hostname: &str, name: &str) -> String {
    let mut text = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    for address in addresses {
        let alias = if hostname == name { String::new() } else { format!(" {name}") };
        text.push_str(&format!("{address}\t{hostname}{alias}\n"));
    }
    text
}

/// A resolver's configuration without servers on the host's loopback, which is not reached from
/// inside.
fn without_local_servers(text: &str) -> String {
    let local = |line: &str| {
        let mut words = line.split_whitespace();
        let server = (words.next() == Some("nameserver")).then(|| words.next()).flatten();
        let address = server.and_then(|server| server.split('%').next()?.parse::<IpAddr>().ok());
        address.is_some_and(|address| address.is_loopback() || address.is_unspecified())
    };
    text.lines().filter(|line| !local(line)).map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_on_the_hosts_loopback_are_left_out() {
        let text = "# by hand\nsearch a.example\nnameserver 127.0.0.53\nnameserver ::1\n\
                    nameserver 192.0.2.1\n nameserver\t127.0.0.1\nnameserver fe80::1%eth0\noptions ndots:2";
        assert_eq!(
            without_local_servers(text),
            "# by hand\nsearch a.example\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\noptions ndots:2\n"
        );
    }

    #[test]
    fn every_address_has_the_host_name_and_the_endpoints_name() {
        let addresses = ["10.9.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        let text = hosts(&addresses, "web-1.example", "a");
        assert!(text.starts_with("127.0.0.1\tlocalhost\n::1\tlocalhost"));
        assert!(text.ends_with("10.9.0.2\tweb-1.example a\nfd00::2\tweb-1.example a\n"), "{text}");
        assert!(hosts(&addresses, "a", "a").ends_with("fd00::2\ta\n"));
    }
}
