//! The flags of how a service's connections are spread and its containers are checked.

use clap::Args;

use crate::cli::failure::{Exit, Failure};
use crate::cli::values;
use crate::model::balancing::Timeouts;
use crate::model::{
    Balancing, BalancingError, External, HealthCheck, HealthTest, HealthUpdate, PortKey, Prefer,
    Scheduler, ServicePort, ServiceUpdate, TimeoutKind,
};

/// What both `create` and `update` take.
#[derive(Debug, Args)]
pub(super) struct Policy {
    /// Which container gets a new connection: by turns (rr, wrr), the one with the fewest
    /// connections (lc, wlc), by a hash of the client's address (sh, mh); all but rr and lc by weight
    #[arg(long, value_name = "rr|wrr|lc|wlc|sh|mh")]
    scheduler: Option<Scheduler>,
    /// How long a client keeps its container after its last connection, such as 10m
    #[arg(long, value_name = "DURATION", value_parser = values::seconds)]
    affinity: Option<u32>,
    /// A port of the service, and the one of its containers to which it leads; can be repeated
    /// [default of a new service: all ports]
    #[arg(long = "port", value_name = "[NAME=]PORT[:TARGET][/PROTOCOL]")]
    ports: Vec<ServicePort>,
    /// A target outside of the overlay, beside the containers: an address, and where the service has
    /// one port the target's own; can be repeated. A new service without a port gets that of its target
    #[arg(long = "external", value_name = "ADDRESS[:PORT]")]
    external: Vec<External>,
    /// After which silence an entry for a connection goes: tcp, tcp-fin or udp; can be repeated. On a
    /// network the longest counts that any of its services asks for
    #[arg(long = "timeout", value_name = "KEY=DURATION", value_parser = timeout)]
    timeouts: Vec<(TimeoutKind, u32)>,
    /// Which containers are preferred as long as any is ready: those on the client's node, or on
    /// nodes with the same label
    #[arg(long, value_name = "node|label=KEY")]
    prefer: Option<Prefer>,
    #[command(flatten)]
    health: Health,
}

/// A container's health check, with Docker's names and defaults.
#[derive(Debug, Args)]
struct Health {
    #[command(flatten)]
    test: Test,
    /// Time between checks [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = values::seconds)]
    health_interval: Option<u32>,
    /// After which a check has failed [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = values::seconds)]
    health_timeout: Option<u32>,
    /// For how long after the start failures do not count [default: 0s]
    #[arg(long, value_name = "DURATION", value_parser = values::seconds)]
    health_start_period: Option<u32>,
    /// How many failures in a row make a container unhealthy [default: 3]
    #[arg(long, value_name = "N")]
    health_retries: Option<u32>,
}

#[derive(Debug, Args)]
#[group(multiple = false)]
struct Test {
    /// A container is well if it takes connections on this TCP port
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    health_tcp: Option<u16>,
    /// A container is well if it answers this page with 200 to 399
    #[arg(long, value_name = "PORT[/PATH]", value_parser = page)]
    health_http: Option<(u16, String)>,
    /// A container is well if this command exits with 0; sh -c runs it on the node, in the network
    /// namespace of the container
    #[arg(long, value_name = "COMMAND")]
    health_cmd: Option<String>,
}

/// What `update` takes back.
#[derive(Debug, Args)]
pub(super) struct Removals {
    /// Each connection is for itself
    #[arg(long, conflicts_with = "affinity")]
    no_affinity: bool,
    /// A port to remove; can be repeated
    #[arg(long = "port-rm", value_name = "PORT[/PROTOCOL]")]
    remove_ports: Vec<PortKey>,
    /// A target outside to remove, as it was given; can be repeated
    #[arg(long = "external-rm", value_name = "ADDRESS[:PORT]")]
    remove_external: Vec<External>,
    /// Every port leads to the same one of a container
    #[arg(long, conflicts_with_all = ["ports", "remove_ports"])]
    all_ports: bool,
    /// A timeout that is not asked for any more; can be repeated
    #[arg(long = "timeout-rm", value_name = "KEY")]
    remove_timeouts: Vec<TimeoutKind>,
    /// No container is preferred
    #[arg(long, conflicts_with = "prefer")]
    no_prefer: bool,
    /// Containers are not checked
    #[arg(long)]
    no_health: bool,
    /// A label to remove; can be repeated
    #[arg(long = "label-rm", value_name = "KEY")]
    remove_labels: Vec<String>,
}

fn timeout(text: &str) -> Result<(TimeoutKind, u32), String> {
    let (kind, time) = text.split_once('=').ok_or("give KEY=DURATION, such as tcp=15m")?;
    let kind: TimeoutKind = kind.parse().map_err(|error: BalancingError| error.to_string())?;
    Ok((kind, values::seconds(time)?))
}

fn page(text: &str) -> Result<(u16, String), String> {
    let (port, path) = text.split_at(text.find('/').unwrap_or(text.len()));
    let number = port.parse().ok().filter(|port| *port > 0);
    let port = number.ok_or_else(|| format!("{port:?} is no port: give PORT[/PATH]"))?;
    Ok((port, if path.is_empty() { "/".to_owned() } else { path.to_owned() }))
}

impl Policy {
    /// How a new service's connections are spread.
    pub(super) fn balancing(&self) -> Balancing {
        Balancing {
            scheduler: self.scheduler.unwrap_or_default(),
            affinity: self.affinity,
            ports: self.ports.clone(),
            timeouts: self.timeouts(),
            prefer: self.prefer.clone(),
        }
    }

    /// The targets outside of a new service.
    pub(super) fn external(&self) -> &[External] {
        &self.external
    }

    /// How a new service's containers are checked.
    pub(super) fn health(&self) -> Result<Option<HealthCheck>, Failure> {
        let check = self.health.update().map(|update| update.apply(None)).transpose();
        check.map_err(|error| Failure::new(Exit::Usage, error.to_string()))
    }

    /// A change of a service.
    pub(super) fn update(&self, removals: Removals) -> ServiceUpdate {
        ServiceUpdate {
            scheduler: self.scheduler,
            affinity: self.affinity,
            no_affinity: removals.no_affinity,
            ports: self.ports.clone(),
            remove_ports: removals.remove_ports,
            all_ports: removals.all_ports,
            external: self.external.clone(),
            remove_external: removals.remove_external,
            timeouts: self.timeouts(),
            remove_timeouts: removals.remove_timeouts,
            prefer: self.prefer.clone(),
            no_prefer: removals.no_prefer,
            health: self.health.update(),
            no_health: removals.no_health,
            remove_labels: removals.remove_labels,
            ..ServiceUpdate::default()
        }
    }

    fn timeouts(&self) -> Timeouts {
        let mut timeouts = Timeouts::default();
        for (kind, seconds) in &self.timeouts {
            timeouts.set(*kind, Some(*seconds));
        }
        timeouts
    }
}

impl Health {
    fn update(&self) -> Option<HealthUpdate> {
        let Test { health_tcp, health_http, health_cmd } = &self.test;
        let tcp = health_tcp.map(|port| HealthTest::Tcp { port });
        let http = health_http.clone().map(|(port, path)| HealthTest::Http { port, path });
        let shell = |text: &String| ["/bin/sh", "-c", text].map(str::to_owned).to_vec();
        let command = health_cmd.as_ref().map(|text| HealthTest::Command { command: shell(text) });
        let update = HealthUpdate {
            test: tcp.or(http).or(command),
            interval: self.health_interval,
            timeout: self.health_timeout,
            start_period: self.health_start_period,
            retries: self.health_retries,
        };
        (update != HealthUpdate::default()).then_some(update)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_a_port_and_may_have_a_path() {
        assert_eq!(page("80"), Ok((80, "/".to_owned())));
        assert_eq!(page("8080/live/x"), Ok((8080, "/live/x".to_owned())));
        for text in ["", "/x", "0", "65536/", "x/80"] {
            assert!(page(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_timeout_has_a_key_and_whole_seconds() {
        assert_eq!(timeout("tcp-fin=2m"), Ok((TimeoutKind::TcpFin, 120)));
        for text in ["tcp", "tcp=", "icmp=1m", "udp=1500ms"] {
            assert!(timeout(text).is_err(), "{text}");
        }
    }
}
