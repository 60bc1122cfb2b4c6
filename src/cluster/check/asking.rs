//! Asking all nodes to look at their kernels: the request, and the answers, in the store.
//!
//! The request is below `base/`, so every node's view has it. All live under one lease that is never
//! renewed: who asks ends it when enough has been heard, and it ends by itself when nobody does.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::cluster::{Cluster, ClusterError, decode, encode, keys};
use crate::model::{CheckAnswer, CheckId, CheckRequest, NetworkId, NodeName};
use crate::store::{Change, Entry, Event, Lease, Outcome, StoreError, Transaction, Watch};

/// A request that other nodes see, and what they have answered.
pub struct Asked {
    /// Which it is.
    pub id: CheckId,
    /// What has been heard; an error where it cannot be read.
    pub answers: BTreeMap<NodeName, Result<CheckAnswer, String>>,
    lease: Lease,
    watch: Watch,
}

impl Cluster {
    /// Asks all other nodes to look at their kernels: for one network, or for all. What is not ended
    /// by [`Cluster::end_check`] ends after `ttl`.
    ///
    /// # Errors
    /// When the store cannot be reached or is another one.
    pub async fn ask(&self, network: Option<NetworkId>, ttl: Duration) -> Result<Asked, ClusterError> {
        let id = CheckId::random(&mut rand::rng());
        let lease = self.store.grant(ttl).await?;
        let (key, node) = (keys::check(id), self.node.clone());
        let request = CheckRequest { node, network, lease: lease.0 };
        let transaction = Transaction::new().absent(&key).put_leased(&key, encode(&request), lease);
        match self.commit(transaction).await? {
            Outcome::Committed(_) => {
                let watch = self.store.watch(&keys::answers(id), None);
                Ok(Asked { id, answers: BTreeMap::new(), lease, watch })
            }
            Outcome::Conflict => Err(ClusterError::Contention(key)),
        }
    }

    /// Writes what this node answers. Nothing is written where nobody waits for it any more.
    ///
    /// # Errors
    /// When the store cannot be reached or is another one.
    pub async fn answer(
        &self,
        id: CheckId,
        request: &CheckRequest,
        answer: &CheckAnswer,
    ) -> Result<(), ClusterError> {
        let key = keys::answer(id, &self.node);
        let transaction = Transaction::new().put_leased(key, encode(answer), Lease(request.lease));
        match self.commit(transaction).await {
            Err(ClusterError::Store(StoreError::LeaseGone(_))) => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Removes a request and all answers.
    ///
    /// # Errors
    /// When the store cannot be reached: then they go when their time is over.
    pub async fn end_check(&self, asked: &Asked) -> Result<(), ClusterError> {
        Ok(self.store.revoke(asked.lease).await?)
    }
}

impl Asked {
    /// Waits until something was heard. Whoever stops waiting loses nothing.
    pub async fn hear(&mut self) {
        let puts: Vec<(String, Entry)> = match self.watch.recv().await {
            Some(Event::Snapshot(listing)) => listing.entries.into_iter().collect(),
            Some(Event::Changes(_, changes)) => {
                let put = |change| match change {
                    Change::Put(key, entry) => Some((key, entry)),
                    Change::Delete(_) => None,
                };
                changes.into_iter().filter_map(put).collect()
            }
            Some(Event::Lost(_)) => Vec::new(),
            // The store is closed: nothing will be heard.
            None => std::future::pending().await,
        };
        for (key, entry) in puts {
            let node = key.strip_prefix(&keys::answers(self.id)).and_then(|node| node.parse().ok());
            let Some(node) = node else { continue };
            let answer = decode::<CheckAnswer>(&key, &entry);
            let answer = answer.map(|answer| answer.value).map_err(|error| error.to_string());
            self.answers.insert(node, answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{ClusterId, Finding, FindingKind};
    use crate::store::embedded::Embedded;
    use crate::store::{Store, schema};

    const TTL: Duration = Duration::from_secs(600);

    async fn nodes(store: &Arc<dyn Store>) -> [Cluster; 2] {
        let fresh = ClusterId::random(&mut rand::rng());
        schema::identify(store.as_ref(), None, fresh).await.unwrap();
        let node = async |name: &str| Cluster::new(store.clone(), name.parse().unwrap(), TTL).await;
        [node("n1").await.unwrap(), node("n2").await.unwrap()]
    }

    async fn keys_of_checks(store: &Arc<dyn Store>) -> Vec<String> {
        let keys = store.list("").await.unwrap().entries.into_keys();
        keys.filter(|key| key.contains("checks/")).collect()
    }

    /// As large as there are.
    fn finding() -> Finding {
        let name = "n".repeat(63);
        Finding {
            node: Some(name.parse().unwrap()),
            network: name.clone(),
            kind: FindingKind::NoDevice,
            what: "netctl-000000000001/ve000000000002".to_owned(),
            problem: format!("endpoint {name} has no interface on this node"),
            repair: "x".repeat(100),
            repairable: false,
        }
    }

    #[tokio::test]
    async fn what_is_answered_is_heard_and_goes_with_the_request() {
        let folder = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(Embedded::open(folder.path().join("store")).unwrap());
        let [n1, n2] = nodes(&store).await;
        let mut asked = n1.ask(None, TTL).await.unwrap();
        let entry = store.get(&keys::check(asked.id)).await.unwrap().unwrap();
        let request: CheckRequest = serde_json::from_slice(&entry.value).unwrap();
        assert_eq!((request.node.as_str(), request.network), ("n1", None));
        let answer = CheckAnswer::of(vec![finding(); CheckAnswer::MOST + 7]);
        assert_eq!((answer.findings.len(), answer.cut), (CheckAnswer::MOST, 7));
        n2.answer(asked.id, &request, &answer).await.unwrap();
        let newer = Transaction::new().put_leased(
            keys::answer(asked.id, &"n3".parse().unwrap()),
            "{}",
            Lease(request.lease),
        );
        store.commit(newer).await.unwrap();
        while asked.answers.len() < 2 {
            asked.hear().await;
        }
        assert_eq!(asked.answers[&"n2".parse().unwrap()].as_ref(), Ok(&answer));
        asked.answers[&"n3".parse().unwrap()].as_ref().unwrap_err();
        assert_eq!(keys_of_checks(&store).await.len(), 3);
        n1.end_check(&asked).await.unwrap();
        assert_eq!(keys_of_checks(&store).await, [""; 0]);
        n2.answer(asked.id, &request, &answer).await.unwrap();
        assert_eq!(keys_of_checks(&store).await, [""; 0], "nobody waits for it");
    }
}
