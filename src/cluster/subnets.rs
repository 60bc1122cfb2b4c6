//! The subnets of a network that lives: adding and removing them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::endpoints::holder;
use super::networks::no_network;
use super::rest::freeing;
use super::{BATCH, Cluster, ClusterError, TRIES, encode, keys};
use crate::model::snapshot::Holder;
use crate::model::{
    Endpoint, EndpointId, ExpandSpec, Network, NetworkId, Node, Subnet, Versioned, subnet,
};
use crate::store::{Entry, Outcome, Revision, Transaction};

/// What adding subnets did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expanded {
    /// The network has subnets that it did not have.
    Changed(Versioned<Network>),
    /// It had all of them, with the same options.
    Unchanged(Versioned<Network>),
}

impl Cluster {
    /// Adds subnets to a network. One that it has already, with the same options, is no change.
    ///
    /// # Errors
    /// When the request cannot be fulfilled; then nothing was written.
    pub async fn expand_network(
        &self,
        reference: &str,
        spec: &ExpandSpec,
    ) -> Result<Expanded, ClusterError> {
        let wanted = spec.subnets()?;
        for _ in 0..TRIES {
            // Written with every network: two changes at once cannot both find a range free.
            let guard = self.store.get(keys::GUARD).await?;
            let networks = self.every_network().await?;
            let network = find(&networks, reference)?;
            let Some(expanded) = expand(network, &wanted, &networks, &self.nodes().await?)? else {
                return Ok(Expanded::Unchanged(network.clone()));
            };
            self.refuse_external_within(network, &expanded).await?;
            let found = guard.map(|entry| entry.modified);
            let transaction = Transaction::new().unchanged(keys::GUARD, found);
            let key = keys::network(network.id);
            let transaction = transaction
                .modified(&key, Revision(network.revision))
                .put(keys::GUARD, [])
                .put(&key, encode(&expanded));
            if let Outcome::Committed(Revision(revision)) = self.commit(transaction).await? {
                return Ok(Expanded::Changed(Versioned { value: expanded, revision }));
            }
        }
        Err(ClusterError::Contention(format!("network {reference}")))
    }

    /// Removes a subnet of which no address is taken. Removal that was interrupted goes on.
    ///
    /// # Errors
    /// [`ClusterError::SubnetInUse`] when an address of it is taken; then it is as it was.
    pub async fn shrink_network(
        &self,
        reference: &str,
        cidr: IpNetwork,
    ) -> Result<Versioned<Network>, ClusterError> {
        for _ in 0..TRIES {
            let network = find(&self.every_network().await?, reference)?.clone();
            let revision = Revision(network.revision);
            let before = staying(&network, cidr)?;
            if let Err(in_use) = self.refuse_subnet_in_use(&before, cidr).await {
                if before == network.value || self.rewrite(&before, revision).await?.is_some() {
                    return Err(in_use);
                }
                continue;
            }
            // From here on nothing gets an address of it: an attach compares the network's revision.
            // Until it is certain that nothing has one, the subnet stands on every node.
            let marked = leaving(&before, cidr);
            let Some(revision) = self.rewrite(&marked, revision).await? else { continue };
            if self.refuse_subnet_in_use(&before, cidr).await.is_err() {
                continue; // The next round puts it back.
            }
            if !self.move_hosts(&network, revision, cidr).await?
                || !self.erase_blocks(&network, revision, cidr).await?
            {
                continue;
            }
            let after = without(&marked, cidr);
            if let Some(Revision(revision)) = self.rewrite(&after, revision).await? {
                return Ok(Versioned { value: after, revision });
            }
        }
        Err(ClusterError::Contention(format!("network {reference}")))
    }

    /// Writes a network that was written last at this revision. `None`: it was not.
    async fn rewrite(
        &self,
        network: &Network,
        revision: Revision,
    ) -> Result<Option<Revision>, ClusterError> {
        let key = keys::network(network.id);
        let transaction = Transaction::new().modified(&key, revision).put(&key, encode(network));
        match self.commit(transaction).await? {
            Outcome::Committed(revision) => Ok(Some(revision)),
            Outcome::Conflict => Ok(None),
        }
    }

    /// Removes the blocks that nodes have of a subnet, as long as the network was written last at
    /// this revision. `false`: it was not.
    async fn erase_blocks(
        &self,
        network: &Network,
        revision: Revision,
        cidr: IpNetwork,
    ) -> Result<bool, ClusterError> {
        let prefix = keys::blocks(network.id);
        let listing = self.store.list(&prefix).await?;
        let range = |key: &String| key.strip_prefix(&prefix)?.parse::<IpNetwork>().ok();
        let within = |key: &String| range(key).is_some_and(|range| cidr.contains(range.network()));
        let blocks: Vec<String> = listing.entries.into_keys().filter(within).collect();
        for batch in blocks.chunks(BATCH) {
            let transaction = Transaction::new().modified(keys::network(network.id), revision);
            let transaction = batch.iter().fold(transaction, |t, key| t.delete(key));
            if self.commit(transaction).await? == Outcome::Conflict {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes hosts out that have addresses of a subnet, as long as the network was written last at this
    /// revision: their agents plug them in again, with others. `false`: it was not, or one was changed.
    /// Of the subnet nothing rests: as long as it is not there, its addresses are nobody's.
    async fn move_hosts(
        &self,
        network: &Network,
        revision: Revision,
        cidr: IpNetwork,
    ) -> Result<bool, ClusterError> {
        for (key, endpoint) in self.read_all::<Endpoint>(&keys::endpoints(network.id)).await? {
            if !endpoint.host || !endpoint.addresses.iter().any(|address| cidr.contains(*address)) {
                continue;
            }
            let mut transaction = Transaction::new()
                .modified(keys::network(network.id), revision)
                .modified(&key, Revision(endpoint.revision))
                .delete(key)
                .delete(keys::name(network.id, &endpoint.name))
                .delete(keys::local(&endpoint.node, network.id, endpoint.id));
            let rest = self.rest_lease().await?;
            for address in &endpoint.addresses {
                let rest = rest.filter(|_| !cidr.contains(*address));
                transaction = freeing(transaction, network.id, *address, rest);
            }
            match self.commit(transaction).await {
                Ok(Outcome::Committed(_)) => {}
                Ok(Outcome::Conflict) => return Ok(false),
                Err(error) if self.is_rest_gone(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// All networks. One that cannot be read may have any range, so it is an error.
    async fn every_network(&self) -> Result<Vec<Versioned<Network>>, ClusterError> {
        let networks = self.read_every(keys::NETWORKS).await?;
        Ok(networks.into_iter().map(|(_, network)| network).collect())
    }

    async fn refuse_subnet_in_use(
        &self,
        network: &Network,
        cidr: IpNetwork,
    ) -> Result<(), ClusterError> {
        let prefix = keys::addresses(network.id);
        let listing = self.store.list(&prefix).await?;
        let hosts = match network.host_access {
            true => self.endpoints(network.id).await?,
            false => Vec::new(),
        };
        let hosts: BTreeSet<EndpointId> = hosts.iter().filter(|e| e.host).map(|e| e.id).collect();
        let within = |(key, entry): (&String, &Entry)| {
            let address: IpAddr = key.strip_prefix(&prefix)?.parse().ok()?;
            let holder = holder(&entry.value);
            // Those get others.
            let is_host = matches!(holder, Holder::Endpoint(id) if hosts.contains(&id));
            (cidr.contains(address) && !is_host).then_some((address, holder))
        };
        let taken: Vec<(IpAddr, Holder)> = listing.entries.iter().filter_map(within).collect();
        let resting = taken.iter().filter(|(_, holder)| *holder == Holder::Resting).count();
        let held = taken.iter().find(|(_, holder)| *holder != Holder::Resting);
        let Some(&(address, holder)) = held.or(taken.first()) else {
            return self.refuse_subnet_reserved(network, cidr).await;
        };
        Err(ClusterError::SubnetInUse {
            subnet: cidr,
            network: network.name.clone(),
            endpoints: taken.len() - resting,
            resting,
            example: match holder {
                Holder::Resting => address.to_string(),
                Holder::Service(id) => format!("{address} of service {id}"),
                Holder::Endpoint(id) => {
                    let key = keys::endpoint(network.id, id);
                    let endpoint = self.read::<Endpoint>(&key).await.ok().flatten();
                    match endpoint {
                        Some(endpoint) => {
                            format!("{address} of {} on node {}", endpoint.name, endpoint.node)
                        }
                        None => format!("{address} of endpoint {id}"),
                    }
                }
            },
        })
    }
}

impl Cluster {
    /// Refuses to remove a subnet without which the network would have less than is kept.
    async fn refuse_subnet_reserved(
        &self,
        network: &Network,
        cidr: IpNetwork,
    ) -> Result<(), ClusterError> {
        let after = without(&leaving(network, cidr), cidr);
        let (count4, count6) = self.counts(&after).await?;
        let count = if cidr.is_ipv4() { count4 } else { count6 };
        let short = count.reserved.saturating_sub(count.unreserved());
        match short {
            0 => Ok(()),
            short => Err(ClusterError::SubnetReserved {
                subnet: cidr,
                network: network.name.clone(),
                reserved: count.reserved,
                short,
            }),
        }
    }
}

/// The network with this name or id. A name comes first.
fn find<'a>(
    networks: &'a [Versioned<Network>],
    reference: &str,
) -> Result<&'a Versioned<Network>, ClusterError> {
    let named = networks.iter().find(|network| network.name.as_str() == reference);
    let id: Option<NetworkId> = reference.parse().ok();
    let found = named.or_else(|| networks.iter().find(|network| Some(network.id) == id));
    let network = found.ok_or_else(|| no_network(reference))?;
    match network.removing {
        true => Err(ClusterError::Removing(network.name.clone())),
        false => Ok(network),
    }
}

/// The network with these subnets too; `None`: it has them all.
fn expand(
    network: &Network,
    wanted: &[Subnet],
    networks: &[Versioned<Network>],
    nodes: &[Node],
) -> Result<Option<Network>, ClusterError> {
    let mut expanded = network.clone();
    for subnet in wanted {
        let cidr = subnet.cidr();
        if let Some(present) = network.standing().find(|present| present.cidr() == cidr) {
            if !present.is_what_was_asked(subnet) {
                let (network, present) = (network.name.clone(), options(present));
                return Err(ClusterError::SubnetExists { subnet: cidr, network, present });
            }
            // One that is being removed stays.
            expanded.subnets.extend(expanded.leaving.extract_if(.., |leaving| leaving.cidr() == cidr));
            continue;
        }
        let has_family = if cidr.is_ipv4() { network.has_ipv4() } else { network.has_ipv6() };
        if !has_family {
            let family = if cidr.is_ipv4() { "IPv4" } else { "IPv6" };
            let network = network.name.clone();
            return Err(ClusterError::NewFamily { subnet: cidr, network, family });
        }
        if let Some(other) = overlapped(network, cidr, networks, nodes) {
            let network = network.name.clone();
            return Err(ClusterError::SubnetOverlaps { subnet: cidr, network, other });
        }
        expanded.subnets.push(subnet.clone().with_blocks_for(nodes.len()));
    }
    Ok((expanded != *network).then_some(expanded))
}

/// What has addresses of a range, for people. Ranges of special use (and so those of uplinks) were
/// refused before ([`Subnet::new`]).
fn overlapped(
    network: &Network,
    cidr: IpNetwork,
    networks: &[Versioned<Network>],
    nodes: &[Node],
) -> Option<String> {
    let overlapping = |network: &Network| {
        let mut ranges = network.standing().map(Subnet::cidr);
        ranges.find(|range| subnet::overlap(*range, cidr))
    };
    if let Some(own) = overlapping(network) {
        return Some(format!("its own subnet {own}"));
    }
    let others = networks.iter().filter(|other| other.id != network.id);
    let of_networks = others
        .filter_map(|other| Some(format!("subnet {} of network {}", overlapping(other)?, other.name)));
    let used = nodes.iter().filter_map(|node| {
        let range = node.subnets_in_use.iter().find(|range| subnet::overlap(**range, cidr))?;
        Some(format!("{range}, which is in use on node {}", node.name))
    });
    of_networks.chain(underlay_within(nodes, cidr)).chain(used).next()
}

/// The underlay address of a node in a range, for people.
pub fn underlay_within<'a>(
    nodes: impl IntoIterator<Item = &'a Node>,
    range: IpNetwork,
) -> Option<String> {
    let node = nodes.into_iter().find(|node| range.contains(node.underlay))?;
    Some(format!("the underlay address {} of node {}", node.underlay, node.name))
}

/// A subnet's options, for people.
fn options(subnet: &Subnet) -> String {
    let mut text = format!("gateway {}", subnet.gateway());
    if let Some(range) = subnet.range() {
        text.push_str(&format!(", range {range}"));
    }
    for address in subnet.reserved() {
        text.push_str(&format!(", reserved {address}"));
    }
    text
}

/// The network as it is when the subnet stays. A removal that was interrupted may have left it
/// among those that are being removed.
fn staying(network: &Network, cidr: IpNetwork) -> Result<Network, ClusterError> {
    let mut network = network.clone();
    network.subnets.extend(network.leaving.extract_if(.., |subnet| subnet.cidr() == cidr));
    let name = network.name.clone();
    if !network.subnets.iter().any(|subnet| subnet.cidr() == cidr) {
        let subnets = network.subnets.iter().map(|subnet| subnet.cidr().to_string());
        let subnets = subnets.collect::<Vec<_>>().join(", ");
        return Err(ClusterError::NoSubnet { subnet: cidr, network: name, subnets });
    }
    if network.subnets.len() == 1 {
        return Err(ClusterError::LastSubnet { subnet: cidr, network: name });
    }
    Ok(network)
}

/// The network while a subnet is being removed.
fn leaving(network: &Network, cidr: IpNetwork) -> Network {
    let mut network = network.clone();
    network.leaving.extend(network.subnets.extract_if(.., |subnet| subnet.cidr() == cidr));
    network
}

/// The network when a subnet has been removed.
fn without(network: &Network, cidr: IpNetwork) -> Network {
    let mut network = network.clone();
    network.leaving.retain(|subnet| subnet.cidr() != cidr);
    network
}

#[cfg(test)]
pub(super) mod tests;
