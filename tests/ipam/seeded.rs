//! The seeded run: agents that use one store all at once, while it fails and they are killed.

mod agent;
mod end;
pub mod fault;
mod operation;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use netctl::model::{NetworkId, Node};
use netctl::store::embedded::Embedded;
use netctl::store::etcd::{Etcd, EtcdConfig};
use netctl::store::{Store, StoreError};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::watch;

use crate::audit::Audit;
use crate::faults::{Faulty, Proxy, Tally, Weather};
use crate::member::{Member, Plan, defaults, network_spec, node};
use crate::told::Told;
use agent::Agent;
use fault::Fault;

pub const AGENTS: usize = 8;
/// How many calls an agent has under way.
const CALLERS: usize = 16;
const ALIVE: Duration = Duration::from_secs(1);
const REST: Duration = Duration::from_millis(1);
/// One network that is full most of the time, and one that is not.
const NETWORKS: [(&str, &[&str]); 2] =
    [("tight", &["10.71.0.0/27", "fd00:71::/123"]), ("roomy", &["10.72.0.0/23", "fd00:72::/119"])];
/// What the tight one may get in addition.
const MORE: [&str; 3] = ["10.71.1.0/29", "10.71.2.0/28", "fd00:71:1::/124"];

/// Where the store is.
pub enum Ground {
    Embedded(PathBuf),
    /// A server, before which each agent has a proxy.
    Etcd(EtcdConfig, u16),
}

/// What the agents share.
pub struct Shared {
    /// The store as it is when nothing fails.
    pub raw: Arc<dyn Store>,
    ground: Ground,
    pub networks: Vec<NetworkId>,
    nodes: Vec<Node>,
    pub told: Mutex<Told>,
    pub tally: Arc<Tally>,
    total: u64,
    done: watch::Sender<u64>,
    /// How many calls ended how.
    ends: Mutex<BTreeMap<String, u64>>,
    names: AtomicU64,
    problems: Mutex<Vec<String>>,
}

impl Shared {
    /// Counts an operation that begins. `false`: there are to be no more.
    pub fn next(&self) -> bool {
        let mut goes_on = false;
        self.done.send_modify(|done| {
            goes_on = *done < self.total;
            *done += u64::from(goes_on);
        });
        goes_on && self.problems.lock().unwrap().is_empty()
    }

    pub fn problem(&self, text: String) {
        eprintln!("{text}");
        self.problems.lock().unwrap().push(text);
        // Nobody waits for more.
        self.done.send_replace(self.total);
    }

    pub fn note(&self, end: impl Into<String>) {
        *self.ends.lock().unwrap().entry(end.into()).or_default() += 1;
    }

    pub fn number(&self) -> u64 {
        self.names.fetch_add(1, Ordering::Relaxed)
    }

    fn is_over(&self) -> bool {
        *self.done.borrow() >= self.total || !self.problems.lock().unwrap().is_empty()
    }

    /// An agent's way to the store; as long as the proxy lives.
    async fn way(
        &self,
        mut dice: StdRng,
        weather: watch::Receiver<Weather>,
    ) -> Result<(Arc<dyn Store>, Option<Proxy>), StoreError> {
        let tally = self.tally.clone();
        match &self.ground {
            Ground::Embedded(_) => {
                let (inner, dice) = (self.raw.clone(), Mutex::new(StdRng::from_rng(&mut dice)));
                Ok((Arc::new(Faulty { inner, dice, weather, tally }), None))
            }
            Ground::Etcd(config, port) => {
                let proxy = Proxy::start(*port, dice, weather, tally).await.expect("a port");
                let endpoints = vec![format!("http://127.0.0.1:{}", proxy.port)];
                Ok((Arc::new(Etcd::new(EtcdConfig { endpoints, ..config.clone() })?), Some(proxy)))
            }
        }
    }
}

fn plan(networks: Vec<NetworkId>) -> Plan {
    Plan { rest: REST, alive: ALIVE, networks }
}

/// Does so many operations, and a fault where one is wanted; ends, and gives the numbers.
///
/// # Errors
/// What was given out twice, lost, or leaked.
pub async fn run(ground: Ground, total: u64, seed: u64, fault: Option<Fault>) -> Result<String, String> {
    let raw: Arc<dyn Store> = match &ground {
        Ground::Embedded(path) => Arc::new(Embedded::open(path).expect("a store")),
        Ground::Etcd(config, _) => Arc::new(Etcd::new(config.clone()).expect("a store")),
    };
    let nodes: Vec<Node> = (0..AGENTS).map(node).collect();
    let first = Member::start(raw.clone(), &nodes[0], &plan(Vec::new())).await.expect("it starts");
    let mut networks = Vec::new();
    for (name, subnets) in NETWORKS {
        let created = first.cluster.create_network(&network_spec(name, subnets), &defaults()).await;
        networks.push(created.expect("the name is free").id);
    }
    drop(first);
    let (ended, end) = watch::channel(None);
    let audit = tokio::spawn(Audit::follow(raw.clone(), end));
    let shared = Arc::new(Shared {
        raw,
        ground,
        networks,
        nodes,
        told: Mutex::default(),
        tally: Arc::default(),
        total,
        done: watch::Sender::new(0),
        ends: Mutex::default(),
        names: AtomicU64::new(0),
        problems: Mutex::default(),
    });
    let kills = storm(&shared, StdRng::seed_from_u64(seed), &audit).await;
    if !audit.is_finished() {
        if let Some(fault) = fault {
            fault.inject(&shared).await?;
        }
        if let Err(problem) = end::collect(&shared).await {
            shared.problem(problem);
        }
        let revision = shared.raw.list("base/").await.map_err(|e| e.to_string())?.revision;
        ended.send_replace(Some(revision));
    }
    let audit = audit.await.map_err(|error| error.to_string())?.unwrap_or_else(|problem| {
        shared.problem(problem);
        Audit::default()
    });
    let problems = shared.problems.lock().unwrap().join("; ");
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(format!(
        "{total} operations, {} addresses acknowledged, {kills} agents killed, {:?}; {:?}; {} changes \
         of the store read, full {} times",
        shared.told.lock().unwrap().given,
        shared.tally,
        shared.ends.lock().unwrap(),
        audit.changes,
        audit.fullest,
    ))
}

/// Has the agents work, with faults and kills between, until all is done. Gives how many were
/// killed.
async fn storm<T>(shared: &Arc<Shared>, mut dice: StdRng, audit: &tokio::task::JoinHandle<T>) -> u64 {
    let mut agents = Vec::new();
    for number in 0..AGENTS {
        let dice = StdRng::from_rng(&mut dice);
        agents.push(Agent::start(shared.clone(), number, dice).await);
    }
    let (mut kills, mut told_at) = (0, 0);
    let mut done = shared.done.subscribe();
    while !shared.is_over() && !audit.is_finished() {
        let next = *done.borrow() + dice.random_range(200..1500);
        // Counting goes on until the end.
        drop(done.wait_for(|done| *done >= next.min(shared.total)).await);
        let victim = dice.random_range(0..AGENTS);
        match dice.random_range(0..7) {
            0 | 1 => {
                agents[victim].kill().await;
                kills += 1;
            }
            2 => agents[victim].weather(Weather::Away),
            3 => agents[victim].weather(Weather::Forgetful),
            _ => agents.iter().for_each(|agent| agent.weather(Weather::Fair)),
        }
        let reached = *done.borrow();
        if reached >= told_at + shared.total / 20 {
            eprintln!("{reached} of {} operations", shared.total);
            told_at = reached;
        }
    }
    for mut agent in agents {
        agent.weather(Weather::Fair);
        agent.end(audit.is_finished()).await;
    }
    kills
}
