//! Answers the checks that other nodes ask for.

use std::collections::BTreeSet;
use std::sync::Arc;

use tracing::{debug, warn};

use super::Agent;
use crate::model::{CheckAnswer, CheckId, CheckRequest};

/// Answers until the view ends. What is asked while this node looks waits for the next look, which
/// is for all of it: one at a time.
pub(in crate::app) async fn answer(agent: Arc<Agent>) {
    let mut published = agent.view.subscribe();
    let mut answered = BTreeSet::new();
    loop {
        let checks = published.borrow_and_update().snapshot.checks.clone();
        answered.retain(|id| checks.contains_key(id));
        let is_open = |(id, request): &(&CheckId, &CheckRequest)| {
            request.node != agent.me.name && !answered.contains(*id)
        };
        let open: Vec<_> = checks.iter().filter(is_open).collect();
        if !open.is_empty() {
            agent.answer_all(&open).await;
            // Once: who asked does not wait for long, and nobody is harmed by a node that is late.
            answered.extend(open.into_iter().map(|(id, _)| *id));
        }
        if published.changed().await.is_err() {
            return;
        }
    }
}

impl Agent {
    async fn answer_all(&self, requests: &[(&CheckId, &CheckRequest)]) {
        let looked = match self.cluster.check_again(None).await {
            Ok(check) => self.look(check).await,
            Err(error) => Err(error.into()),
        };
        for (id, request) in requests {
            let answer = match &looked {
                Ok(lasting) => CheckAnswer::of(lasting.of(request.network)),
                Err(error) => CheckAnswer { problem: error.message.clone(), ..CheckAnswer::default() },
            };
            let (asked_by, findings) = (&request.node, answer.findings.len());
            match self.cluster.answer(**id, request, &answer).await {
                Ok(()) => debug!(check = %id, %asked_by, findings, "check answered"),
                Err(error) => warn!(check = %id, %asked_by, %error, "check not answered"),
            }
        }
    }
}
