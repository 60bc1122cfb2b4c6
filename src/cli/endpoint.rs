//! `netctl endpoint`: list, show, attach, drain, activate, wait for and detach endpoints.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::drain::{self, Wait};
use super::failure::{Exit, Failure, Tally};
use super::output::{self, Details, Format};
use super::resolver::Resolver;
use super::{Session, values, wait};
use crate::api::{AttachRequest, EndpointView, Target};
use crate::model::{Endpoint, EndpointState, IfName, MacAddr, Name};

const LS_EXAMPLES: &str = "\
Examples:
  netctl endpoint ls
  netctl endpoint ls --network web --node db1
  netctl endpoint ls -q --network web | xargs netctl endpoint detach";
const INSPECT_EXAMPLES: &str = "\
Examples:
  netctl endpoint inspect 5f2c9a017be4
  netctl endpoint inspect a --network web -o json";
const ATTACH_EXAMPLES: &str = "\
The same request again changes nothing and prints the same id.

Examples:
  ip netns add box
  netctl endpoint attach --network web --netns /run/netns/box --name box
  netctl endpoint attach --network web --netns /proc/4711/ns/net --ip 10.9.0.7 --interface eth1
  netctl endpoint attach --network web --netns /run/netns/box --name box --resolv-conf /etc/netns/box/resolv.conf";
const DRAIN_EXAMPLES: &str = "\
Examples:
  netctl endpoint drain box
  netctl endpoint drain box --network web --wait && netctl endpoint detach box --network web

Any node's endpoints can be drained from here. One that is detached is drained; one that is drained
stays so until it is detached or activated. Exit status 6: with --wait, when something is left at the
end of the time.";
const ACTIVATE_EXAMPLES: &str = "\
Examples:
  netctl endpoint activate box
  netctl endpoint activate box --network web && netctl endpoint wait box --network web

One whose service has a health check gets connections when it is ready; on a node that is drained it
gets none before that is activated too.";
const DETACH_EXAMPLES: &str = "\
Examples:
  netctl endpoint detach box
  netctl endpoint detach box --network web";

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub(super) enum Command {
    /// List endpoints of the cluster
    #[command(alias = "list", after_help = LS_EXAMPLES)]
    Ls {
        /// Only those of this network (name or id)
        #[arg(long)]
        network: Option<String>,
        /// Only those on this node
        #[arg(long)]
        node: Option<String>,
        /// Print ids only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Show endpoints in full
    #[command(after_help = INSPECT_EXAMPLES)]
    Inspect(Reference),
    /// Plug a network namespace of this node into a network; prints the endpoint's id
    #[command(after_help = ATTACH_EXAMPLES)]
    Attach(Box<Attach>),
    /// Have endpoints get no new connections of their services; open ones go on
    #[command(after_help = DRAIN_EXAMPLES)]
    Drain {
        #[command(flatten)]
        reference: Reference,
        #[command(flatten)]
        wait: Wait,
    },
    /// Have drained endpoints get new connections again
    #[command(after_help = ACTIVATE_EXAMPLES)]
    Activate(Reference),
    /// Wait until endpoints are ready, or gone
    #[command(after_help = wait::EXAMPLES)]
    Wait(wait::Wait),
    /// Unplug endpoints of this node
    #[command(after_help = DETACH_EXAMPLES)]
    Detach(Reference),
}

#[derive(Debug, Args)]
pub(super) struct Reference {
    /// Ids or names
    #[arg(required = true, value_name = "ENDPOINT")]
    endpoints: Vec<String>,
    /// The network (name or id) in which the names are meant
    #[arg(long)]
    network: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct Attach {
    /// The network's name or id
    #[arg(long)]
    network: String,
    /// The path of the network namespace
    #[arg(long, value_name = "PATH", value_parser = values::netns)]
    netns: PathBuf,
    /// The endpoint's name, unique in its network [default: its id]
    #[arg(long)]
    name: Option<Name>,
    /// Another name by which its network finds it; can be repeated
    #[arg(long = "alias", value_name = "NAME")]
    aliases: Vec<Name>,
    /// The interface's name in the namespace [default: the first free of eth0, eth1, …]
    #[arg(long, value_name = "NAME")]
    interface: Option<IfName>,
    /// An address to take; one of each family at most [default: a free one]
    #[arg(long = "ip", value_name = "ADDRESS")]
    addresses: Vec<IpAddr>,
    /// The Ethernet address [default: a random one]
    #[arg(long)]
    mac: Option<MacAddr>,
    /// The service that it belongs to: it gets one of the addresses that are kept for that
    #[arg(long)]
    service: Option<Name>,
    /// Its share of the service's connections, for the schedulers wrr, wlc, sh and mh [default: 1]
    #[arg(long, value_name = "N", requires = "service")]
    weight: Option<NonZeroU16>,
    /// Free text; can be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = values::pair)]
    labels: Vec<(String, String)>,
    /// Write a resolv.conf(5) for the container to this file
    #[arg(long, value_name = "FILE")]
    resolv_conf: Option<PathBuf>,
    #[command(flatten)]
    resolver: Resolver,
    /// How long to wait for the network to be there and ready on this node
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = values::wait)]
    wait: Duration,
}

/// Does `netctl endpoint …`.
pub(super) async fn run(session: &Session, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Ls { network, node, quiet } => {
            ls(session, network.as_deref(), node.as_deref(), quiet).await
        }
        Command::Inspect(reference) => inspect(session, &reference).await,
        Command::Attach(attach) => self::attach(session, *attach).await,
        Command::Drain { reference, wait } => {
            drain::drain(session, targets(session, reference).await, &wait).await
        }
        Command::Activate(reference) => {
            drain::activate(session, targets(session, reference).await).await
        }
        Command::Wait(wait) => wait::wait(session, &wait).await,
        Command::Detach(reference) => detach(session, &reference).await,
    }
}

async fn ls(
    session: &Session,
    network: Option<&str>,
    node: Option<&str>,
    quiet: bool,
) -> Result<ExitCode, Failure> {
    let views = session.client.endpoints(network, node).await?;
    if quiet {
        for view in &views {
            output::print_line(&view.endpoint.id.to_string())?;
        }
    } else if session.format == Format::Json {
        output::print_json(&views)?;
    } else {
        let row = |view: EndpointView| {
            let state = match &view.out {
                Some(out) if view.endpoint.state == EndpointState::Ready => format!("out ({out})"),
                _ => view.endpoint.state.to_string(),
            };
            let endpoint = view.endpoint;
            vec![
                endpoint.id.to_string(),
                endpoint.name.to_string(),
                view.network_name.to_string(),
                endpoint.node.to_string(),
                output::joined(&endpoint.addresses),
                endpoint.attachment.interface.to_string(),
                output::or_dash(endpoint.service.as_ref().map_or("", Name::as_str)),
                state,
            ]
        };
        let header =
            ["ENDPOINT ID", "NAME", "NETWORK", "NODE", "ADDRESSES", "INTERFACE", "SERVICE", "STATE"];
        output::print_table(&header, views.into_iter().map(row))?;
    }
    Ok(Exit::Done.into())
}

async fn inspect(session: &Session, reference: &Reference) -> Result<ExitCode, Failure> {
    let (mut tally, mut views) = (Tally::new(), Vec::new());
    for endpoint in &reference.endpoints {
        let found = session.client.endpoint(endpoint, reference.network.as_deref()).await;
        views.extend(tally.take(found));
    }
    output::print_all(session.format, &views, details)?;
    Ok(tally.exit())
}

fn details(view: &EndpointView) -> Details {
    let endpoint = &view.endpoint;
    let with_prefix = |(address, length): (&IpAddr, &u8)| format!("{address}/{length}");
    let addresses = endpoint.addresses.iter().zip(&view.prefix_lengths).map(with_prefix);
    Details::default()
        .with("ID", endpoint.id)
        .with("Name", &endpoint.name)
        .with_all("Aliases", &endpoint.aliases)
        .with("Network", format!("{} ({})", view.network_name, endpoint.network))
        .with("Node", &endpoint.node)
        .with_all("Addresses", addresses)
        .with_all("Gateways", &view.gateways)
        .with_all("Resolver", &view.resolver.servers)
        .with("MAC", endpoint.mac)
        .with("MTU", view.mtu)
        .with("Interface", &endpoint.attachment.interface)
        .with("Namespace", namespace(endpoint))
        .with("Inode", endpoint.attachment.inode)
        .with("Boot", &endpoint.attachment.boot)
        .with("Service", endpoint.service.as_ref().map_or("none", Name::as_str))
        .with("Weight", endpoint.weight)
        .with("State", state(view))
        .with_all("Labels", output::labels(&endpoint.labels))
}

fn namespace(endpoint: &Endpoint) -> String {
    match endpoint.host {
        true => "the host's own".to_owned(),
        false => endpoint.attachment.netns.display().to_string(),
    }
}

/// Whether it takes connections, and why not.
fn state(view: &EndpointView) -> String {
    let state = output::state(view.endpoint.state, &view.endpoint.reason);
    match &view.out {
        Some(out) if *out != state => format!("{state}, out ({out})"),
        _ => state,
    }
}

async fn attach(session: &Session, attach: Attach) -> Result<ExitCode, Failure> {
    let request = AttachRequest {
        network: attach.network,
        name: attach.name,
        aliases: attach.aliases,
        netns: attach.netns,
        interface: attach.interface,
        addresses: attach.addresses,
        mac: attach.mac,
        service: attach.service,
        weight: attach.weight,
        labels: values::map(attach.labels),
        wait_ms: Some(values::milliseconds(attach.wait)),
    };
    let view = session.client.attach(&request).await?.into_view();
    if let Some(path) = attach.resolv_conf {
        let written = std::fs::write(&path, attach.resolver.file(&view.resolver));
        written.map_err(|error| {
            Failure::failed(format!(
                "endpoint {} is attached, but {} cannot be written: {error}",
                view.endpoint.id,
                path.display()
            ))
        })?;
    }
    match session.format {
        Format::Json => output::print_json(&view)?,
        Format::Table => output::print_line(&view.endpoint.id.to_string())?,
    }
    Ok(Exit::Done.into())
}

/// What is to be drained or activated, by ids: a name may be another's before a drain is at its end.
async fn targets(session: &Session, reference: Reference) -> Vec<(String, Result<Target, Failure>)> {
    let mut targets = Vec::new();
    for name in reference.endpoints {
        let found = session.client.endpoint(&name, reference.network.as_deref()).await;
        let target = found.map(|view| Target::Endpoint {
            reference: view.endpoint.id.to_string(),
            network: Some(view.endpoint.network.to_string()),
        });
        targets.push((name, target.map_err(Failure::from)));
    }
    targets
}

async fn detach(session: &Session, reference: &Reference) -> Result<ExitCode, Failure> {
    let mut tally = Tally::new();
    for endpoint in &reference.endpoints {
        let detached = session.client.detach(endpoint, reference.network.as_deref()).await;
        if let Some(id) = tally.take(detached) {
            output::print_line(&id.to_string())?;
        }
    }
    Ok(tally.exit())
}
