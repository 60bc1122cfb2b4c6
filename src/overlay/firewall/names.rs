//! What answering names adds to a sandbox's table: each client's packets to the server are counted, so
//! that the flood of one does not hurt the others.

use std::fmt::Write as _;

use super::super::NameService;
use crate::model::Network;

/// The sets of who asks, and the chain that counts them. Nobody on another node asks here: every node
/// answers its own containers.
pub(super) fn chain(network: &Network, service: NameService) -> String {
    let mut text = String::new();
    let mut jumps = String::from("        iifname \"vx0\" counter drop comment \"names-from-remote\"\n");
    let (mut asked, mut answers) = (String::new(), String::new());
    let (rate, burst) = (service.rate, (service.rate / 20).max(20));
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
                "    set askers{number} {{ type ipv{number}_addr; size 65536; flags dynamic, timeout; timeout 1m; }}"
            );
            let _ = writeln!(
                jumps,
                "        update @askers{number} {{ {family} saddr limit rate over {rate}/second burst {burst} packets }} counter drop comment \"names-flood\""
            );
        }
    }
    let _ = write!(
        text,
        "    chain asked {{\n{jumps}    }}\n    chain names {{\n        type filter hook input priority filter - 1; policy accept;\n{asked}    }}\n    chain answers {{\n        type filter hook output priority raw; policy accept;\n{answers}    }}\n"
    );
    text
}
