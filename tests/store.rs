//! What every store does, shown on both of them; and what each of the two promises on its own.
//!
//! It needs root: it runs in a network and mount namespace of its own, with real etcd servers and
//! file systems that it makes there. It fails where it cannot do that.

#[path = "store/common.rs"]
mod common;
#[path = "store/embedded.rs"]
mod embedded;
#[path = "store/etcd.rs"]
mod etcd;
#[path = "store/etcd_access.rs"]
mod etcd_access;
#[path = "store/etcd_watch.rs"]
mod etcd_watch;
#[path = "store/ground.rs"]
mod ground;
#[path = "store/leases.rs"]
mod leases;
#[path = "store/schema.rs"]
mod schema;
#[path = "store/watches.rs"]
mod watches;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Trial};
use netctl::store::{Store, embedded::Embedded, etcd::Etcd};

use ground::{Fact, Server, run};

fn main() -> ExitCode {
    if let Some(path) = std::env::var_os(embedded::WRITER) {
        return embedded::write_until_killed(path.as_ref());
    }
    let mut arguments = Arguments::from_args();
    if let Err(error) = ground::enter() {
        eprintln!("these tests need root and a network and mount namespace of their own: {error}");
        return ExitCode::FAILURE;
    }
    // Servers and disks are what is waited for; more at once makes leases late.
    arguments.test_threads = Some(arguments.test_threads.unwrap_or(2).min(2));
    libtest_mimic::run(&arguments, trials()).exit_code()
}

fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    let parts = [common::facts(), watches::facts(), leases::facts(), schema::facts()];
    for (name, fact) in parts.into_iter().flatten() {
        trials.push(trial(format!("embedded::{name}"), move || on_embedded(fact)));
        trials.push(trial(format!("etcd::{name}"), move || on_etcd(fact)));
    }
    let parts = [embedded::tests(), etcd::tests(), etcd_access::tests(), etcd_watch::tests()];
    for (name, test) in parts.into_iter().flatten() {
        trials.push(trial(name.to_owned(), move || run(test())));
    }
    trials
}

fn trial(name: String, test: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        test();
        Ok(())
    })
}

fn on_embedded(fact: Fact) {
    let folder = tempfile::tempdir().expect("a folder");
    run(async {
        let store: Arc<dyn Store> = Arc::new(Embedded::open(folder.path().join("store")).unwrap());
        fact(store).await;
    });
}

fn on_etcd(fact: Fact) {
    run(async {
        let server = Server::start().await;
        let store: Arc<dyn Store> = Arc::new(Etcd::new(server.config()).unwrap());
        fact(store).await;
    });
}
