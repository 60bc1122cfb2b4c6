//! `netctl … drain`: have endpoints get no new connections, and wait until the others have ended.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::time::{Instant, sleep};

use super::Session;
use super::failure::{Exit, Failure, Tally, complain};
use super::output::{self, Format};
use super::values;
use crate::api::client::{Client, ClientError};
use crate::api::{ApiError, DrainView, ErrorCode, Target};
use crate::config::duration::Shown;
use crate::model::NodeName;

/// How often the agent is asked how far a drain is.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// How many nodes are named.
const NAMED: usize = 5;

#[derive(Debug, Args)]
pub(super) struct Wait {
    /// Wait until no node gives it a new connection, and those that are open have ended
    #[arg(long)]
    wait: bool,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "5m", requires = "wait")]
    #[arg(value_parser = values::wait)]
    timeout: Duration,
}

/// Drains things, each with the name that was given for it; prints the names of those that are.
pub(super) async fn drain(
    session: &Session,
    targets: Vec<(String, Result<Target, Failure>)>,
    wait: &Wait,
) -> Result<ExitCode, Failure> {
    let (mut tally, mut begun, mut views) = (Tally::new(), Vec::new(), Vec::new());
    for (name, target) in targets {
        let Some(target) = tally.take(target) else { continue };
        if let Some(view) = tally.take(session.client.drain(&target).await) {
            begun.push((name, target, view));
        }
    }
    let deadline = Instant::now() + wait.timeout;
    for (name, target, view) in begun {
        let waited = match wait.wait {
            true => wait_for(&session.client, &name, &target, deadline, wait.timeout).await,
            false => Ok(view),
        };
        let Some(view) = tally.take(waited) else { continue };
        if wait.wait && !view.dead.is_empty() {
            complain(&format!("{name}: {}", not_asked(&view)));
        }
        match session.format {
            Format::Table => output::print_line(&name)?,
            Format::Json => views.push(view),
        }
    }
    if session.format == Format::Json {
        output::print_json(&views)?;
    }
    Ok(tally.exit())
}

/// Ends drains; prints the names of what is not drained any more.
pub(super) async fn activate(
    session: &Session,
    targets: Vec<(String, Result<Target, Failure>)>,
) -> Result<ExitCode, Failure> {
    let mut tally = Tally::new();
    for (name, target) in targets {
        let Some(target) = tally.take(target) else { continue };
        if tally.take(session.client.activate(&target).await).is_some() {
            output::print_line(&name)?;
        }
    }
    Ok(tally.exit())
}

async fn wait_for(
    client: &Client,
    name: &str,
    target: &Target,
    deadline: Instant,
    limit: Duration,
) -> Result<DrainView, Failure> {
    let mut progress = Progress::new();
    loop {
        let left = match client.drain_state(target).await {
            Ok(view) if view.done => return Ok(view),
            Ok(view) if view.waiting.is_empty() && view.connections == 0 => return over(name, target),
            Ok(view) => left(&view),
            Err(ClientError::Api(ApiError { code: ErrorCode::NotFound, .. })) => return Ok(gone()),
            // The store may come back in time.
            Err(ClientError::Api(ApiError { code: ErrorCode::Unavailable, message })) => message,
            Err(error) => return Err(error.into()),
        };
        if Instant::now() >= deadline {
            return Err(Failure::new(
                Exit::NotNow,
                format!(
                    "{name} is drained, but not at its end after {}: {left}; it stays drained: wait \
                     longer (--wait --timeout), or go on without",
                    Shown(limit)
                ),
            ));
        }
        progress.show(&format!("{name}: {left}"));
        sleep(ASK_AGAIN.min(deadline - Instant::now())).await;
    }
}

/// What it means that nothing is drained any more.
fn over(name: &str, target: &Target) -> Result<DrainView, Failure> {
    match target {
        // Those that it has now came after the drain.
        Target::Service(_) => Ok(gone()),
        Target::Node(_) | Target::Endpoint { .. } => Err(Failure::new(
            Exit::Conflict,
            format!("{name} is not drained any more: somebody has activated it meanwhile"),
        )),
    }
}

/// What is drained and has been detached, or removed: nothing leads there any more.
fn gone() -> DrainView {
    DrainView { done: true, endpoints: 0, waiting: Vec::new(), dead: Vec::new(), connections: 0 }
}

/// What is still waited for.
fn left(view: &DrainView) -> String {
    let mut parts = Vec::new();
    if !view.waiting.is_empty() {
        parts.push(format!("not acknowledged yet by {}", names(&view.waiting)));
    }
    if view.connections > 0 {
        parts.push(format!("{} open connection(s)", view.connections));
    }
    if !view.dead.is_empty() {
        parts.push(not_asked(view));
    }
    parts.join(", ")
}

/// Who cannot say what is open there.
fn not_asked(view: &DrainView) -> String {
    let are = if view.dead.len() == 1 { "is" } else { "are" };
    format!("not asked: {} {are} dead", names(&view.dead))
}

/// The first of some nodes, and how many more there are.
fn names(nodes: &[NodeName]) -> String {
    let mut names = output::joined(nodes.iter().take(NAMED)).replace(',', ", ");
    let more = nodes.len().saturating_sub(NAMED);
    if more > 0 {
        names.push_str(&format!(" and {more} more"));
    }
    names
}

/// A line on the terminal that is written over; nothing where there is none.
pub(super) struct Progress {
    terminal: bool,
    shown: String,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), shown: String::new() }
    }

    pub(super) fn show(&mut self, text: &str) {
        let text = output::clean(text);
        if self.terminal && text != self.shown {
            write_over(&text);
            self.shown = text;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if !self.shown.is_empty() {
            write_over("");
        }
    }
}

/// Writes a line over the one before (ECMA-48: erase in line).
fn write_over(text: &str) {
    // Where nobody reads there is nobody to tell.
    let _ = write!(std::io::stderr(), "\r\x1b[K{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_names_nodes_and_counts_connections() {
        let view = |nodes: usize, connections| DrainView {
            waiting: (1..=nodes).map(|n| format!("n{n}").parse().unwrap()).collect(),
            connections,
            ..gone()
        };
        assert_eq!(left(&view(2, 0)), "not acknowledged yet by n1, n2");
        assert_eq!(left(&view(0, 3)), "3 open connection(s)");
        let many = left(&view(7, 1));
        assert_eq!(many, "not acknowledged yet by n1, n2, n3, n4, n5 and 2 more, 1 open connection(s)");
        let dead = DrainView { dead: vec!["n9".parse().unwrap()], ..view(1, 0) };
        assert_eq!(left(&dead), "not acknowledged yet by n1, not asked: n9 is dead");
    }
}
