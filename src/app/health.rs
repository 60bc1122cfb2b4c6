//! Whether this node's endpoints are well: the checks of their services, and the states that follow.
//!
//! Each endpoint of this node whose service has a health check has a task of its own, for as long as
//! the view shows both. What it finds out goes to [`Reports`], which write it to the store.

mod command;
mod connect;
mod course;
mod reports;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use self::course::Course;
use self::reports::Reports;
use super::agent::Agent;
use super::dataplane::Dataplane;
use crate::cluster::{Cluster, ClusterError};
use crate::config::HealthUser;
use crate::config::duration::Shown;
use crate::model::{
    Endpoint, EndpointId, EndpointState, HealthCheck, HealthTest, Name, NodeName, Service, Snapshot,
};

/// How many checks over the network are made at once.
const CONNECTIONS: usize = 256;
/// How many commands run at once, and how many of them for one service: those of one that hang leave
/// places for the others'.
const COMMANDS: usize = 32;
const COMMANDS_OF_SERVICE: usize = COMMANDS / 4;
/// How soon the store is asked again about a service.
const AGAIN: Duration = Duration::from_secs(1);
/// How soon it is asked again whether an endpoint is plugged in.
const PLUGGED_AGAIN: Duration = Duration::from_millis(100);
/// The longest reason that is told, in characters.
const MAX_REASON: usize = 200;

/// Counters of this node's health checks since the agent started.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    checks: Counter,
    failures: Counter,
}

impl Tally {
    /// Shows the counters as metrics.
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("health_checks", "Health checks of endpoints", self.checks.clone());
        let help = "Health checks that failed, or did not end in time";
        registry.register("health_check_failures", help, self.failures.clone());
    }
}

/// Makes an endpoint that was plugged in just now ready, where its service has no check; gives it as
/// it is then. What the store does not take is written once it does.
pub(super) async fn begin(cluster: &Cluster, endpoint: &Arc<Endpoint>) -> Arc<Endpoint> {
    let (Some(name), EndpointState::Pending) = (&endpoint.service, endpoint.state) else {
        return endpoint.clone();
    };
    let (network, id) = (endpoint.network, endpoint.id);
    let begun = match cluster.service(name).await {
        Ok(service) if service.health.is_some() => return endpoint.clone(),
        Ok(_) | Err(ClusterError::NoService(_)) => {
            cluster.set_endpoint_state(network, id, EndpointState::Ready, "").await
        }
        Err(error) => Err(error),
    };
    match begun {
        Ok(begun) => begun.map_or_else(|| endpoint.clone(), Arc::new),
        Err(error) => {
            warn!(endpoint = %id, %error, "endpoint takes no connections yet: it is tried again");
            endpoint.clone()
        }
    }
}

/// What all checks share.
struct Context {
    cluster: Arc<Cluster>,
    reports: Arc<Reports>,
    tally: Tally,
    /// As whom commands run.
    user: HealthUser,
    dataplane: Arc<Dataplane>,
    connections: Semaphore,
    commands: Semaphore,
    /// The places for commands of those services of which some run or wait.
    commands_of: Mutex<BTreeMap<Name, Arc<Semaphore>>>,
}

impl Context {
    /// Waits until an endpoint is to be checked, and checks it; gives the result, when it was asked
    /// for and when it was there.
    async fn observe(
        &self,
        subject: &Subject,
        check: &HealthCheck,
        due: Instant,
    ) -> (Result<(), String>, (Instant, Instant)) {
        tokio::time::sleep_until(due.into()).await;
        // Places are never closed, so this waits for them and nothing else.
        let (_of_service, _place) = match check.test {
            HealthTest::Tcp { .. } | HealthTest::Http { .. } => (None, self.connections.acquire().await),
            HealthTest::Command { .. } => {
                let of_service = self.places_of(subject.endpoint.service.as_ref());
                (Some(of_service.acquire_owned().await), self.commands.acquire().await)
            }
        };
        let (began, limit) = (Instant::now(), Duration::from_secs(check.timeout.into()));
        let result = match tokio::time::timeout(limit, subject.examine(&check.test, &self.user)).await {
            Ok(result) => result.map_err(|error| brief(&error.to_string())),
            Err(_) => Err(format!("no result within {}", Shown(limit))),
        };
        self.tally.checks.inc();
        if let Err(reason) = &result {
            self.tally.failures.inc();
            debug!(endpoint = %subject.endpoint.id, reason, "health check failed");
        }
        (result, (began, Instant::now()))
    }

    /// The places for commands of one service.
    fn places_of(&self, service: Option<&Name>) -> Arc<Semaphore> {
        let new = || Arc::new(Semaphore::new(COMMANDS_OF_SERVICE));
        let Some(service) = service else { return new() };
        let mut all = self.commands_of.lock().unwrap_or_else(PoisonError::into_inner);
        // Who holds or awaits a place has it, too.
        all.retain(|_, places| Arc::strong_count(places) > 1);
        all.entry(service.clone()).or_insert_with(new).clone()
    }

    /// Waits until an endpoint is plugged in.
    async fn until_plugged(&self, endpoint: &Endpoint) {
        // A dataplane that has ended plugs nothing in.
        while !self.dataplane.is_plugged(endpoint.network, endpoint.id).await.unwrap_or(false) {
            tokio::time::sleep(PLUGGED_AGAIN).await;
        }
    }

    /// Has an endpoint's state written again where the view shows another.
    fn insist(&self, course: &Course, shown: &Endpoint) {
        if shown.state != course.state() {
            self.tell(course, shown);
        }
    }

    fn tell(&self, course: &Course, endpoint: &Endpoint) {
        self.reports.tell(endpoint, course.state(), course.reason().to_owned());
    }

    /// Makes an endpoint ready that nothing checks any more, once the store says so too: the view
    /// may only not show the check yet.
    async fn release(&self, subject: &Subject) {
        let Some(name) = &subject.endpoint.service else { return };
        loop {
            match self.cluster.service(name).await {
                Ok(service) if service.health.is_some() => return,
                Ok(_) | Err(ClusterError::NoService(_)) => break,
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        }
        self.reports.tell(&subject.endpoint, EndpointState::Ready, String::new());
    }
}

/// An endpoint of this node and its service, if there is one of that name.
#[derive(Debug, Clone, PartialEq)]
struct Subject {
    endpoint: Arc<Endpoint>,
    service: Option<Arc<Service>>,
    /// Where it is reached: its first address, IPv4 before IPv6.
    address: Option<IpAddr>,
    /// The gateway for that, as whom it is asked.
    source: Option<IpAddr>,
}

impl Subject {
    fn check(&self) -> Option<&HealthCheck> {
        self.service.as_ref()?.health.as_ref()
    }

    /// Does what a check says; whatever is under way ends with the future.
    async fn examine(&self, test: &HealthTest, user: &HealthUser) -> anyhow::Result<()> {
        let network = self.endpoint.network;
        let address = self.address.context("it has no address");
        match test {
            HealthTest::Tcp { port } => {
                let target = SocketAddr::new(address?, *port);
                connect::tcp(network, self.source, target).await?;
            }
            HealthTest::Http { port, path } => {
                let target = SocketAddr::new(address?, *port);
                connect::http(network, self.source, target, path).await?;
            }
            HealthTest::Command { command } => {
                command::run(user, &self.endpoint.attachment, command, self.environment()).await?;
            }
        }
        Ok(())
    }

    /// What a command is told.
    fn environment(&self) -> [(&'static str, String); 3] {
        let Endpoint { name, service, addresses, .. } = &*self.endpoint;
        let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
        [
            ("NETCTL_ENDPOINT", name.to_string()),
            ("NETCTL_SERVICE", service.as_ref().map(Name::to_string).unwrap_or_default()),
            ("NETCTL_ADDRESS", addresses.join(",")),
        ]
    }
}

/// A text in one line of bounded length.
fn brief(text: &str) -> String {
    let words: Vec<&str> = text
        .split(|c: char| c.is_control() || c.is_whitespace())
        .filter(|word| !word.is_empty())
        .collect();
    let text = words.join(" ");
    match text.char_indices().nth(MAX_REASON) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A task that ends with this value, and what it is told.
struct Task {
    subject: watch::Sender<Subject>,
    handle: AbortHandle,
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

/// Checks this node's endpoints as the view shows them, for ever.
pub(super) async fn follow(agent: Arc<Agent>, user: HealthUser, tally: Tally) {
    let context = Arc::new(Context {
        cluster: agent.cluster.clone(),
        reports: Arc::default(),
        tally,
        user,
        dataplane: agent.dataplane.clone(),
        connections: Semaphore::new(CONNECTIONS),
        commands: Semaphore::new(COMMANDS),
        commands_of: Mutex::default(),
    });
    tokio::spawn(context.reports.clone().write(agent.cluster.clone()));
    let mut view = agent.view.subscribe();
    let mut tasks: BTreeMap<EndpointId, Task> = BTreeMap::new();
    loop {
        let published = view.borrow_and_update().clone();
        // Before that, an endpoint that is not shown may well exist.
        if published.complete {
            adopt(&context, &mut tasks, subjects(&published.snapshot, &agent.me.name));
        }
        if view.changed().await.is_err() {
            return;
        }
    }
}

/// The endpoints about which there is something to find out.
fn subjects(snapshot: &Snapshot, me: &NodeName) -> BTreeMap<EndpointId, Subject> {
    let members = snapshot.members.values().flat_map(|members| members.endpoints.values());
    let own = members.filter(|endpoint| endpoint.node == *me);
    let subject = |endpoint: &Arc<Endpoint>| {
        let service = snapshot.services.get(endpoint.service.as_ref()?).cloned();
        let wanted = match endpoint.state {
            EndpointState::Draining => false,
            EndpointState::Ready => service.as_ref().is_some_and(|service| service.health.is_some()),
            EndpointState::Pending | EndpointState::Unhealthy => true,
        };
        let address = endpoint.addresses.iter().copied().min_by_key(IpAddr::is_ipv6);
        let network = snapshot.networks.get(&endpoint.network);
        let subnet = network.zip(address).and_then(|(network, address)| {
            network.standing().find(|subnet| subnet.cidr().contains(address))
        });
        let source = subnet.map(|subnet| subnet.gateway());
        let subject = Subject { endpoint: endpoint.clone(), service, address, source };
        wanted.then_some((endpoint.id, subject))
    };
    own.filter_map(subject).collect()
}

/// Starts, changes and ends tasks, so that each of these has one.
fn adopt(
    context: &Arc<Context>,
    tasks: &mut BTreeMap<EndpointId, Task>,
    subjects: BTreeMap<EndpointId, Subject>,
) {
    tasks.retain(|id, _| {
        let stays = subjects.contains_key(id);
        if !stays {
            context.reports.forget(*id);
        }
        stays
    });
    for (id, new) in subjects {
        let Some(task) = tasks.get(&id) else {
            let (sender, receiver) = watch::channel(new);
            let handle = tokio::spawn(care(context.clone(), receiver)).abort_handle();
            tasks.insert(id, Task { subject: sender, handle });
            continue;
        };
        task.subject.send_if_modified(|subject| {
            let differs = *subject != new;
            *subject = new;
            differs
        });
    }
}

/// Looks after one endpoint, with its service's check or without one. A new one only once it is plugged
/// in: before, it cannot be reached.
async fn care(context: Arc<Context>, mut receiver: watch::Receiver<Subject>) {
    let new = receiver.borrow().endpoint.clone();
    if new.state == EndpointState::Pending {
        context.until_plugged(&new).await;
    }
    let mut course: Option<Course> = None;
    loop {
        let subject = receiver.borrow_and_update().clone();
        let state = subject.endpoint.state;
        let Some(check) = subject.check() else {
            course = None;
            tokio::select! {
                changed = receiver.changed() => if changed.is_err() { return },
                () = context.release(&subject) => if receiver.changed().await.is_err() { return },
            }
            continue;
        };
        let now = Instant::now();
        let course = course.get_or_insert_with(|| Course::new(check, state, spread(&subject), now));
        course.check_with(check, now);
        let mut observed = pin!(context.observe(&subject, check, course.due()));
        let result = loop {
            tokio::select! {
                result = &mut observed => break Some(result),
                changed = receiver.changed() => if changed.is_err() { return },
            }
            let shown = receiver.borrow_and_update();
            if shown.check() != Some(check) {
                break None;
            }
            context.insist(course, &shown.endpoint);
        };
        if let Some((result, times)) = result
            && course.take(result, times)
        {
            context.tell(course, &subject.endpoint);
        }
    }
}

/// A number that is always the same for one endpoint.
fn spread(subject: &Subject) -> u16 {
    let mut hasher = DefaultHasher::new();
    subject.endpoint.id.hash(&mut hasher);
    (hasher.finish() >> 48) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_one_short_line() {
        assert_eq!(brief(" exit status: 1:\n\x1b[31mno\tway \r\n"), "exit status: 1: [31mno way");
        let long = brief(&"ä".repeat(MAX_REASON + 1));
        assert_eq!(long.chars().count(), MAX_REASON + 1);
        assert!(long.ends_with("ä…"), "{long}");
        assert_eq!(brief(&"ä".repeat(MAX_REASON)), "ä".repeat(MAX_REASON));
    }

    fn snapshot() -> Snapshot {
        let endpoint = |number: u8, node: &str, service: &str, state: &str| -> Arc<Endpoint> {
            let value = serde_json::json!({
                "id": format!("{number:012x}"), "name": format!("e{number}"),
                "network": "aaaaaaaaaaaa", "node": node, "service": service, "state": state,
                "addresses": ["fd00:9::2", "10.9.0.2"], "mac": "06:00:00:00:00:01",
                "attachment": {"netns": "/run/netns/c", "inode": 1, "boot": "b", "interface": "eth0"},
            });
            Arc::new(serde_json::from_value(value).unwrap())
        };
        let mut snapshot = Snapshot::default();
        let services = Arc::make_mut(&mut snapshot.services);
        let test = serde_json::json!({"test": {"type": "tcp", "port": 80}});
        for (name, health) in [("checked", test), ("unchecked", serde_json::Value::Null)] {
            let service = serde_json::json!({
                "id": "cccccccccccc", "name": name, "networks": [], "replicas": 1, "addresses": {},
                "endpoint_mode": "dnsrr", "update_order": "stop-first", "update_parallelism": 1,
                "health": health,
            });
            services.insert(name.parse().unwrap(), Arc::new(serde_json::from_value(service).unwrap()));
        }
        let network = serde_json::json!({
            "id": "aaaaaaaaaaaa", "name": "web", "vni": 4097, "uplink": 3,
            "subnets": [{"cidr": "10.9.0.0/24"}],
        });
        let network: crate::model::Network = serde_json::from_value(network).unwrap();
        let members = snapshot.members.entry(network.id).or_default();
        let mut number = 0;
        for node in ["me", "other"] {
            for service in ["checked", "unchecked", "gone"] {
                for state in ["pending", "ready", "unhealthy", "draining"] {
                    number += 1;
                    let endpoint = endpoint(number, node, service, state);
                    Arc::make_mut(members).endpoints.insert(endpoint.id, endpoint);
                }
            }
        }
        let versioned = crate::model::Versioned { value: network, revision: 1 };
        Arc::make_mut(&mut snapshot.networks).insert(versioned.id, Arc::new(versioned));
        snapshot
    }

    #[test]
    fn own_endpoints_have_a_task_while_there_is_something_to_find_out() {
        let subjects = subjects(&snapshot(), &"me".parse().unwrap());
        let names: Vec<String> = subjects.values().map(|s| s.endpoint.name.to_string()).collect();
        // Checked, unless they are drained; without a check those that are not ready.
        assert_eq!(names, ["e1", "e2", "e3", "e5", "e7", "e9", "e11"]);
        let checked: Vec<bool> = subjects.values().map(|s| s.check().is_some()).collect();
        assert_eq!(checked, [true, true, true, false, false, false, false]);
        for subject in subjects.values() {
            assert_eq!(subject.address, Some("10.9.0.2".parse().unwrap()));
            assert_eq!(subject.source, Some("10.9.0.1".parse().unwrap()));
        }
    }
}
