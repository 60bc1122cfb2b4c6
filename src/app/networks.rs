//! The agent's part in networks, and in how their addresses are used.

use ipnetwork::IpNetwork;
use tracing::{info, warn};

use super::access;
use super::agent::Agent;
use super::pressure::Levels;
use crate::api::{ApiError, Expanded, NetworkView, NodeUsage, SettingsView, Share, SubnetUsage, Usage};
use crate::cluster::survey::{self, NodeShare};
use crate::cluster::{self, ClusterError, Survey};
use crate::ipam::{Count, SubnetCount};
use crate::model::{ExpandSpec, Network, NetworkId, NetworkSpec, NodeName, Versioned};
use crate::overlay::effective_mtu;
use crate::store::StoreError;

impl Agent {
    pub(super) async fn create_network(&self, spec: &NetworkSpec) -> Result<NetworkView, ApiError> {
        if spec.host_access {
            access::refuse_used(self, &spec.subnets).await?;
        }
        if spec.left_open().contains(&true) {
            // Those that are chosen are not to be of this node's, which may have got others just now.
            self.record.renew().await?;
        }
        let network = self.cluster.create_network(spec, &self.defaults).await?;
        info!(network = %network.name, id = %network.id, vni = %network.vni, "network created");
        Ok(self.changed_view(network).await)
    }

    pub(super) async fn networks(&self) -> Result<Vec<NetworkView>, ApiError> {
        let mut networks = match self.cluster.networks().await {
            Ok(networks) => networks,
            // Without the store the view answers: it is what this node works by.
            Err(ClusterError::Store(StoreError::Unreachable { .. })) => {
                self.snapshot().networks.values().map(|network| Versioned::clone(network)).collect()
            }
            Err(error) => return Err(error.into()),
        };
        networks.sort_by(|a, b| a.name.cmp(&b.name));
        let mut views = Vec::with_capacity(networks.len());
        let mut lost = false;
        for network in networks {
            // A store that is away is not asked again for every network.
            let survey = if lost { None } else { self.survey(&network).await? };
            lost = survey.is_none();
            views.push(self.network_view(network, survey));
        }
        Ok(views)
    }

    pub(super) async fn network(&self, reference: &str) -> Result<NetworkView, ApiError> {
        match self.cluster.network(reference).await {
            Err(ClusterError::Store(StoreError::Unreachable { .. })) => {
                let snapshot = self.snapshot();
                let network = snapshot.network(reference);
                let network = network.ok_or_else(|| ClusterError::NoNetwork(reference.to_owned()))?;
                Ok(self.network_view(Versioned::clone(network), None))
            }
            other => {
                let network = other?;
                let survey = self.survey(&network).await?;
                Ok(self.network_view(network, survey))
            }
        }
    }

    pub(super) async fn remove_network(&self, reference: &str) -> Result<(), ApiError> {
        let id = self.cluster.remove_network(reference).await?;
        info!(network = reference, %id, "network removed");
        Ok(())
    }

    pub(super) async fn expand_network(
        &self,
        reference: &str,
        spec: &ExpandSpec,
    ) -> Result<Expanded, ApiError> {
        if self.cluster.network(reference).await?.host_access {
            access::refuse_used(self, &spec.subnets).await?;
        }
        match self.cluster.expand_network(reference, spec).await? {
            cluster::Expanded::Changed(network) => {
                info!(network = %network.name, id = %network.id, subnets = ?spec.subnets, "network expanded");
                Ok(Expanded::Changed(self.changed_view(network).await))
            }
            cluster::Expanded::Unchanged(network) => {
                Ok(Expanded::Unchanged(self.changed_view(network).await))
            }
        }
    }

    pub(super) async fn shrink_network(
        &self,
        reference: &str,
        subnet: IpNetwork,
    ) -> Result<NetworkView, ApiError> {
        let network = self.cluster.shrink_network(reference, subnet).await?;
        info!(network = %network.name, id = %network.id, %subnet, "network shrunk");
        Ok(self.changed_view(network).await)
    }

    /// How a network's addresses are used; `None`: the store cannot be reached.
    async fn survey(&self, network: &Network) -> Result<Option<Survey>, ClusterError> {
        match self.cluster.survey(network).await {
            Err(ClusterError::Store(StoreError::Unreachable { .. })) => Ok(None),
            survey => survey.map(Some),
        }
    }

    /// A network that was changed: what cannot be read of it now does not undo that.
    async fn changed_view(&self, network: Versioned<Network>) -> NetworkView {
        let survey = self.survey(&network).await.unwrap_or_else(|error| {
            warn!(network = %network.name, %error, "use of the network's addresses not read");
            None
        });
        self.network_view(network, survey)
    }

    fn network_view(&self, network: Versioned<Network>, survey: Option<Survey>) -> NetworkView {
        let effective_mtu = effective_mtu(&self.me, &network);
        let host_obstacle = self.access.obstacle(network.id);
        let Versioned { value: network, revision } = network;
        let (has4, has6) = (network.has_ipv4(), network.has_ipv6());
        let Some(Survey { endpoints, ipv4, ipv6, subnets, nodes }) = survey else {
            let endpoints = self.seen_endpoints(network.id);
            let (subnet_usage, node_usage) = (Vec::new(), Vec::new());
            let (ipv4, ipv6) = (None, None);
            return NetworkView {
                network,
                endpoints,
                ipv4,
                ipv6,
                subnet_usage,
                node_usage,
                effective_mtu,
                host_obstacle,
                revision,
            };
        };
        NetworkView {
            endpoints,
            ipv4: has4.then(|| self.usage(network.id, true, &ipv4)),
            ipv6: has6.then(|| self.usage(network.id, false, &ipv6)),
            subnet_usage: subnets.iter().map(subnet_usage).collect(),
            node_usage: nodes.into_iter().map(|node| node_usage(node, has4, has6)).collect(),
            network,
            effective_mtu,
            host_obstacle,
            revision,
        }
    }

    /// How many endpoints of a network the view shows.
    fn seen_endpoints(&self, network: NetworkId) -> usize {
        self.snapshot().members.get(&network).map_or(0, |members| members.endpoints.len())
    }

    /// What clients need of the configuration.
    pub(super) fn settings(&self) -> SettingsView {
        let Levels { warning, alarm } = self.pressure.levels;
        SettingsView {
            pool_prefix: self.defaults.pool_prefix,
            pool6_prefix: self.defaults.pool6_prefix,
            address_warning: warning,
            address_alarm: alarm,
            dns_domain: self.names.domain(),
            dns_host: self.names.host(),
        }
    }

    /// A count as it is shown, with how full that is.
    pub(super) fn usage(&self, network: NetworkId, ipv4: bool, count: &Count) -> Usage {
        let (level, full_in) = self.pressure.of(network, ipv4, count);
        Usage {
            usable: shown(count.usable),
            endpoints: shown(count.endpoints),
            services: shown(count.services),
            resting: shown(count.resting),
            reserved: shown(count.reserved),
            free: shown(count.free()),
            level,
            full_in: full_in.map(|time| time.as_secs()),
        }
    }
}

fn subnet_usage(subnet: &SubnetCount) -> SubnetUsage {
    let SubnetCount { cidr, count, excluded } = subnet;
    SubnetUsage {
        cidr: *cidr,
        usable: shown(count.usable),
        endpoints: shown(count.endpoints),
        services: shown(count.services),
        resting: shown(count.resting),
        free: shown(count.free()),
        excluded: shown(*excluded),
    }
}

fn node_usage((node, share): (NodeName, NodeShare), has_ipv4: bool, has_ipv6: bool) -> NodeUsage {
    let family = |share: survey::Share| Share {
        blocks: shown(share.own.blocks),
        endpoints: shown(share.endpoints),
        free: shown(share.own.free),
    };
    NodeUsage {
        node,
        ipv4: has_ipv4.then(|| family(share.ipv4)),
        ipv6: has_ipv6.then(|| family(share.ipv6)),
    }
}

/// A number for programs that know 64 bits.
fn shown(number: u128) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}
