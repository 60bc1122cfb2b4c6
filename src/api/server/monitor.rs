//! What is seen of packets, as a stream: a line of JSON for each.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use hyper::body::{Bytes, Frame};
use tokio::sync::mpsc::Receiver;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::Parameters;
use super::routes::{Agent, Answer, Missing, ParameterErrors, StoreErrors};
use crate::api::{ApiError, MonitorQuery, Service, Sighting};

pub(super) fn router() -> OpenApiRouter<Arc<dyn Service>> {
    OpenApiRouter::new().routes(routes!(monitor))
}

/// What is seen of packets on this node from now on: each that is dropped, and a part of the others. The answer
/// has no end: whoever has seen enough closes the connection.
#[utoipa::path(get, path = "/v1/monitor", params(MonitorQuery),
    responses(
        (status = 200, body = Sighting, content_type = "application/x-ndjson",
            description = "One of these on each line."),
        (status = 409, body = ApiError, description = "As many watch as can at once."),
        ParameterErrors, Missing, StoreErrors))]
async fn monitor(State(agent): Agent, Parameters(query): Parameters<MonitorQuery>) -> Answer<Response> {
    let sightings = agent.monitor(query).await?;
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((kind, Body::new(Lines(sightings))).into_response())
}

/// A line for each; it ends with their sender, and with it goes its receiver.
struct Lines(Receiver<Sighting>);

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|sighting| {
            let mut line = serde_json::to_vec(&sighting?).ok()?;
            line.push(b'\n');
            Some(Ok(Frame::data(line.into())))
        })
    }
}
