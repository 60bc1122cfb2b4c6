//! Addresses over the real stores: none is given out twice, none is lost, none leaks.
//!
//! It needs root: it runs in a network and mount namespace of its own, with a file system in memory
//! and etcd servers that it makes there. It fails where it cannot do that.

mod audit;
mod facts;
mod faults;
mod granting;
#[path = "../store/ground.rs"]
#[allow(dead_code, unused_imports, unused_macros, reason = "the tests of the stores need more of it")]
mod ground;
mod histories;
mod member;
mod seeded;
mod told;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use netctl::store::Store;
use netctl::store::embedded::Embedded;
use netctl::store::etcd::{Etcd, EtcdConfig};
use nix::mount::{MsFlags, mount};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseResult, TestError, TestRng, TestRunner};

use ground::{Server, run};
use histories::{Step, history, live};
use seeded::fault::{Fault, STRANGER};

/// Sets what is random; a failure tells its value.
const SEED: &str = "NETCTL_SEED";

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    if let Err(error) = enter() {
        eprintln!("these tests need root and a network and mount namespace of their own: {error}");
        return ExitCode::FAILURE;
    }
    // Those that take longest leave one processor idle for a while.
    arguments.test_threads.get_or_insert(2);
    libtest_mimic::run(&arguments, trials()).exit_code()
}

/// Leaves the machine's network and mounts behind. Stores are in memory: that writes last is shown
/// elsewhere.
fn enter() -> anyhow::Result<()> {
    ground::enter()?;
    mount(Some("tmpfs"), &std::env::temp_dir(), Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
    Ok(())
}

fn trials() -> Vec<Trial> {
    vec![
        Trial::test("histories::over_embedded", histories_over_embedded),
        Trial::test("histories::over_etcd", || histories_over_etcd(300)),
        Trial::test("run::over_embedded", || over_embedded(8_000)),
        Trial::test("run::over_etcd", || over_etcd(2_000)),
        Trial::test("audit::tells_an_address_that_two_have", || {
            told(Fault::Duplicate, &[HAVE_IT, STRANGER, "DoubleAddress"])
        }),
        Trial::test("audit::tells_an_acknowledged_endpoint_that_is_lost", || {
            told(Fault::Lost, &["was acknowledged and is not there", "acknowledged and lost"])
        }),
        Trial::test("audit::tells_an_address_that_leaked", || {
            told(Fault::Leaked, &[HAVE_IT, STRANGER, "[] have it", "LeakedAddress"])
        }),
        Trial::test("audit::tells_an_address_that_rests_for_ever", || {
            told(Fault::RestsForEver, &["LeakedAddress", "nothing ends that"])
        }),
        // By `scripts/test --long`.
        Trial::test("histories::long_over_etcd", || histories_over_etcd(5000)).with_ignored_flag(true),
        Trial::test("run::long_over_embedded", || over_embedded(1_000_000)).with_ignored_flag(true),
        Trial::test("run::long_over_etcd", || over_etcd(100_000)).with_ignored_flag(true),
    ]
}

fn histories_over_embedded() -> Result<(), Failed> {
    histories(2000, |begin, steps| {
        let folder = tempfile::tempdir().expect("a folder");
        run_to_end(async {
            let store = Arc::new(Embedded::open(folder.path().join("store")).expect("a store"));
            live(store, begin, steps).await
        })
    })
}

fn histories_over_etcd(count: u32) -> Result<(), Failed> {
    let server = started();
    let mut lived = 0;
    histories(count, move |begin, steps| {
        lived += 1;
        let config = EtcdConfig { prefix: format!("history{lived}"), ..server.config() };
        run_to_end(async {
            let store: Arc<dyn Store> = Arc::new(Etcd::new(config).expect("a store"));
            live(store, begin, steps).await
        })
    })
}

fn over_embedded(operations: u64) -> Result<(), Failed> {
    let folder = tempfile::tempdir().expect("a folder");
    seeded_run(seeded::Ground::Embedded(folder.path().join("store")), operations)
}

fn over_etcd(operations: u64) -> Result<(), Failed> {
    let server = started();
    seeded_run(seeded::Ground::Etcd(server.config(), server.port()), operations)
}

fn seeded_run(ground: seeded::Ground, operations: u64) -> Result<(), Failed> {
    let (seed, start) = (seed(), std::time::Instant::now());
    match run_to_end(seeded::run(ground, operations, seed, None)) {
        Ok(numbers) => {
            eprintln!("{numbers}; in {:?}", start.elapsed());
            Ok(())
        }
        Err(problem) => Err(format!("{SEED}={seed}: {problem}").into()),
    }
}

/// What the audit that reads along says of an address.
const HAVE_IT: &str = "by its key, and";

/// Has a short run end with a fault in its store, which must be told in these words.
fn told(fault: Fault, words: &[&str]) -> Result<(), Failed> {
    let folder = tempfile::tempdir().expect("a folder");
    let (seed, ground) = (seed(), seeded::Ground::Embedded(folder.path().join("store")));
    let problem = match run_to_end(seeded::run(ground, 600, seed, Some(fault))) {
        Ok(numbers) => return Err(format!("{SEED}={seed}: {fault:?} is not told: {numbers}").into()),
        Err(problem) => problem,
    };
    match words.iter().find(|word| !problem.contains(**word)) {
        Some(word) => Err(format!("{SEED}={seed}: {fault:?}, without {word:?}: {problem}").into()),
        None => Ok(()),
    }
}

fn started() -> Server {
    let mut server = None;
    run(async { server = Some(Server::start().await) });
    server.expect("etcd starts")
}

fn run_to_end<T>(work: impl Future<Output = T>) -> T {
    let mut result = None;
    run(async { result = Some(work.await) });
    result.expect("it has ended")
}

/// Has as many random histories lived, and the shortest told that does not go as it must.
fn histories(count: u32, live: impl FnMut(usize, Vec<Step>) -> TestCaseResult) -> Result<(), Failed> {
    let seed = seed();
    let live = std::cell::RefCell::new(live);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config =
        Config { cases: count, failure_persistence: None, max_shrink_iters: 3000, ..Config::default() };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let outcome = TestRunner::new_with_rng(config, rng)
        .run(&history(), |(begin, steps)| (live.borrow_mut())(begin, steps));
    outcome.map_err(|error| match error {
        TestError::Fail(reason, history) => {
            format!("{SEED}={seed}: {reason}; lived: {history:?}").into()
        }
        TestError::Abort(reason) => format!("{SEED}={seed}: {reason}").into(),
    })
}

/// What everything random follows from.
fn seed() -> u64 {
    let given = std::env::var(SEED).ok().map(|text| text.parse().expect("a number"));
    let seed = given.unwrap_or_else(rand::random);
    eprintln!("{SEED}={seed}");
    seed
}
