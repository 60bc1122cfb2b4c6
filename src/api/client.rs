//! The client of the agent's API, over its unix socket.

mod monitor;

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use ipnetwork::IpNetwork;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use super::{
    ApiError, AttachRequest, Attached, CheckView, Detached, DrainView, EndpointView, Expanded,
    NameQuery, NameView, NetworkView, NodeView, ReserveRequest, Scale, ServiceView, SettingsView,
    Target, VersionView,
};
use crate::model::{EndpointId, ExpandSpec, Name, NetworkSpec, ServiceSpec, ServiceUpdate};

pub use monitor::Sightings;

/// Where the agent's socket is unless the configuration says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/netctl/netctl.sock";
/// How long a call may take, beside the time that an attach is told to wait.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How long an attach waits when the request does not say: as the agent does.
const DEFAULT_WAIT: Duration = Duration::from_secs(10);
/// How long an idle connection is used again: well below the time after which the server ends it.
const MAX_IDLE: Duration = Duration::from_secs(10);
/// How many idle connections are kept.
const MAX_KEPT: usize = 8;

/// Why a call has no answer, or not a good one.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error(
        "cannot reach the agent on {}: {source}\n\
         Is netctld running? See: systemctl status netctld", socket.display()
    )]
    NotRunning {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The socket is not for us.
    #[error(
        "permission denied for the agent's socket {}\n\
         Run this as root, or as a member of the socket's group (netctld --socket-group)",
        socket.display()
    )]
    Denied {
        /// The socket.
        socket: PathBuf,
    },
    /// The connection failed on the way.
    #[error("the agent on {} did not answer: {reason}; see its log: journalctl -u netctld", socket.display())]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// What happened.
        reason: String,
    },
    /// The answer is none of this API.
    #[error("{} answered {status}, which is no answer of netctld: {reason}", socket.display())]
    Strange {
        /// The socket.
        socket: PathBuf,
        /// The HTTP status.
        status: u16,
        /// What does not fit.
        reason: String,
    },
    /// The agent refused or failed.
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// A connection that can carry one call at a time.
#[derive(Debug)]
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    /// The same socket, to ask the kernel whether its other end is still there.
    probe: OwnedFd,
    /// Since when it is idle.
    since: Instant,
}

impl Connection {
    /// Whether the agent still has its end open: hyper learns that only when its task runs, and
    /// an agent that was restarted meanwhile must not cost a call.
    fn is_alive(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let quiet = recv(self.probe.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN);
        quiet && self.since.elapsed() < MAX_IDLE && !self.sender.is_closed()
    }
}

/// A client of the agent on this machine.
///
/// Calls can be made at once, also through clones: they share a few kept connections, each used
/// by one call at a time.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    idle: Mutex<Vec<Connection>>,
}

impl Client {
    /// A client of the agent on this socket. Nothing is connected yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { shared: Arc::new(Shared { socket: socket.into(), idle: Mutex::default() }) }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.shared.socket
    }

    /// The agent's version and state.
    ///
    /// # Errors
    /// This and all calls: when the agent cannot be reached, refuses or fails.
    pub async fn version(&self) -> Result<VersionView, ClientError> {
        self.get("/v1/version").await
    }

    /// What clients need of the agent's configuration.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn settings(&self) -> Result<SettingsView, ClientError> {
        self.get("/v1/settings").await
    }

    /// Makes a network.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn create_network(&self, spec: &NetworkSpec) -> Result<NetworkView, ClientError> {
        let (status, body) = self.post("/v1/networks", spec, TIMEOUT).await?;
        self.decode(status, &body)
    }

    /// All networks, by name.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn networks(&self) -> Result<Vec<NetworkView>, ClientError> {
        self.get("/v1/networks").await
    }

    /// One network, by name or id.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn network(&self, reference: &str) -> Result<NetworkView, ClientError> {
        self.get(&format!("/v1/networks/{}", encoded(reference))).await
    }

    /// Removes a network that has no endpoints.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn remove_network(&self, reference: &str) -> Result<(), ClientError> {
        let path = format!("/v1/networks/{}", encoded(reference));
        self.call(Method::DELETE, &path, Bytes::new(), TIMEOUT).await.map(|_| ())
    }

    /// Removes a dead node, with its endpoints.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn remove_node(&self, name: &str) -> Result<(), ClientError> {
        let path = format!("/v1/nodes/{}", encoded(name));
        self.call(Method::DELETE, &path, Bytes::new(), TIMEOUT).await.map(|_| ())
    }

    /// Adds subnets to a network.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn expand_network(
        &self,
        reference: &str,
        spec: &ExpandSpec,
    ) -> Result<Expanded, ClientError> {
        let path = format!("/v1/networks/{}/subnets", encoded(reference));
        let (status, body) = self.post(&path, spec, TIMEOUT).await?;
        let view = self.decode(status, &body)?;
        let new = status == StatusCode::CREATED;
        Ok(if new { Expanded::Changed(view) } else { Expanded::Unchanged(view) })
    }

    /// Removes a subnet of which no address is taken.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn shrink_network(
        &self,
        reference: &str,
        subnet: IpNetwork,
    ) -> Result<NetworkView, ClientError> {
        let path = format!("/v1/networks/{}/subnets", encoded(reference));
        let path = with_query(&path, &[("subnet", Some(&subnet.to_string()))]);
        let (status, body) = self.call(Method::DELETE, &path, Bytes::new(), TIMEOUT).await?;
        self.decode(status, &body)
    }

    /// Plugs a namespace into a network.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn attach(&self, request: &AttachRequest) -> Result<Attached, ClientError> {
        let wait = request.wait_ms.map_or(DEFAULT_WAIT, Duration::from_millis);
        let (status, body) = self.post("/v1/endpoints", request, TIMEOUT.saturating_add(wait)).await?;
        let view = self.decode(status, &body)?;
        let new = status == StatusCode::CREATED;
        Ok(if new { Attached::Created(view) } else { Attached::Existing(view) })
    }

    /// All endpoints, or those of one network, or on one node.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn endpoints(
        &self,
        network: Option<&str>,
        node: Option<&str>,
    ) -> Result<Vec<EndpointView>, ClientError> {
        self.get(&with_query("/v1/endpoints", &[("network", network), ("node", node)])).await
    }

    /// One endpoint, by name or id; a name needs its network unless it is the only one.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn endpoint(
        &self,
        reference: &str,
        network: Option<&str>,
    ) -> Result<EndpointView, ClientError> {
        self.get(&endpoint_path(reference, network)).await
    }

    /// What a name is answered with, and why.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn look_up(&self, query: &NameQuery) -> Result<NameView, ClientError> {
        let text =
            |name: &'static str, value: &Option<Name>| (name, value.as_ref().map(Name::to_string));
        let all = [
            ("name", Some(query.name.clone())),
            ("type", query.kind.clone()),
            text("from", &query.from),
            text("network", &query.network),
        ];
        let all: Vec<_> = all.iter().map(|(name, value)| (*name, value.as_deref())).collect();
        self.get(&with_query("/v1/names", &all)).await
    }

    /// Unplugs an endpoint of this node.
    ///
    /// # Errors
    /// See [`Client::version`]; that there is none is [`super::ErrorCode::NotFound`].
    pub async fn detach(
        &self,
        reference: &str,
        network: Option<&str>,
    ) -> Result<EndpointId, ClientError> {
        let path = endpoint_path(reference, network);
        let (status, body) = self.call(Method::DELETE, &path, Bytes::new(), TIMEOUT).await?;
        self.decode::<Detached>(status, &body).map(|detached| detached.id)
    }

    /// Compares the store with itself, and with the kernel of every node, or of the asked one only
    /// (`local`); all networks, or one.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn check(&self, network: Option<&str>, local: bool) -> Result<CheckView, ClientError> {
        self.get(&check_path("/v1/ipam/check", network, local)).await
    }

    /// Repairs what it is safe to repair of what a check finds in the store, and checks again.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn repair(&self, network: Option<&str>, local: bool) -> Result<CheckView, ClientError> {
        let path = check_path("/v1/ipam/repair", network, local);
        let (status, body) = self.call(Method::POST, &path, Bytes::new(), TIMEOUT).await?;
        self.decode(status, &body)
    }

    /// All nodes, by name.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn nodes(&self) -> Result<Vec<NodeView>, ClientError> {
        self.get("/v1/nodes").await
    }

    /// One node.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn node(&self, name: &str) -> Result<NodeView, ClientError> {
        self.get(&format!("/v1/nodes/{}", encoded(name))).await
    }

    /// Makes a service.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn create_service(&self, spec: &ServiceSpec) -> Result<ServiceView, ClientError> {
        let (status, body) = self.post("/v1/services", spec, TIMEOUT).await?;
        self.decode(status, &body)
    }

    /// All services, by name.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn services(&self) -> Result<Vec<ServiceView>, ClientError> {
        self.get("/v1/services").await
    }

    /// One service.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn service(&self, name: &str) -> Result<ServiceView, ClientError> {
        self.get(&format!("/v1/services/{}", encoded(name))).await
    }

    /// Changes how many containers a service has.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn scale_service(&self, name: &str, replicas: u32) -> Result<ServiceView, ClientError> {
        let path = format!("/v1/services/{}/scale", encoded(name));
        let (status, body) = self.call_with(Method::PUT, &path, &Scale { replicas }, TIMEOUT).await?;
        self.decode(status, &body)
    }

    /// Changes a service; what is not given stays.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn update_service(
        &self,
        name: &str,
        update: &ServiceUpdate,
    ) -> Result<ServiceView, ClientError> {
        let path = format!("/v1/services/{}", encoded(name));
        let (status, body) = self.call_with(Method::PATCH, &path, update, TIMEOUT).await?;
        self.decode(status, &body)
    }

    /// Removes a service.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn remove_service(&self, name: &str) -> Result<(), ClientError> {
        let path = format!("/v1/services/{}", encoded(name));
        self.call(Method::DELETE, &path, Bytes::new(), TIMEOUT).await.map(|_| ())
    }

    /// Keeps addresses for a while.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn reserve(&self, request: &ReserveRequest) -> Result<(), ClientError> {
        self.post("/v1/reservations", request, TIMEOUT).await.map(|_| ())
    }

    /// Has endpoints get no new connections of their services.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn drain(&self, target: &Target) -> Result<DrainView, ClientError> {
        let path = target_path(target, "drain");
        let (status, body) = self.call(Method::POST, &path, Bytes::new(), TIMEOUT).await?;
        self.decode(status, &body)
    }

    /// How far a drain is.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn drain_state(&self, target: &Target) -> Result<DrainView, ClientError> {
        self.get(&target_path(target, "drain")).await
    }

    /// Has what is drained get connections again.
    ///
    /// # Errors
    /// See [`Client::version`].
    pub async fn activate(&self, target: &Target) -> Result<(), ClientError> {
        let path = target_path(target, "activate");
        self.call(Method::POST, &path, Bytes::new(), TIMEOUT).await.map(|_| ())
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let (status, body) = self.call(Method::GET, path, Bytes::new(), TIMEOUT).await?;
        self.decode(status, &body)
    }

    async fn post(
        &self,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        self.call_with(Method::POST, path, body, limit).await
    }

    async fn call_with(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(error))?;
        self.call(method, path, body.into(), limit).await
    }

    /// Makes a call; an answer that is an error becomes one.
    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let request = self.request(method, path, body)?;
        let answered = tokio::time::timeout(limit, self.send(request)).await;
        let (status, body) = answered.map_err(|_| self.late(limit))??;
        if status.is_success() {
            return Ok((status, body));
        }
        Err(self.refusal(status, &body))
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, ClientError> {
        Request::builder()
            .method(method)
            .uri(path)
            .header("host", "netctl")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| self.broken(error))
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), ClientError> {
        let mut connection = match self.kept() {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        let sent = connection.sender.send_request(request).await;
        let response = sent.map_err(|error| self.broken(error))?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|error| self.broken(error))?.to_bytes();
        if connection.sender.ready().await.is_ok() {
            connection.since = Instant::now();
            let mut idle = self.shared.idle.lock().unwrap_or_else(PoisonError::into_inner);
            if idle.len() < MAX_KEPT {
                idle.push(connection);
            }
        }
        Ok((status, body))
    }

    /// Takes a connection that was kept and can still be used.
    fn kept(&self) -> Option<Connection> {
        let mut idle = self.shared.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(Connection::is_alive);
        idle.pop()
    }

    async fn connect(&self) -> Result<Connection, ClientError> {
        let socket = || self.shared.socket.clone();
        let stream =
            UnixStream::connect(&self.shared.socket).await.map_err(|source| match source.kind() {
                ErrorKind::PermissionDenied => ClientError::Denied { socket: socket() },
                _ => ClientError::NotRunning { socket: socket(), source },
            })?;
        let probe = stream.as_fd().try_clone_to_owned().map_err(|error| self.broken(error))?;
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(|error| self.broken(error))?;
        // Its end is seen by the sender.
        tokio::spawn(async { drop(connection.await) });
        Ok(Connection { sender, probe, since: Instant::now() })
    }

    fn decode<T: DeserializeOwned>(&self, status: StatusCode, body: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(body).map_err(|error| self.strange(status, error))
    }

    fn refusal(&self, status: StatusCode, body: &[u8]) -> ClientError {
        /// An error of a newer agent, whose code we do not know.
        #[derive(Deserialize)]
        struct Unknown {
            message: String,
        }
        match serde_json::from_slice::<ApiError>(body) {
            Ok(error) => error.into(),
            Err(error) => match serde_json::from_slice::<Unknown>(body) {
                Ok(unknown) => ApiError::new(super::ErrorCode::Internal, unknown.message).into(),
                Err(_) => self.strange(status, error),
            },
        }
    }

    fn late(&self, limit: Duration) -> ClientError {
        self.broken(format!("no answer within {} s", limit.as_secs()))
    }

    fn broken(&self, reason: impl ToString) -> ClientError {
        ClientError::Broken { socket: self.shared.socket.clone(), reason: reason.to_string() }
    }

    fn strange(&self, status: StatusCode, reason: impl ToString) -> ClientError {
        let (socket, reason) = (self.shared.socket.clone(), reason.to_string());
        ClientError::Strange { socket, status: status.as_u16(), reason }
    }
}

fn endpoint_path(reference: &str, network: Option<&str>) -> String {
    with_query(&format!("/v1/endpoints/{}", encoded(reference)), &[("network", network)])
}

fn target_path(target: &Target, action: &str) -> String {
    match target {
        Target::Endpoint { reference, network } => {
            let path = format!("/v1/endpoints/{}/{action}", encoded(reference));
            with_query(&path, &[("network", network.as_deref())])
        }
        Target::Service(name) => format!("/v1/services/{}/{action}", encoded(name.as_str())),
        Target::Node(name) => format!("/v1/nodes/{}/{action}", encoded(name.as_str())),
    }
}

fn check_path(path: &str, network: Option<&str>, local: bool) -> String {
    with_query(path, &[("network", network), ("local", local.then_some("true"))])
}

fn with_query(path: &str, parameters: &[(&str, Option<&str>)]) -> String {
    let mut path = path.to_owned();
    let mut mark = '?';
    for (key, value) in parameters {
        if let Some(value) = value {
            path.push_str(&format!("{mark}{key}={}", encoded(value)));
            mark = '&';
        }
    }
    path
}

/// Percent-encodes everything but unreserved characters (RFC 3986, section 2.3). Dots too: `..`
/// must stay a name.
fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => encoded.push(byte.into()),
            other => encoded.push_str(&format!("%{other:02X}")),
        }
    }
    encoded
}
