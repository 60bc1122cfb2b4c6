//! netctl on the real kernel: real agents, a real etcd, machines made of network namespaces.
//!
//! The program seals itself off before anything else, runs two tests at a time, and on a failure
//! prints the logs and the kernel state of every machine of the test's world. A test is a function
//! of a world; its name is the fact it shows.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "the functions here are the tests"
)]

#[path = "netns/addresses.rs"]
mod addresses;
#[path = "netns/answers.rs"]
mod answers;
#[path = "netns/attach.rs"]
mod attach;
#[path = "netns/balance.rs"]
mod balance;
#[path = "netns/check.rs"]
mod check;
#[path = "netns/cluster.rs"]
mod cluster;
#[path = "netns/crowd.rs"]
mod crowd;
#[path = "netns/drain.rs"]
mod drain;
#[path = "netns/engine.rs"]
mod engine;
#[path = "netns/etcd.rs"]
mod etcd;
#[path = "netns/expand.rs"]
mod expand;
#[path = "netns/external.rs"]
mod external;
#[path = "netns/fast.rs"]
mod fast;
#[path = "netns/forward.rs"]
mod forward;
#[path = "netns/frames.rs"]
mod frames;
#[path = "netns/ground.rs"]
mod ground;
#[path = "netns/health.rs"]
mod health;
#[path = "netns/host.rs"]
mod host;
#[path = "netns/in_kernel.rs"]
mod in_kernel;
#[path = "netns/ipam.rs"]
mod ipam;
#[path = "netns/killed.rs"]
mod killed;
#[path = "netns/metrics.rs"]
mod metrics;
#[path = "netns/monitor.rs"]
mod monitor;
#[path = "netns/multitude.rs"]
mod multitude;
#[path = "netns/names.rs"]
mod names;
#[path = "netns/outage.rs"]
mod outage;
#[path = "netns/reach.rs"]
mod reach;
#[path = "netns/refusals.rs"]
mod refusals;
#[path = "netns/repair.rs"]
mod repair;
#[path = "netns/rest.rs"]
mod rest;
#[path = "netns/restart.rs"]
mod restart;
#[path = "netns/rolling.rs"]
mod rolling;
#[path = "netns/run.rs"]
mod run;
#[path = "netns/security.rs"]
mod security;
#[path = "netns/services.rs"]
mod services;
#[path = "netns/shop.rs"]
mod shop;
#[path = "netns/shortage.rs"]
mod shortage;
#[path = "netns/single.rs"]
mod single;
#[path = "netns/sockets.rs"]
mod sockets;
#[path = "netns/store.rs"]
mod store;
#[path = "netns/upstream.rs"]
mod upstream;
#[path = "netns/vm.rs"]
mod vm;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use world::World;

/// A test: its name and what it does in a world of its own.
type Test = (&'static str, fn(&World));

/// Lists functions under their own names.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub(crate) const TESTS: &[crate::Test] = &[$((stringify!($name), $name)),*];
    };
}
pub(crate) use tests;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    if !arguments.list {
        world::seal();
    }
    if world::in_vm() {
        return run_in_vm(&arguments);
    }
    // Two cores, and each waits for something now and then: more at once would only make that longer.
    arguments.test_threads.get_or_insert(3);
    let all = SUITES.iter().flat_map(|&(suite, tests)| trials(suite, tests));
    libtest_mimic::run(&arguments, all.collect()).exit_code()
}

/// The suites that any kernel can run which netctl supports.
const SUITES: &[(&str, &[Test])] = &[
    ("ground", ground::TESTS),
    ("single", single::TESTS),
    ("reach", reach::TESTS),
    ("run", run::TESTS),
    ("refusals", refusals::TESTS),
    ("addresses", addresses::TESTS),
    ("balance", balance::TESTS),
    ("balance", balance::LONG),
    ("outage", outage::TESTS),
    ("outage", outage::LONG),
    ("crowd", crowd::TESTS),
    ("crowd", crowd::LONG),
    ("rolling", rolling::TESTS),
    ("external", external::BALANCED),
    ("host", host::BALANCED),
    ("check", check::TESTS),
    ("drain", drain::TESTS),
    ("etcd", etcd::TESTS),
    ("expand", expand::TESTS),
    ("fast", fast::TESTS),
    ("external", external::TESTS),
    ("frames", frames::TESTS),
    ("health", health::TESTS),
    ("host", host::TESTS),
    ("ipam", ipam::TESTS),
    ("killed", killed::TESTS),
    ("metrics", metrics::TESTS),
    ("names", names::TESTS),
    ("in_kernel", in_kernel::TESTS),
    ("answers", answers::TESTS),
    ("attach", attach::TESTS),
    ("forward", forward::TESTS),
    ("monitor", monitor::TESTS),
    ("multitude", multitude::TESTS),
    ("repair", repair::TESTS),
    ("rest", rest::TESTS),
    ("restart", restart::TESTS),
    ("security", security::TESTS),
    ("services", services::TESTS),
    ("shortage", shortage::TESTS),
    ("sockets", sockets::TESTS),
    ("store", store::TESTS),
];

/// Runs the suite of the virtual machine, and the tests that it names: one at a time, because an
/// agent gives up its store's answer after two seconds, which are short in there.
fn run_in_vm(arguments: &Arguments) -> ExitCode {
    let arguments = &Arguments { test_threads: Some(1), ..arguments.clone() };
    let first = libtest_mimic::run(arguments, trials("vm", vm::ALONE).collect());
    let again = vm::AGAIN.iter().map(|&wanted| {
        let mut tests = SUITES.iter().flat_map(|&(suite, tests)| trials(suite, tests));
        tests.find(|trial| trial.name() == wanted).unwrap_or_else(|| panic!("no test is {wanted}"))
    });
    let mut own = vec![
        ("vm", vm::TESTS),
        ("balance", balance::TESTS),
        ("external", external::BALANCED),
        ("outage", outage::TESTS),
        ("crowd", crowd::TESTS),
        ("rolling", rolling::TESTS),
        ("host", host::BALANCED),
        ("monitor", monitor::DROPS),
    ];
    if std::env::var_os("NETCTL_LONG").is_some() {
        own.extend([
            ("balance", balance::LONG),
            ("outage", outage::LONG),
            ("crowd", crowd::LONG),
            ("rolling", rolling::LONG),
        ]);
    }
    let own = own.into_iter().flat_map(|(suite, tests)| trials(suite, tests));
    let rest = own.chain(again).collect();
    let second = libtest_mimic::run(arguments, rest);
    // An older kernel attaches programs in another way, and has SCTP.
    engine::use_ebpf();
    let third = libtest_mimic::run(arguments, trials("ebpf", balance::TESTS).collect());
    let runs = [&first, &second, &third];
    runs.into_iter().find(|run| run.has_failed()).unwrap_or(&third).exit_code()
}

fn trials(suite: &'static str, tests: &'static [Test]) -> impl Iterator<Item = Trial> {
    tests
        .iter()
        .map(move |&(name, test)| Trial::test(format!("{suite}::{name}"), move || run_in_world(test)))
}

fn run_in_world(test: fn(&World)) -> Result<(), Failed> {
    let world = World::new();
    catch_unwind(AssertUnwindSafe(|| test(&world))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        format!("{}\n{}", text.unwrap_or_default(), world.dump()).into()
    })
}
