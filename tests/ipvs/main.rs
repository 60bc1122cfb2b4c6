//! Facts about IPVS on a kernel that has it, compared with what `ipvsadm` prints and makes.
//!
//! Every test has a network namespace of its own. With `NETCTL_VM=1`, or where the running kernel
//! has IPVS, all of them run, and fail where something is missing: root, IPVS, `ipvsadm`. On a
//! kernel without IPVS there is one fact, that this is told.

mod refusals;
mod table;
mod traffic;
#[path = "../support/trials.rs"]
mod trials;
mod volume;
mod world;

use libtest_mimic::{Arguments, Failed, Trial};
use netctl::kernel::ipvs::{Error, Ipvs};

use trials::facts;

fn main() {
    let mut arguments = Arguments::from_args();
    // They share the machine's modules, and one of them measures.
    arguments.test_threads = Some(1);
    if !arguments.list {
        trials::isolate();
    }
    let in_vm = std::env::var_os("NETCTL_VM").is_some_and(|value| value == "1");
    let mut tests = if in_vm || Ipvs::open().is_ok() { all() } else { without_ipvs() };
    if in_vm {
        // It unloads modules, which are the machine's.
        tests.extend(facts! { volume: a_module_that_was_loaded_anew_is_found_again });
    }
    libtest_mimic::run(&arguments, tests).exit();
}

fn all() -> Vec<Trial> {
    facts! {
        table: every_scheduler, every_flag, every_kind_of_service, persistence_of_every_kind,
            every_way_of_forwarding, weights_and_thresholds, ways_that_ipvsadm_cannot_ask_for,
            a_service_is_changed_in_place, a_mask_leaves_other_flags_alone,
            destinations_are_changed_and_deleted, one_service_is_read_by_its_key,
            flushing_leaves_nothing, timeouts_are_read_and_set, the_version_is_told,
            an_opened_ipvs_stays_in_its_namespace;
        refusals: a_missing_module_is_told, what_is_there_is_not_made_twice,
            an_unknown_service_is_told, an_unknown_destination_is_told,
            a_destination_that_cannot_be_is_refused, a_timeout_that_is_too_long_changes_none,
            what_makes_no_sense_is_not_sent, without_rights_nothing_is_read_or_changed;
        traffic: connections_are_counted_and_forgotten, rates_are_told,
            a_persistent_client_is_counted;
        volume: ten_thousand_destinations_are_made_and_read, each_of_a_batch_has_its_answer;
    }
}

fn without_ipvs() -> Vec<Trial> {
    let told = || {
        let error = Ipvs::open().err().ok_or("this kernel has IPVS after all")?;
        let text = "this kernel has no IPVS: load the module ip_vs, or use a kernel that has it";
        match &error {
            Error::NoIpvs if error.to_string() == text => Ok(()),
            _ => Err(Failed::from(format!("another error: {error:?}: {error}"))),
        }
    };
    vec![Trial::test("a_kernel_without_ipvs_is_told", told)]
}

fn run(test: fn()) -> Result<(), Failed> {
    trials::in_thread(move || {
        world::fresh_namespace();
        test();
    })
}
