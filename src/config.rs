//! The agent's configuration: from flags, the environment and a file, checked once.
//!
//! A flag wins over the environment, the environment over the file, the file over the default. All
//! that is wrong is reported at once, each with the place it came from. What a [`Config`] holds
//! can be used as it is.

mod check;
mod dns;
pub mod duration;
mod flags;
mod print;
mod source;
mod store;
pub mod underlay;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::IpNetwork;
use nix::unistd::{Gid, Uid};

use crate::dns::DomainName;
use crate::model::{NodeName, Vni};

pub use flags::Flags;
pub use underlay::Underlay;

/// The file that is read when none is named; it may be missing.
pub const DEFAULT_FILE: &str = "/etc/netctl/netctld.toml";

/// The agent's configuration, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// This node's name, unique in the cluster.
    pub node: NodeName,
    /// What must outlive a reboot.
    pub state_dir: PathBuf,
    /// What need not.
    pub run_dir: PathBuf,
    /// The API's socket.
    pub socket: PathBuf,
    /// Who beside root may use the socket.
    pub socket_group: Option<SocketGroup>,
    /// Where the metrics are served over TCP; `None`: on the API's socket only.
    pub metrics: Option<SocketAddr>,
    /// Which address the tunnels use; `None`: the only one there is.
    pub underlay: Option<Underlay>,
    /// The UDP port of the tunnels.
    pub tunnel_port: u16,
    /// Where networks get IPv4 subnets from when none is asked for. They do not overlap.
    pub pools: Vec<IpNetwork>,
    /// The prefix length of those subnets.
    pub pool_prefix: u8,
    /// The same for IPv6.
    pub pools6: Vec<IpNetwork>,
    /// The prefix length of IPv6 subnets.
    pub pool6_prefix: u8,
    /// The lowest VNI that is given out.
    pub vni_first: Vni,
    /// The highest; not below the lowest.
    pub vni_last: Vni,
    /// How long this node counts as alive without a sign of it; whole seconds.
    pub lease: Duration,
    /// How long an address rests after its release.
    pub rest: Duration,
    /// How many per cent of a network's addresses may be used before that is told.
    pub address_warning: u8,
    /// The same, before it is told as urgent.
    pub address_alarm: u8,
    /// How often kernel and desired state are compared without a cause.
    pub resync: Duration,
    /// How services are balanced.
    pub lb: LbConfig,
    /// As whom the commands of health checks run.
    pub health_user: HealthUser,
    /// The filter of the log, as `tracing_subscriber::EnvFilter` reads it.
    pub log: String,
    /// The form of the log's lines.
    pub log_format: LogFormat,
    /// Free text by key, shown with the node.
    pub labels: BTreeMap<String, String>,
    /// How names are answered.
    pub dns: DnsConfig,
    /// Where the cluster's state is.
    pub store: StoreConfig,
}

/// How services are balanced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LbConfig {
    /// What is to balance them.
    pub engine: EngineChoice,
    /// How many connections eBPF balances at once.
    pub connections: u32,
    /// Whether eBPF carries packets between containers past the stack.
    pub fast_path: bool,
    /// Whether eBPF has containers' sockets asked for services.
    pub sockets: bool,
    /// The control group whose sockets these are; `None`: all.
    pub cgroup: Option<PathBuf>,
}

/// How names are answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsConfig {
    /// What all names of ours are below of.
    pub domain: DomainName,
    /// For how long clients may keep an answer; whole seconds.
    pub ttl: Duration,
    /// A link-local address at which every network answers, beside its gateways.
    pub address: Option<Ipv4Addr>,
    /// A loopback address at which the host itself finds names of ours; `None`: it finds none.
    pub host: Option<IpAddr>,
    /// How many packets of one client are taken a second; 0: all.
    pub rate: u32,
    /// Who is asked for all other names; none: whom the host asks.
    pub upstreams: Vec<SocketAddr>,
    /// Who is asked for names below a domain.
    pub forward: BTreeMap<DomainName, Vec<SocketAddr>>,
}

/// The group that may use the API's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketGroup {
    /// As it was given: a name or a number.
    pub name: String,
    /// The group's number on this machine.
    pub gid: Gid,
}

/// The user as whom the commands of health checks run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthUser {
    /// As it was given: a name or a number.
    pub name: String,
    /// The user's number on this machine.
    pub uid: Uid,
    /// The number of the user's first group; of no other one are the commands.
    pub gid: Gid,
}

/// The form of the log's lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// What is to balance the connections of services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineChoice {
    /// IPVS where the kernel has it.
    Auto,
    /// IPVS; the agent does not start without it.
    Ipvs,
    /// eBPF programs; the agent does not start where the kernel takes none.
    Ebpf,
    /// Nothing: services keep their addresses, and nothing answers there on this node.
    None,
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Ipvs => "ipvs",
            Self::Ebpf => "ebpf",
            Self::None => "none",
        })
    }
}

/// Where the cluster's state is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreConfig {
    /// In a file of this machine: a cluster of one.
    Embedded {
        /// The file.
        path: PathBuf,
    },
    /// In an etcd cluster.
    Etcd(EtcdConfig),
}

/// How etcd is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// URLs, at least one; all `http` or all `https`.
    pub endpoints: Vec<String>,
    /// What our keys begin with; ends with `/`.
    pub prefix: String,
    /// The CA that the servers' certificates must be from, in PEM.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key, in PEM.
    pub identity: Option<Identity>,
    /// Our user, and the file that has its password.
    pub login: Option<Login>,
    /// How long a call may take.
    pub timeout: Duration,
}

/// A certificate and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The certificate's file.
    pub cert: PathBuf,
    /// The key's file.
    pub key: PathBuf,
}

/// A user and its password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// The user.
    pub user: String,
    /// The file whose first line is the password.
    pub password_file: PathBuf,
}

/// One thing that is wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where it was given: `FILE:LINE` and key, a flag or a variable.
    pub source: String,
    /// What is wrong, and what could be given.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.source, self.message)
    }
}

/// All that is wrong with the configuration, one problem a line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n"))]
pub struct ConfigError(pub Vec<Problem>);

impl Config {
    /// Reads and checks the configuration. `environment` is the process's (`std::env::vars_os()`).
    ///
    /// # Errors
    /// Everything that is wrong, at once.
    pub fn load(
        flags: &Flags,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        let settings = source::gather(flags, environment, &mut problems);
        let config = check::check(settings, &mut problems);
        match config {
            Some(config) if problems.is_empty() => Ok(config),
            Some(_) | None => Err(ConfigError(problems)),
        }
    }

    /// The whole configuration as a file that gives it again.
    pub fn to_toml(&self) -> String {
        print::print(self)
    }
}
