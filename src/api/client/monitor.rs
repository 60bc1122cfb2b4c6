//! What is seen of packets, as it comes.

use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use hyper::{Method, StatusCode};

use super::{Client, ClientError, Connection, TIMEOUT, with_query};
use crate::api::{MonitorQuery, Sighting};
use crate::model::Name;

/// What is seen of packets on a node, as it comes.
#[derive(Debug)]
pub struct Sightings {
    client: Client,
    /// The answer comes by it for as long as it lives.
    _connection: Connection,
    body: Incoming,
    /// What came of a line that is not whole yet.
    rest: Vec<u8>,
}

impl Sightings {
    /// The next one; `None`: the agent has ended.
    ///
    /// # Errors
    /// When the connection fails, or what comes is none of this API.
    pub async fn next(&mut self) -> Result<Option<Sighting>, ClientError> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return self.client.decode(StatusCode::OK, &line).map(Some);
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.rest.extend(frame.data_ref().into_iter().flatten()),
                Some(Err(error)) => return Err(self.client.broken(error)),
                None => return Ok(None),
            }
        }
    }
}

impl Client {
    /// What is seen of packets on this node from now on.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn monitor(&self, query: &MonitorQuery) -> Result<Sightings, ClientError> {
        let path = with_query(
            "/v1/monitor",
            &[
                ("network", query.network.as_ref().map(Name::as_str)),
                ("endpoint", query.endpoint.as_ref().map(Name::as_str)),
                ("service", query.service.as_ref().map(Name::as_str)),
                ("type", query.kind.map(|kind| kind.to_string()).as_deref()),
                ("sample", query.sample.map(|sample| sample.to_string()).as_deref()),
            ],
        );
        let request = self.request(Method::GET, &path, Bytes::new())?;
        let mut connection = self.connect().await?;
        let sent = tokio::time::timeout(TIMEOUT, connection.sender.send_request(request)).await;
        let response = sent.map_err(|_| self.late(TIMEOUT))?.map_err(|error| self.broken(error))?;
        let (status, body) = (response.status(), response.into_body());
        if !status.is_success() {
            let body = body.collect().await.map_err(|error| self.broken(error))?.to_bytes();
            return Err(self.refusal(status, &body));
        }
        Ok(Sightings { client: self.clone(), _connection: connection, body, rest: Vec::new() })
    }
}
