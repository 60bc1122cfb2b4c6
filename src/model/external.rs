//! Targets of a service that are outside of the overlay.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{EndpointMode, Protocol, ServicePort, ServiceSpec, subnet};

/// The most external targets of a service.
pub const MAX_EXTERNAL: usize = 64;

/// Why something cannot be a service's target outside.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExternalError {
    /// A text that is no address.
    #[error(
        "external target {0:?} is no address: give the address that it has, such as 192.0.2.10, \
         192.0.2.10:5432 or [2001:db8::10]:5432; host names are not looked up"
    )]
    NoAddress(String),
    /// The port number 0.
    #[error("external target {0} has port 0: give 1 to 65535, or none")]
    Zero(IpAddr),
    /// An address that no host outside has.
    #[error(
        "external target {external} is of {range} ({purpose}): give the address of a host outside of \
         the overlay"
    )]
    Special {
        /// The target.
        external: External,
        /// The range.
        range: IpNetwork,
        /// What the range is for.
        purpose: &'static str,
    },
    /// A target that is listed twice.
    #[error("external target {0} is given twice, or is there already: give it once")]
    Twice(External),
    /// An address that is listed with a port and without.
    #[error("external target {0} is given with a port and without: choose one")]
    Both(IpAddr),
    /// More targets than a service can have.
    #[error("{0} external targets are too many: give at most {MAX_EXTERNAL}")]
    TooMany(usize),
    /// A target to remove that the service does not have.
    #[error("there is no external target {missing} to remove; there is {present}")]
    Missing {
        /// What was to be removed.
        missing: External,
        /// Those that there are, as text.
        present: String,
    },
    /// Ports of several targets, and none of the service.
    #[error(
        "the external targets have different ports, {0} and {1}: say which port the service has \
         (--port)"
    )]
    WhichPort(u16, u16),
    /// A target with a port, of a service that does not have exactly one.
    #[error(
        "external target {external} has a port, and the service {ports}: give the target without a port, \
         {address}, so that each port leads to its own target, or have the service one port (--port)"
    )]
    Ports {
        /// The target.
        external: External,
        /// Its address.
        address: IpAddr,
        /// What ports the service has, for people.
        ports: String,
    },
    /// A target with a port, of a service that tells its clients addresses only.
    #[error(
        "external target {external} has a port, and with dnsrr clients are told addresses only: give it \
         without a port, {address}, or make the service with --endpoint-mode vip"
    )]
    Told {
        /// The target.
        external: External,
        /// Its address.
        address: IpAddr,
    },
}

/// A target of a service outside of the overlay. As text: `ADDRESS[:PORT]`, an IPv6 address with a
/// port in brackets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct External {
    /// Its address.
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// Its port; `null`: the target of each of the service's ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

impl fmt::Display for External {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => SocketAddr::new(self.address, port).fmt(f),
            None => self.address.fmt(f),
        }
    }
}

impl FromStr for External {
    type Err = ExternalError;

    fn from_str(text: &str) -> Result<Self, ExternalError> {
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        let bare = bare.filter(|text| text.contains(':')).unwrap_or(text);
        if let Ok(address) = bare.parse() {
            return Ok(Self { address, port: None });
        }
        match text.parse::<SocketAddr>() {
            Ok(at) if at.port() == 0 => Err(ExternalError::Zero(at.ip())),
            Ok(at) => Ok(Self { address: at.ip(), port: Some(at.port()) }),
            Err(_) => Err(ExternalError::NoAddress(text.chars().take(80).collect())),
        }
    }
}

impl External {
    /// Whether connections to this port of its address are connections to it.
    pub fn is_at(&self, at: SocketAddr) -> bool {
        self.address == at.ip() && self.port.is_none_or(|port| port == at.port())
    }
}

/// Checks a service's targets outside by themselves and with its ports.
///
/// # Errors
/// Says which cannot be used, and what could.
pub fn check(
    external: &[External],
    mode: EndpointMode,
    ports: &[ServicePort],
) -> Result<(), ExternalError> {
    if external.len() > MAX_EXTERNAL {
        return Err(ExternalError::TooMany(external.len()));
    }
    let (mut seen, mut bare) = (BTreeSet::new(), BTreeSet::new());
    for &target in external {
        let External { address, port } = target;
        if port == Some(0) {
            return Err(ExternalError::Zero(address));
        }
        if let Some((range, purpose)) = subnet::special(address) {
            return Err(ExternalError::Special { external: target, range, purpose });
        }
        if !seen.insert(target) {
            return Err(ExternalError::Twice(target));
        }
        bare.extend(port.is_none().then_some(address));
        if port.is_none() {
            continue;
        }
        if mode == EndpointMode::Dnsrr {
            return Err(ExternalError::Told { external: target, address });
        }
        if ports.len() != 1 {
            let ports = match ports.len() {
                0 => "takes connections to all ports".to_owned(),
                many => format!("has {many} ports"),
            };
            return Err(ExternalError::Ports { external: target, address, ports });
        }
    }
    match external.iter().find(|target| target.port.is_some() && bare.contains(&target.address)) {
        Some(target) => Err(ExternalError::Both(target.address)),
        None => Ok(()),
    }
}

impl ServiceSpec {
    /// The same, with the port that its targets outside give it where it has none.
    ///
    /// # Errors
    /// When they have different ones, or cannot be its targets.
    pub fn settled(&self) -> Result<Self, ExternalError> {
        let mut spec = self.clone();
        let ports = self.external.iter().filter_map(|external| external.port);
        let ports: BTreeSet<u16> = ports.filter(|port| *port != 0).collect();
        if let (Some(&port), Some(&other)) = (ports.first(), ports.last())
            && spec.balancing.ports.is_empty()
            && spec.endpoint_mode == EndpointMode::Vip
        {
            if port != other {
                return Err(ExternalError::WhichPort(port, other));
            }
            let protocol = Protocol::Tcp;
            spec.balancing.ports = vec![ServicePort { name: None, protocol, port, target: port }];
        }
        check(&spec.external, spec.endpoint_mode, &spec.balancing.ports)?;
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn external(text: &str) -> External {
        text.parse().unwrap()
    }

    fn checked(texts: &[&str], mode: EndpointMode, ports: &[&str]) -> Result<(), ExternalError> {
        let texts: Vec<External> = texts.iter().map(|text| external(text)).collect();
        let ports: Vec<ServicePort> = ports.iter().map(|text| text.parse().unwrap()).collect();
        check(&texts, mode, &ports)
    }

    #[test]
    fn a_target_is_an_address_with_or_without_a_port() {
        for (text, port) in [
            ("192.0.2.10", None),
            ("192.0.2.10:5432", Some(5432)),
            ("2001:db8::10", None),
            ("[2001:db8::10]:5432", Some(5432)),
        ] {
            let target = external(text);
            assert_eq!((target.port, target.to_string().as_str()), (port, text));
            let json = serde_json::to_string(&target).unwrap();
            assert_eq!(serde_json::from_str::<External>(&json).unwrap(), target);
        }
        assert_eq!(external("[2001:db8::10]").to_string(), "2001:db8::10");
        assert_eq!("192.0.2.10:0".parse::<External>().unwrap_err().to_string(), {
            "external target 192.0.2.10 has port 0: give 1 to 65535, or none"
        });
        for text in
            ["", "db.example.org", "db.example.org:5432", "192.0.2.10:", "[192.0.2.10]", "192.0.2.0/24"]
        {
            let error = text.parse::<External>().unwrap_err().to_string();
            assert!(error.contains("host names are not looked up"), "{text}: {error}");
        }
    }

    #[test]
    fn addresses_that_nobody_outside_has_are_refused() {
        for address in [
            "0.0.0.0",
            "127.0.0.1",
            "169.254.169.254",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:192.0.2.10",
            "fe80::1",
            "ff02::1",
            "fd6e:6574:6374:6c00::7",
        ] {
            let error = checked(&[address], EndpointMode::Vip, &[]).unwrap_err();
            assert!(matches!(error, ExternalError::Special { .. }), "{address}: {error}");
        }
    }

    #[test]
    fn duplicates_and_too_many_are_refused() {
        let vip = EndpointMode::Vip;
        checked(&["192.0.2.10:1", "192.0.2.10:2"], vip, &["80"]).unwrap();
        let twice = external("192.0.2.10");
        assert_eq!(
            checked(&["192.0.2.10", "192.0.2.11", "192.0.2.10"], vip, &[]),
            Err(ExternalError::Twice(twice))
        );
        let both = Err(ExternalError::Both(twice.address));
        assert_eq!(checked(&["192.0.2.10", "192.0.2.10:5432"], vip, &["5432"]), both);
        let many: Vec<String> = (1..=65).map(|n| format!("192.0.2.{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(checked(&many, vip, &[]), Err(ExternalError::TooMany(65)));
        checked(&many[1..], vip, &[]).unwrap();
    }

    #[test]
    fn a_target_with_a_port_needs_a_service_with_one_port() {
        let vip = EndpointMode::Vip;
        let with = ["192.0.2.10:5432"];
        checked(&with, vip, &["80:8080"]).unwrap();
        checked(&with, vip, &["53/udp"]).unwrap();
        for (ports, words) in [(&[][..], "takes connections to all ports"), (&["1", "2"], "has 2 ports")]
        {
            let error = checked(&with, vip, ports).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("192.0.2.10, so that"), "{error}");
            checked(&["192.0.2.10"], vip, ports).unwrap();
        }
        let told = checked(&with, EndpointMode::Dnsrr, &["sql=5432"]).unwrap_err();
        assert!(matches!(told, ExternalError::Told { .. }), "{told}");
        checked(&["192.0.2.10"], EndpointMode::Dnsrr, &["sql=5432"]).unwrap();
    }

    #[test]
    fn a_service_without_ports_has_that_of_its_targets() {
        let settled = |mode: &str, ports: &[&str], texts: &[&str]| {
            let targets: Vec<External> = texts.iter().map(|text| external(text)).collect();
            let ports: Vec<ServicePort> = ports.iter().map(|text| text.parse().unwrap()).collect();
            let spec: ServiceSpec = serde_json::from_value(json!({
                "name": "db", "networks": ["shop"], "replicas": 0, "endpoint_mode": mode,
                "external": targets, "balancing": {"ports": ports},
            }))
            .unwrap();
            let ports = spec.settled()?.balancing.ports;
            Ok(ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        for (ports, texts, expected) in [
            (&[][..], &["192.0.2.10:5432"][..], "5432:5432/tcp"),
            (&[], &["192.0.2.10:5432", "[2001:db8::10]:5432", "192.0.2.11"], "5432:5432/tcp"),
            (&["1:2"], &["192.0.2.10:5432", "192.0.2.11:5433"], "1:2/tcp"),
            (&[], &["192.0.2.10"], ""),
            (&[], &[], ""),
        ] {
            assert_eq!(settled("vip", ports, texts).as_deref(), Ok(expected));
        }
        let which = settled("vip", &[], &["192.0.2.10:5432", "192.0.2.11:5433"]);
        assert_eq!(which, Err(ExternalError::WhichPort(5432, 5433)));
        assert!(matches!(settled("dnsrr", &[], &["192.0.2.10:5432"]), Err(ExternalError::Told { .. })));
        let zero = json!({"name": "db", "networks": ["shop"], "replicas": 0, "external": [{
            "address": "192.0.2.10", "port": 0,
        }]});
        let zero: ServiceSpec = serde_json::from_value(zero).unwrap();
        assert!(matches!(zero.settled(), Err(ExternalError::Zero(_))));
    }

    #[test]
    fn what_goes_to_a_target_is_known_by_its_address_and_port() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert!(external("192.0.2.10").is_at(at("192.0.2.10:80")));
        assert!(external("192.0.2.10:80").is_at(at("192.0.2.10:80")));
        assert!(!external("192.0.2.10:81").is_at(at("192.0.2.10:80")));
        assert!(!external("192.0.2.10").is_at(at("192.0.2.11:80")));
    }
}
