//! Looking for leaked and double-booked addresses: the store with itself, and with the kernel of
//! every node.
//!
//! The node that is asked looks at its own kernel and has the others look at theirs, by a request in
//! the store (`cluster::check::Asked`).

mod answer;
mod look;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use super::agent::Agent;
use crate::api::{ApiError, CheckOutcome, CheckView, NodeCheck};
use crate::cluster::check::{Asked, Check};
use crate::config::duration::Shown;
use crate::model::{CheckAnswer, Finding, NetworkId, NodeName};

pub(super) use answer::answer;

/// How long others are waited for: a node that is just looking for somebody else needs two times the
/// grace, and time to read.
const PATIENCE: Duration = look::GRACE.saturating_mul(3);
/// How long a request stays in the store when nobody takes it back.
const LIFE: Duration = PATIENCE.saturating_add(Duration::from_secs(3));

/// What others have answered; an error says what cannot be read of it.
type Answers = BTreeMap<NodeName, Result<CheckAnswer, String>>;

impl Agent {
    /// Compares the store with itself, and with the kernels of all nodes or of this one only.
    pub(super) async fn check(&self, network: Option<&str>, local: bool) -> Result<CheckView, ApiError> {
        self.compare(self.cluster.check(network).await?, local).await
    }

    /// Repairs what it is safe to repair in the store, and checks again.
    pub(super) async fn repair(
        &self,
        network: Option<&str>,
        local: bool,
    ) -> Result<CheckView, ApiError> {
        let check = self.cluster.check(network).await?;
        let mut repaired = Vec::new();
        for found in &check.inconsistencies {
            if self.cluster.repair(found).await? {
                let Finding { kind, what, problem, repair, .. } = &found.finding;
                info!(%kind, key = what, problem, repair, "repaired");
                repaired.push(found.finding.clone());
            }
        }
        // A network that consisted of nothing but leaks is not there any more.
        let left = self.cluster.check_again(check.network).await?;
        Ok(CheckView { repaired, ..self.compare(left, local).await? })
    }

    /// Adds what the kernels say to a check of the store.
    async fn compare(&self, check: Check, local: bool) -> Result<CheckView, ApiError> {
        let (network, revision) = (check.network, check.revision.0);
        let mut findings: Vec<Finding> =
            check.inconsistencies.iter().map(|found| found.finding.clone()).collect();
        let others = async {
            match local {
                true => (Vec::new(), Vec::new()),
                false => self.others(network).await,
            }
        };
        let (own, (mut nodes, found)) = tokio::join!(self.look(check), others);
        findings.extend(own?.of(network));
        findings.extend(found);
        let node = self.me.name.clone();
        nodes.push(node_check(&node, CheckOutcome::Compared, ""));
        nodes.sort_by(|a, b| a.node.cmp(&b.node));
        Ok(CheckView { node, nodes, revision, repaired: Vec::new(), findings })
    }

    /// Has the other nodes look at their kernels: what became of it, and what they have found.
    async fn others(&self, network: Option<NetworkId>) -> (Vec<NodeCheck>, Vec<Finding>) {
        let snapshot = self.snapshot();
        let mut others: BTreeSet<NodeName> = snapshot.nodes.keys().cloned().collect();
        others.remove(&self.me.name);
        let (mut alive, mut answers, mut unasked) = (snapshot.alive, Answers::new(), None);
        if others.iter().any(|node| alive.contains(node)) {
            match self.cluster.ask(network, LIFE).await {
                Ok(mut asked) => {
                    alive = self.hear(&mut asked, &others).await;
                    if let Err(error) = self.cluster.end_check(&asked).await {
                        warn!(check = %asked.id, %error, "check not taken back: it ends by itself");
                    }
                    answers = asked.answers;
                }
                Err(error) => unasked = Some(format!("it could not be asked: {error}")),
            }
        }
        others.extend(answers.keys().cloned());
        let (mut nodes, mut findings) = (Vec::new(), Vec::new());
        for node in &others {
            let (check, found) = match answers.remove(node) {
                Some(answer) => of_answer(node, answer),
                None => (unanswered(node, alive.contains(node), unasked.as_deref()), Vec::new()),
            };
            nodes.push(check);
            findings.extend(found);
        }
        (nodes, findings)
    }

    /// Waits until every node that is alive has answered, or for long enough. Gives who is alive.
    async fn hear(&self, asked: &mut Asked, others: &BTreeSet<NodeName>) -> Arc<BTreeSet<NodeName>> {
        let until = Instant::now() + PATIENCE;
        let mut view = self.view.subscribe();
        loop {
            let (is_seen, alive) = {
                let snapshot = &view.borrow_and_update().snapshot;
                (snapshot.checks.contains_key(&asked.id), snapshot.alive.clone())
            };
            // Who was alive when it was asked is known only then.
            let open = |node| alive.contains(node) && !asked.answers.contains_key(node);
            if is_seen && !others.iter().any(open) {
                return alive;
            }
            tokio::select! {
                () = asked.hear() => {}
                changed = view.changed() => if changed.is_err() { return alive },
                () = tokio::time::sleep_until(until) => return alive,
            }
        }
    }
}

/// What a node's answer says.
fn of_answer(node: &NodeName, answer: Result<CheckAnswer, String>) -> (NodeCheck, Vec<Finding>) {
    match answer {
        Ok(CheckAnswer { findings, cut, problem }) if problem.is_empty() => {
            (NodeCheck { cut, ..node_check(node, CheckOutcome::Compared, "") }, findings)
        }
        Ok(CheckAnswer { problem, .. }) => {
            (node_check(node, CheckOutcome::Failed, &problem), Vec::new())
        }
        Err(problem) => {
            let reason = format!("its answer is of another version of netctl: {problem}");
            (node_check(node, CheckOutcome::Failed, &reason), Vec::new())
        }
    }
}

/// What became of a node that did not answer.
fn unanswered(node: &NodeName, is_alive: bool, unasked: Option<&str>) -> NodeCheck {
    match (is_alive, unasked) {
        (false, _) => node_check(node, CheckOutcome::Dead, "it is dead"),
        (true, Some(reason)) => node_check(node, CheckOutcome::Failed, reason),
        (true, None) => {
            let reason = format!("it is alive, and has not answered within {}", Shown(PATIENCE));
            node_check(node, CheckOutcome::Late, &reason)
        }
    }
}

fn node_check(node: &NodeName, outcome: CheckOutcome, reason: &str) -> NodeCheck {
    NodeCheck { node: node.clone(), outcome, reason: reason.to_owned(), cut: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_compared_only_when_it_says_so() {
        let node: NodeName = "n2".parse().unwrap();
        let told = |answer| {
            let NodeCheck { outcome, reason, cut, .. } = of_answer(&node, answer).0;
            (outcome, reason, cut)
        };
        let answer = CheckAnswer { cut: 3, ..CheckAnswer::default() };
        assert_eq!(told(Ok(answer.clone())), (CheckOutcome::Compared, String::new(), 3));
        let problem = "nft is missing".to_owned();
        let unable = CheckAnswer { problem: problem.clone(), ..answer };
        assert_eq!(told(Ok(unable)), (CheckOutcome::Failed, problem, 0));
        let (outcome, reason, _) = told(Err("no field findings".to_owned()));
        assert!(outcome == CheckOutcome::Failed && reason.contains("no field findings"), "{reason}");
        let silent = |is_alive, unasked| unanswered(&node, is_alive, unasked);
        assert_eq!(silent(false, Some("full")).outcome, CheckOutcome::Dead);
        assert_eq!(silent(true, None).outcome, CheckOutcome::Late);
        let unasked = silent(true, Some("full"));
        assert_eq!((unasked.outcome, unasked.reason.as_str()), (CheckOutcome::Failed, "full"));
    }
}
