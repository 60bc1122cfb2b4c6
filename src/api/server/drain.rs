//! What the paths of drains and of their end do.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Parameters, Segment};
use super::routes::{Agent, Answer, Missing, ParameterErrors, Scope, StoreErrors, whole};
use crate::api::{ApiError, DrainView, Service, Target};
use crate::model::{Name, NodeName};

pub(super) fn router() -> OpenApiRouter<Arc<dyn Service>> {
    OpenApiRouter::new()
        .routes(routes!(drain_endpoint, endpoint_drain))
        .routes(routes!(drain_service, service_drain))
        .routes(routes!(drain_node, node_drain))
        .routes(routes!(activate_endpoint))
        .routes(routes!(activate_service))
        .routes(routes!(activate_node))
}

fn endpoint(reference: &Name, scope: Scope) -> Target {
    let network = scope.network.map(|network| network.to_string());
    Target::Endpoint { reference: reference.to_string(), network }
}

/// Has an endpoint get no new connections of its service; those that it has go on.
#[utoipa::path(post, path = "/v1/endpoints/{endpoint}/drain",
    params(("endpoint" = Name, Path, description = "The endpoint's name or id."), Scope),
    responses(
        (status = 200, body = DrainView, description = "It is drained; who has seen that follows."),
        (status = 409, body = ApiError, description = "Several networks have that name."),
        ParameterErrors, Missing, StoreErrors))]
async fn drain_endpoint(
    State(agent): Agent,
    Segment(reference): Segment<Name>,
    Parameters(scope): Parameters<Scope>,
) -> Answer<Json<DrainView>> {
    let target = endpoint(&reference, scope);
    Ok(Json(whole(async move { agent.drain(target).await }).await?))
}

/// How far the drain of an endpoint is.
#[utoipa::path(get, path = "/v1/endpoints/{endpoint}/drain",
    params(("endpoint" = Name, Path, description = "The endpoint's name or id."), Scope),
    responses(
        (status = 200, body = DrainView),
        (status = 409, body = ApiError, description = "Several networks have that name."),
        ParameterErrors, Missing, StoreErrors))]
async fn endpoint_drain(
    State(agent): Agent,
    Segment(reference): Segment<Name>,
    Parameters(scope): Parameters<Scope>,
) -> Answer<Json<DrainView>> {
    Ok(Json(agent.drain_state(endpoint(&reference, scope)).await?))
}

/// Has all endpoints that a service has now get no new connections.
#[utoipa::path(post, path = "/v1/services/{service}/drain",
    params(("service" = Name, Path, description = "The service's name.")),
    responses(
        (status = 200, body = DrainView, description = "They are drained; who has seen that follows."),
        ParameterErrors, Missing, StoreErrors))]
async fn drain_service(State(agent): Agent, Segment(name): Segment<Name>) -> Answer<Json<DrainView>> {
    Ok(Json(whole(async move { agent.drain(Target::Service(name)).await }).await?))
}

/// How far the drain of a service's endpoints is.
#[utoipa::path(get, path = "/v1/services/{service}/drain",
    params(("service" = Name, Path, description = "The service's name.")),
    responses((status = 200, body = DrainView), ParameterErrors, Missing, StoreErrors))]
async fn service_drain(State(agent): Agent, Segment(name): Segment<Name>) -> Answer<Json<DrainView>> {
    Ok(Json(agent.drain_state(Target::Service(name)).await?))
}

/// Has all endpoints on a node get no new connections, also those that come.
#[utoipa::path(post, path = "/v1/nodes/{node}/drain",
    params(("node" = NodeName, Path, description = "The node's name.")),
    responses(
        (status = 200, body = DrainView, description = "It is drained; who has seen that follows."),
        ParameterErrors, Missing, StoreErrors))]
async fn drain_node(State(agent): Agent, Segment(name): Segment<NodeName>) -> Answer<Json<DrainView>> {
    Ok(Json(whole(async move { agent.drain(Target::Node(name)).await }).await?))
}

/// How far the drain of a node is.
#[utoipa::path(get, path = "/v1/nodes/{node}/drain",
    params(("node" = NodeName, Path, description = "The node's name.")),
    responses((status = 200, body = DrainView), ParameterErrors, Missing, StoreErrors))]
async fn node_drain(State(agent): Agent, Segment(name): Segment<NodeName>) -> Answer<Json<DrainView>> {
    Ok(Json(agent.drain_state(Target::Node(name)).await?))
}

/// Has a drained endpoint get connections again, as soon as it is ready.
#[utoipa::path(post, path = "/v1/endpoints/{endpoint}/activate",
    params(("endpoint" = Name, Path, description = "The endpoint's name or id."), Scope),
    responses(
        (status = 204, description = "It is not drained."),
        (status = 409, body = ApiError, description = "Several networks have that name."),
        ParameterErrors, Missing, StoreErrors))]
async fn activate_endpoint(
    State(agent): Agent,
    Segment(reference): Segment<Name>,
    Parameters(scope): Parameters<Scope>,
) -> Answer<StatusCode> {
    activate(agent, endpoint(&reference, scope)).await
}

/// Has those endpoints of a service that were drained get connections again.
#[utoipa::path(post, path = "/v1/services/{service}/activate",
    params(("service" = Name, Path, description = "The service's name.")),
    responses(
        (status = 204, description = "None of them is drained."),
        ParameterErrors, Missing, StoreErrors))]
async fn activate_service(State(agent): Agent, Segment(name): Segment<Name>) -> Answer<StatusCode> {
    activate(agent, Target::Service(name)).await
}

/// Has a drained node's endpoints get connections again, but for those that are drained themselves.
#[utoipa::path(post, path = "/v1/nodes/{node}/activate",
    params(("node" = NodeName, Path, description = "The node's name.")),
    responses(
        (status = 204, description = "It is not drained."),
        ParameterErrors, Missing, StoreErrors))]
async fn activate_node(State(agent): Agent, Segment(name): Segment<NodeName>) -> Answer<StatusCode> {
    activate(agent, Target::Node(name)).await
}

async fn activate(agent: Arc<dyn Service>, target: Target) -> Answer<StatusCode> {
    whole(async move { agent.activate(target).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}
