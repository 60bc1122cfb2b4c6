//! The command as people and scripts use it, against an agent in memory.

#[path = "support/memory.rs"]
mod memory;
#[path = "cli/monitor.rs"]
mod monitor;
#[path = "support/monitor.rs"]
mod seen;
#[path = "cli/services.rs"]
mod services;
#[path = "cli/sizing.rs"]
mod sizing;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use memory::Agent;
use netctl::api::ErrorCode;
use proptest::prelude::*;
use serde_json::Value;

fn command(socket: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_netctl"));
    command.env_clear().env("NETCTL_SOCKET", socket);
    command
}

fn netctl(agent: &Agent, line: &str) -> Output {
    command(&agent.socket).args(line.split_whitespace()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What a command prints that succeeds without complaint.
fn done(agent: &Agent, line: &str) -> String {
    let output = netctl(agent, line);
    let complaint = text(&output.stderr);
    assert!(output.status.success() && complaint.is_empty(), "{line}: {complaint}");
    text(&output.stdout)
}

/// What a command complains that ends with a status.
fn failed(agent: &Agent, line: &str, status: i32) -> String {
    let output = netctl(agent, line);
    let complaint = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{line}: {complaint}");
    complaint
}

fn json(agent: &Agent, line: &str) -> Value {
    serde_json::from_str(&done(agent, line)).unwrap()
}

/// An agent with a network `web` and an endpoint `a` on it.
fn with_endpoint() -> (Agent, String, String) {
    let agent = Agent::start();
    let network = done(&agent, "network create web --subnet 10.9.0.0/24 --label team=shop");
    let attach = "endpoint attach --network web --netns /run/netns/a --name a --ip 10.9.0.7";
    let endpoint = done(&agent, attach);
    (agent, network.trim().to_owned(), endpoint.trim().to_owned())
}

#[test]
fn create_prints_the_id_that_other_commands_take() {
    let agent = Agent::start();
    let id = done(&agent, "network create web");
    assert_eq!(id.len(), 13);
    let shown = json(&agent, &format!("network inspect {} -o json", id.trim()));
    assert_eq!((shown[0]["id"].as_str(), shown[0]["name"].as_str()), (Some(id.trim()), Some("web")));
}

#[test]
fn create_takes_its_options_before_and_after_the_name() {
    let options = "--subnet 10.9.0.0/24 --gateway 10.9.0.254 --ip-range 10.9.0.128/25 \
                   --reserve 10.9.0.9 --aux-address router=10.9.0.8 --vni 77 --mtu 1400 --internal \
                   --label a=b --label c --subnet fd00:9::/64";
    let mut shown = Vec::new();
    for line in [format!("network create {options} web"), format!("network create web {options}")] {
        let agent = Agent::start();
        let mut network = json(&agent, &format!("-o json {line}"));
        network["id"].take();
        shown.push(network);
    }
    assert_eq!(shown[0], shown[1]);
    let subnet = &shown[0]["subnets"][0];
    assert_eq!(subnet["gateway"], "10.9.0.254");
    assert_eq!(subnet["range"], "10.9.0.128/25");
    assert_eq!(subnet["reserved"], serde_json::json!(["10.9.0.8", "10.9.0.9"]));
    assert_eq!(shown[0]["labels"], serde_json::json!({"a": "b", "c": ""}));
    assert_eq!(shown[0]["vni"], 77);
}

#[test]
fn ls_is_a_table_that_can_be_filtered_or_reduced_to_ids() {
    let (agent, id, endpoint) = with_endpoint();
    done(&agent, "network create shop");
    let table = done(&agent, "network ls");
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0][..3], ["NETWORK", "ID", "NAME"]);
    assert_eq!(lines[1], [&id, "web", "10.9.0.0/24", "4097", "1450", "no", "1", "0%"]);
    assert_eq!(lines.len(), 3);
    assert!(table.lines().all(|line| line == line.trim_end()), "{table:?}");
    assert!(!table.contains('\x1b'), "{table:?}");
    assert_eq!(done(&agent, "network list -q --filter name=we"), format!("{id}\n"));
    assert_eq!(done(&agent, "network ls --filter name=zzz").lines().count(), 1);
    failed(&agent, "network ls --filter colour=red", 2);

    let table = done(&agent, "endpoint ls --network web --node n1");
    let row: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row, [&endpoint, "a", "web", "n1", "10.9.0.7", "eth0", "-", "ready"]);
    assert_eq!(done(&agent, "endpoint ls -q"), format!("{endpoint}\n"));
    assert_eq!(done(&agent, "endpoint ls -q --node n2"), "");
    let table = done(&agent, "node ls");
    assert!(table.contains("n1*") && table.contains("dead"), "{table}");
    assert_eq!(done(&agent, "node ls -q"), "n1\nn2\n");
}

#[test]
fn a_network_that_runs_full_is_marked() {
    let agent = Agent::start();
    // Thirteen usable addresses.
    done(&agent, "network create web --subnet 10.9.0.0/28");
    let used = |agent: &Agent| {
        let table = done(agent, "network ls");
        table.lines().nth(1).unwrap().rsplit("  ").next().unwrap().trim().to_owned()
    };
    for (count, shown) in [(10, "76%"), (11, "84% !"), (12, "92% !"), (13, "100% !!")] {
        let there = agent.memory.state().endpoints.len();
        for number in there..count {
            done(&agent, &format!("endpoint attach --network web --netns /run/netns/c{number}"));
        }
        assert_eq!(used(&agent), shown, "{count}");
    }
    let text = done(&agent, "network inspect web");
    assert!(
        text.contains("IPv4: 13 usable, 13 endpoints") && text.contains("0 free (100% used, alarm)"),
        "{text}"
    );
    // Where it grows it is said when it will be full.
    for (full_in, shown) in
        [(Some(0), "100% !!"), (Some(5400), "100% !! full in 1h30m"), (None, "100% !!")]
    {
        agent.memory.state().full_in = full_in;
        assert_eq!(used(&agent), shown);
    }
    // Where that begins is the agent's to say.
    let levels = |warning, alarm| {
        let settings = &mut agent.memory.state().settings;
        (settings.address_warning, settings.address_alarm) = (warning, alarm);
    };
    levels(5, 101);
    assert_eq!(used(&agent), "100% !");
    levels(101, 102);
    agent.memory.state().full_in = Some(5400);
    assert_eq!(used(&agent), "100%");
}

#[test]
fn inspect_shows_where_a_network_s_addresses_are_and_when_they_end() {
    let agent = Agent::start();
    done(&agent, "network create web --subnet 10.9.0.0/28 --reserve 10.9.0.9 --subnet fd00:9::/64");
    done(&agent, "endpoint attach --network web --netns /run/netns/c");
    let text = done(&agent, "network inspect web");
    for line in [
        "10.9.0.0/28: 12 usable, 0 endpoints, 0 services, 0 resting, 12 free, 1 excluded",
        "n1: IPv4 1 endpoints, 1 blocks with 14 free",
        "11 free (8% used)",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    agent.memory.state().full_in = Some(5400);
    let text = done(&agent, "network inspect web");
    assert!(text.contains("11 free (8% used, full in 1h30m at this rate)"), "{text}");
    agent.memory.state().full_in = Some(0);
    let text = done(&agent, "network inspect web");
    assert!(text.contains("(8% used, full)"), "{text}");
}

#[test]
fn json_has_all_that_the_api_has() {
    let (agent, id, endpoint) = with_endpoint();
    let networks = json(&agent, "network ls -o json");
    assert_eq!(networks, json(&agent, "network inspect web -o json"));
    assert_eq!((&networks[0]["id"], &networks[0]["endpoints"]), (&id.into(), &1.into()));
    let endpoints = json(&agent, "endpoint ls -o json");
    assert_eq!(endpoints, json(&agent, "-o json endpoint inspect a --network web"));
    assert_eq!(endpoints[0]["id"], endpoint.as_str());
    assert_eq!(endpoints[0]["attachment"]["netns"], "/run/netns/a");
    assert_eq!(json(&agent, "node inspect n1 n2 -o json").as_array().unwrap().len(), 2);
    let version = json(&agent, "version -o json");
    assert_eq!((&version["client"], &version["agent"]["node"]), (&"0.1.0".into(), &"n1".into()));
}

#[test]
fn inspect_shows_aligned_lines() {
    let (agent, id, _) = with_endpoint();
    let shown = done(&agent, "network inspect web");
    assert!(shown.starts_with(&format!("ID:        {id}\nName:      web\n")), "{shown}");
    assert!(shown.contains("Subnets:   10.9.0.0/24, gateway 10.9.0.1\n"), "{shown}");
    assert!(shown.contains("Labels:    team=shop\n"), "{shown}");
    let shown = done(&agent, "endpoint inspect a");
    assert!(shown.contains("Addresses: 10.9.0.7/24\n"), "{shown}");
    assert!(shown.contains("Aliases:   -\n") && shown.contains("Resolver:  10.9.0.1\n"), "{shown}");
    let shown = done(&agent, "node inspect n1");
    assert!(shown.contains("Tunnel port:    4789\n"), "{shown}");
}

#[test]
fn an_endpoint_is_made_with_aliases_and_a_file_for_its_resolver() {
    let agent = Agent::start();
    done(&agent, "network create web --subnet 10.9.0.0/24");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("resolv.conf");
    let attach = "endpoint attach --network web --netns /n --alias db --alias cache";
    done(&agent, &format!("{attach} --name a --resolv-conf {}", file.display()));
    let text = std::fs::read_to_string(&file).unwrap();
    assert_eq!(text, "search web.netctl.internal\noptions ndots:0\nnameserver 10.9.0.1\n");
    let shown = done(&agent, "endpoint inspect a");
    assert!(shown.contains("Aliases:   db\n           cache\n"), "{shown}");
    let own = "--dns 192.0.2.53 --dns-search corp.example --dns-option edns0 --dns-option ndots:2";
    done(&agent, &format!("{attach} --name b {own} --resolv-conf {}", file.display()));
    let text = std::fs::read_to_string(&file).unwrap();
    assert_eq!(text, "search corp.example\noptions edns0 ndots:2\nnameserver 192.0.2.53\n");
    let refused = failed(&agent, &format!("{attach} --name c --resolv-conf /no/such/file"), 1);
    assert!(refused.contains("is attached, but /no/such/file cannot be written"), "{refused}");
    failed(&agent, &format!("{attach} --dns name"), 2);
    failed(&agent, &format!("{attach} --alias A"), 2);
}

#[test]
fn a_name_is_asked_for() {
    let agent = Agent::start();
    let answer = failed(&agent, "dns query web.shop -t AAAA --from a --network shop", 4);
    assert_eq!(answer, "", "that there is nothing is no complaint");
    let refused = failed(&agent, "dns query web --from elsewhere", 5);
    assert!(refused.contains("is on node n2"), "{refused}");
    failed(&agent, "dns query", 2);
}

#[test]
fn a_network_is_expanded_and_shrunk() {
    let (agent, id, _) = with_endpoint();
    let expand = "network expand web --subnet 10.10.0.0/24 --gateway 10.10.0.254 \
                  --ip-range 10.10.0.128/25 --aux-address router=10.10.0.8 --subnet 10.11.0.0/24";
    assert_eq!(done(&agent, expand).trim(), id);
    let shown = done(&agent, "network inspect web");
    let line = "10.10.0.0/24, gateway 10.10.0.254, range 10.10.0.128/25, reserved 10.10.0.8";
    assert!(shown.contains(line) && shown.contains("10.11.0.0/24"), "{shown}");
    let again = netctl(&agent, expand);
    assert_eq!((again.status.code(), text(&again.stdout).trim()), (Some(0), id.as_str()));
    assert!(text(&again.stderr).contains("10.10.0.0/24,10.11.0.0/24 already"), "{again:?}");
    let shrunk = json(&agent, "network shrink web --subnet 10.10.0.0/24 -o json");
    assert_eq!(shrunk["subnets"][1]["cidr"], "10.11.0.0/24");
    failed(&agent, "network shrink web --subnet 10.10.0.0/24", 4);
    done(&agent, "network shrink web --subnet 10.11.0.0/24");
    failed(&agent, "network shrink web --subnet 10.9.0.0/24", 5);
}

#[test]
fn several_names_go_on_after_a_failure() {
    let (agent, ..) = with_endpoint();
    for name in ["b", "c"] {
        done(&agent, &format!("network create {name}"));
    }
    let output = netctl(&agent, "network inspect b zzz c");
    assert_eq!(output.status.code(), Some(4));
    let shown = text(&output.stdout);
    assert!(shown.contains("b\n") && shown.contains("\n\nID:"), "{shown}");
    let output = netctl(&agent, "network remove b zzz web c");
    assert_eq!(output.status.code(), Some(4));
    assert_eq!(text(&output.stdout), "b\nc\n");
    assert_eq!(text(&output.stderr).lines().count(), 2);
    let output = netctl(&agent, "endpoint detach zzz a");
    assert_eq!(output.status.code(), Some(4));
    assert_eq!(agent.memory.state().detached.len(), 1);
}

#[test]
fn the_status_says_what_went_wrong() {
    let (agent, ..) = with_endpoint();
    assert!(failed(&agent, "network inspect no", 4).starts_with("netctl: there is no no"));
    failed(&agent, "endpoint inspect no", 4);
    failed(&agent, "node inspect no", 4);
    failed(&agent, "endpoint detach no", 4);
    failed(&agent, "network create web", 5);
    failed(&agent, "network rm web", 5);
    failed(&agent, "network inspect ../x", 2);
    failed(&agent, "network create w --subnet 10.9.0.7/24", 2);
    for (code, status) in [
        (ErrorCode::Internal, 1),
        (ErrorCode::Unsupported, 1),
        (ErrorCode::Invalid, 2),
        (ErrorCode::Exhausted, 5),
        (ErrorCode::Unavailable, 6),
        (ErrorCode::StoreReplaced, 6),
        (ErrorCode::Timeout, 6),
    ] {
        agent.memory.state().fail_next = Some(code);
        let complaint = failed(&agent, "network ls", status);
        assert!(complaint.starts_with("netctl: ") && complaint.contains("as the test wants"));
    }
}

#[test]
fn a_command_line_that_cannot_be_used_is_status_2() {
    let agent = Agent::start();
    for line in [
        "",
        "network",
        "network create",
        "network create A",
        "network create a/b",
        "network create web --subnet 10.0.0.0/99",
        "network create web --gateway x",
        "network create web --reserve name=x",
        "network create web --vni 0",
        "network create web --label =x",
        "network rm",
        "network expand web",
        "network expand web --subnet 10.0.0.0/99",
        "network shrink web",
        "network shrink web --subnet x",
        "endpoint attach --network web",
        "endpoint attach --network web --netns /proc/self/ns/net",
        "endpoint attach --network web --netns /n --wait 10",
        "endpoint attach --network web --netns /n --mac 02:00",
        "endpoint attach --network web --netns /n --interface lo",
        "endpoint attach --network web --netns /n --weight 2",
        "endpoint attach --network web --netns /n --service s --weight 0",
        "endpoint drain",
        "endpoint activate",
        "endpoint drain a --timeout 5m",
        "node drain",
        "run --network web",
        "run --network web --hostname -x -- true",
        "run -- true",
        "plan",
        "plan f --nodes 0",
        "plan f --project Shop",
        "ls -o yaml",
        "completion tcsh",
    ] {
        assert!(!failed(&agent, line, 2).is_empty());
    }
    assert!(agent.memory.state().networks.is_empty());
}

#[test]
fn an_agent_that_is_not_there_is_status_3_with_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("none.sock");
    let stale = directory.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    for path in [&socket, &stale] {
        for line in ["network ls", "version"] {
            let output = command(path).args(line.split(' ')).output().unwrap();
            assert_eq!(output.status.code(), Some(3));
            let complaint = text(&output.stderr);
            assert!(complaint.contains(path.to_str().unwrap()), "{complaint}");
            assert!(complaint.contains("systemctl status netctld"), "{complaint}");
        }
    }
    let output = command(&socket).args(["version", "-o", "json"]).output().unwrap();
    let version: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&version["client"], &version["agent"]), (&"0.1.0".into(), &Value::Null));
}

#[test]
fn the_socket_is_a_flag_before_a_variable() {
    let agent = Agent::start();
    let nowhere = Path::new("/nowhere/netctl.sock");
    let flag = agent.socket.to_str().unwrap();
    let output = command(nowhere).args(["network", "ls", "--socket", flag]).output().unwrap();
    assert!(output.status.success());
    let output = command(nowhere).args(["network", "ls"]).output().unwrap();
    assert!(text(&output.stderr).contains("/nowhere/netctl.sock"));
}

#[test]
fn attach_sends_what_was_asked_for() {
    let (agent, _, first) = with_endpoint();
    let line = "endpoint attach --network web --netns ns --name b --interface eth7 --ip 10.9.0.8 \
                --mac 02:00:00:00:00:08 --label x=y --wait 1m30s";
    done(&agent, line);
    let request = agent.memory.state().attached.last().unwrap().clone();
    assert!(request.netns.is_absolute() && request.netns.ends_with("ns"));
    assert_eq!(request.interface.unwrap().as_str(), "eth7");
    assert_eq!(request.addresses[0].to_string(), "10.9.0.8");
    assert_eq!(request.mac.unwrap().to_string(), "02:00:00:00:00:08");
    assert_eq!((request.labels["x"].as_str(), request.wait_ms), ("y", Some(90_000)));
    let again = "endpoint attach --network web --netns /run/netns/a --name a --ip 10.9.0.7";
    assert_eq!(done(&agent, again).trim(), first);
    assert_eq!(done(&agent, "endpoint detach a --network web").trim(), first);
}

#[test]
fn what_others_wrote_does_not_steer_the_terminal() {
    let agent = Agent::start();
    let label = "x=\x1b]0;owned\x07\u{9b}2J";
    let create = command(&agent.socket).args(["network", "create", "web", "--label", label]).output();
    assert!(create.unwrap().status.success());
    let shown = done(&agent, "network inspect web");
    assert!(shown.contains("owned") && !shown.contains(['\x1b', '\x07', '\u{9b}']), "{shown:?}");
}

#[test]
fn every_sub_command_has_help_with_examples() {
    let agent = Agent::start();
    for line in [
        "",
        "network create",
        "network ls",
        "network inspect",
        "network expand",
        "network shrink",
        "network rm",
        "endpoint ls",
        "endpoint inspect",
        "endpoint attach",
        "endpoint drain",
        "endpoint detach",
        "service create",
        "service ls",
        "service inspect",
        "service update",
        "service scale",
        "service drain",
        "service activate",
        "service rm",
        "run",
        "plan",
        "ipam check",
        "node ls",
        "node inspect",
        "node drain",
        "node activate",
        "node rm",
        "completion",
    ] {
        let help = done(&agent, &format!("{line} --help"));
        assert!(help.contains("Examples:") && help.contains("--socket"), "{line}: {help}");
    }
    for line in ["network", "endpoint", "service", "node", "version"] {
        assert!(done(&agent, &format!("{line} --help")).contains("Usage:"));
    }
    let help = done(&agent, "--help");
    for part in ["Exit status:", "NETCTL_SOCKET", "cannot be reached"] {
        assert!(help.contains(part), "{part}: {help}");
    }
}

#[test]
fn a_check_tells_what_it_found_and_what_became_of_it() {
    let agent = Agent::start();
    assert!(done(&agent, "ipam check").starts_with("0 repaired, 0 left"));
    agent.memory.state().findings = vec![("leak", true), ("double", false)];
    let output = netctl(&agent, "ipam check");
    let table = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1));
    let words = |line: usize| table.lines().nth(line).unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(words(0), ["NETWORK", "NODE", "KIND", "WHAT", "PROBLEM", "REPAIR"]);
    assert_eq!((words(1)[1], words(2)[1]), ("-", "n2"), "{table}");
    assert!(table.contains("--repair: remove the key"), "{table}");
    assert!(table.ends_with("the kernel of 2 of 2 node(s): n1, n2\n"), "{table}");
    let output = netctl(&agent, "ipam check --repair");
    let table = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "one is left");
    assert!(table.contains("done: remove the key") && table.contains("1 repaired, 1 left"), "{table}");
    agent.memory.state().findings = vec![("leak", true)];
    let all = json(&agent, "ipam check --repair -o json");
    assert_eq!(
        (&all["repaired"][0]["what"], &all["findings"]),
        (&"leak".into(), &serde_json::json!([]))
    );
    failed(&agent, "ipam check --network nothing", 4);
}

#[test]
fn a_check_that_has_not_compared_every_node_fails_and_says_why() {
    let agent = Agent::start();
    agent.memory.state().not_compared = Some("it sleeps");
    for line in ["ipam check", "ipam check --repair"] {
        let output = netctl(&agent, line);
        let table = text(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{line}");
        assert!(table.contains("incomplete: node n2 was not compared: it sleeps\n"), "{table}");
        assert!(table.ends_with("the kernel of 1 of 2 node(s): n1\n"), "{table}");
        assert!(
            done(&agent, &format!("{line} --local")).ends_with("the kernel of 1 of 1 node(s): n1\n")
        );
    }
    *agent.memory.state() = memory::State { cut: 7, findings: vec![("x", false)], ..Default::default() };
    let table = text(&netctl(&agent, "ipam check").stdout);
    assert!(table.contains("node n2: 7 more are not shown\n"), "{table}");
}

#[test]
fn completion_scripts_know_the_commands() {
    let agent = Agent::start();
    for shell in ["bash", "zsh", "fish"] {
        let script = done(&agent, &format!("completion {shell}"));
        assert!(script.contains("aux-address") && script.contains("inspect"), "{shell}");
    }
    let script = done(&agent, "completion bash");
    let mut bash = Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut bash.stdin.take().unwrap(), script.as_bytes()).unwrap();
    assert!(bash.wait().unwrap().success());
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let agent = Agent::start();
    let mut child = command(&agent.socket);
    let mut child = child
        .args(["completion", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_argument_is_a_panic(words in proptest::collection::vec("[^\\x00]{0,12}", 0..4)) {
        let nowhere = Path::new("/nowhere/netctl.sock");
        let output = command(nowhere).arg("network").args(words).output().unwrap();
        prop_assert!(matches!(output.status.code(), Some(0 | 2 | 3)), "{output:?}");
    }
}
