//! Services and drains.

use std::fs::File;
use std::io::Read;
use std::process::Stdio;

use netctl::api::{DrainView, Target};
use netctl::model::HealthTest;
use nix::pty::openpty;
use serde_json::json;

use super::memory::Agent;
use super::{command, done, failed, json, netctl, text, with_endpoint};

#[test]
fn services_are_made_scaled_and_removed() {
    let agent = Agent::start();
    done(&agent, "network create web --subnet 10.9.0.0/24");
    let id = done(&agent, "service create shop --network web --replicas 5 --update-order start-first");
    let table = done(&agent, "svc ls");
    let row: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row, [id.trim(), "shop", "vip", "1/5", "web", "all"]);
    assert_eq!(done(&agent, "service ls -q"), "shop\n");
    assert_eq!(done(&agent, "service scale shop=7"), "shop scaled to 7\n");
    let text = done(&agent, "service inspect shop");
    assert!(text.contains("start-first, 1 at a time") && text.contains('7'), "{text}");
    assert_eq!(json(&agent, "service inspect shop -o json")[0]["replicas"], 7);
    for (command, status) in [
        ("service create shop --network web", 5),
        ("service create other --network none", 4),
        ("service create other", 2),
        ("service create other --network web --replicas -1", 2),
        ("service create other --network web --endpoint-mode both", 2),
        ("service create other --network web --scheduler fastest", 2),
        ("service create other --network web --port 80:0", 2),
        ("service create other --network web --port 80/icmp", 2),
        ("service create other --network web --vip shop", 2),
        ("service create other --network web --affinity 1500ms", 2),
        ("service create other --network web --timeout icmp=5s", 2),
        ("service create other --network web --prefer nearest", 2),
        ("service create other --network web --health-tcp 80 --health-http 80", 2),
        ("service create other --network web --health-interval 5s", 2),
        ("service update shop --affinity 5m --no-affinity", 2),
        ("service update shop --port 80 --all-ports", 2),
        ("service create other --network web --external db.example.org:5432", 2),
        ("service create other --network web --external 127.0.0.1:5432", 2),
        ("service create other --network web --external 192.0.2.1:1 --external 192.0.2.2:2", 2),
        ("service create other --network web --external 192.0.2.1:1 --endpoint-mode dnsrr", 2),
        ("service update shop --external 192.0.2.1:1", 2),
        ("service update shop --external-rm 192.0.2.1", 2),
        ("service update shop --port-rm 80:81", 2),
        ("service update shop --port-rm 80", 2),
        ("service update shop --health-tcp 80 --no-health", 2),
        ("service update none", 4),
        ("service drain none", 4),
        ("service scale shop", 2),
        ("service scale shop=many", 2),
        ("service scale none=1", 4),
        ("service inspect none", 4),
    ] {
        failed(&agent, command, status);
    }
    assert_eq!(done(&agent, "service rm shop"), "shop\n");
    failed(&agent, "service rm shop", 4);
}

#[test]
fn a_service_is_made_with_all_that_was_asked_for() {
    let agent = Agent::start();
    done(&agent, "network create web --subnet 10.9.0.0/24");
    let line = "service create shop --network web --vip 10.9.0.80 --vip fd00::80 --scheduler wlc \
                --affinity 10m --port 80:8080 --port 53/udp --timeout tcp=15m --timeout tcp-fin=2m \
                --timeout udp=5s --prefer label=zone --health-http 8080/live --health-interval 5s \
                --health-timeout 2s --health-start-period 1m --health-retries 2";
    let made = json(&agent, &format!("-o json {line}"));
    assert_eq!(made["addresses"].as_object().unwrap().values().next().unwrap()[0], "10.9.0.80");
    assert_eq!(
        made["balancing"],
        json!({
            "scheduler": "wlc", "affinity": 600, "prefer": "label=zone",
            "ports": [
                {"protocol": "tcp", "port": 80, "target": 8080},
                {"protocol": "udp", "port": 53, "target": 53},
            ],
            "timeouts": {"tcp": 900, "tcp_fin": 120, "udp": 5},
        })
    );
    let test = json!({"type": "http", "port": 8080, "path": "/live"});
    let health = json!({"test": test, "interval": 5, "timeout": 2, "start_period": 60, "retries": 2});
    assert_eq!(made["health"], health);
    done(&agent, "service create tcp --network web --health-tcp 80");
    let mut create = command(&agent.socket);
    create.args(["service", "create", "cmd", "--network", "web", "--health-cmd", "test -e /ready"]);
    assert!(create.output().unwrap().status.success());
    let state = agent.memory.state();
    let tests = state.services.iter().map(|view| view.service.health.clone().unwrap().test);
    let shell = ["/bin/sh", "-c", "test -e /ready"].map(str::to_owned).to_vec();
    let expected = [HealthTest::Tcp { port: 80 }, HealthTest::Command { command: shell }];
    assert_eq!(tests.skip(1).collect::<Vec<_>>(), expected);
}

#[test]
fn an_update_changes_what_is_given_and_takes_back_what_is_named() {
    let agent = Agent::start();
    done(&agent, "network create web --subnet 10.9.0.0/24");
    let create = "service create shop --network web --port 80 --port 81 --affinity 5m --label a=b \
                  --timeout tcp=1h --prefer node --health-tcp 80 --label c=d";
    let before = json(&agent, &format!("-o json {create}"));
    assert_eq!(done(&agent, "service update shop"), "shop\n");
    assert_eq!(json(&agent, "-o json service inspect shop")[0], before);
    let update = "service update shop --port 80:8080 --port-rm 81 --scheduler mh --no-affinity \
                  --timeout udp=9s --timeout-rm tcp --no-prefer --no-health --label a=x \
                  --label-rm c --replicas 9 --update-order start-first --update-parallelism 3";
    let after = json(&agent, &format!("-o json {update}"));
    assert_eq!(
        after["balancing"],
        json!({
            "scheduler": "mh", "ports": [{"protocol": "tcp", "port": 80, "target": 8080}],
            "timeouts": {"udp": 9},
        })
    );
    assert_eq!((&after["labels"], after.get("health")), (&json!({"a": "x"}), None));
    assert_eq!((&after["replicas"], &after["update_order"]), (&json!(9), &json!("start-first")));
    let last = failed(&agent, "service update shop --port-rm 80", 2);
    assert!(last.contains("--all-ports"), "{last}");
    let all = json(&agent, "-o json service update shop --all-ports");
    assert_eq!(all["balancing"].get("ports"), None);
}

#[test]
fn inspect_shows_a_service_s_policy_and_each_backend_with_its_reason() {
    let agent = Agent::start();
    done(&agent, "network create web --subnet 10.9.0.0/24");
    done(
        &agent,
        "service create shop --network web --replicas 2 --port 80:8080 --affinity 10m \
         --timeout udp=5s --health-tcp 8080",
    );
    let shown = done(&agent, "service inspect shop");
    for line in [
        "Replicas:      2, 1 ready\n",
        "Ports:         80:8080/tcp\n",
        "Scheduler:     rr\n",
        "Affinity:      10m\n",
        "Preferred:     none\n",
        "Timeouts:      udp 5s\n",
        "In effect:     web: tcp 15m, tcp-fin 2m, udp 5m\n",
        "tcp:8080, every 30s, fails after 30s, start period 0s, 3 retries\n",
        "b1 on n2, web 10.9.0.3: ready, weight 1, 3 active and 4 inactive connections from here\n",
        "b2 on n2, web 10.9.0.3: out (unhealthy: refused), weight 0\n",
        "b3 on n2, web 10.9.0.3: out (its node is dead; ready), weight 0\n",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    done(&agent, "service create names --network web --endpoint-mode dnsrr");
    let shown = done(&agent, "service inspect names");
    assert!(!shown.contains("Scheduler") && shown.contains("Health check:  none"), "{shown}");
}

#[test]
fn a_service_leads_outside_and_then_inside() {
    let agent = Agent::start();
    done(&agent, "network create web --subnet 10.9.0.0/24");
    let create = "service create db --network web --external 192.0.2.10:5432";
    let made = json(&agent, &format!("-o json {create} --external [2001:db8::10]:5432"));
    assert_eq!(made["replicas"], 0, "it has no containers yet");
    assert_eq!(
        made["external"],
        json!([{"address": "192.0.2.10", "port": 5432}, {"address": "2001:db8::10", "port": 5432}])
    );
    assert_eq!(made["balancing"]["ports"], json!([{"protocol": "tcp", "port": 5432, "target": 5432}]));
    let row = done(&agent, "service ls");
    assert!(row.lines().next().unwrap().ends_with("EXTERNAL"), "{row}");
    assert!(row.lines().nth(1).unwrap().ends_with("192.0.2.10:5432,[2001:db8::10]:5432"), "{row}");
    let shown = done(&agent, "service inspect db");
    let line = "External:      192.0.2.10:5432 from web: not checked, weight 1, 1 active and 2 inactive \
                connections from here\n";
    assert!(shown.contains(line), "{shown}");
    let update =
        "service update db --replicas 2 --external 192.0.2.11:5432 --external-rm 192.0.2.10:5432";
    let after = json(&agent, &format!("-o json {update} --external-rm [2001:db8::10]:5432"));
    assert_eq!(after["external"], json!([{"address": "192.0.2.11", "port": 5432}]));
    assert_eq!(after["replicas"], 2);
    let missing = failed(&agent, "service update db --external-rm 192.0.2.11", 2);
    assert!(missing.contains("there is 192.0.2.11:5432"), "{missing}");
    let both = "service create two --network web --external 192.0.2.10 --replicas 3";
    assert_eq!(json(&agent, &format!("-o json {both}"))["replicas"], 3);
}

#[test]
fn an_endpoint_has_a_weight_within_its_service() {
    let agent = Agent::start();
    done(&agent, "network create web --subnet 10.9.0.0/24");
    done(&agent, "service create shop --network web");
    let attach = "endpoint attach --network web --netns /n --name a --service shop --weight 5";
    done(&agent, attach);
    let row = done(&agent, "endpoint ls");
    assert!(row.lines().nth(1).unwrap().ends_with("shop      ready"), "{row}");
    let shown = done(&agent, "endpoint inspect a");
    assert!(shown.contains("Weight:    5\n") && shown.contains("State:     ready\n"), "{shown}");
}

/// A drain that waits for this many nodes and connections.
fn waits(nodes: usize, connections: u64) -> DrainView {
    let waiting = (1..=nodes).map(|number| format!("n{number}").parse().unwrap()).collect();
    DrainView { done: false, endpoints: 1, waiting, dead: Vec::new(), connections }
}

#[test]
fn a_drain_is_waited_for_until_nothing_is_left() {
    let (agent, network, endpoint) = with_endpoint();
    done(&agent, "service create shop --network web");
    assert_eq!(done(&agent, "endpoint drain a"), "a\n");
    let target = Target::Endpoint { reference: endpoint, network: Some(network) };
    assert_eq!(agent.memory.state().drained, [target]);
    for line in ["endpoint drain a --wait", "service drain shop --wait", "node drain n2 --wait"] {
        agent.memory.state().drains = [waits(2, 0), waits(0, 3)].into();
        assert_eq!(done(&agent, line).trim(), line.split(' ').nth(2).unwrap());
        assert!(agent.memory.state().drains.is_empty(), "{line}");
    }
    assert_eq!(json(&agent, "node drain n1 --wait -o json")[0]["done"], true);
}

#[test]
fn who_is_dead_is_named_when_a_drain_is_waited_for() {
    let (agent, ..) = with_endpoint();
    let dead = vec!["n7".parse().unwrap(), "n8".parse().unwrap()];
    agent.memory.state().drains = [DrainView { done: true, dead, ..waits(0, 0) }].into();
    let output = netctl(&agent, "endpoint drain a --wait");
    assert!(output.status.success() && text(&output.stdout) == "a\n", "{output:?}");
    assert_eq!(text(&output.stderr), "netctl: a: not asked: n7, n8 are dead\n");
}

#[test]
fn an_endpoint_that_is_out_is_not_ready() {
    let (agent, ..) = with_endpoint();
    agent.memory.state().out = Some("its node is drained".to_owned());
    let complaint = failed(&agent, "endpoint wait a --timeout 10ms", 6);
    assert!(complaint.contains("not ready after 10ms: it takes no connections: its node is drained"));
    let row = done(&agent, "endpoint ls");
    assert!(row.lines().nth(1).unwrap().ends_with("out (its node is drained)"), "{row}");
    let shown = done(&agent, "endpoint inspect a");
    assert!(shown.contains("State:     ready, out (its node is drained)\n"), "{shown}");
    agent.memory.state().out = None;
    assert_eq!(done(&agent, "endpoint wait a"), "a\n");
}

#[test]
fn a_drain_that_is_not_at_its_end_in_time_is_status_6_with_what_is_left() {
    let (agent, ..) = with_endpoint();
    agent.memory.state().drains = std::iter::repeat_n(waits(1, 3), 1000).collect();
    let complaint = failed(&agent, "endpoint drain a --wait --timeout 10ms", 6);
    for part in ["after 10ms", "by n1", "3 open connection(s)", "stays drained"] {
        assert!(complaint.contains(part), "{part}: {complaint}");
    }
    // Others are drained nevertheless.
    let output = netctl(&agent, "endpoint drain none a");
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(4), "a\n"));
}

#[test]
fn a_drain_that_others_end_is_not_waited_for() {
    let (agent, ..) = with_endpoint();
    done(&agent, "service create shop --network web");
    let over = DrainView { endpoints: 0, ..waits(0, 0) };
    agent.memory.state().drains = [waits(1, 0), over.clone()].into();
    let activated = failed(&agent, "node drain n2 --wait", 5);
    assert!(activated.contains("activated"), "{activated}");
    // All that was drained is detached, and its successors are not drained.
    agent.memory.state().drains = [waits(1, 0), over].into();
    assert_eq!(done(&agent, "service drain shop --wait"), "shop\n");
}

#[test]
fn what_is_detached_while_it_is_waited_for_is_drained() {
    let (agent, ..) = with_endpoint();
    agent.memory.state().drains = std::iter::repeat_n(waits(1, 1), 1000).collect();
    let mut drain = command(&agent.socket);
    let drain = drain.args(["endpoint", "drain", "a", "--wait"]).stdout(Stdio::piped()).spawn();
    let drain = drain.unwrap();
    let looked = || agent.memory.state().drains.len() < 1000;
    let start = std::time::Instant::now();
    while !looked() {
        assert!(start.elapsed() < std::time::Duration::from_secs(20), "it does not wait");
        std::thread::yield_now();
    }
    agent.memory.state().endpoints.clear();
    let output = drain.wait_with_output().unwrap();
    assert!(output.status.success() && text(&output.stdout) == "a\n", "{output:?}");
}

#[test]
fn a_terminal_shows_what_is_waited_for() {
    let (agent, ..) = with_endpoint();
    agent.memory.state().drains = [waits(1, 0), waits(0, 7)].into();
    let pty = openpty(None, None).unwrap();
    let mut drain = command(&agent.socket);
    drain.args(["endpoint", "drain", "a", "--wait"]).stdout(Stdio::null()).stderr(pty.slave);
    assert!(drain.status().unwrap().success());
    drop(drain);
    let mut shown = Vec::new();
    // Its end is an error when the last writer has gone.
    let _ = File::from(pty.master).read_to_end(&mut shown);
    let shown = text(&shown);
    let expected = "\r\x1b[Ka: not acknowledged yet by n1\r\x1b[Ka: 7 open connection(s)\r\x1b[K";
    assert_eq!(shown, expected);
}

#[test]
fn a_node_is_drained_and_activated() {
    let agent = Agent::start();
    let drained = |agent: &Agent| {
        let table = done(agent, "node ls");
        let row = table.lines().nth(2).unwrap().split_whitespace().nth(2).unwrap().to_owned();
        (row, done(agent, "node inspect n2").contains("Drained:        yes"))
    };
    assert_eq!(drained(&agent), ("no".to_owned(), false));
    assert_eq!(done(&agent, "node drain n2"), "n2\n");
    assert_eq!(drained(&agent), ("yes".to_owned(), true));
    assert_eq!(done(&agent, "node activate n2"), "n2\n");
    assert_eq!(drained(&agent), ("no".to_owned(), false));
    assert_eq!(done(&agent, "node rm n2"), "n2\n");
    assert!(failed(&agent, "node rm n1", 5).contains("is alive"));
    for line in [
        "node drain none",
        "node activate none",
        "node rm none",
        "endpoint activate none",
        "service activate none",
    ] {
        failed(&agent, line, 4);
    }
}
