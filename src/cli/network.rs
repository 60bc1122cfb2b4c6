//! `netctl network`: make, list, show, expand, shrink and remove networks.

use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand};
use ipnetwork::IpNetwork;

use super::failure::{Exit, Failure, Tally, complain};
use super::output::{self, Details, Format};
use super::{Session, values};
use crate::api::{self, Expanded, Level, NetworkView, NodeUsage, Share, SubnetUsage, Usage};
use crate::config::duration::Shown;
use crate::model::{ExpandSpec, Name, NetworkSpec, Subnet, Vni};
use crate::plan::sizing::{self, Expectation};

const CREATE_EXAMPLES: &str = "\
Examples:
  netctl network create web
  netctl network create web --subnet 10.9.0.0/24 --gateway 10.9.0.254 --ip-range 10.9.0.128/25
  netctl network create shop --subnet 10.7.0.0/16 --subnet fd00:7::/64 --label team=shop
  netctl network create shop --subnet 10.9.0.0/24 --host-access
  netctl network create db --internal --reserve 10.8.0.10 --subnet 10.8.0.0/24
  netctl network create web --expect-endpoints 2000 --expect-services 150 --nodes 40
  id=$(netctl network create web)";
const LS_EXAMPLES: &str = "\
A network is marked ! where its use has reached the agent's address_warning, or grows so steadily that
it is full within a day; !! from address_alarm on, or within an hour.

Examples:
  netctl network ls
  netctl network ls --filter name=shop
  netctl network ls -q | xargs netctl network inspect
  netctl network ls -o json";
const INSPECT_EXAMPLES: &str = "\
Examples:
  netctl network inspect web
  netctl network inspect web shop -o json";
const EXPAND_EXAMPLES: &str = "\
Examples:
  netctl network expand web --subnet 10.10.0.0/24
  netctl network expand web --subnet 10.10.0.0/24 --gateway 10.10.0.254 --ip-range 10.10.0.128/25
  netctl network expand shop --subnet 10.11.0.0/16 --subnet fd00:11::/64 --reserve 10.11.0.10";
const SHRINK_EXAMPLES: &str = "\
Examples:
  netctl network shrink web --subnet 10.10.0.0/24";
const RM_EXAMPLES: &str = "\
Examples:
  netctl network rm web
  netctl network rm web shop db";

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub(super) enum Command {
    /// Make a network; prints its id
    #[command(after_help = CREATE_EXAMPLES)]
    Create(Box<Create>),
    /// List the networks
    #[command(alias = "list", after_help = LS_EXAMPLES)]
    Ls {
        /// Print ids only
        #[arg(short, long)]
        quiet: bool,
        /// Only networks whose name has this text in it; can be repeated
        #[arg(short, long, value_name = "name=TEXT", value_parser = name_filter)]
        filter: Vec<String>,
    },
    /// Show networks in full
    #[command(after_help = INSPECT_EXAMPLES)]
    Inspect {
        /// Names or ids
        #[arg(required = true, value_name = "NETWORK")]
        networks: Vec<String>,
    },
    /// Add subnets to a network; what is attached stays as it is
    #[command(after_help = EXPAND_EXAMPLES)]
    Expand {
        /// Name or id
        network: String,
        #[command(flatten)]
        subnets: Subnets,
    },
    /// Remove a subnet of which no address is taken
    #[command(after_help = SHRINK_EXAMPLES)]
    Shrink {
        /// Name or id
        network: String,
        /// The subnet
        #[arg(long, value_name = "CIDR", value_parser = values::cidr)]
        subnet: IpNetwork,
    },
    /// Remove networks that have no endpoints
    #[command(alias = "remove", after_help = RM_EXAMPLES)]
    Rm {
        /// Names or ids
        #[arg(required = true, value_name = "NETWORK")]
        networks: Vec<String>,
    },
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("expected").args(["expect_endpoints", "expect_services"]).multiple(true))]
pub(super) struct Create {
    /// The name, unique in the cluster: a-z, 0-9, '-' and '_', at most 63
    name: Name,
    /// A subnet; can be repeated for both families [default: the next free one of the pool]
    #[arg(long = "subnet", value_name = "CIDR", value_parser = values::cidr)]
    subnets: Vec<IpNetwork>,
    /// A subnet's gateway; one for each subnet [default: its first address]
    #[arg(long = "gateway", value_name = "ADDRESS")]
    gateways: Vec<IpAddr>,
    /// The part of a subnet from which addresses are given; one for each subnet
    #[arg(long = "ip-range", value_name = "CIDR", value_parser = values::cidr)]
    ranges: Vec<IpNetwork>,
    /// An address that no endpoint gets; can be repeated
    #[arg(long, visible_alias = "aux-address", value_name = "[NAME=]ADDRESS")]
    #[arg(value_parser = values::reserved)]
    reserve: Vec<IpAddr>,
    /// How many containers it will have at most: without --subnet, the pool gives an IPv4 subnet
    /// that is large enough, with headroom; with some, it is told when they are too small together
    #[arg(long, value_name = "N")]
    expect_endpoints: Option<u64>,
    /// How many services with an address of their own it will have
    #[arg(long, value_name = "N")]
    expect_services: Option<u64>,
    /// How many nodes the cluster will have: when one fails, its containers start elsewhere while
    /// its addresses are still taken [default: those that it has]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    #[arg(requires = "expected")]
    nodes: Option<u64>,
    /// Take an IPv6 subnet from the pool too
    #[arg(long)]
    ipv6: bool,
    /// The VXLAN network identifier [default: the lowest free one]
    #[arg(long, value_parser = values::vni)]
    vni: Option<Vni>,
    /// The MTU of the containers' interfaces [default: what the underlay leaves]
    #[arg(long)]
    mtu: Option<u32>,
    /// No way out of the overlay
    #[arg(long)]
    internal: bool,
    /// Let the machines themselves reach it: each takes an address of it. Its subnets must not overlap
    /// another such network's, nor what this machine has routes to
    #[arg(long)]
    host_access: bool,
    /// Free text; can be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = values::pair)]
    labels: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub(super) struct Subnets {
    /// A subnet of a family that the network has; can be repeated
    #[arg(long = "subnet", value_name = "CIDR", value_parser = values::cidr, required = true)]
    subnets: Vec<IpNetwork>,
    /// A subnet's gateway; one for each subnet [default: its first address]
    #[arg(long = "gateway", value_name = "ADDRESS")]
    gateways: Vec<IpAddr>,
    /// The part of a subnet from which addresses are given; one for each subnet
    #[arg(long = "ip-range", value_name = "CIDR", value_parser = values::cidr)]
    ranges: Vec<IpNetwork>,
    /// An address that no endpoint gets; can be repeated
    #[arg(long, visible_alias = "aux-address", value_name = "[NAME=]ADDRESS")]
    #[arg(value_parser = values::reserved)]
    reserve: Vec<IpAddr>,
}

fn name_filter(text: &str) -> Result<String, String> {
    let text = text.strip_prefix("name=");
    text.map(str::to_owned).ok_or_else(|| "networks can be filtered by name=TEXT only".to_owned())
}

/// Does `netctl network …`.
pub(super) async fn run(session: &Session, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Create(create) => self::create(session, *create).await,
        Command::Ls { quiet, filter } => ls(session, quiet, &filter).await,
        Command::Inspect { networks } => inspect(session, &networks).await,
        Command::Expand { network, subnets } => expand(session, &network, subnets).await,
        Command::Shrink { network, subnet } => shrink(session, &network, subnet).await,
        Command::Rm { networks } => rm(session, &networks).await,
    }
}

async fn create(session: &Session, create: Create) -> Result<ExitCode, Failure> {
    let expected = expectation(session, &create).await?;
    let mut spec = NetworkSpec {
        name: create.name,
        subnets: create.subnets,
        gateways: create.gateways,
        ranges: create.ranges,
        reserved: create.reserve.into_iter().collect(),
        prefix: None,
        ipv6: create.ipv6,
        vni: create.vni,
        mtu: create.mtu,
        internal: create.internal,
        host_access: create.host_access,
        labels: values::map(create.labels),
    };
    if let Some(expected) = expected {
        spec.prefix = expected_prefix(&spec, &expected)?;
    }
    let view = session.client.create_network(&spec).await?;
    print_changed(session, &view)
}

/// What is expected on a network, where that is said.
async fn expectation(session: &Session, create: &Create) -> Result<Option<Expectation>, Failure> {
    let (endpoints, services) = match (create.expect_endpoints, create.expect_services) {
        (None, None) => return Ok(None),
        (endpoints, services) => (endpoints.unwrap_or(0), services.unwrap_or(0)),
    };
    let nodes = match create.nodes {
        Some(nodes) => nodes,
        None => session.client.nodes().await?.len() as u64,
    };
    // Each node takes an address for its host.
    let endpoints = if create.host_access { endpoints + nodes } else { endpoints };
    Ok(Some(Expectation { endpoints, services, nodes }))
}

/// The prefix length for what is expected; with subnets that were given, none, and a warning where
/// they are too small together.
fn expected_prefix(spec: &NetworkSpec, expected: &Expectation) -> Result<Option<u8>, Failure> {
    let usage = |error: String| Failure::new(Exit::Usage, error);
    if spec.subnets.is_empty() {
        let sizing = sizing::choose(expected).map_err(|error| usage(error.to_string()))?;
        complain(&format!("{}: a /{} subnet is chosen", sizing.reason, sizing.prefix));
        return Ok(Some(sizing.prefix));
    }
    let subnets = spec.subnets().map_err(|error| usage(error.to_string()))?;
    if let Some(reason) = sizing::too_small(&subnets, expected) {
        complain(&format!("warning: smaller than what is expected: {reason}"));
    }
    Ok(None)
}

async fn ls(session: &Session, quiet: bool, filter: &[String]) -> Result<ExitCode, Failure> {
    let mut views = session.client.networks().await?;
    views.retain(|view| {
        filter.is_empty() || filter.iter().any(|text| view.network.name.as_str().contains(text))
    });
    if quiet {
        for view in &views {
            output::print_line(&view.network.id.to_string())?;
        }
    } else if session.format == Format::Json {
        output::print_json(&views)?;
    } else {
        let row = |view: NetworkView| {
            let network = view.network;
            let subnets = output::joined(network.subnets.iter().map(Subnet::cidr));
            let internal = if network.internal { "yes" } else { "no" };
            vec![
                network.id.to_string(),
                network.name.to_string(),
                subnets,
                network.vni.to_string(),
                view.effective_mtu.to_string(),
                internal.to_owned(),
                view.endpoints.to_string(),
                fullest(view.ipv4, view.ipv6),
            ]
        };
        let header = ["NETWORK ID", "NAME", "SUBNETS", "VNI", "MTU", "INTERNAL", "ENDPOINTS", "USE"];
        output::print_table(&header, views.into_iter().map(row))?;
    }
    Ok(Exit::Done.into())
}

async fn inspect(session: &Session, networks: &[String]) -> Result<ExitCode, Failure> {
    let (mut tally, mut views) = (Tally::new(), Vec::new());
    for reference in networks {
        views.extend(tally.take(session.client.network(reference).await));
    }
    output::print_all(session.format, &views, details)?;
    Ok(tally.exit())
}

fn details(view: &NetworkView) -> Details {
    let network = &view.network;
    let mtu = match network.mtu {
        Some(_) => format!("{} (asked for)", view.effective_mtu),
        None => view.effective_mtu.to_string(),
    };
    let leaving = network.leaving.iter().map(|leaving| subnet(leaving) + ", is being removed");
    let mut details = Details::default()
        .with("ID", network.id)
        .with("Name", &network.name)
        .with_all("Subnets", network.subnets.iter().map(subnet).chain(leaving))
        .with("VNI", network.vni)
        .with("MTU", mtu)
        .with("Internal", if network.internal { "yes" } else { "no" })
        .with("Hosts", hosts(view))
        .with("Uplink", network.uplink)
        .with("Endpoints", view.endpoints)
        .with_all("Addresses", [("IPv4", view.ipv4), ("IPv6", view.ipv6)].into_iter().filter_map(used))
        .with_all("By subnet", view.subnet_usage.iter().map(used_of_subnet))
        .with_all("By node", view.node_usage.iter().map(used_by_node))
        .with_all("Labels", output::labels(&network.labels))
        .with("Revision", view.revision);
    if network.removing {
        details = details.with("State", "is being removed");
    }
    details
}

/// Whether hosts reach it, and why this node's does not.
fn hosts(view: &NetworkView) -> String {
    match (&view.host_obstacle, view.network.host_access) {
        (_, false) => "do not reach it".to_owned(),
        (None, true) => "reach it".to_owned(),
        (Some(reason), true) => format!("reach it, but not this node's: {reason}"),
    }
}

/// How many per cent of the addresses are not free.
fn percent(usage: Usage) -> u128 {
    api::percent(usage.usable.saturating_sub(usage.free).into(), usage.usable.into())
}

/// The use of the family that has less left, with a mark when that is little for the agent, or ends
/// soon, and then when that is.
fn fullest(ipv4: Option<Usage>, ipv6: Option<Usage>) -> String {
    let families = [ipv4, ipv6].into_iter().flatten();
    let marked = families.clone().filter(|usage| usage.level > Level::Fine);
    let mark = match marked.clone().map(|usage| usage.level).max() {
        Some(Level::Alarm) => " !!",
        Some(Level::Warning) => " !",
        Some(Level::Fine) | None => "",
    };
    let end = match marked.filter_map(|usage| usage.full_in).min() {
        None | Some(0) => String::new(),
        Some(seconds) => format!(" full in {}", Shown(Duration::from_secs(seconds))),
    };
    let highest = families.map(percent).max();
    highest.map_or("?".to_owned(), |percent| format!("{percent}%{mark}{end}"))
}

fn used((family, usage): (&str, Option<Usage>)) -> Option<String> {
    let usage = usage?;
    let level = match usage.level {
        Level::Alarm => ", alarm",
        Level::Warning => ", warning",
        Level::Fine => "",
    };
    let full_in = match usage.full_in {
        Some(0) => ", full".to_owned(),
        Some(seconds) => format!(", full in {} at this rate", Shown(Duration::from_secs(seconds))),
        None => String::new(),
    };
    Some(format!(
        "{family}: {} usable, {} endpoints, {} services, {} resting, {} reserved, {} free ({}% used{level}{full_in})",
        usage.usable,
        usage.endpoints,
        usage.services,
        usage.resting,
        usage.reserved,
        usage.free,
        percent(usage)
    ))
}

fn used_of_subnet(usage: &SubnetUsage) -> String {
    let SubnetUsage { cidr, usable, endpoints, services, resting, free, excluded } = usage;
    format!(
        "{cidr}: {usable} usable, {endpoints} endpoints, {services} services, {resting} resting, {free} free, {excluded} excluded"
    )
}

fn used_by_node(usage: &NodeUsage) -> String {
    let families = [("IPv4", usage.ipv4), ("IPv6", usage.ipv6)].into_iter();
    let shares = families.filter_map(|(family, share)| {
        let Share { blocks, endpoints, free } = share?;
        Some(format!("{family} {endpoints} endpoints, {blocks} blocks with {free} free"))
    });
    format!("{}: {}", usage.node, shares.collect::<Vec<_>>().join("; "))
}

fn subnet(subnet: &Subnet) -> String {
    let mut text = format!("{}, gateway {}", subnet.cidr(), subnet.gateway());
    if let Some(range) = subnet.range() {
        text.push_str(&format!(", range {range}"));
    }
    if !subnet.reserved().is_empty() {
        text.push_str(&format!(", reserved {}", output::joined(subnet.reserved())));
    }
    text
}

async fn expand(session: &Session, network: &str, subnets: Subnets) -> Result<ExitCode, Failure> {
    let asked = output::joined(&subnets.subnets);
    let spec = ExpandSpec {
        subnets: subnets.subnets,
        gateways: subnets.gateways,
        ranges: subnets.ranges,
        reserved: subnets.reserve.into_iter().collect(),
    };
    let view = match session.client.expand_network(network, &spec).await? {
        Expanded::Changed(view) => view,
        Expanded::Unchanged(view) => {
            complain(&format!("network {network} has {asked} already: nothing was changed"));
            view
        }
    };
    print_changed(session, &view)
}

async fn shrink(session: &Session, network: &str, subnet: IpNetwork) -> Result<ExitCode, Failure> {
    let view = session.client.shrink_network(network, subnet).await?;
    print_changed(session, &view)
}

/// Prints the id of a network that was made or changed, or all of it.
fn print_changed(session: &Session, view: &NetworkView) -> Result<ExitCode, Failure> {
    match session.format {
        Format::Json => output::print_json(view)?,
        Format::Table => output::print_line(&view.network.id.to_string())?,
    }
    Ok(Exit::Done.into())
}

async fn rm(session: &Session, networks: &[String]) -> Result<ExitCode, Failure> {
    let mut tally = Tally::new();
    for reference in networks {
        if tally.take(session.client.remove_network(reference).await).is_some() {
            output::print_line(reference)?;
        }
    }
    Ok(tally.exit())
}
