//! `netctl run`: a command in namespaces of its own, plugged into a network.
//!
//! Three processes. This one, in the host's namespaces, talks to the agent and to the terminal.
//! Its child ([`init`]) is process 1 of new network, mount, PID and UTS namespaces and waits until
//! the network is there. Its child in turn is the command. When this process dies, however that
//! happens, the kernel ends process 1, and with it everything in its namespaces.

mod container;
mod files;
mod init;
mod signals;
mod terminal;

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::time::timeout;

use super::failure::{Failure, complain};
use super::resolver::Resolver;
use super::{block_on, values};
use crate::api::client::{Client, ClientError};
use crate::api::{AttachRequest, Attached, EndpointView, ErrorCode};
use crate::model::{MacAddr, Name, NodeName};
use container::{Container, Ended, Stops};
use files::Setup;
use signals::{Received, Signals};
use terminal::Terminal;

/// How long the agent may take to detach when the command has ended.
const DETACH_TIMEOUT: Duration = Duration::from_secs(5);

const EXAMPLES: &str = "\
The command runs in new network, mount, PID and UTS namespaces. It sees the host's files, but has
/proc, /sys, /etc/hosts, /etc/hostname and /etc/resolv.conf of its own, and NETCTL_ENDPOINT,
NETCTL_NETWORK (names) and NETCTL_ADDRESS (with commas between several) in its environment. When it
ends, or when this process is killed, nothing remains.

Examples:
  netctl run --network web --name a -- bash
  netctl run --network web --ip 10.9.0.7 --env PORT=80 -- ./server
  netctl run --network web --wait 1m -- ping -c 3 10.9.0.7

Exit status: the command's; 128 and the signal's number if one ended it; 127 if it was not found, 126
if it could not be started; else as in netctl --help.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// The network's name or id
    #[arg(long)]
    network: String,
    /// The endpoint's name, unique in its network [default: its id]
    #[arg(long)]
    name: Option<Name>,
    /// Another name by which its network finds it; can be repeated
    #[arg(long = "alias", value_name = "NAME")]
    aliases: Vec<Name>,
    /// An address to take; one of each family at most [default: a free one]
    #[arg(long = "ip", value_name = "ADDRESS")]
    addresses: Vec<IpAddr>,
    /// The Ethernet address [default: a random one]
    #[arg(long)]
    mac: Option<MacAddr>,
    /// The host name inside [default: the endpoint's name]
    #[arg(long)]
    hostname: Option<NodeName>,
    /// A variable for the command's environment; can be repeated
    #[arg(short, long = "env", value_name = "KEY=VALUE", value_parser = values::pair)]
    environment: Vec<(String, String)>,
    /// The service that it belongs to: it gets one of the addresses that are kept for that
    #[arg(long)]
    service: Option<Name>,
    /// Its share of the service's connections, for the schedulers wrr, wlc, sh and mh [default: 1]
    #[arg(long, value_name = "N", requires = "service")]
    weight: Option<NonZeroU16>,
    /// Free text; can be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = values::pair)]
    labels: Vec<(String, String)>,
    #[command(flatten)]
    resolver: Resolver,
    /// How long to wait for the network to be there and ready on this node
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = values::wait)]
    wait: Duration,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs the command; gives its status.
pub(super) fn run(client: &Client, arguments: Arguments) -> Result<ExitCode, Failure> {
    signals::block()?;
    let terminal = Terminal::ours();
    // Before any runtime: the new process is a copy of this one and must have no other thread.
    let (container, stops) = Container::start(&arguments.command, terminal.is_some())?;
    if let Some(terminal) = &terminal {
        terminal.give_to(container.pid());
    }
    let status = block_on(async {
        let (signals, stops) = (Signals::new()?, Stops::new(stops)?);
        Supervisor { client, signals, terminal, container, stops }.run(arguments).await
    });
    status.map(ExitCode::from)
}

struct Supervisor<'a> {
    client: &'a Client,
    signals: Signals,
    terminal: Option<Terminal>,
    container: Container,
    stops: Stops,
}

impl Supervisor<'_> {
    async fn run(mut self, arguments: Arguments) -> Result<u8, Failure> {
        let setup = |view: &EndpointView| {
            Setup::new(view, arguments.hostname.as_ref(), &arguments.environment, &arguments.resolver)
        };
        let request = AttachRequest {
            network: arguments.network.clone(),
            name: arguments.name.clone(),
            aliases: arguments.aliases.clone(),
            netns: self.container.netns(),
            interface: None,
            addresses: arguments.addresses.clone(),
            mac: arguments.mac,
            service: arguments.service.clone(),
            weight: arguments.weight,
            labels: values::map(arguments.labels.clone()),
            wait_ms: Some(values::milliseconds(arguments.wait)),
        };
        let view = match self.attach(&request).await? {
            Ok(view) => view,
            Err(status) => return Ok(status),
        };
        let ended = match self.container.begin(&setup(&view)) {
            Ok(()) => self.supervise().await,
            Err(failure) => Err(failure),
        };
        // Also when supervising failed: the command must be gone before its interface is.
        self.container.kill();
        drop(self.terminal.take());
        detach(self.client, &view).await;
        ended
    }

    /// Attaches the namespace. A signal ends the attempt: `Ok(Err(status))`.
    async fn attach(&mut self, request: &AttachRequest) -> Result<Result<EndpointView, u8>, Failure> {
        let attach = self.client.attach(request);
        tokio::pin!(attach);
        loop {
            let received = tokio::select! {
                attached = &mut attach => return Ok(Ok(attached.map(Attached::into_view)?)),
                received = self.signals.next() => received?,
            };
            let status = match received {
                Received::Child => match self.container.status()? {
                    Some(status) => status,
                    None => continue,
                },
                Received::Forward { signal, .. } if signals::ends(signal) => 128 + signal as u8,
                Received::Forward { .. } | Received::Continue => continue,
            };
            self.container.kill();
            // The agent may have done it meanwhile; then it must be undone.
            if let Ok(Ok(attached)) = timeout(DETACH_TIMEOUT, attach).await {
                detach(self.client, &attached.into_view()).await;
            }
            return Ok(Err(status));
        }
    }

    /// Passes signals on and follows the command's stops until it ends; gives its status.
    async fn supervise(&mut self) -> Result<u8, Failure> {
        loop {
            let received = tokio::select! {
                stopped = self.stops.next() => {
                    stopped?;
                    if let Some(terminal) = &self.terminal {
                        terminal.stop_with_it()?;
                    }
                    continue;
                }
                received = self.signals.next() => received?,
            };
            match received {
                Received::Child => {
                    if let Some(status) = self.container.status()? {
                        return Ok(status);
                    }
                }
                // In a group shared with the command the terminal's signals have reached it.
                Received::Forward { from_terminal: true, .. } if self.terminal.is_none() => {}
                Received::Forward { signal, .. } => self.container.signal(signal),
                Received::Continue => {
                    if let Some(terminal) = &self.terminal {
                        terminal.resume(self.container.pid());
                    }
                }
            }
        }
    }
}

/// Detaches within a bounded time. That it did not work is told; the agent collects endpoints
/// whose namespace is gone.
async fn detach(client: &Client, view: &EndpointView) {
    let id = view.endpoint.id.to_string();
    let problem = match timeout(DETACH_TIMEOUT, client.detach(&id, None)).await {
        Ok(Ok(_)) => return,
        Ok(Err(ClientError::Api(error))) if error.code == ErrorCode::NotFound => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("the agent did not answer within {} s", DETACH_TIMEOUT.as_secs()),
    };
    complain(&format!("endpoint {} ({id}) is not detached yet: {problem}", view.endpoint.name));
}

/// The status of a shell for an end.
impl From<Ended> for u8 {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Exited(status) => status,
            Ended::Killed(signal) => 128 + signal,
        }
    }
}
