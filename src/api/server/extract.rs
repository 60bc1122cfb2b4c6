//! How requests are read, and how refusals are written: always as [`ApiError`] in JSON.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use crate::api::{ApiError, ErrorCode};

/// The largest body of a request, in bytes.
pub const MAX_BODY: usize = 1024 * 1024;
/// How much of a larger body is read and thrown away, so that its sender reads our answer.
const MAX_DRAINED: usize = 16 * MAX_BODY;
/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// An answer that is an error, and its status.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    error: ApiError,
}

impl Refusal {
    /// A refusal with a status of its own.
    pub(super) fn new(status: StatusCode, code: ErrorCode, message: impl Into<String>) -> Self {
        Self { status, error: ApiError::new(code, message) }
    }

    /// A request that cannot be used as it is.
    pub(super) fn invalid(message: impl Display) -> Self {
        ApiError::new(ErrorCode::Invalid, message.to_string()).into()
    }
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        let status =
            StatusCode::from_u16(error.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, error }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(self.error)).into_response()
    }
}

/// The last part of a path, parsed.
pub(super) struct Segment<T>(pub(super) T);

impl<T, S> FromRequestParts<S> for Segment<T>
where
    T: FromStr<Err: Display>,
    S: Send + Sync,
{
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|rejection| Refusal::invalid(rejection.body_text()))?;
        text.parse().map(Self).map_err(Refusal::invalid)
    }
}

/// The parameters behind the `?`.
pub(super) struct Parameters<T>(pub(super) T);

impl<T, S> FromRequestParts<S> for Parameters<T>
where
    T: DeserializeOwned,
    S: Send + Sync,
{
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Refusal> {
        let parsed = Query::<T>::try_from_uri(&parts.uri);
        parsed.map(|Query(value)| Self(value)).map_err(|r| Refusal::invalid(r.body_text()))
    }
}

/// A JSON body of at most [`MAX_BODY`].
pub(super) struct Body<T>(pub(super) T);

impl<T, S> FromRequest<S> for Body<T>
where
    T: DeserializeOwned,
    S: Send + Sync,
{
    type Rejection = Refusal;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Refusal> {
        if !is_json(&request) {
            let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            let message = "the body's type is not JSON: send content-type application/json";
            return Err(Refusal::new(status, ErrorCode::Invalid, message));
        }
        let bytes = tokio::time::timeout(BODY_TIMEOUT, read(request)).await.map_err(|_| {
            let seconds = BODY_TIMEOUT.as_secs();
            Refusal::invalid(format!("the body did not arrive within {seconds} s"))
        })??;
        parse(&bytes).map(Self)
    }
}

fn is_json(request: &Request) -> bool {
    let value = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = value.and_then(|value| value.split(';').next()).unwrap_or_default();
    kind.trim().eq_ignore_ascii_case("application/json")
}

async fn read(request: Request) -> Result<Vec<u8>, Refusal> {
    let mut body = request.into_body();
    let (mut bytes, mut total) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Refusal::invalid(format!("the body broke off: {error}")))?;
        let data = frame.into_data().unwrap_or_default();
        total += data.len();
        if total <= MAX_BODY {
            bytes.extend_from_slice(&data);
        } else if total > MAX_DRAINED {
            break;
        }
    }
    if total > MAX_BODY {
        let message = format!("the body is too large: at most {MAX_BODY} bytes are read");
        return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, ErrorCode::Invalid, message));
    }
    Ok(bytes)
}

/// Reads JSON; an error names the field.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refusal> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        match path.as_str() {
            "." => Refusal::invalid(format!("the body cannot be used: {}", error.inner())),
            field => Refusal::invalid(format!("field {field}: {}", error.inner())),
        }
    })?;
    json.end().map_err(|error| Refusal::invalid(format!("the body cannot be used: {error}")))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::AttachRequest;
    use crate::model::NetworkSpec;

    fn message<T: DeserializeOwned>(json: &str) -> String {
        parse::<T>(json.as_bytes()).err().unwrap().error.message
    }

    #[test]
    fn a_refusal_names_the_field() {
        for (json, field) in [
            (r#"{"name":"web","subnets":["10.9.0.0/24","x"]}"#, "subnets[1]"),
            (r#"{"name":"A"}"#, "name"),
            (r#"{"name":"web","vni":0}"#, "vni"),
            (r#"{"name":"web","colour":"red"}"#, "colour"),
            ("{}", "name"),
        ] {
            let message = message::<NetworkSpec>(json);
            assert!(message.contains(field), "{json}: {message}");
        }
        let long = format!(r#"{{"network":"web","netns":"/n","interface":"{}"}}"#, "x".repeat(300));
        assert!(message::<AttachRequest>(&long).contains("interface"));
    }

    #[test]
    fn what_follows_the_body_is_refused() {
        assert!(message::<NetworkSpec>(r#"{"name":"web"} {}"#).contains("trailing"));
    }
}
