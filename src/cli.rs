//! The command `netctl`: what people type, and what they read.
//!
//! It knows the agent only through [`crate::api::client`]. Results go to the standard output,
//! everything else to the standard error.

mod completion;
mod dns;
mod drain;
mod endpoint;
mod failure;
mod ipam;
mod monitor;
mod network;
mod node;
mod output;
mod plan;
mod resolver;
mod run;
mod service;
mod values;
mod version;
mod wait;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::api::client::{Client, DEFAULT_SOCKET};

pub use failure::Exit;
use failure::Failure;
use output::Format;

const EXAMPLES: &str = "\
Examples:
  netctl network create web --subnet 10.9.0.0/24
  netctl run --network web --name a -- sh -c 'ip addr; ping -c1 b'
  netctl endpoint ls --network web
  netctl network inspect web -o json
  netctl plan stack.yml
  netctl ipam check

Exit status:
  0  done
  1  the agent refused or failed
  2  the command or one of its values cannot be used
  3  the agent cannot be reached
  4  there is no such network, endpoint, service or node
  5  conflict: taken, in use, or no address left
  6  not now: the store cannot be reached, or the network was not ready, or a drain not
     at its end, in time; try again
  netctl run: the status of the command it ran; 128 and the signal's number if one ended it; 126 or
  127 if it could not be started

The agent is found by --socket, or NETCTL_SOCKET in the environment.";

/// Overlay networks and service discovery for clusters
#[derive(Debug, Parser)]
#[command(name = "netctl", version, after_help = "See --help for examples and the exit status.")]
#[command(after_long_help = EXAMPLES)]
pub struct Cli {
    /// The agent's socket
    #[arg(long, global = true, env = "NETCTL_SOCKET", default_value = DEFAULT_SOCKET)]
    #[arg(value_name = "PATH")]
    socket: PathBuf,
    /// How results are written
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    #[arg(value_name = "FORMAT")]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Command {
    /// Make, list, show and remove networks
    #[command(subcommand, visible_alias = "net")]
    Network(network::Command),
    /// List, show, attach, drain, activate and detach endpoints: interfaces of containers on a network
    #[command(subcommand, visible_alias = "ep")]
    Endpoint(endpoint::Command),
    /// Make, list, show, change, drain, activate and remove services
    #[command(subcommand, visible_alias = "svc")]
    Service(service::Command),
    /// Run a command in namespaces of its own, plugged into a network
    Run(run::Arguments),
    /// Say whether Compose files fit into the networks' addresses, before they are deployed
    Plan(plan::Arguments),
    /// Look for leaked and double-booked addresses, and repair them
    #[command(subcommand)]
    Ipam(ipam::Command),
    /// List, show, drain, activate and remove the nodes of the cluster
    #[command(subcommand)]
    Node(node::Command),
    /// Ask the name server of this node, or print how this machine asks it
    #[command(subcommand)]
    Dns(dns::Command),
    /// Watch packets on this node: each that is dropped, with the reason, and a part of the others
    Monitor(monitor::Arguments),
    /// Show the versions of this command and of the agent
    Version,
    /// Print a script that completes commands and options in a shell
    Completion(completion::Arguments),
}

/// What every sub-command is given.
struct Session {
    client: Client,
    format: Format,
}

/// Does what the command line says; a usage error ends the process with status 2.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let session = Session { client: Client::new(cli.socket), format: cli.output };
    let result = match cli.command {
        // It forks: no runtime before that.
        Command::Run(arguments) => run::run(&session.client, arguments),
        Command::Completion(arguments) => completion::print(&arguments),
        command => block_on(async {
            match command {
                Command::Network(command) => network::run(&session, command).await,
                Command::Endpoint(command) => endpoint::run(&session, command).await,
                Command::Dns(command) => dns::run(&session, command).await,
                Command::Ipam(command) => ipam::run(&session, command).await,
                Command::Node(command) => node::run(&session, command).await,
                Command::Service(command) => service::run(&session, command).await,
                Command::Monitor(arguments) => monitor::run(&session, arguments).await,
                Command::Plan(arguments) => plan::run(&session, arguments).await,
                Command::Version => version::run(&session).await,
                Command::Run(_) | Command::Completion(_) => Ok(Exit::Done.into()),
            }
        }),
    };
    result.unwrap_or_else(|failure| {
        failure.print();
        failure.exit.into()
    })
}

/// Runs a future on this thread, with IO and time.
fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::failed(format!("cannot start: {error}")))?;
    runtime.block_on(future)
}
