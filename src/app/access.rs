//! Host access: on a network that was made for that, the host of each node is an endpoint of its own.
//!
//! The agent takes the addresses and plugs the host in as it does with a container; from then on the
//! dataplane keeps it so. Where the host uses a network's addresses for something else it stays out.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnetwork::IpNetwork;
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tracing::{info, warn};

use super::agent::Agent;
use super::join::inventory;
use crate::api::{ApiError, ErrorCode};
use crate::cluster::subnets::underlay_within;
use crate::cluster::view::Using;
use crate::cluster::{Claimed, ClusterError, EndpointRequest, Health};
use crate::config::StoreConfig;
use crate::kernel::{Inventory, Netns};
use crate::model::object::access_name;
use crate::model::subnet::overlap;
use crate::model::{
    Attachment, Endpoint, EndpointId, EndpointState, Name, Network, NetworkId, Node, NodeName, Snapshot,
    Subnet, Versioned,
};

/// The nodes by name.
type Nodes = BTreeMap<NodeName, Arc<Node>>;

/// How long it may take to plug the host into one network.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why this node's host does not reach networks that are for that.
#[derive(Debug, Default)]
pub(super) struct Access {
    obstacles: Mutex<BTreeMap<NetworkId, String>>,
    /// Where the store is, as far as its addresses were given.
    stores: Vec<IpAddr>,
}

impl Access {
    /// For an agent with this store.
    pub(super) fn new(store: &StoreConfig) -> Self {
        let stores = match store {
            StoreConfig::Embedded { .. } => &[][..],
            StoreConfig::Etcd(etcd) => &etcd.endpoints,
        };
        let address = |url: &String| {
            let uri: axum::http::Uri = url.parse().ok()?;
            uri.host()?.trim_matches(['[', ']']).parse().ok()
        };
        Self { stores: stores.iter().filter_map(address).collect(), ..Self::default() }
    }

    /// What the host has beside ours and what it must reach, in words, as far as a subnet overlaps it.
    fn used(&self, inventory: &Inventory, nodes: &Nodes, subnet: IpNetwork) -> Option<String> {
        let routed = inventory.subnets.iter().find(|range| overlap(**range, subnet));
        let routed = routed.map(|range| format!("{range}, to which this host has a route"));
        let underlay = || underlay_within(nodes.values().map(Arc::as_ref), subnet);
        let gateway = || {
            let gateway = inventory.gateways.iter().find(|gateway| subnet.contains(**gateway))?;
            Some(format!("{gateway}, which is this host's way out"))
        };
        let store = || {
            let store = self.stores.iter().find(|store| subnet.contains(**store))?;
            Some(format!("{store}, where the store is"))
        };
        routed.or_else(underlay).or_else(gateway).or_else(store)
    }

    /// Why the host does not reach a network; `None`: it does, or it is not for that.
    pub(super) fn obstacle(&self, network: NetworkId) -> Option<String> {
        self.lock().get(&network).cloned()
    }

    fn note(&self, network: &Network, obstacle: Option<String>) {
        let mut obstacles = self.lock();
        match obstacle {
            Some(reason) if obstacles.get(&network.id) == Some(&reason) => {}
            Some(reason) => {
                warn!(network = %network.name, reason, "this host does not reach the network");
                obstacles.insert(network.id, reason);
            }
            None => drop(obstacles.remove(&network.id)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NetworkId, String>> {
        self.obstacles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A network that the host is on.
struct Open {
    endpoint: EndpointId,
    using: Using,
}

/// Has the host be on all networks that are for that, for ever. So often its routes are compared with
/// them, and what failed is tried again.
pub(super) async fn follow(agent: Arc<Agent>, often: Duration) {
    let mut view = agent.view.subscribe();
    let mut tick = tokio::time::interval(often);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut open: BTreeMap<NetworkId, Option<Open>> = BTreeMap::new();
    let mut due = true;
    loop {
        let published = view.borrow_and_update().clone();
        if published.health == Health::Current {
            attend(&agent, &published.snapshot, &mut open, due).await;
        }
        due = tokio::select! {
            changed = view.changed() => match changed {
                Ok(()) => false,
                Err(_) => return,
            },
            _ = tick.tick() => true,
        };
    }
}

/// Looks at the networks that have changed, and where it is `due` at all.
async fn attend(
    agent: &Agent,
    snapshot: &Snapshot,
    open: &mut BTreeMap<NetworkId, Option<Open>>,
    due: bool,
) {
    let is_wanted = |network: &Network| network.host_access && !network.removing;
    let is_known = |id: &NetworkId| snapshot.networks.get(id).is_some_and(|n| is_wanted(n));
    open.retain(|id, _| is_known(id));
    agent.access.lock().retain(|id, _| is_known(id));
    let stands = |network: &Network| match open.get(&network.id) {
        // It was tried, and is again when it is due.
        Some(None) => true,
        Some(Some(Open { endpoint, .. })) => {
            let members = snapshot.members.get(&network.id);
            members.is_some_and(|members| members.endpoints.contains_key(endpoint))
        }
        None => false,
    };
    let wanted = snapshot.networks.values().filter(|network| is_wanted(network));
    let wanted: Vec<_> = wanted.filter(|network| due || !stands(network)).cloned().collect();
    if wanted.is_empty() {
        return;
    }
    let mut inventory = match inventory().await {
        Ok(inventory) => inventory,
        Err(error) => {
            warn!(%error, "the host's routes cannot be read");
            return;
        }
    };
    for network in wanted {
        // They are at the host's own device, also where somebody has just given it another name.
        for address in own(agent, snapshot, network.id).iter().flat_map(|own| &own.addresses) {
            inventory.subnets.remove(&IpNetwork::from(*address));
        }
        let used = |subnet: &Subnet| agent.access.used(&inventory, &snapshot.nodes, subnet.cidr());
        let used = network.standing().find_map(used);
        let present = open.remove(&network.id).flatten();
        let (now, obstacle) = match used {
            Some(reason) => {
                leave(agent, snapshot, network.id).await;
                (None, Some(reason))
            }
            None => match enter(agent, &network, present).await {
                Ok(now) => (Some(now), None),
                Err(error) => (None, Some(error.message)),
            },
        };
        agent.access.note(&network, obstacle);
        open.insert(network.id, now);
    }
}

/// Makes sure that the host is on a network, and once only.
async fn enter(
    agent: &Agent,
    network: &Arc<Versioned<Network>>,
    present: Option<Open>,
) -> Result<Open, ApiError> {
    let late = || ApiError::new(ErrorCode::Timeout, "the network was not ready on this node in time");
    let using = match present {
        Some(open) => open.using,
        None => {
            let using = timeout(PATIENCE, agent.view.use_network(network.id)).await;
            using.map_err(|_| late())?.map_err(|reason| ApiError::new(ErrorCode::Unavailable, reason))?
        }
    };
    let mut own = own(agent, &agent.snapshot(), network.id).into_iter();
    let endpoint = match own.next() {
        Some(endpoint) => endpoint.id,
        None => plug(agent, network).await?,
    };
    for double in own {
        agent.release(&double).await?;
    }
    Ok(Open { endpoint, using })
}

/// Takes addresses for the host, and plugs it in.
async fn plug(agent: &Agent, network: &Arc<Versioned<Network>>) -> Result<EndpointId, ApiError> {
    let deadline = Instant::now() + PATIENCE;
    let netns = Netns::current()?;
    let unusable = |error| ApiError::new(ErrorCode::Internal, format!("{error}"));
    let attachment = Attachment {
        netns: netns.path().to_owned(),
        inode: netns.inode(),
        boot: agent.boot.clone(),
        interface: access_name(network.id).parse().map_err(unusable)?,
    };
    // A node's name may be too long for that, or a container be called so: then it is called by its id.
    let name: Option<Name> = format!("host-{}", agent.me.name).parse().ok();
    let claim = |name| EndpointRequest {
        name,
        host: true,
        state: EndpointState::Ready,
        ..EndpointRequest::new(attachment.clone())
    };
    let mut claimed = agent.claim(network.clone(), &claim(name.clone()), deadline).await;
    let is_taken = match &claimed {
        Ok((_, Claimed::Existing(endpoint))) => !endpoint.host,
        Ok((_, Claimed::New(..))) => false,
        Err(error) => error.code == ErrorCode::Conflict && name.is_some(),
    };
    if is_taken {
        claimed = agent.claim(network.clone(), &claim(None), deadline).await;
    }
    let (network, claimed) = claimed?;
    let (endpoint, revision) = match claimed {
        Claimed::New(endpoint, revision) => (endpoint, revision),
        // The view is about to show it.
        Claimed::Existing(endpoint) => return Ok(endpoint.id),
    };
    let id = endpoint.id;
    agent.plug_new(&network, Arc::new(endpoint), revision, deadline).await?;
    info!(network = %network.name, "this host reaches the network");
    let mut view = agent.view.subscribe();
    let seen = view.wait_for(|published| {
        let members = published.snapshot.members.get(&network.id);
        members.is_none_or(|members| members.revision >= revision)
    });
    // Until then it would look as if it had gone again.
    let _ = timeout(PATIENCE, seen).await.is_ok();
    Ok(id)
}

/// Takes the host out of a network.
async fn leave(agent: &Agent, snapshot: &Snapshot, network: NetworkId) {
    for endpoint in own(agent, snapshot, network) {
        if let Err(error) = agent.release(&endpoint).await {
            warn!(endpoint = %endpoint.id, %error, "the host is on the network yet");
        }
    }
}

/// The endpoints of a network that are this node's host.
fn own(agent: &Agent, snapshot: &Snapshot, network: NetworkId) -> Vec<Arc<Endpoint>> {
    let endpoints = snapshot.members.get(&network).map(|members| members.endpoints.values());
    let is_own = |endpoint: &&Arc<Endpoint>| endpoint.host && endpoint.node == agent.me.name;
    endpoints.into_iter().flatten().filter(is_own).cloned().collect()
}

/// Refuses subnets of a network that hosts are to reach, where this node's uses their addresses.
pub(super) async fn refuse_used(agent: &Agent, subnets: &[IpNetwork]) -> Result<(), ApiError> {
    let inventory = inventory().await?;
    for subnet in subnets {
        if let Some(other) = agent.access.used(&inventory, &agent.snapshot().nodes, *subnet) {
            return Err(ClusterError::HostOverlaps { subnet: *subnet, other }.into());
        }
    }
    Ok(())
}

/// The answer to who wants to take a host out.
pub(super) fn not_detached(endpoint: &Endpoint) -> ApiError {
    let text = format!(
        "endpoint {} is the host of node {}, which its agent plugs in: it goes with the network",
        endpoint.name, endpoint.node
    );
    ApiError::new(ErrorCode::Conflict, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_host_needs_is_not_given_to_a_network() {
        let store = StoreConfig::Etcd(crate::config::EtcdConfig {
            endpoints: ["https://10.3.0.9:2379", "http://[fd00:3::9]:2379", "http://etcd:2379"]
                .map(str::to_owned)
                .into(),
            prefix: "netctl/".to_owned(),
            ca: None,
            identity: None,
            login: None,
            timeout: Duration::from_secs(1),
        });
        let inventory = Inventory {
            subnets: ["10.1.0.0/24".parse().unwrap()].into(),
            gateways: ["10.4.0.1".parse().unwrap()].into(),
            ..Inventory::default()
        };
        let node: Node = serde_json::from_value(serde_json::json!({
            "id": "cccccccccccc", "name": "n2", "underlay": "10.2.0.7", "vtep_mac": "02:00:00:00:00:01",
            "tunnel_port": 4789, "mtu": 1450,
        }))
        .unwrap();
        let nodes = Nodes::from([(node.name.clone(), Arc::new(node))]);
        let access = Access::new(&store);
        for (subnet, part) in [
            ("10.1.0.128/25", "10.1.0.0/24, to which this host has a route"),
            ("10.2.0.0/24", "the underlay address 10.2.0.7 of node n2"),
            ("10.3.0.0/24", "10.3.0.9, where the store is"),
            ("fd00:3::/64", "fd00:3::9, where the store is"),
            ("10.4.0.0/24", "10.4.0.1, which is this host's way out"),
        ] {
            let used = access.used(&inventory, &nodes, subnet.parse().unwrap());
            assert_eq!(used.as_deref(), Some(part), "{subnet}");
        }
        assert_eq!(access.used(&inventory, &nodes, "10.5.0.0/24".parse().unwrap()), None);
    }
}
