//! The states of endpoints on their way to the store: the newest of each, until it is written.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::cluster::{Cluster, ClusterError};
use crate::model::{Endpoint, EndpointId, EndpointState, NetworkId};

/// How soon it is tried again to write what the store did not take.
const AGAIN: Duration = Duration::from_secs(1);
/// How many states are written at once.
const AT_ONCE: usize = 16;

/// What the store is to have of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Report {
    network: NetworkId,
    state: EndpointState,
    reason: String,
}

/// What is to be written.
#[derive(Debug, Default)]
pub(super) struct Reports {
    waiting: Mutex<BTreeMap<EndpointId, Report>>,
    news: Notify,
}

impl Reports {
    /// Has a state written, in place of one of the same endpoint that still waits.
    pub(super) fn tell(&self, endpoint: &Endpoint, state: EndpointState, reason: String) {
        let report = Report { network: endpoint.network, state, reason };
        self.waiting().insert(endpoint.id, report);
        self.news.notify_one();
    }

    /// Has nothing written of an endpoint any more.
    pub(super) fn forget(&self, endpoint: EndpointId) {
        self.waiting().remove(&endpoint);
    }

    /// Writes what is told, for ever.
    pub(super) async fn write(self: Arc<Self>, cluster: Arc<Cluster>) {
        loop {
            self.news.notified().await;
            let mut told = false;
            while let Err(error) = self.write_waiting(&cluster).await {
                if !std::mem::replace(&mut told, true) {
                    warn!(%error, "states of endpoints not written: it is tried again until it works");
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    }

    /// Writes what waits now. A store that cannot be reached is not asked for each of many.
    async fn write_waiting(&self, cluster: &Arc<Cluster>) -> Result<(), ClusterError> {
        let waiting: Vec<_> = self.waiting().iter().map(|(id, r)| (*id, r.clone())).collect();
        let mut outcome = Ok(());
        for batch in waiting.chunks(AT_ONCE) {
            let mut writes = JoinSet::new();
            for (id, report) in batch.iter().cloned() {
                let cluster = cluster.clone();
                writes
                    .spawn(async move { write_one(&cluster, id, &report).await.map(|()| (id, report)) });
            }
            for written in writes.join_all().await {
                match written {
                    Ok((id, report)) => self.done(id, &report),
                    Err(error) => outcome = Err(error),
                }
            }
            if let Err(ClusterError::Store(_) | ClusterError::Replaced(_)) = outcome {
                break;
            }
        }
        outcome
    }

    /// What was written waits no longer, unless something newer does.
    fn done(&self, id: EndpointId, report: &Report) {
        let mut waiting = self.waiting();
        if waiting.get(&id) == Some(report) {
            waiting.remove(&id);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<EndpointId, Report>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn write_one(cluster: &Cluster, id: EndpointId, report: &Report) -> Result<(), ClusterError> {
    let Report { network, state, reason } = report;
    let Some(endpoint) = cluster.set_endpoint_state(*network, id, *state, reason).await? else {
        return Ok(());
    };
    // One that is drained stays so.
    if endpoint.state == *state {
        let (name, service) = (&endpoint.name, endpoint.service.as_ref().map(|name| name.as_str()));
        info!(endpoint = %id, %name, service, %state, reason, "state of an endpoint");
    }
    Ok(())
}
