//! Whether what is needed is there.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::compose::Origin;
use super::demand::{Count, Demand, Part};
use crate::ipam::ledger::usable;
use crate::model::Subnet;

/// A family of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// A network's addresses of one family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Stock {
    /// Those that may be given out.
    pub usable: u128,
    /// Those of them that nobody has.
    pub free: u128,
}

impl Stock {
    /// Addresses that nobody has yet.
    fn unused(usable: u128) -> Self {
        Self { usable, free: usable }
    }
}

/// A network's addresses.
pub type Stocks = BTreeMap<Family, Stock>;

/// The addresses of a network with these subnets that nobody uses yet.
pub fn stocks<'a>(subnets: impl IntoIterator<Item = &'a Subnet>) -> Stocks {
    let mut stocks = Stocks::new();
    for subnet in subnets {
        let family = if subnet.cidr().is_ipv4() { Family::Ipv4 } else { Family::Ipv6 };
        let stock = stocks.entry(family).or_default();
        stock.usable = stock.usable.saturating_add(usable(subnet));
        stock.free = stock.usable;
    }
    stocks
}

/// The subnet that a default pool gives to a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PoolSubnet {
    /// Its prefix length.
    pub prefix: u8,
    /// Whether nobody said so: it is what is usual.
    pub assumed: bool,
}

/// What the default pools give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pools {
    /// Of IPv4.
    pub ipv4: PoolSubnet,
    /// Of IPv6.
    pub ipv6: PoolSubnet,
}

impl Pools {
    /// What is usable of a family's subnet: of IPv4 all but its first and last address and the
    /// gateway's; of IPv6 the last one too.
    fn usable(&self, family: Family) -> u128 {
        let (bits, fixed) = match family {
            Family::Ipv4 => (32u8.saturating_sub(self.ipv4.prefix), 3),
            Family::Ipv6 => (128u8.saturating_sub(self.ipv6.prefix), 2),
        };
        1u128.checked_shl(bits.into()).unwrap_or(u128::MAX).saturating_sub(fixed)
    }

    fn of(&self, family: Family) -> PoolSubnet {
        match family {
            Family::Ipv4 => self.ipv4,
            Family::Ipv6 => self.ipv6,
        }
    }
}

/// Whether a deployment fits, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Whether it fits into all networks.
    pub fits: bool,
    /// The networks, by name.
    pub networks: Vec<NetworkVerdict>,
}

/// Whether a deployment fits into one network, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetworkVerdict {
    /// Its name.
    pub name: String,
    /// Whether it is there.
    pub state: State,
    /// Whether there are enough addresses of every family.
    pub fits: bool,
    /// How many addresses of each family are needed.
    pub needed: u64,
    /// What they are needed for.
    #[serde(flatten)]
    pub total: Count,
    /// What is there, by family; nothing where the network is missing.
    pub families: Vec<FamilyVerdict>,
    /// What each service needs.
    pub services: Vec<Part>,
}

/// Whether a network is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is there.
    Exists,
    /// The deployment makes it.
    New,
    /// It is not there, and nobody of the deployment makes it.
    Missing,
}

/// Whether a deployment fits into the addresses of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct FamilyVerdict {
    /// The family.
    pub family: Family,
    /// What there is.
    #[serde(flatten)]
    pub stock: Stock,
    /// The subnet that it will be, where the network is new and the default pool gives it one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolSubnet>,
    /// Whether that is enough.
    pub fits: bool,
    /// How many are missing.
    pub short: u128,
    /// How many more deployments of the same size fit after this one; nothing where this one needs
    /// no address.
    pub more: Option<u128>,
}

impl FamilyVerdict {
    fn new(family: Family, (stock, pool): (Stock, Option<PoolSubnet>), needed: u64) -> Self {
        let needed = u128::from(needed);
        let (short, rest) = (needed.saturating_sub(stock.free), stock.free.saturating_sub(needed));
        Self { family, stock, pool, fits: short == 0, short, more: rest.checked_div(needed) }
    }
}

impl NetworkVerdict {
    /// The family of which least is left, or most missing.
    pub fn tightest(&self) -> Option<&FamilyVerdict> {
        self.families.iter().min_by_key(|each| (u128::MAX - each.short, each.stock.free))
    }
}

/// Judges what is needed by what the networks have; `known` has those that are there, and others get
/// what `pools` give.
pub fn judge(
    demands: BTreeMap<String, Demand>,
    known: &BTreeMap<String, Stocks>,
    pools: &Pools,
) -> Verdict {
    let networks: Vec<NetworkVerdict> = demands
        .into_iter()
        .map(|(name, demand)| {
            let (state, stocks) = match (known.get(&name), &demand.origin) {
                (Some(stocks), _) => (State::Exists, there(stocks.clone())),
                (None, Origin::Stack { subnets, ipv6 }) => {
                    (State::New, new_stocks(subnets, *ipv6, pools))
                }
                (None, Origin::External | Origin::Machine) => (State::Missing, BTreeMap::new()),
            };
            let needed = demand.total.sum();
            let families: Vec<FamilyVerdict> = stocks
                .iter()
                .map(|(family, stock)| FamilyVerdict::new(*family, *stock, needed))
                .collect();
            let fits = state != State::Missing && families.iter().all(|family| family.fits);
            let (total, services) = (demand.total, demand.parts);
            NetworkVerdict { name, state, fits, needed, total, families, services }
        })
        .collect();
    Verdict { fits: networks.iter().all(|network| network.fits), networks }
}

/// What a network has or will have, and of which pool.
type Sources = BTreeMap<Family, (Stock, Option<PoolSubnet>)>;

/// What does not come from a pool.
fn there(stocks: Stocks) -> Sources {
    stocks.into_iter().map(|(family, stock)| (family, (stock, None))).collect()
}

/// What a network will have that a stack makes.
fn new_stocks(subnets: &[Subnet], ipv6: bool, pools: &Pools) -> Sources {
    let mut found = there(stocks(subnets));
    let pool = |family| (Stock::unused(pools.usable(family)), Some(pools.of(family)));
    if subnets.is_empty() {
        found.insert(Family::Ipv4, pool(Family::Ipv4));
    }
    if ipv6 {
        found.entry(Family::Ipv6).or_insert(pool(Family::Ipv6));
    }
    found
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::plan::compose::{Stack, StackName, Tool, read};
    use crate::plan::demand::demands;

    fn subnet(cidr: &str) -> Subnet {
        Subnet::new(cidr.parse().unwrap(), None, None, BTreeSet::new()).unwrap()
    }

    fn stack(name: &str, text: &str) -> Stack {
        read(text, "f", StackName::Given(name), &BTreeMap::new(), &Tool::Any).unwrap()
    }

    /// What is judged of the networks of some stacks, where `web` has so many free addresses.
    fn judged(stacks: &[Stack], free: u128) -> Verdict {
        let stock = Stock { usable: 253, free };
        let known = [("web".to_owned(), Stocks::from([(Family::Ipv4, stock)]))].into();
        judge(demands(stacks, 3), &known, &pools(24, 64))
    }

    fn pools(prefix: u8, prefix6: u8) -> Pools {
        let pool = |prefix| PoolSubnet { prefix, assumed: false };
        Pools { ipv4: pool(prefix), ipv6: pool(prefix6) }
    }

    const WEB: &str = "networks: {default: {external: true, name: web}}\n";

    #[test]
    fn a_deployment_fits_to_the_last_address() {
        let stack = stack("s", &format!("{WEB}services: {{a: {{scale: 9}}}}"));
        for (free, fits, short, more) in [
            (253, true, 0, 24),
            (30, true, 0, 2),
            (29, true, 0, 1),
            (20, true, 0, 1),
            (19, true, 0, 0),
            (10, true, 0, 0),
            (9, false, 1, 0),
            (0, false, 10, 0),
        ] {
            let verdict = judged(std::slice::from_ref(&stack), free);
            let family = verdict.networks[0].families[0];
            assert_eq!((verdict.fits, family.short, family.more), (fits, short, Some(more)), "{free}");
        }
    }

    #[test]
    fn a_network_for_254_machines_does_not_hold_stacks_that_need_383_addresses() {
        let small = "services: {a: {deploy: {endpoint_mode: dnsrr}}}";
        let mut stacks: Vec<Stack> =
            (0..127).map(|n| stack(&format!("s{n}"), &format!("{WEB}{small}"))).collect();
        let services = (0..128).map(|n| format!("  b{n}: {{image: b}}\n")).collect::<String>();
        stacks.push(stack("large", &format!("{WEB}services:\n{services}")));
        let known = [("web".to_owned(), stocks(&[subnet("10.9.0.0/24")]))].into();
        let verdict = judge(demands(&stacks, 3), &known, &pools(24, 64));
        let web = &verdict.networks[0];
        assert!(!verdict.fits && !web.fits);
        assert_eq!((web.total.endpoints, web.total.vips, web.needed), (255, 128, 383));
        assert_eq!((web.families[0].stock.free, web.families[0].short), (253, 130));
        assert_eq!(web.services.len(), 255);

        // Without addresses for the services, two are still missing; with a larger subnet, none.
        let plain = services.replace("image: b", "deploy: {endpoint_mode: dnsrr}");
        stacks[127] = stack("large", &format!("{WEB}services:\n{plain}"));
        assert_eq!(judge(demands(&stacks, 3), &known, &pools(24, 64)).networks[0].families[0].short, 2);
        let known = [("web".to_owned(), stocks(&[subnet("10.9.0.0/23")]))].into();
        assert!(judge(demands(&stacks, 3), &known, &pools(24, 64)).fits);
    }

    #[test]
    fn a_network_that_is_made_has_what_its_subnets_or_the_pool_give() {
        for (declared, expected) in [
            ("{}", &[(Family::Ipv4, 253)][..]),
            ("{ipam: {config: [{subnet: 10.9.0.0/28}]}}", &[(Family::Ipv4, 13)]),
            ("{ipam: {config: [{subnet: 10.9.0.0/28}, {subnet: 10.8.0.0/28}]}}", &[(Family::Ipv4, 26)]),
            ("{ipam: {config: [{subnet: 'fd00::/124'}]}}", &[(Family::Ipv6, 14)]),
            ("{enable_ipv6: true}", &[(Family::Ipv4, 253), (Family::Ipv6, (1 << 64) - 2)]),
            (
                "{enable_ipv6: true, ipam: {config: [{subnet: 10.9.0.0/24, ip_range: 10.9.0.8/30}]}}",
                &[(Family::Ipv4, 4), (Family::Ipv6, (1 << 64) - 2)],
            ),
        ] {
            let text = format!("services: {{a: {{image: a}}}}\nnetworks: {{default: {declared}}}");
            let verdict = judged(&[stack("s", &text)], 0);
            let network = &verdict.networks[0];
            let found: Vec<_> = network.families.iter().map(|f| (f.family, f.stock.free)).collect();
            assert_eq!((network.state, &found[..]), (State::New, expected), "{declared}");
        }
    }

    #[test]
    fn what_a_pool_gives_is_as_large_as_the_configuration_says() {
        let text = "services: {a: {image: a}}\nnetworks: {default: {enable_ipv6: true}}";
        for (cidr, cidr6) in [
            ("10.128.0.0/24", "fd6e:6574:7063::/64"),
            ("10.128.0.0/28", "fd6e:6574:7063::/120"),
            ("10.0.0.0/8", "fd00::/16"),
        ] {
            let (own, own6) = (subnet(cidr), subnet(cidr6));
            let pools = pools(own.cidr().prefix(), own6.cidr().prefix());
            let verdict = judge(demands(&[stack("s", text)], 1), &BTreeMap::new(), &pools);
            let families = &verdict.networks[0].families;
            let found: Vec<u128> = families.iter().map(|family| family.stock.usable).collect();
            assert_eq!(found, [usable(&own), usable(&own6)], "{cidr} {cidr6}");
            let pools: Vec<_> = families.iter().map(|family| family.pool.unwrap().prefix).collect();
            assert_eq!(pools, [own.cidr().prefix(), own6.cidr().prefix()]);
        }
    }

    #[test]
    fn an_external_network_that_is_not_there_fits_nothing() {
        let text = WEB.replace("web", "other") + "services: {a: {image: a}}";
        let verdict = judged(&[stack("s", &text)], 100);
        assert_eq!((verdict.fits, verdict.networks[0].state), (false, State::Missing));
        assert!(verdict.networks[0].tightest().is_none());
    }

    #[test]
    fn the_tightest_family_decides() {
        let stack = stack("s", &format!("{WEB}services: {{a: {{scale: 9}}}}"));
        let stock = |free| Stock { usable: 100, free };
        for (free4, free6, tightest) in
            [(50, 60, Family::Ipv4), (60, 50, Family::Ipv6), (9, 2, Family::Ipv6), (2, 9, Family::Ipv4)]
        {
            let stocks = Stocks::from([(Family::Ipv4, stock(free4)), (Family::Ipv6, stock(free6))]);
            let known = [("web".to_owned(), stocks)].into();
            let verdict = judge(demands(std::slice::from_ref(&stack), 1), &known, &pools(24, 64));
            assert_eq!(verdict.networks[0].tightest().unwrap().family, tightest);
            assert_eq!(verdict.fits, free4 >= 10 && free6 >= 10);
        }
    }

    #[test]
    fn a_verdict_is_json_with_numbers() {
        let stack = stack("s", &format!("{WEB}services: {{a: {{image: a}}}}"));
        let expected = serde_json::json!({
            "fits": true,
            "networks": [{
                "name": "web", "state": "exists", "fits": true,
                "needed": 2, "endpoints": 1, "surge": 0, "vips": 1,
                "families": [{
                    "family": "ipv4", "usable": 253, "free": 5, "fits": true, "short": 0, "more": 1,
                }],
                "services": [{"stack": "s", "service": "a", "endpoints": 1, "surge": 0, "vips": 1}],
            }],
        });
        assert_eq!(serde_json::to_value(judged(&[stack], 5)).unwrap(), expected);
    }
}
