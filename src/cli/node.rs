//! `netctl node`: list, show, drain, activate and remove the nodes of the cluster.

use std::process::ExitCode;

use clap::Subcommand;

use super::Session;
use super::drain::{self, Wait};
use super::failure::{Exit, Failure, Tally};
use super::output::{self, Details, Format};
use crate::api::{NodeView, Target};
use crate::model::{Node, NodeName};

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub(super) enum Command {
    /// List the nodes; the one that answers has a `*`
    #[command(alias = "list", after_help = "Examples:\n  netctl node ls\n  netctl node ls -o json")]
    Ls {
        /// Print names only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Show nodes in full
    #[command(
        after_help = "Examples:\n  netctl node inspect db1\n  netctl node inspect db1 db2 -o json"
    )]
    Inspect {
        /// Names
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
    },
    /// Have all endpoints on nodes get no new connections of services; open ones go on
    #[command(after_help = DRAIN_EXAMPLES)]
    Drain {
        /// Names
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<NodeName>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Have endpoints on drained nodes get new connections again
    #[command(after_help = "Examples:\n  netctl node activate db1")]
    Activate {
        /// Names
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<NodeName>,
    },
    /// Remove dead nodes, with their endpoints
    #[command(alias = "remove", after_help = RM_EXAMPLES)]
    Rm {
        /// Names
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
    },
}

const RM_EXAMPLES: &str = "\
Examples:
  netctl node rm db1

For machines that do not come back: their endpoints are released, and what was kept for their services
is there for others. One that is alive is refused. Should one come back after all, its agent joins
again and unplugs what was released.";

const DRAIN_EXAMPLES: &str = "\
Examples:
  netctl node drain db1
  netctl node drain db1 --wait --timeout 15m && systemctl reboot

Endpoints that come to a drained node get no connections either, until `netctl node activate`. Exit
status 6: with --wait, when something is left at the end of the time.";

/// Does `netctl node …`.
pub(super) async fn run(session: &Session, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Ls { quiet } => ls(session, quiet).await,
        Command::Inspect { nodes } => inspect(session, &nodes).await,
        Command::Drain { nodes, wait } => drain::drain(session, targets(nodes), &wait).await,
        Command::Rm { nodes } => rm(session, &nodes).await,
        Command::Activate { nodes } => drain::activate(session, targets(nodes)).await,
    }
}

async fn ls(session: &Session, quiet: bool) -> Result<ExitCode, Failure> {
    let views = session.client.nodes().await?;
    if quiet {
        for view in &views {
            output::print_line(view.node.name.as_str())?;
        }
    } else if session.format == Format::Json {
        output::print_json(&views)?;
    } else {
        let row = |view: NodeView| {
            let mark = if view.this { "*" } else { "" };
            vec![
                format!("{}{mark}", view.node.name),
                state(&view).to_owned(),
                yes_or_no(view.drained).to_owned(),
                view.node.underlay.to_string(),
                view.node.tunnel_port.to_string(),
                view.node.mtu.to_string(),
                view.node.version.clone(),
            ]
        };
        let header = ["NAME", "STATE", "DRAINED", "UNDERLAY", "PORT", "MTU", "VERSION"];
        output::print_table(&header, views.into_iter().map(row))?;
    }
    Ok(Exit::Done.into())
}

async fn inspect(session: &Session, nodes: &[String]) -> Result<ExitCode, Failure> {
    let (mut tally, mut views) = (Tally::new(), Vec::new());
    for name in nodes {
        views.extend(tally.take(session.client.node(name).await));
    }
    output::print_all(session.format, &views, details)?;
    Ok(tally.exit())
}

fn state(view: &NodeView) -> &'static str {
    if view.alive { "alive" } else { "dead" }
}

fn yes_or_no(fact: bool) -> &'static str {
    if fact { "yes" } else { "no" }
}

async fn rm(session: &Session, nodes: &[String]) -> Result<ExitCode, Failure> {
    let mut tally = Tally::new();
    for name in nodes {
        if tally.take(session.client.remove_node(name).await).is_some() {
            output::print_line(name)?;
        }
    }
    Ok(tally.exit())
}

fn targets(nodes: Vec<NodeName>) -> Vec<(String, Result<Target, Failure>)> {
    nodes.into_iter().map(|name| (name.to_string(), Ok(Target::Node(name)))).collect()
}

/// The engine, and why it is that one: an agent of before does not say.
fn balancing(node: &Node) -> String {
    match node.lb_reason.as_str() {
        "" => node.lb.to_string(),
        reason => format!("{} ({reason})", node.lb),
    }
}

/// Whether sockets are asked for services, and of which control group.
fn asks_sockets(node: &Node) -> String {
    node.socket_lb
        .as_ref()
        .map_or("no".to_owned(), |cgroup| format!("yes, those of {}", cgroup.display()))
}

fn details(view: &NodeView) -> Details {
    let node = &view.node;
    Details::default()
        .with("Name", &node.name)
        .with("ID", node.id)
        .with("State", state(view))
        .with("Drained", yes_or_no(view.drained))
        .with("This node", yes_or_no(view.this))
        .with("Underlay", node.underlay)
        .with("Tunnel port", node.tunnel_port)
        .with("VTEP MAC", node.vtep_mac)
        .with("Inner MTU", node.mtu)
        .with_all("Subnets in use", &node.subnets_in_use)
        .with("Balancing", balancing(node))
        .with("Asks sockets", asks_sockets(node))
        .with("Version", &node.version)
        .with_all("Labels", output::labels(&node.labels))
}
