//! Where this node's kernel differs from the store.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::Agent;
use crate::api::{ApiError, ErrorCode};
use crate::cluster::check::Check;
use crate::kernel::{self, Netns};
use crate::model::object::{Device, sandbox_name};
use crate::model::{Endpoint, EndpointId, Finding, FindingKind, NetworkId, NodeName};

/// How long kernel and store may differ: an endpoint is written first and plugged in then, and
/// removed first and unplugged then.
pub(super) const GRACE: Duration = Duration::from_secs(4);
/// How soon it is looked again, and how seldom at last: each time all of the store is read.
const AGAIN: Duration = Duration::from_millis(200);
const SELDOM: Duration = Duration::from_secs(1);

/// What differs between store and kernel, by what it is about; each with its network.
type Differences = BTreeMap<String, (NetworkId, Finding)>;

/// What lasts of the differences.
pub(super) struct Lasting(Differences);

impl Lasting {
    /// Those of one network, or all.
    pub(super) fn of(&self, network: Option<NetworkId>) -> Vec<Finding> {
        let all = self.0.values().filter(|(id, _)| network.is_none_or(|network| network == *id));
        all.map(|(_, finding)| finding.clone()).collect()
    }
}

impl Agent {
    /// Where the kernel differs from the store, on all networks, and goes on to: what is just being
    /// changed is seen to be done when it is looked again.
    pub(super) async fn look(&self, check: Check) -> Result<Lasting, ApiError> {
        let until = Instant::now() + GRACE;
        let mut lasting = self.look_once(check).await?;
        let mut pause = AGAIN;
        while !lasting.is_empty() && Instant::now() < until {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(SELDOM);
            let now = self.look_once(self.cluster.check_again(None).await?).await?;
            lasting.retain(|what, _| now.contains_key(what));
        }
        Ok(Lasting(lasting))
    }

    async fn look_once(&self, check: Check) -> Result<Differences, ApiError> {
        let (me, boot) = (self.me.name.clone(), self.boot.clone());
        let looked = tokio::task::spawn_blocking(move || differences(&check, &me, &boot)).await;
        let looked = looked.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
        Ok(looked?)
    }
}

/// Compares this node's endpoints with what is in its sandboxes.
fn differences(check: &Check, me: &NodeName, boot: &str) -> Result<Differences, kernel::Error> {
    let own: BTreeMap<EndpointId, &Endpoint> =
        check.endpoints.values().filter(|e| e.node == *me).map(|e| (e.id, e)).collect();
    let plugged = kernel::plugged()?;
    let mut found = Differences::new();
    let mut add = |kind, id: NetworkId, what: String, problem: String, repair: &str| {
        let network = check.networks.get(&id).cloned().unwrap_or_else(|| id.to_string());
        let (node, repair, repairable) = (Some(me.clone()), repair.to_owned(), false);
        let finding = Finding { node, network, kind, what: what.clone(), problem, repair, repairable };
        found.insert(what, (id, finding));
    };
    for endpoint in own.values().filter(|endpoint| endpoint.attachment.boot == boot) {
        if !plugged.get(&endpoint.network).is_some_and(|devices| devices.contains(&endpoint.id)) {
            let name = &endpoint.name;
            let (problem, repair) = match is_gone(endpoint) {
                true => (format!("the namespace of endpoint {name} is gone"), GONE),
                false => (format!("endpoint {name} has no interface on this node"), MISSING),
            };
            let what = format!("{}/{}", sandbox_name(endpoint.network), Device::Endpoint(endpoint.id));
            add(FindingKind::NoDevice, endpoint.network, what, problem, repair);
        }
    }
    for (id, devices) in plugged {
        if !check.networks.contains_key(&id) {
            let problem = "sandbox of a network that does not exist".to_owned();
            add(FindingKind::StraySandbox, id, sandbox_name(id), problem, STRAY);
            continue;
        }
        for device in devices {
            if own.get(&device).is_none_or(|endpoint| endpoint.network != id) {
                let what = format!("{}/{}", sandbox_name(id), Device::Endpoint(device));
                let problem = "interface of an endpoint that does not exist".to_owned();
                add(FindingKind::StrayDevice, id, what, problem, STRAY);
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
