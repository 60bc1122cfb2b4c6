//! A client of the agent's HTTP API: for many calls at once, without a process for each.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::wait::limit;

/// An answer of the API.
#[derive(Debug, Clone, PartialEq)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// The body; null where there was none.
    pub body: Value,
}

/// Speaks HTTP/1.0 to one agent, one connection for each call.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Calls `method` on `path`, with a JSON body or none.
    ///
    /// # Errors
    /// When the agent cannot be reached, does not answer within 60 seconds, or not in HTTP.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> io::Result<Response> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(limit(Duration::from_secs(60))))?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let length = body.len();
        // As one piece: who answers before all was sent closes the connection on what it has not read.
        let request = format!(
            "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        parse(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, answer))
    }
}

fn parse(answer: &str) -> Option<Response> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    let body = if body.is_empty() { Value::Null } else { serde_json::from_str(body).ok()? };
    Some(Response { status, body })
}
