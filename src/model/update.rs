//! A change of a service: what is given is changed, all else stays as it is then.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::balancing::{BalancingError, Timeouts};
use super::health::{HealthCheck, HealthTest};
use super::{
    Balancing, External, ExternalError, Prefer, Protocol, Scheduler, Service, ServicePort, UpdateOrder,
    external,
};

/// A port of a service, without where it leads. As text: `PORT[/PROTOCOL]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PortKey {
    /// The protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// The port at the service's address.
    pub port: u16,
}

impl From<&ServicePort> for PortKey {
    fn from(port: &ServicePort) -> Self {
        Self { protocol: port.protocol, port: port.port }
    }
}

impl fmt::Display for PortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.port, self.protocol)
    }
}

impl FromStr for PortKey {
    type Err = BalancingError;

    fn from_str(text: &str) -> Result<Self, BalancingError> {
        match text.parse::<ServicePort>() {
            Ok(port) if !text.contains([':', '=']) => Ok((&port).into()),
            _ => Err(BalancingError::Unknown {
                what: "port",
                text: text.chars().take(40).collect(),
                choices: "PORT[/PROTOCOL], 1 to 65535",
            }),
        }
    }
}

/// Which of a service's timeouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TimeoutKind {
    /// Of an established TCP connection.
    Tcp,
    /// Of a TCP connection that one side has ended.
    TcpFin,
    /// Of UDP.
    Udp,
}

impl FromStr for TimeoutKind {
    type Err = BalancingError;

    fn from_str(text: &str) -> Result<Self, BalancingError> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "tcp-fin" => Ok(Self::TcpFin),
            "udp" => Ok(Self::Udp),
            _ => Err(BalancingError::Unknown {
                what: "timeout",
                text: text.chars().take(40).collect(),
                choices: "tcp, tcp-fin or udp",
            }),
        }
    }
}

impl Timeouts {
    /// Sets one of them; `None`: it is the kernel's.
    pub fn set(&mut self, kind: TimeoutKind, seconds: Option<u32>) {
        match kind {
            TimeoutKind::Tcp => self.tcp = seconds,
            TimeoutKind::TcpFin => self.tcp_fin = seconds,
            TimeoutKind::Udp => self.udp = seconds,
        }
    }
}

/// A change of a health check, or a new one. What is not given stays, or is a new one's default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthUpdate {
    /// What is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<HealthTest>,
    /// Seconds from the end of one check to the next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<u32>,
    /// Seconds after which a check has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u32>,
    /// For how many seconds after the start of an endpoint failures do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_period: Option<u32>,
    /// How many failures in a row make an endpoint unhealthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
}

impl HealthUpdate {
    /// The check that it makes of the one before.
    ///
    /// # Errors
    /// [`BalancingError::NoTest`] when there is neither a test nor a check to change.
    pub fn apply(&self, before: Option<&HealthCheck>) -> Result<HealthCheck, BalancingError> {
        let test = self.test.clone().or_else(|| before.map(|check| check.test.clone()));
        let new = HealthCheck::new(test.ok_or(BalancingError::NoTest)?);
        let before = before.unwrap_or(&new);
        Ok(HealthCheck {
            interval: self.interval.unwrap_or(before.interval),
            timeout: self.timeout.unwrap_or(before.timeout),
            start_period: self.start_period.unwrap_or(before.start_period),
            retries: self.retries.unwrap_or(before.retries),
            test: new.test,
        })
    }
}

/// What a person asks for when changing a service; what is not given stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceUpdate {
    /// How many containers it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
    /// Which endpoint gets a new connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<Scheduler>,
    /// For how many seconds a client keeps its endpoint after its last connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<u32>,
    /// Whether each connection is for itself from now on.
    #[serde(default)]
    pub no_affinity: bool,
    /// Ports to add. One that is there already leads to the new target.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ServicePort>,
    /// Ports to remove; one must stay.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove_ports: Vec<PortKey>,
    /// Whether it has all ports from now on.
    #[serde(default)]
    pub all_ports: bool,
    /// Targets outside of the overlay to add.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub external: Vec<External>,
    /// Targets outside of the overlay to remove, before others are added.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove_external: Vec<External>,
    /// Timeouts to set.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// Timeouts that are the kernel's again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove_timeouts: Vec<TimeoutKind>,
    /// Which endpoints are preferred.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub prefer: Option<Prefer>,
    /// Whether none are preferred from now on.
    #[serde(default)]
    pub no_prefer: bool,
    /// How it is found out whether its containers are well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthUpdate>,
    /// Whether its containers are not checked any more.
    #[serde(default)]
    pub no_health: bool,
    /// What comes first when a container is replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_order: Option<UpdateOrder>,
    /// How many containers are replaced at a time; 0: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_parallelism: Option<u32>,
    /// Labels to add, or to change.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Labels to remove.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove_labels: Vec<String>,
}

impl ServiceUpdate {
    /// Changes a service so.
    ///
    /// # Errors
    /// Says what does not go together; the service may be changed in part then.
    pub fn apply(&self, service: &mut Service) -> Result<(), BalancingError> {
        self.refuse_contradictions()?;
        service.replicas = self.replicas.unwrap_or(service.replicas);
        let balancing = &mut service.balancing;
        balancing.scheduler = self.scheduler.unwrap_or(balancing.scheduler);
        balancing.affinity = self.affinity.or_else(|| balancing.affinity.filter(|_| !self.no_affinity));
        let prefer = balancing.prefer.take().filter(|_| !self.no_prefer);
        balancing.prefer = self.prefer.clone().or(prefer);
        self.change_ports(balancing)?;
        self.change_timeouts(&mut balancing.timeouts);
        service.health = match &self.health {
            Some(health) => Some(health.apply(service.health.as_ref())?),
            None => service.health.take().filter(|_| !self.no_health),
        };
        service.update_order = self.update_order.unwrap_or(service.update_order);
        service.update_parallelism = self.update_parallelism.unwrap_or(service.update_parallelism);
        service.labels.retain(|key, _| !self.remove_labels.contains(key));
        service.labels.extend(self.labels.clone());
        self.change_external(service)?;
        Ok(())
    }

    fn refuse_contradictions(&self) -> Result<(), BalancingError> {
        for (what, contradicts) in [
            ("an affinity and none", self.affinity.is_some() && self.no_affinity),
            ("a preference and none", self.prefer.is_some() && self.no_prefer),
            ("a health check and none", self.health.is_some() && self.no_health),
            ("a port and all ports", !self.ports.is_empty() && self.all_ports),
        ] {
            if contradicts {
                return Err(BalancingError::Both(what));
            }
        }
        Ok(())
    }

    /// Without any port all are balanced: that comes about only where it is asked for.
    fn change_ports(&self, balancing: &mut Balancing) -> Result<(), BalancingError> {
        let asked = Balancing { ports: self.ports.clone(), ..Balancing::default() };
        asked.check()?;
        let before = balancing.ports.len();
        for key in &self.remove_ports {
            let place = balancing.ports.iter().position(|port| PortKey::from(port) == *key);
            balancing.ports.remove(place.ok_or(BalancingError::NoPort(*key))?);
        }
        for port in &self.ports {
            balancing.ports.retain(|present| PortKey::from(present) != PortKey::from(port));
            balancing.ports.push(port.clone());
        }
        if self.all_ports {
            balancing.ports.clear();
        } else if before > 0 && balancing.ports.is_empty() {
            return Err(BalancingError::LastPort);
        }
        Ok(())
    }

    /// What there is then goes with the ports that there are then.
    fn change_external(&self, service: &mut Service) -> Result<(), ExternalError> {
        for missing in &self.remove_external {
            let place = service.external.iter().position(|present| present == missing);
            let place = place.ok_or_else(|| ExternalError::Missing {
                missing: *missing,
                present: match service.external.as_slice() {
                    [] => "none".to_owned(),
                    all => all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
                },
            })?;
            service.external.remove(place);
        }
        service.external.extend(&self.external);
        external::check(&service.external, service.endpoint_mode, &service.balancing.ports)
    }

    fn change_timeouts(&self, timeouts: &mut Timeouts) {
        for kind in &self.remove_timeouts {
            timeouts.set(*kind, None);
        }
        timeouts.tcp = self.timeouts.tcp.or(timeouts.tcp);
        timeouts.tcp_fin = self.timeouts.tcp_fin.or(timeouts.tcp_fin);
        timeouts.udp = self.timeouts.udp.or(timeouts.udp);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn service() -> Service {
        serde_json::from_value(json!({
            "id": "0123456789ab", "name": "web", "networks": [], "replicas": 5,
            "endpoint_mode": "vip", "update_order": "stop-first", "update_parallelism": 1,
            "addresses": {},
            "balancing": {
                "scheduler": "wrr", "affinity": 60, "prefer": "node", "timeouts": {"tcp": 60, "udp": 5},
                "ports": [{"port": 80, "target": 8080}, {"port": 53, "target": 53, "protocol": "udp"}],
            },
            "health": {"test": {"type": "tcp", "port": 80}, "interval": 5, "retries": 7},
            "labels": {"a": "1", "b": "2"},
        }))
        .unwrap()
    }

    fn updated(update: Value) -> Result<Service, BalancingError> {
        let mut service = service();
        serde_json::from_value::<ServiceUpdate>(update).unwrap().apply(&mut service)?;
        Ok(service)
    }

    fn ports(service: &Service) -> Vec<String> {
        service.balancing.ports.iter().map(ServicePort::to_string).collect()
    }

    #[test]
    fn what_is_not_given_stays() {
        assert_eq!(updated(json!({})).unwrap(), service());
        let changed = updated(json!({"scheduler": "lc", "timeouts": {"udp": 9}})).unwrap();
        let mut expected = service();
        expected.balancing.scheduler = Scheduler::Lc;
        expected.balancing.timeouts.udp = Some(9);
        assert_eq!(changed, expected);
    }

    #[test]
    fn everything_can_be_taken_back() {
        let bare = updated(json!({
            "no_affinity": true, "no_prefer": true, "no_health": true, "all_ports": true,
            "remove_timeouts": ["tcp", "tcp_fin", "udp"], "remove_labels": ["a", "b"],
            "scheduler": "rr",
        }))
        .unwrap();
        assert_eq!(bare.balancing, Balancing::default());
        assert!(bare.health.is_none() && bare.labels.is_empty());
        let label = updated(json!({"remove_labels": ["a"], "labels": {"a": "3"}})).unwrap();
        assert_eq!(label.labels["a"], "3");
    }

    #[test]
    fn ports_are_added_led_elsewhere_and_removed() {
        let target = updated(json!({"ports": [{"port": 80, "target": 81}]})).unwrap();
        assert_eq!(ports(&target), ["53:53/udp", "80:81/tcp"]);
        let removed = updated(json!({"remove_ports": [{"port": 53, "protocol": "udp"}]})).unwrap();
        assert_eq!(ports(&removed), ["80:8080/tcp"]);
        let moved = updated(json!({
            "remove_ports": [{"port": 80}, {"port": 53, "protocol": "udp"}],
            "ports": [{"port": 443, "target": 443}],
        }));
        assert_eq!(ports(&moved.unwrap()), ["443:443/tcp"]);
    }

    #[test]
    fn a_service_does_not_get_all_ports_by_losing_its_last_one() {
        let both = json!({"remove_ports": [{"port": 80}, {"port": 53, "protocol": "udp"}]});
        assert_eq!(updated(both), Err(BalancingError::LastPort));
        let missing: PortKey = "53".parse().unwrap();
        let error = updated(json!({"remove_ports": [missing]})).unwrap_err();
        assert_eq!(error, BalancingError::NoPort(missing));
        let twice = json!({"ports": [{"port": 1, "target": 1}, {"port": 1, "target": 2}]});
        assert!(matches!(updated(twice), Err(BalancingError::Twice { port: 1, .. })));
    }

    #[test]
    fn targets_outside_are_added_and_removed_with_the_ports() {
        let mut service = service();
        let mut update = |update: Value| {
            let update: ServiceUpdate = serde_json::from_value(update).unwrap();
            let mut changed = service.clone();
            update.apply(&mut changed)?;
            service = changed;
            let texts = service.external.iter().map(ToString::to_string);
            Ok::<_, BalancingError>(texts.collect::<Vec<_>>().join(" "))
        };
        let (old, new) = (json!({"address": "192.0.2.10"}), json!({"address": "2001:db8::10"}));
        assert_eq!(update(json!({"external": [old]})).unwrap(), "192.0.2.10");
        assert_eq!(update(json!({"external": [new]})).unwrap(), "192.0.2.10 2001:db8::10");
        let twice = update(json!({"external": [new]})).unwrap_err();
        assert!(twice.to_string().contains("is there already"), "{twice}");
        let anew = update(json!({"external": [old], "remove_external": [old]})).unwrap();
        assert_eq!(anew, "2001:db8::10 192.0.2.10");
        let missing = json!({"address": "192.0.2.10", "port": 5432});
        let missing = update(json!({"remove_external": [missing]})).unwrap_err().to_string();
        assert!(missing.ends_with("192.0.2.10:5432 to remove; there is 2001:db8::10, 192.0.2.10"));
        // It has two ports, and then one.
        let with_port = json!({"address": "192.0.2.11", "port": 5432});
        assert!(update(json!({"external": [with_port]})).is_err());
        let one = json!({"remove_ports": [{"port": 53, "protocol": "udp"}], "external": [with_port]});
        assert_eq!(update(one).unwrap(), "2001:db8::10 192.0.2.10 192.0.2.11:5432");
        for ports in [json!({"ports": [{"port": 81, "target": 81}]}), json!({"all_ports": true})] {
            let error = update(ports).unwrap_err().to_string();
            assert!(error.contains("192.0.2.11:5432 has a port"), "{error}");
        }
        let none = json!({"remove_external": [old, new, with_port]});
        assert_eq!(update(none).unwrap(), "");
        assert!(update(json!({"remove_external": [old]})).unwrap_err().to_string().ends_with("is none"));
    }

    #[test]
    fn a_health_check_is_changed_in_part_or_made_with_dockers_defaults() {
        let changed = updated(json!({"health": {"interval": 9}})).unwrap().health.unwrap();
        assert_eq!((changed.interval, changed.retries, changed.timeout), (9, 7, 30));
        assert_eq!(changed.test, HealthTest::Tcp { port: 80 });
        let test = HealthTest::Tcp { port: 1 };
        let update = HealthUpdate { test: Some(test), ..HealthUpdate::default() };
        let new = update.apply(None).unwrap();
        assert_eq!((new.interval, new.timeout, new.start_period, new.retries), (30, 30, 0, 3));
        assert_eq!(HealthUpdate::default().apply(None), Err(BalancingError::NoTest));
    }

    #[test]
    fn contradictions_are_refused() {
        for update in [
            json!({"affinity": 5, "no_affinity": true}),
            json!({"prefer": "node", "no_prefer": true}),
            json!({"health": {"interval": 5}, "no_health": true}),
            json!({"ports": [{"port": 1, "target": 1}], "all_ports": true}),
        ] {
            assert!(matches!(updated(update.clone()), Err(BalancingError::Both(_))), "{update}");
        }
    }

    #[test]
    fn a_port_to_remove_has_no_target() {
        assert_eq!("53/udp".parse::<PortKey>().unwrap().to_string(), "53/udp");
        for text in ["53:53", "0", "x", "53/icmp", ""] {
            assert!(text.parse::<PortKey>().is_err(), "{text}");
        }
    }
}
