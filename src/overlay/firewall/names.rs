//! What answering names adds to a sandbox's table: each client's packets to the server are counted, so
//! that the flood of one does not hurt the others.

use std::fmt::Write as _;

use super::super::NameService;
use crate::model::Network;

/// The bytes of a query, with its headers, by which a client's are counted too.
const QUERY: u64 = 128;

/// The sets of who asks, and the chain that counts them. Nobody on another node asks here: every node
/// answers its own containers.
pub(super) fn chain(network: &Network, service: NameService) -> String {
    let mut text = String::new();
    let mut jumps = String::from("        iifname \"vx0\" counter drop comment \"names-from-remote\"\n");
    let (mut asked, mut answers) = (String::new(), String::new());
    let (rate, burst) = (service.rate, (service.rate / 20).max(20));
    // Many datagrams may come as one packet (UDP_SEGMENT), and many queries in one of a stream.
    let (bytes, bytes_burst) = (u64::from(rate) * QUERY, u64::from(burst) * QUERY);
    for (family, number, ipv4) in [("ip", 4, true), ("ip6", 6, false)] {
        let servers: Vec<String> = service
            .servers(network)
            .filter(|address| address.is_ipv4() == ipv4)
            .map(|address| address.to_string())
            .collect();
        if servers.is_empty() {
            continue;
        }
        let servers = servers.join(", ");
        let _ = writeln!(
            asked,
            "        {family} daddr {{ {servers} }} meta l4proto {{ tcp, udp }} th dport 53 jump asked"
        );
        let _ = writeln!(
            answers,
            "        {family} saddr {{ {servers} }} meta l4proto {{ tcp, udp }} th sport 53 notrack"
        );
        if rate > 0 {
            let _ = writeln!(
                text,
                "    set askers{number} {{ type ipv{number}_addr; size 65536; flags dynamic, timeout; timeout 1m; }}\n    \
                 set asked{number} {{ type ipv{number}_addr; size 65536; flags dynamic, timeout; timeout 1m; }}"
            );
            let _ = writeln!(
                jumps,
                "        update @askers{number} {{ {family} saddr limit rate over {rate}/second burst {burst} packets }} counter drop comment \"names-flood\"\n        \
                 update @asked{number} {{ {family} saddr limit rate over {bytes} bytes/second burst {bytes_burst} bytes }} counter drop comment \"names-flood\""
            );
        }
    }
    let _ = write!(
        text,
        "    chain asked {{\n{jumps}    }}\n    chain names {{\n        type filter hook input priority filter - 1; policy accept;\n{asked}    }}\n    chain answers {{\n        type filter hook output priority raw; policy accept;\n{answers}    }}\n"
    );
    text
}
