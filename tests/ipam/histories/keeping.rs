//! What is kept, subnets that come and go, and the store as the facts say it must be.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netctl::cluster::{ClusterError, Expanded};
use netctl::model::{EndpointMode, ExpandSpec, ServiceSpec, UpdateOrder};
use proptest::test_runner::{TestCaseError, TestCaseResult};
use proptest::{prop_assert, prop_assert_eq};

use super::{KEEP, World};
use crate::facts::{Held, Kept, Owner, limits};
use crate::member::name;

impl World {
    pub(super) async fn create(
        &mut self,
        node: usize,
        service: u8,
        replicas: u32,
        vip: bool,
        surge: bool,
        from: Option<u8>,
    ) -> TestCaseResult {
        let own = format!("s{service}");
        let spec = ServiceSpec {
            name: name(&own),
            networks: vec!["net".to_owned()],
            replicas,
            endpoint_mode: if vip { EndpointMode::Vip } else { EndpointMode::Dnsrr },
            update_order: if surge { UpdateOrder::StartFirst } else { UpdateOrder::StopFirst },
            update_parallelism: 1,
            addresses: Vec::new(),
            external: Vec::new(),
            balancing: Default::default(),
            health: None,
            reservation: from.map(|from| name(&format!("r{from}"))),
            labels: BTreeMap::new(),
        };
        let created = self.member(node).cluster.create_service(&spec, &self.alive()).await;
        if self.facts.kept.contains_key(&own) {
            refused!(created, ClusterError::ServiceExists(_));
            return Ok(());
        }
        let from = from.map(|from| format!("r{from}"));
        let source = from.as_ref().map(|from| self.facts.kept.get(from));
        if source.is_some_and(|source| source.is_none()) {
            refused!(created, ClusterError::ServiceInvalid(_));
            return Ok(());
        }
        let count = u64::from(replicas + u32::from(surge && replicas > 0));
        let needed = count + u64::from(vip);
        let moved = source.flatten().map_or(0, |source| source.left().min(needed));
        if self.is_too_much(needed, moved) {
            return self.told_too_few(created.map(drop), needed, moved);
        }
        let Ok(made) = created else { return Err(TestCaseError::fail(format!("{created:?}"))) };
        let addresses = made.addresses.get(&self.network).cloned().unwrap_or_default();
        let families: Vec<bool> = addresses.iter().map(IpAddr::is_ipv4).collect();
        prop_assert_eq!(families, if vip { self.facts.families() } else { Vec::new() });
        for address in &addresses {
            prop_assert!(self.facts.is_usable(*address) && !self.facts.owners.contains_key(address));
        }
        self.facts.owners.extend(addresses.iter().map(|a| (*a, Owner::Service(made.id))));
        if let Some(from) = from {
            let source = self.facts.kept.entry(from.clone()).or_default();
            source.drawn += moved;
            if source.left() == 0 {
                self.facts.kept.remove(&from);
            }
        }
        self.facts.kept.insert(own, Kept { service: Some(made.id), count, drawn: 0 });
        self.services.insert(service, made);
        Ok(())
    }

    fn is_too_much(&self, asked: u64, moved: u64) -> bool {
        self.short_of(asked, moved).is_some()
    }

    /// The first family that has fewer free addresses than are asked for.
    fn short_of(&self, asked: u64, moved: u64) -> Option<bool> {
        let lacks = |ipv4: &bool| {
            let kept = self.facts.left() - u128::from(moved);
            u128::from(asked) > self.facts.unowned(*ipv4).saturating_sub(kept)
        };
        self.facts.families().into_iter().find(lacks)
    }

    /// The numbers of a refusal are the facts'.
    fn told_too_few(
        &self,
        outcome: Result<(), ClusterError>,
        wanted: u64,
        moved: u64,
    ) -> TestCaseResult {
        let Err(ClusterError::TooFew { family, asked, count, .. }) = outcome else {
            return Err(TestCaseError::fail(format!("{wanted} given: {:?}: {outcome:?}", self.facts)));
        };
        let ipv4 = self.short_of(wanted, moved).expect("it was too much");
        let mut right = self.facts.count(ipv4);
        right.reserved -= u128::from(moved);
        prop_assert_eq!((family, asked), (if ipv4 { "IPv4" } else { "IPv6" }, u128::from(wanted)));
        prop_assert_eq!(*count, right);
        Ok(())
    }

    pub(super) async fn scale(&mut self, node: usize, service: u8, replicas: u32) -> TestCaseResult {
        let own = format!("s{service}");
        let scaled = self.member(node).cluster.scale_service(&name(&own), replicas).await;
        let Some(before) = self.facts.kept.get(&own) else {
            refused!(scaled, ClusterError::NoService(_));
            return Ok(());
        };
        let surge = self.services[&service].update_order == UpdateOrder::StartFirst && replicas > 0;
        let after = Kept { count: u64::from(replicas + u32::from(surge)), ..before.clone() };
        let more = after.left().saturating_sub(before.left());
        if self.is_too_much(more, 0) {
            return self.told_too_few(scaled.map(drop), more, 0);
        }
        prop_assert!(scaled.is_ok(), "{:?}: {:?}", scaled, self.facts);
        self.facts.kept.insert(own, after);
        Ok(())
    }

    pub(super) async fn remove(&mut self, node: usize, service: u8) -> TestCaseResult {
        let own = format!("s{service}");
        let removed = self.member(node).cluster.remove_service(&name(&own)).await;
        if self.facts.kept.remove(&own).is_none() {
            refused!(removed, ClusterError::NoService(_));
            return Ok(());
        }
        prop_assert!(removed.is_ok(), "{:?}", removed);
        let gone = self.services.remove(&service).expect("it was there").id;
        for owner in self.facts.owners.values_mut().filter(|owner| **owner == Owner::Service(gone)) {
            *owner = Owner::Resting(node);
        }
        Ok(())
    }

    pub(super) async fn reserve(&mut self, node: usize, number: u8, count: u64) -> TestCaseResult {
        let own = format!("r{number}");
        let wanted = BTreeMap::from([("net".to_owned(), count)]);
        let reserved = self.member(node).cluster.reserve(&name(&own), &wanted, KEEP).await;
        let lease = self.seats[node].store.take(|ttl| ttl == KEEP).pop().expect("a lease");
        if self.facts.kept.contains_key(&own) {
            refused!(reserved, ClusterError::ServiceInvalid(_));
        } else if self.is_too_much(count, 0) {
            return self.told_too_few(reserved, count, 0);
        } else {
            prop_assert!(reserved.is_ok(), "{:?}: {:?}", reserved, self.facts);
            self.facts.kept.insert(own, Kept { service: None, count, drawn: 0 });
            self.ends.insert(number, lease);
        }
        Ok(())
    }

    pub(super) async fn end_reservation(&mut self, number: u8) -> TestCaseResult {
        if let Some(lease) = self.ends.remove(&number) {
            self.raw.revoke(lease).await.unwrap();
            self.facts.kept.remove(&format!("r{number}"));
        }
        Ok(())
    }

    pub(super) async fn expand(&mut self, node: usize, subnet: &str) -> TestCaseResult {
        let spec = serde_json::json!({ "subnets": [subnet] });
        let mut spec: ExpandSpec = serde_json::from_value(spec).expect("it is one");
        let subnet: IpNetwork = subnet.parse().expect("it is one");
        if let Some((range, reserved)) = limits(subnet) {
            (spec.ranges, spec.reserved) = (vec![range], reserved);
        }
        let expanded = self.member(node).cluster.expand_network("net", &spec).await;
        let overlaps = |own: &IpNetwork| own.contains(subnet.ip()) || subnet.contains(own.ip());
        if self.facts.subnets.contains(&subnet) {
            prop_assert!(matches!(expanded, Ok(Expanded::Unchanged(_))), "{:?}", expanded);
        } else if !self.facts.has(subnet.is_ipv4()) {
            refused!(expanded, ClusterError::NewFamily { .. });
        } else if self.facts.subnets.iter().any(overlaps) {
            refused!(expanded, ClusterError::SubnetOverlaps { .. });
        } else {
            prop_assert!(matches!(expanded, Ok(Expanded::Changed(_))), "{:?}", expanded);
            self.facts.subnets.push(subnet);
        }
        Ok(())
    }

    pub(super) async fn shrink(&mut self, node: usize, subnet: &str) -> TestCaseResult {
        let subnet: IpNetwork = subnet.parse().expect("it is one");
        let shrunk = self.member(node).cluster.shrink_network("net", subnet).await;
        let facts = &mut self.facts;
        if !facts.subnets.contains(&subnet) {
            refused!(shrunk, ClusterError::NoSubnet { .. });
            return Ok(());
        }
        if facts.subnets.len() == 1 {
            refused!(shrunk, ClusterError::LastSubnet { .. });
            return Ok(());
        }
        let inside = facts.owners.iter().filter(|(address, _)| subnet.contains(**address));
        let (rest, taken): (Vec<_>, Vec<_>) =
            inside.map(|(_, owner)| *owner).partition(|owner| matches!(owner, Owner::Resting(_)));
        if !rest.is_empty() || !taken.is_empty() {
            refused!(shrunk, ClusterError::SubnetInUse { endpoints, resting, .. }
                if (*endpoints, *resting) == (taken.len(), rest.len()));
            return Ok(());
        }
        let others: Vec<IpNetwork> =
            facts.subnets.iter().copied().filter(|other| *other != subnet).collect();
        let count = facts.count_of(&others, subnet.is_ipv4());
        let there = count.usable - count.endpoints - count.services - count.resting;
        if count.reserved > there {
            refused!(shrunk, ClusterError::SubnetReserved { reserved, short, .. }
                if (*reserved, *short) == (count.reserved, count.reserved - there));
            return Ok(());
        }
        prop_assert!(shrunk.is_ok(), "{:?}", shrunk);
        facts.subnets = others;
        Ok(())
    }

    /// The store has what the facts say, and nothing else.
    pub(super) async fn compare(&self) -> TestCaseResult {
        let prefix = format!("members/{}/", self.network);
        let listing = self.raw.list(&prefix).await.unwrap();
        let mut found: BTreeMap<String, String> = BTreeMap::new();
        for (key, entry) in listing.entries {
            let key = key.strip_prefix(&prefix).expect("it has it").to_owned();
            let value = String::from_utf8(entry.value).expect("text");
            let read = serde_json::from_str(&value).unwrap_or_default();
            match key.split('/').next() {
                Some("addresses") => drop(found.insert(key, value)),
                Some("endpoints") => drop(found.insert(key, addresses(&read))),
                Some("names") if key.starts_with("names/box") => drop(found.insert(key, value)),
                Some("reservations") => drop(found.insert(key, numbers(&read))),
                _ => {}
            }
        }
        prop_assert_eq!(found, self.expected());
        let locals = self.raw.list("local/").await.unwrap().entries.into_keys();
        let local = |held: &Held| format!("local/n{}/{}/{}", held.node, self.network, held.id);
        let expected: BTreeSet<String> = self.facts.endpoints.iter().map(local).collect();
        prop_assert_eq!(locals.collect::<BTreeSet<_>>(), expected);
        Ok(())
    }

    fn expected(&self) -> BTreeMap<String, String> {
        let owned = self.facts.owners.iter().map(|(address, owner)| {
            let value = match owner {
                Owner::Endpoint(id) => format!("\"{id}\""),
                Owner::Service(id) => format!("{{\"service\":\"{id}\"}}"),
                Owner::Resting(_) => String::new(),
            };
            (format!("addresses/{address}"), value)
        });
        let endpoints = self.facts.endpoints.iter().map(|held| {
            let addresses: Vec<String> = held.addresses.iter().map(IpAddr::to_string).collect();
            (format!("endpoints/{}", held.id), addresses.join(" "))
        });
        let named =
            self.facts.endpoints.iter().filter_map(|held| {
                Some((format!("names/box{}", held.name?), format!("\"{}\"", held.id)))
            });
        let kept = self.facts.kept.iter().map(|(name, kept)| {
            (format!("reservations/{name}"), format!("{} {}", kept.count, kept.drawn))
        });
        owned.chain(endpoints).chain(named).chain(kept).collect()
    }
}

fn addresses(endpoint: &serde_json::Value) -> String {
    let all = endpoint["addresses"].as_array().into_iter().flatten();
    all.filter_map(serde_json::Value::as_str).collect::<Vec<_>>().join(" ")
}

fn numbers(reservation: &serde_json::Value) -> String {
    format!("{} {}", reservation["count"], reservation["drawn"])
}
