//! Random histories of a network, step by step over a real store, held against the facts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use netctl::cluster::view::Using;
use netctl::cluster::{Claimed, Cluster, ClusterError, View};
use netctl::model::{NetworkId, Node, NodeName};
use netctl::store::{Lease, Store};
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestCaseResult};

use crate::facts::{Facts, Held, Owner, limits};
use crate::granting::Granting;
use crate::member::{Member, Plan, defaults, name, network_spec, node, node_name, request};

/// Fails the history unless the error is of a sort.
macro_rules! refused {
    ($outcome:expr, $pattern:pat $(if $guard:expr)?) => {{
        let outcome = $outcome;
        prop_assert!(matches!(&outcome, Err($pattern) $(if $guard)?), "{:?}", outcome);
    }};
}

mod keeping;

const NODES: usize = 3;
const REST: Duration = Duration::from_secs(3600);
const KEEP: Duration = Duration::from_secs(20_000);
const ALIVE: Duration = Duration::from_secs(1000);
/// What a network begins with: it may lack a family.
const BEGIN: [&[&str]; 5] = [
    &["10.9.0.0/29", "fd00:9::/124"],
    &["10.9.0.0/28"],
    &["fd00:9::/124"],
    // With parts from which addresses are given, and addresses that nobody gets.
    &["10.9.0.0/27"],
    &["10.9.0.0/27", "fd00:9::/123"],
];
/// What may be added.
const MORE: [&str; 6] =
    ["10.9.0.0/29", "10.9.1.0/29", "fd00:9::/124", "10.9.2.0/28", "fd00:9:1::/124", "10.9.3.0/28"];

/// What may happen to a network that three nodes use. The last of them follows it from its first
/// claim on only.
#[derive(Debug, Clone)]
pub enum Step {
    Claim {
        node: usize,
        name: Option<u8>,
        service: Option<u8>,
        asked: Vec<(bool, u8)>,
    },
    Release {
        node: usize,
        which: usize,
    },
    Withdraw {
        node: usize,
        which: usize,
    },
    Create {
        node: usize,
        service: u8,
        replicas: u32,
        vip: bool,
        surge: bool,
        from: Option<u8>,
    },
    Scale {
        node: usize,
        service: u8,
        replicas: u32,
    },
    Remove {
        node: usize,
        service: u8,
    },
    Reserve {
        node: usize,
        name: u8,
        count: u64,
    },
    EndReservation {
        name: u8,
    },
    EndRest {
        node: usize,
    },
    Expand {
        node: usize,
        which: usize,
    },
    Shrink {
        node: usize,
        which: usize,
    },
    Die {
        node: usize,
    },
    /// It stops where it is, and counts as dead.
    Freeze {
        node: usize,
    },
    /// It comes again: who was frozen with what it knew, others with nothing.
    Return {
        node: usize,
    },
}

pub fn history() -> impl Strategy<Value = (usize, Vec<Step>)> {
    (0..BEGIN.len(), prop::collection::vec(step(), 0..50))
}

fn step() -> impl Strategy<Value = Step> {
    let node = 0..NODES;
    let (which, service) = (any::<usize>(), 0u8..2);
    let asked = prop_oneof![
        6 => Just(Vec::new()),
        1 => (any::<bool>(), 0u8..20).prop_map(|one| vec![one]),
        1 => (0u8..20, 0u8..20).prop_map(|(v4, v6)| vec![(true, v4), (false, v6)]),
    ];
    let claim =
        (node.clone(), prop::option::weighted(0.3, 0u8..4), prop::option::weighted(0.3, 0u8..2), asked);
    let create = (
        node.clone(),
        service.clone(),
        0u32..6,
        any::<bool>(),
        any::<bool>(),
        prop::option::weighted(0.2, 0u8..2),
    );
    prop_oneof![
        16 => claim.prop_map(|(node, name, service, asked)| Step::Claim { node, name, service, asked }),
        6 => (node.clone(), which).prop_map(|(node, which)| Step::Release { node, which }),
        2 => (node.clone(), which).prop_map(|(node, which)| Step::Withdraw { node, which }),
        3 => create.prop_map(|(node, service, replicas, vip, surge, from)| Step::Create { node, service, replicas, vip, surge, from }),
        2 => (node.clone(), service.clone(), 0u32..8).prop_map(|(node, service, replicas)| Step::Scale { node, service, replicas }),
        2 => (node.clone(), service).prop_map(|(node, service)| Step::Remove { node, service }),
        2 => (node.clone(), 0u8..2, 1u64..6).prop_map(|(node, name, count)| Step::Reserve { node, name, count }),
        1 => (0u8..2).prop_map(|name| Step::EndReservation { name }),
        3 => node.clone().prop_map(|node| Step::EndRest { node }),
        1 => (node.clone(), which).prop_map(|(node, which)| Step::Expand { node, which }),
        2 => (node.clone(), which).prop_map(|(node, which)| Step::Shrink { node, which }),
        1 => node.clone().prop_map(|node| Step::Die { node }),
        2 => node.clone().prop_map(|node| Step::Freeze { node }),
        4 => node.prop_map(|node| Step::Return { node }),
    ]
}

/// Lives a history through. Every step ends as the facts say, and the store says the same then.
pub async fn live(store: Arc<dyn Store>, begin: usize, steps: Vec<Step>) -> TestCaseResult {
    let mut world = World::new(store, BEGIN[begin]).await;
    for step in steps {
        let said = format!("{step:?}");
        let taken = world.take(step).await;
        taken.and(world.compare().await).map_err(|error| match error {
            TestCaseError::Fail(reason) => TestCaseError::fail(format!("{said}: {reason}")),
            reject @ TestCaseError::Reject(_) => reject,
        })?;
    }
    Ok(())
}

struct Seat {
    store: Arc<Granting>,
    member: Option<(Member, Option<Using>)>,
    /// What it knew when it was frozen.
    frozen: Option<(Arc<Cluster>, Node)>,
}

struct World {
    raw: Arc<dyn Store>,
    seats: Vec<Seat>,
    network: NetworkId,
    facts: Facts,
    services: BTreeMap<u8, netctl::model::Service>,
    /// The leases of what is kept for a while.
    ends: BTreeMap<u8, Lease>,
}

impl World {
    async fn new(raw: Arc<dyn Store>, subnets: &[&str]) -> Self {
        let mut seats: Vec<Seat> = (0..NODES)
            .map(|_| Seat { store: Granting::new(raw.clone()), member: None, frozen: None })
            .collect();
        let plan = Plan { rest: REST, alive: ALIVE, networks: Vec::new() };
        let first = Member::start(seats[0].store.clone(), &node(0), &plan).await.unwrap();
        let limited = |cidr: &&str| limits(cidr.parse().unwrap());
        let mut spec = network_spec("net", subnets);
        spec.ranges = subnets.iter().filter_map(limited).map(|(range, _)| range).collect();
        spec.reserved = subnets.iter().filter_map(limited).flat_map(|(_, reserved)| reserved).collect();
        let created = first.cluster.create_network(&spec, &defaults()).await;
        let network = created.unwrap().id;
        seats[0].member = Some((first, None));
        let subnets = subnets.iter().map(|text| text.parse().unwrap()).collect();
        let mut world = Self {
            raw,
            seats,
            network,
            facts: Facts { subnets, ..Facts::default() },
            services: BTreeMap::new(),
            ends: BTreeMap::new(),
        };
        world.die(0).await;
        for number in 0..NODES {
            world.come(number).await;
        }
        world
    }

    async fn come(&mut self, number: usize) {
        let networks = if number + 1 < NODES { vec![self.network] } else { Vec::new() };
        if let Some((cluster, node)) = self.seats[number].frozen.take() {
            let lease = cluster.come_alive(node.id, ALIVE).await.unwrap();
            let view = View::start(cluster.clone(), node_name(number), networks);
            self.seats[number].member = Some((Member { cluster, view, node, lease }, None));
            return;
        }
        let plan = Plan { rest: REST, alive: ALIVE, networks };
        let seat = &mut self.seats[number];
        let mut me = node(number);
        if let Some((member, _)) = &seat.member {
            me.id = member.node.id;
        }
        let member = Member::start(seat.store.clone(), &me, &plan).await.unwrap();
        seat.member = Some((member, None));
    }

    /// The node sees and does nothing any more, and its lease ends; what it knew stays.
    async fn freeze(&mut self, number: usize) {
        let known = self.seats[number]
            .member
            .as_ref()
            .map(|(member, _)| (member.cluster.clone(), member.node.clone()));
        self.die(number).await;
        self.seats[number].frozen = known;
    }

    /// The node is gone, and its lease with it.
    async fn die(&mut self, number: usize) {
        let seat = &mut self.seats[number];
        (seat.member, seat.frozen) = (None, None);
        for lease in seat.store.take(|ttl| ttl == ALIVE) {
            self.raw.revoke(lease).await.unwrap();
        }
    }

    fn alive(&self) -> BTreeSet<NodeName> {
        let here = self.seats.iter().enumerate().filter(|(_, seat)| seat.member.is_some());
        here.map(|(number, _)| node_name(number)).collect()
    }

    async fn take(&mut self, step: Step) -> TestCaseResult {
        let (Step::Claim { node, .. }
        | Step::Release { node, .. }
        | Step::Withdraw { node, .. }
        | Step::Create { node, .. }
        | Step::Scale { node, .. }
        | Step::Remove { node, .. }
        | Step::Reserve { node, .. }
        | Step::Expand { node, .. }
        | Step::Shrink { node, .. }
        | Step::Die { node }
        | Step::Freeze { node }
        | Step::EndRest { node }
        | Step::Return { node }) = step
        else {
            let Step::EndReservation { name } = step else { return Ok(()) };
            return self.end_reservation(name).await;
        };
        let here = self.seats[node].member.is_some();
        match step {
            Step::Return { .. } if !here => self.come(node).await,
            Step::EndRest { .. } => {
                let rest = |ttl: Duration| ttl != ALIVE && ttl != KEEP;
                for lease in self.seats[node].store.take(rest) {
                    self.raw.revoke(lease).await.unwrap();
                }
                self.facts.end_rest(node);
            }
            Step::Die { .. } => self.die(node).await,
            _ if !here => {}
            Step::Freeze { .. } => self.freeze(node).await,
            Step::Claim { name, service, asked, .. } => self.claim(node, name, service, asked).await?,
            Step::Release { which, .. } => self.release(node, which, true).await?,
            Step::Withdraw { which, .. } => self.release(node, which, false).await?,
            Step::Create { service, replicas, vip, surge, from, .. } => {
                self.create(node, service, replicas, vip, surge, from).await?;
            }
            Step::Scale { service, replicas, .. } => self.scale(node, service, replicas).await?,
            Step::Remove { service, .. } => self.remove(node, service).await?,
            Step::Reserve { name, count, .. } => self.reserve(node, name, count).await?,
            Step::Expand { which, .. } => self.expand(node, MORE[which % MORE.len()]).await?,
            Step::Shrink { which, .. } => self.shrink(node, MORE[which % MORE.len()]).await?,
            Step::Return { .. } | Step::EndReservation { .. } => {}
        }
        Ok(())
    }

    fn member(&self, number: usize) -> &Member {
        &self.seats[number].member.as_ref().expect("it is here").0
    }

    async fn claim(
        &mut self,
        number: usize,
        wanted: Option<u8>,
        service: Option<u8>,
        asked: Vec<(bool, u8)>,
    ) -> TestCaseResult {
        let first = |ipv4| self.facts.subnets.iter().find(|s: &&IpNetwork| s.is_ipv4() == ipv4);
        let nth = |(ipv4, offset): (bool, u8)| -> Option<IpAddr> {
            first(ipv4)?.iter().nth(usize::from(offset))
        };
        let asked: Vec<IpAddr> = asked.into_iter().filter_map(nth).collect();
        if let Some((member, using @ None)) = &mut self.seats[number].member {
            *using = Some(member.follow(self.network).await.map_err(TestCaseError::fail)?);
        }
        let cluster = self.member(number).cluster.clone();
        let network = cluster.network("net").await.unwrap();
        let request = netctl::cluster::EndpointRequest {
            name: wanted.map(|wanted| name(&format!("box{wanted}"))),
            addresses: asked.clone(),
            service: service.map(|service| name(&format!("s{service}"))),
            ..request()
        };
        let claimed = cluster.claim(&network, &request, &self.alive()).await;
        if asked.iter().any(|address| !self.facts.is_allowed(*address)) {
            refused!(claimed, ClusterError::Address { .. });
            return Ok(());
        }
        if let Some(held) = self.facts.named(wanted) {
            let same = held.node == number
                && held.service == service
                && asked.iter().all(|address| held.addresses.contains(address));
            match same {
                true => prop_assert!(
                    matches!(&claimed, Ok(Claimed::Existing(found)) if found.id == held.id),
                    "{:?}",
                    claimed
                ),
                false => refused!(claimed, ClusterError::EndpointExists { .. }),
            }
            return Ok(());
        }
        self.judge(number, wanted, service, &asked, claimed)
    }

    /// A claim whose name is free succeeds if and only if nothing stands against it.
    fn judge(
        &mut self,
        node: usize,
        name: Option<u8>,
        service: Option<u8>,
        asked: &[IpAddr],
        claimed: Result<Claimed, ClusterError>,
    ) -> TestCaseResult {
        let facts = &self.facts;
        let kept = service.and_then(|service| facts.kept.get(&format!("s{service}")));
        let stranger = service.is_some() && kept.is_none();
        let drawn = kept.filter(|kept| kept.left() > 0).and_then(|kept| kept.service);
        let open = |ipv4: &bool| !asked.iter().any(|address| address.is_ipv4() == *ipv4);
        let full = |ipv4: &bool| {
            let kept_for_others = drawn.is_none() && facts.left() > 0 && facts.free(*ipv4) == 0;
            kept_for_others || (open(ipv4) && facts.unowned(*ipv4) == 0)
        };
        let full: Vec<bool> = facts.families().into_iter().filter(full).collect();
        let taken = |address: &IpAddr| facts.owners.contains_key(address);
        let new = match claimed {
            Ok(Claimed::New(endpoint, _)) => endpoint,
            Err(ClusterError::NotOfService { .. }) => {
                prop_assert!(stranger, "the service has addresses here");
                return Ok(());
            }
            Err(ClusterError::Exhausted { family, count, .. }) => {
                let ipv4 = family == "IPv4";
                prop_assert!(full.contains(&ipv4), "{} is not exhausted: {:?}", family, facts);
                prop_assert_eq!(*count, facts.count(ipv4));
                return Ok(());
            }
            Err(ClusterError::AddressTaken { address, .. }) => {
                prop_assert!(asked.contains(&address) && taken(&address), "{} is free", address);
                return Ok(());
            }
            other => return Err(TestCaseError::fail(format!("{other:?}"))),
        };
        prop_assert!(!stranger && full.is_empty(), "nothing was free for {:?}: {:?}", new, facts);
        let families: Vec<bool> = new.addresses.iter().map(IpAddr::is_ipv4).collect();
        prop_assert_eq!(families, facts.families());
        prop_assert!(asked.iter().all(|address| new.addresses.contains(address)));
        for address in &new.addresses {
            let may_be = facts.is_usable(*address) || asked.contains(address);
            prop_assert!(may_be && !taken(address), "{} twice", address);
        }
        prop_assert_eq!(new.drawn, drawn);
        if let Some(kept) = service.and_then(|s| self.facts.kept.get_mut(&format!("s{s}"))) {
            kept.drawn += u64::from(drawn.is_some());
        }
        let addresses = new.addresses.clone();
        self.facts.owners.extend(addresses.iter().map(|a| (*a, Owner::Endpoint(new.id))));
        self.facts.endpoints.push(Held { id: new.id, name, node, service, drawn, addresses });
        Ok(())
    }

    async fn release(&mut self, node: usize, which: usize, resting: bool) -> TestCaseResult {
        if self.facts.endpoints.is_empty() {
            return Ok(());
        }
        let index = which % self.facts.endpoints.len();
        let id = self.facts.endpoints[index].id;
        let cluster = self.member(node).cluster.clone();
        let endpoints = cluster.endpoints(self.network).await.unwrap();
        let endpoint = endpoints.into_iter().find(|endpoint| endpoint.id == id);
        let Some(endpoint) = endpoint else { return Err(TestCaseError::fail("it was lost")) };
        let mut must_rest = BTreeSet::new();
        for address in &endpoint.addresses {
            if resting || !self.is_in_block_of(node, *address).await {
                must_rest.insert(*address);
            }
        }
        let released = match resting {
            true => cluster.release(&endpoint).await,
            false => cluster.withdraw(&endpoint).await,
        };
        prop_assert!(matches!(released, Ok(Some(_))), "{:?}", released);
        prop_assert!(matches!(cluster.release(&endpoint).await, Ok(None)));
        // A node that does not know its blocks may be more careful.
        let mut rests = BTreeSet::new();
        for address in &endpoint.addresses {
            let key = format!("members/{}/addresses/{address}", self.network);
            if self.raw.get(&key).await.unwrap().is_some() {
                rests.insert(*address);
            }
        }
        prop_assert!(rests.is_superset(&must_rest), "{:?} rest, of {:?}", rests, must_rest);
        self.facts.release(index, node, &rests);
        Ok(())
    }

    /// Whether the store says that an address is in a block of a node.
    async fn is_in_block_of(&self, node: usize, address: IpAddr) -> bool {
        let prefix = format!("members/{}/blocks/", self.network);
        let blocks = self.raw.list(&prefix).await.unwrap().entries;
        blocks.iter().any(|(key, entry)| {
            let range: IpNetwork = key[prefix.len()..].parse().unwrap();
            range.contains(address) && entry.value == format!("\"n{node}\"").as_bytes()
        })
    }
}
