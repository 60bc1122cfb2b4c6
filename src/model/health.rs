//! Whether an endpoint takes connections of its service, and how that is found out.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::balancing::{BalancingError, check_seconds};

/// Whether an endpoint takes connections of its service.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum EndpointState {
    /// Not yet: no check has succeeded.
    Pending,
    /// It does.
    #[default]
    Ready,
    /// Not now: its checks fail.
    Unhealthy,
    /// No new ones any more; those that it has go on.
    Draining,
}

impl fmt::Display for EndpointState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pending => "pending",
            Self::Ready => "ready",
            Self::Unhealthy => "unhealthy",
            Self::Draining => "draining",
        })
    }
}

/// What the node of an endpoint does to find out whether it is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase", tag = "type", deny_unknown_fields)]
pub enum HealthTest {
    /// It connects to a TCP port of the endpoint's first address, IPv4 before IPv6.
    Tcp {
        /// The port.
        port: u16,
    },
    /// It asks for a page at that address, over HTTP/1.1; an answer of 200 to 399 is well.
    Http {
        /// The port.
        port: u16,
        /// The path, with a slash.
        path: String,
    },
    /// It runs a command of its own machine's, as the user `health_user`, in the endpoint's network
    /// namespace; exit status 0 is well. The environment has `PATH`, `NETCTL_ENDPOINT`,
    /// `NETCTL_SERVICE` (names) and `NETCTL_ADDRESS` (with commas between several).
    Command {
        /// The program and its arguments.
        command: Vec<String>,
    },
}

impl fmt::Display for HealthTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { port } => write!(f, "tcp:{port}"),
            Self::Http { port, path } => write!(f, "http:{port}{path}"),
            Self::Command { command } => f.write_str(&command.join(" ")),
        }
    }
}

/// A check that is repeated. The times and the defaults are those of a Dockerfile's `HEALTHCHECK`, but
/// that a pending endpoint is checked every second until it is ready, for one interval or the start
/// period, whichever is longer, without counting failures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    /// What is done.
    pub test: HealthTest,
    /// Seconds from the end of one check to the next.
    #[serde(default = "thirty")]
    pub interval: u32,
    /// Seconds after which a check has failed.
    #[serde(default = "thirty")]
    pub timeout: u32,
    /// For how many seconds after the start of an endpoint failures do not count.
    #[serde(default)]
    pub start_period: u32,
    /// How many failures in a row make an endpoint unhealthy.
    #[serde(default = "three")]
    pub retries: u32,
}

fn thirty() -> u32 {
    30
}

fn three() -> u32 {
    3
}

impl HealthCheck {
    /// A check with the default times.
    pub fn new(test: HealthTest) -> Self {
        Self { test, interval: thirty(), timeout: thirty(), start_period: 0, retries: three() }
    }

    /// Checks what the types do not.
    ///
    /// # Errors
    /// Says which value cannot be used.
    pub fn check(&self) -> Result<(), BalancingError> {
        let unknown =
            |text: String, choices| BalancingError::Unknown { what: "health check", text, choices };
        let text = || self.test.to_string().chars().take(40).collect();
        match &self.test {
            HealthTest::Tcp { port: 0 } | HealthTest::Http { port: 0, .. } => {
                return Err(unknown(text(), "a port of 1 to 65535"));
            }
            HealthTest::Http { path, .. }
                if !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic()) =>
            {
                return Err(unknown(text(), "a path that starts with a slash, without spaces"));
            }
            HealthTest::Command { command } if command.first().is_none_or(String::is_empty) => {
                return Err(unknown(text(), "a command"));
            }
            _ => {}
        }
        check_seconds("an interval", Some(self.interval))?;
        check_seconds("a timeout", Some(self.timeout))?;
        check_seconds("a start period", Some(self.start_period).filter(|seconds| *seconds > 0))?;
        if self.retries == 0 {
            return Err(unknown("0 retries".to_owned(), "1 or more retries"));
        }
        Ok(())
    }
}
