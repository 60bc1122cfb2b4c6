//! `netctl version`: the versions of this command and of the agent.

use std::process::ExitCode;

use serde::Serialize;

use super::Session;
use super::failure::{Exit, Failure};
use super::output::{self, Details, Format};
use crate::api::VersionView;

#[derive(Debug, Serialize)]
struct Versions {
    client: &'static str,
    agent: Option<VersionView>,
}

/// Prints what can be known; an agent that does not answer shows in the status.
pub(super) async fn run(session: &Session) -> Result<ExitCode, Failure> {
    let (agent, failure) = match session.client.version().await {
        Ok(agent) => (Some(agent), None),
        Err(error) => (None, Some(Failure::from(error))),
    };
    let versions = Versions { client: env!("CARGO_PKG_VERSION"), agent };
    match session.format {
        Format::Json => output::print_json(&versions)?,
        Format::Table => output::print(&details(&versions).to_string())?,
    }
    failure.map_or(Ok(Exit::Done.into()), Err)
}

fn details(versions: &Versions) -> Details {
    let details = Details::default().with("Client", versions.client);
    match &versions.agent {
        Some(agent) => details
            .with("Agent", &agent.version)
            .with("API", &agent.api)
            .with("Node", &agent.node)
            .with("Store", &agent.store)
            .with("Kernel", &agent.kernel),
        None => details.with("Agent", "does not answer"),
    }
}
