//! `netctl monitor`: what packets do on this node.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use jiff::tz::TimeZone;

use super::Session;
use super::failure::{Exit, Failure};
use super::output::{self, Format};
use crate::api::{Carrier, MonitorQuery, Point, SAMPLE, Seen, Sighting, SightingKind};
use crate::model::Name;

const EXAMPLES: &str = "\
Examples:
  netctl monitor
  netctl monitor --type drop
  netctl monitor --network web --service db --sample 1
  netctl monitor --endpoint a --count 10 -o json

A line for each packet that is dropped or refused, with the reason; for each that opens or ends a TCP
connection; and for one of so many others (--sample). `a/10.9.0.2:4242 > db/10.9.0.9:80` is a packet from
endpoint a to service db, `=> b/10.9.0.4:8080` the container that it was sent on to, and `as db/…` says
from whom an answer seems to come. `direct`: past the kernel's stack; of a query for a name, that it was
answered there and then.

Flows are seen where the node balances by eBPF (netctl node inspect): where a packet leaves a container
(from-container), where it comes from another node (from-wire), and where the kernel brings it to a
container (to-container); where the node asks sockets, what a socket gets for a service (socket), whose
packets then name the container alone. Large ones that are cut later count as one.

Drops are those of netctl's rules and programs, and with reasons of its own (ip-csum, neigh-failed, netfilter-drop;
skb_drop_reason in the kernel's include/net/dropreason-core.h) what the kernel drops on a network's way (sandbox)
and of the networks' packets outside of it (host), such as what another firewall has against them. Older kernels
give many no reason (not-specified). With eBPF also what a router refuses, such as an address that nobody has, as
often as it tells the sender (to-container). What a container's own stack drops is not told, nor what other nodes
see.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Only what is on this network (name or ID)
    #[arg(short, long)]
    network: Option<Name>,
    /// Only what comes from this endpoint, or is for it (name or ID)
    #[arg(short, long)]
    endpoint: Option<Name>,
    /// Only what comes from this service or its containers, or is for them
    #[arg(short, long)]
    service: Option<Name>,
    /// Only packets that went their way, or only those that were dropped or refused
    #[arg(short = 't', long = "type", value_enum, value_name = "TYPE")]
    kind: Option<Kind>,
    /// Show one of so many packets, beside those that open or end a TCP connection
    #[arg(long, value_name = "NUMBER", default_value_t = SAMPLE)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    sample: u32,
    /// End after so many lines
    #[arg(short, long, value_name = "NUMBER")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    /// Packets that went their way
    Flow,
    /// Packets that were dropped or refused
    Drop,
}

/// Does `netctl monitor`.
pub(super) async fn run(session: &Session, arguments: Arguments) -> Result<ExitCode, Failure> {
    let Arguments { network, endpoint, service, kind, sample, count } = arguments;
    let kind = kind.map(|kind| match kind {
        Kind::Flow => SightingKind::Flow,
        Kind::Drop => SightingKind::Drop,
    });
    let query = MonitorQuery { network, endpoint, service, kind, sample: Some(sample) };
    let mut sightings = session.client.monitor(&query).await?;
    let mut left = count;
    while left != Some(0) {
        let Some(sighting) = sightings.next().await? else {
            return Err(Failure::new(Exit::Unreachable, "the agent has ended: nothing more is seen"));
        };
        if !print(session.format, &sighting)? {
            break;
        }
        left = left.map(|left| left - 1);
    }
    Ok(Exit::Done.into())
}

/// Writes one; `false`: nobody reads any more.
fn print(format: Format, sighting: &Sighting) -> Result<bool, Failure> {
    let text = match format {
        Format::Table => output::clean(&line(sighting, &TimeZone::system())),
        Format::Json => serde_json::to_string(sighting)
            .map_err(|error| Failure::failed(format!("cannot write the result: {error}")))?,
    };
    output::print_while_read(&format!("{text}\n"))
}

/// A sighting in a line.
fn line(sighting: &Sighting, zone: &TimeZone) -> String {
    let time = sighting.time.to_zoned(zone.clone()).strftime("%H:%M:%S%.6f").to_string();
    let what = match &sighting.packet {
        Some(packet) => shown(packet),
        None if sighting.lost == 0 => sighting.reason.clone(),
        None => format!("{} packets are not shown: they came too quickly", sighting.lost),
    };
    let line = format!("{time} {} {what}", sighting.kind);
    if sighting.kind == SightingKind::Drop { format!("{line}: {}", sighting.reason) } else { line }
}

fn shown(packet: &Seen) -> String {
    let network = packet.network.as_ref().map_or("-", Name::as_str);
    let (point, from, to) = (packet.point, &packet.source, &packet.destination);
    let mut text = format!("{point} {network} {} {from} > {to}", packet.protocol);
    if let Some(translated) = &packet.translated {
        // Only an answer bears the address of a service.
        let is_answer = translated.endpoint.is_none() && translated.service.is_some();
        text.push_str(&format!(" {} {translated}", if is_answer { "as" } else { "=>" }));
    }
    if !packet.flags.is_empty() {
        text.push_str(&format!(" {}", packet.flags));
    }
    // A socket has no packet yet.
    if packet.point != Point::Socket {
        text.push_str(&format!(" {} bytes", packet.length));
    }
    match packet.carrier {
        Some(Carrier::Direct) => text.push_str(" direct"),
        Some(Carrier::Kernel) => text.push_str(" kernel"),
        None => {}
    }
    text
}
