//! Endpoints: an address is taken and the endpoint that uses it is written in one transaction, and
//! released likewise.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rand::Rng as _;

use super::{Cluster, ClusterError, TRIES, encode, keys};
use crate::ipam::address::{self, Start, Taken};
use crate::model::snapshot::Holder;
use crate::model::{
    Attachment, Endpoint, EndpointId, MacAddr, Name, Network, NetworkId, NodeName, Versioned,
};
use crate::store::{Lease, Outcome, Revision, StoreError, Transaction};

/// A request for an endpoint on this node.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The name; `None`: the endpoint's id.
    pub name: Option<Name>,
    /// Addresses that it must have, at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// The Ethernet address that it must have.
    pub mac: Option<MacAddr>,
    /// Where it is plugged in.
    pub attachment: Attachment,
    /// Whether the interface's name was left open: then any is right.
    pub any_interface: bool,
    /// Free text by key.
    pub labels: BTreeMap<String, String>,
}

/// What a claim got.
#[derive(Debug, Clone)]
pub enum Claimed {
    /// A new endpoint, written at this revision.
    New(Endpoint, u64),
    /// One that the same request made before.
    Existing(Endpoint),
}

/// The addresses of a network that this node chose last, at most one of each family.
#[derive(Debug, Default)]
pub struct Cursor(Mutex<Vec<IpAddr>>);

/// The lease under which freed addresses rest.
///
/// One lease serves all addresses freed within a window, so an address rests for the time asked
/// for and up to a window longer.
pub(super) struct Rest {
    time: Duration,
    current: Mutex<Option<(Lease, Instant)>>,
}

impl Rest {
    pub(super) fn new(time: Duration) -> Self {
        Self { time, current: Mutex::new(None) }
    }

    fn window(&self) -> Duration {
        (self.time / 4).max(Duration::from_secs(1))
    }

    fn current(&self) -> Option<Lease> {
        let current = self.current.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        current.filter(|(_, since)| since.elapsed() < self.window()).map(|(lease, _)| lease)
    }

    fn set(&self, lease: Option<Lease>) {
        let mut current = self.current.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *current = lease.map(|lease| (lease, Instant::now()));
    }
}

impl Cluster {
    /// Takes addresses and writes the endpoint that has them, in one transaction.
    ///
    /// `taken` is what this node knows to be taken (it may lag behind). The search goes on from
    /// `cursor`, so that claims made at the same time do not choose the same addresses. The same
    /// claim made twice gives the same endpoint.
    ///
    /// # Errors
    /// When an address or the name is somebody else's, or nothing is free; then nothing was written.
    pub async fn claim(
        &self,
        network: &Versioned<Network>,
        claim: &Claim,
        taken: &Taken,
        cursor: &Cursor,
    ) -> Result<Claimed, ClusterError> {
        check(network, claim)?;
        let mut network = network.clone();
        // What is known better after a conflict, and whether that is all the store has.
        let mut known: Option<Taken> = None;
        let mut listed = false;
        for attempt in 0..TRIES {
            let known_taken = known.as_ref().unwrap_or(taken);
            let chosen = match choose(&network, claim, known_taken, cursor, attempt) {
                Ok(chosen) => chosen,
                Err(_) if !listed => {
                    known = Some(self.taken(network.id).await?);
                    listed = true;
                    continue;
                }
                Err(exhausted) => return Err(exhausted),
            };
            let endpoint = self.endpoint(&network, claim, chosen);
            match self.commit(claiming(&endpoint, &network)).await? {
                Outcome::Committed(Revision(revision)) => return Ok(Claimed::New(endpoint, revision)),
                Outcome::Conflict => {}
            }
            if let Some(existing) = self.same_name(&network, claim).await? {
                return Ok(Claimed::Existing(existing));
            }
            network = self.network(&network.id.to_string()).await?;
            check(&network, claim)?;
            let found = self.taken_of(network.id, &endpoint.addresses).await?;
            refuse_taken(&network, claim, &found)?;
            let mut now = known.take().unwrap_or_else(|| taken.clone());
            now.extend(found);
            known = Some(now);
        }
        Err(ClusterError::Contention(format!("network {}", network.name)))
    }

    fn endpoint(&self, network: &Network, claim: &Claim, addresses: Vec<IpAddr>) -> Endpoint {
        let rng = &mut rand::rng();
        let id = EndpointId::random(rng);
        // An id is a valid name: letters and digits.
        let name = claim.name.clone().or_else(|| id.to_string().parse().ok());
        Endpoint {
            id,
            name: name.unwrap_or_else(|| network.name.clone()),
            network: network.id,
            node: self.node.clone(),
            addresses,
            mac: claim.mac.unwrap_or_else(|| MacAddr::random(rng)),
            attachment: claim.attachment.clone(),
            labels: claim.labels.clone(),
        }
    }

    /// The endpoint that has the claim's name, if the claim is for the very same.
    async fn same_name(
        &self,
        network: &Network,
        claim: &Claim,
    ) -> Result<Option<Endpoint>, ClusterError> {
        let Some(name) = &claim.name else { return Ok(None) };
        let Some(id) = self.read::<EndpointId>(&keys::name(network.id, name)).await? else {
            return Ok(None);
        };
        let Some(found) = self.read::<Endpoint>(&keys::endpoint(network.id, id.value)).await? else {
            return Ok(None);
        };
        match difference(&found, &self.node, claim) {
            None => Ok(Some(found.value)),
            Some(difference) => Err(ClusterError::EndpointExists {
                name: name.clone(),
                network: network.name.clone(),
                difference,
            }),
        }
    }

    /// Which addresses of a network are taken, as the store has it now.
    async fn taken(&self, network: NetworkId) -> Result<Taken, ClusterError> {
        let prefix = keys::addresses(network);
        let listing = self.store.list(&prefix).await?;
        let parse = |(key, entry): (&String, &crate::store::Entry)| {
            Some((key.strip_prefix(&prefix)?.parse().ok()?, holder(&entry.value)))
        };
        Ok(listing.entries.iter().filter_map(parse).collect())
    }

    /// Whether an endpoint is still in the store.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn is_current(&self, endpoint: &Endpoint) -> Result<bool, ClusterError> {
        let found = self.store.get(&keys::endpoint(endpoint.network, endpoint.id)).await?;
        Ok(found.is_some())
    }

    /// Removes an endpoint that was never plugged in: nobody has met its addresses, so they are
    /// free at once.
    ///
    /// # Errors
    /// When the store cannot be reached or is another one.
    pub async fn withdraw(&self, endpoint: &Endpoint) -> Result<Option<u64>, ClusterError> {
        self.remove(endpoint, false).await
    }

    /// Which of these addresses are taken, as the store has it now.
    async fn taken_of(&self, network: NetworkId, addresses: &[IpAddr]) -> Result<Taken, ClusterError> {
        let mut taken = Taken::new();
        for address in addresses {
            if let Some(entry) = self.store.get(&keys::address(network, *address)).await? {
                taken.insert(*address, holder(&entry.value));
            }
        }
        Ok(taken)
    }

    /// Removes an endpoint; its addresses rest. `None`: there was no such endpoint any more.
    ///
    /// # Errors
    /// When the store cannot be reached or is another one.
    pub async fn release(&self, endpoint: &Endpoint) -> Result<Option<u64>, ClusterError> {
        self.remove(endpoint, true).await
    }

    async fn remove(&self, endpoint: &Endpoint, resting: bool) -> Result<Option<u64>, ClusterError> {
        let key = keys::endpoint(endpoint.network, endpoint.id);
        for _ in 0..TRIES {
            let Some(found) = self.read::<Endpoint>(&key).await? else { return Ok(None) };
            let rest = if resting { self.rest_lease().await? } else { None };
            let mut transaction = Transaction::new()
                .modified(&key, Revision(found.revision))
                .delete(&key)
                .delete(keys::name(found.network, &found.name))
                .delete(keys::local(&found.node, found.network, found.id));
            for address in &found.addresses {
                let key = keys::address(found.network, *address);
                transaction = match rest {
                    Some(lease) => transaction.put_leased(key, [], lease),
                    None => transaction.delete(key),
                };
            }
            match self.commit(transaction).await {
                Ok(Outcome::Committed(Revision(revision))) => return Ok(Some(revision)),
                Ok(Outcome::Conflict) => {}
                Err(ClusterError::Store(StoreError::LeaseGone(_))) => self.rest.set(None),
                Err(error) => return Err(error),
            }
        }
        Err(ClusterError::Contention(format!("endpoint {}", endpoint.id)))
    }

    async fn rest_lease(&self) -> Result<Option<Lease>, ClusterError> {
        if self.rest.time.is_zero() {
            return Ok(None);
        }
        if let Some(lease) = self.rest.current() {
            return Ok(Some(lease));
        }
        match self.store.grant(self.rest.time + self.rest.window()).await {
            Ok(lease) => {
                self.rest.set(Some(lease));
                Ok(Some(lease))
            }
            // A full disk takes no new lease, but a removal it takes: better without rest than not.
            Err(error @ StoreError::Failed { .. }) => {
                tracing::warn!(%error, "freed addresses do not rest");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// All endpoints of a network, as the store has them now.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn endpoints(&self, network: NetworkId) -> Result<Vec<Endpoint>, ClusterError> {
        let all = self.read_all(&keys::endpoints(network)).await?;
        Ok(all.into_iter().map(|(_, endpoint)| endpoint.value).collect())
    }

    /// The networks on which this node has endpoints, as the store has them now.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn local_networks(&self) -> Result<Vec<NetworkId>, ClusterError> {
        let prefix = keys::locals(&self.node);
        let listing = self.store.list(&prefix).await?;
        let network = |key: &String| key.strip_prefix(&prefix)?.split('/').next()?.parse().ok();
        let mut networks: Vec<NetworkId> = listing.entries.keys().filter_map(network).collect();
        networks.dedup();
        Ok(networks)
    }
}

/// Reads the value of an address key.
pub(super) fn holder(value: &[u8]) -> Holder {
    serde_json::from_slice(value).map_or(Holder::Resting, Holder::Endpoint)
}

/// The transaction that writes a new endpoint.
fn claiming(endpoint: &Endpoint, network: &Versioned<Network>) -> Transaction {
    let name = keys::name(endpoint.network, &endpoint.name);
    let mut transaction = Transaction::new()
        .modified(keys::network(network.id), Revision(network.revision))
        .absent(&name)
        .put(name, encode(&endpoint.id))
        .put(keys::endpoint(endpoint.network, endpoint.id), encode(endpoint))
        .put(keys::local(&endpoint.node, endpoint.network, endpoint.id), []);
    for address in &endpoint.addresses {
        let key = keys::address(endpoint.network, *address);
        transaction = transaction.absent(&key).put(key, encode(&endpoint.id));
    }
    transaction
}

/// Checks a claim's addresses against the network.
fn check(network: &Network, claim: &Claim) -> Result<(), ClusterError> {
    if network.removing {
        return Err(ClusterError::Removing(network.name.clone()));
    }
    for (index, &address) in claim.addresses.iter().enumerate() {
        let refuse = |problem: String| {
            Err(ClusterError::Address { address, network: network.name.clone(), problem })
        };
        let Some(subnet) = network.subnet_of(address) else {
            let subnets: Vec<String> = network.subnets.iter().map(|s| s.cidr().to_string()).collect();
            return refuse(format!("its subnets are {}", subnets.join(", ")));
        };
        if address == subnet.gateway() {
            return refuse("it is the gateway".into());
        }
        if !subnet.is_usable(address) {
            return refuse("it is reserved, or the first or last of its subnet".into());
        }
        if claim.addresses[..index].iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            return refuse("an endpoint has one address of each family".into());
        }
    }
    Ok(())
}

/// Chooses an address of each family that the network has; the claim's own come first.
fn choose(
    network: &Network,
    claim: &Claim,
    taken: &Taken,
    cursor: &Cursor,
    attempt: usize,
) -> Result<Vec<IpAddr>, ClusterError> {
    let mut last = cursor.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut chosen = Vec::with_capacity(2);
    for (ipv4, present, family) in
        [(true, network.has_ipv4(), "IPv4"), (false, network.has_ipv6(), "IPv6")]
    {
        if !present {
            continue;
        }
        if let Some(asked) = claim.addresses.iter().find(|address| address.is_ipv4() == ipv4) {
            chosen.push(*asked);
            continue;
        }
        let start = match last.iter().find(|address| address.is_ipv4() == ipv4) {
            _ if attempt > 1 => Start::At(u128::from(rand::rng().next_u64())),
            Some(last) => Start::After(*last),
            None => Start::First,
        };
        let free = address::next_free(network, ipv4, taken, start).ok_or_else(|| {
            let count = address::count(network, ipv4, taken);
            ClusterError::Exhausted {
                network: network.name.clone(),
                family,
                usable: count.usable,
                endpoints: count.endpoints,
                resting: count.resting,
            }
        })?;
        last.retain(|address| address.is_ipv4() != ipv4);
        last.push(free);
        chosen.push(free);
    }
    Ok(chosen)
}

fn refuse_taken(network: &Network, claim: &Claim, taken: &Taken) -> Result<(), ClusterError> {
    match claim.addresses.iter().find_map(|address| Some((*address, taken.get(address)?))) {
        None => Ok(()),
        Some((address, holder)) => {
            let by = match holder {
                Holder::Endpoint(id) => format!(" by endpoint {id}"),
                Holder::Resting => " for a short while, because it was just released".into(),
            };
            Err(ClusterError::AddressTaken { address, network: network.name.clone(), by })
        }
    }
}

/// In what an endpoint differs from what a claim asks for; `None`: it is the same request.
pub fn difference(endpoint: &Endpoint, node: &NodeName, claim: &Claim) -> Option<String> {
    let (found, asked) = (&endpoint.attachment, &claim.attachment);
    if endpoint.node != *node {
        return Some(format!("it is on node {}", endpoint.node));
    }
    if (found.inode, &found.boot) != (asked.inode, &asked.boot) {
        return Some(format!("it is in namespace {}", found.netns.display()));
    }
    if !claim.any_interface && found.interface != asked.interface {
        return Some(format!("its interface is {}", found.interface));
    }
    if let Some(address) = claim.addresses.iter().find(|address| !endpoint.addresses.contains(address)) {
        return Some(format!("it does not have address {address}"));
    }
    if claim.mac.is_some_and(|mac| mac != endpoint.mac) {
        return Some(format!("its MAC address is {}", endpoint.mac));
    }
    None
}
