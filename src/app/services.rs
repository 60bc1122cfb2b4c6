//! The agent's part in services and reservations.

use std::time::Duration;

use tracing::info;

use super::agent::Agent;
use super::engine;
use crate::api::{ApiError, ReserveRequest, ServiceView};
use crate::cluster::ClusterError;
use crate::model::{Name, Service, ServiceSpec};

impl Agent {
    pub(super) async fn create_service(&self, spec: &ServiceSpec) -> Result<ServiceView, ApiError> {
        engine::check(self.me.lb, spec.endpoint_mode)?;
        let service = self.cluster().create_service(spec, &self.snapshot().alive).await?;
        info!(service = %service.name, replicas = service.replicas, addresses = ?service.addresses, "service created");
        self.service_view(service).await
    }

    pub(super) async fn services(&self) -> Result<Vec<ServiceView>, ApiError> {
        let mut views = Vec::new();
        for service in self.cluster().services().await? {
            views.push(self.service_view(service).await?);
        }
        Ok(views)
    }

    pub(super) async fn service(&self, name: &Name) -> Result<ServiceView, ApiError> {
        let service = self.cluster().service(name).await?;
        self.service_view(service.value).await
    }

    pub(super) async fn scale_service(
        &self,
        name: &Name,
        replicas: u32,
    ) -> Result<ServiceView, ApiError> {
        let service = self.cluster().scale_service(name, replicas).await?;
        info!(service = %name, replicas, "service scaled");
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
        Ok(())
    }

    async fn service_view(&self, service: Service) -> Result<ServiceView, ApiError> {
        let snapshot = self.snapshot();
        let mut network_names = Vec::new();
        for id in &service.networks {
            let seen = snapshot.networks.get(id).map(|network| network.name.to_string());
            network_names.push(match seen {
                Some(name) => name,
                // The view may not show it yet.
                None => match self.cluster().network(&id.to_string()).await {
                    Ok(network) => network.name.to_string(),
                    Err(ClusterError::NoNetwork(_)) => id.to_string(),
                    Err(error) => return Err(error.into()),
                },
            });
        }
        Ok(ServiceView { service, network_names })
    }
}
