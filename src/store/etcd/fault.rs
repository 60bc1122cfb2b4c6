//! What an error of etcd's client means: whether the request was done, and what to say of it.

use std::error::Error as _;
use std::io;

use etcd_client::Error;

use crate::store::StoreError;

/// gRPC's status codes that mean something here.
mod code {
    pub(super) const CANCELLED: i32 = 1;
    pub(super) const INVALID_ARGUMENT: i32 = 3;
    pub(super) const DEADLINE_EXCEEDED: i32 = 4;
    pub(super) const PERMISSION_DENIED: i32 = 7;
    pub(super) const UNAVAILABLE: i32 = 14;
    pub(super) const UNAUTHENTICATED: i32 = 16;
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// It was never sent: there is no connection.
    Unsent(String),
    /// It may or may not have been done.
    Unreachable(String),
    /// It was not done: etcd, or its TLS, refuses who we are.
    Denied(String),
    /// The lease does not exist.
    LeaseGone,
    /// The revision is compacted already, or not there yet.
    NoSuchRevision(String),
    /// It was not done, for another reason.
    Failed(String),
}

impl Fault {
    pub(super) fn reason(&self) -> &str {
        match self {
            Self::LeaseGone => "the lease does not exist",
            Self::Unsent(reason)
            | Self::Unreachable(reason)
            | Self::Denied(reason)
            | Self::NoSuchRevision(reason)
            | Self::Failed(reason) => reason,
        }
    }

    /// The same as a store's error; `lease` is the one that the request was about.
    pub(super) fn into_error(self, store: String, lease: Option<i64>) -> StoreError {
        match self {
            Self::Unsent(reason) | Self::Unreachable(reason) => {
                StoreError::Unreachable { store, reason }
            }
            Self::Denied(reason) => StoreError::Denied { store, reason },
            Self::LeaseGone => StoreError::LeaseGone(lease.unwrap_or(0)),
            Self::NoSuchRevision(reason) | Self::Failed(reason) => StoreError::Failed { store, reason },
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        match &error {
            Error::GRpcStatus(status) => match status.source() {
                Some(_) => transport(status),
                None => answer(i32::from(status.code()), status.message()),
            },
            Error::TransportError(error) => transport(error),
            Error::IoError(error) => transport(error),
            // The client's own words for a keep-alive that is answered with no time left.
            Error::LeaseKeepAliveError(_) => Self::LeaseGone,
            // A stream that ended before its first message.
            Error::WatchError(reason) => Self::Unreachable(reason.clone()),
            Error::InvalidArgs(_)
            | Error::InvalidUri(_)
            | Error::Utf8Error(_)
            | Error::ElectError(_)
            | Error::InvalidMetadataValue(_)
            | Error::EndpointError(_)
            | Error::EndpointsNotManaged
            | Error::Internal(_) => Self::Failed(error.to_string()),
        }
    }
}

/// An error that etcd sent.
fn answer(code: i32, message: &str) -> Fault {
    let text = message.strip_prefix("etcdserver: ").unwrap_or(message).to_owned();
    let denied = [
        "authentication failed",
        "user name is empty",
        "revision of auth store is old",
        "invalid auth token",
        "auth: ",
    ];
    match code {
        code::UNAUTHENTICATED | code::PERMISSION_DENIED => Fault::Denied(text),
        code::INVALID_ARGUMENT if denied.iter().any(|start| text.starts_with(start)) => {
            Fault::Denied(text)
        }
        code::CANCELLED | code::DEADLINE_EXCEEDED | code::UNAVAILABLE => Fault::Unreachable(text),
        // It is overloaded, and has done nothing.
        _ if text == "too many requests" => Fault::Unreachable(text),
        _ if text == "requested lease not found" => Fault::LeaseGone,
        _ if text.starts_with("mvcc: required revision") => Fault::NoSuchRevision(text),
        _ => Fault::Failed(text),
    }
}

/// An error of the connection.
fn transport(error: &(dyn std::error::Error + 'static)) -> Fault {
    let (mut reasons, mut unsent) = (Vec::<String>::new(), false);
    let mut next = Some(error);
    while let Some(error) = next {
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        unsent |= matches!(
            kind,
            Some(
                io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkUnreachable
                    | io::ErrorKind::AddrNotAvailable
            )
        );
        let reason = error.to_string();
        if reasons.last().is_none_or(|last| !last.contains(&reason)) {
            reasons.push(reason);
        }
        next = error.source();
    }
    // The last one is the cause; what stands before it is how the layers call it.
    let reason = reasons.pop().unwrap_or_default();
    match unsent {
        _ if reason.contains("received fatal alert") => Fault::Denied(format!("TLS: {reason}")),
        true => Fault::Unsent(reason),
        false => Fault::Unreachable(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_told_from_its_code_and_its_words() {
        let cases = [
            (16, "etcdserver: invalid auth token", "denied"),
            (7, "etcdserver: permission denied", "denied"),
            (3, "etcdserver: authentication failed, invalid user ID or password", "denied"),
            (3, "etcdserver: user name is empty", "denied"),
            (3, "etcdserver: duplicate key given in txn request", "failed"),
            (5, "etcdserver: requested lease not found", "lease"),
            (11, "etcdserver: mvcc: required revision has been compacted", "revision"),
            (11, "etcdserver: mvcc: required revision is a future revision", "revision"),
            (8, "etcdserver: mvcc: database space exceeded", "failed"),
            (14, "etcdserver: no leader", "unreachable"),
            (4, "context deadline exceeded", "unreachable"),
        ];
        for (code, message, kind) in cases {
            let fault = answer(code, message);
            let found = match fault {
                Fault::Denied(_) => "denied",
                Fault::LeaseGone => "lease",
                Fault::NoSuchRevision(_) => "revision",
                Fault::Failed(_) => "failed",
                Fault::Unreachable(_) => "unreachable",
                Fault::Unsent(_) => "unsent",
            };
            assert_eq!(found, kind, "{message}");
        }
    }

    #[test]
    fn only_a_connection_that_was_never_made_is_unsent() {
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        assert!(matches!(transport(&refused), Fault::Unsent(_)));
        let reset = io::Error::from(io::ErrorKind::ConnectionReset);
        assert!(matches!(transport(&reset), Fault::Unreachable(_)));
        let alert = io::Error::other("received fatal alert: BadCertificate");
        assert!(matches!(transport(&alert), Fault::Denied(_)));
    }
}
