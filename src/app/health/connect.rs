//! Checks over the network: a TCP connection, or an HTTP answer.
//!
//! Sockets are made in the sandbox of the endpoint's network, where the endpoint's address is one
//! veth away, and use the gateway's address as their own.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::AbortHandle;

use crate::kernel::{self, Netns};
use crate::model::NetworkId;
use crate::model::object::sandbox_name;

/// The largest head of an answer.
const MAX_HEAD: usize = 16 * 1024;
/// How much of an answer's body is read, and for how long at most: a server that is cut off may
/// take that for a fault.
const MAX_BODY: usize = 64 * 1024;
const BODY_TIME: Duration = Duration::from_secs(1);

const AGENT: &str = concat!("netctl/", env!("CARGO_PKG_VERSION"));

/// Why an endpoint could not be asked, or what was wrong with its answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error(transparent)]
    Sandbox(#[from] kernel::Error),
    #[error("cannot connect to {0}: {1}")]
    Connect(SocketAddr, io::Error),
    #[error("http://{0}{1} does not answer: {2}")]
    Answer(SocketAddr, String, String),
    #[error("http://{0}{1} answers {2}")]
    Status(SocketAddr, String, StatusCode),
}

/// Connects to a port of an endpoint.
pub(super) async fn tcp(
    network: NetworkId,
    source: Option<IpAddr>,
    target: SocketAddr,
) -> Result<TcpStream, ConnectError> {
    let fail = |error| ConnectError::Connect(target, error);
    let make = move || -> Result<io::Result<TcpSocket>, kernel::Error> {
        let sandbox = Netns::open_named(&sandbox_name(network))?;
        sandbox.enter(|| socket(target.is_ipv4(), source))
    };
    let made = tokio::task::spawn_blocking(make).await.map_err(|error| fail(error.into()))?;
    made?.map_err(fail)?.connect(target).await.map_err(fail)
}

/// A socket in the calling thread's namespace.
fn socket(ipv4: bool, source: Option<IpAddr>) -> io::Result<TcpSocket> {
    let socket = if ipv4 { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // The port is chosen when the target is known: connections that were closed a short while ago
    // keep theirs for the same target only.
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    if let Some(source) = source {
        socket.bind(SocketAddr::new(source, 0))?;
    }
    Ok(socket)
}

/// Asks an endpoint for a page; an answer of 200 to 399 is well.
pub(super) async fn http(
    network: NetworkId,
    source: Option<IpAddr>,
    target: SocketAddr,
    path: &str,
) -> Result<(), ConnectError> {
    let stream = tcp(network, source, target).await?;
    let fail =
        |error: &dyn std::fmt::Display| ConnectError::Answer(target, path.to_owned(), error.to_string());
    let mut builder = http1::Builder::new();
    builder.max_buf_size(MAX_HEAD);
    let handshake = builder.handshake::<_, Empty<Bytes>>(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| fail(&error))?;
    // Its errors reach the request, too.
    let connection = Ended(tokio::spawn(async { drop(connection.await) }).abort_handle());
    let request = Request::get(path)
        .header(header::HOST, target.to_string())
        .header(header::USER_AGENT, AGENT)
        .header(header::CONNECTION, "close")
        .body(Empty::new())
        .map_err(|error| fail(&error))?;
    let answer = sender.send_request(request).await.map_err(|error| fail(&error))?;
    let status = answer.status();
    if !status.is_success() && !status.is_redirection() {
        return Err(ConnectError::Status(target, path.to_owned(), status));
    }
    // The status has decided: the rest is read for the server's sake, and nobody waits for it.
    tokio::spawn(async move {
        let _ = tokio::time::timeout(BODY_TIME, Limited::new(answer, MAX_BODY).collect()).await;
        drop(connection);
    });
    Ok(())
}

/// A task that ends with this value.
struct Ended(AbortHandle);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.abort();
    }
}
