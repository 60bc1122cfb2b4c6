//! Which namespace and which interface an attach is for.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::OwnedMutexGuard;

use super::gate::Gate;
use crate::api::{ApiError, ErrorCode};
use crate::kernel::{self, Netns};
use crate::model::{Attachment, IfName};

/// Finds places; attaches to one namespace come one after the other.
pub(super) struct Places {
    gate: Arc<Gate<u64>>,
}

/// Where an attach plugs in. Nobody else attaches to the same namespace while it is held.
pub(super) struct Place {
    pub(super) attachment: Attachment,
    /// Whether another interface would do as well: the request names none.
    pub(super) any_interface: bool,
    pub(super) guard: OwnedMutexGuard<()>,
}

/// What one look at a namespace gives.
enum Look {
    Free(Place),
    /// Somebody attaches to the namespace with this inode.
    Busy(u64),
}

impl Places {
    pub(super) fn new() -> Self {
        Self { gate: Arc::new(Gate::new()) }
    }

    /// Settles what a request means, and waits until nobody else attaches to that namespace.
    pub(super) async fn find(
        &self,
        netns: PathBuf,
        interface: Option<IfName>,
        boot: &str,
    ) -> Result<Place, ApiError> {
        let mut held = None;
        loop {
            let (netns, interface, boot) = (netns.clone(), interface.clone(), boot.to_owned());
            let gate = Arc::clone(&self.gate);
            let look = tokio::task::spawn_blocking(move || look(&gate, held, netns, interface, boot));
            let look =
                look.await.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
            match look.map_err(not_usable)? {
                Look::Free(place) => return Ok(place),
                Look::Busy(inode) => held = Some((inode, self.gate.pass(inode).await)),
            }
        }
    }
}

/// Looks at a namespace, with its gate held already or to be taken.
fn look(
    gate: &Gate<u64>,
    held: Option<(u64, OwnedMutexGuard<()>)>,
    netns: PathBuf,
    interface: Option<IfName>,
    boot: String,
) -> Result<Look, kernel::Error> {
    let opened = Netns::open(&netns)?;
    let inode = opened.inode();
    // The path may mean another namespace since the gate was waited for.
    let held = held.filter(|(of, _)| *of == inode).map(|(_, guard)| guard);
    let Some(guard) = held.or_else(|| gate.try_pass(inode)) else { return Ok(Look::Busy(inode)) };
    let any_interface = interface.is_none();
    let interface = match interface {
        Some(interface) => interface,
        None => free_interface(&opened)?,
    };
    let attachment = Attachment { netns, inode, boot, interface };
    Ok(Look::Free(Place { attachment, any_interface, guard }))
}

/// What a request named cannot be used as a namespace.
fn not_usable(error: kernel::Error) -> ApiError {
    match error {
        kernel::Error::Path { .. } | kernel::Error::NotNetns { .. } => {
            ApiError::new(ErrorCode::Invalid, error.to_string())
        }
        other => other.into(),
    }
}

/// The first of `eth0`, `eth1`, … that a namespace does not have.
fn free_interface(netns: &Netns) -> Result<IfName, kernel::Error> {
    let taken = netns.enter(|| {
        let has = |number: &u32| nix::net::if_::if_nametoindex(format!("eth{number}").as_str()).is_ok();
        (0..).take_while(has).count()
    })?;
    let name = format!("eth{taken}").parse();
    name.map_err(|_| kernel::Error::Conflict {
        what: "every ethN".into(),
        netns: netns.path().to_owned(),
    })
}
