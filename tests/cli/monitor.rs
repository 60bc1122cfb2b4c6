//! `netctl monitor`.

use netctl::api::{MonitorQuery, SAMPLE, Sighting, SightingKind};

use super::memory::Agent;
use super::{command, done, failed, seen, text};

const LINES: [&str; 4] = [
    "08:41:05.310271 flow from-container shop tcp a/10.9.0.2:52118 > web/10.9.0.9:80 => web-1/10.9.0.4:8080 S 60 bytes direct",
    "08:41:05.310399 flow from-wire shop tcp web-1/10.9.0.4:8080 > a/10.9.0.2:52118 as web/10.9.0.9:80 SA 60 bytes direct",
    "08:41:05.500000 drop host - icmpv6 fd00:9::77 > fd00:9::200 104 bytes: container-to-host",
    "08:41:05.600000 lost 12 packets are not shown: they came too quickly",
];

fn agent() -> Agent {
    let agent = Agent::start();
    agent.memory.state().sightings = seen::sightings();
    agent
}

#[test]
fn a_line_says_what_a_packet_did_or_why_it_did_not() {
    let agent = agent();
    let output = command(&agent.socket).env("TZ", "UTC").arg("monitor").output().unwrap();
    assert_eq!(text(&output.stdout).lines().collect::<Vec<_>>(), LINES);
    // Nobody tells any more.
    assert_eq!(output.status.code(), Some(3));
    let complaint = text(&output.stderr);
    assert_eq!(complaint, "netctl: the agent has ended: nothing more is seen\n");
    // The time is the place's, as its rules have it.
    agent.memory.state().sightings = seen::sightings();
    let mut there = command(&agent.socket);
    let output = there.env("TZ", "EST5").args(["monitor", "--count", "1"]).output().unwrap();
    assert_eq!(text(&output.stdout), format!("{}\n", LINES[0].replacen("08:", "03:", 1)));
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn json_is_a_line_for_each() {
    let agent = agent();
    let told = done(&agent, "monitor -o json --count 4");
    let told: Vec<Sighting> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(told, seen::sightings());
}

#[test]
fn what_is_wanted_is_asked_for() {
    let agent = agent();
    done(&agent, "network create shop --subnet 10.9.0.0/24");
    for (line, expected) in [
        ("", MonitorQuery { sample: Some(SAMPLE), ..MonitorQuery::default() }),
        (
            "-n shop -e a -s web -t drop --sample 1",
            MonitorQuery {
                network: Some("shop".parse().unwrap()),
                endpoint: Some("a".parse().unwrap()),
                service: Some("web".parse().unwrap()),
                kind: Some(SightingKind::Drop),
                sample: Some(1),
            },
        ),
    ] {
        agent.memory.state().sightings = seen::sightings();
        done(&agent, &format!("monitor --count 1 {line}"));
        assert_eq!(agent.memory.state().monitored.pop(), Some(expected));
    }
    assert!(failed(&agent, "monitor --network no", 4).contains("no"));
    for (line, part) in
        [("--sample 0", "1.."), ("--count 0", "1.."), ("--type lost", "drop"), ("--network A", "A")]
    {
        let complaint = failed(&agent, &format!("monitor {line}"), 2);
        assert!(complaint.contains(part), "{line}: {complaint}");
    }
}
