//! `netctl endpoint wait`: until endpoints are ready, or gone.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::time::{Instant, sleep};

use super::drain::Progress;
use super::failure::{Exit, Failure, Tally};
use super::{Session, output, values};
use crate::api::client::ClientError;
use crate::api::{ApiError, EndpointView, ErrorCode};
use crate::config::duration::Shown;
use crate::model::EndpointState;

/// How often the agent is asked.
const ASK_AGAIN: Duration = Duration::from_millis(200);

pub(super) const EXAMPLES: &str = "\
Examples:
  netctl endpoint wait --network web box
  netctl endpoint wait --network web --for gone --timeout 30s box

Ready: it gets connections of its service; on a node that is drained or dead it gets none.
An endpoint that does not exist yet is waited for too. Exit status 6: at the end of the time.";

/// What an endpoint is waited to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Condition {
    /// It takes connections of its service
    Ready,
    /// It does not exist
    Gone,
}

#[derive(Debug, Args)]
pub(super) struct Wait {
    /// Ids or names
    #[arg(required = true, value_name = "ENDPOINT")]
    endpoints: Vec<String>,
    /// The network (name or id) in which the names are meant
    #[arg(long)]
    network: Option<String>,
    /// What to wait for
    #[arg(long = "for", value_enum, value_name = "CONDITION", default_value = "ready")]
    condition: Condition,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = values::wait)]
    timeout: Duration,
}

/// Waits for all of them; prints the name of each that is as it should be.
pub(super) async fn wait(session: &Session, wait: &Wait) -> Result<ExitCode, Failure> {
    let (mut tally, deadline) = (Tally::new(), Instant::now() + wait.timeout);
    for name in &wait.endpoints {
        if tally.take(wait_for(session, wait, name, deadline).await).is_some() {
            output::print_line(name)?;
        }
    }
    Ok(tally.exit())
}

async fn wait_for(session: &Session, wait: &Wait, name: &str, deadline: Instant) -> Result<(), Failure> {
    let mut progress = Progress::new();
    loop {
        let is_wanted = wait.condition == Condition::Ready;
        let state = match session.client.endpoint(name, wait.network.as_deref()).await {
            Ok(EndpointView { endpoint, out, .. }) if endpoint.state == EndpointState::Ready => {
                match out {
                    None if is_wanted => return Ok(()),
                    None => "is ready".to_owned(),
                    Some(out) => format!("takes no connections: {out}"),
                }
            }
            Ok(view) if view.endpoint.reason.is_empty() => format!("is {}", view.endpoint.state),
            Ok(view) => format!("is {} ({})", view.endpoint.state, view.endpoint.reason),
            Err(ClientError::Api(ApiError { code: ErrorCode::NotFound, .. })) => {
                if wait.condition == Condition::Gone {
                    return Ok(());
                }
                "does not exist".to_owned()
            }
            // The store may come back in time.
            Err(ClientError::Api(ApiError { code: ErrorCode::Unavailable, message })) => message,
            Err(error) => return Err(error.into()),
        };
        if Instant::now() >= deadline {
            let wanted = if is_wanted { "ready" } else { "gone" };
            let text =
                format!("endpoint {name} is not {wanted} after {}: it {state}", Shown(wait.timeout));
            return Err(Failure::new(Exit::NotNow, text));
        }
        progress.show(&format!("{name} {state}"));
        sleep(ASK_AGAIN.min(deadline - Instant::now())).await;
    }
}
