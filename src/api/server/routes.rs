//! What each path does. The document is made from the same lines as the routes.

use std::sync::{Arc, LazyLock};

use axum::Json;
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use ipnetwork::IpNetwork;
use serde::Deserialize;
use utoipa::openapi::response::{ResponseBuilder, ResponsesBuilder};
use utoipa::openapi::{ContentBuilder, OpenApi, Ref, RefOr};
use utoipa::{IntoParams, IntoResponses, OpenApi as _};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Body, Parameters, Refusal, Segment};
use super::{drain, metrics, monitor, names, services};
use crate::api::{
    ApiError, AttachRequest, Attached, CheckView, Detached, EndpointView, ErrorCode, Expanded,
    NetworkView, NodeView, Service, SettingsView, VersionView,
};
use crate::model::{ExpandSpec, Name, NetworkSpec, NodeName};

pub(super) type Agent = State<Arc<dyn Service>>;
pub(super) type Answer<T> = Result<T, Refusal>;

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "netctl",
        description = "The local API of the netctl agent, on its unix socket. Errors are \
                       `{\"code\", \"message\"}`: the code is stable, the message is for people."
    ),
    components(schemas(ApiError))
)]
struct Head;

/// The OpenAPI document of the API.
pub fn document() -> OpenApi {
    open_router().into_openapi()
}

/// The document as it is sent.
static DOCUMENT: LazyLock<String> = LazyLock::new(|| document().to_json().unwrap_or_default());

/// All routes over a service.
pub(super) fn router(service: Arc<dyn Service>) -> axum::Router {
    let (router, _) = open_router().split_for_parts();
    router.fallback(unknown_path).method_not_allowed_fallback(wrong_method).with_state(service)
}

fn open_router() -> OpenApiRouter<Arc<dyn Service>> {
    OpenApiRouter::with_openapi(Head::openapi())
        .routes(routes!(version))
        .routes(routes!(settings))
        .routes(routes!(openapi))
        .routes(routes!(networks, create_network))
        .routes(routes!(network, remove_network))
        .routes(routes!(expand_network, shrink_network))
        .routes(routes!(endpoints, attach))
        .routes(routes!(endpoint, detach))
        .routes(routes!(check))
        .routes(routes!(repair))
        .routes(routes!(nodes))
        .routes(routes!(node, remove_node))
        .merge(services::router())
        .merge(drain::router())
        .merge(names::router())
        .merge(monitor::router())
        .merge(metrics::open_router())
}

async fn unknown_path(uri: Uri) -> Refusal {
    let message = format!("there is no path {}: see /v1/openapi.json", shortened(uri.path()));
    ApiError::new(ErrorCode::NotFound, message).into()
}

async fn wrong_method(method: Method, uri: Uri) -> Refusal {
    let (path, method) = (shortened(uri.path()), shortened(method.as_str()));
    let message = format!("{path} cannot be asked with {method}: see /v1/openapi.json");
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, ErrorCode::Invalid, message)
}

pub(super) fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(80).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// Makes a change to its end, also when the client that asked for it goes away: hyper drops a
/// handler with its connection, and a change is not to be cut in half.
pub(super) async fn whole<T: Send + 'static>(
    change: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Answer<T> {
    let done = tokio::spawn(change).await;
    done.unwrap_or_else(|error| {
        tracing::error!(%error, "a change broke off");
        Err(ApiError::new(ErrorCode::Internal, "the agent failed; its log has more"))
    })
    .map_err(Refusal::from)
}

/// Writes a set of error responses for the document.
macro_rules! errors {
    ($(#[$doc:meta])* $name:ident: $($status:literal $text:literal),+) => {
        $(#[$doc])*
        pub(super) struct $name;

        impl IntoResponses for $name {
            fn responses()
            -> std::collections::BTreeMap<String, RefOr<utoipa::openapi::response::Response>> {
                let content = || {
                    ContentBuilder::new().schema(Some(Ref::from_schema_name("ApiError"))).build()
                };
                let response = |text: &str| {
                    ResponseBuilder::new()
                        .description(text)
                        .content("application/json", content())
                        .build()
                };
                ResponsesBuilder::new()
                    $(.response($status, response($text)))+
                    .build()
                    .responses
            }
        }
    };
}

errors!(
    /// What every call that needs the store can answer.
    StoreErrors:
    "500" "The agent or the kernel failed; the agent's log has more.",
    "503" "The store cannot be reached, or it is not the one this node belonged to."
);
errors!(
    /// What a call with a body can answer.
    BodyErrors:
    "400" "The request cannot be used as it is; the message names the field.",
    "413" "The body is larger than 1 MiB.",
    "415" "The body is not declared as JSON."
);
errors!(
    /// What a call with a parameter can answer.
    ParameterErrors: "400" "A name or a parameter cannot be used as it is."
);
errors!(
    /// What a call about one thing can answer.
    Missing: "404" "There is no such thing."
);

/// The agent's version and state.
#[utoipa::path(get, path = "/v1/version", responses((status = 200, body = VersionView)))]
async fn version(State(agent): Agent) -> Json<VersionView> {
    Json(agent.version().await)
}

/// What clients need of the agent's configuration.
#[utoipa::path(get, path = "/v1/settings",
    responses((status = 200, body = SettingsView), StoreErrors))]
async fn settings(State(agent): Agent) -> Answer<Json<SettingsView>> {
    Ok(Json(agent.settings().await?))
}

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", responses((status = 200, body = Object)))]
async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT.as_str()).into_response()
}

/// All networks, by name.
#[utoipa::path(get, path = "/v1/networks",
    responses((status = 200, body = Vec<NetworkView>), StoreErrors))]
async fn networks(State(agent): Agent) -> Answer<Json<Vec<NetworkView>>> {
    Ok(Json(agent.networks().await?))
}

/// Makes a network.
#[utoipa::path(post, path = "/v1/networks", request_body = NetworkSpec,
    responses(
        (status = 201, body = NetworkView, description = "The network is there."),
        (status = 409, body = ApiError,
            description = "Its name, VNI or subnet is taken, or no subnet is left."),
        BodyErrors, StoreErrors))]
async fn create_network(
    State(agent): Agent,
    Body(spec): Body<NetworkSpec>,
) -> Answer<(StatusCode, Json<NetworkView>)> {
    let view = whole(async move { agent.create_network(spec).await }).await?;
    Ok((StatusCode::CREATED, Json(view)))
}

/// One network, by name or id.
#[utoipa::path(get, path = "/v1/networks/{network}",
    params(("network" = Name, Path, description = "The network's name or id.")),
    responses((status = 200, body = NetworkView), ParameterErrors, Missing, StoreErrors))]
async fn network(State(agent): Agent, Segment(reference): Segment<Name>) -> Answer<Json<NetworkView>> {
    Ok(Json(agent.network(reference.as_str()).await?))
}

/// Removes a network that has no endpoints.
#[utoipa::path(delete, path = "/v1/networks/{network}",
    params(("network" = Name, Path, description = "The network's name or id.")),
    responses(
        (status = 204, description = "The network is gone."),
        (status = 409, body = ApiError, description = "It has endpoints."),
        ParameterErrors, Missing, StoreErrors))]
async fn remove_network(State(agent): Agent, Segment(reference): Segment<Name>) -> Answer<StatusCode> {
    whole(async move { agent.remove_network(reference.as_str()).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Adds subnets to a network. The same request again changes nothing.
#[utoipa::path(post, path = "/v1/networks/{network}/subnets", request_body = ExpandSpec,
    params(("network" = Name, Path, description = "The network's name or id.")),
    responses(
        (status = 201, body = NetworkView, description = "The network has the subnets now."),
        (status = 200, body = NetworkView, description = "It had them already."),
        (status = 409, body = ApiError,
            description = "One overlaps something, or is there with other options."),
        BodyErrors, Missing, StoreErrors))]
async fn expand_network(
    State(agent): Agent,
    Segment(reference): Segment<Name>,
    Body(spec): Body<ExpandSpec>,
) -> Answer<(StatusCode, Json<NetworkView>)> {
    let expand = async move { agent.expand_network(reference.as_str(), spec).await };
    Ok(match whole(expand).await? {
        Expanded::Changed(view) => (StatusCode::CREATED, Json(view)),
        Expanded::Unchanged(view) => (StatusCode::OK, Json(view)),
    })
}

/// Which subnet to remove.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Which {
    /// The subnet, such as 10.9.0.0/24.
    #[param(value_type = String)]
    subnet: IpNetwork,
}

/// Removes a subnet of which no address is taken.
#[utoipa::path(delete, path = "/v1/networks/{network}/subnets",
    params(("network" = Name, Path, description = "The network's name or id."), Which),
    responses(
        (status = 200, body = NetworkView, description = "The subnet is gone."),
        (status = 409, body = ApiError,
            description = "Addresses of it are taken, or it is the network's only one."),
        ParameterErrors, Missing, StoreErrors))]
async fn shrink_network(
    State(agent): Agent,
    Segment(reference): Segment<Name>,
    Parameters(which): Parameters<Which>,
) -> Answer<Json<NetworkView>> {
    let shrink = async move { agent.shrink_network(reference.as_str(), which.subnet).await };
    Ok(Json(whole(shrink).await?))
}

/// Which endpoints to list.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Filter {
    /// Only those of this network (name or id).
    network: Option<Name>,
    /// Only those on this node.
    node: Option<NodeName>,
}

/// Endpoints: all, or those of one network, or on one node.
#[utoipa::path(get, path = "/v1/endpoints", params(Filter),
    responses((status = 200, body = Vec<EndpointView>), ParameterErrors, Missing, StoreErrors))]
async fn endpoints(
    State(agent): Agent,
    Parameters(filter): Parameters<Filter>,
) -> Answer<Json<Vec<EndpointView>>> {
    let network = filter.network.as_ref().map(Name::as_str);
    Ok(Json(agent.endpoints(network, filter.node.as_ref()).await?))
}

/// Plugs a network namespace into a network. The same request again is answered with the endpoint
/// that is there.
#[utoipa::path(post, path = "/v1/endpoints", request_body = AttachRequest,
    responses(
        (status = 201, body = EndpointView, description = "The endpoint is new and ready."),
        (status = 200, body = EndpointView, description = "It was there already."),
        (status = 409, body = ApiError,
            description = "Its name, address or interface is taken, or no address is left."),
        (status = 501, body = ApiError, description = "The kernel lacks what is needed."),
        (status = 504, body = ApiError, description = "The network was not ready in time."),
        BodyErrors, Missing, StoreErrors))]
async fn attach(
    State(agent): Agent,
    Body(request): Body<AttachRequest>,
) -> Answer<(StatusCode, Json<EndpointView>)> {
    if let Err(error) = request.network.parse::<Name>() {
        return Err(Refusal::invalid(format!("field network: {error}")));
    }
    Ok(match whole(async move { agent.attach(request).await }).await? {
        Attached::Created(view) => (StatusCode::CREATED, Json(view)),
        Attached::Existing(view) => (StatusCode::OK, Json(view)),
    })
}

/// Within which network a name is meant.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Scope {
    /// The endpoint's network (name or id): needed when several networks have that name.
    pub(super) network: Option<Name>,
}

/// One endpoint, by name or id.
#[utoipa::path(get, path = "/v1/endpoints/{endpoint}",
    params(("endpoint" = Name, Path, description = "The endpoint's name or id."), Scope),
    responses(
        (status = 200, body = EndpointView),
        (status = 409, body = ApiError, description = "Several networks have that name."),
        ParameterErrors, Missing, StoreErrors))]
async fn endpoint(
    State(agent): Agent,
    Segment(reference): Segment<Name>,
    Parameters(scope): Parameters<Scope>,
) -> Answer<Json<EndpointView>> {
    let network = scope.network.as_ref().map(Name::as_str);
    Ok(Json(agent.endpoint(reference.as_str(), network).await?))
}

/// Unplugs an endpoint of this node.
#[utoipa::path(delete, path = "/v1/endpoints/{endpoint}",
    params(("endpoint" = Name, Path, description = "The endpoint's name or id."), Scope),
    responses(
        (status = 200, body = Detached, description = "The endpoint is gone."),
        (status = 409, body = ApiError,
            description = "Several networks have that name, or it is on another node."),
        ParameterErrors, Missing, StoreErrors))]
async fn detach(
    State(agent): Agent,
    Segment(reference): Segment<Name>,
    Parameters(scope): Parameters<Scope>,
) -> Answer<Json<Detached>> {
    let within = scope.network.as_ref().map(|name| format!(" in network {name}"));
    let name = reference.clone();
    let detach = async move {
        let network = scope.network.as_ref().map(Name::as_str);
        agent.detach(name.as_str(), network).await
    };
    match whole(detach).await? {
        Some(id) => Ok(Json(Detached { id })),
        None => {
            let within = within.unwrap_or_default();
            let message = format!("there is no endpoint {reference}{within} on this node");
            Err(ApiError::new(ErrorCode::NotFound, message).into())
        }
    }
}

/// What to check.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Checked {
    /// Only this network (name or id).
    network: Option<Name>,
    /// Only the kernel of the node that is asked, not of every node.
    #[serde(default)]
    local: bool,
}

/// Compares the store with itself and with the kernel of every node.
///
/// It waits some seconds for nodes that do not answer, and says which did not.
#[utoipa::path(get, path = "/v1/ipam/check", params(Checked),
    responses((status = 200, body = CheckView), ParameterErrors, Missing, StoreErrors))]
async fn check(
    State(agent): Agent,
    Parameters(checked): Parameters<Checked>,
) -> Answer<Json<CheckView>> {
    // What was asked of the others is taken back at the end.
    let check =
        async move { agent.check(checked.network.as_ref().map(Name::as_str), checked.local).await };
    Ok(Json(whole(check).await?))
}

/// Repairs what it is safe to repair of what a check finds in the store, and checks again.
#[utoipa::path(post, path = "/v1/ipam/repair", params(Checked),
    responses((status = 200, body = CheckView), ParameterErrors, Missing, StoreErrors))]
async fn repair(
    State(agent): Agent,
    Parameters(checked): Parameters<Checked>,
) -> Answer<Json<CheckView>> {
    let repair =
        async move { agent.repair(checked.network.as_ref().map(Name::as_str), checked.local).await };
    Ok(Json(whole(repair).await?))
}

/// All nodes, by name.
#[utoipa::path(get, path = "/v1/nodes",
    responses((status = 200, body = Vec<NodeView>), StoreErrors))]
async fn nodes(State(agent): Agent) -> Answer<Json<Vec<NodeView>>> {
    Ok(Json(agent.nodes().await?))
}

/// One node.
#[utoipa::path(get, path = "/v1/nodes/{node}",
    params(("node" = NodeName, Path, description = "The node's name.")),
    responses((status = 200, body = NodeView), ParameterErrors, Missing, StoreErrors))]
async fn node(State(agent): Agent, Segment(name): Segment<NodeName>) -> Answer<Json<NodeView>> {
    Ok(Json(agent.node(&name).await?))
}

/// Removes a node that is dead, with its endpoints.
#[utoipa::path(delete, path = "/v1/nodes/{node}",
    params(("node" = NodeName, Path, description = "The node's name.")),
    responses(
        (status = 204, description = "The node is gone."),
        (status = 409, body = ApiError, description = "It is alive."),
        ParameterErrors, Missing, StoreErrors))]
async fn remove_node(State(agent): Agent, Segment(name): Segment<NodeName>) -> Answer<StatusCode> {
    whole(async move { agent.remove_node(&name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}
