//! `netctl plan`: whether Compose files fit into the networks' addresses, before they are deployed.

mod files;
mod table;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::Session;
use super::failure::{Exit, Failure};
use super::output::{self, Format};
use super::values;
use crate::api::client::ClientError;
use crate::api::{ErrorCode, NetworkView, ReserveRequest, SettingsView, Usage};
use crate::model::Name;
use crate::plan::compose::{self, Mode, Stack};
use crate::plan::demand::{Demand, demands};
use crate::plan::verdict::{
    self, Family, NetworkVerdict, PoolSubnet, Pools, State, Stock, Stocks, Verdict,
};

const EXAMPLES: &str = "\
Examples:
  netctl plan stack.yml
  netctl plan shop/compose.yml mail/compose.yml --nodes 12
  netctl plan stack.yml --env-file production.env --project shop
  netctl plan compose.yml --tool compose --profile debug
  netctl plan stack.yml --reserve shop --ttl 10m
  docker compose config | netctl plan - -o json | jq .networks
  netctl plan stack.yml --project shop && docker stack deploy -c stack.yml shop

Each FILE is a stack of its own. Its name is that of --project, or the file's `name`, or that of the
folder it is in: it begins the names of the stack's networks.

docker compose and docker stack deploy do not take a file the same; --tool says which of them deploys
it:
  network_mode  compose keeps to it, and such a service needs no address; stack passes over it, and
                the service is on its networks or the default one
  profiles      compose starts a service only if a profile of its is active (--profile, or
                COMPOSE_PROFILES); stack starts it always
  .env          compose reads the one beside FILE where no --env-file is given; stack does not
Without --tool a FILE with network_mode or profiles is refused, and .env is read.
What runs already counts as used, also where the stack itself is deployed again. A network that is
not there yet and names no subnet gets one of the size that the agent's pool_prefix says; of an agent
that does not tell, /24 is assumed, and that is shown.

A service needs an address for each of its containers, one for itself (unless it is a job or its
endpoint_mode is dnsrr), and, where the order of updates is start-first, one for each container that
is replaced at a time. A global service counts on every node, whatever its constraints.

Exit status: 0 if all fits, 5 if addresses are missing, 4 if an external network is, 2 if a FILE
cannot be used, 6 if the use of a network is not known because the store cannot be reached.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Compose files; `-` is the standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// How many nodes global services run on [default: all that the agent knows]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    nodes: Option<u32>,
    /// A file of variables, NAME=VALUE, instead of the .env beside FILE; can be repeated. The
    /// environment's variables win
    #[arg(long = "env-file", value_name = "PATH")]
    env_files: Vec<PathBuf>,
    /// What deploys the files
    #[arg(long, value_enum, value_name = "TOOL")]
    tool: Option<Deployer>,
    /// A profile that is active, or `*`; can be repeated. Only docker compose knows them
    #[arg(long = "profile", value_name = "NAME")]
    profiles: Vec<String>,
    /// The stack's name, where there is one FILE
    #[arg(long, value_name = "NAME", value_parser = compose::check_stack_name)]
    project: Option<String>,
    /// Keep the addresses of the networks that are there, under this name, if all fits: services
    /// take them over with netctl service create --reservation NAME
    #[arg(long, value_name = "NAME")]
    reserve: Option<Name>,
    /// For how long they are kept
    #[arg(long, value_name = "DURATION", default_value = "10m", requires = "reserve")]
    #[arg(value_parser = values::wait)]
    ttl: Duration,
}

/// What deploys a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Deployer {
    /// docker compose
    Compose,
    /// docker stack deploy
    Stack,
}

/// Does `netctl plan`. What is wrong with the files is told before the agent is asked.
pub(super) async fn run(session: &Session, arguments: Arguments) -> Result<ExitCode, Failure> {
    let stacks = files::stacks(&arguments)?;
    let nodes = match arguments.nodes {
        Some(nodes) => nodes,
        None if stacks.iter().any(is_global) => nodes(session).await?,
        None => 0,
    };
    let demands = demands(&stacks, nodes);
    let stock = stock(session, &demands).await?;
    let (settings, pools) = settings(session).await?;
    let verdict = verdict::judge(demands, &stock, &pools);
    match session.format {
        Format::Json => output::print_json(&verdict)?,
        Format::Table => table::print(&verdict, &settings)?,
    }
    if let Some(refusal) = refusal(&verdict) {
        return Err(refusal);
    }
    if let Some(name) = arguments.reserve {
        reserve(session, name, arguments.ttl, &verdict, &stock).await?;
    }
    Ok(Exit::Done.into())
}

fn is_global(stack: &Stack) -> bool {
    stack.services.iter().any(|service| matches!(service.mode, Mode::Global | Mode::GlobalJob))
}

/// How many nodes the cluster has, also those that are away: they come back.
async fn nodes(session: &Session) -> Result<u32, Failure> {
    Ok(u32::try_from(session.client.nodes().await?.len()).unwrap_or(u32::MAX))
}

/// What the agent's configuration says, and which subnets its pools give; one that is older does not
/// tell: what is usual is assumed.
async fn settings(session: &Session) -> Result<(SettingsView, Pools), Failure> {
    let (settings, assumed) = match session.client.settings().await {
        Ok(settings) => (settings, false),
        Err(ClientError::Api(error)) if error.code == ErrorCode::NotFound => {
            (SettingsView::default(), true)
        }
        Err(error) => return Err(error.into()),
    };
    let pool = |prefix| PoolSubnet { prefix, assumed };
    let (ipv4, ipv6) = (pool(settings.pool_prefix), pool(settings.pool6_prefix));
    Ok((settings, Pools { ipv4, ipv6 }))
}

/// What the networks have, by their names.
async fn stock(
    session: &Session,
    demands: &BTreeMap<String, Demand>,
) -> Result<BTreeMap<String, Stocks>, Failure> {
    let views = session.client.networks().await?;
    let known: BTreeMap<String, Option<Stocks>> =
        views.iter().map(|view| (view.network.name.to_string(), stocks(view))).collect();
    // An agent without its store does not know either which networks were made meanwhile.
    let away = known.values().any(Option::is_none);
    let unknown = demands.keys().find(|name| known.get(*name).map_or(away, Option::is_none));
    if let Some(name) = unknown {
        let store = session.client.version().await?.store;
        let text = format!(
            "the use of network {name} is not known now, because the agent does not reach its store \
             ({store}): nothing is planned; try again when it does"
        );
        return Err(Failure::new(Exit::NotNow, text));
    }
    Ok(known.into_iter().filter_map(|(name, stocks)| Some((name, stocks?))).collect())
}

/// What a network has; `None`: nobody has counted that.
fn stocks(view: &NetworkView) -> Option<Stocks> {
    let families = [
        (Family::Ipv4, view.network.has_ipv4(), view.ipv4),
        (Family::Ipv6, view.network.has_ipv6(), view.ipv6),
    ];
    let there = families.into_iter().filter(|(_, there, _)| *there);
    there.map(|(family, _, usage)| Some((family, stock_of(usage?)))).collect()
}

fn stock_of(usage: Usage) -> Stock {
    Stock { usable: usage.usable.into(), free: usage.free.into() }
}

/// Keeps what the networks that are there must give.
async fn reserve(
    session: &Session,
    name: Name,
    ttl: Duration,
    verdict: &Verdict,
    stock: &BTreeMap<String, Stocks>,
) -> Result<(), Failure> {
    let there = verdict.networks.iter().filter(|network| stock.contains_key(&network.name));
    let networks: BTreeMap<String, u64> =
        there.map(|network| (network.name.clone(), network.needed)).filter(|(_, n)| *n > 0).collect();
    if networks.is_empty() {
        return Err(Failure::failed("there is nothing to reserve: none of the networks is there yet"));
    }
    let request = ReserveRequest { name, networks, ttl_s: ttl.as_secs().max(1) };
    Ok(session.client.reserve(&request).await?)
}

/// Why a deployment does not fit.
fn refusal(verdict: &Verdict) -> Option<Failure> {
    if verdict.fits {
        return None;
    }
    let refused: Vec<&NetworkVerdict> = verdict.networks.iter().filter(|each| !each.fits).collect();
    let short = refused.iter().any(|network| network.state != State::Missing);
    let reasons = refused.into_iter().flat_map(reasons).collect::<Vec<_>>().join("\n");
    let exit = if short { Exit::Conflict } else { Exit::NotFound };
    Some(Failure::new(exit, format!("this does not fit\n{reasons}")))
}

fn reasons(network: &NetworkVerdict) -> Vec<String> {
    let NetworkVerdict { name, needed, .. } = network;
    if network.state == State::Missing {
        return vec![format!("network {name} is not there: make it with netctl network create {name}")];
    }
    let remedy = match network.state {
        State::New => "give it a larger subnet".to_owned(),
        State::Exists | State::Missing => {
            format!("add a subnet (netctl network expand {name} --subnet CIDR)")
        }
    };
    let short = network.families.iter().filter(|family| !family.fits);
    let told = short.map(|family| {
        let (missing, free, family) = (family.short, family.stock.free, family.family);
        let addresses = if missing == 1 { "address" } else { "addresses" };
        format!(
            "network {name} is short by {missing} {family} {addresses}: {needed} needed, {free} free; \
             {remedy}, or deploy less"
        )
    });
    told.collect()
}
