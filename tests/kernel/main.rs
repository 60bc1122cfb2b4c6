//! Facts about the kernel layer on the kernel that is running.
//!
//! Everything happens in a network and a mount namespace of its own, with its own /run. The tests
//! need root, and fail without.

mod connect;
mod facts;
mod host;
mod names;
#[path = "../support/trials.rs"]
mod trials;
mod watch;
mod world;

use libtest_mimic::{Arguments, Failed};

use trials::facts;

fn main() {
    let mut arguments = Arguments::from_args();
    // They share /run/netns, and one of them empties it.
    arguments.test_threads = Some(1);
    if !arguments.list {
        trials::isolate();
        world::sh("ip link set lo up");
    }
    let tests = facts! {
        connect: containers_reach_each_other_over_ipv4, containers_reach_each_other_over_ipv6,
            an_address_that_nobody_has_is_unreachable_at_once, two_hundred_containers_come_and_go,
            plugging_again_completes_what_is_missing, plugging_again_follows_the_subnets,
            a_container_that_comes_back_is_connected_anew,
            unplugging_leaves_nothing, an_interface_that_is_taken_is_a_conflict_and_leaves_nothing,
            a_default_route_that_is_there_stays,
            another_namespace_at_the_same_path_is_refused, ipv6_is_switched_on_where_it_is_needed,
            the_interfaces_of_a_container_that_has_gone_are_gone;
        facts: what_was_applied_is_observed, applying_twice_is_as_good_as_once,
            what_somebody_removes_is_seen_and_put_back, objects_of_others_are_not_seen,
            a_wrong_device_in_the_place_of_ours_is_foreign, a_route_is_replaced_by_one_with_its_destination,
            a_failing_step_does_not_stop_the_others, more_steps_than_fit_in_one_send_are_all_taken,
            settings_are_put_right, a_vni_is_free_when_its_sandbox_has_gone,
            a_mark_for_removal_that_is_left_over_is_taken_back;
        host: an_uplink_is_made_once_and_put_right, uplinks_that_are_not_wanted_go_and_others_stay,
            forwarding_keeps_router_advertisements, the_inventory_is_without_ours,
            a_table_is_installed_recognised_and_removed, a_script_with_an_error_changes_nothing,
            cleaning_up_leaves_the_namespace_as_it_was, this_system_passes_the_probe;
        names: what_is_no_network_namespace_is_refused, a_leftover_file_is_no_obstacle,
            a_name_is_made_once_and_removed_for_good, entering_comes_back;
        watch: what_somebody_changes_is_reported, what_we_change_is_not_reported;
    };
    libtest_mimic::run(&arguments, tests).exit();
}

fn run(test: fn()) -> Result<(), Failed> {
    // So one that fails half-way inside a namespace spoils no other.
    trials::in_thread(test)
}
