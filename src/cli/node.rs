//! `netctl node`: list and show the nodes of the cluster.

use std::process::ExitCode;

use clap::Subcommand;

use super::Session;
use super::failure::{Exit, Failure, Tally};
use super::output::{self, Details, Format};
use crate::api::NodeView;

#[derive(Debug, Subcommand)]
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
}

/// Does `netctl node …`.
pub(super) async fn run(session: &Session, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Ls { quiet } => ls(session, quiet).await,
        Command::Inspect { nodes } => inspect(session, &nodes).await,
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
                view.node.underlay.to_string(),
                view.node.tunnel_port.to_string(),
                view.node.mtu.to_string(),
                view.node.version.clone(),
            ]
        };
        let header = ["NAME", "STATE", "UNDERLAY", "PORT", "MTU", "VERSION"];
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

fn details(view: &NodeView) -> Details {
    let node = &view.node;
    Details::default()
        .with("Name", &node.name)
        .with("ID", node.id)
        .with("State", state(view))
        .with("This node", if view.this { "yes" } else { "no" })
        .with("Underlay", node.underlay)
        .with("Tunnel port", node.tunnel_port)
        .with("VTEP MAC", node.vtep_mac)
        .with("Inner MTU", node.mtu)
        .with_all("Subnets in use", &node.subnets_in_use)
        .with("Balancing", node.lb)
        .with("Version", &node.version)
        .with_all("Labels", output::labels(&node.labels))
}
