//! Test programs whose tests have namespaces of their own: a list of functions, each run on a thread.

use libtest_mimic::Failed;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Collects functions as tests by their names; the program's `run` runs each.
macro_rules! facts {
    ($($module:ident: $($name:ident),+ $(,)?);+ $(;)?) => {
        vec![$($(libtest_mimic::Trial::test(
            concat!(stringify!($module), "::", stringify!($name)),
            || run($module::$name),
        )),+),+]
    };
}
pub(crate) use facts;

/// Runs a test on a thread of its own: a namespace is a thread's.
pub fn in_thread(test: impl FnOnce() + Send + 'static) -> Result<(), Failed> {
    std::thread::spawn(test).join().map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        Failed::from(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked"))
    })
}

/// Leaves the system's namespaces while there is only one thread.
pub fn isolate() {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("these tests need root");
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("a /run of our own");
}
