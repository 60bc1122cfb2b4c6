//! Endpoints: an address is taken and the endpoint that uses it is written in one transaction, and
//! released likewise.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnetwork::IpNetwork;
use rand::Rng as _;
use tracing::warn;

use super::admission::{Ticket, exhausted};
use super::rest::freeing;
use super::{BATCH, Cluster, ClusterError, EndpointRequest, TRIES, encode, keys, pause};
use crate::ipam::{Block, Ledger, Proposal};
use crate::model::snapshot::Holder;
use crate::model::{
    Endpoint, EndpointId, EndpointState, MacAddr, Name, Network, NetworkId, NodeName, Reservation,
    ServiceId, Versioned,
};
use crate::store::{Entry, Outcome, Revision, Transaction};

/// What a claim got.
#[derive(Debug, Clone)]
pub enum Claimed {
    /// A new endpoint, written at this revision.
    New(Endpoint, u64),
    /// One that the same request made before.
    Existing(Endpoint),
}

impl Cluster {
    /// Takes addresses and writes the endpoint that has them, in one transaction.
    ///
    /// `alive` are the nodes that are: of others, blocks with nothing in them are taken over. The
    /// same claim made twice gives the same endpoint.
    ///
    /// # Errors
    /// When an address or the name is somebody else's, or nothing is free; then nothing was written.
    pub async fn claim(
        &self,
        network: &Versioned<Network>,
        claim: &EndpointRequest,
        alive: &BTreeSet<NodeName>,
    ) -> Result<Claimed, ClusterError> {
        check(network, &claim.addresses)?;
        let mut network = network.clone();
        // Whether all that the store has was read for this claim.
        let mut listed = false;
        // Endpoints of one service write one key: those of this node do so one after the other.
        let _turn = match claim.service {
            Some(_) => Some(self.draws.lock().await),
            None => None,
        };
        for attempt in 0..TRIES {
            let ticket = match self.ticket(&network, claim).await {
                Ok(ticket) => ticket,
                Err(refusal) => return self.refused(&network, claim, refusal).await,
            };
            let chosen = match self.choose(&network, &claim.addresses, alive, attempt) {
                Ok(chosen) => chosen,
                Err(refusal) if !listed || is_only_chosen(&refusal) => {
                    self.read_ledger(network.id).await?;
                    listed = true;
                    continue;
                }
                Err(refusal) => return self.refused(&network, claim, refusal).await,
            };
            let endpoint = self.endpoint(&network, claim, chosen.addresses(), &ticket);
            let transaction = ticket.stamp(network.id, claiming(&endpoint, &network, &chosen));
            match self.commit(transaction).await {
                Ok(Outcome::Committed(Revision(revision))) => {
                    self.note_claimed(&endpoint, chosen, revision);
                    self.admitted(&network, &ticket, revision);
                    return Ok(Claimed::New(endpoint, revision));
                }
                Ok(Outcome::Conflict) => {}
                Err(error) => {
                    // Whether they are taken is not known: the view will tell.
                    self.put_back(&network, &chosen);
                    return Err(error);
                }
            }
            self.put_back(&network, &chosen);
            if let Some(existing) = self.same_name(&network, claim).await? {
                return Ok(Claimed::Existing(existing));
            }
            network = self.network(&network.id.to_string()).await?;
            check(&network, &claim.addresses)?;
            self.look_again(&network, claim, &chosen).await?;
            self.read_guard(network.id).await?;
            pause(attempt).await;
        }
        Err(ClusterError::Contention(format!("network {}", network.name)))
    }

    /// What a claim gets that cannot be fulfilled: what the same claim got before, or the refusal.
    async fn refused(
        &self,
        network: &Network,
        claim: &EndpointRequest,
        refusal: ClusterError,
    ) -> Result<Claimed, ClusterError> {
        if !matches!(refusal, ClusterError::Exhausted { .. } | ClusterError::NotOfService { .. }) {
            return Err(refusal);
        }
        let existing = self.same_name(network, claim).await?;
        existing.map(Claimed::Existing).ok_or(refusal)
    }

    /// Chooses an address of each family that the network has; those asked for come first.
    pub(super) fn choose(
        &self,
        network: &Network,
        asked: &[IpAddr],
        alive: &BTreeSet<NodeName>,
        attempt: usize,
    ) -> Result<Chosen, ClusterError> {
        self.with_ledger(network, |ledger| {
            let mut chosen = Chosen::default();
            for (ipv4, family) in network.families() {
                if let Some(asked) = asked.iter().find(|address| address.is_ipv4() == ipv4) {
                    chosen.asked.push(*asked);
                    continue;
                }
                let spread = if attempt == 0 { 0 } else { u128::from(rand::rng().next_u64()) };
                let Some(proposal) = ledger.propose(ipv4, |node| alive.contains(node), spread) else {
                    chosen.proposed.iter().for_each(|proposal| ledger.withdraw(proposal.address));
                    return Err(exhausted(network, family, ledger.count(ipv4)));
                };
                chosen.proposed.push(proposal);
            }
            Ok(chosen)
        })
    }

    /// Takes over into the ledger what was committed: the view shows it a little later.
    fn note_claimed(&self, endpoint: &Endpoint, chosen: Chosen, revision: u64) {
        let ledger = self.ledger(endpoint.network);
        let mut ledger = lock(&ledger);
        for address in &endpoint.addresses {
            ledger.hold(*address, Holder::Endpoint(endpoint.id));
        }
        for block in chosen.proposed.into_iter().filter_map(|proposal| proposal.block) {
            ledger.own(block.range, Block { node: self.node.clone(), revision });
        }
    }

    pub(super) fn put_back(&self, network: &Network, chosen: &Chosen) {
        let ledger = self.ledger(network.id);
        let mut ledger = lock(&ledger);
        chosen.proposed.iter().for_each(|proposal| ledger.withdraw(proposal.address));
    }

    /// Reads what a claim met that others had changed: who has its addresses, and whose its blocks
    /// are.
    async fn look_again(
        &self,
        network: &Network,
        claim: &EndpointRequest,
        chosen: &Chosen,
    ) -> Result<(), ClusterError> {
        for address in chosen.addresses() {
            let found = self.store.get(&keys::address(network.id, address)).await?;
            // One that nobody has may be somebody's by now: only the view tells what was freed.
            let Some(holder) = found.map(|entry| holder(&entry.value)) else { continue };
            if claim.addresses.contains(&address) {
                return Err(taken(network, address, holder));
            }
            lock(&self.ledger(network.id)).hold(address, holder);
        }
        for block in chosen.proposed.iter().filter_map(|proposal| proposal.block.as_ref()) {
            let found = self.read::<NodeName>(&keys::block(network.id, block.range)).await?;
            let ledger = self.ledger(network.id);
            match found {
                Some(Versioned { value: node, revision }) => {
                    lock(&ledger).own(block.range, Block { node, revision });
                }
                None => lock(&ledger).disown(block.range),
            }
        }
        Ok(())
    }

    /// What is known of a network's addresses. The view keeps it current.
    pub(super) fn ledger(&self, network: NetworkId) -> Arc<Mutex<Ledger>> {
        let mut ledgers = lock(&self.ledgers);
        let new = || Arc::new(Mutex::new(Ledger::new(self.node.clone())));
        ledgers.entry(network).or_insert_with(new).clone()
    }

    /// Forgets a network's addresses, because this node does not use it any more; gives what was
    /// known of them.
    pub(super) fn forget(&self, network: NetworkId) -> Option<Arc<Mutex<Ledger>>> {
        lock(&self.ledgers).remove(&network)
    }

    /// Gives the blocks back that this node had on a network.
    pub(super) async fn leave_blocks(
        &self,
        network: NetworkId,
        ledger: &Mutex<Ledger>,
    ) -> Result<(), ClusterError> {
        let own: Vec<_> = lock(ledger).own_blocks().collect();
        for batch in own.chunks(BATCH) {
            let delete = |transaction: Transaction, (range, revision): &(IpNetwork, u64)| {
                let key = keys::block(network, *range);
                transaction.modified(&key, Revision(*revision)).delete(key)
            };
            // Should one have been taken over meanwhile, the others stay until somebody needs them.
            self.commit(batch.iter().fold(Transaction::new(), delete)).await?;
        }
        Ok(())
    }

    /// Reads anew what is kept, where that has changed.
    async fn read_guard(&self, network: NetworkId) -> Result<(), ClusterError> {
        let guard = self.store.get(&keys::reservations_guard(network)).await?;
        let known = lock(&self.ledger(network)).guard();
        if guard.map(|entry| entry.modified.0) != known {
            self.read_ledger(network).await?;
        }
        Ok(())
    }

    fn endpoint(
        &self,
        network: &Network,
        claim: &EndpointRequest,
        addresses: Vec<IpAddr>,
        ticket: &Ticket,
    ) -> Endpoint {
        let rng = &mut rand::rng();
        let id = EndpointId::random(rng);
        // An id is a valid name: letters and digits.
        let name = claim.name.clone().or_else(|| id.to_string().parse().ok());
        Endpoint {
            id,
            name: name.unwrap_or_else(|| network.name.clone()),
            aliases: claim.aliases.clone(),
            network: network.id,
            node: self.node.clone(),
            addresses,
            mac: claim.mac.unwrap_or_else(|| MacAddr::random(rng)),
            attachment: claim.attachment.clone(),
            host: claim.host,
            service: claim.service.clone(),
            drawn: match ticket {
                Ticket::Drawn { reservation, .. } => reservation.service,
                Ticket::Open(_) | Ticket::Counted { .. } => None,
            },
            weight: claim.weight,
            state: claim.state,
            reason: String::new(),
            labels: claim.labels.clone(),
        }
    }

    /// Changes whether an endpoint takes connections of its service, and says why; gives it as it
    /// is then. `None`: there is no such endpoint. One that is drained stays so.
    ///
    /// # Errors
    /// When the store cannot be reached or is another one.
    pub async fn set_endpoint_state(
        &self,
        network: NetworkId,
        id: EndpointId,
        state: EndpointState,
        reason: &str,
    ) -> Result<Option<Endpoint>, ClusterError> {
        self.change_state(network, id, |endpoint| {
            let differs = (endpoint.state, &*endpoint.reason) != (state, reason);
            let may_be = endpoint.state != EndpointState::Draining && differs;
            may_be.then(|| (state, reason.to_owned()))
        })
        .await
    }

    /// Gives an endpoint the state and the reason that follow from what it is; gives it as it is then.
    /// `None`: there is no such endpoint.
    pub(super) async fn change_state(
        &self,
        network: NetworkId,
        id: EndpointId,
        to: impl Fn(&Endpoint) -> Option<(EndpointState, String)> + Send + Sync,
    ) -> Result<Option<Endpoint>, ClusterError> {
        let key = keys::endpoint(network, id);
        for _ in 0..TRIES {
            let Some(found) = self.read::<Endpoint>(&key).await? else { return Ok(None) };
            let mut endpoint = found.value;
            let Some(changed) = to(&endpoint) else { return Ok(Some(endpoint)) };
            (endpoint.state, endpoint.reason) = changed;
            let transaction = Transaction::new().modified(&key, Revision(found.revision));
            if let Outcome::Committed(_) = self.commit(transaction.put(&key, encode(&endpoint))).await? {
                return Ok(Some(endpoint));
            }
        }
        Err(ClusterError::Contention(format!("endpoint {id}")))
    }

    /// The endpoint that has the claim's name, if the claim is for the very same.
    async fn same_name(
        &self,
        network: &Network,
        claim: &EndpointRequest,
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

    /// Whether an endpoint is still in the store.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn is_current(&self, endpoint: &Endpoint) -> Result<bool, ClusterError> {
        let found = self.store.get(&keys::endpoint(endpoint.network, endpoint.id)).await?;
        Ok(found.is_some())
    }

    /// Removes an endpoint that was never plugged in: nobody has met its addresses, so they are
    /// free at once. Those outside of this node's blocks rest: others have routes to them.
    ///
    /// # Errors
    /// When the store cannot be reached or is another one.
    pub async fn withdraw(&self, endpoint: &Endpoint) -> Result<Option<u64>, ClusterError> {
        self.remove(endpoint, false).await
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
        for attempt in 0..TRIES {
            let Some(found) = self.read::<Endpoint>(&key).await? else { return Ok(None) };
            // By a second try, whose blocks these are is not known for sure.
            let own = match resting || attempt > 0 {
                true => BTreeMap::new(),
                false => lock(&self.ledger(found.network)).own_blocks_of(&found.addresses),
            };
            let must_rest = found.addresses.iter().any(|address| !own.contains_key(address));
            let rest = if must_rest { self.rest_lease().await? } else { None };
            let mut transaction = Transaction::new()
                .modified(&key, Revision(found.revision))
                .delete(&key)
                .delete(keys::name(found.network, &found.name))
                .delete(keys::local(&found.node, found.network, found.id));
            for address in &found.addresses {
                let rest = rest.filter(|_| !own.contains_key(address));
                transaction = freeing(transaction, found.network, *address, rest);
            }
            for block in own.into_values() {
                // It goes back if it was taken for this endpoint alone.
                let key = keys::block(found.network, block.range);
                transaction = transaction.modified(&key, Revision(block.revision));
                if block.is_empty_else {
                    transaction = transaction.delete(key);
                }
            }
            if let Some(service) = &found.drawn {
                transaction = self.give_back(&found, *service, transaction).await?;
            }
            match self.commit(transaction).await {
                Ok(Outcome::Committed(Revision(revision))) => {
                    if found.service.is_some()
                        && let Err(error) = self.forget_acks(&found).await
                    {
                        // A check finds what is left.
                        warn!(endpoint = %found.id, %error, "acknowledgements of its drain left in the store");
                    }
                    return Ok(Some(revision));
                }
                Ok(Outcome::Conflict) => {}
                Err(error) if self.is_rest_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Err(ClusterError::Contention(format!("endpoint {}", endpoint.id)))
    }

    /// Adds to a transaction that an endpoint's addresses are kept for its service again.
    async fn give_back(
        &self,
        endpoint: &Endpoint,
        service: ServiceId,
        transaction: Transaction,
    ) -> Result<Transaction, ClusterError> {
        let Some(name) = &endpoint.service else { return Ok(transaction) };
        let key = keys::reservation(endpoint.network, name);
        let found: Option<Versioned<Reservation>> = self.read(&key).await?;
        Ok(match found.filter(|found| found.service == Some(service)) {
            Some(Versioned { value, revision }) => {
                let more = Reservation { drawn: value.drawn.saturating_sub(1), ..value };
                transaction
                    .modified(&key, Revision(revision))
                    .put(key, encode(&more))
                    .put(keys::usage(endpoint.network), [])
                    // More is kept than before.
                    .put(keys::reservations_guard(endpoint.network), [])
            }
            None => transaction,
        })
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
        self.networks_of(&self.node).await
    }

    /// The networks on which a node has endpoints.
    pub(super) async fn networks_of(&self, node: &NodeName) -> Result<Vec<NetworkId>, ClusterError> {
        let prefix = keys::locals(node);
        let listing = self.store.list(&prefix).await?;
        let network = |key: &String| key.strip_prefix(&prefix)?.split('/').next()?.parse().ok();
        let mut networks: Vec<NetworkId> = listing.entries.keys().filter_map(network).collect();
        networks.dedup();
        Ok(networks)
    }
}

/// Reads the value of an address key.
pub(super) fn holder(value: &[u8]) -> Holder {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Value {
        Endpoint(EndpointId),
        Service { service: ServiceId },
    }
    match serde_json::from_slice(value) {
        Ok(Value::Endpoint(id)) => Holder::Endpoint(id),
        Ok(Value::Service { service }) => Holder::Service(service),
        Err(_) => Holder::Resting,
    }
}

/// Reads the value of a block's key.
pub(super) fn block(entry: &Entry) -> Option<Block> {
    let node = serde_json::from_slice(&entry.value).ok()?;
    Some(Block { node, revision: entry.modified.0 })
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The addresses for a new endpoint.
#[derive(Debug, Default)]
pub(super) struct Chosen {
    /// Those that it must have.
    pub(super) asked: Vec<IpAddr>,
    /// Those that it gets.
    pub(super) proposed: Vec<Proposal>,
}

impl Chosen {
    /// All of them, IPv4 first.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        let proposed = self.proposed.iter().map(|proposal| proposal.address);
        let mut all: Vec<IpAddr> = self.asked.iter().copied().chain(proposed).collect();
        all.sort();
        all
    }
}

/// The transaction that writes a new endpoint.
fn claiming(endpoint: &Endpoint, network: &Versioned<Network>, chosen: &Chosen) -> Transaction {
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
    taking_blocks(transaction, network.id, chosen, &endpoint.node)
}

/// Adds that a node takes the blocks of the addresses that it chose.
pub(super) fn taking_blocks(
    mut transaction: Transaction,
    network: NetworkId,
    chosen: &Chosen,
    node: &NodeName,
) -> Transaction {
    for block in chosen.proposed.iter().filter_map(|proposal| proposal.block.as_ref()) {
        let key = keys::block(network, block.range);
        transaction = transaction.unchanged(&key, block.from.map(Revision)).put(key, encode(node));
    }
    transaction
}

/// Checks addresses that were asked for against the network.
pub(super) fn check(network: &Network, addresses: &[IpAddr]) -> Result<(), ClusterError> {
    if network.removing {
        return Err(ClusterError::Removing(network.name.clone()));
    }
    for (index, &address) in addresses.iter().enumerate() {
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
        if addresses[..index].iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            return refuse("another of its family is asked for too".into());
        }
    }
    Ok(())
}

pub(super) fn taken(network: &Network, address: IpAddr, holder: Holder) -> ClusterError {
    let by = match holder {
        Holder::Endpoint(id) => format!(" by endpoint {id}"),
        Holder::Service(id) => format!(" by service {id}"),
        Holder::Resting => " for a short while, because it was just released".into(),
    };
    ClusterError::AddressTaken { address, network: network.name.clone(), by }
}

/// Whether what is free was only chosen by other calls of this node, which may yet fail.
pub(super) fn is_only_chosen(refusal: &ClusterError) -> bool {
    matches!(refusal, ClusterError::Exhausted { count, .. } if count.unreserved() > 0)
}

/// In what an endpoint differs from what a claim asks for; `None`: it is the same request.
pub fn difference(endpoint: &Endpoint, node: &NodeName, claim: &EndpointRequest) -> Option<String> {
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
    if endpoint.service != claim.service {
        let service = endpoint.service.as_ref().map_or("none", Name::as_str);
        return Some(format!("its service is {service}"));
    }
    if endpoint.aliases != claim.aliases {
        let aliases: Vec<&str> = endpoint.aliases.iter().map(Name::as_str).collect();
        return Some(format!(
            "its aliases are {}",
            if aliases.is_empty() { "none".to_owned() } else { aliases.join(", ") }
        ));
    }
    if endpoint.weight != claim.weight {
        return Some(format!("its weight is {}", endpoint.weight));
    }
    if claim.mac.is_some_and(|mac| mac != endpoint.mac) {
        return Some(format!("its MAC address is {}", endpoint.mac));
    }
    None
}
