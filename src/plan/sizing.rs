//! How large the subnet of a network should be for what is expected on it.

use crate::ipam::ledger::usable;
use crate::model::Subnet;

/// The smallest subnet that is chosen.
const LONGEST: u8 = 28;
/// The largest.
const SHORTEST: u8 = 8;
/// The first and the last address, and the gateway's.
const FIXED: u128 = 3;
/// The least headroom.
const LEAST: u128 = 16;

/// What is expected on a network at its busiest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expectation {
    /// Containers.
    pub endpoints: u64,
    /// Services that have an address of their own.
    pub services: u64,
    /// Nodes of the cluster; 0: nobody knows.
    pub nodes: u64,
}

/// A size and why it was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizing {
    /// The prefix length of an IPv4 subnet.
    pub prefix: u8,
    /// The sum that led to it, for people.
    pub reason: String,
}

/// More is expected than the largest subnet has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{sum} are more than the largest subnet has, a /{SHORTEST}: give it several subnets")]
pub struct TooMany {
    sum: String,
}

impl Expectation {
    /// What is wanted beside the addresses in use, and why: for containers that start before others
    /// stop, for addresses that rest after their release, and for those that start elsewhere when
    /// their node fails, because what the node has stays taken meanwhile.
    fn headroom(&self) -> (u128, String) {
        let endpoints = u128::from(self.endpoints);
        let quarter = endpoints.div_ceil(4);
        // With one node there is no other to start on.
        let of_node = if self.nodes < 2 { 0 } else { endpoints.div_ceil(self.nodes.into()) };
        if of_node > quarter.max(LEAST) {
            (of_node, format!("headroom (the endpoints of one of {} nodes)", self.nodes))
        } else if quarter > LEAST {
            (quarter, "headroom (a quarter of the endpoints)".to_owned())
        } else {
            (LEAST, "headroom".to_owned())
        }
    }

    /// How many addresses must be usable.
    fn needed(&self) -> u128 {
        u128::from(self.endpoints) + u128::from(self.services) + self.headroom().0
    }

    /// The sum with what else is counted, for people.
    fn sum(&self, fixed: u128) -> String {
        let (headroom, why) = self.headroom();
        let parts = [
            (u128::from(self.endpoints), "endpoints"),
            (u128::from(self.services), "services"),
            (headroom, &why),
            (fixed, "network, broadcast and gateway"),
        ];
        let parts = parts.iter().filter(|(number, _)| *number > 0);
        let parts = parts.map(|(number, what)| format!("{} {what}", grouped(*number)));
        let total = grouped(self.needed() + fixed);
        format!("{} = {total} addresses", parts.collect::<Vec<_>>().join(" + "))
    }
}

/// The smallest IPv4 subnet that has enough addresses, from a /28 on.
///
/// # Errors
/// When not even a /8 has.
pub fn choose(expected: &Expectation) -> Result<Sizing, TooMany> {
    let total = expected.needed() + FIXED;
    match (SHORTEST..=LONGEST).rev().find(|prefix| size(*prefix) >= total) {
        Some(prefix) => {
            let usable = grouped(size(prefix) - FIXED);
            Ok(Sizing {
                prefix,
                reason: format!("{}: /{prefix} ({usable} usable)", expected.sum(FIXED)),
            })
        }
        None => Err(TooMany { sum: expected.sum(FIXED) }),
    }
}

/// Why subnets that were asked for are too small, for people: of a family, all of them together
/// have fewer usable addresses than what is expected needs.
pub fn too_small(subnets: &[Subnet], expected: &Expectation) -> Option<String> {
    let too_small = |(ipv4, family): (bool, &str)| {
        let own: Vec<&Subnet> =
            subnets.iter().filter(|subnet| subnet.cidr().is_ipv4() == ipv4).collect();
        let there = own.iter().fold(0u128, |sum, subnet| sum.saturating_add(usable(subnet)));
        if own.is_empty() || there >= expected.needed() {
            return None;
        }
        let hint = match choose(expected) {
            Ok(Sizing { prefix, .. }) if ipv4 => format!("; a /{prefix} has enough"),
            Ok(_) | Err(_) => String::new(),
        };
        let (there, sum) = (grouped(there), expected.sum(0));
        Some(format!("{there} {family} addresses are usable, and expected are {sum}{hint}"))
    };
    [(true, "IPv4"), (false, "IPv6")].into_iter().find_map(too_small)
}

/// How many addresses an IPv4 subnet has.
fn size(prefix: u8) -> u128 {
    1 << 32u8.saturating_sub(prefix)
}

/// A number with commas between its thousands.
fn grouped(number: u128) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    fn expected(endpoints: u64, services: u64, nodes: u64) -> Expectation {
        Expectation { endpoints, services, nodes }
    }

    /// A subnet, with the part from which addresses are given.
    fn subnet((cidr, range): (&str, Option<&str>)) -> Subnet {
        let range = range.map(|range| range.parse().unwrap());
        Subnet::new(cidr.parse().unwrap(), None, range, BTreeSet::new()).unwrap()
    }

    #[test]
    fn the_size_follows_from_a_sum_that_is_shown() {
        for (given, reason) in [
            (
                expected(1000, 100, 10),
                "1,000 endpoints + 100 services + 250 headroom (a quarter of the endpoints) + 3 network, \
                 broadcast and gateway = 1,353 addresses: /21 (2,045 usable)",
            ),
            (
                expected(1000, 100, 2),
                "1,000 endpoints + 100 services + 500 headroom (the endpoints of one of 2 nodes) + 3 \
                 network, broadcast and gateway = 1,603 addresses: /21 (2,045 usable)",
            ),
            (
                expected(0, 0, 0),
                "16 headroom + 3 network, broadcast and gateway = 19 addresses: /27 (29 usable)",
            ),
            (
                expected(202, 0, 4),
                "202 endpoints + 51 headroom (a quarter of the endpoints) + 3 network, broadcast and \
                 gateway = 256 addresses: /24 (253 usable)",
            ),
        ] {
            assert_eq!(choose(&given).unwrap().reason, reason);
        }
        for (given, prefix) in [((203, 0, 4), 23), ((202, 0, 3), 23), ((202, 0, 1), 24)] {
            assert_eq!(
                choose(&expected(given.0, given.1, given.2)).unwrap().prefix,
                prefix,
                "{given:?}"
            );
        }
    }

    #[test]
    fn subnets_that_are_given_count_together_with_what_is_usable_of_them() {
        let (a, b) = (("10.9.0.0/24", None), ("10.10.0.0/24", None));
        // 300 and a quarter, 75: two /24 have 506.
        let given = expected(300, 0, 4);
        for (subnets, told) in [
            (&[a][..], Some("253 IPv4 addresses are usable")),
            (&[a, b], None),
            (&[a, ("10.10.0.0/24", Some("10.10.0.128/26"))], Some("317 IPv4 addresses are usable")),
            (&[("10.8.0.0/16", None)], None),
            (&[("10.8.0.0/16", Some("10.8.1.0/24"))], Some("256 IPv4 addresses are usable")),
            (&[("fd00::/64", None)], None),
            (&[("fd00::/124", None)], Some("14 IPv6 addresses are usable")),
            (&[a, b, ("fd00::/124", None)], Some("14 IPv6 addresses are usable")),
            (&[], None),
        ] {
            let subnets: Vec<Subnet> = subnets.iter().copied().map(subnet).collect();
            let found = too_small(&subnets, &given);
            assert_eq!(found.is_some(), told.is_some(), "{found:?}");
            assert!(found.unwrap_or_default().starts_with(told.unwrap_or_default()), "{told:?}");
        }
        assert_eq!(
            too_small(&[subnet(a)], &given).unwrap(),
            "253 IPv4 addresses are usable, and expected are 300 endpoints + 75 headroom (a quarter of \
             the endpoints) = 375 addresses; a /23 has enough"
        );
        // Several subnets may have what no single one has.
        let many = ["10.0.0.0/8", "11.0.0.0/8"].map(|cidr| subnet((cidr, None)));
        assert_eq!(too_small(&many, &expected(14_000_000, 0, 0)), None);
    }

    #[test]
    fn what_no_subnet_holds_is_refused() {
        assert_eq!(choose(&expected(13_000_000, 0, 0)).unwrap().prefix, 8);
        for given in [expected(14_000_000, 0, 0), expected(u64::MAX, u64::MAX, u64::MAX)] {
            let error = choose(&given).unwrap_err().to_string();
            assert!(error.contains("more than the largest subnet has, a /8"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn the_chosen_subnet_suffices_and_the_next_smaller_does_not(
            endpoints in prop_oneof![0u64..600, 0u64..8_000_000],
            services in 0u64..100_000,
            nodes in 0u64..10_000,
        ) {
            let given = expected(endpoints, services, nodes);
            let prefix = choose(&given).unwrap().prefix;
            let enough = |prefix: u8| too_small(&[subnet((&format!("10.0.0.0/{prefix}"), None))], &given).is_none();
            prop_assert!((8..=28).contains(&prefix));
            prop_assert!(enough(prefix));
            prop_assert!(prefix == 28 || !enough(prefix + 1));
            // By the definition, in the units of the command line.
            let of_node = if nodes > 1 { endpoints.div_ceil(nodes) } else { 0 };
            let headroom = endpoints.div_ceil(4).max(16).max(of_node);
            prop_assert!((1u64 << (32 - prefix)) >= endpoints + services + headroom + 3);
        }
    }
}
