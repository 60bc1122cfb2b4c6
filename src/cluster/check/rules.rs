//! What must hold between the store's keys.

use std::collections::BTreeMap;

use super::Inconsistency;
use super::book::{Book, Held, Holder, Kept, Members, Record};
use crate::cluster::{BATCH, encode, keys};
use crate::model::{Endpoint, NetworkId, Reservation, ServiceId};
use crate::model::{Finding, FindingKind};
use crate::store::{Revision, Transaction};

/// All that cannot be, network by network.
pub(super) fn inconsistencies(book: &Book) -> Vec<Inconsistency> {
    let mut found = Vec::new();
    for (id, members) in &book.members {
        match book.networks.contains_key(id) {
            true => Rules { book, id: *id, members, found: &mut found }.apply(),
            false => found.push(orphans(*id, members)),
        }
    }
    locals(book, &mut found);
    for unreadable in &book.unreadable {
        found.push(Inconsistency {
            network: unreadable.network,
            finding: Finding {
                node: None,
                network: unreadable.network.map(|id| book.name(id)).unwrap_or_default(),
                kind: FindingKind::Unreadable,
                what: unreadable.key.clone(),
                problem: unreadable.problem.clone(),
                repair: "restore or remove it with the store's own tool, unless a newer netctl \
                         wrote it: then upgrade this node"
                    .to_owned(),
                repairable: false,
            },
            repair: Vec::new(),
        });
    }
    found.sort_by(|a, b| {
        let key =
            |i: &Inconsistency| (i.finding.network.clone(), i.finding.kind, i.finding.what.clone());
        key(a).cmp(&key(b))
    });
    found
}

/// The rules of one network that exists.
struct Rules<'a> {
    book: &'a Book,
    id: NetworkId,
    members: &'a Members,
    found: &'a mut Vec<Inconsistency>,
}

/// What the rules say of addresses and of names alike.
struct Claims {
    noun: &'static str,
    leaked: FindingKind,
    missing: FindingKind,
    double: FindingKind,
}

const ADDRESSES: Claims = Claims {
    noun: "address",
    leaked: FindingKind::LeakedAddress,
    missing: FindingKind::MissingAddress,
    double: FindingKind::DoubleAddress,
};
const NAMES: Claims = Claims {
    noun: "name",
    leaked: FindingKind::LeakedName,
    missing: FindingKind::MissingName,
    double: FindingKind::DoubleName,
};

/// Endpoints that have something, and the revisions that wrote them.
type Users<'a> = Vec<(&'a Endpoint, Revision)>;

impl<'a> Rules<'a> {
    fn apply(&mut self) {
        let mut addresses: BTreeMap<_, (Option<Held>, Users<'a>)> =
            self.members.addresses.iter().map(|(key, held)| (*key, (Some(*held), Vec::new()))).collect();
        let mut names: BTreeMap<_, (Option<Held>, Users<'a>)> =
            self.members.names.iter().map(|(key, held)| (key, (Some(*held), Vec::new()))).collect();
        for (endpoint, revision) in self.members.readable() {
            for address in &endpoint.addresses {
                addresses.entry(*address).or_default().1.push((endpoint, revision));
            }
            names.entry(&endpoint.name).or_default().1.push((endpoint, revision));
            self.endpoint(endpoint, revision);
        }
        for (address, (held, users)) in addresses {
            self.claim(&ADDRESSES, keys::address(self.id, address), held, &users);
        }
        for (name, (held, users)) in names {
            self.claim(&NAMES, keys::name(self.id, name), held, &users);
        }
        self.blocks();
        self.acks();
        self.reservations();
    }

    /// Holds a key against the endpoints that say they have what it stands for.
    fn claim(&mut self, sort: &Claims, key: String, held: Option<Held>, users: &Users<'a>) {
        let noun = sort.noun;
        match (held, users.as_slice()) {
            (None, []) => {}
            (Some(held), []) => self.unused(sort, key, held),
            (held, [(user, revision)]) => {
                if held.is_some_and(|held| held.by == Holder::Endpoint(user.id)) {
                    return;
                }
                let who = describe(user);
                if let Some(other) = held.and_then(|held| self.other_owner(held)) {
                    let problem = format!("{who} has the {noun}, and its key names {other}");
                    return self.tell(sort.double, key, problem, DETACH);
                }
                let problem = match held.map(|held| held.by) {
                    None => format!("{who} has this {noun}, and there is no key"),
                    Some(Holder::Resting | Holder::RestingForEver) => {
                        format!("{who} has this {noun}, and the key says it rests")
                    }
                    Some(Holder::Endpoint(other)) => {
                        format!("{who} has this {noun}, and the key names {other}, which has not")
                    }
                    Some(Holder::Service(_) | Holder::Unreadable) => return,
                };
                let endpoint = keys::endpoint(self.id, user.id);
                let repair = Transaction::new().modified(endpoint, *revision);
                let repair = repair.unchanged(&key, held.map(|held| held.revision));
                let repair = repair.put(&key, encode(&user.id));
                self.repair(sort.missing, key, problem, "write the key anew", repair);
            }
            (_, several) => {
                let users: Vec<_> = several.iter().map(|(user, _)| describe(user)).collect();
                let problem = format!("one {noun}, several endpoints: {}", users.join(", "));
                self.tell(sort.double, key, problem, DETACH);
            }
        }
    }

    /// Something else that exists and has what a key stands for, as far as is known.
    fn other_owner(&self, held: Held) -> Option<String> {
        let id = match held.by {
            Holder::Endpoint(id) => id,
            Holder::Service(id) => return Some(format!("service {id}")),
            Holder::Resting | Holder::RestingForEver | Holder::Unreadable => return None,
        };
        let unreadable = self.members.endpoints.get(&id).is_some_and(|r| r.endpoint.is_none());
        (unreadable || self.members.others.contains(&id)).then(|| id.to_string())
    }

    /// A key for something that no endpoint says it has.
    fn unused(&mut self, sort: &Claims, key: String, held: Held) {
        let id = match held.by {
            Holder::Endpoint(id) => id,
            Holder::Service(id) => return self.unused_by_service(sort, key, held, id),
            Holder::Resting | Holder::Unreadable => return,
            Holder::RestingForEver => {
                let problem = format!("the {} rests, and nothing ends that", sort.noun);
                let repair = Transaction::new().modified(&key, held.revision).delete(&key);
                return self.repair(sort.leaked, key, problem, "remove the key", repair);
            }
        };
        if self.other_owner(held).is_some() {
            return;
        }
        let endpoint = keys::endpoint(self.id, id);
        let repair = Transaction::new().modified(&key, held.revision).delete(&key);
        let (problem, repair) = match self.members.endpoints.get(&id) {
            Some(Record { revision, .. }) => {
                let problem = format!("endpoint {id} does not have this {}", sort.noun);
                (problem, repair.modified(endpoint, *revision))
            }
            None => (format!("endpoint {id} does not exist"), repair.absent(endpoint)),
        };
        self.repair(sort.leaked, key, problem, "remove the key", repair);
    }

    /// What an endpoint needs beside its name and addresses.
    fn endpoint(&mut self, endpoint: &Endpoint, revision: Revision) {
        let key = keys::endpoint(self.id, endpoint.id);
        let place = (endpoint.node.clone(), self.id, endpoint.id);
        if !self.book.locals.contains_key(&place) {
            let local = keys::local(&endpoint.node, self.id, endpoint.id);
            let problem = format!("{} has no such key", describe(endpoint));
            let repair = Transaction::new().modified(&key, revision).absent(&local).put(&local, []);
            self.repair(FindingKind::MissingLocal, local, problem, "write the key anew", repair);
        }
        if !self.book.nodes.contains(&endpoint.node) {
            let problem = format!("{} is on a node that has no record", describe(endpoint));
            let advice = format!(
                "start netctld on node {} again and detach it there: its container may run",
                endpoint.node
            );
            self.tell(FindingKind::LostEndpoint, key.clone(), problem, &advice);
        }
        if let Some(network) = self.book.networks.get(&self.id).and_then(Option::as_ref) {
            for address in endpoint
                .addresses
                .iter()
                .filter(|a| !network.standing().any(|subnet| subnet.cidr().contains(**a)))
            {
                let problem = format!("{} has {address}, outside of all subnets", describe(endpoint));
                self.tell(FindingKind::OutsideAddress, key.clone(), problem, DETACH_THIS);
            }
        }
    }

    fn blocks(&mut self) {
        let network = self.book.networks.get(&self.id).and_then(Option::as_ref);
        for (range, (revision, node)) in &self.members.blocks {
            let outside = network.is_some_and(|network| {
                let holds = |cidr: ipnetwork::IpNetwork| {
                    cidr.contains(range.network()) && cidr.prefix() <= range.prefix()
                };
                !network.standing().any(|subnet| holds(subnet.cidr()))
            });
            let key = keys::block(self.id, *range);
            let repair = Transaction::new().modified(&key, *revision).delete(&key);
            if !self.book.nodes.contains(node) {
                let problem = format!("node {node} has no record");
                let repair = repair.absent(keys::node(node));
                self.repair(FindingKind::LeakedBlock, key, problem, "remove the key", repair);
            } else if outside {
                let problem = format!("outside of all subnets; it is node {node}'s");
                self.repair(FindingKind::OutsideBlock, key, problem, "remove the key", repair);
            }
        }
    }

    /// What nodes have written of endpoints that are drained.
    fn acks(&mut self) {
        for ((id, node), revision) in &self.members.acks {
            if !self.members.endpoints.contains_key(id) {
                let key = keys::ack(self.id, *id, node);
                let repair = Transaction::new().modified(&key, *revision).delete(&key);
                let repair = repair.absent(keys::endpoint(self.id, *id));
                let problem = format!("endpoint {id} does not exist");
                self.repair(FindingKind::LeakedAck, key, problem, "remove the key", repair);
            }
        }
    }

    /// An address that a service has, as far as its key says.
    fn unused_by_service(&mut self, sort: &Claims, key: String, held: Held, id: ServiceId) {
        let address = key.rsplit('/').next().and_then(|text| text.parse().ok());
        let has = self.book.services.get(&id).and_then(|(service, _)| service.addresses.get(&self.id));
        if has.is_some_and(|has| address.is_some_and(|address| has.contains(&address))) {
            return;
        }
        let problem = format!("service {id} does not have it, or does not exist");
        let repair = Transaction::new().modified(&key, held.revision).delete(&key);
        self.repair(sort.leaked, key, problem, "remove the key", repair);
    }

    /// What is kept for services, and what should be.
    fn reservations(&mut self) {
        for (name, Kept { revision, reservation, leased }) in &self.members.reservations {
            let key = keys::reservation(self.id, name);
            // One without a service holds addresses for a while, under a lease.
            let Some(id) = reservation.service else {
                if !leased {
                    let problem = "it is for no service, and nothing ends it".to_owned();
                    let repair = Transaction::new().modified(&key, *revision).delete(&key);
                    self.repair(FindingKind::LeakedReservation, key, problem, "remove the key", repair);
                }
                continue;
            };
            let service = self.book.services.get(&id).map(|(service, _)| service);
            if !service.is_some_and(|s| s.name == *name && s.networks.contains(&self.id)) {
                let problem = format!("service {id} does not exist, or is not on the network");
                let repair = Transaction::new().modified(&key, *revision).delete(&key);
                self.repair(FindingKind::LeakedReservation, key, problem, "remove the key", repair);
                continue;
            }
            let drawn = self.members.readable().filter(|(e, _)| e.drawn == Some(id)).count() as u64;
            if drawn != reservation.drawn
                && self.members.endpoints.values().all(|r| r.endpoint.is_some())
            {
                let problem =
                    format!("{drawn} endpoint(s) have drawn on it, {} are written", reservation.drawn);
                let right = Reservation { drawn, ..*reservation };
                // Every drawing and giving back changes the key.
                let repair = Transaction::new()
                    .modified(&key, *revision)
                    .put(&key, encode(&right))
                    .put(keys::usage(self.id), [])
                    .put(keys::reservations_guard(self.id), []);
                self.repair(
                    FindingKind::WrongReservation,
                    key,
                    problem,
                    "write the number anew",
                    repair,
                );
            }
        }
        let (id, book) = (self.id, self.book);
        for (service, _) in book.services.values().filter(|(s, _)| s.networks.contains(&id)) {
            let kept = self.members.reservations.get(&service.name);
            if kept.is_none_or(|kept| kept.reservation.service != Some(service.id)) {
                let key = keys::reservation(self.id, &service.name);
                let problem = format!("nothing is kept for service {}", service.name);
                let advice = format!("remove service {} and make it again", service.name);
                self.tell(FindingKind::MissingReservation, key, problem, &advice);
            }
            for address in service.addresses.get(&self.id).into_iter().flatten() {
                let held = self.members.addresses.get(address).map(|held| held.by);
                if held != Some(Holder::Service(service.id)) {
                    let key = keys::address(self.id, *address);
                    let problem =
                        format!("service {} has it, and its key does not say so", service.name);
                    let advice = format!("remove service {} and make it again", service.name);
                    self.tell(FindingKind::MissingAddress, key, problem, &advice);
                }
            }
        }
    }

    fn tell(&mut self, kind: FindingKind, what: String, problem: String, advice: &str) {
        self.add(kind, what, problem, advice, Vec::new());
    }

    fn repair(
        &mut self,
        kind: FindingKind,
        what: String,
        problem: String,
        action: &str,
        repair: Transaction,
    ) {
        self.add(kind, what, problem, action, vec![repair]);
    }

    fn add(
        &mut self,
        kind: FindingKind,
        what: String,
        problem: String,
        text: &str,
        repair: Vec<Transaction>,
    ) {
        let network = self.book.name(self.id);
        self.found.push(inconsistency(network, Some(self.id), kind, what, problem, text, repair));
    }
}

const DETACH: &str = "detach all but one of them on their nodes, and attach them again";
const DETACH_THIS: &str = "detach it on its node, and attach it again";

fn describe(endpoint: &Endpoint) -> String {
    format!("endpoint {} ({} on {})", endpoint.id, endpoint.name, endpoint.node)
}

fn inconsistency(
    network: String,
    id: Option<NetworkId>,
    kind: FindingKind,
    what: String,
    problem: String,
    text: &str,
    repair: Vec<Transaction>,
) -> Inconsistency {
    let (repairable, text) = (!repair.is_empty(), text.to_owned());
    let finding = Finding { node: None, network, kind, what, problem, repair: text, repairable };
    Inconsistency { finding, network: id, repair }
}

/// The members of a network that does not exist.
fn orphans(id: NetworkId, members: &Members) -> Inconsistency {
    let remove = |batch: &[(String, Revision)]| {
        let unwritten = Transaction::new().absent(keys::network(id));
        batch.iter().fold(unwritten, |transaction, (key, revision)| {
            transaction.modified(key, *revision).delete(key)
        })
    };
    let repair = members.keys.chunks(BATCH).map(remove).collect();
    let problem = format!("{} key(s) of a network that does not exist", members.keys.len());
    let (kind, what) = (FindingKind::LeakedMembers, keys::members(id));
    inconsistency(id.to_string(), Some(id), kind, what, problem, "remove them", repair)
}

/// Keys that say a node has an endpoint.
fn locals(book: &Book, found: &mut Vec<Inconsistency>) {
    for ((node, network, id), revision) in &book.locals {
        let (key, endpoint) = (keys::local(node, *network, *id), keys::endpoint(*network, *id));
        let repair = Transaction::new().modified(&key, *revision).delete(&key);
        let (problem, repair) = match book.record(*network, *id) {
            _ if !book.networks.contains_key(network) => {
                (format!("network {network} does not exist"), repair.absent(keys::network(*network)))
            }
            None => (format!("endpoint {id} does not exist"), repair.absent(endpoint)),
            Some(Record { endpoint: Some(other), revision }) if other.node != *node => (
                format!("endpoint {id} is on node {}", other.node),
                repair.modified(endpoint, *revision),
            ),
            Some(_) => continue,
        };
        let (name, kind) = (book.name(*network), FindingKind::LeakedLocal);
        let repair = vec![repair];
        found.push(inconsistency(name, Some(*network), kind, key, problem, "remove the key", repair));
    }
}
