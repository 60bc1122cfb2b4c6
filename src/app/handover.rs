//! Sockets that outlive the agent: the service manager keeps them while the agent is started again
//! (sd_notify(3), `FDSTORE=1`), and what arrives meanwhile waits in them.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, FromRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use sd_notify::NotifyState;
use tracing::{info, warn};

/// The sockets that the service manager keeps for us.
#[derive(Debug, Default)]
pub(super) struct Handover {
    /// What an earlier agent left, by name, as far as nobody has taken it.
    inherited: Mutex<BTreeMap<String, OwnedFd>>,
}

impl Handover {
    /// Takes over what an earlier agent left. To be called once, by who starts.
    pub(super) fn inherit() -> Self {
        let passed = match sd_notify::listen_fds_with_names() {
            Ok(passed) => passed,
            Err(error) => {
                warn!(%error, "sockets of an earlier agent cannot be taken over");
                return Self::default();
            }
        };
        let owned = |(number, name)| {
            // SAFETY: the service manager has opened it for this process, which asks once.
            (name, unsafe { OwnedFd::from_raw_fd(number) })
        };
        let inherited: BTreeMap<String, OwnedFd> = passed.map(owned).collect();
        if !inherited.is_empty() {
            info!(count = inherited.len(), "sockets of an earlier agent are there");
        }
        Self { inherited: Mutex::new(inherited) }
    }

    /// What an earlier agent left under a name.
    pub(super) fn take(&self, name: &str) -> Option<OwnedFd> {
        self.inherited.lock().unwrap_or_else(PoisonError::into_inner).remove(name)
    }

    /// Has a socket kept under a name, for the next agent.
    pub(super) async fn keep(self: &Arc<Self>, name: String, socket: impl AsFd + Send + 'static) {
        tell(move || {
            let state = [NotifyState::FdStore, NotifyState::FdName(&name)];
            sd_notify::notify_with_fds(&state, &[socket.as_fd()])
        })
        .await;
    }

    /// Has a socket not kept any more.
    pub(super) async fn forget(&self, name: String) {
        drop(self.take(&name));
        tell(move || sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name)])).await;
    }

    /// Has everything forgotten that an earlier agent left and nobody has taken.
    pub(super) async fn forget_rest(&self) {
        let rest = std::mem::take(&mut *self.inherited.lock().unwrap_or_else(PoisonError::into_inner));
        for name in rest.into_keys() {
            self.forget(name).await;
        }
    }
}

/// Tells the service manager something. It may be slow to listen.
async fn tell(message: impl FnOnce() -> std::io::Result<()> + Send + 'static) {
    let told = tokio::task::spawn_blocking(message).await;
    if let Ok(Err(error)) = told {
        warn!(%error, "the service manager was not told about a socket");
    }
}
