//! The API's service: the agent behind it, or why there is none yet.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use async_trait::async_trait;
use ipnetwork::IpNetwork;
use tokio::sync::mpsc::Receiver;

use super::agent::Agent;
use super::metrics::Metrics;
use super::monitor;
use crate::api::{
    ApiError, AttachRequest, Attached, CheckView, DrainView, EndpointView, ErrorCode, Expanded,
    MonitorQuery, NameQuery, NameView, NetworkView, NodeView, ReserveRequest, Service, ServiceView,
    SettingsView, Sighting, Target, VersionView,
};
use crate::model::{EndpointId, ExpandSpec, Name, NetworkSpec, NodeName, ServiceSpec, ServiceUpdate};

/// Answers the API from the moment the agent starts: until it belongs to its cluster, with the
/// reason why it does not.
pub(super) struct Front {
    version: VersionView,
    metrics: Arc<Metrics>,
    agent: OnceLock<Arc<Agent>>,
    obstacle: Mutex<ApiError>,
}

impl Front {
    pub(super) fn new(version: VersionView, metrics: Arc<Metrics>) -> Self {
        let starting =
            ApiError::new(ErrorCode::Unavailable, "netctld is starting: try again in a moment");
        Self { version, metrics, agent: OnceLock::new(), obstacle: Mutex::new(starting) }
    }

    /// Says why the agent does not belong to its cluster.
    pub(super) fn hindered_by(&self, obstacle: ApiError) {
        *self.obstacle.lock().unwrap_or_else(PoisonError::into_inner) = obstacle;
    }

    /// Hands over to the agent.
    pub(super) fn open(&self, agent: Arc<Agent>) {
        // It is opened once; a second time would change nothing.
        let _ = self.agent.set(agent);
    }

    fn agent(&self) -> Result<&Arc<Agent>, ApiError> {
        let obstacle = || self.obstacle.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.agent.get().ok_or_else(obstacle)
    }
}

#[async_trait]
impl Service for Front {
    async fn version(&self) -> VersionView {
        self.version.clone()
    }

    async fn settings(&self) -> Result<SettingsView, ApiError> {
        Ok(self.agent()?.settings())
    }

    async fn metrics(&self) -> String {
        self.metrics.text()
    }

    async fn create_network(&self, spec: NetworkSpec) -> Result<NetworkView, ApiError> {
        self.agent()?.create_network(&spec).await
    }

    async fn networks(&self) -> Result<Vec<NetworkView>, ApiError> {
        self.agent()?.networks().await
    }

    async fn network(&self, reference: &str) -> Result<NetworkView, ApiError> {
        self.agent()?.network(reference).await
    }

    async fn remove_network(&self, reference: &str) -> Result<(), ApiError> {
        self.agent()?.remove_network(reference).await
    }

    async fn expand_network(&self, reference: &str, spec: ExpandSpec) -> Result<Expanded, ApiError> {
        self.agent()?.expand_network(reference, &spec).await
    }

    async fn shrink_network(&self, reference: &str, subnet: IpNetwork) -> Result<NetworkView, ApiError> {
        self.agent()?.shrink_network(reference, subnet).await
    }

    async fn attach(&self, request: AttachRequest) -> Result<Attached, ApiError> {
        self.agent()?.attach(request).await
    }

    async fn endpoints(
        &self,
        network: Option<&str>,
        node: Option<&NodeName>,
    ) -> Result<Vec<EndpointView>, ApiError> {
        self.agent()?.endpoints(network, node).await
    }

    async fn endpoint(&self, reference: &str, network: Option<&str>) -> Result<EndpointView, ApiError> {
        self.agent()?.endpoint(reference, network).await
    }

    async fn look_up(&self, query: &NameQuery) -> Result<NameView, ApiError> {
        self.agent()?.look_up(query).await
    }

    async fn detach(
        &self,
        reference: &str,
        network: Option<&str>,
    ) -> Result<Option<EndpointId>, ApiError> {
        self.agent()?.detach(reference, network).await
    }

    async fn create_service(&self, spec: ServiceSpec) -> Result<ServiceView, ApiError> {
        self.agent()?.create_service(&spec).await
    }

    async fn services(&self) -> Result<Vec<ServiceView>, ApiError> {
        self.agent()?.services().await
    }

    async fn service(&self, name: &Name) -> Result<ServiceView, ApiError> {
        self.agent()?.service(name).await
    }

    async fn scale_service(&self, name: &Name, replicas: u32) -> Result<ServiceView, ApiError> {
        self.agent()?.scale_service(name, replicas).await
    }

    async fn update_service(&self, name: &Name, update: ServiceUpdate) -> Result<ServiceView, ApiError> {
        self.agent()?.update_service(name, &update).await
    }

    async fn remove_service(&self, name: &Name) -> Result<(), ApiError> {
        self.agent()?.remove_service(name).await
    }

    async fn reserve(&self, request: ReserveRequest) -> Result<(), ApiError> {
        self.agent()?.reserve(&request).await
    }

    async fn check(&self, network: Option<&str>, local: bool) -> Result<CheckView, ApiError> {
        self.agent()?.check(network, local).await
    }

    async fn repair(&self, network: Option<&str>, local: bool) -> Result<CheckView, ApiError> {
        self.agent()?.repair(network, local).await
    }

    async fn nodes(&self) -> Result<Vec<NodeView>, ApiError> {
        Ok(self.agent()?.nodes())
    }

    async fn node(&self, name: &NodeName) -> Result<NodeView, ApiError> {
        self.agent()?.node(name)
    }

    async fn remove_node(&self, name: &NodeName) -> Result<(), ApiError> {
        self.agent()?.remove_node(name).await
    }

    async fn drain(&self, target: Target) -> Result<DrainView, ApiError> {
        self.agent()?.drain(&target).await
    }

    async fn drain_state(&self, target: Target) -> Result<DrainView, ApiError> {
        self.agent()?.drain_state(&target).await
    }

    async fn activate(&self, target: Target) -> Result<(), ApiError> {
        self.agent()?.activate(&target).await
    }

    async fn monitor(&self, query: MonitorQuery) -> Result<Receiver<Sighting>, ApiError> {
        monitor::watch(self.agent()?, query).await
    }
}
