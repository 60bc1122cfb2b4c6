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
#[path = "netns/balance.rs"]
mod balance;
#[path = "netns/cluster.rs"]
mod cluster;
#[path = "netns/expand.rs"]
mod expand;
#[path = "netns/ground.rs"]
mod ground;
#[path = "netns/ipam.rs"]
mod ipam;
#[path = "netns/metrics.rs"]
mod metrics;
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
#[path = "netns/run.rs"]
mod run;
#[path = "netns/security.rs"]
mod security;
#[path = "netns/services.rs"]
mod services;
#[path = "netns/single.rs"]
mod single;
#[path = "netns/store.rs"]
mod store;

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
    // Two cores: more at once would only make the waits longer.
    arguments.test_threads.get_or_insert(2);
    let suites = [
        ("ground", ground::TESTS),
        ("single", single::TESTS),
        ("reach", reach::TESTS),
        ("run", run::TESTS),
        ("refusals", refusals::TESTS),
        ("addresses", addresses::TESTS),
        ("expand", expand::TESTS),
        ("ipam", ipam::TESTS),
        ("metrics", metrics::TESTS),
        ("repair", repair::TESTS),
        ("rest", rest::TESTS),
        ("restart", restart::TESTS),
        ("security", security::TESTS),
        ("services", services::TESTS),
        ("store", store::TESTS),
    ];
    // Where the kernel has what balances, these are the ones to run.
    let in_vm = std::env::var_os("NETCTL_VM").is_some();
    let suites = if in_vm { vec![("balance", balance::TESTS)] } else { suites.to_vec() };
    let trials = suites.into_iter().flat_map(|(suite, tests)| {
        tests.iter().map(move |&(name, test)| {
            let name = format!("{suite}::{name}");
            Trial::test(name, move || run_in_world(test))
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

fn run_in_world(test: fn(&World)) -> Result<(), Failed> {
    let world = World::new();
    catch_unwind(AssertUnwindSafe(|| test(&world))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        format!("{}\n{}", text.unwrap_or_default(), world.dump()).into()
    })
}
