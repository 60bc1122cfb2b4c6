//! The metrics, as monitoring systems read them: on the API's socket, and on a TCP port that has
//! nothing else.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tracing::debug;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::Refusal;
use super::routes::{Agent, shortened};
use crate::api::{ApiError, ErrorCode, Service};

/// Connections to the TCP port that are served at once: few scrape, and each is short.
pub(super) const MAX_CONNECTIONS: usize = 32;
/// How long a connection to the TCP port lives at most.
const LIFETIME: Duration = Duration::from_secs(10);
/// The largest head of a request on the TCP port.
const MAX_HEAD: usize = 8 * 1024;

const OPENMETRICS: &str = "application/openmetrics-text";

/// The metrics among the API's routes.
pub(super) fn open_router() -> OpenApiRouter<Arc<dyn Service>> {
    OpenApiRouter::new().routes(routes!(metrics))
}

/// The metrics alone.
pub(super) fn router(service: Arc<dyn Service>) -> axum::Router {
    axum::Router::new()
        .route("/metrics", get(metrics))
        .fallback(nothing_else)
        .method_not_allowed_fallback(nothing_else)
        .with_state(service)
}

/// Metrics of the node and the networks that it uses, in the OpenMetrics text format; who does not
/// ask for that gets the same as Prometheus' older format.
#[utoipa::path(get, path = "/metrics",
    responses((status = 200, description = "All metrics.",
        content((String = "application/openmetrics-text"), (String = "text/plain")))))]
async fn metrics(State(agent): Agent, headers: HeaderMap) -> Response {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let kind = match accepted.into_iter().any(|value| value.contains(OPENMETRICS)) {
        true => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        false => "text/plain; version=0.0.4; charset=utf-8",
    };
    ([(header::CONTENT_TYPE, kind)], agent.metrics().await).into_response()
}

async fn nothing_else(method: Method, uri: Uri) -> Refusal {
    if uri.path() == "/metrics" {
        let message = format!("/metrics cannot be asked with {}", shortened(method.as_str()));
        return Refusal::new(StatusCode::METHOD_NOT_ALLOWED, ErrorCode::Invalid, message);
    }
    let message = format!("there is no path {}: here is /metrics only", shortened(uri.path()));
    ApiError::new(ErrorCode::NotFound, message).into()
}

/// Answers one request on a connection to the TCP port.
pub(super) async fn connection(
    stream: TcpStream,
    router: axum::Router,
    mut stopping: watch::Receiver<()>,
) {
    let peer = stream.peer_addr().ok();
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(LIFETIME)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false);
    let service = TowerToHyperService::new(router);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let served = async {
        tokio::select! {
            result = connection.as_mut() => result,
            _ = stopping.changed() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    };
    match tokio::time::timeout(LIFETIME, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, ?peer, "scrape failed"),
        Err(_) => debug!(?peer, "scrape took too long"),
    }
}
