//! From a configuration to a place in a cluster.

use std::sync::Arc;

use anyhow::Context as _;
use tracing::{error, warn};

use super::engine;
use super::front::Front;
use super::identity::Identity;
use crate::api::{ApiError, ErrorCode};
use crate::cluster::{Cluster, ClusterError};
use crate::config::underlay::{self, Candidate};
use crate::config::{Config, StoreConfig};
use crate::kernel::{Host, Inventory};
use crate::model::node::inner_mtu;
use crate::model::{ClusterId, NetworkId, Node};
use crate::store::embedded::Embedded;
use crate::store::etcd::{Etcd, EtcdConfig};
use crate::store::schema::{self, Identity as StoreIdentity};
use crate::store::{Backoff, Store, StoreError};

/// Opens the configured store. An etcd that is down does not hinder it.
pub(super) fn open_store(config: &Config) -> anyhow::Result<Arc<dyn Store>> {
    match &config.store {
        StoreConfig::Embedded { path } => Ok(Arc::new(Embedded::open(path)?)),
        StoreConfig::Etcd(etcd) => {
            let password = etcd.login.as_ref().map(|login| {
                let text = std::fs::read_to_string(&login.password_file);
                let first = text.map(|text| text.lines().next().unwrap_or_default().to_owned());
                first.with_context(|| format!("cannot read {}", login.password_file.display()))
            });
            Ok(Arc::new(Etcd::new(EtcdConfig {
                endpoints: etcd.endpoints.clone(),
                prefix: etcd.prefix.clone(),
                ca: etcd.ca.clone(),
                certificate: etcd.identity.as_ref().map(|identity| identity.cert.clone()),
                key: etcd.identity.as_ref().map(|identity| identity.key.clone()),
                user: etcd.login.as_ref().map(|login| login.user.clone()),
                password: password.transpose()?,
                timeout: etcd.timeout,
            })?))
        }
    }
}

/// Describes this node from its configuration, its identity and its interfaces.
pub(super) fn describe(config: &Config, identity: &Identity) -> anyhow::Result<Node> {
    let inventory = Host::open()?.inventory()?;
    let up = inventory.interfaces.iter().filter(|interface| interface.up);
    let candidates: Vec<Candidate> = up
        .flat_map(|interface| {
            interface.addresses.iter().map(|address| Candidate {
                interface: interface.name.clone(),
                address: address.ip(),
                mtu: interface.mtu,
            })
        })
        .collect();
    let chosen = underlay::choose(config.underlay.as_ref(), &candidates)?;
    let engine::Chosen { engine, reason } = engine::choose(config.lb.engine, config.lb.connections)?;
    let socket_lb = engine::asked_group(&config.lb, engine)?;
    tracing::info!(%engine, reason, ?socket_lb, "what balances services on this node");
    Ok(Node {
        id: identity.node,
        name: config.node.clone(),
        underlay: chosen.address,
        vtep_mac: identity.vtep_mac,
        tunnel_port: config.tunnel_port,
        mtu: inner_mtu(chosen.address, chosen.mtu),
        subnets_in_use: subnets(&inventory),
        labels: config.labels.clone(),
        lb: engine,
        lb_reason: reason,
        socket_lb,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// What the host has beside ours.
pub(super) async fn inventory() -> Result<Inventory, ApiError> {
    let read = tokio::task::spawn_blocking(|| Host::open()?.inventory()).await;
    Ok(read.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))??)
}

/// The subnets that the default pools must not give out because of this node.
pub(super) fn subnets(inventory: &Inventory) -> Vec<ipnetwork::IpNetwork> {
    inventory.subnets.iter().copied().collect()
}

/// Joins the cluster, and finds the networks on which this node has endpoints; tries again as long
/// as the store cannot be used, and says so to `front`.
///
/// # Errors
/// What trying again does not mend: a newer schema, a name that another machine has.
pub(super) async fn join(
    store: &Arc<dyn Store>,
    config: &Config,
    identity: &mut Identity,
    node: &Node,
    front: &Front,
) -> anyhow::Result<(Cluster, Vec<NetworkId>)> {
    let (mut said, mut backoff) = (String::new(), Backoff::default());
    loop {
        let problem = match attempt(store, config, identity, node).await {
            Ok(joined) => return Ok(joined),
            Err(error) => error,
        };
        let lasting = matches!(
            problem.downcast_ref::<ClusterError>(),
            Some(
                ClusterError::Replaced(_)
                    | ClusterError::Contention(_)
                    | ClusterError::Store(
                        StoreError::Unreachable { .. }
                            | StoreError::Failed { .. }
                            | StoreError::LeaseGone(_)
                    )
            )
        );
        if !lasting {
            return Err(problem);
        }
        if let Some(error) = problem.downcast_ref::<ClusterError>() {
            front.hindered_by(ApiError::from(error.clone()));
        }
        let text = problem.to_string();
        if text == said {
            warn!(error = text, "not in the cluster yet");
        } else {
            error!(error = text, "not in the cluster yet: it is tried again until it works");
            said = text;
        }
        // Nobody may be listening to systemd's socket.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(&said)]);
        tokio::time::sleep(backoff.pause()).await;
    }
}

async fn attempt(
    store: &Arc<dyn Store>,
    config: &Config,
    identity: &mut Identity,
    node: &Node,
) -> anyhow::Result<(Cluster, Vec<NetworkId>)> {
    let fresh = ClusterId::random(&mut rand::rng());
    let found = schema::identify(store.as_ref(), identity.cluster, fresh).await;
    match found.map_err(ClusterError::from)? {
        StoreIdentity::Replaced { .. } => return Err(ClusterError::Replaced(store.name()).into()),
        StoreIdentity::Cluster(id) => {
            if identity.cluster != Some(id) {
                identity.cluster = Some(id);
                identity.save(&config.state_dir)?;
            }
        }
    }
    let cluster = Cluster::new(store.clone(), node.name.clone(), config.rest).await?;
    cluster.join(node).await?;
    let networks = cluster.local_networks().await?;
    // An empty list of a store that was just emptied would be believed.
    cluster.verify().await?;
    Ok((cluster, networks))
}
