//! The nftables tables of ours, as scripts for `nft -f`: one for the host, one for each sandbox.
//!
//! A script replaces the whole table in one transaction, so there is no moment without rules.
//! Every drop has a counter and, as its comment, the reason, with which the kernel shows the packet to who
//! watches.

mod names;
mod services;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use super::{NameService, Surroundings};
use crate::lb::Balancer;
use crate::model::node::{UPLINKS4, UPLINKS6};
use crate::model::object::{ACCESS_PREFIX, DROP_GROUP, TABLE, UPLINK_PREFIX};
use crate::model::{Network, Subnet};

/// The table of a sandbox.
///
/// - A packet from a container or from the tunnel must come from where its source address is
///   routed to: `fib` asks the very routes that deliver to that address, for both families.
/// - Traffic within the network is not tracked; only what leaves is, to be masqueraded. Where it
///   goes to says which it is, because its source has been checked before.
/// - A connection to where nothing leads is reset. The error that the kernel itself answers with comes while
///   the sender still holds its socket, which then waits for the answer to its next try, a second later or
///   seven: of such errors there is one in a second.
/// - Other nodes cannot leave through this node's uplink, and nobody comes in through it. What belongs to
///   no connection could not be translated, and would leave under the container's own address.
///
/// Every packet between containers passes these rules: names of devices are costly to compare, so
/// there are few, and none once a packet is known to stay within the network.
/// - What services need is in [`services`], what names need in [`names`].
pub(super) fn sandbox(network: &Network, names: NameService, balancer: &Balancer) -> String {
    let mut rules = format!("\n{}", services::sets(network, balancer));
    rules.push_str(
        r#"    chain prerouting {
        type filter hook prerouting priority raw; policy accept;
        iif "lo" accept
        iifname "up0" accept
        ip6 saddr { ::, fe80::/10 } drop comment "link-local: not routed"
        fib saddr . iif oif missing jump foreign
"#,
    );
    rules.push_str(&services::prerouting(network, balancer));
    rules.push_str(&untracked(network, names, balancer));
    rules.push_str(
        r#"        tcp flags & (fin | syn | rst | ack) == syn fib daddr oif missing fib daddr type != local counter reject with tcp reset comment "unreachable"
    }
    chain foreign {
"#,
    );
    rules.push_str(&errors_of_gateways(network));
    rules.push_str(
        r#"        iifname "vx0" counter drop comment "foreign-source-tunnel"
        counter drop comment "foreign-source"
    }
"#,
    );
    rules.push_str(&names::chain(network, names));
    rules.push_str(&services::input(balancer));
    rules.push_str(&services::output(network, balancer));
    let mut translated = services::postrouting(network, balancer);
    if !network.internal {
        rules.push_str(
            r#"    chain forward {
        type filter hook forward priority filter; policy accept;
        ct state untracked accept
        iifname "vx0" oifname "up0" counter drop comment "remote-to-uplink"
        iifname "up0" ct state != { established, related } counter drop comment "unsolicited"
        oifname "up0" ct state invalid counter drop comment "not-translated"
    }
"#,
        );
        translated.push_str("        oifname \"up0\" masquerade\n");
    }
    if !translated.is_empty() {
        let _ = write!(
            rules,
            "    chain postrouting {{\n        type nat hook postrouting priority srcnat; policy accept;\n{translated}    }}\n"
        );
    }
    table(&rules)
}

/// What stays within the network is not tracked; where nothing is tracked at all nothing needs to be
/// kept from it.
fn untracked(network: &Network, names: NameService, balancer: &Balancer) -> String {
    let mut rules = String::new();
    if network.internal && balancer.own.is_empty() {
        return rules;
    }
    if let Some(fixed) = names.fixed(network) {
        rules.push_str(&format!("        ip daddr {fixed} notrack\n"));
    }
    for (family, ipv4) in [("ip", true), ("ip6", false)] {
        let subnets = network.subnets.iter().map(|s| s.cidr()).filter(|c| c.is_ipv4() == ipv4);
        let subnets: Vec<String> = subnets.map(|cidr| cidr.to_string()).collect();
        match subnets.as_slice() {
            [] => {}
            // A set of one would be searched like one of many.
            [one] => rules.push_str(&format!("        {family} daddr {one} notrack\n")),
            many => {
                let many = many.join(", ");
                rules.push_str(&format!("        {family} daddr {{ {many} }} notrack\n"));
            }
        }
    }
    rules
}

/// Every sandbox has the gateway addresses: from others come errors, such as that nobody has an
/// address.
fn errors_of_gateways(network: &Network) -> String {
    let mut rules = String::new();
    for (family, ipv4, errors) in [
        ("ip", true, "icmp type { destination-unreachable, time-exceeded, parameter-problem }"),
        (
            "ip6",
            false,
            "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem }",
        ),
    ] {
        let gateways = network.subnets.iter().map(Subnet::gateway).filter(|a| a.is_ipv4() == ipv4);
        let gateways: Vec<String> = gateways.map(|gateway| gateway.to_string()).collect();
        if !gateways.is_empty() {
            let gateways = gateways.join(", ");
            let _ = writeln!(
                rules,
                "        iifname \"vx0\" {family} saddr {{ {gateways} }} {errors} accept"
            );
        }
    }
    rules
}

/// The table of the host.
///
/// - VXLAN has no authentication: the tunnel port takes packets from member nodes only. The check
///   comes before connection tracking and before any rule of the administrator's, but after what was
///   cut on its way is whole again (-400): only a datagram's first piece has its port.
/// - Nobody but the kernel's VXLAN device sends to a tunnel port: not a container, not another
///   engine's container whose traffic this host forwards, not a process on this host (a packet of
///   a socket has an owner, `meta skuid`; those of a VXLAN device have none).
/// - Sandboxes reach neither the host nor each other, and nobody opens a connection into one.
/// - By a network that it has access to (`access`) the host opens connections, and takes none; nothing
///   is forwarded to or from there.
pub(super) fn host(around: Surroundings<'_>, uplinks: bool, access: bool) -> String {
    let port = around.me.tunnel_port;
    // Each node chooses its own port; none of them may be reached from here but by VXLAN.
    let ports: BTreeSet<u16> =
        around.nodes.values().map(|node| node.tunnel_port).chain([port]).collect();
    let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    let mut rules = member_sets(around);
    let _ = write!(
        rules,
        r#"    chain prerouting {{
        type filter hook prerouting priority -350; policy accept;
        udp dport {{ {ports} }} iifname "{UPLINK_PREFIX}*" counter drop comment "tunnel-from-container"
        udp dport {{ {ports} }} iifname "{ACCESS_PREFIX}*" counter drop comment "tunnel-from-container"
        udp dport {port} jump tunnel
    }}
    chain tunnel {{
        ip saddr @members4 notrack accept
        ip6 saddr @members6 notrack accept
        fib daddr type != unicast counter drop comment "tunnel-from-stranger"
    }}
    chain output {{
        type filter hook output priority -450; policy accept;
        udp dport {{ {ports} }} jump sent
    }}
    chain sent {{
        meta skuid >= 0 counter drop comment "tunnel-from-process"
        notrack
    }}
    chain forward {{
        type filter hook forward priority -450; policy accept;
        udp dport {{ {ports} }} ip daddr @members4 counter drop comment "tunnel-forwarded"
        udp dport {{ {ports} }} ip6 daddr @members6 counter drop comment "tunnel-forwarded"
"#
    );
    if access {
        let _ = write!(
            rules,
            r#"        iifname "{ACCESS_PREFIX}*" counter drop comment "forwarded-by-host-access"
        oifname "{ACCESS_PREFIX}*" counter drop comment "forwarded-by-host-access"
"#
        );
    }
    if uplinks {
        let _ = write!(
            rules,
            r#"        iifname "{UPLINK_PREFIX}*" oifname "{UPLINK_PREFIX}*" counter drop comment "between-networks"
        oifname "{UPLINK_PREFIX}*" ct state != {{ established, related }} counter drop comment "unsolicited"
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {UPLINKS4} oifname != "{UPLINK_PREFIX}*" masquerade
        ip6 saddr {UPLINKS6} oifname != "{UPLINK_PREFIX}*" masquerade
"#
        );
    }
    rules.push_str("    }\n");
    let devices = [(uplinks, UPLINK_PREFIX), (access, ACCESS_PREFIX)];
    rules.push_str(&input(devices.into_iter().filter(|(used, _)| *used).map(|(_, prefix)| prefix)));
    table(&rules)
}

/// The host's input chain: what comes by devices with these prefixes is only what the host asked for.
fn input<'a>(prefixes: impl Iterator<Item = &'a str>) -> String {
    let mut rules = String::new();
    for prefix in prefixes {
        let _ = write!(
            rules,
            r#"        iifname "{prefix}*" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        iifname "{prefix}*" ct state != {{ established, related }} counter drop comment "container-to-host"
"#
        );
    }
    match rules.is_empty() {
        true => rules,
        false => format!(
            "    chain input {{\n        type filter hook input priority -450; policy accept;\n{rules}    }}\n"
        ),
    }
}

/// The sets of the other nodes' underlay addresses.
fn member_sets(around: Surroundings<'_>) -> String {
    let members: Vec<IpAddr> = around
        .nodes
        .values()
        .filter(|node| node.name != around.me.name)
        .map(|node| node.underlay)
        .collect();
    let mut sets = String::from("\n");
    for (name, kind, ipv4) in [("members4", "ipv4_addr", true), ("members6", "ipv6_addr", false)] {
        let elements: Vec<String> =
            members.iter().filter(|a| a.is_ipv4() == ipv4).map(IpAddr::to_string).collect();
        let elements = match elements.is_empty() {
            true => String::new(),
            false => format!(" elements = {{ {} }};", elements.join(", ")),
        };
        let _ = writeln!(sets, "    set {name} {{ type {kind};{elements} }}");
    }
    sets
}

/// A script that puts a table with these rules in the place of the present one, if any.
fn table(rules: &str) -> String {
    let rules = logged(rules);
    format!("table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{{rules}}}\n")
}

/// The rules, where each packet that is dropped or rejected, and counted, is shown to who watches, with its reason.
/// Where nobody does the kernel writes the reason down and finds no listener.
fn logged(rules: &str) -> String {
    let mut logged = String::with_capacity(rules.len());
    for line in rules.split_inclusive('\n') {
        let reason = line.split_once(" comment \"").and_then(|(_, rest)| rest.split('"').next());
        match (line.split_once("counter "), reason) {
            (Some((packets, verdict)), Some(reason)) => {
                let _ = write!(
                    logged,
                    "{packets}counter log prefix \"{reason}\" group {DROP_GROUP} {verdict}"
                );
            }
            _ => logged.push_str(line),
        }
    }
    logged
}
