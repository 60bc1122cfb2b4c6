//! One agent of the run: its way to the store, its member, its callers.

use std::sync::Arc;
use std::time::Duration;

use netctl::cluster::ClusterError;
use netctl::cluster::view::Using;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep;

use super::{ALIVE, CALLERS, Shared, operation, plan};
use crate::faults::{Proxy, Weather};
use crate::member::Member;

/// How soon is tried again what the store did not do.
const AGAIN: Duration = Duration::from_millis(20);

pub struct Agent {
    shared: Arc<Shared>,
    number: usize,
    dice: StdRng,
    weather: watch::Sender<Weather>,
    life: tokio::task::JoinHandle<()>,
    /// It ends with the agent.
    proxy: Option<Proxy>,
}

impl Agent {
    pub async fn start(shared: Arc<Shared>, number: usize, mut dice: StdRng) -> Self {
        let weather = watch::Sender::new(Weather::Fair);
        let (life, proxy) = live(&shared, number, &mut dice, &weather).await;
        Self { shared, number, dice, weather, life, proxy }
    }

    pub fn weather(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }

    /// Ends it at whatever it is doing, and starts another under its name.
    pub async fn kill(&mut self) {
        self.life.abort();
        // It was cancelled: that is meant.
        drop((&mut self.life).await);
        let weather = watch::Sender::new(Weather::Fair);
        let (life, proxy) = live(&self.shared, self.number, &mut self.dice, &weather).await;
        (self.life, self.proxy, self.weather) = (life, proxy, weather);
    }

    /// Waits until its callers have nothing more to do.
    pub async fn end(&mut self, now: bool) {
        if now {
            self.life.abort();
        }
        if let Err(error) = (&mut self.life).await
            && error.is_panic()
        {
            self.shared.problem(format!("agent {}: {error}", self.number));
        }
    }
}

async fn live(
    shared: &Arc<Shared>,
    number: usize,
    dice: &mut StdRng,
    weather: &watch::Sender<Weather>,
) -> (tokio::task::JoinHandle<()>, Option<Proxy>) {
    let way = shared.way(StdRng::from_rng(&mut *dice), weather.subscribe()).await;
    let (store, proxy) = way.expect("the configuration is right");
    let (shared, dice) = (shared.clone(), StdRng::from_rng(dice));
    let life = tokio::spawn(async move {
        let plan = plan(shared.networks.clone());
        let member = loop {
            match Member::start(store.clone(), &shared.nodes[number], &plan).await {
                Ok(member) => break Arc::new(member),
                Err(_) => sleep(AGAIN).await,
            }
        };
        while collect(&shared, number, &member).await.is_err() {
            sleep(AGAIN).await;
        }
        work(shared, number, member, dice).await;
    });
    (life, proxy)
}

/// What an agent does when it starts again: endpoints of its own that nobody was told of are
/// released, and those whose release was under way.
pub async fn collect(shared: &Shared, number: usize, member: &Member) -> Result<(), ClusterError> {
    let ending = shared.told.lock().unwrap().killed(number);
    let mut found = Vec::new();
    for network in &shared.networks {
        found.extend(member.cluster.endpoints(*network).await?);
    }
    let me = &shared.nodes[number].name;
    for endpoint in found.iter().filter(|endpoint| endpoint.node == *me) {
        let known = shared.told.lock().unwrap().endpoints.contains_key(&endpoint.id);
        if !known || ending.contains(&endpoint.id) {
            member.cluster.release(endpoint).await?;
            shared.note(if known { "release finished" } else { "collected" });
        }
    }
    let mut told = shared.told.lock().unwrap();
    ending.into_iter().for_each(|id| told.end(id));
    for (id, entry) in told.endpoints.iter().filter(|(_, entry)| entry.agent == number) {
        if !found.contains(&entry.endpoint) {
            shared.problem(format!("{id} was acknowledged and is not there: {:?}", entry.endpoint));
        }
    }
    Ok(())
}

/// Has its callers call, and its lease kept. They end with it.
async fn work(shared: Arc<Shared>, number: usize, member: Arc<Member>, mut dice: StdRng) {
    let mut using: Vec<Using> = Vec::new();
    for network in &shared.networks {
        using.push(loop {
            match member.follow(*network).await {
                Ok(using) => break using,
                Err(_) => sleep(AGAIN).await,
            }
        });
    }
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let caller = operation::Caller {
            shared: shared.clone(),
            agent: number,
            member: member.clone(),
            dice: StdRng::from_rng(&mut dice),
        };
        callers.spawn(caller.call());
    }
    let lease = Ended(tokio::spawn(stay_alive(member)).abort_handle());
    while let Some(ended) = callers.join_next().await {
        if let Err(error) = ended {
            shared.problem(format!("a caller of agent {number}: {error}"));
        }
    }
    drop((lease, using));
}

struct Ended(AbortHandle);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn stay_alive(member: Arc<Member>) {
    let mut lease = member.lease;
    let mut tick = tokio::time::interval(ALIVE / 4);
    loop {
        tick.tick().await;
        if let Ok(kept) = member.cluster.stay_alive(lease, &member.node, ALIVE).await {
            lease = kept;
        }
    }
}
