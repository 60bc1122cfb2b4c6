//! The default pools: a subnet for a network whose creator named none.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::model::subnet::{address_at, overlap, width};

/// The first subnet with this prefix length, in the order of the pools, that overlaps nothing in
/// use; `None` when there is none left.
///
/// Cost grows with the number of subnets in use, not with the size of the pools.
pub fn free_subnet(pools: &[IpNetwork], prefix: u8, in_use: &[IpNetwork]) -> Option<IpNetwork> {
    pools.iter().filter(|pool| pool.prefix() <= prefix).find_map(|&pool| free_in(pool, prefix, in_use))
}

fn free_in(pool: IpNetwork, prefix: u8, in_use: &[IpNetwork]) -> Option<IpNetwork> {
    let mut candidate = IpNetwork::new(pool.network(), prefix).ok()?;
    while pool.contains(candidate.network()) {
        let Some(taken) =
            in_use.iter().find(|used| same_family(**used, pool) && overlap(**used, candidate))
        else {
            return Some(candidate);
        };
        let end = last(*taken).max(last(candidate));
        let next = address_at(end, 1);
        if next <= end {
            return None; // the end of the address space
        }
        candidate = IpNetwork::new(next, prefix).ok()?;
    }
    None
}

fn same_family(a: IpNetwork, b: IpNetwork) -> bool {
    a.is_ipv4() == b.is_ipv4()
}

/// The last address of a range, also for IPv6.
fn last(range: IpNetwork) -> IpAddr {
    let host_bits = u32::from(width(range.network()) - range.prefix());
    let size_minus_one = 1u128.checked_shl(host_bits).map_or(u128::MAX, |size| size - 1);
    address_at(range.network(), size_minus_one)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nets(texts: &[&str]) -> Vec<IpNetwork> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn free(pools: &[&str], prefix: u8, in_use: &[&str]) -> Option<String> {
        free_subnet(&nets(pools), prefix, &nets(in_use)).map(|net| net.to_string())
    }

    #[test]
    fn the_first_subnet_of_the_first_pool_comes_first() {
        assert_eq!(free(&["10.128.0.0/9"], 24, &[]).unwrap(), "10.128.0.0/24");
        assert_eq!(free(&["fd00::/48"], 64, &[]).unwrap(), "fd00::/64");
    }

    #[test]
    fn subnets_in_use_are_skipped_whatever_their_size() {
        let in_use = ["10.128.0.0/24", "10.128.1.7/32", "10.128.2.0/23", "192.0.2.0/24", "fd00::/8"];
        assert_eq!(free(&["10.128.0.0/9"], 24, &in_use).unwrap(), "10.128.4.0/24");
        assert_eq!(free(&["10.128.0.0/9"], 24, &["10.0.0.0/8"]), None);
    }

    #[test]
    fn the_next_pool_follows_a_full_one() {
        let pools = ["10.1.0.0/24", "10.2.0.0/16"];
        assert_eq!(free(&pools, 24, &["10.1.0.0/24"]).unwrap(), "10.2.0.0/24");
        assert_eq!(free(&["10.1.0.0/25"], 24, &[]), None);
    }

    #[test]
    fn the_end_of_the_address_space_ends_the_search() {
        assert_eq!(free(&["255.255.255.0/24"], 25, &["255.255.255.0/24"]), None);
        assert_eq!(
            free(&["255.255.255.0/24"], 25, &["255.255.255.0/25"]).unwrap(),
            "255.255.255.128/25"
        );
    }

    proptest! {
        /// Against the obvious model: try every subnet of the pool in order.
        #[test]
        fn it_finds_what_trying_every_subnet_finds(
            used in prop::collection::vec((0u32..1 << 12, 20u8..=32), 0..40),
            prefix in 20u8..=26,
        ) {
            let pool: IpNetwork = "10.16.0.0/20".parse().unwrap();
            let base = u32::from(std::net::Ipv4Addr::new(10, 16, 0, 0));
            let used: Vec<IpNetwork> = used
                .into_iter()
                .map(|(offset, prefix)| {
                    let net = IpNetwork::new(IpAddr::V4((base + offset).into()), prefix).unwrap();
                    IpNetwork::new(net.network(), prefix).unwrap()
                })
                .collect();
            let model = (0..1u32 << (prefix - 20))
                .map(|n| IpNetwork::new(IpAddr::V4((base + (n << (32 - prefix))).into()), prefix).unwrap())
                .find(|candidate| !used.iter().any(|u| overlap(*u, *candidate)));
            prop_assert_eq!(free_subnet(&[pool], prefix, &used), model);
        }
    }
}
