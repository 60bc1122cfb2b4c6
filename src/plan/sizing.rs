//! How large the subnet of a network should be for what is expected on it.

/// The smallest subnet that is chosen.
const LONGEST: u8 = 28;
/// The largest.
const SHORTEST: u8 = 8;
/// The first and the last address, and the gateway's.
const FIXED: u128 = 3;
/// How many addresses a node may hold that nobody has: half of a block of 16.
const HELD: u128 = 8;
/// The least headroom.
const LEAST: u128 = 16;

/// What is expected on a network at its busiest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expectation {
    /// Containers.
    pub endpoints: u64,
    /// Services that have an address of their own.
    pub services: u64,
    /// Nodes of the cluster.
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
    /// What is wanted beside the addresses in use: a quarter of the endpoints', at least 16, for
    /// containers that start before others stop and for addresses that rest after their release.
    fn headroom(&self) -> u128 {
        u128::from(self.endpoints).div_ceil(4).max(LEAST)
    }

    fn held(&self) -> u128 {
        u128::from(self.nodes) * HELD
    }

    fn total(&self) -> u128 {
        u128::from(self.endpoints) + u128::from(self.services) + self.headroom() + self.held() + FIXED
    }

    /// The sum, for people.
    fn sum(&self) -> String {
        let parts = [
            (u128::from(self.endpoints), "endpoints"),
            (u128::from(self.services), "services"),
            (self.headroom(), "headroom"),
            (self.held(), "held by nodes"),
            (FIXED, "network, broadcast and gateway"),
        ];
        let parts = parts.iter().filter(|(number, _)| *number > 0);
        let parts = parts.map(|(number, what)| format!("{} {what}", grouped(*number)));
        format!("{} = {} addresses", parts.collect::<Vec<_>>().join(" + "), grouped(self.total()))
    }
}

/// The smallest IPv4 subnet that has enough addresses, from a /28 on.
///
/// # Errors
/// When not even a /8 has.
pub fn choose(expected: &Expectation) -> Result<Sizing, TooMany> {
    let total = expected.total();
    match (SHORTEST..=LONGEST).rev().find(|prefix| size(*prefix) >= total) {
        Some(prefix) => {
            let usable = grouped(size(prefix) - FIXED);
            Ok(Sizing { prefix, reason: format!("{}: /{prefix} ({usable} usable)", expected.sum()) })
        }
        None => Err(TooMany { sum: expected.sum() }),
    }
}

/// Whether a subnet that was asked for has fewer addresses than what is expected needs.
pub fn is_too_small(prefix: u8, expected: &Expectation) -> bool {
    size(prefix) < expected.total()
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
    use super::*;
    use proptest::prelude::*;

    fn expected(endpoints: u64, services: u64, nodes: u64) -> Expectation {
        Expectation { endpoints, services, nodes }
    }

    #[test]
    fn the_size_follows_from_a_sum_that_is_shown() {
        for (given, reason) in [
            (
                expected(1000, 100, 10),
                "1,000 endpoints + 100 services + 250 headroom + 80 held by nodes + 3 network, broadcast \
                 and gateway = 1,433 addresses: /21 (2,045 usable)",
            ),
            (
                expected(0, 0, 0),
                "16 headroom + 3 network, broadcast and gateway = 19 addresses: /27 (29 usable)",
            ),
            (
                expected(189, 0, 2),
                "189 endpoints + 48 headroom + 16 held by nodes + 3 network, broadcast and gateway = 256 \
                 addresses: /24 (253 usable)",
            ),
        ] {
            assert_eq!(choose(&given).unwrap().reason, reason);
        }
        assert_eq!(choose(&expected(190, 0, 2)).unwrap().prefix, 23);
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
            endpoints in prop_oneof![0u64..600, 0u64..12_000_000],
            services in 0u64..100_000,
            nodes in 0u64..10_000,
        ) {
            let given = expected(endpoints, services, nodes);
            let prefix = choose(&given).unwrap().prefix;
            prop_assert!((8..=28).contains(&prefix));
            prop_assert!(!is_too_small(prefix, &given));
            prop_assert!(prefix == 28 || is_too_small(prefix + 1, &given));
            // By the definition, in the units of the command line.
            let headroom = (endpoints.div_ceil(4)).max(16);
            prop_assert!((1u64 << (32 - prefix)) >= endpoints + services + headroom + nodes * 8 + 3);
        }
    }
}
