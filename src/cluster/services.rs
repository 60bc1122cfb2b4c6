//! Services: their addresses, and what is kept for their containers.
//!
//! A service is written in one transaction with all that it needs on all its networks, or not at
//! all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use super::endpoints::{Chosen, holder, is_only_chosen, taken, taking_blocks};
use super::rest::freeing;
use super::{Cluster, ClusterError, TRIES, encode, endpoints, external, keys, pause};
use crate::ipam::{Count, Ledger};
use crate::model::service::MAX_REPLICAS;
use crate::model::{
    Balancing, EndpointMode, HealthCheck, Name, Network, NodeName, Reservation, Service, ServiceId,
    ServiceSpec, ServiceUpdate, Versioned,
};
use crate::store::{Lease, Outcome, Revision, Transaction};

/// How many networks a service may have: each takes up to eight writes and nine comparisons of its transaction.
const MAX_NETWORKS: usize = 12;

/// What a change of what is kept needs on one network.
struct Part {
    network: Versioned<Network>,
    /// The revision of the last taking of an address, and of the last reservation.
    usage: Option<u64>,
    guard: Option<u64>,
}

impl Part {
    /// Requires that nothing was taken or kept since it was counted, and notes that there is now.
    fn stamp(&self, transaction: Transaction) -> Transaction {
        let id = self.network.id;
        let mut transaction = transaction.modified(keys::network(id), Revision(self.network.revision));
        for (key, revision) in
            [(keys::usage(id), self.usage), (keys::reservations_guard(id), self.guard)]
        {
            transaction = transaction.unchanged(&key, revision.map(Revision)).put(key, []);
        }
        transaction
    }
}

/// A service that is being made: its transaction, and the addresses that were chosen for it.
struct Design {
    service: Service,
    transaction: Transaction,
    chosen: Vec<(Versioned<Network>, Chosen)>,
}

impl Design {
    fn new(spec: &ServiceSpec) -> Self {
        let service = Service {
            id: ServiceId::random(&mut rand::rng()),
            name: spec.name.clone(),
            networks: Vec::new(),
            replicas: spec.replicas,
            endpoint_mode: spec.endpoint_mode,
            update_order: spec.update_order,
            update_parallelism: spec.update_parallelism,
            addresses: BTreeMap::new(),
            external: spec.external.clone(),
            balancing: spec.balancing.clone(),
            health: spec.health.clone(),
            labels: spec.labels.clone(),
        };
        let transaction = Transaction::new().absent(keys::service(&spec.name));
        let transaction = external::guarded(transaction, &spec.external);
        Self { service, transaction, chosen: Vec::new() }
    }
}

impl Cluster {
    /// Makes a service: takes its own addresses, and keeps those that its containers will need.
    ///
    /// # Errors
    /// [`ClusterError::TooFew`] when a network does not have them; then nothing was written.
    pub async fn create_service(
        &self,
        spec: &ServiceSpec,
        alive: &BTreeSet<NodeName>,
    ) -> Result<Service, ClusterError> {
        let spec = &spec.settled().map_err(|error| ClusterError::ServiceInvalid(error.to_string()))?;
        check(spec)?;
        for attempt in 0..TRIES {
            if self.store.get(&keys::service(&spec.name)).await?.is_some() {
                return Err(ClusterError::ServiceExists(spec.name.clone()));
            }
            let mut design = Design::new(spec);
            let designed = self.design_service(spec, &mut design, alive, attempt).await;
            let done = match designed {
                Ok(()) => {
                    let service = &design.service;
                    let transaction = std::mem::take(&mut design.transaction);
                    self.commit(transaction.put(keys::service(&service.name), encode(service))).await
                }
                Err(refusal) if is_only_chosen(&refusal) => Ok(Outcome::Conflict),
                Err(refusal) => Err(refusal),
            };
            // What was taken, the view tells; what was not is free again.
            for (network, chosen) in &design.chosen {
                self.put_back(network, chosen);
            }
            if let Outcome::Committed(_) = done? {
                return Ok(design.service);
            }
            for id in design.service.networks {
                self.read_ledger(id).await?;
            }
            pause(attempt).await;
        }
        Err(ClusterError::Contention(format!("service {}", spec.name)))
    }

    /// Adds to a design what the service needs on each of its networks.
    async fn design_service(
        &self,
        spec: &ServiceSpec,
        design: &mut Design,
        alive: &BTreeSet<NodeName>,
        attempt: usize,
    ) -> Result<(), ClusterError> {
        for network in self.networks_for(spec).await? {
            design.service.networks.push(network.id);
            let part = self.part(network).await?;
            let (id, count) = (part.network.id, design.service.most_containers());
            let has_vip = spec.endpoint_mode == EndpointMode::Vip;
            let needed = count + u64::from(has_vip);
            let reserved = self.reservation_to_take(&part, spec.reservation.as_ref()).await?;
            let own = keys::reservation(id, &spec.name);
            let takes_its_own = reserved.is_some() && spec.reservation.as_ref() == Some(&spec.name);
            let there: Option<Versioned<Reservation>> =
                if takes_its_own { None } else { self.read(&own).await? };
            // A service's own is that of another one of that name, which the next look finds.
            if there.is_some_and(|there| there.service.is_none()) {
                let (name, network) = (spec.name.clone(), part.network.name.clone());
                return Err(ClusterError::NameReserved { name, network });
            }
            let released = reserved.as_ref().map_or(0, |found| found.left().min(needed));
            self.refuse_too_few(&part, u128::from(needed), u128::from(released)).await?;
            let mut transaction = part.stamp(std::mem::take(&mut design.transaction));
            // Of what is kept under its own name, what is not needed is free again.
            transaction = match &reserved {
                Some(found) if takes_its_own => transaction.modified(&own, Revision(found.revision)),
                _ => transaction.absent(&own),
            };
            if let (Some(found), Some(name)) = (reserved, &spec.reservation)
                && !takes_its_own
            {
                transaction = taking(transaction, keys::reservation(id, name), found, released);
            }
            let service = Some(design.service.id);
            let kept = Reservation { service, count, drawn: 0, lease: None };
            transaction = transaction.put(own, encode(&kept));
            if has_vip {
                let asked = self.addresses_asked_for(&part.network, &spec.addresses).await?;
                let chosen = self.choose(&part.network, &asked, alive, attempt)?;
                for address in chosen.addresses() {
                    let key = keys::address(id, address);
                    let value = serde_json::json!({ "service": design.service.id });
                    transaction = transaction.absent(&key).put(key, encode(&value));
                }
                transaction = taking_blocks(transaction, id, &chosen, &self.node);
                design.service.addresses.insert(id, chosen.addresses());
                design.chosen.push((part.network, chosen));
            }
            design.transaction = transaction;
        }
        let given = |address: &IpAddr| design.service.addresses.values().flatten().any(|a| a == address);
        match spec.addresses.iter().find(|address| !given(address)) {
            None => Ok(()),
            Some(address) => Err(ClusterError::ServiceInvalid(format!(
                "address {address} is of none of the service's networks: choose one of their subnets"
            ))),
        }
    }

    /// Those of the addresses that a service is to have which are of this network. They must be
    /// free.
    async fn addresses_asked_for(
        &self,
        network: &Network,
        addresses: &[IpAddr],
    ) -> Result<Vec<IpAddr>, ClusterError> {
        let of_network = |address: &&IpAddr| network.subnet_of(**address).is_some();
        let asked: Vec<IpAddr> = addresses.iter().filter(of_network).copied().collect();
        endpoints::check(network, &asked)?;
        for address in &asked {
            if let Some(found) = self.store.get(&keys::address(network.id, *address)).await? {
                return Err(taken(network, *address, holder(&found.value)));
            }
        }
        Ok(asked)
    }

    /// Changes how many containers a service has; more only where all of its networks have the
    /// addresses.
    ///
    /// # Errors
    /// [`ClusterError::TooFew`] when a network does not have them; then nothing was changed.
    pub async fn scale_service(&self, name: &Name, replicas: u32) -> Result<Service, ClusterError> {
        check_replicas(replicas)?;
        self.change_service(name, |service| {
            service.replicas = replicas;
            Ok(())
        })
        .await
    }

    /// Writes a service anew, with what must be kept for its containers then.
    async fn change_service(
        &self,
        name: &Name,
        change: impl Fn(&mut Service) -> Result<(), ClusterError>,
    ) -> Result<Service, ClusterError> {
        for _ in 0..TRIES {
            let found = self.service(name).await?;
            let mut service = found.value.clone();
            change(&mut service)?;
            let key = keys::service(name);
            let mut transaction =
                Transaction::new().modified(&key, Revision(found.revision)).put(key, encode(&service));
            transaction = self.adding_external(transaction, &found.value, &service).await?;
            // What is kept follows from how many containers there may be: most changes concern others.
            let keeps_other = service.most_containers() != found.most_containers();
            for id in service.networks.iter().filter(|_| keeps_other) {
                let part = self.part(self.network(&id.to_string()).await?).await?;
                let key = keys::reservation(*id, name);
                let kept: Option<Versioned<Reservation>> = self.read(&key).await?;
                let Some(kept) = kept.filter(|kept| kept.service == Some(service.id)) else {
                    return Err(ClusterError::NotOfService {
                        service: name.clone(),
                        network: part.network.name.clone(),
                    });
                };
                let after = Reservation { count: service.most_containers(), ..kept.value };
                let more = after.left().saturating_sub(kept.left());
                self.refuse_too_few(&part, u128::from(more), 0).await?;
                transaction = part.stamp(transaction);
                transaction =
                    transaction.modified(&key, Revision(kept.revision)).put(key, encode(&after));
            }
            if let Outcome::Committed(_) = self.commit(transaction).await? {
                return Ok(service);
            }
            for id in found.networks.iter().filter(|_| keeps_other) {
                self.read_ledger(*id).await?;
            }
        }
        Err(ClusterError::Contention(format!("service {name}")))
    }

    /// Changes how a service's connections are spread, how its containers are checked, and how they
    /// are replaced.
    ///
    /// # Errors
    /// [`ClusterError::NoService`] when there is none; [`ClusterError::TooFew`] when replacing its
    /// containers so needs more addresses than there are.
    pub async fn update_service(
        &self,
        name: &Name,
        update: &ServiceUpdate,
    ) -> Result<Service, ClusterError> {
        self.change_service(name, |service| {
            let applied = update.apply(service);
            applied.map_err(|error| ClusterError::ServiceInvalid(error.to_string()))?;
            let Service { name, endpoint_mode, balancing, health, replicas, .. } = service;
            check_replicas(*replicas)?;
            check_policy(name, *endpoint_mode, balancing, health.as_ref())
        })
        .await
    }

    /// Removes a service: its own addresses rest, and nothing is kept for it any more. Its
    /// endpoints stay.
    ///
    /// # Errors
    /// [`ClusterError::NoService`] when there is none.
    pub async fn remove_service(&self, name: &Name) -> Result<(), ClusterError> {
        for _ in 0..TRIES {
            let found = self.service(name).await?;
            let rest = self.rest_lease().await?;
            let key = keys::service(name);
            let mut transaction =
                Transaction::new().modified(&key, Revision(found.revision)).delete(key);
            for id in &found.networks {
                transaction = transaction.delete(keys::reservation(*id, name));
                for address in found.addresses.get(id).into_iter().flatten() {
                    transaction = freeing(transaction, *id, *address, rest);
                }
            }
            match self.commit(transaction).await {
                Ok(Outcome::Committed(_)) => return Ok(()),
                Ok(Outcome::Conflict) => {}
                Err(error) if self.is_rest_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Err(ClusterError::Contention(format!("service {name}")))
    }

    /// A service, as the store has it now.
    ///
    /// # Errors
    /// [`ClusterError::NoService`] when there is none.
    pub async fn service(&self, name: &Name) -> Result<Versioned<Service>, ClusterError> {
        let found = self.read(&keys::service(name)).await?;
        found.ok_or_else(|| ClusterError::NoService(name.to_string()))
    }

    /// All services, as the store has them now.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn services(&self) -> Result<Vec<Service>, ClusterError> {
        let all = self.read_all(keys::SERVICES).await?;
        Ok(all.into_iter().map(|(_, service)| service.value).collect())
    }

    /// Keeps addresses of some networks for a while, for who will ask for them by this name.
    ///
    /// # Errors
    /// [`ClusterError::TooFew`] when a network does not have them; then nothing is kept.
    pub async fn reserve(
        &self,
        name: &Name,
        wanted: &BTreeMap<String, u64>,
        time: Duration,
    ) -> Result<(), ClusterError> {
        if wanted.is_empty() || wanted.len() > MAX_NETWORKS {
            return Err(ClusterError::ServiceInvalid(format!(
                "a reservation is for 1 to {MAX_NETWORKS} networks, not {}",
                wanted.len()
            )));
        }
        let lease = self.store.grant(time).await?;
        let done = self.reserve_under(name, wanted, lease).await;
        if done.is_err() {
            // It ends by itself too.
            let _ = self.store.revoke(lease).await;
        }
        done
    }

    async fn reserve_under(
        &self,
        name: &Name,
        wanted: &BTreeMap<String, u64>,
        lease: Lease,
    ) -> Result<(), ClusterError> {
        for _ in 0..TRIES {
            let mut transaction = Transaction::new();
            let mut ids = Vec::new();
            for (reference, count) in wanted {
                let part = self.part(self.network(reference).await?).await?;
                let key = keys::reservation(part.network.id, name);
                if self.store.get(&key).await?.is_some() {
                    return Err(ClusterError::ServiceInvalid(format!(
                        "{name} holds addresses of network {} already: choose another name",
                        part.network.name
                    )));
                }
                self.refuse_too_few(&part, u128::from(*count), 0).await?;
                let kept = Reservation { service: None, count: *count, drawn: 0, lease: Some(lease.0) };
                transaction = part.stamp(transaction).absent(&key).put_leased(key, encode(&kept), lease);
                ids.push(part.network.id);
            }
            if let Outcome::Committed(_) = self.commit(transaction).await? {
                return Ok(());
            }
            for id in ids {
                self.read_ledger(id).await?;
            }
        }
        Err(ClusterError::Contention(format!("reservation {name}")))
    }

    async fn part(&self, network: Versioned<Network>) -> Result<Part, ClusterError> {
        if network.removing {
            return Err(ClusterError::Removing(network.name.clone()));
        }
        let usage = self.usage(network.id).await?;
        let guard = self.complete(&network, usage, Ledger::guard).await?;
        Ok(Part { network, usage, guard })
    }

    async fn reservation_to_take(
        &self,
        part: &Part,
        name: Option<&Name>,
    ) -> Result<Option<Versioned<Reservation>>, ClusterError> {
        let Some(name) = name else { return Ok(None) };
        let found: Option<Versioned<Reservation>> =
            self.read(&keys::reservation(part.network.id, name)).await?;
        match found.filter(|found| found.service.is_none()) {
            Some(found) => Ok(Some(found)),
            None => Err(ClusterError::ServiceInvalid(format!(
                "there is no reservation {name} on network {}: it may have ended",
                part.network.name
            ))),
        }
    }

    /// Refuses what a network does not have; `released` of what is kept becomes free with it.
    async fn refuse_too_few(
        &self,
        part: &Part,
        asked: u128,
        released: u128,
    ) -> Result<(), ClusterError> {
        let network = &part.network;
        let look = |ledger: &Ledger| too_few(ledger, network, asked, released);
        // Should more have been taken or kept by then, the transaction finds that out.
        let mut found = self.complete(network, part.usage.max(part.guard), look).await?;
        if found.is_some() {
            self.read_anew(network.id).await?;
            found = self.complete(network, part.usage.max(part.guard), look).await?;
        }
        match found {
            Some((family, count)) => {
                let (network, count) = (part.network.name.clone(), Box::new(count));
                Err(ClusterError::TooFew { network, family, asked, count })
            }
            None => Ok(()),
        }
    }
}

/// The family of which fewer are free than are asked for.
fn too_few(
    ledger: &Ledger,
    network: &Network,
    asked: u128,
    released: u128,
) -> Option<(&'static str, Count)> {
    let mut counts = network.families().map(|(ipv4, family)| {
        let mut count = ledger.count(ipv4);
        count.reserved = count.reserved.saturating_sub(released);
        (family, count)
    });
    counts.find(|(_, count)| asked > count.free())
}

fn check(spec: &ServiceSpec) -> Result<(), ClusterError> {
    if spec.networks.is_empty() || spec.networks.len() > MAX_NETWORKS {
        return Err(ClusterError::ServiceInvalid(format!(
            "service {} has {} networks: give 1 to {MAX_NETWORKS}",
            spec.name,
            spec.networks.len()
        )));
    }
    if spec.endpoint_mode == EndpointMode::Dnsrr && !spec.addresses.is_empty() {
        let text = format!("service {} is reached by dnsrr: it has no address of its own", spec.name);
        return Err(ClusterError::ServiceInvalid(text));
    }
    check_policy(&spec.name, spec.endpoint_mode, &spec.balancing, spec.health.as_ref())?;
    check_replicas(spec.replicas)
}

fn check_policy(
    name: &Name,
    mode: EndpointMode,
    balancing: &Balancing,
    health: Option<&HealthCheck>,
) -> Result<(), ClusterError> {
    // Named ports are told to who asks for them, whoever is reached there.
    let told = |balancing: &Balancing| balancing.ports.iter().all(|port| port.name.is_some());
    let is_balanced =
        !told(balancing) || Balancing { ports: Vec::new(), ..balancing.clone() } != Balancing::default();
    if mode == EndpointMode::Dnsrr && is_balanced {
        return Err(ClusterError::ServiceInvalid(format!(
            "service {name} is reached by dnsrr: nothing balances its connections, so it has no \
             scheduler, ports without a name, affinity, timeouts or preference; leave them out, or \
             make it with --endpoint-mode vip"
        )));
    }
    let checked = balancing.check().and_then(|()| health.map_or(Ok(()), HealthCheck::check));
    checked.map_err(|error| ClusterError::ServiceInvalid(error.to_string()))
}

fn check_replicas(replicas: u32) -> Result<(), ClusterError> {
    match replicas <= MAX_REPLICAS {
        true => Ok(()),
        false => Err(ClusterError::ServiceInvalid(format!(
            "{replicas} replicas are too many: give at most {MAX_REPLICAS}"
        ))),
    }
}

/// Adds to a transaction that so much of a reservation is taken over; what is left of it stays.
fn taking(
    transaction: Transaction,
    key: String,
    found: Versioned<Reservation>,
    count: u64,
) -> Transaction {
    let transaction = transaction.modified(&key, Revision(found.revision));
    let rest = Reservation { drawn: found.drawn + count, ..found.value };
    match rest.lease {
        Some(lease) if rest.left() > 0 => transaction.put_leased(key, encode(&rest), Lease(lease)),
        _ => transaction.delete(key),
    }
}

#[cfg(test)]
mod tests;
