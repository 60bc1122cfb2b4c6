//! Endpoints take connections when their service's checks succeed, and no longer when they fail.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::{Value, json};
use world::{Container, Node, Space, World, wait_for};

use crate::cluster::{Cluster, DUAL};
use crate::metrics::socket;

crate::tests![
    an_endpoint_is_ready_once_it_listens_and_unhealthy_when_it_does_no_longer,
    an_answer_of_200_to_399_is_well,
    a_server_that_says_nothing_has_failed_when_the_time_is_over,
    a_command_runs_in_the_endpoints_network_and_its_output_is_the_reason,
    nothing_of_a_command_is_left_however_it_ends,
    the_rest_of_an_answer_is_not_waited_for,
    only_so_many_commands_run_at_once,
    commands_of_one_service_that_hang_leave_places_for_others,
    an_endpoint_without_a_check_is_ready_once_it_is_plugged_in_and_not_before,
    an_agent_that_starts_again_takes_endpoints_up_as_they_are,
    another_check_counts_at_once_and_without_one_an_endpoint_is_ready,
    an_endpoint_that_is_drained_stays_so,
    what_was_found_out_without_the_store_is_written_later,
];

/// A server in a container, with the status that it answers, for as long as it lives.
struct Server {
    stop: Arc<AtomicBool>,
    status: Arc<AtomicU16>,
    seen: Arc<Mutex<Vec<(IpAddr, String)>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Listens on port 80 of all addresses.
    fn start(space: &Space, status: u16) -> Self {
        // A process that is just being started holds what its parent has closed a moment longer.
        let mut listener = None;
        wait_for("the port is free", || {
            listener = space.enter(|| TcpListener::bind("[::]:80")).ok();
            listener.is_some()
        });
        let listener = listener.expect("it is bound");
        // So that the end is seen without anybody who connects.
        setsockopt(&listener, ReceiveTimeout, &TimeVal::milliseconds(50))
            .expect("accept has a time-out");
        let (stop, seen) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<_>>>::default());
        let status = Arc::new(AtomicU16::new(status));
        let (end, answer, heads) = (stop.clone(), status.clone(), seen.clone());
        let serve = move || {
            while !end.load(Ordering::Relaxed) {
                let Ok((mut stream, peer)) = listener.accept() else { continue };
                stream.set_read_timeout(Some(Duration::from_secs(2))).expect("reading has a time-out");
                let mut buffer = [0; 2048];
                let length = stream.read(&mut buffer).unwrap_or(0);
                let head = String::from_utf8_lossy(&buffer[..length]).into_owned();
                heads.lock().unwrap().push((peer.ip().to_canonical(), head));
                let status = answer.load(Ordering::Relaxed);
                // Who only connected is gone by now.
                let _ = write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: 3\r\n\r\nhi\n");
            }
        };
        Self { stop, status, seen, thread: Some(std::thread::spawn(serve)) }
    }

    fn answer(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }

    /// Who connected, and what they sent.
    fn seen(&self) -> Vec<(IpAddr, String)> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// Makes a service of the network `shop` that is reached by its containers' addresses.
#[track_caller]
fn service(node: &Node, name: &str, health: Value) {
    let mut spec = json!({
        "name": name, "networks": ["shop"], "replicas": 3, "endpoint_mode": "dnsrr",
    });
    if !health.is_null() {
        spec["health"] = health;
    }
    let made = node.client().call("POST", "/v1/services", Some(&spec)).unwrap();
    assert_eq!(made.status, 201, "{made:?}");
}

fn tcp(interval: u32, start_period: u32) -> Value {
    json!({
        "test": {"type": "tcp", "port": 80},
        "interval": interval, "timeout": 1, "start_period": start_period, "retries": 2,
    })
}

/// A check over HTTP that fails at the first failure.
fn http_once() -> Value {
    let test = json!({"type": "http", "port": 80, "path": "/"});
    json!({"test": test, "interval": 1, "timeout": 1, "retries": 1})
}

fn command(script: &str, timeout: u32) -> Value {
    json!({
        "test": {"type": "command", "command": ["sh", "-c", script]},
        "interval": 1, "timeout": timeout, "retries": 1,
    })
}

/// Plugs a container in that was made before, under its own name.
#[track_caller]
fn plug_in(node: &Node, container: &Container, service: &str) {
    let (name, path) = (&container.name, &container.path);
    node.ok(&format!("endpoint attach --network shop --name {name} --netns {path} --service {service}"));
}

/// An endpoint's record.
#[track_caller]
fn inspect(node: &Node, name: &str) -> Value {
    node.ok(&format!("-o json endpoint inspect --network shop {name}")).json()[0].clone()
}

/// An endpoint's state, and why it is so.
#[track_caller]
fn state(node: &Node, name: &str) -> (String, String) {
    let view = inspect(node, name);
    let text = |key: &str, none: &str| view[key].as_str().unwrap_or(none).to_owned();
    (text("state", "ready"), text("reason", ""))
}

/// Waits until an endpoint has a state; gives the reason.
#[track_caller]
fn becomes(node: &Node, name: &str, expected: &str) -> String {
    let mut seen = state(node, name);
    wait_for(&format!("{name} is {expected}"), || {
        seen = state(node, name);
        seen.0 == expected
    });
    seen.1
}

/// Waits until so many more checks were made on a node, of which so many failed.
#[track_caller]
fn checks(node: &Node, more: f64, failures: f64) {
    let count = || {
        let metrics = socket(node);
        ["netctl_health_checks_total", "netctl_health_check_failures_total"].map(|name| metrics[name])
    };
    let [before, failed] = count();
    wait_for("checks were made", || {
        let [now, failing] = count();
        now >= before + more && failing >= failed + failures
    });
}

/// The key of an endpoint's record.
#[track_caller]
fn key(node: &Node, name: &str) -> String {
    let (network, id) = (node.network_id("shop"), inspect(node, name)["id"].clone());
    format!("netctl/members/{network}/endpoints/{}", id.as_str().unwrap())
}

/// Changes a record of the store as an agent of another node would.
#[track_caller]
fn rewrite(cluster: &Cluster, key: &str, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_str(&cluster.etcd.keys()[key]).unwrap();
    change(&mut value);
    cluster.etcd.put(key, &value.to_string());
}

fn shop(world: &World) -> Cluster {
    let cluster = Cluster::new(world, 1);
    cluster.n1().ok(&format!("network create shop {DUAL}"));
    cluster
}

fn an_endpoint_is_ready_once_it_listens_and_unhealthy_when_it_does_no_longer(world: &World) {
    let cluster = shop(world);
    let n1 = cluster.n1();
    service(n1, "web", tcp(1, 600));
    service(n1, "slow", tcp(3600, 0));
    service(n1, "plain", Value::Null);
    let web = n1.attach_with("shop", "w", "--service web");
    let slow = n1.attach_with("shop", "s", "--service slow");
    n1.attach_with("shop", "p", "--service plain");
    n1.attach("shop", "alone");
    for name in ["p", "alone"] {
        assert_eq!(state(n1, name).0, "ready", "nothing checks {name}");
    }
    checks(n1, 6.0, 6.0);
    for name in ["w", "s"] {
        assert_eq!(state(n1, name), ("pending".to_owned(), String::new()), "{name}");
    }
    let (server, _slow) = (Server::start(&web.space, 200), Server::start(&slow.space, 200));
    assert_eq!(becomes(n1, "w", "ready"), "");
    // An interval of an hour is no reason to wait for one.
    becomes(n1, "s", "ready");
    let gateway: IpAddr = "10.9.0.1".parse().unwrap();
    assert!(server.seen().iter().all(|(peer, _)| *peer == gateway), "{:?}", server.seen());
    drop(server);
    let reason = becomes(n1, "w", "unhealthy");
    let address = n1.addresses("shop", "w").into_iter().find(|address| address.contains('.'));
    assert!(reason.contains(&format!("{}:80", address.unwrap())), "{reason}");
    assert!(reason.contains("refused"), "{reason}");
    let _server = Server::start(&web.space, 200);
    assert_eq!(becomes(n1, "w", "ready"), "");
    // Each change was written, and nothing else: pending, ready, unhealthy, ready.
    assert_eq!(cluster.etcd.writes(&key(n1, "w")), 4);
    assert_eq!(cluster.etcd.writes(&key(n1, "s")), 2);
}

fn an_answer_of_200_to_399_is_well(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok("network create shop --subnet fd00:9::/64");
    let test = json!({"type": "http", "port": 80, "path": "/health?deep=1"});
    service(n1, "web", json!({"test": test, "interval": 1, "timeout": 2, "retries": 1}));
    let web = n1.container("w");
    let server = Server::start(&web.space, 500);
    plug_in(n1, &web, "web");
    let reason = becomes(n1, "w", "unhealthy");
    let address = n1.addresses("shop", "w").remove(0);
    for word in [&format!("http://[{address}]:80/health?deep=1"), "500"] {
        assert!(reason.contains(word), "{word}: {reason}");
    }
    for (status, expected) in
        [(200, "ready"), (400, "unhealthy"), (302, "ready"), (404, "unhealthy"), (204, "ready")]
    {
        server.answer(status);
        becomes(n1, "w", expected);
    }
    let (peer, head) = server.seen().remove(0);
    assert_eq!(peer.to_string(), "fd00:9::1");
    assert!(head.starts_with("GET /health?deep=1 HTTP/1.1\r\n"), "{head}");
    assert!(head.to_lowercase().contains(&format!("host: [{address}]:80\r\n")), "{head}");
}

fn a_server_that_says_nothing_has_failed_when_the_time_is_over(world: &World) {
    let cluster = shop(world);
    let n1 = cluster.n1();
    service(n1, "web", http_once());
    let web = n1.container("w");
    // The kernel takes the connection; nobody reads from it.
    let listener = web.space.enter(|| TcpListener::bind("0.0.0.0:80")).unwrap();
    plug_in(n1, &web, "web");
    assert_eq!(becomes(n1, "w", "unhealthy"), "no result within 1s");
    drop(listener);
    let _server = Server::start(&web.space, 200);
    becomes(n1, "w", "ready");
}

fn a_command_runs_in_the_endpoints_network_and_its_output_is_the_reason(world: &World) {
    let cluster = shop(world);
    let n1 = cluster.n1();
    let (seen, well) = (n1.dir().join("seen"), n1.dir().join("well"));
    nobodys(&seen);
    let script = format!(
        "{{ env; id; ip -o -4 address show dev eth0; grep NoNewPrivs /proc/self/status; }} > {}; test -e {} || {{ echo first; echo not well >&2; exit 3; }}",
        seen.display(),
        well.display(),
    );
    service(n1, "web", command(&script, 15));
    service(
        n1,
        "none",
        json!({
            "test": {"type": "command", "command": ["no-such-program"]}, "interval": 1, "retries": 1,
        }),
    );
    n1.attach_with("shop", "w", "--service web");
    n1.attach_with("shop", "n", "--service none");
    assert_eq!(becomes(n1, "w", "unhealthy"), "exit status: 3: first not well");
    let reason = becomes(n1, "n", "unhealthy");
    assert!(reason.contains("cannot run no-such-program: No such file"), "{reason}");
    std::fs::write(&well, "").unwrap();
    assert_eq!(becomes(n1, "w", "ready"), "");
    let seen = std::fs::read_to_string(&seen).unwrap();
    let addresses = n1.addresses("shop", "w");
    let ipv4 = addresses.iter().find(|address| address.contains('.')).unwrap();
    assert!(seen.contains(&format!("inet {ipv4}/24")), "{seen}");
    for line in [
        "uid=65534(nobody) gid=65534(nogroup) groups=65534(nogroup)".to_owned(),
        "NoNewPrivs:\t1".to_owned(),
        "NETCTL_ENDPOINT=w".to_owned(),
        "NETCTL_SERVICE=web".to_owned(),
        format!("NETCTL_ADDRESS={}", addresses.join(",")),
    ] {
        assert!(seen.lines().any(|found| found == line), "{line}: {seen}");
    }
    // What the agent itself was started with is nobody's business.
    assert!(!seen.contains("NOTIFY_SOCKET"), "{seen}");
}

/// Makes an empty file in which the user of health checks can write.
fn nobodys(path: &std::path::Path) {
    std::fs::write(path, "").unwrap();
    std::os::unix::fs::chown(path, Some(65534), None).unwrap();
}

/// Whether the process with this number is a `sleep`.
fn sleeps(pid: &str) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    name.trim() == "sleep" && !status.contains(") Z ")
}

fn nothing_of_a_command_is_left_however_it_ends(world: &World) {
    let mut cluster = shop(world);
    let n1 = cluster.nodes[0].clone();
    let files = ["hang", "well", "long"].map(|name| (name, n1.dir().join(name)));
    files.iter().for_each(|(_, file)| nobodys(file));
    for (name, file) in &files {
        let child = format!("sleep 1000 & echo $! >> {}", file.display());
        let check = match *name {
            "hang" => command(&format!("{child}; wait"), 1),
            "well" => command(&format!("{child}; exit 0"), 15),
            _ => {
                let words = ["sh", "-c", &format!("echo $$ >> {}; exec sleep 1000", file.display())];
                let test = json!({"type": "command", "command": words});
                json!({"test": test, "interval": 1, "timeout": 3600, "retries": 1})
            }
        };
        service(&n1, name, check);
        n1.attach_with("shop", name, &format!("--service {name}"));
    }
    let pids = |index: usize| -> Vec<String> {
        let text = std::fs::read_to_string(&files[index].1).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    };
    assert_eq!(becomes(&n1, "hang", "unhealthy"), "no result within 1s");
    becomes(&n1, "well", "ready");
    for index in [0, 1] {
        wait_for("there were several checks", || pids(index).len() > 2);
        let first = pids(index).remove(0);
        wait_for("the child of the first is gone", || !sleeps(&first));
    }
    // Of the one that goes on and on there is one only, and it goes with its agent.
    let last = |count: usize| {
        wait_for("it was started", || pids(2).len() == count && sleeps(&pids(2)[count - 1]));
        pids(2).remove(count - 1)
    };
    let first = last(1);
    cluster.kill(0);
    wait_for("it is gone with the agent that was killed", || !sleeps(&first));
    cluster.start(0);
    let second = last(2);
    cluster.terminate(0);
    wait_for("it is gone with the agent that was stopped", || !sleeps(&second));
    cluster.start(0);
    let third = last(3);
    n1.ok("endpoint detach --network shop long");
    wait_for("it is gone with the endpoint", || !sleeps(&third));
}

fn only_so_many_commands_run_at_once(world: &World) {
    const ENDPOINTS: usize = 48;
    const SERVICES: usize = 6;
    let cluster = shop(world);
    let n1 = cluster.n1();
    let log = n1.dir().join("log");
    nobodys(&log);
    let shown = log.display();
    // Pending for ever, so each is begun again as soon as there is a place.
    let mut check = command(&format!("echo + >> {shown}; sleep 2; echo - >> {shown}; exit 1"), 60);
    check["start_period"] = json!(3600);
    for index in 0..SERVICES {
        service(n1, &format!("web{index}"), check.clone());
    }
    for index in 0..ENDPOINTS {
        n1.attach_with("shop", &format!("c{index}"), &format!("--service web{}", index % SERVICES));
    }
    let lines = || std::fs::read_to_string(&log).unwrap_or_default();
    let begun = lines().matches('+').count();
    wait_for("each had its turn", || lines().matches('+').count() >= begun + 2 * ENDPOINTS);
    let (mut running, mut most) = (0, 0);
    for line in lines().lines() {
        running += if line == "+" { 1 } else { -1 };
        most = most.max(running);
    }
    assert!((17..=32).contains(&most), "{most} at once");
}

fn commands_of_one_service_that_hang_leave_places_for_others(world: &World) {
    let cluster = shop(world);
    let n1 = cluster.n1();
    let log = n1.dir().join("log");
    nobodys(&log);
    service(n1, "stuck", command(&format!("echo + >> {}; sleep 3600", log.display()), 3600));
    let begun = || std::fs::read_to_string(&log).unwrap_or_default().matches('+').count();
    for index in 0..40 {
        n1.attach_with("shop", &format!("s{index}"), "--service stuck");
    }
    wait_for("its places are taken", || begun() >= 8);
    service(n1, "web", command("true", 60));
    n1.attach_with("shop", "w", "--service web");
    becomes(n1, "w", "ready");
    assert_eq!(begun(), 8);
}

fn the_rest_of_an_answer_is_not_waited_for(world: &World) {
    let cluster = shop(world);
    let n1 = cluster.n1();
    service(n1, "web", http_once());
    let web = n1.container("w");
    let listener = web.space.enter(|| TcpListener::bind("0.0.0.0:80")).unwrap();
    setsockopt(&listener, ReceiveTimeout, &TimeVal::seconds(20)).unwrap();
    plug_in(n1, &web, "web");
    // Only the first check gets an answer, and that has no end.
    let (mut stream, _) = listener.accept().unwrap();
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n").unwrap();
    becomes(n1, "w", "ready");
}

fn an_endpoint_without_a_check_is_ready_once_it_is_plugged_in_and_not_before(world: &World) {
    let mut cluster = shop(world);
    let n1 = cluster.nodes[0].clone();
    service(&n1, "plain", Value::Null);
    // Somebody else has what the network needs.
    let vni = n1.ok("-o json network inspect shop").json()[0]["vni"].clone();
    let vxlan = format!("type vxlan id {vni} local {} dstport 4789", n1.ipv4());
    n1.space.sh(&format!("ip link add other {vxlan}"));
    let path = n1.container("w").path;
    let attach =
        format!("endpoint attach --network shop --name w --netns {path} --service plain --wait 30s");
    let failures = || socket(&n1)["netctl_reconcile_failures_total"];
    std::thread::scope(|scope| {
        let attaching = scope.spawn(|| n1.ctl(&attach));
        wait_for("it is written", || n1.ctl("endpoint inspect --network shop w").success());
        let before = failures();
        wait_for("it was tried again", || failures() >= before + 5.0);
        assert_eq!(state(&n1, "w").0, "pending");
        n1.space.sh("ip link del other");
        let attached = attaching.join().unwrap();
        assert!(attached.success(), "{attached}");
    });
    assert_eq!(state(&n1, "w").0, "ready");
    let key = key(&n1, "w");
    assert_eq!(cluster.etcd.writes(&key), 2);
    // An agent that is killed between the two leaves it so.
    cluster.kill(0);
    rewrite(&cluster, &key, |endpoint| endpoint["state"] = json!("pending"));
    cluster.start(0);
    becomes(&n1, "w", "ready");
}

fn an_agent_that_starts_again_takes_endpoints_up_as_they_are(world: &World) {
    let mut cluster = shop(world);
    let n1 = cluster.nodes[0].clone();
    service(&n1, "web", tcp(1, 0));
    let (a, b) =
        (n1.attach_with("shop", "a", "--service web"), n1.attach_with("shop", "b", "--service web"));
    let server = Server::start(&a.space, 200);
    becomes(&n1, "a", "ready");
    becomes(&n1, "b", "unhealthy");
    let keys = [key(&n1, "a"), key(&n1, "b")];
    let writes = |cluster: &Cluster| keys.each_ref().map(|key| cluster.etcd.writes(key));
    let before = writes(&cluster);
    cluster.kill(0);
    cluster.start(0);
    checks(&n1, 8.0, 4.0);
    assert_eq!(writes(&cluster), before, "{} {}", state(&n1, "a").0, state(&n1, "b").0);
    // What happened while it was away is seen.
    cluster.kill(0);
    drop(server);
    let _server = Server::start(&b.space, 200);
    cluster.start(0);
    becomes(&n1, "a", "unhealthy");
    becomes(&n1, "b", "ready");
    assert_eq!(writes(&cluster), before.map(|count| count + 1));
}

fn another_check_counts_at_once_and_without_one_an_endpoint_is_ready(world: &World) {
    let cluster = shop(world);
    let n1 = cluster.n1();
    let record = "netctl/base/services/web";
    service(n1, "web", tcp(3600, 0));
    let web = n1.attach_with("shop", "w", "--service web");
    let server = Server::start(&web.space, 200);
    becomes(n1, "w", "ready");
    rewrite(&cluster, record, |service| {
        service["health"] = tcp(1, 0);
        service["health"]["test"]["port"] = json!(81);
    });
    let reason = becomes(n1, "w", "unhealthy");
    assert!(reason.contains(":81"), "{reason}");
    // Without a check it is as well as it can be.
    rewrite(&cluster, record, |service| drop(service.as_object_mut().unwrap().remove("health")));
    assert_eq!(becomes(n1, "w", "ready"), "");
    drop(server);
    rewrite(&cluster, record, |service| service["health"] = tcp(1, 0));
    becomes(n1, "w", "unhealthy");
    n1.ok("service rm web");
    assert_eq!(becomes(n1, "w", "ready"), "");
}

fn an_endpoint_that_is_drained_stays_so(world: &World) {
    let cluster = shop(world);
    let n1 = cluster.n1();
    service(n1, "web", tcp(1, 0));
    let (a, b) =
        (n1.attach_with("shop", "a", "--service web"), n1.attach_with("shop", "b", "--service web"));
    let servers = [Server::start(&a.space, 200), Server::start(&b.space, 200)];
    becomes(n1, "a", "ready");
    becomes(n1, "b", "ready");
    let key = key(n1, "a");
    rewrite(&cluster, &key, |endpoint| endpoint["state"] = json!("draining"));
    let writes = cluster.etcd.writes(&key);
    drop(servers);
    becomes(n1, "b", "unhealthy");
    let _servers = [Server::start(&a.space, 200), Server::start(&b.space, 200)];
    becomes(n1, "b", "ready");
    assert_eq!(state(n1, "a").0, "draining");
    assert_eq!(cluster.etcd.writes(&key), writes);
    // Back among the others, it is checked like them.
    rewrite(&cluster, &key, |endpoint| endpoint["state"] = json!("pending"));
    becomes(n1, "a", "ready");
}

fn what_was_found_out_without_the_store_is_written_later(world: &World) {
    let mut cluster = shop(world);
    let n1 = cluster.nodes[0].clone();
    service(&n1, "web", tcp(1, 0));
    let web = n1.attach_with("shop", "w", "--service web");
    let server = Server::start(&web.space, 200);
    becomes(&n1, "w", "ready");
    let key = key(&n1, "w");
    let writes = cluster.etcd.writes(&key);
    // What is over when the store is back is not told any more.
    cluster.etcd.stop();
    drop(server);
    checks(&n1, 3.0, 3.0);
    let server = Server::start(&web.space, 200);
    checks(&n1, 2.0, 0.0);
    cluster.etcd.start();
    let connected = |node: &Node| socket(node)["netctl_store_connected"] == 1.0;
    wait_for("the store is followed again", || connected(&n1));
    checks(&n1, 3.0, 0.0);
    assert_eq!((state(&n1, "w").0.as_str(), cluster.etcd.writes(&key)), ("ready", writes));
    // What lasts is.
    cluster.etcd.stop();
    drop(server);
    checks(&n1, 3.0, 3.0);
    cluster.etcd.start();
    wait_for("the store is followed again", || connected(&n1));
    assert!(becomes(&n1, "w", "unhealthy").contains("refused"));
    assert_eq!(cluster.etcd.writes(&key), writes + 1);
}
