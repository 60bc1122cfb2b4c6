//! What services add to a sandbox's table. Nothing where there is no service.
//!
//! - Packets for an address of which every port is balanced bear its mark, by which IPVS knows them.
//!   It is set after the check of the source and means nothing to anything else.
//! - A backend that its own service leads back to itself sees the gateway as the sender: from its own
//!   address it would take no packet. That is address translation, so what a backend sends to its
//!   services, and to the gateway as the answer, is tracked; all else stays untracked.
//! - What goes to a target outside leaves under the uplink's address, as all that leaves: so packets to
//!   an address with such targets are tracked. Its answers come by the uplink, and what did not begin
//!   here is dropped there. What goes to a backend within the network is tracked no further: its
//!   answers are not seen.
//! - An address without a backend that takes connections refuses a ping.
//! - Every node balances what its own containers send. What another node sends to an address of a
//!   service it does not balance itself, so it would not know the answers: it is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use crate::lb::{Balancer, Front};
use crate::model::{Network, Subnet};

/// The families: the keyword, its number, and whether it is IPv4.
const FAMILIES: [(&str, u8, bool); 2] = [("ip", 4, true), ("ip6", 6, false)];

/// The chain for what comes from another node and is for this sandbox itself: errors only.
const REMOTE: &str = r#"    chain remote {
        icmp type { destination-unreachable, time-exceeded, parameter-problem } accept
        icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem } accept
        meta l4proto tcp counter reject with tcp reset comment "not-balanced-there"
        counter reject with icmpx port-unreachable comment "not-balanced-there"
    }
"#;

/// The sets and maps that the rules ask.
pub(super) fn sets(network: &Network, balancer: &Balancer) -> String {
    let mut text = String::new();
    for (_, number, ipv4) in FAMILIES {
        let kind = format!("ipv{number}_addr");
        let marks = marks(balancer, ipv4);
        if !marks.is_empty() {
            let marks = marks.join(", ");
            let _ = writeln!(
                text,
                "    map marks{number} {{ type {kind} : mark; elements = {{ {marks} }}; }}"
            );
        }
        let tracked = tracked(network, balancer, ipv4);
        if !tracked.is_empty() {
            let tracked = tracked.into_iter().collect::<Vec<_>>().join(", ");
            let _ = writeln!(
                text,
                "    set own{number} {{ type {kind} . {kind}; elements = {{ {tracked} }}; }}"
            );
        }
        let outside = outside(balancer, ipv4);
        if !outside.is_empty() {
            let fronts: BTreeSet<&IpAddr> = outside.iter().map(|(_, front)| front).collect();
            let targets: BTreeSet<&IpAddr> = outside.iter().map(|(target, _)| target).collect();
            for (name, addresses) in [("fronts", fronts), ("outside", targets)] {
                let addresses = list(addresses);
                let _ = writeln!(
                    text,
                    "    set {name}{number} {{ type {kind}; elements = {{ {addresses} }}; }}"
                );
            }
        }
    }
    text
}

/// The rules of the prerouting chain: after the check of the source, before what is not tracked.
pub(super) fn prerouting(network: &Network, balancer: &Balancer) -> String {
    let mut rules = String::new();
    for (family, number, ipv4) in FAMILIES {
        if !marks(balancer, ipv4).is_empty() {
            let _ = writeln!(rules, "        meta mark set {family} daddr map @marks{number}");
        }
        if !tracked(network, balancer, ipv4).is_empty() {
            let gateways = network.subnets.iter().map(|subnet| subnet.gateway());
            let gateways: Vec<String> =
                gateways.filter(|a| a.is_ipv4() == ipv4).map(|gateway| gateway.to_string()).collect();
            let gateways = gateways.join(", ");
            let _ = writeln!(
                rules,
                "        {family} daddr {{ {gateways} }} meta l4proto {{ tcp, udp }} th dport 53 notrack accept"
            );
            let _ = writeln!(rules, "        {family} saddr . {family} daddr @own{number} accept");
        }
        if !outside(balancer, ipv4).is_empty() {
            let _ = writeln!(rules, "        {family} daddr @fronts{number} accept");
        }
    }
    rules
}

/// The input chain, which packets pass before a backend is chosen: what comes from other nodes, and
/// pings of addresses without a backend that takes connections.
pub(super) fn input(balancer: &Balancer) -> String {
    let mut rules = String::new();
    if !balancer.addresses.is_empty() {
        rules.push_str("        iifname \"vx0\" jump remote\n");
    }
    for (family, ipv4, icmp, refusal) in
        [("ip", true, "icmp", "host-unreachable"), ("ip6", false, "icmpv6", "addr-unreachable")]
    {
        let silent = balancer.silent.iter().filter(|address| address.is_ipv4() == ipv4);
        let silent: Vec<String> = silent.map(IpAddr::to_string).collect();
        if !silent.is_empty() {
            let silent = silent.join(", ");
            let _ = writeln!(
                rules,
                "        {family} daddr {{ {silent} }} {icmp} type echo-request counter reject with {icmp} {refusal} comment \"no-backend\""
            );
        }
    }
    match rules.is_empty() {
        true => rules,
        false => format!(
            "{REMOTE}    chain input {{\n        type filter hook input priority filter; policy accept;\n{rules}    }}\n"
        ),
    }
}

/// The output chain, which packets pass whose backend is chosen. Of what a backend sent to its services
/// the answers of others are not tracked, so after the first packet its connection looks like none, and
/// would be taken for another that is in the way of the first. So it is with what goes to a target
/// outside and belongs to no connection: it would leave as it is, or under another port.
pub(super) fn output(network: &Network, balancer: &Balancer) -> String {
    let mut rules = String::new();
    for (family, number, ipv4) in FAMILIES {
        let subnets = network.standing().map(Subnet::cidr).filter(|cidr| cidr.is_ipv4() == ipv4);
        let subnets = list(subnets);
        let leads_outside = !outside(balancer, ipv4).is_empty();
        if leads_outside {
            let _ = writeln!(
                rules,
                "        {family} saddr {{ {subnets} }} {family} daddr @outside{number} ct state {{ invalid, untracked }} counter drop comment \"not-translated\""
            );
        }
        let own = balancer.own.iter().map(|(backend, _)| backend);
        let own: BTreeSet<&IpAddr> = own.filter(|backend| backend.is_ipv4() == ipv4).collect();
        if !own.is_empty() {
            let own: Vec<String> = own.into_iter().map(IpAddr::to_string).collect();
            let looped: Vec<String> = own.iter().map(|own| format!("{own} . {own}")).collect();
            let (own, looped) = (own.join(", "), looped.join(", "));
            let _ = writeln!(rules, "        {family} saddr . {family} daddr {{ {looped} }} accept");
            let _ = writeln!(rules, "        {family} saddr {{ {own} }} notrack");
        }
        if leads_outside {
            let _ = writeln!(rules, "        {family} daddr {{ {subnets} }} notrack");
        }
    }
    match rules.is_empty() {
        true => rules,
        false => format!(
            "    chain output {{\n        type filter hook output priority raw; policy accept;\n{rules}    }}\n"
        ),
    }
}

/// The rules of the postrouting chain: what comes back to its own sender.
pub(super) fn postrouting(network: &Network, balancer: &Balancer) -> String {
    let mut rules = String::new();
    let mut loops: BTreeMap<IpAddr, BTreeSet<IpAddr>> = BTreeMap::new();
    for (backend, _) in &balancer.own {
        if let Some(subnet) = network.subnet_of(*backend) {
            loops.entry(subnet.gateway()).or_default().insert(*backend);
        }
    }
    for (gateway, backends) in loops {
        let family = if gateway.is_ipv4() { "ip" } else { "ip6" };
        let pairs: Vec<String> =
            backends.iter().map(|backend| format!("{backend} . {backend}")).collect();
        let pairs = pairs.join(", ");
        let _ = writeln!(
            rules,
            "        {family} saddr . {family} daddr {{ {pairs} }} snat {family} to {gateway}"
        );
    }
    rules
}

/// The addresses of which every port is balanced, with their marks.
fn marks(balancer: &Balancer, ipv4: bool) -> Vec<String> {
    let mark = |front: &Front| match front {
        Front::All { address, mark } if address.is_ipv4() == ipv4 => {
            Some(format!("{address} : {mark:#010x}"))
        }
        Front::All { .. } | Front::Port { .. } => None,
    };
    balancer.fronts.keys().filter_map(mark).collect()
}

/// The targets outside, each with the addresses behind which it stands.
fn outside(balancer: &Balancer, ipv4: bool) -> Vec<(IpAddr, IpAddr)> {
    balancer.outside.iter().filter(|(target, _)| target.is_ipv4() == ipv4).copied().collect()
}

/// Elements of a set.
fn list(elements: impl IntoIterator<Item = impl ToString>) -> String {
    elements.into_iter().map(|element| element.to_string()).collect::<Vec<_>>().join(", ")
}

/// The pairs of source and destination whose packets are tracked.
fn tracked(network: &Network, balancer: &Balancer, ipv4: bool) -> BTreeSet<String> {
    let own = balancer.own.iter().filter(|(backend, _)| backend.is_ipv4() == ipv4);
    own.flat_map(|(backend, address)| {
        let gateway = network.subnet_of(*backend).map(|subnet| subnet.gateway());
        let ways = [Some(*address), gateway].into_iter().flatten();
        ways.map(move |destination| format!("{backend} . {destination}"))
    })
    .collect()
}
