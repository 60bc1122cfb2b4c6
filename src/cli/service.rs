//! `netctl service`: make, list, show, scale and remove services.

use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};

use super::Session;
use super::failure::{Exit, Failure, Tally};
use super::output::{self, Details, Format};
use super::values;
use crate::api::ServiceView;
use crate::model::{EndpointMode, Name, ServiceSpec, UpdateOrder};

const CREATE_EXAMPLES: &str = "\
Examples:
  netctl service create shop --network web --replicas 5
  netctl service create db --network web --endpoint-mode dnsrr
  netctl service create api --network web --network mail --replicas 20 \\
      --update-order start-first --update-parallelism 2
  netctl run --network web --service shop -- ./server

A service gets all the addresses that it will need at once, on all its networks, or is refused with
the numbers: one for each container, one for itself (unless it is reached by dnsrr), and with
start-first one for each container that is replaced at a time. Its containers draw on them, so none
of them can fail because somebody else was faster.";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a service; prints its id
    #[command(after_help = CREATE_EXAMPLES)]
    Create(Create),
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
    /// How many containers it has
    #[arg(long, value_name = "N", default_value_t = 1)]
    replicas: u32,
    /// How it is reached: by an address of its own, or by those of its containers
    #[arg(long, value_enum, value_name = "MODE", default_value = "vip")]
    endpoint_mode: Mode,
    /// What comes first when a container is replaced
    #[arg(long, value_enum, value_name = "ORDER", default_value = "stop-first")]
    update_order: Order,
    /// How many containers are replaced at a time; 0: all
    #[arg(long, value_name = "N", default_value_t = 1)]
    update_parallelism: u32,
    /// A reservation (netctl plan --reserve) whose addresses it takes over
    #[arg(long, value_name = "NAME")]
    reservation: Option<Name>,
    /// Free text; can be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = values::pair)]
    labels: Vec<(String, String)>,
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

fn scale(text: &str) -> Result<(Name, u32), String> {
    let (name, number) = text.split_once('=').ok_or("give SERVICE=REPLICAS")?;
    let replicas = number.parse().map_err(|_| format!("{number:?} is not a number of replicas"))?;
    Ok((name.parse::<Name>().map_err(|error| error.to_string())?, replicas))
}

/// Does `netctl service …`.
pub(super) async fn run(session: &Session, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Create(create) => self::create(session, create).await,
        Command::Ls { quiet } => ls(session, quiet).await,
        Command::Inspect { services } => inspect(session, &services).await,
        Command::Scale { services } => rescale(session, &services).await,
        Command::Rm { services } => rm(session, &services).await,
    }
}

async fn create(session: &Session, create: Create) -> Result<ExitCode, Failure> {
    let spec = ServiceSpec {
        name: create.name,
        networks: create.networks,
        replicas: create.replicas,
        endpoint_mode: match create.endpoint_mode {
            Mode::Vip => EndpointMode::Vip,
            Mode::Dnsrr => EndpointMode::Dnsrr,
        },
        update_order: match create.update_order {
            Order::StopFirst => UpdateOrder::StopFirst,
            Order::StartFirst => UpdateOrder::StartFirst,
        },
        update_parallelism: create.update_parallelism,
        addresses: Vec::new(),
        balancing: Default::default(),
        health: None,
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

async fn ls(session: &Session, quiet: bool) -> Result<ExitCode, Failure> {
    let views = session.client.services().await?;
    if quiet {
        for view in &views {
            output::print_line(view.service.name.as_str())?;
        }
    } else if session.format == Format::Json {
        output::print_json(&views)?;
    } else {
        let row = |view: ServiceView| {
            vec![
                view.service.id.to_string(),
                view.service.name.to_string(),
                mode(&view).to_owned(),
                view.service.replicas.to_string(),
                view.network_names.join(","),
                output::joined(view.service.addresses.values().flatten()),
            ]
        };
        let header = ["ID", "NAME", "MODE", "REPLICAS", "NETWORKS", "ADDRESSES"];
        output::print_table(&header, views.into_iter().map(row))?;
    }
    Ok(Exit::Done.into())
}

fn mode(view: &ServiceView) -> &'static str {
    match view.service.endpoint_mode {
        EndpointMode::Vip => "vip",
        EndpointMode::Dnsrr => "dnsrr",
    }
}

async fn inspect(session: &Session, services: &[String]) -> Result<ExitCode, Failure> {
    let (mut tally, mut views) = (Tally::new(), Vec::new());
    for name in services {
        views.extend(tally.take(session.client.service(name).await));
    }
    output::print_all(session.format, &views, details)?;
    Ok(tally.exit())
}

fn details(view: &ServiceView) -> Details {
    let service = &view.service;
    let order = match service.update_order {
        UpdateOrder::StopFirst => "stop-first",
        UpdateOrder::StartFirst => "start-first",
    };
    Details::default()
        .with("ID", service.id)
        .with("Name", &service.name)
        .with("Endpoint mode", mode(view))
        .with("Replicas", service.replicas)
        .with("Update", format!("{order}, {} at a time", service.update_parallelism))
        .with_all("Networks", &view.network_names)
        .with_all("Addresses", service.addresses.values().flatten())
        .with_all("Labels", output::labels(&service.labels))
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
