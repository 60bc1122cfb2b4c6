//! `netctl ipam`: looks after the addresses that were given out.

use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::Session;
use super::failure::{Exit, Failure};
use super::output::{self, Format};
use crate::api::CheckView;
use crate::model::Finding;

const CHECK_EXAMPLES: &str = "\
The store is checked as a whole, the kernel of this node only: run it on each node.

Examples:
  netctl ipam check
  netctl ipam check --network web
  netctl ipam check --repair
  netctl ipam check -o json | jq -r '.findings[].what'

A repair changes nothing that has changed since it was read. What cannot be repaired safely, such
as one address that two endpoints have, is told with what to do.

Exit status: 0 if nothing is found, or all of it was repaired; 1 if something is left.";

#[derive(Debug, Subcommand)]
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
}

/// Does `netctl ipam …`.
pub(super) async fn run(session: &Session, command: Command) -> Result<ExitCode, Failure> {
    let Command::Check(Check { repair, network }) = command;
    let network = network.as_deref();
    let view = match repair {
        true => session.client.repair(network).await?,
        false => session.client.check(network).await?,
    };
    match session.format {
        Format::Json => output::print_json(&view)?,
        Format::Table => print(&view)?,
    }
    let clean = view.findings.is_empty();
    Ok(if clean { Exit::Done } else { Exit::Failed }.into())
}

fn print(view: &CheckView) -> Result<(), Failure> {
    let row = |finding: &Finding, repair: String| {
        vec![
            output::or_dash(&finding.network),
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
        output::print_table(&["NETWORK", "KIND", "WHAT", "PROBLEM", "REPAIR"], rows.into_iter())?;
    }
    let (repaired, left) = (view.repaired.len(), view.findings.len());
    output::print_line(&format!(
        "{repaired} repaired, {left} left: the store at revision {}, the kernel of node {}",
        view.revision, view.node
    ))
}
