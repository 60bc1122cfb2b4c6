//! The metrics of this node: a registry to which each part of the agent brings what it knows.
//!
//! What they say is known already when they are asked for: nothing is read from the store or the
//! kernel for them.

mod services;

use std::fmt;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::agent::Agent;
use super::pressure::followed;
use crate::api::{Level, Usage};
use crate::cluster::{Health, View};
use crate::model::NodeName;

pub(super) use services::Services;

/// What the names of all metrics begin with.
const PREFIX: &str = "netctl";

/// Everything that is measured on this node.
pub(super) struct Metrics {
    registry: RwLock<Registry>,
    store: Arc<Store>,
}

impl Metrics {
    /// What is known from the start: the program, and that there is no store yet.
    pub(super) fn new(version: &str) -> Self {
        let metrics = Self {
            registry: RwLock::new(Registry::with_prefix(PREFIX)),
            store: Arc::new(Store(OnceLock::new())),
        };
        metrics.bring(Build(version.to_owned()));
        metrics.bring(metrics.store.clone());
        metrics
    }

    /// Takes what a part of the agent knows.
    pub(super) fn bring(&self, collector: impl Collector) {
        self.change(|registry| registry.register_collector(Box::new(collector)));
    }

    /// Has a part of the agent register its own.
    pub(super) fn change(&self, change: impl FnOnce(&mut Registry)) {
        change(&mut self.registry.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Tells from now on how the view stands to the store.
    pub(super) fn follow(&self, view: View) {
        // There is one view; a second would change nothing.
        let _ = self.store.0.set(view);
    }

    /// All of it in the OpenMetrics text format.
    pub(super) fn text(&self) -> String {
        let mut answer = String::new();
        let registry = self.registry.read().unwrap_or_else(PoisonError::into_inner);
        // A text takes whatever is written to it.
        let _ = text::encode(&mut answer, &registry);
        answer
    }
}

/// Writes a gauge with its samples, each with its labels.
fn gauge<L: EncodeLabelSet, V: EncodeGaugeValue>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, unit): (&str, &str, Option<&Unit>),
    samples: impl IntoIterator<Item = (L, V)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
    for (labels, value) in samples {
        family.encode_family(&labels)?.encode_gauge(&value)?;
    }
    Ok(())
}

/// The program, by its version.
#[derive(Debug)]
struct Build(String);

impl Collector for Build {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let what = ("build_info", "The running agent, always 1.", None);
        gauge(&mut encoder, what, [([("version", self.0.as_str())], 1_u64)])
    }
}

/// How the view stands to the store, once there is a view.
struct Store(OnceLock<View>);

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Collector for Store {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let view = self.0.get().map(View::latest);
        let connected = view.as_ref().is_some_and(|view| view.health == Health::Current);
        let what = ("store_connected", "Whether the agent follows the store: 1, or 0.", None);
        encoder
            .encode_descriptor(what.0, what.1, what.2, MetricType::Gauge)?
            .encode_gauge(&u64::from(connected))?;
        let Some(view) = view.filter(|view| view.complete) else { return Ok(()) };
        let (nodes, alive) = (&view.snapshot.nodes, &view.snapshot.alive);
        let alive = nodes.keys().filter(|node: &&NodeName| alive.contains(*node)).count() as u64;
        let states = [("alive", alive), ("dead", nodes.len() as u64 - alive)];
        let samples = states.map(|(state, count)| ([("state", state)], count));
        gauge(
            &mut encoder,
            ("nodes", "Nodes of the cluster, by whether their lease is alive.", None),
            samples,
        )
    }
}

/// The networks that this node uses.
pub(super) struct Networks(pub(super) Arc<Agent>);

impl fmt::Debug for Networks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Networks").finish_non_exhaustive()
    }
}

/// One family of a network, and how its addresses are used.
struct Part {
    network: String,
    family: &'static str,
    usage: Usage,
}

impl Part {
    fn labels(&self) -> [(&'static str, &str); 2] {
        [("network", &self.network), ("family", self.family)]
    }

    /// The states of its usable addresses: each has one, so they sum up to all. What is kept beyond
    /// those that nobody has waits for such as rest: it is not counted twice.
    fn states(&self) -> impl Iterator<Item = ([(&'static str, &str); 3], u64)> {
        let Usage { usable, endpoints, services, resting, reserved, free, .. } = self.usage;
        let unowned = [endpoints, services, resting].into_iter().fold(usable, u64::saturating_sub);
        let reserved = reserved.min(unowned);
        let states = [
            ("endpoints", endpoints),
            ("services", services),
            ("resting", resting),
            ("reserved", reserved),
            ("free", free),
        ];
        let [network, family] = self.labels();
        states.into_iter().map(move |(state, count)| ([network, family, ("state", state)], count))
    }
}

impl Collector for Networks {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (agent, snapshot) = (&self.0, self.0.snapshot());
        let (mut parts, mut endpoints) = (Vec::new(), Vec::new());
        for network in followed(&snapshot) {
            let members = snapshot.members.get(&network.id);
            let all = members.into_iter().flat_map(|members| members.endpoints.values());
            let own = all.filter(|endpoint| endpoint.node == agent.me.name).count() as u64;
            endpoints.push(([("network", network.name.as_str())], own));
            for (ipv4, _) in network.families() {
                let family = if ipv4 { "ipv4" } else { "ipv6" };
                let count = agent.cluster().known_count(network, ipv4);
                let usage = agent.usage(network.id, ipv4, &count);
                parts.push(Part { network: network.name.to_string(), family, usage });
            }
        }
        let encoder = &mut encoder;
        gauge(encoder, ("endpoints", "Endpoints of this node, by network.", None), endpoints)?;
        addresses(encoder, &parts)
    }
}

fn addresses(encoder: &mut DescriptorEncoder<'_>, parts: &[Part]) -> fmt::Result {
    let help = "Addresses of the networks that this node uses which may be given out.";
    let usable = parts.iter().map(|part| (part.labels(), part.usage.usable));
    gauge(encoder, ("network_usable_addresses", help, None), usable)?;
    let help = "The usable addresses by what they are used for.";
    gauge(encoder, ("network_addresses", help, None), parts.iter().flat_map(Part::states))?;
    let help = "How full a network is: 0 fine, 1 from address_warning on or where steady growth ends within a day, 2 from address_alarm on or within an hour.";
    let level = |part: &Part| match part.usage.level {
        Level::Fine => 0_u64,
        Level::Warning => 1,
        Level::Alarm => 2,
    };
    let levels = parts.iter().map(|part| (part.labels(), level(part)));
    gauge(encoder, ("network_address_level", help, None), levels)?;
    let help =
        "When no address is left if it goes on as in the last hour; absent where it did not grow.";
    let ends = parts.iter().filter_map(|part| Some((part.labels(), part.usage.full_in?)));
    gauge(encoder, ("network_full_in", help, Some(&Unit::Seconds)), ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(family: &'static str, level: Level, full_in: Option<u64>) -> Part {
        let usage = Usage {
            usable: u64::MAX,
            endpoints: 3,
            services: 1,
            resting: 2,
            reserved: 4,
            free: 90,
            level,
            full_in,
        };
        Part { network: "shop".to_owned(), family, usage }
    }

    #[test]
    fn the_states_sum_up_to_what_is_usable_also_where_what_rests_is_kept_again() {
        for (endpoints, services, resting, reserved, free, expected) in [
            (3, 1, 2, 4, 0, [3, 1, 2, 4, 0]),
            (3, 1, 2, 3, 1, [3, 1, 2, 3, 1]),
            // Six are kept, of which two are to be those that rest.
            (3, 1, 2, 6, 0, [3, 1, 2, 4, 0]),
            (0, 0, 10, 10, 0, [0, 0, 10, 0, 0]),
        ] {
            let mut part = part("ipv4", Level::Fine, None);
            part.usage =
                Usage { usable: 10, endpoints, services, resting, reserved, free, ..part.usage };
            let states: Vec<u64> = part.states().map(|(_, count)| count).collect();
            assert_eq!((&states[..], states.iter().sum::<u64>()), (&expected[..], 10));
        }
    }

    /// Parts that somebody else brings.
    #[derive(Debug)]
    struct Given;

    impl Collector for Given {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
            let (full, fine) = (part("ipv4", Level::Alarm, Some(60)), part("ipv6", Level::Fine, None));
            addresses(&mut encoder, &[full, fine])
        }
    }

    #[test]
    fn an_agent_without_a_cluster_says_that() {
        let text = Metrics::new("1.2.3").text();
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("# HELP")).collect();
        let expected = [
            "# TYPE netctl_build_info gauge",
            "netctl_build_info{version=\"1.2.3\"} 1",
            "# TYPE netctl_store_connected gauge",
            "netctl_store_connected 0",
            "# EOF",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn every_part_of_a_network_has_its_samples() {
        let metrics = Metrics::new("1.2.3");
        metrics.bring(Given);
        let text = metrics.text();
        for line in [
            "netctl_network_usable_addresses{network=\"shop\",family=\"ipv6\"} 18446744073709551615",
            "netctl_network_addresses{network=\"shop\",family=\"ipv4\",state=\"reserved\"} 4",
            "netctl_network_addresses{network=\"shop\",family=\"ipv4\",state=\"free\"} 90",
            "netctl_network_address_level{network=\"shop\",family=\"ipv4\"} 2",
            "netctl_network_address_level{network=\"shop\",family=\"ipv6\"} 0",
            "# UNIT netctl_network_full_in_seconds seconds",
            "netctl_network_full_in_seconds{network=\"shop\",family=\"ipv4\"} 60",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        // What is not known has no sample.
        let ends = text.lines().filter(|line| line.starts_with("netctl_network_full_in_seconds{"));
        assert_eq!(ends.count(), 1, "{text}");
        assert_eq!(
            text.lines().filter(|line| line.starts_with("netctl_network_addresses{")).count(),
            10
        );
        assert!(text.ends_with("# EOF\n"));
    }
}
