use proptest::prelude::*;

use super::*;
use crate::model::EndpointId;

fn network(subnets: serde_json::Value) -> Network {
    serde_json::from_value(serde_json::json!({
        "id": "0123456789ab", "name": "web", "subnets": subnets, "vni": 1, "uplink": 0,
    }))
    .unwrap()
}

/// Blocks of two addresses, in a subnet with a reserved one and one with a range.
fn small() -> Network {
    network(serde_json::json!([
        {"cidr": "10.9.0.0/28", "reserved": ["10.9.0.3"], "block_prefix": 31},
        {"cidr": "fd00:9::/64"},
        {"cidr": "10.9.1.0/28", "range": "10.9.1.8/30", "block_prefix": 31},
    ]))
}

fn ledger(network: &Network, node: &str) -> Ledger {
    let mut ledger = Ledger::new(name(node));
    ledger.follow(network);
    ledger
}

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn net(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

fn owned(node: &str, revision: u64) -> Block {
    Block { node: name(node), revision }
}

fn holder() -> Holder {
    Holder::Endpoint("0123456789ab".parse::<EndpointId>().unwrap())
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
fn a_range_that_begins_inside_a_block_is_kept_to() {
    let network = network(serde_json::json!([{"cidr": "10.9.0.0/16", "range": "10.9.0.128/25"}]));
    let mut ledger = ledger(&network, "n1");
    let first = ledger.propose(true, |_| true, 0).unwrap();
    assert_eq!(first.address, ip("10.9.0.128"));
    take(&mut ledger, &first, "n1");
    // As after a start: it does not know what it gave out last.
    let mut fresh = super::Ledger::new(name("n1"));
    fresh.follow(&network);
    fresh.reset(ledger.holders().clone(), ledger.blocks.clone());
    let next = fresh.propose(true, |_| true, 0).unwrap();
    assert_eq!((next.address, next.block), (ip("10.9.0.129"), None));
}

/// Takes what was proposed, as a claim that was committed.
fn take(ledger: &mut Ledger, proposal: &Proposal, node: &str) {
    ledger.hold(proposal.address, holder());
    if let Some(block) = &proposal.block {
        ledger.own(block.range, owned(node, 1));
    }
}

#[test]
fn a_lone_node_gets_every_address_in_order() {
    let network = small();
    let mut ledger = ledger(&network, "n1");
    let mut given = Vec::new();
    while let Some(proposal) = ledger.propose(true, |_| true, 0) {
        take(&mut ledger, &proposal, "n1");
        given.push(proposal.address);
    }
    assert_eq!(given, all_ipv4(&network));
    assert_eq!(ledger.count(true), Count { usable: 16, endpoints: 16, ..Count::default() });
    assert_eq!(ledger.count(true).free(), 0);
}

#[test]
fn a_node_uses_its_own_block_then_takes_another() {
    let mut ledger = ledger(&small(), "n1");
    ledger.own(net("10.9.0.4/31"), owned("n1", 3));
    let mut next = || {
        let proposal = ledger.propose(true, |_| true, 0).unwrap();
        (proposal.address, proposal.block.map(|block| block.range))
    };
    assert_eq!(next(), (ip("10.9.0.4"), None));
    assert_eq!(next(), (ip("10.9.0.5"), None));
    // The first block has the subnet's own address and the gateway only.
    assert_eq!(next(), (ip("10.9.0.2"), Some(net("10.9.0.2/31"))));
}

#[test]
fn an_address_that_was_freed_comes_late_again() {
    let mut ledger = ledger(&network(serde_json::json!([{"cidr": "10.9.0.0/24"}])), "n1");
    ledger.own(net("10.9.0.0/29"), owned("n1", 3));
    let first = ledger.propose(true, |_| true, 0).unwrap().address;
    ledger.withdraw(first);
    let others: Vec<IpAddr> =
        (0..5).map(|_| ledger.propose(true, |_| true, 0).unwrap().address).collect();
    assert!(!others.contains(&first), "{others:?}");
    assert_eq!(ledger.propose(true, |_| true, 0).unwrap().address, first);
}

/// A subnet of which another node has all blocks; it holds an address in the first.
fn crowded() -> Ledger {
    let network = network(serde_json::json!([{"cidr": "10.9.0.0/29", "block_prefix": 31}]));
    let mut ledger = ledger(&network, "n1");
    for (block, revision) in
        [("10.9.0.2/31", 5), ("10.9.0.4/31", 6), ("10.9.0.6/31", 7), ("10.9.0.0/31", 8)]
    {
        ledger.own(net(block), owned("n2", revision));
    }
    ledger.hold(ip("10.9.0.2"), holder());
    ledger
}

#[test]
fn an_empty_block_of_a_node_that_has_others_is_taken_over() {
    let proposal = crowded().propose(true, |_| true, 0).unwrap();
    let block = Some(NewBlock { range: net("10.9.0.4/31"), from: Some(6) });
    assert_eq!(proposal, Proposal { address: ip("10.9.0.4"), block });
}

#[test]
fn the_only_block_of_a_node_is_taken_over_when_the_node_is_dead() {
    let network = network(serde_json::json!([{"cidr": "10.9.0.0/30", "block_prefix": 30}]));
    let mut ledger = ledger(&network, "n1");
    ledger.own(net("10.9.0.0/30"), owned("n2", 5));
    let alive = ledger.clone().propose(true, |_| true, 0).unwrap();
    assert_eq!(alive, Proposal { address: ip("10.9.0.2"), block: None });
    let dead = ledger.propose(true, |_| false, 0).unwrap();
    assert_eq!(dead.block, Some(NewBlock { range: net("10.9.0.0/30"), from: Some(5) }));
}

#[test]
fn the_last_addresses_are_borrowed() {
    let mut ledger = crowded();
    for address in ["10.9.0.4", "10.9.0.6"] {
        ledger.hold(ip(address), Holder::Resting);
    }
    let mut borrowed = Vec::new();
    while let Some(proposal) = ledger.propose(true, |_| false, 3) {
        assert_eq!(proposal.block, None);
        borrowed.push(proposal.address);
    }
    borrowed.sort();
    assert_eq!(borrowed, [ip("10.9.0.3"), ip("10.9.0.5")]);
    ledger.release(ip("10.9.0.6"));
    // Its block is empty now.
    let block = Some(NewBlock { range: net("10.9.0.6/31"), from: Some(7) });
    assert_eq!(ledger.propose(true, |_| false, 0), Some(Proposal { address: ip("10.9.0.6"), block }));
}

#[test]
fn nobody_gets_what_is_released_without_being_usable() {
    let mut ledger = ledger(&small(), "n1");
    for address in ["10.9.0.0", "10.9.0.1", "10.9.0.3", "10.9.0.15", "192.0.2.1"] {
        ledger.hold(ip(address), Holder::Resting);
        ledger.release(ip(address));
    }
    let mut given = Vec::new();
    while let Some(proposal) = ledger.propose(true, |_| true, 0) {
        given.push(proposal.address);
        take(&mut ledger, &proposal, "n1");
    }
    assert_eq!(given, all_ipv4(&small()));
}

#[test]
fn families_do_not_mix() {
    let mut ledger = ledger(&small(), "n1");
    assert_eq!(ledger.propose(false, |_| true, 0).unwrap().address, ip("fd00:9::2"));
    let mut only6 = self::ledger(&network(serde_json::json!([{"cidr": "fd00:9::/64"}])), "n1");
    assert_eq!(only6.propose(true, |_| true, 0), None);
    assert_eq!(only6.count(true), Count::default());
    assert_eq!(only6.count(false).usable, (1 << 64) - 2);
}

#[test]
fn a_subnet_that_is_added_keeps_what_is_known() {
    let mut ledger = ledger(&network(serde_json::json!([{"cidr": "10.9.0.0/30"}])), "n1");
    let first = ledger.propose(true, |_| true, 0).unwrap();
    take(&mut ledger, &first, "n1");
    assert_eq!(ledger.propose(true, |_| true, 0), None);
    // What is held may be heard of before the subnet is.
    ledger.hold(ip("10.9.1.2"), Holder::Resting);
    let subnets = serde_json::json!([{"cidr": "10.9.0.0/30"}, {"cidr": "10.9.1.0/29"}]);
    ledger.follow(&network(subnets));
    assert_eq!(ledger.propose(true, |_| true, 0).unwrap().address, ip("10.9.1.3"));
    assert_eq!(ledger.count(true), Count { usable: 6, endpoints: 1, resting: 1, ..Count::default() });
    assert_eq!(ledger.blocks().len(), 1);
}

#[test]
fn what_subnets_and_nodes_have_is_counted() {
    let mut ledger = ledger(&small(), "n1");
    for (address, holder) in [
        ("10.9.0.2", holder()),
        ("10.9.0.4", Holder::Service("0123456789ab".parse().unwrap())),
        ("10.9.0.5", Holder::Resting),
        // Kept from everybody, and outside of the range: who asks for such an address may have it.
        ("10.9.0.3", holder()),
        ("10.9.1.2", holder()),
        ("10.9.1.8", holder()),
    ] {
        ledger.hold(ip(address), holder);
    }
    // Another holder of the same address is not one more.
    ledger.hold(ip("10.9.1.8"), Holder::Resting);
    ledger.hold(ip("10.9.1.9"), holder());
    ledger.release(ip("10.9.1.9"));
    for (range, node) in [
        ("10.9.0.2/31", "n1"),
        ("10.9.0.8/31", "n1"),
        ("10.9.1.8/31", "n2"),
        ("10.9.0.4/31", "n2"),
        ("fd00:9::/120", "n2"),
        ("10.8.0.0/31", "n3"),
    ] {
        ledger.own(net(range), owned(node, 1));
    }
    let by_subnet: Vec<_> = ledger.by_subnet().collect();
    let none = Count::default();
    let counts = [
        (Count { usable: 12, endpoints: 1, services: 1, resting: 1, ..none }, 1),
        (Count { usable: (1 << 64) - 2, ..none }, 0),
        (Count { usable: 4, resting: 1, ..none }, 0),
    ];
    assert_eq!(
        by_subnet.iter().map(|subnet| (subnet.count, subnet.excluded)).collect::<Vec<_>>(),
        counts
    );
    assert_eq!(by_subnet[2].cidr, net("10.9.1.0/28"));
    let of = |ipv4: bool, node: &str| ledger.by_node(ipv4).get(&name(node)).copied();
    let count = |blocks, free| Some(NodeCount { blocks, free });
    assert_eq!((of(true, "n1"), of(true, "n2")), (count(2, 2), count(2, 1)));
    assert_eq!((of(false, "n1"), of(false, "n2")), (None, count(1, 254)));
    // Outside of all subnets there is nothing to give.
    assert_eq!(of(true, "n3"), count(1, 0));
}

/// Counts again by the definition.
fn as_counted_one_by_one(
    ledger: &Ledger,
    network: &Network,
    held: &BTreeMap<IpAddr, Holder>,
    blocks: &Blocks,
) -> Result<(), TestCaseError> {
    let all = all_ipv4(network);
    for (subnet, counted) in network.subnets.iter().zip(ledger.by_subnet()) {
        let held = held.iter().filter(|(a, _)| subnet.cidr().contains(**a) && all.contains(a));
        let (rest, taken): (Vec<_>, Vec<_>) = held.partition(|(_, holder)| **holder == Holder::Resting);
        if subnet.cidr().is_ipv4() {
            let found = (counted.count.resting, counted.count.endpoints);
            prop_assert_eq!(found, (rest.len() as u128, taken.len() as u128));
        }
    }
    for (node, counted) in ledger.by_node(true) {
        let own = blocks.iter().filter(|(range, block)| range.is_ipv4() && block.node == *node);
        let own: Vec<&IpNetwork> = own.map(|(range, _)| range).collect();
        let inside = |address: &IpAddr| own.iter().any(|range| range.contains(*address));
        let free = all.iter().filter(|a| inside(a) && !held.contains_key(a)).count();
        prop_assert_eq!((counted.blocks, counted.free), (own.len() as u128, free as u128));
    }
    Ok(())
}

/// What may happen to a network that three nodes use, each with a ledger of its own that hears of
/// the others' doings late.
#[derive(Debug, Clone)]
enum Happening {
    Claim { node: usize, ipv4: bool },
    Release { which: usize, rests: bool },
    EndRest { which: usize },
    Hear { node: usize, until: usize },
    Die { node: usize },
    Return { node: usize },
    Expand,
}

fn happening() -> impl Strategy<Value = Happening> {
    let node = 0usize..3;
    prop_oneof![
        8 => (node.clone(), prop::bool::weighted(0.8)).prop_map(|(node, ipv4)| Happening::Claim { node, ipv4 }),
        3 => (any::<usize>(), any::<bool>()).prop_map(|(which, rests)| Happening::Release { which, rests }),
        2 => any::<usize>().prop_map(|which| Happening::EndRest { which }),
        4 => (node.clone(), 1usize..6).prop_map(|(node, until)| Happening::Hear { node, until }),
        1 => node.clone().prop_map(|node| Happening::Die { node }),
        1 => node.prop_map(|node| Happening::Return { node }),
        1 => Just(Happening::Expand),
    ]
}

#[derive(Debug, Clone)]
enum News {
    Held(IpAddr, Holder),
    Free(IpAddr),
    Block(IpNetwork, Block),
    Network(Network),
}

/// The store: the truth, and what it told.
#[derive(Default)]
struct Truth {
    held: BTreeMap<IpAddr, Holder>,
    blocks: BTreeMap<IpNetwork, Block>,
    log: Vec<News>,
    revision: u64,
}

impl Truth {
    fn tell(&mut self, news: News) {
        self.revision += 1;
        self.log.push(news);
    }

    /// The transaction of a claim.
    fn commit(&mut self, node: &str, proposal: &Proposal) -> bool {
        let block_stands = proposal
            .block
            .as_ref()
            .is_none_or(|block| self.blocks.get(&block.range).map(|found| found.revision) == block.from);
        if self.held.contains_key(&proposal.address) || !block_stands {
            return false;
        }
        self.held.insert(proposal.address, holder());
        self.tell(News::Held(proposal.address, holder()));
        if let Some(block) = &proposal.block {
            let owner = owned(node, self.revision);
            self.blocks.insert(block.range, owner.clone());
            self.tell(News::Block(block.range, owner));
        }
        true
    }
}

fn hear(ledger: &mut Ledger, news: &News) {
    match news.clone() {
        News::Held(address, holder) => ledger.hold(address, holder),
        News::Free(address) => ledger.release(address),
        News::Block(range, block) => ledger.own(range, block),
        News::Network(network) => ledger.follow(&network),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Against the obvious model: nothing that is taken is given out, and a claim fails if and only
    /// if nothing is free.
    #[test]
    fn histories_of_three_nodes(history in prop::collection::vec(happening(), 0..120)) {
        const NAMES: [&str; 3] = ["n1", "n2", "n3"];
        let mut network = small();
        let mut truth = Truth::default();
        let mut ledgers = NAMES.map(|name| ledger(&network, name));
        let mut heard = [0usize; 3];
        let mut alive = [true; 3];
        for happening in history {
            match happening {
                Happening::Claim { node, ipv4 } if alive[node] => {
                    let living = |name: &NodeName| {
                        NAMES.iter().position(|n| name.as_str() == *n).is_some_and(|index| alive[index])
                    };
                    let mut listed = false;
                    let mut spread = 0;
                    let got = loop {
                        let Some(proposal) = ledgers[node].propose(ipv4, living, spread) else {
                            if listed {
                                break None;
                            }
                            // All that the store has is read before a claim fails.
                            listed = true;
                            heard[node] = truth.log.len();
                            ledgers[node].follow(&network);
                            ledgers[node].reset(truth.held.clone(), truth.blocks.clone());
                            continue;
                        };
                        prop_assert_eq!(proposal.address.is_ipv4(), ipv4);
                        let subnet = network.subnet_of(proposal.address).unwrap();
                        prop_assert!(subnet.is_usable(proposal.address));
                        if truth.commit(NAMES[node], &proposal) {
                            break Some(proposal);
                        }
                        // It looks again at what was in the way.
                        ledgers[node].withdraw(proposal.address);
                        match truth.held.get(&proposal.address) {
                            Some(holder) => ledgers[node].hold(proposal.address, *holder),
                            None => ledgers[node].release(proposal.address),
                        }
                        if let Some(block) = &proposal.block {
                            match truth.blocks.get(&block.range) {
                                Some(owner) => ledgers[node].own(block.range, owner.clone()),
                                None => ledgers[node].disown(block.range),
                            }
                        }
                        spread += 7;
                        prop_assert!(spread < 7 * 64, "a claim goes on and on");
                    };
                    match got {
                        Some(proposal) => take(&mut ledgers[node], &proposal, NAMES[node]),
                        None => {
                            prop_assert!(ipv4);
                            let free = |a: &IpAddr| !truth.held.contains_key(a);
                            prop_assert!(!all_ipv4(&network).iter().any(free));
                        }
                    }
                }
                Happening::Claim { .. } => {}
                Happening::Release { which, rests } if !truth.held.is_empty() => {
                    let address = *truth.held.keys().nth(which % truth.held.len()).unwrap();
                    if rests {
                        truth.held.insert(address, Holder::Resting);
                        truth.tell(News::Held(address, Holder::Resting));
                    } else {
                        truth.held.remove(&address);
                        truth.tell(News::Free(address));
                    }
                }
                Happening::EndRest { which } => {
                    let resting = truth.held.iter().filter(|(_, holder)| **holder == Holder::Resting);
                    let resting: Vec<IpAddr> = resting.map(|(address, _)| *address).collect();
                    if !resting.is_empty() {
                        let address = resting[which % resting.len()];
                        truth.held.remove(&address);
                        truth.tell(News::Free(address));
                    }
                }
                Happening::Release { .. } => {}
                Happening::Hear { node, until } => {
                    for news in truth.log.iter().skip(heard[node]).take(until) {
                        hear(&mut ledgers[node], news);
                        heard[node] += 1;
                    }
                }
                Happening::Die { node } => alive[node] = false,
                // It comes back with what it knew.
                Happening::Return { node } => alive[node] = true,
                Happening::Expand if network.subnets.len() == 3 => {
                    let more = serde_json::json!([{"cidr": "10.9.2.0/29", "block_prefix": 31}]);
                    network.subnets.extend(self::network(more).subnets);
                    truth.tell(News::Network(network.clone()));
                }
                Happening::Expand => {}
            }
        }
        // Who has heard of everything knows the truth.
        for (ledger, heard) in ledgers.iter_mut().zip(heard) {
            truth.log.iter().skip(heard).for_each(|news| hear(ledger, news));
            ledger.follow(&network);
            prop_assert_eq!(ledger.holders(), &truth.held);
            prop_assert_eq!(ledger.blocks(), &truth.blocks);
            let held = truth.held.keys().filter(|a| all_ipv4(&network).contains(a)).count() as u128;
            let count = ledger.count(true);
            prop_assert_eq!(count.endpoints + count.resting, held);
            prop_assert_eq!(count.usable, all_ipv4(&network).len() as u128);
            as_counted_one_by_one(ledger, &network, &truth.held, &truth.blocks)?;
        }
    }
}
