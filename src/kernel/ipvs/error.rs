//! What can go wrong, and what an error number of the kernel's means here.
//!
//! The meanings are those of net/netfilter/ipvs/ip_vs_ctl.c, Linux 6.1.

use std::fmt;
use std::io;

use netlink_packet_core::DecodeError;
use nix::errno::Errno;

use super::super::netlink::NetlinkError;
use super::change::Change;
use super::service::{Netmask, ServiceKey};

/// A request to IPVS that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel was built without IPVS, or its module could not be loaded.
    #[error("this kernel has no IPVS: load the module ip_vs, or use a kernel that has it")]
    NoIpvs,
    /// No netlink socket could be opened.
    #[error("cannot open a netlink socket for IPVS: {0}")]
    Socket(#[source] io::Error),
    /// The request makes no sense and was not sent.
    #[error("cannot {request}: {problem}")]
    Invalid {
        /// What was asked for.
        request: Request,
        /// What is wrong with it.
        problem: Problem,
    },
    /// The kernel refused.
    #[error("cannot {request}: {reason} ({source})")]
    Refused {
        /// What was asked for.
        request: Request,
        /// What the kernel's answer means.
        reason: Reason,
        /// The kernel's answer.
        source: NetlinkError,
    },
    /// The kernel's answer was not understood.
    #[error("cannot {request}: the kernel's answer is malformed: {source}")]
    Malformed {
        /// What was asked for.
        request: Request,
        /// What is wrong with the answer.
        source: DecodeError,
    },
}

impl Error {
    /// Why the kernel refused, where it did.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Refused { reason, .. } => Some(*reason),
            _ => None,
        }
    }

    /// For `map_err`: the kernel refused a request.
    pub(super) fn refused(request: impl Into<Request>) -> impl FnOnce(NetlinkError) -> Self {
        let request = request.into();
        move |source| Self::Refused { reason: Reason::of(&request, source.errno), request, source }
    }

    /// For `map_err`: the answer to a request was not understood.
    pub(super) fn malformed(request: impl Into<Request>) -> impl FnOnce(DecodeError) -> Self {
        let request = request.into();
        move |source| Self::Malformed { request, source }
    }
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The number of the family.
    Family,
    /// A change.
    Change(Box<Change>),
    /// One service.
    Service(ServiceKey),
    /// All services.
    Services,
    /// The destinations of a service.
    Destinations(ServiceKey),
    /// The timeouts.
    Timeouts,
    /// Other timeouts.
    SetTimeouts,
    /// Its version and sizes.
    Info,
}

impl From<Change> for Request {
    fn from(change: Change) -> Self {
        Self::Change(Box::new(change))
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Family => f.write_str("find IPVS among the kernel's netlink families"),
            Self::Change(change) => change.fmt(f),
            Self::Service(key) => write!(f, "read the service {key}"),
            Self::Services => f.write_str("read the services"),
            Self::Destinations(key) => write!(f, "read the destinations of the service {key}"),
            Self::Timeouts => f.write_str("read the timeouts of IPVS"),
            Self::SetTimeouts => f.write_str("set the timeouts of IPVS"),
            Self::Info => f.write_str("read the version of IPVS"),
        }
    }
}

/// What is wrong with a request that was not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A service for every port must be persistent: the kernel takes it, and then drops its packets.
    #[error("a service with port 0, which means every port, must be persistent")]
    PortZero,
    /// The netmask is of another family than the service, or no prefix length.
    #[error("{0:?} is no netmask of the service's family")]
    Netmask(Netmask),
    /// The name of a scheduler or of a persistence engine is empty or too long.
    #[error("{0:?} is no name of a scheduler or persistence engine: it has 1 to 15 bytes")]
    Name(String),
    /// Not every kernel takes such a threshold.
    #[error("an upper threshold of {0} connections is above 2147483647")]
    Threshold(u32),
}

/// Why the kernel refused a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// `ESRCH`.
    #[error("there is no such service")]
    NoService,
    /// `EEXIST` to an added service.
    #[error("there is such a service already")]
    ServiceExists,
    /// `ENOENT` to a changed or removed destination.
    #[error("the service has no such destination")]
    NoDestination,
    /// `EEXIST` to an added destination.
    #[error("the service has this destination already")]
    DestinationExists,
    /// `ENOENT` to an added or changed service.
    #[error("the kernel has no such scheduler: its module ip_vs_<name> is missing")]
    NoScheduler,
    /// `ENOENT` to an added or changed service that has a persistence engine: one of the two.
    #[error(
        "the kernel has no such scheduler or no such persistence engine: \
         its module ip_vs_<name> or ip_vs_pe_<name> is missing"
    )]
    NoSchedulerOrEngine,
    /// `EAFNOSUPPORT`: IPv6 is not compiled in, or switched off at boot.
    #[error("the kernel does not have this address family")]
    NoFamily,
    /// `ERANGE` to a destination.
    #[error("the weight is above 2147483647, or the lower threshold above the upper one")]
    OutOfRange,
    /// `EINVAL` to a destination.
    #[error(
        "its address is not a unicast address that is routed, or of another family than the service's \
         without a tunnel, or the tunnel's port is out of range"
    )]
    DestinationNotAccepted,
    /// `EINVAL` to timeouts.
    #[error("a timeout is too long: the kernel counts its ticks in 31 bits")]
    TimeoutNotAccepted,
    /// `EPERM`.
    #[error("this needs CAP_NET_ADMIN in the first user namespace")]
    NotPermitted,
    /// Another error, by its number alone.
    #[error("the kernel refused")]
    Other,
}

impl Reason {
    fn of(request: &Request, errno: Errno) -> Self {
        let change = match request {
            Request::Change(change) => Some(&**change),
            _ => None,
        };
        let of_service = match change {
            Some(Change::AddService(service) | Change::EditService { service, .. }) => Some(service),
            _ => None,
        };
        let of_destination = matches!(
            change,
            Some(
                Change::AddDestination { .. }
                    | Change::EditDestination { .. }
                    | Change::DeleteDestination { .. }
            )
        );
        match errno {
            Errno::EPERM => Self::NotPermitted,
            Errno::ESRCH => Self::NoService,
            Errno::EAFNOSUPPORT => Self::NoFamily,
            Errno::EEXIST if of_service.is_some() => Self::ServiceExists,
            Errno::EEXIST if of_destination => Self::DestinationExists,
            Errno::ENOENT if of_destination => Self::NoDestination,
            Errno::ENOENT if of_service.is_some_and(|service| service.engine.is_some()) => {
                Self::NoSchedulerOrEngine
            }
            Errno::ENOENT if of_service.is_some() => Self::NoScheduler,
            Errno::ERANGE if of_destination => Self::OutOfRange,
            Errno::EINVAL if of_destination => Self::DestinationNotAccepted,
            Errno::EINVAL if *request == Request::SetTimeouts => Self::TimeoutNotAccepted,
            _ => Self::Other,
        }
    }
}
