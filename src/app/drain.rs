//! The agent's part in drains.

use tracing::info;

use super::agent::Agent;
use crate::api::{ApiError, DrainView, Target};
use crate::cluster::drain::{Drain, Scope};

impl Agent {
    pub(super) async fn drain(&self, target: &Target) -> Result<DrainView, ApiError> {
        let scope = self.scope(target).await?;
        self.cluster().drain(&scope).await?;
        info!(?target, "drained");
        self.drain_view(&scope).await
    }

    pub(super) async fn drain_state(&self, target: &Target) -> Result<DrainView, ApiError> {
        let scope = self.scope(target).await?;
        self.drain_view(&scope).await
    }

    pub(super) async fn activate(&self, target: &Target) -> Result<(), ApiError> {
        let scope = self.scope(target).await?;
        self.cluster().activate(&scope).await?;
        info!(?target, "activated");
        Ok(())
    }

    async fn scope(&self, target: &Target) -> Result<Scope, ApiError> {
        Ok(match target {
            Target::Endpoint { reference, network } => {
                let endpoint = self.endpoint(reference, network.as_deref()).await?.endpoint;
                Scope::Endpoint(endpoint.network, endpoint.id)
            }
            Target::Service(name) => Scope::Service(Box::new(self.cluster().service(name).await?.value)),
            Target::Node(name) => Scope::Node(self.node(name)?.node.name),
        })
    }

    async fn drain_view(&self, scope: &Scope) -> Result<DrainView, ApiError> {
        let drain = self.cluster().drain_state(scope).await?;
        let done = drain.is_done(scope);
        let Drain { endpoints, waiting, dead, connections, .. } = drain;
        let (waiting, dead) = (waiting.into_iter().collect(), dead.into_iter().collect());
        Ok(DrainView { done, endpoints, waiting, dead, connections })
    }
}
