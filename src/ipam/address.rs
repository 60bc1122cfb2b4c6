//! The addresses of one network: which one comes next, and how many are left.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::model::snapshot::Holder;
use crate::model::subnet::{address_at, width};
use crate::model::{Network, Subnet};

/// Addresses that cannot be given out now.
pub type Taken = BTreeMap<IpAddr, Holder>;

/// Where a search begins. It goes round, so every free address is found from everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At the lowest address.
    First,
    /// Behind the address that was given out last.
    After(IpAddr),
    /// At the address so far into the network's range: a random number spreads the proposals of
    /// nodes that allocate at the same time.
    At(u128),
}

/// The next free address of one family, or `None` when every address that may be given out is
/// taken: usable ones, within the ranges of the subnets that have one.
pub fn next_free(network: &Network, ipv4: bool, taken: &Taken, start: Start) -> Option<IpAddr> {
    let spans: Vec<Span<'_>> = spans(network, ipv4).collect();
    let (first, offset) = position(&spans, start);
    let (before, behind) = spans.split_at(first.min(spans.len()));
    let resumed = behind.first().and_then(|span| span.search(offset, span.size, taken));
    let others =
        || behind.iter().skip(1).chain(before).find_map(|span| span.search(0, span.size, taken));
    let rest = || behind.first().and_then(|span| span.search(0, offset, taken));
    resumed.or_else(others).or_else(rest)
}

/// How a network's addresses of one family are used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Addresses that may be given out; saturates at `u128::MAX`.
    pub usable: u128,
    /// Those that endpoints have.
    pub endpoints: u128,
    /// Those that rest.
    pub resting: u128,
}

/// Counts the addresses of one family.
pub fn count(network: &Network, ipv4: bool, taken: &Taken) -> Count {
    let mut count = Count::default();
    for span in spans(network, ipv4) {
        count.usable = count.usable.saturating_add(span.usable());
    }
    for (address, holder) in taken {
        if address.is_ipv4() == ipv4 && spans(network, ipv4).any(|span| span.contains(*address)) {
            match holder {
                Holder::Endpoint(_) => count.endpoints += 1,
                Holder::Resting => count.resting += 1,
            }
        }
    }
    count
}

/// How many addresses of a subnet may be given out without being asked for; saturates at
/// `u128::MAX`.
pub fn usable(subnet: &Subnet) -> u128 {
    span(subnet).usable()
}

/// The addresses of one subnet that may be given out without being asked for.
struct Span<'a> {
    subnet: &'a Subnet,
    first: IpAddr,
    /// The number of addresses from `first`; at most `u128::MAX`.
    size: u128,
}

fn spans(network: &Network, ipv4: bool) -> impl Iterator<Item = Span<'_>> {
    network.subnets.iter().filter(move |subnet| subnet.cidr().is_ipv4() == ipv4).map(span)
}

fn span(subnet: &Subnet) -> Span<'_> {
    let range = subnet.range().unwrap_or(subnet.cidr());
    Span { subnet, first: range.network(), size: size(range) }
}

fn size(range: IpNetwork) -> u128 {
    let host_bits = u32::from(width(range.network()) - range.prefix());
    1u128.checked_shl(host_bits).unwrap_or(u128::MAX)
}

impl Span<'_> {
    fn search(&self, from: u128, to: u128, taken: &Taken) -> Option<IpAddr> {
        (from..to)
            .map(|offset| address_at(self.first, offset))
            .find(|address| self.subnet.is_usable(*address) && !taken.contains_key(address))
    }

    fn offset(&self, address: IpAddr) -> Option<u128> {
        let offset = match (self.first, address) {
            (IpAddr::V4(first), IpAddr::V4(address)) => {
                u128::from(u32::from(address).checked_sub(first.into())?)
            }
            (IpAddr::V6(first), IpAddr::V6(address)) => u128::from(address).checked_sub(first.into())?,
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return None,
        };
        (offset < self.size).then_some(offset)
    }

    fn contains(&self, address: IpAddr) -> bool {
        self.offset(address).is_some()
    }

    fn usable(&self) -> u128 {
        let cidr = self.subnet.cidr();
        let broadcast = cidr.is_ipv4().then(|| cidr.broadcast());
        let ends = [Some(cidr.network()), broadcast, Some(self.subnet.gateway())];
        let mut excluded: Vec<IpAddr> = ends.into_iter().flatten().collect();
        excluded.extend(self.subnet.reserved());
        excluded.sort();
        excluded.dedup();
        let excluded = excluded.into_iter().filter(|address| self.contains(*address)).count();
        self.size - excluded as u128
    }
}

/// The span and the offset in it at which a search begins.
fn position(spans: &[Span<'_>], start: Start) -> (usize, u128) {
    match start {
        Start::First => (0, 0),
        Start::After(address) => spans
            .iter()
            .enumerate()
            .find_map(|(index, span)| span.offset(address).map(|offset| (index, offset + 1)))
            .unwrap_or((0, 0)),
        Start::At(number) => {
            let total = spans.iter().fold(0u128, |sum, span| sum.saturating_add(span.size));
            let mut offset = number.checked_rem(total).unwrap_or(0);
            for (index, span) in spans.iter().enumerate() {
                if offset < span.size {
                    return (index, offset);
                }
                offset -= span.size;
            }
            (0, 0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn network(subnets: serde_json::Value) -> Network {
        serde_json::from_value(serde_json::json!({
            "id": "0123456789ab", "name": "web", "subnets": subnets, "vni": 1, "uplink": 0,
        }))
        .unwrap()
    }

    fn small() -> Network {
        network(serde_json::json!([
            {"cidr": "10.9.0.0/29", "reserved": ["10.9.0.3"]},
            {"cidr": "fd00:9::/64"},
            {"cidr": "10.9.1.0/28", "range": "10.9.1.8/30"},
        ]))
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Every address that may be given out, by the definition.
    fn all_ipv4(network: &Network) -> Vec<IpAddr> {
        let mut all = Vec::new();
        for subnet in network.subnets.iter().filter(|s| s.cidr().is_ipv4()) {
            all.extend(subnet.range().unwrap_or(subnet.cidr()).iter().filter(|a| subnet.is_usable(*a)));
        }
        all
    }

    #[test]
    fn addresses_come_in_order_and_skip_what_is_not_usable() {
        let (network, mut taken, mut given) = (small(), Taken::new(), Vec::new());
        while let Some(address) = next_free(&network, true, &taken, Start::First) {
            taken.insert(address, Holder::Resting);
            given.push(address);
        }
        assert_eq!(given, all_ipv4(&network));
        assert_eq!(given.len(), 8);
        let count = count(&network, true, &taken);
        assert_eq!(count, Count { usable: 8, endpoints: 0, resting: 8 });
    }

    #[test]
    fn the_search_goes_on_behind_the_last_address_and_round() {
        let (network, taken) = (small(), Taken::new());
        let after = |a: &str| next_free(&network, true, &taken, Start::After(ip(a))).unwrap();
        assert_eq!(after("10.9.0.2"), ip("10.9.0.4"));
        assert_eq!(after("10.9.0.6"), ip("10.9.1.8"));
        assert_eq!(after("10.9.1.11"), ip("10.9.0.2"));
        assert_eq!(after("192.0.2.1"), ip("10.9.0.2"));
    }

    #[test]
    fn families_do_not_mix() {
        let (network, taken) = (small(), Taken::new());
        assert_eq!(next_free(&network, false, &taken, Start::First), Some(ip("fd00:9::2")));
        let only6 = self::network(serde_json::json!([{"cidr": "fd00:9::/64"}]));
        assert_eq!(next_free(&only6, true, &taken, Start::First), None);
        assert_eq!(next_free(&only6, true, &taken, Start::At(7)), None);
    }

    proptest! {
        /// From every start, an address is found exactly when one is free, and it is a free one.
        #[test]
        fn exhaustion_is_reported_only_when_nothing_is_free(
            taken_bits in any::<u16>(),
            start in prop_oneof![
                Just(Start::First),
                any::<u128>().prop_map(Start::At),
                (0u32..512).prop_map(|n| Start::After(IpAddr::V4((0x0a09_0000 + n).into()))),
            ],
        ) {
            let network = small();
            let all = all_ipv4(&network);
            let taken: Taken = all
                .iter()
                .enumerate()
                .filter(|(bit, _)| taken_bits >> bit & 1 == 1)
                .map(|(_, address)| (*address, Holder::Resting))
                .collect();
            match next_free(&network, true, &taken, start) {
                Some(address) => {
                    prop_assert!(all.contains(&address) && !taken.contains_key(&address));
                }
                None => prop_assert_eq!(taken.len(), all.len()),
            }
        }
    }
}
