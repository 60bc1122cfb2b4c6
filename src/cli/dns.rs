//! `netctl dns`: what names are answered with, and why; and how a host asks for them.

use std::collections::BTreeSet;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use ipnetwork::IpNetwork;
use serde::Serialize;

use super::Session;
use super::failure::{Exit, Failure};
use super::output::{self, Details, Format};
use crate::api::{NameQuery, NameSource, NameView, RecordView, SettingsView};
use crate::model::{Name, Subnet};

const QUERY_EXAMPLES: &str = "\
Examples:
  netctl dns query web
  netctl dns query web.shop --type AAAA --from box
  netctl dns query _http._tcp.web --type SRV --network shop
  netctl dns query www.example.org -o json

Exit status: 0 where there are records, 4 where there are none.";

const RESOLVED_EXAMPLES: &str = "\
Examples:
  sudo mkdir -p /etc/systemd/resolved.conf.d
  netctl dns resolved | sudo tee /etc/systemd/resolved.conf.d/netctl.conf
  sudo systemctl restart systemd-resolved
  netctl dns resolved --reverse

The agent must answer names on this machine itself: host in [dns] of its configuration, or --dns-host.
With --reverse it is to be done again when such networks come or go.

This is for machines whose other servers belong to an interface, as DHCP and most networks give them: the
agent's stands beside them and refuses what is not below its domain. Where they are global (DNS= in another
file of resolved.conf) one server at a time is asked for all names: there give the agent's address to an
interface of its own (resolvectl dns, resolvectl domain, resolvectl default-route).";

/// Where systemd-resolved looks for what is added to its configuration (resolved.conf(5)).
const DROP_IN: &str = "/etc/systemd/resolved.conf.d/netctl.conf";

#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub(super) enum Command {
    /// Ask this node's name server as one of its containers does, and show where the answer is from
    #[command(after_help = QUERY_EXAMPLES)]
    Query(Query),
    /// Print what makes systemd-resolved ask this node's agent for names below its domain
    #[command(after_help = RESOLVED_EXAMPLES)]
    Resolved {
        /// Also for the names of addresses, of networks that were made with --host-access
        #[arg(long)]
        reverse: bool,
    },
}

#[derive(Debug, Args)]
pub(super) struct Query {
    /// The name, as a container gives it
    name: String,
    /// The type of the records
    #[arg(short = 't', long = "type", value_name = "TYPE", default_value = "A")]
    kind: String,
    /// Ask as this endpoint of this node (name or id) [default: as one that is on all networks here]
    #[arg(long, value_name = "ENDPOINT")]
    from: Option<Name>,
    /// The network of the endpoint, or as one that is on it (name or id)
    #[arg(long)]
    network: Option<Name>,
}

/// Does `netctl dns …`.
pub(super) async fn run(session: &Session, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Query(query) => self::query(session, query).await,
        Command::Resolved { reverse } => resolved(session, reverse).await,
    }
}

/// What systemd-resolved is to be told.
#[derive(Debug, Serialize)]
struct Resolved {
    /// The file that says it.
    file: &'static str,
    /// Whom it asks.
    server: String,
    /// For names below which domains.
    domains: Vec<String>,
}

impl Resolved {
    fn new(settings: &SettingsView) -> Result<Self, Failure> {
        let Some(server) = settings.dns_host else {
            return Err(Failure::failed(
                "the agent answers no names on this machine itself: give it an address for that, such as \
                 host = \"127.0.0.110\" in [dns] of /etc/netctl/netctld.toml (or --dns-host), and start it \
                 again",
            ));
        };
        let domains = vec![settings.dns_domain.clone()];
        Ok(Self { file: DROP_IN, server: server.to_string(), domains })
    }

    fn text(&self) -> String {
        let Self { file, server, domains } = self;
        // A domain with this mark is one to ask for, not one to add to names.
        let domains = domains.iter().map(|domain| format!("~{domain}")).collect::<Vec<_>>().join(" ");
        format!(
            "# {file}; then: systemctl restart systemd-resolved\n[Resolve]\nDNS={server}\nDomains={domains}\n"
        )
    }
}

async fn resolved(session: &Session, reverse: bool) -> Result<ExitCode, Failure> {
    let mut resolved = Resolved::new(&session.client.settings().await?)?;
    if reverse {
        let networks = session.client.networks().await?;
        let reached = networks.iter().map(|view| &view.network).filter(|network| network.host_access);
        let subnets = reached.flat_map(|network| network.standing().map(Subnet::cidr));
        // Those of networks that overlap nothing, in order.
        let domains: BTreeSet<String> = subnets.flat_map(reverse_domains).collect();
        resolved.domains.extend(domains);
    }
    match session.format {
        Format::Json => output::print_json(&resolved)?,
        Format::Table => output::print(&output::clean(&resolved.text()))?,
    }
    Ok(Exit::Done.into())
}

/// The domains that have the names of a subnet's addresses, and no others (RFC 1035, 3.5; RFC 3596, 2.5).
fn reverse_domains(subnet: IpNetwork) -> Vec<String> {
    let (network, width, bits, tree) = match subnet {
        IpNetwork::V4(subnet) => (u128::from(subnet.network().to_bits()), 32, 8, "in-addr.arpa"),
        IpNetwork::V6(subnet) => (subnet.network().to_bits(), 128, 4, "ip6.arpa"),
    };
    let prefix = u32::from(subnet.prefix());
    let labels = prefix.div_ceil(bits);
    let first = network.checked_shr(width - labels * bits).unwrap_or_default();
    let domain = |number: u128| {
        let mut domain = String::new();
        for place in 0..labels {
            let label = number >> (place * bits) & ((1 << bits) - 1);
            let label = if bits == 8 { label.to_string() } else { format!("{label:x}") };
            domain.push_str(&format!("{label}."));
        }
        domain + tree
    };
    (0..1 << (labels * bits - prefix)).map(|offset| domain(first + offset)).collect()
}

async fn query(session: &Session, query: Query) -> Result<ExitCode, Failure> {
    let Query { name, kind, from, network } = query;
    let query = NameQuery { name, kind: Some(kind), from, network };
    let view = session.client.look_up(&query).await?;
    match session.format {
        Format::Json => output::print_json(&view)?,
        Format::Table => print(&view)?,
    }
    Ok(if view.records.is_empty() { Exit::NotFound } else { Exit::Done }.into())
}

fn print(view: &NameView) -> Result<(), Failure> {
    if !view.records.is_empty() {
        let row = |record: &RecordView| {
            let RecordView { name, ttl, kind, data } = record.clone();
            vec![name, ttl.to_string(), kind, data]
        };
        output::print_table(&["NAME", "TTL", "TYPE", "DATA"], view.records.iter().map(row))?;
        output::print("\n")?;
    }
    let details = Details::default()
        .with("Answer", &view.code)
        .with("From", source(&view.source))
        .with_all("Networks", &view.networks);
    output::print(&details.to_string())
}

/// Where an answer is from.
fn source(source: &NameSource) -> String {
    match source {
        NameSource::Own { network: Some(network), what } => format!("network {network}: {what}"),
        NameSource::Own { network: None, what } => what.clone(),
        NameSource::Kept { server, age, left } => {
            format!("{server}, {age} s ago, kept for {left} s more")
        }
        NameSource::Forwarded { server, milliseconds } => format!("{server}, in {milliseconds} ms"),
        NameSource::Unanswered { servers } if servers.is_empty() => {
            "nobody: the host has no name server".to_owned()
        }
        NameSource::Unanswered { servers } => format!("nobody: {} gave no answer", servers.join(", ")),
        NameSource::Inside => "nobody: an internal network asks no one outside".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_resolved_is_told_whom_to_ask_for_which_names() {
        let off = SettingsView::default();
        let refused = Resolved::new(&off).unwrap_err();
        assert!(format!("{refused:?}").contains("--dns-host"), "{refused:?}");
        for (host, line) in [("127.0.0.110", "DNS=127.0.0.110"), ("::1", "DNS=::1")] {
            let on = SettingsView { dns_host: Some(host.parse().unwrap()), ..off.clone() };
            let text = Resolved::new(&on).unwrap().text();
            let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
            assert_eq!(lines, ["[Resolve]", line, "Domains=~netctl.internal"]);
        }
    }

    #[test]
    fn a_subnets_reverse_domains_have_its_addresses_and_no_others() {
        let domains = |subnet: &str| reverse_domains(subnet.parse().unwrap());
        assert_eq!(domains("10.9.0.0/24"), ["0.9.10.in-addr.arpa"]);
        assert_eq!(domains("10.9.0.0/16"), ["9.10.in-addr.arpa"]);
        let parts = ["4.9.10.in-addr.arpa", "5.9.10.in-addr.arpa"];
        assert_eq!(domains("10.9.4.0/23"), parts);
        assert_eq!(domains("10.9.0.64/26").len(), 64);
        assert_eq!(domains("10.9.0.64/26")[63], "127.0.9.10.in-addr.arpa");
        assert_eq!(domains("fd00:9::/64"), ["0.0.0.0.0.0.0.0.9.0.0.0.0.0.d.f.ip6.arpa"]);
        assert_eq!(domains("fd00::/7"), ["c.f.ip6.arpa", "d.f.ip6.arpa"]);
    }

    #[test]
    fn it_is_said_where_an_answer_is_from() {
        let own = |network: Option<&str>| NameSource::Own {
            network: network.map(|name| name.parse().unwrap()),
            what: "a service".to_owned(),
        };
        let server = || "192.0.2.53:53".to_owned();
        for (from, expected) in [
            (own(Some("shop")), "network shop: a service"),
            (own(None), "a service"),
            (
                NameSource::Kept { server: server(), age: 2, left: 58 },
                "192.0.2.53:53, 2 s ago, kept for 58 s more",
            ),
            (NameSource::Forwarded { server: server(), milliseconds: 7 }, "192.0.2.53:53, in 7 ms"),
            (NameSource::Unanswered { servers: vec![server()] }, "nobody: 192.0.2.53:53 gave no answer"),
            (NameSource::Unanswered { servers: vec![] }, "nobody: the host has no name server"),
            (NameSource::Inside, "nobody: an internal network asks no one outside"),
        ] {
            assert_eq!(source(&from), expected);
        }
    }
}
