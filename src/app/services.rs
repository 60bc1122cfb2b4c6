//! The agent's part in services and reservations.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use super::agent::Agent;
use super::dataplane::Load;
use super::engine;
use crate::api::{
    ApiError, BackendView, Connections, ExternalView, ReserveRequest, ServiceView, TimeoutsView,
};
use crate::cluster::ClusterError;
use crate::lb::{self, Backend, Front, Out, Outside};
use crate::model::{
    Endpoint, EndpointMode, Name, NetworkId, Service, ServiceSpec, ServiceUpdate, Snapshot,
};

/// Endpoints of networks that were read.
type Members = BTreeMap<NetworkId, Vec<Arc<Endpoint>>>;

impl Agent {
    pub(super) async fn create_service(&self, spec: &ServiceSpec) -> Result<ServiceView, ApiError> {
        engine::check(self.me.lb, spec.endpoint_mode)?;
        if spec.endpoint_mode == EndpointMode::Vip {
            engine::check_scheduler(self.me.lb, spec.balancing.scheduler).await?;
        }
        let service = self.cluster().create_service(spec, &self.snapshot().alive).await?;
        info!(service = %service.name, replicas = service.replicas, addresses = ?service.addresses, "service created");
        self.look_at(service.networks.iter().map(NetworkId::to_string)).await;
        self.service_view(service).await
    }

    pub(super) async fn services(&self) -> Result<Vec<ServiceView>, ApiError> {
        let (mut members, mut views) = (Members::default(), Vec::new());
        for service in self.cluster().services().await? {
            views.push(self.shown(service, &mut members, false).await?);
        }
        Ok(views)
    }

    pub(super) async fn service(&self, name: &Name) -> Result<ServiceView, ApiError> {
        let service = self.cluster().service(name).await?;
        self.shown(service.value, &mut Members::default(), true).await
    }

    pub(super) async fn update_service(
        &self,
        name: &Name,
        update: &ServiceUpdate,
    ) -> Result<ServiceView, ApiError> {
        if let Some(scheduler) = update.scheduler {
            engine::check_scheduler(self.me.lb, scheduler).await?;
        }
        let service = self.cluster().update_service(name, update).await?;
        info!(service = %name, ?update, "service updated");
        self.look_at(service.networks.iter().map(NetworkId::to_string)).await;
        self.service_view(service).await
    }

    pub(super) async fn scale_service(
        &self,
        name: &Name,
        replicas: u32,
    ) -> Result<ServiceView, ApiError> {
        let service = self.cluster().scale_service(name, replicas).await?;
        info!(service = %name, replicas, "service scaled");
        self.look_at(service.networks.iter().map(NetworkId::to_string)).await;
        self.service_view(service).await
    }

    pub(super) async fn remove_service(&self, name: &Name) -> Result<(), ApiError> {
        self.cluster().remove_service(name).await?;
        info!(service = %name, "service removed");
        Ok(())
    }

    pub(super) async fn reserve(&self, request: &ReserveRequest) -> Result<(), ApiError> {
        let time = Duration::from_secs(request.ttl_s.max(1));
        self.cluster().reserve(&request.name, &request.networks, time).await?;
        info!(reservation = %request.name, ?time, networks = ?request.networks, "addresses reserved");
        self.look_at(request.networks.keys().cloned()).await;
        Ok(())
    }

    async fn service_view(&self, service: Service) -> Result<ServiceView, ApiError> {
        self.shown(service, &mut Members::default(), false).await
    }

    /// A service as it is shown; `members` is what was read already. `counted`: with the connections
    /// to its backends, for which the kernel's whole table of each of its networks is read.
    async fn shown(
        &self,
        service: Service,
        members: &mut Members,
        counted: bool,
    ) -> Result<ServiceView, ApiError> {
        let snapshot = self.snapshot();
        let (mut network_names, mut backends, mut external_backends) =
            (Vec::new(), Vec::new(), Vec::new());
        let (mut ready, mut timeouts_in_effect) = (None::<u64>, Vec::new());
        for id in &service.networks {
            let network_name = self.network_name(&snapshot, *id).await?;
            if service.addresses.contains_key(id) {
                let others = snapshot.services.values().map(AsRef::as_ref);
                let others = others.filter(|other| other.name != service.name);
                let in_effect = lb::Timeouts::in_effect(*id, others.chain([&service]));
                timeouts_in_effect.push(timeouts_view(&network_name, in_effect));
            }
            if !members.contains_key(id) {
                members.insert(*id, self.members(&snapshot, *id).await?);
            }
            let endpoints = members.get(id).into_iter().flatten().map(AsRef::as_ref);
            let found = lb::backends(&self.me, &snapshot, &service, endpoints);
            let here = found.iter().filter(|b| matches!(b.out, None | Some(Out::Far))).count() as u64;
            ready = Some(ready.map_or(here, |fewest| fewest.min(here)));
            let open = if counted { self.open_connections(*id).await } else { None };
            let open = open.map(|loads| of_service(&service, *id, loads));
            let view = |backend: &Backend<'_>| backend_view(backend, &network_name, open.as_deref());
            backends.extend(found.iter().map(view));
            let outside = lb::outside(&self.me, &snapshot, &service, &found);
            let view = |outside: &Outside| external_view(outside, &network_name, open.as_deref());
            external_backends.extend(outside.iter().map(view));
            network_names.push(network_name);
        }
        backends.sort_by(|a, b| (&a.network_name, &a.name).cmp(&(&b.network_name, &b.name)));
        let ready = ready.unwrap_or_default();
        Ok(ServiceView {
            service,
            network_names,
            ready,
            timeouts_in_effect,
            backends,
            external_backends,
        })
    }

    /// A network's endpoints: of one that this node uses, as it knows them.
    async fn members(
        &self,
        snapshot: &Snapshot,
        network: NetworkId,
    ) -> Result<Vec<Arc<Endpoint>>, ClusterError> {
        match snapshot.members.get(&network) {
            Some(members) => Ok(members.endpoints.values().cloned().collect()),
            None => Ok(self.cluster().endpoints(network).await?.into_iter().map(Arc::new).collect()),
        }
    }

    async fn network_name(&self, snapshot: &Snapshot, id: NetworkId) -> Result<String, ApiError> {
        if let Some(network) = snapshot.networks.get(&id) {
            return Ok(network.name.to_string());
        }
        // The view may not show it yet.
        match self.cluster().network(&id.to_string()).await {
            Ok(network) => Ok(network.name.to_string()),
            Err(ClusterError::NoNetwork(_)) => Ok(id.to_string()),
            Err(error) => Err(error.into()),
        }
    }

    /// What this node has with backends on a network; `None`: it balances nothing there.
    async fn open_connections(&self, network: NetworkId) -> Option<Vec<Load>> {
        if !self.me.lb.balances() {
            return None;
        }
        match self.dataplane.loads(network).await.ok()? {
            Ok(loads) => Some(loads),
            Err(error) => {
                warn!(%network, %error, "connections cannot be counted");
                None
            }
        }
    }
}

/// What goes to a service's own addresses on a network: a target outside may be that of several.
fn of_service(service: &Service, network: NetworkId, loads: Vec<Load>) -> Vec<Load> {
    let own = service.addresses.get(&network).map_or(&[][..], Vec::as_slice);
    let mut loads = loads;
    loads.retain(|load| {
        let (Front::Port { address, .. } | Front::All { address, .. }) = load.front;
        own.contains(&address)
    });
    loads
}

/// The connections of the backends at some addresses.
fn connections(loads: &[Load], is_meant: impl Fn(SocketAddr) -> bool) -> Connections {
    let meant = loads.iter().filter(|load| is_meant(load.backend));
    meant.fold(Connections::default(), |sum, load| Connections {
        active: sum.active + u64::from(load.active),
        inactive: sum.inactive + u64::from(load.inactive),
    })
}

fn external_view(outside: &Outside, network_name: &str, open: Option<&[Load]>) -> ExternalView {
    let external = outside.external;
    ExternalView {
        external,
        network_name: network_name.to_owned(),
        weight: outside.weight(),
        out: outside.out.as_ref().map(Out::to_string),
        connections: open.map(|open| connections(open, |at| external.is_at(at))),
    }
}

fn backend_view(backend: &Backend<'_>, network_name: &str, open: Option<&[Load]>) -> BackendView {
    let endpoint = backend.endpoint;
    let sum = |open| connections(open, |at| endpoint.addresses.contains(&at.ip()));
    BackendView {
        endpoint: endpoint.id,
        name: endpoint.name.clone(),
        network_name: network_name.to_owned(),
        node: endpoint.node.clone(),
        addresses: endpoint.addresses.clone(),
        state: endpoint.state,
        reason: endpoint.reason.clone(),
        weight: backend.weight(),
        out: backend.out.as_ref().map(Out::to_string),
        connections: open.map(sum),
    }
}

fn timeouts_view(network_name: &str, timeouts: lb::Timeouts) -> TimeoutsView {
    let lb::Timeouts { tcp, tcp_fin, udp } = timeouts;
    TimeoutsView { network_name: network_name.to_owned(), tcp, tcp_fin, udp }
}
