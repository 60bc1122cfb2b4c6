//! Network namespaces: opened from paths that others give, named below /run/netns, entered.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::sys::statfs::{NSFS_MAGIC, PROC_SUPER_MAGIC, fstatfs};

use super::Error;
use crate::model::object::SANDBOX_PREFIX;

/// Where named namespaces are, as `ip netns` has them.
const DIRECTORY: &str = "/run/netns";
const OWN: &str = "/proc/thread-self/ns/net";

/// An open network namespace: it lives at least as long as this value.
#[derive(Debug)]
pub struct Netns {
    file: OwnedFd,
    path: PathBuf,
    inode: u64,
}

impl Netns {
    /// Opens the namespace at `path`: a file on which one is mounted, or one of /proc.
    ///
    /// # Errors
    ///
    /// When the path leads to anything else. A symbolic link is refused too, but for those in /proc
    /// that stand for a namespace; nothing but a namespace is ever opened for reading.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let not = |found: String| Error::NotNetns { path: path.to_owned(), found };
        let fail = || Error::path("open", path);
        let handle = |flags| open(path, OFlag::O_PATH | OFlag::O_CLOEXEC | flags, Mode::empty());
        let mut file = handle(OFlag::O_NOFOLLOW).map_err(fail())?;
        let kind = SFlag::from_bits_truncate(fstat(&file).map_err(fail())?.st_mode) & SFlag::S_IFMT;
        if kind == SFlag::S_IFLNK {
            if fstatfs(&file).map_err(fail())?.filesystem_type() != PROC_SUPER_MAGIC {
                return Err(not("a symbolic link".to_owned()));
            }
            file = handle(OFlag::empty()).map_err(fail())?;
        }
        if fstatfs(&file).map_err(fail())?.filesystem_type() != NSFS_MAGIC {
            return Err(not(describe(kind).to_owned()));
        }
        // The handle is a namespace for certain; this opens that and nothing else.
        let same = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file =
            open(same.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(fail())?;
        // SAFETY: NS_GET_NSTYPE takes no argument and works on any descriptor of nsfs.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) };
        match Errno::result(kind).map_err(fail())? {
            libc::CLONE_NEWNET => {}
            libc::CLONE_NEWNS => return Err(not("a mount namespace".to_owned())),
            libc::CLONE_NEWPID => return Err(not("a process namespace".to_owned())),
            libc::CLONE_NEWUSER => return Err(not("a user namespace".to_owned())),
            other => return Err(not(format!("a namespace of another kind ({other:#x})"))),
        }
        Self::from_file(file, path.to_owned())
    }

    fn from_file(file: OwnedFd, path: PathBuf) -> Result<Self, Error> {
        let inode = fstat(&file).map_err(Error::path("read", &path))?.st_ino;
        Ok(Self { file, path, inode })
    }

    /// Opens the calling thread's own namespace.
    pub fn current() -> Result<Self, Error> {
        let file = open(OWN, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        Self::from_file(file.map_err(Error::path("open", OWN))?, OWN.into())
    }

    /// Opens the namespace /run/netns/`name`.
    pub fn open_named(name: &str) -> Result<Self, Error> {
        Self::open(&named(name))
    }

    /// Opens the namespace /run/netns/`name`, which it makes where it is missing. A file of that
    /// name without a namespace is what a crash or a reboot left over; it is replaced.
    pub fn create_named(name: &str) -> Result<Self, Error> {
        let path = named(name);
        let _lock = prepare_directory()?;
        match Self::open(&path) {
            Err(Error::NotNetns { .. }) => {
                std::fs::remove_file(&path).map_err(Error::path("remove", &path))?;
            }
            Err(Error::Path { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            result => return result,
        }
        let flags = OFlag::O_RDONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        open(&path, flags, Mode::empty()).map_err(Error::path("create", &path))?;
        // A thread of its own, so that the caller's never changes namespace.
        let target = path.clone();
        let made = std::thread::Builder::new().spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(Error::system("make a network namespace"))?;
            let none = None::<&str>;
            mount(Some(OWN), &target, none, MsFlags::MS_BIND, none)
                .map_err(Error::path("mount a namespace on", &target))
        });
        let made = made.map_err(Error::system("start a thread")).and_then(|thread| {
            thread.join().unwrap_or_else(|_| Err(Error::system("make a network namespace")(Errno::EIO)))
        });
        if let Err(error) = made {
            // The error that matters is the first one.
            let _ = std::fs::remove_file(&path);
            return Err(error);
        }
        Self::open(&path)
    }

    /// Puts this namespace at /run/netns/`name` again, where somebody took the name away or gave
    /// it to another namespace. `true`: it had to be done.
    pub fn ensure_named(&self, name: &str) -> Result<bool, Error> {
        let path = named(name);
        let _lock = prepare_directory()?;
        if Self::open(&path).is_ok_and(|found| found.inode == self.inode) {
            return Ok(false);
        }
        Self::remove_named(name)?;
        let flags = OFlag::O_RDONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        open(&path, flags, Mode::empty()).map_err(Error::path("create", &path))?;
        let source = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let none = None::<&str>;
        mount(Some(source.as_str()), &path, none, MsFlags::MS_BIND, none)
            .map_err(Error::path("mount a namespace on", &path))?;
        Ok(true)
    }

    /// Removes the name /run/netns/`name`. The namespace itself ends when nobody uses it any more.
    /// That it is gone already is success.
    pub fn remove_named(name: &str) -> Result<(), Error> {
        let path = named(name);
        loop {
            match umount2(&path, MntFlags::MNT_DETACH) {
                // Mounts may lie on each other.
                Ok(()) => {}
                Err(Errno::EINVAL | Errno::ENOENT) => break,
                Err(error) => return Err(Error::path("unmount", &path)(error)),
            }
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(Error::path("remove", &path)),
        }
    }

    /// The names of all sandboxes below /run/netns, sorted; also of such as are left over.
    pub fn sandboxes() -> Result<Vec<String>, Error> {
        let entries = match std::fs::read_dir(DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            result => result.map_err(Error::path("list", DIRECTORY))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut ours: Vec<String> = names.filter(|name| is_sandbox(name)).collect();
        ours.sort();
        Ok(ours)
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is called in messages: its path, but for the namespace of the agent itself.
    pub(super) fn label(&self) -> String {
        if self.path == Path::new(OWN) {
            return "the agent's namespace".to_owned();
        }
        self.path.display().to_string()
    }

    /// The inode, which no other namespace has at the same time.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// The number that the kernel's programs know it by (`SO_NETNS_COOKIE`): no other namespace gets it before
    /// the next boot.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or the kernel does not tell (before Linux 5.14).
    pub fn cookie(&self) -> Result<u64, Error> {
        let asked = self.enter(|| {
            let flags = SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
            let (mut cookie, mut length) = (0_u64, size_of::<u64>() as libc::socklen_t);
            let (level, option) = (libc::SOL_SOCKET, libc::SO_NETNS_COOKIE);
            let room = (&raw mut cookie).cast();
            // SAFETY: there is room for as many bytes as it says.
            let asked =
                unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, room, &raw mut length) };
            Errno::result(asked).map(|_| cookie)
        })?;
        asked.map_err(Error::path("read the number of", &self.path))
    }

    /// Runs `work` on this thread inside the namespace and comes back.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered; `work` does not run then.
    ///
    /// # Aborts
    ///
    /// When the thread cannot come back: everything after would happen in the wrong namespace.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> Result<T, Error> {
        let home = Home(Self::current()?);
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(Error::path("enter", &self.path))?;
        let result = work();
        drop(home);
        Ok(result)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Brings the thread back, also when it unwinds.
struct Home(Netns);

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.0.file, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "cannot return to the own network namespace");
            std::process::abort();
        }
    }
}

/// The identifier that the kernel draws at boot: what is not on disk is gone when it changes.
pub fn boot_id() -> Result<String, Error> {
    let path = "/proc/sys/kernel/random/boot_id";
    let id = std::fs::read_to_string(path).map_err(Error::path("read", path))?;
    Ok(id.trim_end().to_owned())
}

fn named(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

fn is_sandbox(name: &str) -> bool {
    name.strip_prefix(SANDBOX_PREFIX).is_some_and(|id| id.parse::<crate::model::NetworkId>().is_ok())
}

fn describe(kind: SFlag) -> &'static str {
    match kind {
        SFlag::S_IFREG => "a regular file",
        SFlag::S_IFDIR => "a directory",
        SFlag::S_IFIFO => "a pipe",
        SFlag::S_IFSOCK => "a socket",
        SFlag::S_IFLNK => "a link to something else",
        _ => "a device",
    }
}

/// Makes /run/netns a mount of its own with shared propagation, as `ip netns add` does: so a
/// namespace mounted there is seen in every mount namespace, and its removal too. The lock is the
/// one that `ip netns` takes.
fn prepare_directory() -> Result<Flock<std::fs::File>, Error> {
    std::fs::create_dir_all(DIRECTORY).map_err(Error::path("create", DIRECTORY))?;
    let directory = std::fs::File::open(DIRECTORY).map_err(Error::path("open", DIRECTORY))?;
    let lock = Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, error)| Error::path("lock", DIRECTORY)(error))?;
    let none = None::<&str>;
    let share = || mount(none, DIRECTORY, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    let mut shared = share();
    // It is not a mount point yet.
    if shared == Err(Errno::EINVAL) {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(DIRECTORY), DIRECTORY, none, flags, none).map_err(Error::path("mount", DIRECTORY))?;
        shared = share();
    }
    shared.map_err(Error::path("share the mount", DIRECTORY))?;
    Ok(lock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_with_a_network_id_are_sandboxes() {
        assert!(is_sandbox("netctl-0123456789ab"));
        for name in ["netctl-", "netctl-x", "netctl-0123456789abc", "0123456789ab", "cni-0123"] {
            assert!(!is_sandbox(name), "{name}");
        }
    }
}
