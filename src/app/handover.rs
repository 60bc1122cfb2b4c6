//! Sockets that outlive the agent: the service manager keeps them while the agent is started again
//! (sd_notify(3), `FDSTORE=1`), and what arrives meanwhile waits in them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::sync::{Mutex, PoisonError};

use sd_notify::NotifyState;
use tokio::sync::mpsc;
use tracing::{info, warn};

/// What the service manager is told.
enum Message {
    /// To keep these under their names.
    Keep(Vec<(String, OwnedFd)>),
    /// To keep nothing under these names.
    Forget(Vec<String>),
}

/// The sockets that the service manager keeps for us.
pub(super) struct Handover {
    /// What an earlier agent left, by name, as far as nobody has taken it.
    inherited: Mutex<BTreeMap<String, OwnedFd>>,
    /// It is told everything in order.
    messages: mpsc::UnboundedSender<Message>,
}

impl Handover {
    /// Takes over what an earlier agent left. To be called once, by who starts; what is to be told goes
    /// to [`tell`].
    pub(super) fn inherit() -> (Self, Messages) {
        let (messages, queue) = mpsc::unbounded_channel();
        let passed = sd_notify::listen_fds_with_names().map(|passed| {
            let owned = |(number, name)| {
                // SAFETY: the service manager has opened it for this process, which asks once.
                (name, unsafe { OwnedFd::from_raw_fd(number) })
            };
            passed.map(owned).collect::<BTreeMap<String, OwnedFd>>()
        });
        let inherited = passed.unwrap_or_else(|error| {
            warn!(%error, "sockets of an earlier agent cannot be taken over");
            BTreeMap::new()
        });
        if !inherited.is_empty() {
            info!(count = inherited.len(), "sockets of an earlier agent are there");
        }
        (Self { inherited: Mutex::new(inherited), messages }, Messages(queue))
    }

    /// What an earlier agent left under a name.
    pub(super) fn take(&self, name: &str) -> Option<OwnedFd> {
        self.inherited.lock().unwrap_or_else(PoisonError::into_inner).remove(name)
    }

    /// Has sockets kept under their names, for the next agent.
    pub(super) fn keep(&self, sockets: Vec<(String, OwnedFd)>) {
        // Who ends keeps nothing more.
        let _ = self.messages.send(Message::Keep(sockets));
    }

    /// Has what is under these names not kept any more.
    pub(super) fn forget(&self, names: Vec<String>) {
        for name in &names {
            drop(self.take(name));
        }
        let _ = self.messages.send(Message::Forget(names));
    }

    /// Has everything forgotten that an earlier agent left and nobody has taken.
    pub(super) fn forget_rest(&self) {
        let rest = std::mem::take(&mut *self.inherited.lock().unwrap_or_else(PoisonError::into_inner));
        self.forget(rest.into_keys().collect());
    }
}

/// What is to be told.
pub(super) struct Messages(mpsc::UnboundedReceiver<Message>);

/// Tells the service manager everything, one after the other. It may be slow to listen.
pub(super) async fn tell(mut messages: Messages) {
    while let Some(message) = messages.0.recv().await {
        let told = tokio::task::spawn_blocking(move || match message {
            Message::Keep(sockets) => sockets.iter().try_for_each(|(name, socket)| {
                let sockets: [BorrowedFd<'_>; 1] = [socket.as_fd()];
                sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], &sockets)
            }),
            Message::Forget(names) => names.iter().try_for_each(|name| {
                sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
            }),
        });
        if let Ok(Err(error)) = told.await {
            warn!(%error, "the service manager was not told about a socket");
        }
    }
}
