//! How a service's connections are spread over its endpoints.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ExternalError, Name, PortKey};

/// The most ports of a service.
pub const MAX_PORTS: usize = 128;
/// The longest time that may be given, in seconds: a day.
pub const MAX_SECONDS: u32 = 86_400;

/// Why connections cannot be spread as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BalancingError {
    /// The port number 0.
    #[error("port {0} has a 0: give 1 to 65535")]
    Zero(ServicePort),
    /// A port that is listed twice.
    #[error("port {port}/{protocol} is given twice")]
    Twice {
        /// The port of the service.
        port: u16,
        /// Its protocol.
        protocol: Protocol,
    },
    /// A name that two ports of a protocol have.
    #[error("port name {0} is given twice")]
    NameTwice(Name),
    /// More ports than a service can have.
    #[error("{0} ports are too many: give at most {MAX_PORTS}, or none for all")]
    TooMany(usize),
    /// A time out of bounds.
    #[error("{what} of {seconds} s cannot be used: give 1 s to 1 day")]
    Time {
        /// Which time.
        what: &'static str,
        /// Its value.
        seconds: u32,
    },
    /// A port to remove that the service does not have.
    #[error("there is no port {0} to remove: `netctl service inspect` shows those that there are")]
    NoPort(PortKey),
    /// A service whose last port is removed would have all.
    #[error(
        "no port would be left, and a service without ports takes connections to all: give another \
         port (--port), or say so (--all-ports)"
    )]
    LastPort,
    /// Something and its contrary.
    #[error("{0} are asked for at once: choose one")]
    Both(&'static str),
    /// A health check without a test.
    #[error("a health check needs a test: give --health-tcp, --health-http or --health-cmd")]
    NoTest,
    /// A target outside that cannot be used.
    #[error(transparent)]
    External(#[from] ExternalError),
    /// A text that is none of the choices.
    #[error("{what} {text:?} is unknown: give {choices}")]
    Unknown {
        /// What the text should be.
        what: &'static str,
        /// The text.
        text: String,
        /// What it can be.
        choices: &'static str,
    },
}

/// Which endpoint gets a new connection (ipvsadm(8), "SCHEDULING METHODS").
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Scheduler {
    /// One after the other.
    #[default]
    Rr,
    /// One after the other, as often as its weight says.
    Wrr,
    /// The one with the fewest connections.
    Lc,
    /// The one with the fewest connections for its weight.
    Wlc,
    /// By a hash of the client's address, in a table that changes with the endpoints.
    Sh,
    /// By a hash of the client's address, of which little changes with the endpoints (Maglev).
    Mh,
}

impl Scheduler {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rr => "rr",
            Self::Wrr => "wrr",
            Self::Lc => "lc",
            Self::Wlc => "wlc",
            Self::Sh => "sh",
            Self::Mh => "mh",
        }
    }
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Scheduler {
    type Err = BalancingError;

    fn from_str(text: &str) -> Result<Self, BalancingError> {
        let all = [Self::Rr, Self::Wrr, Self::Lc, Self::Wlc, Self::Sh, Self::Mh];
        all.into_iter().find(|scheduler| scheduler.as_str() == text).ok_or(BalancingError::Unknown {
            what: "scheduler",
            text: text.chars().take(40).collect(),
            choices: "rr, wrr, lc, wlc, sh or mh",
        })
    }
}

/// A transport protocol that can be balanced.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// A port of a service, and the one of its endpoints to which it leads. As text:
/// `[NAME=]PORT[:TARGET][/PROTOCOL]`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ServicePort {
    /// What it is for: its number is found by that (`_http._tcp.web`, RFC 2782).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// The protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// The port at the service's address.
    pub port: u16,
    /// The port of the endpoints.
    pub target: u16,
}

impl fmt::Display for ServicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = &self.name {
            write!(f, "{name}=")?;
        }
        write!(f, "{}:{}/{}", self.port, self.target, self.protocol)
    }
}

impl FromStr for ServicePort {
    type Err = BalancingError;

    fn from_str(text: &str) -> Result<Self, BalancingError> {
        let unknown = |choices| BalancingError::Unknown {
            what: "port",
            text: text.chars().take(40).collect(),
            choices,
        };
        let (name, rest) = match text.split_once('=') {
            Some((name, rest)) => {
                let name = name.parse().map_err(|_| unknown("NAME=PORT, with a name such as http"))?;
                (Some(name), rest)
            }
            None => (None, text),
        };
        let (ports, protocol) = rest.split_once('/').unwrap_or((rest, "tcp"));
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => return Err(unknown("PORT[:TARGET]/tcp, /udp or /sctp")),
        };
        let number = |text: &str| {
            text.parse().map_err(|_| unknown("[NAME=]PORT[:TARGET][/PROTOCOL], 1 to 65535"))
        };
        let (port, target) = ports.split_once(':').unwrap_or((ports, ports));
        let port = Self { name, protocol, port: number(port)?, target: number(target)? };
        if port.port == 0 || port.target == 0 {
            return Err(BalancingError::Zero(port));
        }
        Ok(port)
    }
}

/// After which silence an entry for a connection goes, in seconds. A network has one of each: the
/// longest that any of its services asks for. What none asks for is as the kernel has it: 900, 120
/// and 300.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Timeouts {
    /// Of an established TCP connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<u32>,
    /// Of a TCP connection that one side has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_fin: Option<u32>,
    /// Of UDP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub udp: Option<u32>,
}

/// Which endpoints are preferred, as long as any of them is ready. As text: `node` or `label=KEY`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Prefer {
    /// Those on the client's node.
    Node,
    /// Those on nodes whose label of this name has the value that the client's node has.
    Label(String),
}

impl fmt::Display for Prefer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node => f.write_str("node"),
            Self::Label(key) => write!(f, "label={key}"),
        }
    }
}

impl FromStr for Prefer {
    type Err = BalancingError;

    fn from_str(text: &str) -> Result<Self, BalancingError> {
        match text.split_once('=') {
            None if text == "node" => Ok(Self::Node),
            Some(("label", key)) if !key.is_empty() && key.len() <= 253 => {
                Ok(Self::Label(key.to_owned()))
            }
            _ => Err(BalancingError::Unknown {
                what: "preference",
                text: text.chars().take(40).collect(),
                choices: "node or label=KEY",
            }),
        }
    }
}

impl TryFrom<String> for Prefer {
    type Error = BalancingError;

    fn try_from(text: String) -> Result<Self, BalancingError> {
        text.parse()
    }
}

impl From<Prefer> for String {
    fn from(prefer: Prefer) -> Self {
        prefer.to_string()
    }
}

/// How a service's connections are spread over its endpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Balancing {
    /// Which endpoint gets a new connection.
    #[serde(default)]
    pub scheduler: Scheduler,
    /// For how many seconds a client keeps its endpoint after its last connection; `null`: each
    /// connection is for itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<u32>,
    /// Its ports; none: every port leads to the same one of an endpoint.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ServicePort>,
    /// After which silence an entry for a connection goes.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// Which endpoints are preferred.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub prefer: Option<Prefer>,
}

impl Balancing {
    /// Checks what the types do not.
    ///
    /// # Errors
    /// Says which value cannot be used.
    pub fn check(&self) -> Result<(), BalancingError> {
        if self.ports.len() > MAX_PORTS {
            return Err(BalancingError::TooMany(self.ports.len()));
        }
        let (mut seen, mut names) = (BTreeSet::new(), BTreeSet::new());
        for port in &self.ports {
            if port.port == 0 || port.target == 0 {
                return Err(BalancingError::Zero(port.clone()));
            }
            if let Some(name) = &port.name
                && !names.insert((port.protocol, name))
            {
                return Err(BalancingError::NameTwice(name.clone()));
            }
            if !seen.insert((port.protocol, port.port)) {
                return Err(BalancingError::Twice { port: port.port, protocol: port.protocol });
            }
        }
        let Timeouts { tcp, tcp_fin, udp } = self.timeouts;
        for (what, seconds) in [
            ("an affinity", self.affinity),
            ("a TCP timeout", tcp),
            ("a TCP timeout after FIN", tcp_fin),
            ("a UDP timeout", udp),
        ] {
            check_seconds(what, seconds)?;
        }
        Ok(())
    }
}

/// Refuses a time that is 0 or longer than a day.
pub(super) fn check_seconds(what: &'static str, seconds: Option<u32>) -> Result<(), BalancingError> {
    match seconds {
        Some(seconds) if !(1..=MAX_SECONDS).contains(&seconds) => {
            Err(BalancingError::Time { what, seconds })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_and_written() {
        for (text, shown) in [
            ("80", "80:80/tcp"),
            ("80:8080", "80:8080/tcp"),
            ("53/udp", "53:53/udp"),
            ("53:5353/sctp", "53:5353/sctp"),
            ("http=80:8080", "http=80:8080/tcp"),
        ] {
            assert_eq!(text.parse::<ServicePort>().unwrap().to_string(), shown);
        }
        for text in [
            "",
            "0",
            "80:0",
            "65536",
            "80/icmp",
            "80:",
            ":80",
            "-1",
            "80:90:100",
            "80/tcp/udp",
            "=80",
            "HTTP=80",
            "a=b=80",
        ] {
            assert!(text.parse::<ServicePort>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let port = |text: &str| text.parse().unwrap();
        let good =
            Balancing { ports: vec![port("80"), port("80/udp"), port("81:80")], ..Balancing::default() };
        good.check().unwrap();
        let twice = Balancing { ports: vec![port("80"), port("80:81")], ..Balancing::default() };
        assert!(matches!(twice.check(), Err(BalancingError::Twice { port: 80, .. })));
        let named =
            |texts: [&str; 2]| Balancing { ports: texts.map(port).into(), ..Balancing::default() };
        named(["dns=53", "dns=53/udp"]).check().unwrap();
        let twice = named(["http=80", "http=81"]);
        assert!(matches!(twice.check(), Err(BalancingError::NameTwice(_))));
        let zero = ServicePort { name: None, protocol: Protocol::Tcp, port: 80, target: 0 };
        let zero = Balancing { ports: vec![zero], ..Balancing::default() };
        assert!(matches!(zero.check(), Err(BalancingError::Zero(_))));
        let many = Balancing {
            ports: (1..=129).map(|n: u16| port(&n.to_string())).collect(),
            ..Balancing::default()
        };
        assert!(matches!(many.check(), Err(BalancingError::TooMany(129))));
        for seconds in [0, MAX_SECONDS + 1] {
            let affinity = Balancing { affinity: Some(seconds), ..Balancing::default() };
            assert!(matches!(affinity.check(), Err(BalancingError::Time { .. })));
        }
    }

    #[test]
    fn a_preference_is_a_node_or_a_label() {
        assert_eq!("node".parse(), Ok(Prefer::Node));
        assert_eq!("label=zone".parse(), Ok(Prefer::Label("zone".to_owned())));
        for text in ["", "zone", "label=", "label", "Node"] {
            assert!(text.parse::<Prefer>().is_err(), "{text}");
        }
        let json = serde_json::to_string(&Prefer::Label("zone".to_owned())).unwrap();
        assert_eq!(json, "\"label=zone\"");
        assert!(serde_json::from_str::<Prefer>("\"x\"").is_err());
    }
}
