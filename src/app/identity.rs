//! Who this machine is: what the agent draws once and keeps in its state directory.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::model::{ClusterId, MacAddr, NodeId};

const FILE: &str = "identity.json";

/// The identity of this machine, and the cluster it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) node: NodeId,
    /// The Ethernet address of its tunnel devices.
    pub(super) vtep_mac: MacAddr,
    /// The cluster it joined; `None`: none yet.
    pub(super) cluster: Option<ClusterId>,
}

/// The identity could not be read or kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}: {source}", path = path.display())]
pub(super) struct IdentityError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl Identity {
    /// Reads the identity from a state directory; draws one when there is none.
    pub(super) fn load(state_dir: &Path) -> Result<Self, IdentityError> {
        let path = state_dir.join(FILE);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| IdentityError {
                action: "understand",
                path,
                source: error.into(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let rng = &mut rand::rng();
                let identity =
                    Self { node: NodeId::random(rng), vtep_mac: MacAddr::random(rng), cluster: None };
                identity.save(state_dir)?;
                Ok(identity)
            }
            Err(source) => Err(IdentityError { action: "read", path, source }),
        }
    }

    /// Writes the identity: the whole of it or, when that fails, nothing.
    pub(super) fn save(&self, state_dir: &Path) -> Result<(), IdentityError> {
        let (path, fresh) = (state_dir.join(FILE), state_dir.join("identity.json.new"));
        let write = || -> io::Result<()> {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir)?;
            let mut options = fs::OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            file.sync_all()?;
            fs::rename(&fresh, &path)?;
            fs::File::open(state_dir)?.sync_all()
        };
        write().map_err(|source| IdentityError { action: "write", path: path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_drawn_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let mut first = Identity::load(&state).unwrap();
        assert_eq!(Identity::load(&state).unwrap(), first);
        first.cluster = Some(ClusterId::random(&mut rand::rng()));
        first.save(&state).unwrap();
        assert_eq!(Identity::load(&state).unwrap(), first);
    }

    #[test]
    fn a_damaged_identity_is_an_error_and_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "{").unwrap();
        let error = Identity::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("identity.json"), "{error}");
        assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), b"{");
    }
}
