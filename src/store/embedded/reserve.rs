//! Space on the disk that is kept for removals.
//!
//! Removing an entry needs a few new pages before old ones become free, so on a disk that is
//! full nothing could be removed any more. A second file beside the store holds that space. When
//! the disk is full it is given up, and until it can be had again only what does not make the
//! content larger is done.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A removal takes about 20 pages of 4 KiB.
const BYTES: i64 = 256 << 10;

/// The file that holds the space.
pub(super) struct Reserve {
    path: PathBuf,
    held: bool,
}

impl Reserve {
    /// The reserve of a store: `<path>.reserve`. It is not there yet.
    pub(super) fn of(store: &Path) -> Self {
        let mut path = OsString::from(store);
        path.push(".reserve");
        Self { path: path.into(), held: false }
    }

    /// Sees to it that the space is there.
    pub(super) fn hold(&mut self) -> io::Result<()> {
        if self.held {
            return Ok(());
        }
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(0o600).open(&self.path)?;
        if let Err(error) = nix::fcntl::posix_fallocate(&file, 0, BYTES) {
            self.release();
            return Err(error.into());
        }
        self.held = true;
        Ok(())
    }

    /// Gives the space to the store.
    pub(super) fn release(&mut self) {
        self.held = false;
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "the reserve cannot be given up");
        }
    }
}
