//! What can go wrong in the kernel layer.

use std::io;
use std::path::PathBuf;

use super::netlink::NetlinkError;
use crate::model::object::Device;

/// A change or a reading of the kernel's state that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be used.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Path {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A system call failed that concerns no file.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A path leads to something that is not a network namespace.
    #[error("{path} is not a network namespace but {found}: give the path of one, such as /run/netns/NAME", path = path.display())]
    NotNetns {
        /// The path.
        path: PathBuf,
        /// What it is instead.
        found: String,
    },
    /// A path leads to another namespace than the one that was meant.
    #[error("{path} is another namespace than before (inode {found}, not {expected})", path = path.display())]
    Replaced {
        /// The path.
        path: PathBuf,
        /// The inode that was meant.
        expected: u64,
        /// The inode that is there.
        found: u64,
    },
    /// The kernel refused a netlink request.
    #[error("cannot {action} in {namespace}: {source}")]
    Netlink {
        /// What was tried, with the object concerned.
        action: String,
        /// In which namespace.
        namespace: String,
        /// The kernel's answer.
        source: NetlinkError,
    },
    /// The kernel lacks a part that is needed.
    #[error("this kernel has no {what}: {hint}")]
    Unsupported {
        /// What it lacks.
        what: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// Something that is not ours is where our object must go.
    #[error("{netns} has {what} already, which is not this endpoint's: remove it or choose another")]
    Conflict {
        /// What is in the way: an interface or a route.
        what: String,
        /// The namespace in which it is.
        netns: PathBuf,
    },
    /// A device is missing which is not made by adding it to a sandbox.
    #[error("{sandbox} has no {device}: it is made with its other end")]
    NoDevice {
        /// The sandbox.
        sandbox: String,
        /// The device.
        device: Device,
    },
    /// Devices were still there after the time that removing them may take.
    #[error("{count} devices of {sandbox} are still there after {seconds} s")]
    StillThere {
        /// The sandbox.
        sandbox: String,
        /// How many devices.
        count: usize,
        /// How long was waited.
        seconds: u64,
    },
    /// nftables refused a script or did not give an answer.
    #[error("nft failed in {namespace}: {message}")]
    Nft {
        /// In which namespace.
        namespace: String,
        /// What `nft` said.
        message: String,
    },
    /// IPVS refused, or is not there.
    #[error("{sandbox}: {source}")]
    Ipvs {
        /// In which sandbox.
        sandbox: String,
        /// Why.
        source: Box<super::ipvs::Error>,
    },
    /// eBPF refused, or is not there.
    #[error(transparent)]
    Ebpf(Box<super::ebpf::Error>),
    /// The `nft` program is not installed.
    #[error("the program nft was not found: install the package nftables")]
    NftMissing,
    /// The system lacks what the agent needs to work at all.
    #[error("this system cannot run the agent:{}", .0.iter().map(|p| format!("\n  - {p}")).collect::<String>())]
    Probe(Vec<String>),
}

impl From<super::ebpf::Error> for Error {
    fn from(error: super::ebpf::Error) -> Self {
        Self::Ebpf(Box::new(error))
    }
}

impl Error {
    /// Whether a container's namespace does not exist any more: its path leads nowhere, or to
    /// something else.
    pub fn namespace_is_gone(&self) -> bool {
        match self {
            Self::Path { source, .. } => {
                matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
                    || source.raw_os_error() == Some(libc::ESRCH)
            }
            Self::NotNetns { .. } | Self::Replaced { .. } => true,
            _ => false,
        }
    }

    /// Whether this machine lacks something, so that trying again does not help.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Self::Unsupported { .. } | Self::NftMissing | Self::Probe(_))
    }

    /// For `map_err`: IPVS refused in a sandbox.
    pub fn ipvs(sandbox: impl Into<String>) -> impl FnOnce(super::ipvs::Error) -> Self {
        let sandbox = sandbox.into();
        move |source| Self::Ipvs { sandbox, source: Box::new(source) }
    }

    /// For `map_err`: the kernel refused to do `action` in `namespace`.
    pub(super) fn netlink(
        action: impl Into<String>,
        namespace: impl Into<String>,
    ) -> impl FnOnce(NetlinkError) -> Self {
        let (action, namespace) = (action.into(), namespace.into());
        move |source| Self::Netlink { action, namespace, source }
    }

    /// For `map_err`: a system call that should do `action` failed.
    pub(super) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { action, source: source.into() }
    }

    /// For `map_err`: `action` on the file at `path` failed.
    pub(super) fn path<E: Into<io::Error>>(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::Path { action, path, source: source.into() }
    }
}
