//! `netctl service`: make, list, show, change, drain, activate and remove services.

mod policy;
mod show;

use std::net::IpAddr;
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};

use super::Session;
use super::drain::{self, Wait};
use super::failure::{Exit, Failure, Tally};
use super::output::{self, Format};
use super::values;
use crate::api::Target;
use crate::model::{EndpointMode, Name, ServiceSpec, ServiceUpdate, UpdateOrder};
use policy::{Policy, Removals};

const CREATE_EXAMPLES: &str = "\
Examples:
  netctl service create shop --network web --replicas 5
  netctl service create db --network web --endpoint-mode dnsrr
  netctl service create www --network web --vip 10.9.0.80 --port 80:8080 --port 443:8443 \\
      --scheduler wlc --affinity 10m --health-http 8080/live --health-interval 5s
  netctl service create api --network web --network mail --replicas 20 \\
      --update-order start-first --update-parallelism 2
  netctl service create db --network web --external 192.0.2.10:5432
  netctl run --network web --service shop -- ./server

A service gets all the addresses that it will need at once, on all its networks, or is refused with
the numbers: one for each container, one for itself (unless it is reached by dnsrr), and with
start-first one for each container that is replaced at a time. Its containers draw on them, so none
of them can fail because somebody else was faster.

A target outside (--external) is one more that takes connections, or with dnsrr one more address of the
name. Each machine reaches it by its own way out, so the target sees that machine as the client. Nobody
checks whether it is well. Give one of each family that the networks have.";

const UPDATE_EXAMPLES: &str = "\
Examples:
  netctl service update shop --port 443:8443 --port-rm 80
  netctl service update shop --scheduler wlc --affinity 10m --timeout tcp=1h
  netctl service update shop --health-http 8080/live --health-interval 5s
  netctl service update shop --no-affinity --no-health --label-rm team
  netctl service update db --external-rm 192.0.2.10:5432   # its containers take over

A port or a label that is there already is changed. A service without ports takes connections to all
of them: its last port goes only for another, or with --all-ports. A target outside that is removed loses
the connections that it has.";
const DRAIN_EXAMPLES: &str = "\
Examples:
  netctl service drain shop
  netctl service drain shop --wait --timeout 10m

Those that it has now are drained, not those that come, and not what is outside (--external), which goes
with `service update --external-rm`. What is drained stays so until it is detached or activated. Exit status 6: with --wait, when something is left at the end of the time.";
const ACTIVATE_EXAMPLES: &str = "\
Examples:
  netctl service activate shop

Where the service has a health check they get connections when they are ready; on a node that is
drained they get none before that is activated too.";

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub(super) enum Command {
    /// Make a service; prints its id
    #[command(after_help = CREATE_EXAMPLES)]
    Create(Box<Create>),
    /// List the services
    #[command(
        alias = "list",
        after_help = "Examples:\n  netctl service ls\n  netctl service ls -o json"
    )]
    Ls {
        /// Print names only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Show services in full
    #[command(
        after_help = "Examples:\n  netctl service inspect shop\n  netctl service inspect shop -o json"
    )]
    Inspect {
        /// Names
        #[arg(required = true, value_name = "SERVICE")]
        services: Vec<String>,
    },
    /// Change how many containers services have
    #[command(
        after_help = "Examples:\n  netctl service scale shop=10\n  netctl service scale shop=10 db=3"
    )]
    Scale {
        /// Names and numbers
        #[arg(required = true, value_name = "SERVICE=REPLICAS", value_parser = scale)]
        services: Vec<(Name, u32)>,
    },
    /// Change a service; what is not given stays
    #[command(after_help = UPDATE_EXAMPLES)]
    Update(Box<Update>),
    /// Have all containers of services get no new connections; open ones go on
    #[command(after_help = DRAIN_EXAMPLES)]
    Drain(Drain),
    /// Have drained containers of services get new connections again
    #[command(after_help = ACTIVATE_EXAMPLES)]
    Activate {
        /// Names
        #[arg(required = true, value_name = "SERVICE")]
        services: Vec<Name>,
    },
    /// Remove services; their containers keep their addresses
    #[command(alias = "remove", after_help = "Examples:\n  netctl service rm shop")]
    Rm {
        /// Names
        #[arg(required = true, value_name = "SERVICE")]
        services: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// Its name, unique in the cluster
    name: Name,
    /// A network (name or id); can be repeated
    #[arg(long = "network", required = true, value_name = "NETWORK")]
    networks: Vec<String>,
    /// How many containers it has [default: 1, with --external 0]
    #[arg(long, value_name = "N")]
    replicas: Option<u32>,
    /// How it is reached: by an address of its own, or by those of its containers
    #[arg(long, value_enum, value_name = "MODE", default_value = "vip")]
    endpoint_mode: Mode,
    /// What comes first when a container is replaced
    #[arg(long, value_enum, value_name = "ORDER", default_value = "stop-first")]
    update_order: Order,
    /// How many containers are replaced at a time; 0: all
    #[arg(long, value_name = "N", default_value_t = 1)]
    update_parallelism: u32,
    /// An address of its own; one of each family on each network at most [default: free ones]
    #[arg(long = "vip", value_name = "ADDRESS")]
    addresses: Vec<IpAddr>,
    #[command(flatten)]
    policy: Policy,
    /// A reservation (netctl plan --reserve) whose addresses it takes over
    #[arg(long, value_name = "NAME")]
    reservation: Option<Name>,
    /// Free text; can be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = values::pair)]
    labels: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub(super) struct Update {
    /// Its name
    #[arg(value_name = "SERVICE")]
    name: Name,
    /// How many containers it has
    #[arg(long, value_name = "N")]
    replicas: Option<u32>,
    /// What comes first when a container is replaced
    #[arg(long, value_enum, value_name = "ORDER")]
    update_order: Option<Order>,
    /// How many containers are replaced at a time; 0: all
    #[arg(long, value_name = "N")]
    update_parallelism: Option<u32>,
    #[command(flatten)]
    policy: Policy,
    /// A label to add or change; can be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = values::pair)]
    labels: Vec<(String, String)>,
    #[command(flatten)]
    removals: Removals,
}

#[derive(Debug, Args)]
pub(super) struct Drain {
    /// Names
    #[arg(required = true, value_name = "SERVICE")]
    services: Vec<Name>,
    #[command(flatten)]
    wait: Wait,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mode {
    Vip,
    Dnsrr,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Order {
    StopFirst,
    StartFirst,
}

impl From<Order> for UpdateOrder {
    fn from(order: Order) -> Self {
        match order {
            Order::StopFirst => Self::StopFirst,
            Order::StartFirst => Self::StartFirst,
        }
    }
}

fn scale(text: &str) -> Result<(Name, u32), String> {
    let (name, number) = text.split_once('=').ok_or("give SERVICE=REPLICAS")?;
    let replicas = number.parse().map_err(|_| format!("{number:?} is not a number of replicas"))?;
    Ok((name.parse::<Name>().map_err(|error| error.to_string())?, replicas))
}

/// Does `netctl service …`.
pub(super) async fn run(session: &Session, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Create(create) => self::create(session, *create).await,
        Command::Ls { quiet } => show::ls(session, quiet).await,
        Command::Inspect { services } => show::inspect(session, &services).await,
        Command::Update(update) => self::update(session, *update).await,
        Command::Drain(drain) => drain::drain(session, targets(drain.services), &drain.wait).await,
        Command::Activate { services } => drain::activate(session, targets(services)).await,
        Command::Scale { services } => rescale(session, &services).await,
        Command::Rm { services } => rm(session, &services).await,
    }
}

async fn create(session: &Session, create: Create) -> Result<ExitCode, Failure> {
    let spec = ServiceSpec {
        name: create.name,
        networks: create.networks,
        replicas: create.replicas.unwrap_or(u32::from(create.policy.external().is_empty())),
        endpoint_mode: match create.endpoint_mode {
            Mode::Vip => EndpointMode::Vip,
            Mode::Dnsrr => EndpointMode::Dnsrr,
        },
        update_order: create.update_order.into(),
        update_parallelism: create.update_parallelism,
        addresses: create.addresses,
        external: create.policy.external().to_vec(),
        balancing: create.policy.balancing(),
        health: create.policy.health()?,
        reservation: create.reservation,
        labels: values::map(create.labels),
    };
    let view = session.client.create_service(&spec).await?;
    match session.format {
        Format::Json => output::print_json(&view)?,
        Format::Table => output::print_line(&view.service.id.to_string())?,
    }
    Ok(Exit::Done.into())
}

async fn update(session: &Session, update: Update) -> Result<ExitCode, Failure> {
    let change = ServiceUpdate {
        replicas: update.replicas,
        update_order: update.update_order.map(Order::into),
        update_parallelism: update.update_parallelism,
        labels: values::map(update.labels),
        ..update.policy.update(update.removals)
    };
    let view = session.client.update_service(update.name.as_str(), &change).await?;
    match session.format {
        Format::Json => output::print_json(&view)?,
        Format::Table => output::print_line(view.service.name.as_str())?,
    }
    Ok(Exit::Done.into())
}

fn targets(services: Vec<Name>) -> Vec<(String, Result<Target, Failure>)> {
    services.into_iter().map(|name| (name.to_string(), Ok(Target::Service(name)))).collect()
}

async fn rescale(session: &Session, services: &[(Name, u32)]) -> Result<ExitCode, Failure> {
    let mut tally = Tally::new();
    for (name, replicas) in services {
        if tally.take(session.client.scale_service(name.as_str(), *replicas).await).is_some() {
            output::print_line(&format!("{name} scaled to {replicas}"))?;
        }
    }
    Ok(tally.exit())
}

async fn rm(session: &Session, services: &[String]) -> Result<ExitCode, Failure> {
    let mut tally = Tally::new();
    for name in services {
        if tally.take(session.client.remove_service(name).await).is_some() {
            output::print_line(name)?;
        }
    }
    Ok(tally.exit())
}
