//! Tells the other nodes when this one gives a drained endpoint no new connections any more, and when
//! the last one that it has there has ended.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::dataplane::{Dataplane, Load};
use crate::cluster::drain::{Ack, Cause};
use crate::cluster::{Cluster, View};
use crate::model::{Endpoint, EndpointId, EndpointState, NetworkId, Snapshot};

/// How often connections are counted while something drains.
const LOOK: Duration = Duration::from_secs(1);
/// How often another number of them is written, as long as there are any.
const TELL: Duration = Duration::from_secs(5);

/// How many are written at once.
const AT_ONCE: usize = 32;

/// What was written of an endpoint, when, and the record that it was written of.
struct Said {
    endpoint: Arc<Endpoint>,
    drain: Cause,
    connections: u64,
    at: Instant,
}

impl Said {
    /// Whether this number of connections is to be written now.
    fn is_news(&self, connections: u64, now: Instant) -> bool {
        connections == 0 || (connections != self.connections && now.duration_since(self.at) >= TELL)
    }
}

/// What was written, and when each network's connections were counted last.
#[derive(Default)]
struct Known {
    said: BTreeMap<EndpointId, Said>,
    counted: BTreeMap<NetworkId, Instant>,
}

/// Acknowledges drained endpoints, until the view ends.
pub(super) async fn watch(view: View, cluster: Arc<Cluster>, dataplane: Arc<Dataplane>) {
    let mut published = view.subscribe();
    let mut known = Known::default();
    loop {
        let latest = published.borrow_and_update().clone();
        let draining = match latest.complete {
            true => acknowledge(&latest.snapshot, &cluster, &dataplane, &mut known).await,
            false => false,
        };
        let change = published.changed();
        let changed = match draining {
            // That nothing has changed for a while is no end.
            true => tokio::time::timeout(LOOK, change).await.unwrap_or(Ok(())),
            false => change.await,
        };
        if changed.is_err() {
            return;
        }
    }
}

/// Writes what is to be said by now; whether more will be.
async fn acknowledge(
    snapshot: &Snapshot,
    cluster: &Arc<Cluster>,
    dataplane: &Dataplane,
    Known { said, counted }: &mut Known,
) -> bool {
    said.retain(|_, said| {
        let members = snapshot.members.get(&said.endpoint.network);
        let record = members.and_then(|members| members.endpoints.get(&said.endpoint.id));
        record.is_some_and(|record| {
            Arc::ptr_eq(record, &said.endpoint) && drain(snapshot, record) == Some(said.drain)
        })
    });
    let mut more = false;
    for (network, members) in &snapshot.members {
        let open: Vec<(&Arc<Endpoint>, Cause)> = members
            .endpoints
            .values()
            .filter(|endpoint| said.get(&endpoint.id).is_none_or(|said| said.connections > 0))
            .filter_map(|endpoint| Some((endpoint, drain(snapshot, endpoint)?)))
            .collect();
        if open.is_empty() {
            continue;
        }
        more = true;
        let now = Instant::now();
        // Whoever waits to hear of a drain waits for no count; a count comes in time.
        let is_new = open.iter().any(|(endpoint, _)| !said.contains_key(&endpoint.id));
        let last = counted.get(network);
        if !is_new && last.is_some_and(|last| now.duration_since(*last) < LOOK) {
            continue;
        }
        counted.insert(*network, now);
        let loads = match dataplane.loads(*network).await {
            Ok(Ok(loads)) => loads,
            Ok(Err(error)) => {
                warn!(%network, %error, "drain not acknowledged yet");
                continue;
            }
            // It is about to end.
            Err(_) => return false,
        };
        let mut saying = JoinSet::new();
        for (endpoint, drain) in open {
            let Some(connections) = left(endpoint, &loads) else { continue };
            if said.get(&endpoint.id).is_some_and(|said| !said.is_news(connections, now)) {
                continue;
            }
            if saying.len() == AT_ONCE {
                take_over(said, saying.join_next().await);
            }
            let news = Said { endpoint: endpoint.clone(), drain, connections, at: now };
            saying.spawn(say(cluster.clone(), news, members.revision));
        }
        while let Some(ended) = saying.join_next().await {
            take_over(said, Some(ended));
        }
    }
    counted.retain(|network, _| snapshot.members.contains_key(network));
    more
}

/// Keeps what was written.
fn take_over(
    said: &mut BTreeMap<EndpointId, Said>,
    written: Option<Result<Option<Said>, tokio::task::JoinError>>,
) {
    if let Some(Ok(Some(news))) = written {
        said.insert(news.endpoint.id, news);
    }
}

/// Writes what is to be said, with the revision of the members that was applied; gives it back once
/// it is written.
async fn say(cluster: Arc<Cluster>, news: Said, revision: u64) -> Option<Said> {
    let Endpoint { network, id, .. } = *news.endpoint;
    let ack = Ack { revision, connections: news.connections };
    match cluster.acknowledge(network, id, news.drain, ack).await {
        Ok(true) => {
            debug!(endpoint = %id, ?ack, "drain acknowledged");
            Some(news)
        }
        // The view is about to show that.
        Ok(false) => None,
        Err(error) => {
            warn!(endpoint = %id, %error, "drain not acknowledged yet");
            None
        }
    }
}

/// Whether an endpoint is to get no new connections because somebody said so.
fn drain(snapshot: &Snapshot, endpoint: &Endpoint) -> Option<Cause> {
    endpoint.service.as_ref()?;
    match endpoint.state {
        EndpointState::Draining => Some(Cause::Own),
        _ => snapshot.drained.get(&endpoint.node).copied().map(Cause::Node),
    }
}

/// How many connections an endpoint still has; `None`: it may still get new ones.
fn left(endpoint: &Endpoint, loads: &[Load]) -> Option<u64> {
    let own = || loads.iter().filter(|load| endpoint.addresses.contains(&load.backend.ip()));
    own().all(|load| load.weight == 0).then(|| own().map(|load| u64::from(load.active)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lb::Front;
    use crate::model::Protocol;

    fn load(backend: &str, weight: u32, active: u32) -> Load {
        let address = [10, 9, 0, 2].into();
        Load {
            front: Front::Port { protocol: Protocol::Tcp, address, port: 80 },
            backend: backend.parse().unwrap(),
            weight,
            active,
            inactive: 5,
            connections: 9,
            incoming_bytes: 0,
            outgoing_bytes: 0,
        }
    }

    fn endpoint() -> Endpoint {
        serde_json::from_value(serde_json::json!({
            "id": "bbbbbbbbbbbb", "name": "e", "network": "aaaaaaaaaaaa", "node": "n1",
            "addresses": ["10.9.0.5", "fd00:9::5"], "mac": "06:00:00:00:00:01",
            "attachment": {"netns": "/run/netns/c", "inode": 1, "boot": "b", "interface": "eth0"},
        }))
        .unwrap()
    }

    #[test]
    fn the_end_is_told_at_once_and_another_number_after_a_while() {
        let at = Instant::now();
        let said = Said { endpoint: Arc::new(endpoint()), drain: Cause::Own, connections: 3, at };
        for (connections, after, news) in [
            (0, Duration::ZERO, true),
            (3, Duration::ZERO, false),
            (3, TELL, false),
            (2, TELL - Duration::from_millis(1), false),
            (2, TELL, true),
            (4, TELL, true),
        ] {
            assert_eq!(said.is_news(connections, at + after), news, "{connections} {after:?}");
        }
    }

    #[test]
    fn what_is_left_counts_when_nothing_new_can_come() {
        let endpoint = endpoint();
        assert_eq!(left(&endpoint, &[]), Some(0));
        let other = load("10.9.0.6:80", 1, 7);
        let loads = [load("10.9.0.5:80", 0, 2), load("[fd00:9::5]:80", 0, 1), other.clone()];
        assert_eq!(left(&endpoint, &loads), Some(3));
        let loads = [load("10.9.0.5:80", 0, 2), load("[fd00:9::5]:80", 1, 1), other];
        assert_eq!(left(&endpoint, &loads), None);
    }
}
