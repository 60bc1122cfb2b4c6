//! Looking for leaked and double-booked addresses: the store with itself, and with this node's
//! kernel.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use tracing::info;

use super::agent::Agent;
use crate::api::{ApiError, CheckView, ErrorCode};
use crate::cluster::check::Check;
use crate::kernel::{self, Netns};
use crate::model::object::{Device, sandbox_name};
use crate::model::{Endpoint, EndpointId, Finding, FindingKind};

/// How long kernel and store may differ: an endpoint is written first and plugged in then, and
/// removed first and unplugged then.
const GRACE: Duration = Duration::from_secs(4);
/// How often it is looked again meanwhile.
const AGAIN: Duration = Duration::from_millis(200);

/// What differs between store and kernel, by what it is about.
type Differences = BTreeMap<String, Finding>;

impl Agent {
    /// Compares the store with itself and with this node's kernel.
    pub(super) async fn check(&self, network: Option<&str>) -> Result<CheckView, ApiError> {
        let check = self.cluster.check(network).await?;
        let mut findings: Vec<Finding> =
            check.inconsistencies.iter().map(|found| found.finding.clone()).collect();
        findings.extend(self.differences(network, &check).await?);
        let (node, revision) = (self.me.name.clone(), check.revision.0);
        Ok(CheckView { node, revision, repaired: Vec::new(), findings })
    }

    /// Repairs what it is safe to repair in the store, and checks again.
    pub(super) async fn repair(&self, network: Option<&str>) -> Result<CheckView, ApiError> {
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
        let left = match self.check(network).await {
            Err(error) if error.code == ErrorCode::NotFound && !repaired.is_empty() => CheckView {
                node: self.me.name.clone(),
                revision: check.revision.0,
                repaired: Vec::new(),
                findings: Vec::new(),
            },
            left => left?,
        };
        Ok(CheckView { repaired, ..left })
    }

    /// Where the kernel differs from the store, and goes on to: what is just being changed is seen
    /// to be done when it is looked again.
    async fn differences(&self, network: Option<&str>, check: &Check) -> Result<Vec<Finding>, ApiError> {
        let until = Instant::now() + GRACE;
        let mut lasting = self.look(check).await?;
        while !lasting.is_empty() && Instant::now() < until {
            tokio::time::sleep(AGAIN).await;
            let now = self.look(&self.cluster.check(network).await?).await?;
            lasting.retain(|what, _| now.contains_key(what));
        }
        Ok(lasting.into_values().collect())
    }

    async fn look(&self, check: &Check) -> Result<Differences, ApiError> {
        let own = |endpoint: &&Endpoint| endpoint.node == self.me.name;
        let own: BTreeMap<_, _> =
            check.endpoints.values().filter(own).map(|e| (e.id, e.clone())).collect();
        let (check, boot) = (check.clone(), self.boot.clone());
        let looked = tokio::task::spawn_blocking(move || differences(&check, &own, &boot)).await;
        let looked = looked.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
        Ok(looked?)
    }
}

/// Compares this node's endpoints with what is in its sandboxes.
fn differences(
    check: &Check,
    own: &BTreeMap<EndpointId, Endpoint>,
    boot: &str,
) -> Result<Differences, kernel::Error> {
    let plugged = kernel::plugged()?;
    let wanted = |id| check.network.is_none_or(|network| network == id);
    let mut found = Differences::new();
    let mut add = |kind, network: String, what: String, problem: String, repair: &str| {
        let (repair, repairable) = (repair.to_owned(), false);
        let finding = Finding { network, kind, what: what.clone(), problem, repair, repairable };
        found.insert(what, finding);
    };
    for endpoint in own.values().filter(|e| e.attachment.boot == boot && wanted(e.network)) {
        if !plugged.get(&endpoint.network).is_some_and(|devices| devices.contains(&endpoint.id)) {
            let name = &endpoint.name;
            let (problem, repair) = match is_gone(endpoint) {
                true => (format!("the namespace of endpoint {name} is gone"), GONE),
                false => (format!("endpoint {name} has no interface on this node"), MISSING),
            };
            let what = format!("{}/{}", sandbox_name(endpoint.network), Device::Endpoint(endpoint.id));
            let network = check.networks.get(&endpoint.network).cloned().unwrap_or_default();
            add(FindingKind::NoDevice, network, what, problem, repair);
        }
    }
    for (id, devices) in plugged.iter().filter(|(id, _)| wanted(**id)) {
        let Some(network) = check.networks.get(id) else {
            let problem = "sandbox of a network that does not exist".to_owned();
            add(FindingKind::StraySandbox, id.to_string(), sandbox_name(*id), problem, STRAY);
            continue;
        };
        for device in devices {
            if own.get(device).is_none_or(|endpoint| endpoint.network != *id) {
                let what = format!("{}/{}", sandbox_name(*id), Device::Endpoint(*device));
                let problem = "interface of an endpoint that does not exist".to_owned();
                add(FindingKind::StrayDevice, network.clone(), what, problem, STRAY);
            }
        }
    }
    Ok(found)
}

const GONE: &str = "the agent releases it by itself; if it stays, detach it";
const MISSING: &str = "netctld's log says why it cannot be plugged in; else detach and attach it again";
const STRAY: &str = "the agent removes it by itself; if it stays, its log says why";

/// Whether the namespace of an endpoint does not exist any more.
fn is_gone(endpoint: &Endpoint) -> bool {
    match Netns::open(&endpoint.attachment.netns) {
        Ok(netns) => netns.inode() != endpoint.attachment.inode,
        Err(error) => error.namespace_is_gone(),
    }
}
