//! A web server for the tests: `web PORT NAME` answers every request with its name and the client's
//! address. On SIGTERM it takes no more connections, answers those that it has, and ends.

use std::net::{Ipv6Addr, SocketAddr};

use anyhow::Context as _;
use axum::Router;
use axum::extract::ConnectInfo;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let port = arguments.next().context("usage: web PORT NAME")?.parse::<u16>()?;
    let name = arguments.next().context("usage: web PORT NAME")?;
    let mut terminate = signal(SignalKind::terminate())?;
    let answer = move |ConnectInfo(client): ConnectInfo<SocketAddr>| async move {
        format!("{name} {}\n", client.ip().to_canonical())
    };
    let service = Router::new().fallback(answer).into_make_service_with_connect_info::<SocketAddr>();
    // An IPv6 socket takes both families.
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await?;
    let stopped = async move {
        terminate.recv().await;
    };
    axum::serve(listener, service).with_graceful_shutdown(stopped).await?;
    Ok(())
}
