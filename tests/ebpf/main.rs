//! Facts about the eBPF programs, by running them: packets in, packets and changed maps out
//! (`BPF_PROG_TEST_RUN`). The kernel that the tests run on has to take every program.
//!
//! Every test has a network namespace and maps of its own.

mod balance;
mod errors;
mod ground;
mod group;
mod maps;
mod names;
mod packet;
mod path;
mod programs;
mod reports;
mod sockets;
#[path = "../support/trials.rs"]
mod trials;

use libtest_mimic::{Arguments, Failed};

use trials::facts;

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    if !arguments.list {
        trials::isolate();
    }
    let tests = facts! {
        maps: entries_are_written_read_and_removed_by_the_thousand, a_full_map_says_so,
            maps_outlive_who_opened_them_and_grow_when_they_are_to;
        programs: the_verifier_follows_no_more_instructions_than_before,
            a_program_is_attached_once_replaced_and_detached,
            a_crossing_runs_its_program_where_it_costs_less_when_there_is_time;
        balance: what_is_for_nobody_we_know_passes_as_it_is,
            a_connection_goes_to_one_backend_and_its_answers_come_from_the_service,
            backends_take_turns_by_their_weights, a_hash_keeps_a_client_at_its_backend,
            the_backend_with_the_fewest_connections_is_next, a_client_keeps_its_backend,
            a_backend_meets_itself_by_the_gateway, all_ports_are_balanced_as_they_are,
            who_speaks_for_another_opens_nothing, a_client_that_was_made_anew_begins_anew,
            a_connection_that_lost_one_way_begins_anew, a_port_that_is_taken_is_not_given_twice,
            a_backend_that_is_gone_takes_its_connections_along,
            what_is_counted_begins_anew_where_it_was_removed,
            a_reset_connection_begins_anew, silence_ends_a_connection,
            fragments_follow_the_first, fragments_of_sctp_keep_their_ports_or_go, the_oldest_connections_leave_a_full_table;
        names: a_name_is_answered_as_the_agent_answers_it,
            an_answer_has_a_checksum_where_its_query_had_one, what_only_the_agent_knows_goes_to_it_as_it_is,
            what_is_told_of_any_bytes_the_agent_would_tell, who_is_no_name_server_is_not_spoken_for, what_nobody_says_any_more_is_not_told;
        path: what_is_for_another_node_enters_the_tunnel, what_comes_by_the_tunnel_leaves_it,
            connections_have_source_ports_of_their_own_in_the_tunnel,
            a_balanced_packet_enters_the_tunnel_with_its_backends_address,
            what_the_other_end_may_not_send_passes_as_it_is, containers_of_one_node_reach_each_other,
            what_needs_the_kernel_passes_as_it_is, the_tunnel_leaves_by_the_hosts_routes_or_not_at_all;
        reports: nobody_is_told_who_does_not_watch, what_a_balanced_connection_does_is_told,
            what_is_refused_is_told_and_of_the_rest_a_part, what_skips_the_stack_is_told_at_both_ends,
            what_somebody_refuses_is_told_as_it_was_sent, what_nobody_reads_in_time_is_counted;
        sockets: who_connects_to_a_service_has_a_backend_and_sees_the_service,
            who_connects_to_a_mapped_address_has_a_backend_too,
            who_is_not_a_container_of_the_network_is_not_asked, what_is_no_service_is_connected_as_it_is,
            a_socket_gets_its_backend_by_the_scheduler,
            what_becomes_of_a_connection_is_known_and_its_bytes_are_counted,
            an_ended_connection_is_told_and_without_backends_nothing_is_changed, what_is_sent_to_a_service_is_answered_by_it,
            a_socket_leaves_a_backend_that_is_gone, two_ports_with_the_same_backends_are_told_apart,
            what_a_connected_socket_sends_is_left_to_its_packets,
            a_socket_stays_with_its_backend_while_one_of_them_speaks,
            who_watches_sees_what_a_socket_gets, they_outlive_who_has_them_asked_and_are_put_back;
        errors: an_error_shows_the_client_what_it_sent, an_error_reaches_the_backend,
            errors_about_others_pass_as_they_are;
    };
    libtest_mimic::run(&arguments, tests).exit();
}

fn run(test: fn()) -> Result<(), Failed> {
    trials::in_thread(test)
}
