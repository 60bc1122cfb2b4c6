//! The dataplane: one thread that owns all kernel state of this node.
//!
//! It follows the view of the cluster, takes requests to plug and unplug and the kernel's notices,
//! and works off what has queued up as one piece, so a burst costs few system calls. Nothing else
//! in the agent touches the kernel's objects.

mod balancing;
mod batch;
mod changes;
mod dead;
mod ebpf;
mod ipvs;
mod slot;
mod tally;
mod worker;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc;

use tokio::sync::{mpsc as async_mpsc, oneshot, watch};

use crate::cluster::view::Published;
use crate::kernel::{self, Notice};
use crate::model::{Endpoint, EndpointId, NetworkId, Node};

pub use balancing::Load;
pub use tally::{Loads, Tally};
pub use worker::Settings;

/// What the dataplane is asked for.
enum Command {
    /// The view of the cluster has changed.
    Sync,
    /// Plug an endpoint of this node in; it was written at this revision.
    Plug(Arc<Endpoint>, u64, oneshot::Sender<Result<(), PlugError>>),
    /// Take an endpoint of this node out; it was released at this revision.
    Unplug(Arc<Endpoint>, u64, oneshot::Sender<Result<(), kernel::Error>>),
    /// Say what the backends of a network have on this node.
    Loads(NetworkId, batch::LoadsReply),
    /// Say whether an endpoint of this node is plugged in.
    Plugged(NetworkId, EndpointId, oneshot::Sender<bool>),
    /// Say when the kernel shows everything that was published before.
    Settle(oneshot::Sender<()>),
    /// The kernel says that something has changed which we did not do.
    Notice(Notice),
    /// End; the kernel's state stays.
    Stop,
}

/// Why an endpoint was not plugged in.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PlugError {
    /// The network's sandbox or the host's rules are not complete: trying again may help.
    #[error("{0}")]
    NotReady(String),
    /// They cannot be completed on this machine as it is.
    #[error("{0}")]
    Unsupported(String),
    /// The kernel refused; nothing of the endpoint is left in it.
    #[error(transparent)]
    Refused(#[from] Arc<kernel::Error>),
}

/// The agent's handle on the dataplane's thread.
pub struct Dataplane {
    commands: mpsc::Sender<Command>,
    sandboxes: watch::Receiver<Sandboxes>,
}

/// The networks that have a sandbox on this node, with the inode of each.
pub type Sandboxes = BTreeMap<NetworkId, u64>;

/// The dataplane has ended, so nothing can be asked of it.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the dataplane has stopped")]
pub struct Stopped;

impl Dataplane {
    /// Starts the thread. Endpoints whose container is gone are sent to `gone`.
    ///
    /// # Errors
    /// When the thread, its sockets or its monitor cannot be made.
    pub fn start(
        me: Node,
        settings: Settings,
        view: watch::Receiver<Published>,
        gone: async_mpsc::UnboundedSender<Arc<Endpoint>>,
    ) -> Result<(Self, std::thread::JoinHandle<()>), kernel::Error> {
        let (commands, queue) = mpsc::channel();
        let notices = commands.clone();
        let (started, has_started) = mpsc::channel();
        let (open, sandboxes) = watch::channel(Sandboxes::new());
        let thread = std::thread::Builder::new().name("dataplane".into()).spawn(move || {
            // A notice that finds no thread has nobody to tell.
            let notify = move |notice| drop(notices.send(Command::Notice(notice)));
            match worker::Worker::new(me, settings, view, (gone, open), notify) {
                Ok(mut worker) => {
                    let _ = started.send(Ok(()));
                    worker.run(&queue);
                }
                Err(error) => drop(started.send(Err(error))),
            }
        });
        let system = |source| kernel::Error::System { action: "start the dataplane's thread", source };
        let thread = thread.map_err(system)?;
        let ended = || system(std::io::Error::other("it ended at once"));
        has_started.recv().map_err(|_| ended())??;
        Ok((Self { commands, sandboxes }, thread))
    }

    /// The sandboxes, as they are opened and removed.
    pub fn sandboxes(&self) -> watch::Receiver<Sandboxes> {
        self.sandboxes.clone()
    }

    /// Tells that the view of the cluster has changed.
    pub fn sync(&self) {
        // A stopped dataplane needs to know nothing.
        let _ = self.commands.send(Command::Sync);
    }

    /// Plugs an endpoint in and waits until packets flow.
    ///
    /// # Errors
    /// What is not ready, or the kernel's refusal.
    pub async fn plug(
        &self,
        endpoint: Arc<Endpoint>,
        revision: u64,
    ) -> Result<Result<(), PlugError>, Stopped> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Plug(endpoint, revision, reply)).map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }

    /// Takes an endpoint out and waits until its interface is gone.
    ///
    /// # Errors
    /// The kernel's refusal; it is tried again by itself.
    pub async fn unplug(
        &self,
        endpoint: Arc<Endpoint>,
        revision: u64,
    ) -> Result<Result<(), kernel::Error>, Stopped> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Unplug(endpoint, revision, reply)).map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }

    /// Whether an endpoint of this node is plugged in.
    ///
    /// # Errors
    /// When the thread has ended.
    pub async fn is_plugged(&self, network: NetworkId, endpoint: EndpointId) -> Result<bool, Stopped> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Plugged(network, endpoint, reply)).map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }

    /// Waits until the kernel shows everything that the view had published before, as far as the
    /// kernel takes it.
    ///
    /// # Errors
    /// When the thread has ended.
    pub async fn settle(&self) -> Result<(), Stopped> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Settle(reply)).map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }

    /// What each backend of a network's services has on this node: its weight in the kernel, and its
    /// connections. Nothing where this node does not use the network, or balances nothing.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub async fn loads(&self, network: NetworkId) -> Result<Result<Vec<Load>, kernel::Error>, Stopped> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Loads(network, reply)).map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }

    /// Ends the thread after what is queued; the kernel's state stays as it is.
    pub fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
    }
}
