//! `netctl network create` with what is expected on the network.

use crate::memory::Agent;
use crate::{failed, json, netctl, text};

/// What is told when a network is made, and its first subnet.
fn made(agent: &Agent, name: &str, options: &str) -> (String, String) {
    let output = netctl(agent, &format!("network create {name} {options}"));
    assert!(output.status.success(), "{options}: {output:?}");
    let shown = json(agent, &format!("network inspect {name} -o json"));
    (text(&output.stderr), shown[0]["subnets"][0]["cidr"].as_str().unwrap().to_owned())
}

#[test]
fn a_subnet_is_chosen_for_what_is_expected_and_the_sum_is_told() {
    let agent = Agent::start();
    for (name, options, sum, prefix) in [
        (
            "a",
            "--expect-endpoints 1000 --expect-services 100 --nodes 10",
            "1,000 endpoints + 100 services + 250 headroom (a quarter of the endpoints) + 3 network, \
             broadcast and gateway = 1,353 addresses: /21 (2,045 usable)",
            21,
        ),
        // The agent knows two nodes.
        (
            "b",
            "--expect-endpoints 200",
            "200 endpoints + 100 headroom (the endpoints of one of 2 nodes) + 3 network, broadcast and \
             gateway = 303 addresses: /23 (509 usable)",
            23,
        ),
        ("c", "--expect-endpoints 200 --nodes 8", "50 headroom (a quarter", 24),
        ("d", "--expect-services 20 --ipv6", "20 services + 16 headroom + 3", 26),
    ] {
        let (told, cidr) = made(&agent, name, options);
        assert!(told.contains(sum) && told.contains(&format!("a /{prefix} subnet is chosen")), "{told}");
        assert!(cidr.ends_with(&format!("/{prefix}")), "{cidr}");
        assert!(!told.contains("nodes +") && !told.contains("held"), "{told}");
    }
}

#[test]
fn subnets_that_are_too_small_together_for_what_is_expected_are_told() {
    let agent = Agent::start();
    let expected = "--expect-endpoints 300 --nodes 4";
    for (number, (subnets, usable)) in [
        ("--subnet 10.0.0.0/24", Some("253 IPv4")),
        ("--subnet 10.1.0.0/24 --subnet 10.2.0.0/24", None),
        ("--subnet 10.3.0.0/24 --subnet 10.4.0.0/26", Some("314 IPv4")),
        ("--subnet 10.5.0.0/16 --ip-range 10.5.7.0/24", Some("256 IPv4")),
        ("--subnet fd00::/64", None),
        ("--subnet fd01::/120", Some("254 IPv6")),
    ]
    .into_iter()
    .enumerate()
    {
        let (told, _) = made(&agent, &format!("n{number}"), &format!("{expected} {subnets}"));
        match usable {
            None => assert_eq!(told, "", "{subnets}"),
            Some(usable) => {
                let text =
                    format!("warning: smaller than what is expected: {usable} addresses are usable");
                assert!(told.contains(&text), "{subnets}: {told}");
            }
        }
    }
}

#[test]
fn expectations_that_cannot_be_used_make_nothing() {
    let agent = Agent::start();
    for (options, word) in [
        ("--nodes 4", "--expect-endpoints"),
        ("--expect-endpoints 5 --nodes 0", "--nodes"),
        ("--expect-endpoints many", "--expect-endpoints"),
        ("--expect-endpoints 14000000", "more than the largest subnet has, a /8"),
        ("--expect-endpoints 5 --subnet 10.9.0.7/24", "10.9.0.7/24"),
    ] {
        let told = failed(&agent, &format!("network create web {options}"), 2);
        assert!(told.contains(word), "{options}: {told}");
    }
    assert!(agent.memory.state().networks.is_empty());
}
