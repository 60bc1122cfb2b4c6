//! `netctl ipam`: looks after the addresses that were given out.

use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::Session;
use super::failure::{Exit, Failure};
use super::output::{self, Format};
use crate::api::{CheckOutcome, CheckView};
use crate::model::Finding;

const CHECK_EXAMPLES: &str = "\
The store is compared with itself, and with the kernel of every node: the agent that is asked asks
the others through the store, and waits some seconds for those that do not answer. The last lines
say whose kernels were compared, and whose were not, and why.

Examples:
  netctl ipam check
  netctl ipam check --network web
  netctl ipam check --local
  netctl ipam check --repair
  netctl ipam check -o json | jq -r '.findings[].what'
  netctl ipam check -o json | jq -r '.nodes[] | select(.outcome != \"compared\").node'

A repair changes the store only, and nothing that has changed since it was read. What cannot be
repaired safely, such as one address that two endpoints have, is told with what to do. What differs
in a kernel, its agent puts right by itself; where it cannot, its log says why.

Exit status: 0 if every node was compared, and nothing is found or all of it was repaired; 1 if
something is left, or a node was not compared. With --local, other nodes do not count.";

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub(super) enum Command {
    /// Look for leaked and double-booked addresses, and for endpoints that the kernel lacks
    #[command(after_help = CHECK_EXAMPLES)]
    Check(Check),
}

#[derive(Debug, Args)]
pub(super) struct Check {
    /// Repair what it is safe to repair
    #[arg(long)]
    repair: bool,
    /// Only this network (name or id)
    #[arg(long)]
    network: Option<String>,
    /// Compare the kernel of this node only
    #[arg(long)]
    local: bool,
}

/// Does `netctl ipam …`.
pub(super) async fn run(session: &Session, command: Command) -> Result<ExitCode, Failure> {
    let Command::Check(Check { repair, network, local }) = command;
    let network = network.as_deref();
    let view = match repair {
        true => session.client.repair(network, local).await?,
        false => session.client.check(network, local).await?,
    };
    match session.format {
        Format::Json => output::print_json(&view)?,
        Format::Table => print(&view)?,
    }
    let clean = view.findings.is_empty() && view.is_complete();
    Ok(if clean { Exit::Done } else { Exit::Failed }.into())
}

fn print(view: &CheckView) -> Result<(), Failure> {
    let row = |finding: &Finding, repair: String| {
        vec![
            output::or_dash(&finding.network),
            finding.node.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
            finding.kind.to_string(),
            finding.what.clone(),
            finding.problem.clone(),
            repair,
        ]
    };
    let repaired = view.repaired.iter().map(|f| row(f, format!("done: {}", f.repair)));
    let left = view.findings.iter().map(|finding| match finding.repairable {
        true => row(finding, format!("--repair: {}", finding.repair)),
        false => row(finding, finding.repair.clone()),
    });
    let rows: Vec<_> = repaired.chain(left).collect();
    if !rows.is_empty() {
        let head = ["NETWORK", "NODE", "KIND", "WHAT", "PROBLEM", "REPAIR"];
        output::print_table(&head, rows.into_iter())?;
    }
    for node in view.nodes.iter().filter(|node| node.cut > 0) {
        output::print_line(&format!("node {}: {} more are not shown", node.node, node.cut))?;
    }
    print_end(view)
}

/// Prints whose kernels were not compared, and whose were.
fn print_end(view: &CheckView) -> Result<(), Failure> {
    let (compared, others): (Vec<_>, Vec<_>) =
        view.nodes.iter().partition(|node| node.outcome == CheckOutcome::Compared);
    for node in &others {
        output::print_line(&format!(
            "incomplete: node {} was not compared: {}",
            node.node, node.reason
        ))?;
    }
    let names: Vec<_> = compared.iter().map(|node| node.node.as_str()).collect();
    let (repaired, left) = (view.repaired.len(), view.findings.len());
    output::print_line(&format!(
        "{repaired} repaired, {left} left: the store at revision {}, the kernel of {} of {} node(s): {}",
        view.revision,
        compared.len(),
        view.nodes.len(),
        names.join(", ")
    ))
}
