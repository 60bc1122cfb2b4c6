//! Names, as the agent's name server answers them.

use axum::Json;
use axum::extract::State;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::Parameters;
use super::routes::{Agent, Answer, Missing, ParameterErrors, StoreErrors};
use crate::api::{ApiError, NameQuery, NameView};

pub(super) fn router() -> OpenApiRouter<std::sync::Arc<dyn crate::api::Service>> {
    OpenApiRouter::new().routes(routes!(look_up))
}

/// What a name is answered with, and why.
#[utoipa::path(get, path = "/v1/names", params(NameQuery),
    responses(
        (status = 200, body = NameView),
        (status = 409, body = ApiError,
            description = "Several networks have that endpoint, or this node does not answer for it."),
        ParameterErrors, Missing, StoreErrors))]
async fn look_up(
    State(agent): Agent,
    Parameters(query): Parameters<NameQuery>,
) -> Answer<Json<NameView>> {
    Ok(Json(agent.look_up(&query).await?))
}
