//! The unix socket: made without a moment in which others could open it.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, mkdtemp};
use tokio::net::UnixListener;

/// The longest path of a unix socket (`sun_path` in unix(7), less the final zero).
pub(crate) const MAX_PATH: usize = 107;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody answers on it.
    #[error("{path}: an agent answers on this socket; stop it first")]
    Live {
        /// The socket.
        path: PathBuf,
    },
    /// There is something that is not a socket.
    #[error("{path}: there is a file that is not a socket; remove it or choose another path")]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The path cannot be a socket's.
    #[error("{path}: a socket's path has at most {MAX_PATH} bytes and a directory before the name")]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// The socket or its directory.
        path: PathBuf,
        /// What failed.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Makes the API's socket: mode 0600, or 0660 when a group is given.
///
/// Its directory is made (0755) where it is missing. A socket that nobody answers on is replaced.
/// The socket is bound within a directory that only we can enter and moved to its place when its
/// owner and mode are right, so the umask does not matter.
///
/// # Errors
/// When an agent answers on it, and when the file system refuses.
///
/// # Panics
/// Outside a tokio runtime.
pub fn bind(path: &Path, group: Option<Gid>) -> Result<UnixListener, BindError> {
    let fail = |action| move |source| BindError::Io { path: path.to_owned(), action, source };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let Some(parent) = parent.filter(|_| path.as_os_str().len() <= MAX_PATH) else {
        return Err(BindError::Path { path: path.to_owned() });
    };
    make_directory(parent).map_err(fail("make the directory"))?;
    check_free(path)?;
    let room = Room::new(parent).map_err(fail("make a directory beside it"))?;
    let socket = room.0.join("s");
    let listener = std::os::unix::net::UnixListener::bind(&socket).map_err(fail("bind"))?;
    listener.set_nonblocking(true).map_err(fail("bind"))?;
    if let Some(group) = group {
        std::os::unix::fs::chown(&socket, None, Some(group.as_raw()))
            .map_err(fail("give it to the group"))?;
    }
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    fs::set_permissions(&socket, Permissions::from_mode(mode)).map_err(fail("set its mode"))?;
    fs::rename(&socket, path).map_err(fail("move it to its place"))?;
    UnixListener::from_std(listener).map_err(fail("listen"))
}

/// Makes a directory and its missing parents, each with mode 0755 whatever the umask is.
fn make_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_directory(parent)?;
    }
    match DirBuilder::new().mode(0o755).create(path) {
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(0o755)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Checks that the path is free, or a socket on which nobody answers.
///
/// # Errors
/// When an agent answers on it, or it is no socket, and when the file system refuses.
pub fn check_free(path: &Path) -> Result<(), BindError> {
    let fail = |action| move |source| BindError::Io { path: path.to_owned(), action, source };
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        metadata => metadata.map_err(fail("look at it"))?,
    };
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotASocket { path: path.to_owned() });
    }
    match UnixStream::connect(path) {
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => {
            Ok(())
        }
        // A full queue (EAGAIN) is an agent that is busy.
        Err(error) if error.kind() != ErrorKind::WouldBlock => {
            Err(fail("ask whether an agent answers")(error))
        }
        Ok(_) | Err(_) => Err(BindError::Live { path: path.to_owned() }),
    }
}

/// A directory (0700) that is removed with what may be left in it.
struct Room(PathBuf);

impl Room {
    fn new(parent: &Path) -> io::Result<Self> {
        Ok(Self(mkdtemp(&parent.join(".XXXXXX"))?))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // What cannot be removed is empty and closed to others; it does no harm.
        let _ = fs::remove_file(self.0.join("s"));
        let _ = fs::remove_dir(&self.0);
    }
}
