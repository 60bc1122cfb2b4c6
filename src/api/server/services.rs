//! What the paths of services and reservations do.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Body, Segment};
use super::routes::{Agent, Answer, BodyErrors, Missing, ParameterErrors, StoreErrors, whole};
use crate::api::{ApiError, ReserveRequest, Scale, Service, ServiceView};
use crate::model::{Name, ServiceSpec, ServiceUpdate};

pub(super) fn router() -> OpenApiRouter<Arc<dyn Service>> {
    OpenApiRouter::new()
        .routes(routes!(services, create_service))
        .routes(routes!(service, update_service, remove_service))
        .routes(routes!(scale_service))
        .routes(routes!(reserve))
}

/// All services, by name.
#[utoipa::path(get, path = "/v1/services",
    responses((status = 200, body = Vec<ServiceView>), StoreErrors))]
async fn services(State(agent): Agent) -> Answer<Json<Vec<ServiceView>>> {
    Ok(Json(agent.services().await?))
}

/// Makes a service, and keeps all the addresses that it will need.
#[utoipa::path(post, path = "/v1/services", request_body = ServiceSpec,
    responses(
        (status = 201, body = ServiceView, description = "The service is there."),
        (status = 409, body = ApiError,
            description = "Its name is taken, or a network has too few addresses."),
        (status = 501, body = ApiError,
            description = "The kernel of this node has nothing that balances a service."),
        BodyErrors, Missing, StoreErrors))]
async fn create_service(
    State(agent): Agent,
    Body(spec): Body<ServiceSpec>,
) -> Answer<(StatusCode, Json<ServiceView>)> {
    let view = whole(async move { agent.create_service(spec).await }).await?;
    Ok((StatusCode::CREATED, Json(view)))
}

/// One service.
#[utoipa::path(get, path = "/v1/services/{service}",
    params(("service" = Name, Path, description = "The service's name.")),
    responses((status = 200, body = ServiceView), ParameterErrors, Missing, StoreErrors))]
async fn service(State(agent): Agent, Segment(name): Segment<Name>) -> Answer<Json<ServiceView>> {
    Ok(Json(agent.service(&name).await?))
}

/// Changes a service; what is not given stays as it is.
#[utoipa::path(patch, path = "/v1/services/{service}", request_body = ServiceUpdate,
    params(("service" = Name, Path, description = "The service's name.")),
    responses(
        (status = 200, body = ServiceView, description = "It is changed."),
        (status = 409, body = ApiError, description = "A network has too few addresses."),
        BodyErrors, Missing, StoreErrors))]
async fn update_service(
    State(agent): Agent,
    Segment(name): Segment<Name>,
    Body(update): Body<ServiceUpdate>,
) -> Answer<Json<ServiceView>> {
    Ok(Json(whole(async move { agent.update_service(&name, update).await }).await?))
}

/// Removes a service; its endpoints stay.
#[utoipa::path(delete, path = "/v1/services/{service}",
    params(("service" = Name, Path, description = "The service's name.")),
    responses(
        (status = 204, description = "The service is gone."),
        ParameterErrors, Missing, StoreErrors))]
async fn remove_service(State(agent): Agent, Segment(name): Segment<Name>) -> Answer<StatusCode> {
    whole(async move { agent.remove_service(&name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Changes how many containers a service has.
#[utoipa::path(put, path = "/v1/services/{service}/scale", request_body = Scale,
    params(("service" = Name, Path, description = "The service's name.")),
    responses(
        (status = 200, body = ServiceView, description = "It is changed."),
        (status = 409, body = ApiError, description = "A network has too few addresses."),
        BodyErrors, Missing, StoreErrors))]
async fn scale_service(
    State(agent): Agent,
    Segment(name): Segment<Name>,
    Body(scale): Body<Scale>,
) -> Answer<Json<ServiceView>> {
    Ok(Json(whole(async move { agent.scale_service(&name, scale.replicas).await }).await?))
}

/// Keeps addresses of some networks for a while.
#[utoipa::path(post, path = "/v1/reservations", request_body = ReserveRequest,
    responses(
        (status = 204, description = "They are kept."),
        (status = 409, body = ApiError, description = "A network has too few addresses."),
        BodyErrors, Missing, StoreErrors))]
async fn reserve(State(agent): Agent, Body(request): Body<ReserveRequest>) -> Answer<StatusCode> {
    whole(async move { agent.reserve(request).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}
