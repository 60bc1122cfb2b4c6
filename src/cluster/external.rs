//! Targets of services outside of the overlay: with which networks they go together.

use ipnetwork::IpNetwork;

use super::{Cluster, ClusterError, keys};
use crate::model::{External, Network, Service, ServiceSpec, Versioned};
use crate::store::{Revision, Transaction};

impl Cluster {
    /// The networks that a service is to be on: each once, and with a way to its targets outside.
    pub(super) async fn networks_for(
        &self,
        spec: &ServiceSpec,
    ) -> Result<Vec<Versioned<Network>>, ClusterError> {
        let mut networks: Vec<Versioned<Network>> = Vec::new();
        for reference in &spec.networks {
            let network = self.network(reference).await?;
            if networks.iter().any(|other| other.id == network.id) {
                let text = format!("network {reference} is named twice");
                return Err(ClusterError::ServiceInvalid(text));
            }
            networks.push(network);
        }
        check(&spec.external, networks.iter().map(|network| &network.value))?;
        Ok(networks)
    }

    /// Adds to the transaction that changes a service what its new targets outside need: its networks
    /// are as they were looked at, and get no subnet meanwhile.
    pub(super) async fn adding_external(
        &self,
        transaction: Transaction,
        before: &Service,
        after: &Service,
    ) -> Result<Transaction, ClusterError> {
        if after.external.iter().all(|external| before.external.contains(external)) {
            return Ok(transaction);
        }
        let mut networks = Vec::new();
        for id in &after.networks {
            networks.push(self.network(&id.to_string()).await?);
        }
        check(&after.external, networks.iter().map(|network| &network.value))?;
        let compared = networks.iter().fold(transaction, |transaction, network| {
            transaction.modified(keys::network(network.id), Revision(network.revision))
        });
        Ok(guarded(compared, &after.external))
    }

    /// Refuses what a network is to become where a target outside of one of its services would be
    /// within a subnet that it did not have before.
    pub(super) async fn refuse_external_within(
        &self,
        before: &Network,
        after: &Network,
    ) -> Result<(), ClusterError> {
        let had = |cidr: &IpNetwork| before.standing().any(|subnet| subnet.cidr() == *cidr);
        let new: Vec<IpNetwork> =
            after.standing().map(|subnet| subnet.cidr()).filter(|cidr| !had(cidr)).collect();
        for service in self.services().await? {
            if !service.networks.contains(&before.id) {
                continue;
            }
            for external in &service.external {
                if let Some(&subnet) = new.iter().find(|cidr| cidr.contains(external.address)) {
                    let other = format!("the external target {external} of service {}", service.name);
                    let network = before.name.clone();
                    return Err(ClusterError::SubnetOverlaps { subnet, network, other });
                }
            }
        }
        Ok(())
    }
}

/// A transaction that writes targets outside: who adds a subnet at the same time tries again.
pub(super) fn guarded(transaction: Transaction, external: &[External]) -> Transaction {
    if external.is_empty() { transaction } else { transaction.put(keys::GUARD, []) }
}

/// Refuses targets outside to which the networks have no way, or which are not outside.
fn check<'a>(
    external: &[External],
    networks: impl Iterator<Item = &'a Network> + Clone,
) -> Result<(), ClusterError> {
    let refused = |text: String| Err(ClusterError::ServiceInvalid(text));
    for target in external {
        for network in networks.clone() {
            if network.internal {
                return refused(format!(
                    "external target {target} cannot be reached from network {}, which is internal: leave \
                     it out, or choose a network that has a way out",
                    network.name
                ));
            }
            let mut subnets = network.standing().map(|subnet| subnet.cidr());
            if let Some(cidr) = subnets.find(|cidr| cidr.contains(target.address)) {
                return refused(format!(
                    "external target {target} is within subnet {cidr} of network {}, so it is not \
                     outside: attach the endpoint that is to have it with --service, or give another \
                     address",
                    network.name
                ));
            }
        }
        let has_family = |network: &Network| {
            network.standing().any(|subnet| subnet.cidr().is_ipv4() == target.address.is_ipv4())
        };
        if !networks.clone().any(has_family) {
            let (family, other) = match target.address.is_ipv4() {
                true => ("IPv4", "IPv6"),
                false => ("IPv6", "IPv4"),
            };
            return refused(format!(
                "external target {target} is an {family} address, and none of the service's networks has \
                 {family}: give its {other} address"
            ));
        }
    }
    Ok(())
}
