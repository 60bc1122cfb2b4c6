//! How the command ends when it did not do what it was asked.

use std::io::Write;
use std::process::ExitCode;

use crate::api::client::ClientError;
use crate::api::{ApiError, ErrorCode};

/// The command's exit status, for scripts: stable over versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// The agent refused or failed.
    Failed = 1,
    /// The command or one of its values cannot be used.
    Usage = 2,
    /// The agent cannot be reached.
    Unreachable = 3,
    /// There is no such thing.
    NotFound = 4,
    /// Taken, in use, or exhausted.
    Conflict = 5,
    /// Try again.
    NotNow = 6,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

impl From<ErrorCode> for Exit {
    fn from(code: ErrorCode) -> Self {
        match code {
            ErrorCode::Invalid => Self::Usage,
            ErrorCode::NotFound => Self::NotFound,
            ErrorCode::Conflict | ErrorCode::InUse | ErrorCode::Exhausted => Self::Conflict,
            ErrorCode::Unavailable | ErrorCode::StoreReplaced | ErrorCode::Timeout => Self::NotNow,
            ErrorCode::Unsupported | ErrorCode::Internal => Self::Failed,
        }
    }
}

/// Why the command failed, in words and as a status.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) exit: Exit,
    message: String,
}

impl Failure {
    pub(super) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    /// Something on this machine failed.
    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    /// Writes the message to the standard error.
    pub(super) fn print(&self) {
        complain(&self.message);
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let exit = match &error {
            ClientError::NotRunning { .. } | ClientError::Denied { .. } => Exit::Unreachable,
            ClientError::Broken { .. } | ClientError::Strange { .. } => Exit::Failed,
            ClientError::Api(ApiError { code, .. }) => (*code).into(),
        };
        Self::new(exit, error.to_string())
    }
}

/// Writes a message to the standard error, as this command's.
pub(super) fn complain(message: &str) {
    let text = super::output::clean(message).replace('\n', "\n        ");
    // Where nobody reads there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "netctl: {text}");
}

/// Gathers the failures of several things: each is told at once, the first decides the status.
#[derive(Debug)]
pub(super) struct Tally(Exit);

impl Tally {
    pub(super) fn new() -> Self {
        Self(Exit::Done)
    }

    /// Takes a result; a failure is printed and kept.
    pub(super) fn take<T>(&mut self, result: Result<T, impl Into<Failure>>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(failure) => {
                let failure = failure.into();
                failure.print();
                if self.0 == Exit::Done {
                    self.0 = failure.exit;
                }
                None
            }
        }
    }

    /// The status of it all.
    pub(super) fn exit(self) -> ExitCode {
        self.0.into()
    }
}
