//! The HTTP server: connections, their limits and their end.
//!
//! It owns the socket and every connection on it. What the requests mean is in `routes`, how they
//! are read in `extract`.

mod bind;
mod drain;
mod extract;
mod metrics;
mod monitor;
mod names;
mod routes;
mod services;

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

pub use bind::{BindError, bind, check_free};
pub use extract::MAX_BODY;
pub use routes::document;

use super::Service;

/// Connections that are served at once; more wait in the socket's queue.
const MAX_CONNECTIONS: usize = 256;
/// How long the head of a request may take to arrive, and a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long running requests may go on after the shutdown began.
const GRACE: Duration = Duration::from_secs(5);
/// The pause after a failed accept (no file descriptor left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// The largest head of a request.
const MAX_HEAD: usize = 64 * 1024;

/// Serves the API on a socket until `shutdown` ends, then lets running requests finish for at most
/// five seconds.
pub async fn serve(
    listener: UnixListener,
    service: Arc<dyn Service>,
    shutdown: impl Future<Output = ()> + Send,
) {
    let router = routes::router(service);
    let handle = |stream, stopping| connection(stream, router.clone(), stopping);
    accept_all(listener, MAX_CONNECTIONS, handle, shutdown).await;
}

/// Serves nothing but the metrics, on a TCP port, until `shutdown` ends. A connection has one request
/// of at most eight KiB, and ends after ten seconds.
pub async fn serve_metrics(
    listener: TcpListener,
    service: Arc<dyn Service>,
    shutdown: impl Future<Output = ()> + Send,
) {
    let router = metrics::router(service);
    let handle = |stream, stopping| metrics::connection(stream, router.clone(), stopping);
    accept_all(listener, metrics::MAX_CONNECTIONS, handle, shutdown).await;
}

/// What connections come from.
trait Listener: Send {
    type Stream;

    fn next(&self) -> impl Future<Output = std::io::Result<Self::Stream>> + Send;
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> std::io::Result<UnixStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> std::io::Result<TcpStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

/// Handles connections, as many at once as there are places, until `shutdown` ends.
async fn accept_all<L: Listener, H: Future<Output = ()> + Send + 'static>(
    listener: L,
    places: usize,
    handle: impl Fn(L::Stream, watch::Receiver<()>) -> H,
    shutdown: impl Future<Output = ()> + Send,
) {
    let permits = Arc::new(Semaphore::new(places));
    let (stop, stopping) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept(&listener, &permits) => accepted,
        };
        match accepted {
            Ok((stream, permit)) => {
                let connection = handle(stream, stopping.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection to the API");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop((listener, stop));
    let finished = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, finished).await.is_err() {
        warn!(connections = connections.len(), "requests were cut off at shutdown");
    }
}

/// Takes a place first and a connection then, so that a full house leaves clients in the queue.
async fn accept<L: Listener>(
    listener: &L,
    permits: &Arc<Semaphore>,
) -> std::io::Result<(L::Stream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = permits.clone().acquire_owned().await.map_err(std::io::Error::other)?;
    Ok((listener.next().await?, permit))
}

/// Serves one connection until it ends or the server stops (`stopping` loses its sender).
async fn connection(stream: UnixStream, router: axum::Router, mut stopping: watch::Receiver<()>) {
    let peer = stream.peer_cred().ok();
    let (uid, pid) = (peer.map(|peer| peer.uid()), peer.and_then(|peer| peer.pid()));
    let router = router.layer(axum::middleware::from_fn(
        move |request: axum::extract::Request, next: axum::middleware::Next| async move {
            let (method, path) = (request.method().clone(), request.uri().path().to_owned());
            let start = Instant::now();
            let response = next.run(request).await;
            let (status, elapsed) = (response.status().as_u16(), start.elapsed());
            debug!(%method, path, status, ?elapsed, uid, pid, "request");
            response
        },
    ));
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(MAX_HEAD);
    let service = TowerToHyperService::new(router);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let result = tokio::select! {
        result = connection.as_mut() => result,
        _ = stopping.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        debug!(%error, uid, pid, "connection failed");
    }
}
