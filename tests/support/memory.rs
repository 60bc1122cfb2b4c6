//! An agent without a kernel and without a store, on a real socket, for the tests of the edges.

#[path = "balancing.rs"]
mod balancing;
#[path = "names.rs"]
mod names;
#[path = "seen.rs"]
mod seen;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use balancing::{backends, drain, external, timeouts};
use ipnetwork::IpNetwork;
use netctl::api::server;
use netctl::api::{
    ApiError, AttachRequest, Attached, CheckOutcome, CheckView, DrainView, EndpointView, ErrorCode,
    Expanded, MonitorQuery, NameQuery, NameView, NetworkView, NodeCheck, NodeUsage, NodeView,
    ReserveRequest, ResolverView, Service, ServiceView, SettingsView, Share, Sighting, SubnetUsage,
    Target, Usage, VersionView, percent,
};
use netctl::model::{
    Attachment, Endpoint, EndpointId, ExpandSpec, Finding, FindingKind, MacAddr, Name, Network,
    NetworkId, NetworkSpec, Node, NodeId, NodeName, ServiceId, ServiceSpec, ServiceUpdate, Subnet, Vni,
    subnet,
};
use tokio::sync::mpsc::Receiver;
use tokio::sync::{Semaphore, oneshot};

/// The agent's state; tests may look at it and set its faults.
#[derive(Default)]
pub struct State {
    pub networks: Vec<Network>,
    pub endpoints: Vec<Endpoint>,
    pub services: Vec<ServiceView>,
    /// The requests to keep addresses, as they came.
    pub reserved: Vec<ReserveRequest>,
    /// The error that the next call answers with.
    pub fail_next: Option<ErrorCode>,
    /// The requests to attach, as they came.
    pub attached: Vec<AttachRequest>,
    /// The endpoints that were detached.
    pub detached: Vec<EndpointId>,
    /// What a check finds, and whether it can be repaired: what cannot is in n2's kernel.
    pub findings: Vec<(&'static str, bool)>,
    /// What becomes of a check on n2: it is compared unless this says why it is not.
    pub not_compared: Option<&'static str>,
    /// How many of n2's findings are left out.
    pub cut: u64,
    /// The configuration, with the levels from which a network's use is marked.
    pub settings: SettingsView,
    /// Whether it is older than the question after them.
    pub tells_no_settings: bool,
    /// Whether nobody can count how addresses are used.
    pub store_away: bool,
    /// When networks are full, in seconds.
    pub full_in: Option<u64>,
    /// What is drained, as it was asked for.
    pub drained: Vec<Target>,
    /// What the next looks at a drain show; then it is at its end.
    pub drains: VecDeque<DrainView>,
    /// Why endpoints take no connections.
    pub out: Option<String>,
    /// What is seen of packets; then nobody tells any more.
    pub sightings: Vec<Sighting>,
    /// What somebody wanted to see, as it was asked for.
    pub monitored: Vec<MonitorQuery>,
}

pub struct Memory {
    state: Mutex<State>,
    /// Attaching waits for a permit; there are plenty unless a test closes the gate.
    pub gate: Semaphore,
}

impl Memory {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The state, unless a test wants this call to fail.
    fn call(&self) -> Result<MutexGuard<'_, State>, ApiError> {
        let mut state = self.state();
        match state.fail_next.take() {
            Some(code) => Err(ApiError::new(code, format!("{code:?}, as the test wants"))),
            None => Ok(state),
        }
    }
}

fn not_found(reference: &str) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is no {reference}"))
}

impl State {
    /// Whose kernels a check has compared.
    fn compared(&self, local: bool) -> Vec<NodeCheck> {
        let node = |name: &str, reason: Option<&str>, cut| NodeCheck {
            node: name.parse().unwrap(),
            outcome: reason.map_or(CheckOutcome::Compared, |_| CheckOutcome::Late),
            reason: reason.unwrap_or_default().to_owned(),
            cut,
        };
        let other = (!local).then(|| node("n2", self.not_compared, self.cut));
        [node("n1", None, 0)].into_iter().chain(other).collect()
    }

    fn network(&self, reference: &str) -> Result<&Network, ApiError> {
        let found = |n: &&Network| n.name.as_str() == reference || n.id.to_string() == reference;
        self.networks.iter().find(found).ok_or_else(|| not_found(reference))
    }

    fn endpoint(&self, reference: &str, network: Option<&str>) -> Result<&Endpoint, ApiError> {
        let network = network.map(|network| self.network(network)).transpose()?;
        let within = |e: &&Endpoint| network.is_none_or(|network| network.id == e.network);
        let named = |e: &&Endpoint| e.name.as_str() == reference || e.id.to_string() == reference;
        let found: Vec<_> = self.endpoints.iter().filter(within).filter(named).collect();
        match found[..] {
            [] => Err(not_found(reference)),
            [only] => Ok(only),
            _ => Err(ApiError::new(ErrorCode::Conflict, "several networks have that name")),
        }
    }

    /// That what a drain is about exists.
    fn find(&self, target: &Target) -> Result<(), ApiError> {
        match target {
            Target::Endpoint { reference, network } => {
                self.endpoint(reference, network.as_deref()).map(drop)
            }
            Target::Service(name) => {
                let found = self.services.iter().find(|view| view.service.name == *name);
                found.map(drop).ok_or_else(|| not_found(name.as_str()))
            }
            Target::Node(name) if ["n1", "n2"].contains(&name.as_str()) => Ok(()),
            Target::Node(name) => Err(not_found(name.as_str())),
        }
    }

    fn node(&self, name: &str) -> NodeView {
        let drained = self.drained.contains(&Target::Node(name.parse().unwrap()));
        NodeView { drained, ..node(name, name == "n1") }
    }

    fn network_view(&self, network: &Network) -> NetworkView {
        let members = self.endpoints.iter().filter(|endpoint| endpoint.network == network.id);
        let effective_mtu = network.mtu.unwrap_or(1450);
        let endpoints = members.count();
        let usage = |ipv4: bool| {
            let subnets = network.subnets.iter().filter(|subnet| subnet.cidr().is_ipv4() == ipv4);
            let usable: u128 = subnets.map(netctl::ipam::ledger::usable).sum();
            let usable = u64::try_from(usable).unwrap_or(u64::MAX);
            let (endpoints, free) = (endpoints as u64, usable.saturating_sub(endpoints as u64));
            let level = self.settings.level(percent(endpoints.into(), usable.into()));
            let full_in = self.full_in;
            Usage { usable, endpoints, services: 0, resting: 0, reserved: 0, free, level, full_in }
        };
        let subnet_usage = |subnet: &Subnet| {
            let usable = u64::try_from(netctl::ipam::ledger::usable(subnet)).unwrap_or(u64::MAX);
            let (excluded, free) = (subnet.reserved().len() as u64, usable);
            let cidr = subnet.cidr();
            SubnetUsage { cidr, usable, endpoints: 0, services: 0, resting: 0, free, excluded }
        };
        let share = Share { blocks: 1, endpoints: endpoints as u64, free: 14 };
        let node = NodeUsage { node: "n1".parse().unwrap(), ipv4: Some(share), ipv6: None };
        NetworkView {
            endpoints,
            ipv4: (network.has_ipv4() && !self.store_away).then(|| usage(true)),
            ipv6: (network.has_ipv6() && !self.store_away).then(|| usage(false)),
            subnet_usage: network.subnets.iter().map(subnet_usage).collect(),
            node_usage: vec![node],
            network: network.clone(),
            effective_mtu,
            host_obstacle: None,
            revision: 7,
        }
    }

    fn endpoint_view(&self, endpoint: &Endpoint) -> EndpointView {
        let network = self.networks.iter().find(|network| network.id == endpoint.network).unwrap();
        let subnets: Vec<&Subnet> =
            endpoint.addresses.iter().filter_map(|a| network.subnet_of(*a)).collect();
        EndpointView {
            endpoint: endpoint.clone(),
            network_name: network.name.clone(),
            gateways: subnets.iter().map(|subnet| subnet.gateway()).collect(),
            prefix_lengths: subnets.iter().map(|subnet| subnet.cidr().prefix()).collect(),
            mtu: 1450,
            resolver: ResolverView {
                servers: subnets.iter().map(|subnet| subnet.gateway()).collect(),
                search: vec![format!("{}.netctl.internal", network.name)],
                options: vec!["ndots:0".to_owned()],
            },
            out: self.out.clone(),
        }
    }
}

fn finding(&(what, repairable): &(&str, bool)) -> Finding {
    Finding {
        node: (!repairable).then(|| "n2".parse().unwrap()),
        network: "web".to_owned(),
        kind: FindingKind::LeakedAddress,
        what: what.to_owned(),
        problem: "endpoint 0123456789ab does not exist".to_owned(),
        repair: "remove the key".to_owned(),
        repairable,
    }
}

pub fn node(name: &str, alive: bool) -> NodeView {
    let node = Node {
        id: NodeId::random(&mut rand::rng()),
        name: name.parse().unwrap(),
        underlay: Ipv4Addr::new(192, 0, 2, 1).into(),
        vtep_mac: MacAddr([2, 0, 0, 0, 0, 1]),
        tunnel_port: 4789,
        mtu: 1450,
        subnets_in_use: vec!["192.0.2.0/24".parse().unwrap()],
        labels: BTreeMap::from([("rack".to_owned(), "7".to_owned())]),
        lb: Default::default(),
        lb_reason: String::new(),
        socket_lb: None,
        version: "0.1.0".to_owned(),
    };
    NodeView { node, alive, drained: false, this: alive }
}

#[async_trait]
impl Service for Memory {
    async fn version(&self) -> VersionView {
        VersionView {
            version: "0.1.0".to_owned(),
            api: "v1".to_owned(),
            node: "n1".parse().unwrap(),
            store: "memory".to_owned(),
            kernel: "6.18".to_owned(),
        }
    }

    async fn settings(&self) -> Result<SettingsView, ApiError> {
        let state = self.call()?;
        if state.tells_no_settings { Err(not_found("path")) } else { Ok(state.settings.clone()) }
    }

    async fn metrics(&self) -> String {
        "# TYPE netctl_build_info gauge\nnetctl_build_info{version=\"0.1.0\"} 1\n# EOF\n".to_owned()
    }

    async fn create_network(&self, spec: NetworkSpec) -> Result<NetworkView, ApiError> {
        let mut state = self.call()?;
        let mut subnets =
            spec.subnets().map_err(|error| ApiError::new(ErrorCode::Invalid, error.to_string()))?;
        if state.network(spec.name.as_str()).is_ok() {
            let message = format!("there is a network {} already", spec.name);
            return Err(ApiError::new(ErrorCode::Conflict, message));
        }
        let count = state.networks.len() as u32;
        if subnets.is_empty() {
            let prefix = spec.prefix.unwrap_or(24);
            let cidr = format!("10.{}.0.0/{prefix}", 128 + count).parse().unwrap();
            subnets.push(Subnet::new(cidr, None, None, BTreeSet::new()).unwrap());
        }
        let network = Network {
            id: NetworkId::random(&mut rand::rng()),
            name: spec.name,
            subnets,
            vni: spec.vni.unwrap_or_else(|| Vni::new(4097 + count).unwrap()),
            uplink: count as u16,
            mtu: spec.mtu,
            internal: spec.internal,
            host_access: spec.host_access,
            labels: spec.labels,
            leaving: Vec::new(),
            removing: false,
        };
        state.networks.push(network.clone());
        Ok(state.network_view(&network))
    }

    async fn networks(&self) -> Result<Vec<NetworkView>, ApiError> {
        let state = self.call()?;
        Ok(state.networks.iter().map(|network| state.network_view(network)).collect())
    }

    async fn network(&self, reference: &str) -> Result<NetworkView, ApiError> {
        let state = self.call()?;
        Ok(state.network_view(state.network(reference)?))
    }

    async fn remove_network(&self, reference: &str) -> Result<(), ApiError> {
        let mut state = self.call()?;
        let id = state.network(reference)?.id;
        if state.endpoints.iter().any(|endpoint| endpoint.network == id) {
            return Err(ApiError::new(ErrorCode::InUse, format!("network {reference} has endpoints")));
        }
        state.networks.retain(|network| network.id != id);
        Ok(())
    }

    async fn expand_network(&self, reference: &str, spec: ExpandSpec) -> Result<Expanded, ApiError> {
        let mut state = self.call()?;
        let subnets =
            spec.subnets().map_err(|error| ApiError::new(ErrorCode::Invalid, error.to_string()))?;
        let mut network = state.network(reference)?.clone();
        let new: Vec<Subnet> = subnets.into_iter().filter(|s| !network.subnets.contains(s)).collect();
        let overlaps = |new: &Subnet| {
            network.subnets.iter().any(|present| subnet::overlap(present.cidr(), new.cidr()))
        };
        if new.iter().any(overlaps) {
            return Err(ApiError::new(ErrorCode::Conflict, "it overlaps"));
        }
        let changed = !new.is_empty();
        network.subnets.extend(new);
        state.networks.retain(|other| other.id != network.id);
        state.networks.push(network.clone());
        let view = state.network_view(&network);
        Ok(if changed { Expanded::Changed(view) } else { Expanded::Unchanged(view) })
    }

    async fn shrink_network(&self, reference: &str, subnet: IpNetwork) -> Result<NetworkView, ApiError> {
        let mut state = self.call()?;
        let mut network = state.network(reference)?.clone();
        if !network.subnets.iter().any(|present| present.cidr() == subnet) {
            return Err(not_found(&subnet.to_string()));
        }
        if network.subnets.len() == 1 {
            return Err(ApiError::new(ErrorCode::InUse, format!("{subnet} is the only one")));
        }
        network.subnets.retain(|present| present.cidr() != subnet);
        state.networks.retain(|other| other.id != network.id);
        state.networks.push(network.clone());
        Ok(state.network_view(&network))
    }

    async fn attach(&self, request: AttachRequest) -> Result<Attached, ApiError> {
        self.state().attached.push(request.clone());
        let _permit = self.gate.acquire().await.unwrap();
        let mut state = self.call()?;
        let network = state.network(&request.network)?.clone();
        if let Some(name) = &request.name
            && let Ok(existing) = state.endpoint(name.as_str(), Some(&request.network))
        {
            return Ok(Attached::Existing(state.endpoint_view(existing)));
        }
        let id = EndpointId::random(&mut rand::rng());
        let next = 2 + state.endpoints.len() as u128;
        let chosen: IpAddr = subnet::address_at(network.subnets[0].cidr().network(), next);
        let addresses = if request.addresses.is_empty() { vec![chosen] } else { request.addresses };
        let endpoint = Endpoint {
            id,
            name: request.name.unwrap_or_else(|| id.to_string().parse().unwrap()),
            aliases: request.aliases,
            network: network.id,
            node: "n1".parse().unwrap(),
            addresses,
            mac: request.mac.unwrap_or_else(|| MacAddr::random(&mut rand::rng())),
            attachment: Attachment {
                netns: request.netns,
                inode: 1,
                boot: "boot".to_owned(),
                interface: request.interface.unwrap_or_else(|| "eth0".parse().unwrap()),
            },
            host: false,
            service: request.service,
            drawn: None,
            weight: request.weight.map_or(1, |weight| weight.get()),
            state: Default::default(),
            reason: String::new(),
            labels: request.labels,
        };
        state.endpoints.push(endpoint.clone());
        Ok(Attached::Created(state.endpoint_view(&endpoint)))
    }

    async fn endpoints(
        &self,
        network: Option<&str>,
        node: Option<&NodeName>,
    ) -> Result<Vec<EndpointView>, ApiError> {
        let state = self.call()?;
        let network = network.map(|network| state.network(network)).transpose()?;
        let wanted = |e: &&Endpoint| {
            network.is_none_or(|n| n.id == e.network) && node.is_none_or(|node| *node == e.node)
        };
        Ok(state.endpoints.iter().filter(wanted).map(|e| state.endpoint_view(e)).collect())
    }

    async fn endpoint(&self, reference: &str, network: Option<&str>) -> Result<EndpointView, ApiError> {
        let state = self.call()?;
        Ok(state.endpoint_view(state.endpoint(reference, network)?))
    }

    async fn look_up(&self, query: &NameQuery) -> Result<NameView, ApiError> {
        drop(self.call()?);
        names::look_up(query)
    }

    async fn detach(
        &self,
        reference: &str,
        network: Option<&str>,
    ) -> Result<Option<EndpointId>, ApiError> {
        let mut state = self.call()?;
        let id = match state.endpoint(reference, network) {
            Ok(endpoint) => endpoint.id,
            Err(error) if error.code == ErrorCode::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        state.endpoints.retain(|endpoint| endpoint.id != id);
        state.detached.push(id);
        Ok(Some(id))
    }

    async fn create_service(&self, spec: ServiceSpec) -> Result<ServiceView, ApiError> {
        let mut state = self.call()?;
        if state.services.iter().any(|view| view.service.name == spec.name) {
            return Err(ApiError::new(ErrorCode::Conflict, "there is such a service already"));
        }
        let settled = spec.settled();
        let spec = settled.map_err(|error| ApiError::new(ErrorCode::Invalid, error.to_string()))?;
        let networks: Vec<&Network> =
            spec.networks.iter().map(|name| state.network(name)).collect::<Result<_, _>>()?;
        let network_names: Vec<_> = networks.iter().map(|n| n.name.to_string()).collect();
        let view = ServiceView {
            ready: 1,
            timeouts_in_effect: network_names.iter().map(|name| timeouts(name)).collect(),
            backends: network_names.iter().flat_map(|name| backends(name)).collect(),
            external_backends: external(&spec.external, &network_names),
            network_names,
            service: netctl::model::Service {
                id: ServiceId::random(&mut rand::rng()),
                name: spec.name,
                networks: networks.iter().map(|network| network.id).collect(),
                replicas: spec.replicas,
                endpoint_mode: spec.endpoint_mode,
                update_order: spec.update_order,
                update_parallelism: spec.update_parallelism,
                addresses: networks.iter().map(|n| (n.id, spec.addresses.clone())).collect(),
                external: spec.external,
                balancing: spec.balancing,
                health: spec.health,
                labels: spec.labels,
            },
        };
        state.services.push(view.clone());
        Ok(view)
    }

    async fn services(&self) -> Result<Vec<ServiceView>, ApiError> {
        Ok(self.call()?.services.clone())
    }

    async fn service(&self, name: &Name) -> Result<ServiceView, ApiError> {
        let state = self.call()?;
        let found = state.services.iter().find(|view| view.service.name == *name);
        found.cloned().ok_or_else(|| not_found(name.as_str()))
    }

    async fn scale_service(&self, name: &Name, replicas: u32) -> Result<ServiceView, ApiError> {
        let mut state = self.call()?;
        let found = state.services.iter_mut().find(|view| view.service.name == *name);
        let view = found.ok_or_else(|| not_found(name.as_str()))?;
        view.service.replicas = replicas;
        Ok(view.clone())
    }

    async fn update_service(&self, name: &Name, update: ServiceUpdate) -> Result<ServiceView, ApiError> {
        let mut state = self.call()?;
        let found = state.services.iter_mut().find(|view| view.service.name == *name);
        let view = found.ok_or_else(|| not_found(name.as_str()))?;
        let applied = update.apply(&mut view.service);
        applied.map_err(|error| ApiError::new(ErrorCode::Invalid, error.to_string()))?;
        Ok(view.clone())
    }

    async fn remove_service(&self, name: &Name) -> Result<(), ApiError> {
        let mut state = self.call()?;
        let before = state.services.len();
        state.services.retain(|view| view.service.name != *name);
        if state.services.len() == before { Err(not_found(name.as_str())) } else { Ok(()) }
    }

    async fn reserve(&self, request: ReserveRequest) -> Result<(), ApiError> {
        let mut state = self.call()?;
        for network in request.networks.keys() {
            state.network(network)?;
        }
        state.reserved.push(request);
        Ok(())
    }

    async fn check(&self, network: Option<&str>, local: bool) -> Result<CheckView, ApiError> {
        let state = self.call()?;
        network.map(|network| state.network(network)).transpose()?;
        let findings = state.findings.iter().map(finding).filter(|f| f.node.is_none() || !local);
        let (node, nodes) = ("n1".parse().unwrap(), state.compared(local));
        Ok(CheckView { node, nodes, revision: 7, repaired: Vec::new(), findings: findings.collect() })
    }

    async fn repair(&self, network: Option<&str>, local: bool) -> Result<CheckView, ApiError> {
        let mut checked = self.check(network, local).await?;
        checked.repaired = checked.findings.extract_if(.., |finding| finding.repairable).collect();
        self.state().findings.retain(|(_, repairable)| !repairable);
        Ok(checked)
    }

    async fn nodes(&self) -> Result<Vec<NodeView>, ApiError> {
        let state = self.call()?;
        Ok(vec![state.node("n1"), state.node("n2")])
    }

    async fn node(&self, name: &NodeName) -> Result<NodeView, ApiError> {
        let state = self.call()?;
        state.find(&Target::Node(name.clone()))?;
        Ok(state.node(name.as_str()))
    }

    async fn remove_node(&self, name: &NodeName) -> Result<(), ApiError> {
        self.call()?.find(&Target::Node(name.clone()))?;
        match name.as_str() {
            "n1" => Err(ApiError::new(ErrorCode::InUse, "node n1 is alive")),
            _ => Ok(()),
        }
    }

    async fn drain(&self, target: Target) -> Result<DrainView, ApiError> {
        let mut state = self.call()?;
        state.find(&target)?;
        state.drained.push(target);
        Ok(drain(false))
    }

    async fn drain_state(&self, target: Target) -> Result<DrainView, ApiError> {
        let mut state = self.call()?;
        state.find(&target)?;
        Ok(state.drains.pop_front().unwrap_or_else(|| drain(true)))
    }

    async fn monitor(&self, query: MonitorQuery) -> Result<Receiver<Sighting>, ApiError> {
        let mut state = self.call()?;
        seen::watch(&mut state, query)
    }

    async fn activate(&self, target: Target) -> Result<(), ApiError> {
        let mut state = self.call()?;
        state.find(&target)?;
        state.drained.retain(|drained| *drained != target);
        Ok(())
    }
}

/// A running agent; it ends with this value.
pub struct Agent {
    pub memory: Arc<Memory>,
    pub socket: PathBuf,
    _directory: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Agent {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("netctl.sock");
        let memory =
            Arc::new(Memory { state: Mutex::default(), gate: Semaphore::new(Semaphore::MAX_PERMITS) });
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (path, service) = (socket.clone(), memory.clone());
        let thread = std::thread::spawn(move || {
            let mut runtime = tokio::runtime::Builder::new_multi_thread();
            runtime.worker_threads(2).enable_all().build().unwrap().block_on(async {
                let listener = server::bind(&path, None).unwrap();
                ready.send(()).unwrap();
                let shutdown = async { drop(stopped.await) };
                server::serve(listener, service, shutdown).await;
            });
        });
        is_ready.recv().unwrap();
        Self { memory, socket, _directory: directory, stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}
