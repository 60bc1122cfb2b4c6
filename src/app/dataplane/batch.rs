//! What the dataplane works off as one piece.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Command, Load, PlugError};
use crate::kernel;
use crate::model::object::SANDBOX_PREFIX;
use crate::model::{Endpoint, EndpointId, NetworkId};

pub(super) type Reply<E> = oneshot::Sender<Result<(), E>>;
/// Who asked what the backends of a network have.
pub(super) type LoadsReply = oneshot::Sender<Result<Vec<Load>, kernel::Error>>;
/// An endpoint to plug in, and the revision that wrote it.
pub(super) type PlugRequest = (Arc<Endpoint>, u64, Reply<PlugError>);
/// An endpoint to unplug, and the revision that released it.
pub(super) type UnplugRequest = (Arc<Endpoint>, u64, Reply<kernel::Error>);

/// What has queued up.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) plugs: BTreeMap<NetworkId, Vec<PlugRequest>>,
    pub(super) unplugs: BTreeMap<NetworkId, Vec<UnplugRequest>>,
    /// Namespaces in which the kernel noticed something; `None` is the host's.
    pub(super) noticed: BTreeSet<Option<NetworkId>>,
    /// Who asks what the backends of a network have.
    pub(super) loads: Vec<(NetworkId, LoadsReply)>,
    /// Who asks whether an endpoint is plugged in.
    pub(super) plugged: Vec<(NetworkId, EndpointId, oneshot::Sender<bool>)>,
    /// Who waits until this batch is worked off.
    pub(super) waiting: Vec<oneshot::Sender<()>>,
    pub(super) stop: bool,
}

impl Batch {
    pub(super) fn add(&mut self, command: Command) {
        match command {
            Command::Sync => {}
            Command::Loads(network, reply) => self.loads.push((network, reply)),
            Command::Plugged(network, id, reply) => self.plugged.push((network, id, reply)),
            Command::Settle(reply) => self.waiting.push(reply),
            Command::Plug(endpoint, revision, reply) => {
                self.plugs.entry(endpoint.network).or_default().push((endpoint, revision, reply));
            }
            Command::Unplug(endpoint, revision, reply) => {
                self.unplugs.entry(endpoint.network).or_default().push((endpoint, revision, reply));
            }
            Command::Notice(notice) => {
                let id = notice.namespace.strip_prefix(SANDBOX_PREFIX).and_then(|id| id.parse().ok());
                self.noticed.insert(id);
            }
            Command::Stop => self.stop = true,
        }
    }
}
