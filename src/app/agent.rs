//! What the agent does on request: the operations behind the API.

use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio::time::{Instant, timeout_at};
use tracing::{info, warn};

use super::access::{self, Access};
use super::dataplane::{Dataplane, PlugError, Stopped};
use super::dns::NameServer;
use super::health;
use super::monitor::Watchers;
use super::place::Places;
use super::pressure::Pressure;
use super::record::Record;
use crate::api::{ApiError, AttachRequest, Attached, EndpointView, ErrorCode, NodeView};
use crate::cluster::{self, Claimed, Cluster, ClusterError, Defaults, EndpointRequest, View};
use crate::kernel::Netns;
use crate::lb;
use crate::model::{
    Endpoint, EndpointId, EndpointState, Name, Network, NetworkId, Node, NodeName, Snapshot, Versioned,
};
use crate::overlay::effective_mtu;

/// How long an attach waits when the request does not say.
const WAIT: Duration = Duration::from_secs(10);
/// How long an attach waits for a network that the store does not have: one that is just being
/// created is worth it, a mistyped name is not.
const WAIT_UNKNOWN: Duration = Duration::from_secs(2);
/// How soon an endpoint is plugged in again after what it needs was not ready.
const PLUG_AGAIN: Duration = Duration::from_millis(100);
/// How soon it is looked again whether an address has rested: all of the network's are read for that.
const REST_AGAIN: Duration = Duration::from_millis(500);
/// How long a repeated request waits until the view shows the first one's result.
const SETTLE: Duration = Duration::from_secs(2);

/// The most aliases of an endpoint.
const MAX_ALIASES: usize = 64;

/// The agent, once it belongs to a cluster.
pub(super) struct Agent {
    pub(super) me: Node,
    pub(super) cluster: Arc<Cluster>,
    pub(super) view: View,
    pub(super) record: Arc<Record>,
    pub(super) dataplane: Arc<Dataplane>,
    pub(super) defaults: Defaults,
    pub(super) boot: String,
    pub(super) names: Arc<NameServer>,
    pub(super) access: Access,
    pub(super) pressure: Pressure,
    pub(super) places: Places,
    pub(super) watchers: Watchers,
}

impl Agent {
    pub(super) fn snapshot(&self) -> Snapshot {
        self.view.latest().snapshot
    }

    pub(super) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    pub(super) async fn attach(&self, request: AttachRequest) -> Result<Attached, ApiError> {
        check(&request)?;
        let deadline = Instant::now() + request.wait_ms.map_or(WAIT, Duration::from_millis);
        let network = self.find_network(&request.network, deadline).await?;
        let using = timeout_at(deadline, self.view.use_network(network.id)).await;
        let _using = using
            .map_err(|_| {
                let text =
                    format!("network {} was not ready on this node in time: try again", network.name);
                ApiError::new(ErrorCode::Timeout, text)
            })?
            .map_err(|reason| {
                let text = format!("network {} cannot be used on this node now: {reason}", network.name);
                ApiError::new(ErrorCode::Unavailable, text)
            })?;

        let mut aliases = request.aliases;
        aliases.sort();
        aliases.dedup();
        let place = self.places.find(request.netns, request.interface, &self.boot).await?;
        let claim = EndpointRequest {
            name: request.name,
            aliases,
            addresses: request.addresses,
            mac: request.mac,
            attachment: place.attachment,
            any_interface: place.any_interface,
            host: false,
            weight: request.weight.map_or(1, NonZeroU16::get),
            // Nothing is to be sent there before it is plugged in.
            state: if request.service.is_some() { EndpointState::Pending } else { EndpointState::Ready },
            service: request.service,
            labels: request.labels,
        };
        match &claim.name {
            Some(name) => self.release_dead(network.id, name).await?,
            None => {
                if let Some(existing) = self.made_before(&network, &claim)
                    && self.cluster.is_current(&existing).await?
                {
                    return self.complete(&network, existing, deadline).await;
                }
            }
        }
        let (network, claimed) = self.claim(network, &claim, deadline).await?;
        match claimed {
            Claimed::Existing(endpoint) => self.complete(&network, Arc::new(endpoint), deadline).await,
            Claimed::New(endpoint, revision) => {
                let endpoint = Arc::new(endpoint);
                self.plug_new(&network, endpoint.clone(), revision, deadline).await?;
                self.hold_until_seen(place.guard, network.id, revision);
                // The first one on a network here may be quicker than the sockets.
                self.names.wait(network.id).await;
                let endpoint = health::begin(&self.cluster, &endpoint).await;
                Ok(Attached::Created(self.endpoint_view(&network, &endpoint, &self.snapshot())))
            }
        }
    }

    /// Has an endpoint written; the network's subnets may have changed since it was seen. An
    /// endpoint of a service, for which an address is kept, waits until one has rested.
    pub(super) async fn claim(
        &self,
        mut network: Arc<Versioned<Network>>,
        request: &EndpointRequest,
        deadline: Instant,
    ) -> Result<(Arc<Versioned<Network>>, Claimed), ApiError> {
        let claimed = loop {
            let alive = self.snapshot().alive;
            let error = match self.cluster.claim(&network, request, &alive).await {
                Ok(claimed) => break claimed,
                Err(error) => error,
            };
            match error {
                ClusterError::Exhausted { .. } | ClusterError::Address { .. } => {}
                // Many attach at once: somebody's turn comes each time.
                ClusterError::Contention(_) if Instant::now() < deadline => continue,
                error => return Err(error.into()),
            }
            let now = self.cluster.network(&network.id.to_string()).await?;
            if now.revision != network.revision {
                network = Arc::new(now);
                continue;
            }
            match error {
                ClusterError::Exhausted { count, .. }
                    if request.service.is_some()
                        && count.resting > 0
                        && Instant::now() + REST_AGAIN < deadline =>
                {
                    tokio::time::sleep(REST_AGAIN).await;
                }
                error => return Err(error.into()),
            }
        };
        let (Claimed::New(endpoint, _) | Claimed::Existing(endpoint)) = &claimed;
        if endpoint.addresses.iter().any(|address| network.subnet_of(*address).is_none()) {
            network = Arc::new(self.cluster.network(&network.id.to_string()).await?);
        }
        Ok((network, claimed))
    }

    /// The network, also when it is created while we look.
    async fn find_network(
        &self,
        reference: &str,
        deadline: Instant,
    ) -> Result<Arc<Versioned<Network>>, ApiError> {
        if let Some(network) = self.snapshot().network(reference) {
            return Ok(network.clone());
        }
        match self.cluster.network(reference).await {
            Err(ClusterError::NoNetwork(_)) => {}
            other => return Ok(Arc::new(other?)),
        }
        let deadline = deadline.min(Instant::now() + WAIT_UNKNOWN);
        let mut view = self.view.subscribe();
        let found = view.wait_for(|published| published.snapshot.network(reference).is_some());
        if let Ok(Ok(published)) = timeout_at(deadline, found).await
            && let Some(network) = published.snapshot.network(reference)
        {
            return Ok(network.clone());
        }
        Ok(Arc::new(self.cluster.network(reference).await?))
    }

    /// The endpoint that the same unnamed request made before.
    fn made_before(&self, network: &Network, claim: &EndpointRequest) -> Option<Arc<Endpoint>> {
        let snapshot = self.snapshot();
        let endpoints = snapshot.members.get(&network.id)?.endpoints.values();
        let same =
            |e: &&Arc<Endpoint>| cluster::endpoints::difference(e, &self.me.name, claim).is_none();
        endpoints.into_iter().find(same).cloned()
    }

    /// Releases this node's endpoint of that name if its container does not exist any more: one
    /// that is started again after a reboot or a crash need not wait until that was noticed.
    async fn release_dead(&self, network: NetworkId, name: &Name) -> Result<(), ApiError> {
        let snapshot = self.snapshot();
        let endpoints = snapshot.members.get(&network).map(|members| members.endpoints.values());
        let mut same =
            endpoints.into_iter().flatten().filter(|e| e.name == *name && e.node == self.me.name);
        let Some(endpoint) = same.next().cloned() else { return Ok(()) };
        let (attachment, boot) = (endpoint.attachment.clone(), self.boot.clone());
        let look = move || {
            attachment.boot == boot
                && match Netns::open(&attachment.netns) {
                    Ok(netns) => netns.inode() == attachment.inode,
                    Err(error) => !error.namespace_is_gone(),
                }
        };
        let lives = tokio::task::spawn_blocking(look).await;
        match lives {
            Ok(false) => self.release(&endpoint).await.map(drop),
            _ => Ok(()),
        }
    }

    /// Makes sure that an endpoint which exists already is plugged in.
    async fn complete(
        &self,
        network: &Network,
        endpoint: Arc<Endpoint>,
        deadline: Instant,
    ) -> Result<Attached, ApiError> {
        self.plug(endpoint.clone(), 0, deadline).await??;
        let endpoint = health::begin(&self.cluster, &endpoint).await;
        Ok(Attached::Existing(self.endpoint_view(network, &endpoint, &self.snapshot())))
    }

    /// Plugs an endpoint in; what is not ready is waited for until the deadline.
    async fn plug(
        &self,
        endpoint: Arc<Endpoint>,
        revision: u64,
        deadline: Instant,
    ) -> Result<Result<(), PlugError>, ApiError> {
        loop {
            match self.dataplane.plug(endpoint.clone(), revision).await.map_err(stopped)? {
                Err(PlugError::NotReady(_)) if Instant::now() + PLUG_AGAIN < deadline => {
                    tokio::time::sleep(PLUG_AGAIN).await;
                }
                outcome => return Ok(outcome),
            }
        }
    }

    /// Plugs a new endpoint in, or takes it back.
    pub(super) async fn plug_new(
        &self,
        network: &Network,
        endpoint: Arc<Endpoint>,
        revision: u64,
        deadline: Instant,
    ) -> Result<(), ApiError> {
        let id = endpoint.id;
        match self.plug(endpoint.clone(), revision, deadline).await? {
            Ok(()) => {
                info!(endpoint = %id, name = %endpoint.name, network = %network.name, addresses = ?endpoint.addresses, "endpoint attached");
                Ok(())
            }
            Err(refused) => {
                if let Err(error) = self.cluster.withdraw(&endpoint).await {
                    warn!(endpoint = %id, %error, "endpoint that could not be plugged in is left in the store");
                }
                Err(refused.into())
            }
        }
    }

    /// Keeps a gate shut until the view shows what was written: a request that is repeated
    /// meanwhile then finds the first one's endpoint.
    fn hold_until_seen(&self, gate: OwnedMutexGuard<()>, network: NetworkId, revision: u64) {
        let mut view = self.view.subscribe();
        tokio::spawn(async move {
            let seen = view.wait_for(|published| {
                published
                    .snapshot
                    .members
                    .get(&network)
                    .is_none_or(|members| members.revision >= revision)
            });
            // Should the view lag longer, the store's transaction still decides about names.
            let _ = tokio::time::timeout(SETTLE, seen).await.is_ok();
            drop(gate);
        });
    }

    fn endpoint_view(
        &self,
        network: &Network,
        endpoint: &Endpoint,
        snapshot: &Snapshot,
    ) -> EndpointView {
        let out = endpoint.service.as_ref().and_then(|_| lb::out(&self.me, snapshot, endpoint));
        let subnet = |address: &_| network.standing().find(|s| s.cidr().contains(*address));
        let subnets = endpoint.addresses.iter().filter_map(subnet);
        let (gateways, prefix_lengths): (Vec<_>, _) =
            subnets.map(|s| (s.gateway(), s.cidr().prefix())).unzip();
        EndpointView {
            endpoint: endpoint.clone(),
            network_name: network.name.clone(),
            prefix_lengths,
            mtu: effective_mtu(&self.me, network),
            resolver: self.names.resolver(&network.name, &gateways),
            gateways,
            out: out.map(|out| out.to_string()),
        }
    }

    pub(super) async fn endpoints(
        &self,
        network: Option<&str>,
        node: Option<&NodeName>,
    ) -> Result<Vec<EndpointView>, ApiError> {
        let networks = match network {
            Some(reference) => vec![self.cluster.network(reference).await?],
            None => self.cluster.networks().await?,
        };
        let (snapshot, mut views) = (self.snapshot(), Vec::new());
        for network in networks {
            let endpoints = self.cluster.endpoints(network.id).await?;
            let chosen =
                endpoints.iter().filter(|endpoint| node.is_none_or(|name| *name == endpoint.node));
            views.extend(chosen.map(|endpoint| self.endpoint_view(&network, endpoint, &snapshot)));
        }
        views.sort_by(|a, b| {
            (&a.network_name, &a.endpoint.name).cmp(&(&b.network_name, &b.endpoint.name))
        });
        Ok(views)
    }

    pub(super) async fn endpoint(
        &self,
        reference: &str,
        network: Option<&str>,
    ) -> Result<EndpointView, ApiError> {
        let all = self.endpoints(network, None).await?;
        let is = |view: &EndpointView| {
            view.endpoint.name.as_str() == reference || view.endpoint.id.to_string() == reference
        };
        let mut matches: Vec<EndpointView> = all.into_iter().filter(is).collect();
        match (matches.pop(), matches.is_empty()) {
            (Some(only), true) => Ok(only),
            (None, _) => Err(ClusterError::NoEndpoint(reference.to_owned()).into()),
            (Some(last), false) => {
                matches.push(last);
                let networks: Vec<&str> =
                    matches.iter().map(|view| view.network_name.as_str()).collect();
                let networks = networks.join(", ");
                Err(ClusterError::Ambiguous { name: reference.to_owned(), networks }.into())
            }
        }
    }

    pub(super) async fn detach(
        &self,
        reference: &str,
        network: Option<&str>,
    ) -> Result<Option<EndpointId>, ApiError> {
        let seen = cluster::find_endpoint(&self.snapshot(), reference, network).cloned();
        let endpoint = match seen {
            Ok(endpoint) => endpoint,
            Err(ambiguous @ ClusterError::Ambiguous { .. }) => return Err(ambiguous.into()),
            // The view may not show yet what was attached just now.
            Err(_) => match self.endpoint(reference, network).await {
                Ok(view) => Arc::new(view.endpoint),
                Err(error) if error.code == ErrorCode::NotFound => return Ok(None),
                Err(error) => return Err(error),
            },
        };
        if endpoint.host {
            return Err(access::not_detached(&endpoint));
        }
        if endpoint.node != self.me.name {
            let node = endpoint.node.clone();
            return Err(ClusterError::Elsewhere { endpoint: endpoint.id, node }.into());
        }
        match self.release(&endpoint).await? {
            Some(id) => Ok(Some(id)),
            // What the view showed was gone; another may have taken its name since.
            None => match self.endpoint(reference, network).await {
                Ok(view) if view.endpoint.id != endpoint.id && view.endpoint.node == self.me.name => {
                    self.release(&view.endpoint).await
                }
                Err(error) if error.code != ErrorCode::NotFound => Err(error),
                _ => Ok(None),
            },
        }
    }

    /// Releases an endpoint of this node and takes it out. `None`: it was released already.
    pub(super) async fn release(&self, endpoint: &Endpoint) -> Result<Option<EndpointId>, ApiError> {
        let Some(revision) = self.cluster.release(endpoint).await? else { return Ok(None) };
        self.dataplane.unplug(Arc::new(endpoint.clone()), revision).await.map_err(stopped)??;
        info!(endpoint = %endpoint.id, name = %endpoint.name, "endpoint detached");
        Ok(Some(endpoint.id))
    }

    pub(super) fn nodes(&self) -> Vec<NodeView> {
        let snapshot = self.snapshot();
        let view = |node: &Arc<Node>| NodeView {
            node: Node::clone(node),
            alive: snapshot.alive.contains(&node.name),
            drained: snapshot.drained.contains_key(&node.name),
            this: node.name == self.me.name,
        };
        snapshot.nodes.values().map(view).collect()
    }

    pub(super) async fn remove_node(&self, name: &NodeName) -> Result<(), ApiError> {
        self.cluster.remove_node(name).await?;
        info!(node = %name, "node removed");
        Ok(())
    }

    pub(super) fn node(&self, name: &NodeName) -> Result<NodeView, ApiError> {
        let found = self.nodes().into_iter().find(|view| view.node.name == *name);
        found.ok_or_else(|| ClusterError::NoNode(name.to_string()).into())
    }
}

fn stopped(_: Stopped) -> ApiError {
    ApiError::new(ErrorCode::Unavailable, "netctld is stopping: try again when it is back")
}

/// Checks what the types do not.
fn check(request: &AttachRequest) -> Result<(), ApiError> {
    let aliases = request.aliases.len();
    let problem = if request.weight.is_some() && request.service.is_none() {
        "a weight is a share of a service's connections: name the service, or leave it out".to_owned()
    } else if aliases > MAX_ALIASES {
        format!("{aliases} aliases are too many: give at most {MAX_ALIASES}")
    } else {
        return Ok(());
    };
    Err(ApiError::new(ErrorCode::Invalid, problem))
}
