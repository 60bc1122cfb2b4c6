//! Networks: creating and removing them.

use std::collections::BTreeSet;

use ipnetwork::IpNetwork;

use super::subnets::underlay_within;
use super::{BATCH, Cluster, ClusterError, TRIES, decode, encode, keys};
use crate::ipam::pool;
use crate::model::node::UPLINK_COUNT;
use crate::model::subnet::overlap;
use crate::model::{Endpoint, Network, NetworkId, NetworkSpec, Node, Subnet, Versioned, Vni};
use crate::store::{Entry, Outcome, Revision, Transaction};

/// What a network gets when its creator leaves it open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    /// Pools of IPv4 subnets.
    pub pools: Vec<IpNetwork>,
    /// The prefix length of a subnet from `pools`.
    pub pool_prefix: u8,
    /// Pools of IPv6 subnets.
    pub pools6: Vec<IpNetwork>,
    /// The prefix length of a subnet from `pools6`.
    pub pool6_prefix: u8,
    /// The first and the last VNI that are given out.
    pub vnis: (Vni, Vni),
}

/// What has to be known of the cluster to create a network.
struct Existing {
    networks: Vec<Network>,
    nodes: Vec<Node>,
}

impl Cluster {
    /// Creates a network.
    ///
    /// # Errors
    /// When the request cannot be fulfilled; then nothing was written.
    pub async fn create_network(
        &self,
        spec: &NetworkSpec,
        defaults: &Defaults,
    ) -> Result<Versioned<Network>, ClusterError> {
        spec.subnets()?;
        for _ in 0..TRIES {
            let guard = self.store.get(keys::GUARD).await?;
            let existing = Existing {
                // One that cannot be read may have the VNI or the name.
                networks: self
                    .read_every(keys::NETWORKS)
                    .await?
                    .into_iter()
                    .map(|(_, n)| n.value)
                    .collect(),
                nodes: self.nodes().await?,
            };
            let network = design(spec, defaults, &existing)?;
            let found = guard.map(|entry| entry.modified);
            let transaction = Transaction::new().unchanged(keys::GUARD, found);
            let transaction =
                transaction.put(keys::GUARD, []).put(keys::network(network.id), encode(&network));
            if let Outcome::Committed(Revision(revision)) = self.commit(transaction).await? {
                return Ok(Versioned { value: network, revision });
            }
        }
        Err(ClusterError::Contention("the list of networks".into()))
    }

    /// All networks, as the store has them now.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn networks(&self) -> Result<Vec<Versioned<Network>>, ClusterError> {
        Ok(self.read_all(keys::NETWORKS).await?.into_iter().map(|(_, network)| network).collect())
    }

    /// The network with this name or id, as the store has it now.
    ///
    /// # Errors
    /// [`ClusterError::NoNetwork`] when there is none.
    pub async fn network(&self, reference: &str) -> Result<Versioned<Network>, ClusterError> {
        let networks = self.networks().await?;
        let by_name = networks.iter().position(|network| network.name.as_str() == reference);
        let by_id = || networks.iter().position(|network| network.id.to_string() == reference);
        match by_name.or_else(by_id) {
            Some(index) => Ok(networks.into_iter().nth(index).ok_or_else(|| no_network(reference))?),
            None => Err(no_network(reference)),
        }
    }

    /// How many endpoints a network has in the cluster.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn endpoint_count(&self, network: NetworkId) -> Result<usize, ClusterError> {
        Ok(self.store.list(&keys::endpoints(network)).await?.entries.len())
    }

    /// Removes a network that has no endpoints but the hosts of nodes. Removal that was interrupted goes
    /// on.
    ///
    /// # Errors
    /// [`ClusterError::InUse`] when it has endpoints; then it is as it was.
    pub async fn remove_network(&self, reference: &str) -> Result<NetworkId, ClusterError> {
        for _ in 0..TRIES {
            let network = self.network(reference).await?;
            self.refuse_in_use(&network).await?;
            // From here on nothing can be attached: an attach compares the network's revision.
            let key = keys::network(network.id);
            let marked = Network { removing: true, ..network.value.clone() };
            let marking =
                Transaction::new().modified(&key, Revision(network.revision)).put(&key, encode(&marked));
            let Outcome::Committed(revision) = self.commit(marking).await? else { continue };
            if let Err(in_use) = self.refuse_in_use(&network).await {
                let unmarking =
                    Transaction::new().modified(&key, revision).put(&key, encode(&network.value));
                self.commit(unmarking).await?;
                return Err(in_use);
            }
            return self.erase_network(network.id).await;
        }
        Err(ClusterError::Contention(format!("network {reference}")))
    }

    async fn refuse_in_use(&self, network: &Network) -> Result<(), ClusterError> {
        let services = self.services().await?;
        let mut of_network = services.iter().filter(|service| service.networks.contains(&network.id));
        if let Some(service) = of_network.next() {
            let (network, service) = (network.name.clone(), service.name.clone());
            return Err(ClusterError::HasService { network, service });
        }
        let endpoints = self.store.list(&keys::endpoints(network.id)).await?.entries;
        let read = |(key, entry): (&String, &Entry)| (key.clone(), decode::<Endpoint>(key, entry));
        // The agents see by themselves that the network is going.
        let of_others = |(_, endpoint): &(_, Result<Versioned<Endpoint>, _>)| {
            !endpoint.as_ref().is_ok_and(|endpoint| endpoint.host)
        };
        let mut others = endpoints.iter().map(read).filter(of_others);
        match others.next() {
            None => Ok(()),
            Some((key, first)) => Err(ClusterError::InUse {
                network: network.name.clone(),
                count: 1 + others.count(),
                example: match first {
                    Ok(endpoint) => format!("{} on node {}", endpoint.name, endpoint.node),
                    Err(_) => key,
                },
            }),
        }
    }

    async fn erase_network(&self, id: NetworkId) -> Result<NetworkId, ClusterError> {
        let members = self.store.list(&keys::members(id)).await?;
        // Those of hosts. What their nodes follow goes first: by the endpoints it is found again.
        let hosts = members.entries.iter().filter(|(key, _)| key.starts_with(&keys::endpoints(id)));
        let hosts = hosts.filter_map(|(key, entry)| decode::<Endpoint>(key, entry).ok());
        let locals = hosts.map(|endpoint| keys::local(&endpoint.node, id, endpoint.id));
        let leftovers: Vec<String> =
            locals.collect::<Vec<_>>().into_iter().chain(members.entries.into_keys()).collect();
        for batch in leftovers.chunks(BATCH) {
            let transaction = batch.iter().fold(Transaction::new(), |t, key| t.delete(key));
            self.commit(transaction).await?;
        }
        self.commit(Transaction::new().delete(keys::network(id))).await?;
        Ok(id)
    }
}

pub(super) fn no_network(reference: &str) -> ClusterError {
    ClusterError::NoNetwork(reference.chars().take(64).collect())
}

/// Designs the network: everything that was left open is chosen.
fn design(
    spec: &NetworkSpec,
    defaults: &Defaults,
    existing: &Existing,
) -> Result<Network, ClusterError> {
    if let Some(other) = existing.networks.iter().find(|network| network.name == spec.name) {
        return Err(match other.removing {
            true => ClusterError::Removing(spec.name.clone()),
            false => ClusterError::NetworkExists(spec.name.clone()),
        });
    }
    if let Some(mtu) = spec.mtu
        && let Some(smallest) = existing.nodes.iter().min_by_key(|node| node.mtu)
        && mtu > smallest.mtu
    {
        return Err(ClusterError::MtuTooLarge { mtu, node: smallest.name.clone(), most: smallest.mtu });
    }
    let subnets = choose_subnets(spec, defaults, existing)?;
    if spec.host_access {
        refuse_reached(&subnets, existing)?;
    }
    Ok(Network {
        id: NetworkId::random(&mut rand::rng()),
        name: spec.name.clone(),
        subnets: subnets
            .into_iter()
            .map(|subnet| subnet.with_blocks_for(existing.nodes.len()))
            .collect(),
        vni: choose_vni(spec.vni, defaults, &existing.networks)?,
        uplink: choose_uplink(&existing.networks)?,
        mtu: spec.mtu,
        internal: spec.internal,
        host_access: spec.host_access,
        labels: spec.labels.clone(),
        leaving: Vec::new(),
        removing: false,
    })
}

/// Refuses what overlaps a network that hosts reach: of two, a host would reach one only. A node whose
/// underlay it contains could not be reached any more at all.
fn refuse_reached(subnets: &[Subnet], existing: &Existing) -> Result<(), ClusterError> {
    for subnet in subnets.iter().map(Subnet::cidr) {
        if let Some(other) = underlay_within(&existing.nodes, subnet) {
            return Err(ClusterError::HostOverlaps { subnet, other });
        }
        for network in existing.networks.iter().filter(|network| network.host_access) {
            if let Some(other) = network.standing().find(|other| overlap(other.cidr(), subnet)) {
                let (cidr, name) = (other.cidr(), &network.name);
                let other = format!("subnet {cidr} of network {name}, which hosts reach too");
                return Err(ClusterError::HostOverlaps { subnet, other });
            }
        }
    }
    Ok(())
}

fn choose_subnets(
    spec: &NetworkSpec,
    defaults: &Defaults,
    existing: &Existing,
) -> Result<Vec<Subnet>, ClusterError> {
    let mut subnets = spec.subnets()?;
    let mut in_use: Vec<IpNetwork> =
        existing.networks.iter().flat_map(|network| network.standing().map(Subnet::cidr)).collect();
    in_use.extend(existing.nodes.iter().flat_map(|node| node.subnets_in_use.iter().copied()));
    in_use.extend(subnets.iter().map(Subnet::cidr));
    let [need4, need6] = spec.left_open();
    let pools = [
        (
            need4,
            &defaults.pools,
            spec.prefix.unwrap_or(defaults.pool_prefix),
            "IPv4 subnet of the default pools",
        ),
        (need6, &defaults.pools6, defaults.pool6_prefix, "IPv6 subnet of the default pools"),
    ];
    for (needed, pools, prefix, what) in pools {
        if needed {
            let none_left = ClusterError::NoneLeft(what, ", give --subnet, or configure larger pools");
            let cidr = pool::free_subnet(pools, prefix, &in_use).ok_or(none_left)?;
            let subnet = Subnet::new(cidr, None, None, BTreeSet::new())
                .map_err(|e| ClusterError::Invalid(e.into()))?;
            subnets.push(subnet);
        }
    }
    Ok(subnets)
}

fn choose_vni(
    wanted: Option<Vni>,
    defaults: &Defaults,
    networks: &[Network],
) -> Result<Vni, ClusterError> {
    if let Some(vni) = wanted {
        return match networks.iter().find(|network| network.vni == vni) {
            Some(other) => Err(ClusterError::VniTaken { vni, network: other.name.clone() }),
            None => Ok(vni),
        };
    }
    let taken: BTreeSet<Vni> = networks.iter().map(|network| network.vni).collect();
    let (first, last) = defaults.vnis;
    (first.number()..=last.number())
        .filter_map(Vni::new)
        .find(|vni| !taken.contains(vni))
        .ok_or(ClusterError::NoneLeft("VNI", ", or configure a larger range"))
}

fn choose_uplink(networks: &[Network]) -> Result<u16, ClusterError> {
    let taken: BTreeSet<u16> = networks.iter().map(|network| network.uplink).collect();
    (0..UPLINK_COUNT)
        .find(|uplink| !taken.contains(uplink))
        .ok_or(ClusterError::NoneLeft("uplink number", ""))
}

#[cfg(test)]
mod tests;
