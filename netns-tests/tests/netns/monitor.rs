//! What packets do, as `netctl monitor` tells it.

use std::cell::Cell;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use netctl::kernel::ebpf::Maps;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use world::Transport::Tcp;
use world::wait_for;
use world::{
    Container, Node, Process, World, ask, connects, gateway_frame, ipv4_udp, send_frame, send_frames,
    tcp_transfer,
};

use crate::cluster::{Cluster, DUAL};
use crate::engine::is_ebpf;
use crate::names::dig;
use crate::shop::{GATEWAYS, Shop, create, open, plug};

crate::tests![
    a_connection_to_a_service_is_seen_from_its_client_to_its_backend_and_back,
    each_drop_is_seen_with_its_reason,
    what_the_kernel_drops_without_a_word_is_seen,
    of_what_goes_well_no_drop_is_seen,
    who_watches_sees_new_networks_and_hinders_none_that_goes,
    who_has_seen_enough_leaves_nothing_behind_and_the_agents_end_is_told,
    a_flood_is_told_as_far_as_it_can_be,
    what_cannot_be_watched_is_refused,
];

/// Drops are seen whatever balances.
pub(crate) const DROPS: &[crate::Test] = &[
    ("each_drop_is_seen_with_its_reason", each_drop_is_seen_with_its_reason),
    ("what_the_kernel_drops_without_a_word_is_seen", what_the_kernel_drops_without_a_word_is_seen),
    ("of_what_goes_well_no_drop_is_seen", of_what_goes_well_no_drop_is_seen),
];

/// A `netctl monitor` that runs.
pub(crate) struct Watch {
    process: Process,
    log: PathBuf,
}

impl Watch {
    pub fn start(node: &Node, arguments: &str) -> Self {
        thread_local! {
            static COUNT: Cell<u32> = const { Cell::new(0) };
        }
        let number = COUNT.replace(COUNT.get() + 1);
        let log = node.dir().join(format!("monitor-{number}.log"));
        let arguments: Vec<&str> = ["monitor"].into_iter().chain(arguments.split_whitespace()).collect();
        let mut command = node.netctl_command(&arguments);
        Self { process: Process::start(&mut command, &File::create(&log).unwrap()), log }
    }

    pub fn text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// What was told so far, as JSON; the last line may not be whole yet.
    fn seen(&self) -> Vec<Value> {
        self.text().split_inclusive('\n').filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Acts until something is seen.
    #[track_caller]
    pub fn until(&self, what: &str, act: impl Fn(), is_seen: impl Fn(&Value) -> bool) -> Value {
        let mut found = None;
        wait_for(&format!("{what} is seen"), || {
            act();
            found = self.seen().into_iter().find(|sighting| is_seen(sighting));
            found.is_some()
        });
        found.unwrap()
    }
}

/// The value at a path within a sighting.
fn at<'a>(sighting: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(sighting, |value, key| &value[key])
}

/// Whether somebody wants the programs of a machine to report.
fn is_wanted(node: &Node) -> bool {
    node.space.enter(|| Maps::of_agent().unwrap().watching.get(&0).unwrap().unwrap().until > 0)
}

fn a_connection_to_a_service_is_seen_from_its_client_to_its_backend_and_back(world: &World) {
    let shop = Shop::new(world, 2, json!({}), |config| config);
    let n1 = shop.cluster.n1();
    let client = plug(n1, "a", None);
    let watch = Watch::start(n1, "--service web --sample 1 -o json");
    let others = Watch::start(n1, "--endpoint b2 --type flow --sample 1 -o json");
    for (vip, own) in shop.vips.iter().zip(&client.addresses) {
        for backend in ["b1", "b2"] {
            let connect = || drop(ask(&client.container.space, Tcp, vip, 80));
            let goes = |sighting: &Value, flags: &str| {
                at(sighting, "packet.flags") == flags && at(sighting, "packet.source.address") == own
            };
            let syn = watch.until(&format!("{own} to {backend} at {vip}"), connect, |sighting| {
                goes(sighting, "S") && at(sighting, "packet.translated.endpoint") == backend
            });
            let packet = &syn["packet"];
            let place = (&syn["type"], &syn["node"], &syn["reason"], &packet["network"]);
            assert_eq!(place, (&json!("flow"), &json!("n1"), &json!(""), &json!("shop")));
            let way = (&packet["point"], &packet["carrier"], &packet["protocol"]);
            assert_eq!(way, (&json!("from-container"), &json!("direct"), &json!("tcp")));
            assert_eq!(at(packet, "source.endpoint"), "a");
            let asked = (at(packet, "destination.address"), at(packet, "destination.service"));
            assert_eq!(asked, (&json!(vip), &json!("web")));
            assert_eq!(at(packet, "destination.port"), 80);
            // Its answer comes from the backend, and seems to come from the service.
            let answer = watch.until(&format!("the answer of {backend}"), connect, |sighting| {
                at(sighting, "packet.flags") == "SA"
                    && at(sighting, "packet.source.endpoint") == backend
                    && at(sighting, "packet.destination.address") == own
            });
            let seeming =
                (at(&answer, "packet.translated.address"), at(&answer, "packet.translated.port"));
            assert_eq!(seeming, (&json!(vip), &json!(80)));
            let point = if backend == "b1" { "from-container" } else { "from-wire" };
            assert_eq!(at(&answer, "packet.point"), point);
        }
    }
    let ends = ["source", "destination", "translated"];
    let seen = others.seen();
    assert!(!seen.is_empty());
    for sighting in seen {
        let is_there = ends.iter().any(|end| at(&sighting, &format!("packet.{end}.endpoint")) == "b2");
        assert!(is_there, "{sighting}");
    }
    // In a line for people.
    let lines = Watch::start(n1, "--network shop");
    let expected = format!(" flow from-container shop tcp a/{}:", client.addresses[0]);
    wait_for("lines", || {
        ask(&client.container.space, Tcp, &shop.vips[0], 80).unwrap();
        let text = lines.text();
        let of_client = |line: &&str| line.contains(&expected);
        let mut of_client = text.lines().filter(of_client);
        of_client.any(|line| {
            line.contains(&format!(" > web/{}:80 => b", shop.vips[0])) && line.contains(" S ")
        })
    });
}

/// A container's frame with a source that is not its own.
fn foreign(container: &Container) -> Vec<u8> {
    let from = (Ipv4Addr::new(10, 9, 0, 77), 4000);
    let packet = ipv4_udp(from, (Ipv4Addr::new(10, 9, 0, 200), 53), b"not mine");
    gateway_frame(&container.space, GATEWAYS[0].parse().unwrap(), None, &packet)
}

fn each_drop_is_seen_with_its_reason(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    let vips = open(n1, json!({}));
    let (a, b) = (n1.attach("shop", "a"), n1.attach("shop", "b"));
    let watch = Watch::start(n1, "--type drop -o json");
    let because = |reason: &'static str| move |sighting: &Value| sighting["reason"] == reason;
    let frame = foreign(&a);
    let dropped = watch.until(
        "a foreign source",
        || send_frame(&a.space, "eth0", &frame),
        because("foreign-source"),
    );
    assert_eq!((&dropped["type"], &dropped["node"]), (&json!("drop"), &json!("n1")));
    let length = 20 + 8 + b"not mine".len();
    let expected = json!({
        "network": "shop", "point": "sandbox", "carrier": null, "protocol": "udp",
        "source": {"address": "10.9.0.77", "port": 4000, "endpoint": null, "service": null},
        "destination": {"address": "10.9.0.200", "port": 53, "endpoint": null, "service": null},
        "translated": null, "length": length, "flags": "",
    });
    assert_eq!(dropped["packet"], expected);
    // On its way out: the host takes nothing.
    let host = || drop(b.space.try_sh(&format!("ping -c 1 -W 1 {}", n1.ipv4())));
    let dropped = watch.until("what is for the host", host, because("container-to-host"));
    let packet = &dropped["packet"];
    assert_eq!((&packet["point"], &packet["protocol"]), (&json!("host"), &json!("icmp")));
    assert_eq!(packet["destination"]["address"], n1.ipv4());
    assert_eq!((&packet["destination"]["port"], &packet["network"]), (&Value::Null, &json!("shop")));
    // To an address that nobody has.
    let nobody = || drop(connects(&b.space, "10.9.0.222", 80));
    let reset = watch.until("what leads nowhere", nobody, because("unreachable"));
    assert_eq!(reset["packet"]["destination"]["address"], "10.9.0.222");
    if is_ebpf() {
        what_is_refused_is_seen(&watch, &b, &vips);
    }
    let line = Watch::start(n1, "--endpoint a --type drop --count 1");
    let others = Watch::start(n1, "--endpoint b --type drop -o json");
    let from = (n1.addresses("shop", "a")[0].parse().unwrap(), 4000);
    // To another node's port of the tunnel, out of a container.
    let tunnel = ipv4_udp(from, (Ipv4Addr::new(10, 9, 0, 77), 9), b"dropped");
    let forged = gateway_frame(&b.space, GATEWAYS[0].parse().unwrap(), None, &tunnel);
    wait_for("the line", || {
        send_frame(&b.space, "eth0", &forged);
        line.text().ends_with('\n')
    });
    let text = line.text();
    let expected =
        format!("drop sandbox shop udp a/{}:4000 > 10.9.0.77:9 35 bytes: foreign-source\n", from.0);
    assert!(text.ends_with(&expected), "{text}");
    assert_eq!(others.seen(), Vec::<Value>::new());
}

fn what_the_kernel_drops_without_a_word_is_seen(world: &World) {
    let cluster = Cluster::new(world, 2);
    let [n1, n2] = [cluster.n1(), cluster.n2()];
    n1.ok(&format!("network create shop {DUAL}"));
    let (a, b, far) = (n1.attach("shop", "a"), n1.attach("shop", "b"), n2.attach("shop", "far"));
    let watch = Watch::start(n1, "--type drop -o json");
    let because = |reason: &'static str| move |sighting: &Value| sighting["reason"] == reason;
    // A header that has been changed on its way.
    let [from, to] = ["a", "b"].map(|name| n1.addresses("shop", name)[0].parse().unwrap());
    let frame = broken(&a, (from, 4000), to);
    let send = || send_frame(&a.space, "eth0", &frame);
    let dropped = watch.until("a broken header", send, because("ip-csum"));
    let packet = &dropped["packet"];
    assert_eq!((&dropped["type"], &packet["point"]), (&json!("drop"), &json!("sandbox")));
    let ends = (at(packet, "source.endpoint"), at(packet, "destination.endpoint"));
    assert_eq!((ends, &packet["network"]), ((&json!("a"), &json!("b")), &json!("shop")));
    // What another's firewall on the host has against it.
    n1.space.sh("nft add table inet other
         nft 'add chain inet other forward { type filter hook forward priority 0; policy drop; }'");
    let outside = || drop(b.space.try_sh("ping -c 1 -W 1 198.51.100.7"));
    n1.space.sh("ip route add 198.51.100.0/24 via 192.168.50.250");
    let dropped = watch.until("what a firewall drops", outside, because("netfilter-drop"));
    let packet = &dropped["packet"];
    assert_eq!((&packet["point"], &packet["network"]), (&json!("host"), &json!("shop")));
    assert_eq!(at(packet, "destination.address"), "198.51.100.7");
    // Also against the tunnel.
    n1.space.sh("nft 'add chain inet other input { type filter hook input priority 0; }'
         nft add rule inet other input udp dport 4789 drop");
    let to = &n1.addresses("shop", "b")[0];
    let ping = || drop(far.space.try_sh(&format!("ping -c 1 -W 1 {to}")));
    let dropped = watch.until("what a firewall has against the tunnel", ping, |sighting| {
        at(sighting, "packet.source.endpoint") == "far"
    });
    let packet = &dropped["packet"];
    assert_eq!((&dropped["reason"], &packet["point"]), (&json!("netfilter-drop"), &json!("host")));
    let ends = (at(packet, "destination.endpoint"), &packet["network"], &packet["protocol"]);
    assert_eq!(ends, (&json!("b"), &json!("shop"), &json!("icmp")));
    // What a rule of ours tells is told once.
    let before = watch.seen().len();
    let frame = foreign(&a);
    (0..5).for_each(|_| send_frame(&a.space, "eth0", &frame));
    let frame = broken(&a, (from, 4000), "10.9.0.201".parse().unwrap());
    watch.until(
        "the last",
        || send_frame(&a.space, "eth0", &frame),
        |sighting| at(sighting, "packet.destination.address") == "10.9.0.201",
    );
    let foreign = watch
        .seen()
        .split_off(before)
        .into_iter()
        .filter(|sighting| at(sighting, "packet.source.address") == "10.9.0.77");
    let reasons: Vec<Value> = foreign.map(|sighting| sighting["reason"].clone()).collect();
    assert_eq!(reasons, vec![json!("foreign-source"); 5]);
}

fn of_what_goes_well_no_drop_is_seen(world: &World) {
    let shop = Shop::new(world, 2, json!({}), |config| config);
    let [n1, n2] = [shop.cluster.n1(), shop.cluster.n2()];
    let [a, b] = [plug(n1, "a", None), plug(n2, "b", None)];
    // Until each node has heard of the other's container, packets to it are refused.
    assert!(a.container.space.reaches(&b.addresses[0]) && b.container.space.reaches(&a.addresses[0]));
    let watches = [n1, n2].map(|node| Watch::start(node, "--type drop -o json"));
    for _ in 0..2 {
        for (server, own) in GATEWAYS.iter().zip(&a.addresses) {
            assert!(a.container.space.ping(server) && b.container.space.ping(own));
            for way in ["+notcp", "+tcp"] {
                for name in ["b A", "b AAAA", "nobody A", "tasks.web A"] {
                    dig(&a.container.space, server, &format!("{name} {way}"));
                }
            }
        }
        for (vip, address) in shop.vips.iter().zip(&b.addresses) {
            ask(&a.container.space, Tcp, vip, 80).unwrap();
            tcp_transfer(&a.container.space, &b.container.space, address, 1 << 16).unwrap();
        }
    }
    n1.ok("endpoint detach a --network shop");
    let c = plug(n1, "c", None);
    // What the kernel drops is told in its order.
    for (watch, member) in watches.iter().zip([&c, &b]) {
        let from = (member.addresses[0].parse().unwrap(), 4000);
        let frame = broken(&member.container, from, "10.9.0.201".parse().unwrap());
        let space = &member.container.space;
        let is_last = |seen: &Value| seen["reason"] == "ip-csum";
        watch.until("a drop", || send_frame(space, "eth0", &frame), is_last);
        let others: Vec<Value> = watch.seen().into_iter().filter(|seen| !is_last(seen)).collect();
        assert!(others.is_empty(), "{others:#?}");
    }
}

/// A container's packet whose header has been changed on its way, of a protocol that the kernel carries.
fn broken(container: &Container, from: (Ipv4Addr, u16), to: Ipv4Addr) -> Vec<u8> {
    let mut packet = ipv4_udp(from, (to, 9), b"broken");
    packet[9] = 50;
    gateway_frame(&container.space, GATEWAYS[0].parse().unwrap(), None, &packet)
}

/// What nobody takes is refused by the programs; of what the kernel refuses the sender is told.
fn what_is_refused_is_seen(watch: &Watch, b: &Container, vips: &[String]) {
    for (nobody, reason) in [("10.9.0.200", "host-unreachable"), ("fd00:9::c8", "network-unreachable")] {
        let ping = || drop(b.space.try_sh(&format!("ping -c 1 -W 1 {nobody}")));
        let refused = watch.until(nobody, ping, |sighting| {
            sighting["reason"] == reason && at(sighting, "packet.destination.address") == nobody
        });
        let (who, what) = (at(&refused, "packet.source.endpoint"), at(&refused, "packet.protocol"));
        assert_eq!(who, "b");
        assert_eq!(what, if nobody.contains(':') { "icmpv6" } else { "icmp" });
    }
    for vip in vips {
        let connect = || drop(ask(&b.space, Tcp, vip, 80));
        let refused = watch.until(vip, connect, |sighting| {
            sighting["reason"] == "no-backend" && at(sighting, "packet.destination.address") == vip
        });
        let who = (at(&refused, "packet.source.endpoint"), at(&refused, "packet.destination.service"));
        assert_eq!(who, (&json!("b"), &json!("web")));
    }
}

fn who_watches_sees_new_networks_and_hinders_none_that_goes(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    let watch = Watch::start(n1, "--type drop -o json");
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    let frame = foreign(&a);
    watch.until(
        "a drop",
        || send_frame(&a.space, "eth0", &frame),
        |sighting| at(sighting, "packet.network") == "shop",
    );
    let path = n1.sandbox_path("shop");
    n1.ok("endpoint detach a --network shop");
    n1.ok("network rm shop");
    wait_for("the sandbox is gone", || !n1.space.try_sh(&format!("test -e {path}")).success());
    // One with the same number has another sandbox, whose VXLAN device nothing is in the way of.
    n1.ok(&format!("network create shop --vni 4097 {DUAL}"));
    let c = n1.attach("shop", "c");
    let frame = foreign(&c);
    let count = || watch.seen().len();
    let seen = count();
    wait_for("its drops are seen", || {
        send_frame(&c.space, "eth0", &frame);
        count() > seen
    });
}

fn who_has_seen_enough_leaves_nothing_behind_and_the_agents_end_is_told(world: &World) {
    let mut cluster = Cluster::new(world, 1);
    let n1 = cluster.nodes[0].clone();
    let (a, _b) = {
        n1.ok(&format!("network create shop {DUAL}"));
        (n1.attach("shop", "a"), n1.attach("shop", "b"))
    };
    let to = n1.addresses("shop", "b").remove(0);
    assert!(!is_wanted(&n1));
    let mut watch = Watch::start(&n1, "--count 3 --sample 1");
    wait_for("three are seen", || {
        a.space.ping(&to);
        watch.process.status().is_some()
    });
    assert_eq!(watch.process.status().unwrap().code(), Some(0));
    assert_eq!(watch.text().lines().count(), 3, "{}", watch.text());
    wait_for("nobody watches", || !is_wanted(&n1));
    // One that is killed is noticed, too.
    let mut watch = Watch::start(&n1, "");
    wait_for("somebody watches", || is_wanted(&n1));
    watch.process.stop(Signal::SIGKILL);
    wait_for("nobody watches", || !is_wanted(&n1));
    // A reader that has gone ends it.
    let script = format!(
        "{} --socket {} monitor --sample 1 | head -n 1",
        world::binary("netctl").display(),
        n1.socket().display()
    );
    let log = n1.dir().join("head.log");
    let mut piped =
        Process::start(n1.space.command("sh").args(["-c", &script]), &File::create(&log).unwrap());
    wait_for("the pipe has ended", || {
        a.space.ping(&to);
        piped.status().is_some()
    });
    assert_eq!(std::fs::read_to_string(log).unwrap().lines().count(), 1);
    let mut watch = Watch::start(&n1, "--sample 1 -o json");
    watch.until("a ping", || assert!(a.space.ping(&to)), |_| true);
    cluster.terminate(0);
    wait_for("it has ended", || watch.process.status().is_some());
    assert_eq!(watch.process.status().unwrap().code(), Some(3), "{}", watch.text());
    assert!(watch.text().contains("the agent has ended"), "{}", watch.text());
    assert!(!is_wanted(&n1));
    // The next one has the programs report to whoever asks that.
    cluster.start(0);
    let watch = Watch::start(&n1, "--sample 1 -o json");
    watch.until(
        "a ping",
        || assert!(a.space.ping(&to)),
        |sighting| at(sighting, "packet.protocol") == "icmp",
    );
}

fn a_flood_is_told_as_far_as_it_can_be(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach("shop", "a");
    // Somebody who watches and never reads.
    let mut silent = request(n1, "/v1/monitor?sample=1");
    assert_eq!(status(&mut silent), 200);
    let watch = Watch::start(n1, "--type drop -o json");
    let frame = foreign(&a);
    watch.until("the first", || send_frame(&a.space, "eth0", &frame), |_| true);
    send_frames(&a.space, "eth0", std::iter::repeat_n(&frame, 50_000));
    n1.ok("node ls");
    // What comes afterwards is seen.
    let from = (Ipv4Addr::new(10, 9, 0, 78), 4000);
    let packet = ipv4_udp(from, (Ipv4Addr::new(10, 9, 0, 200), 53), b"at last");
    let last = gateway_frame(&a.space, GATEWAYS[0].parse().unwrap(), None, &packet);
    watch.until(
        "the last",
        || send_frame(&a.space, "eth0", &last),
        |sighting| at(sighting, "packet.source.address") == "10.9.0.78",
    );
    let seen = watch.seen();
    let lost = seen.iter().any(|sighting| sighting["lost"].as_u64().unwrap() > 0);
    assert!(lost || seen.len() > 50_000, "{} are seen, and nothing is said of others", seen.len());
}

/// Asks an agent for something that has no end.
fn request(node: &Node, path: &str) -> UnixStream {
    let mut stream = UnixStream::connect(node.socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: netctl\r\n\r\n").unwrap();
    stream
}

/// The status of its answer.
fn status(stream: &mut UnixStream) -> u16 {
    let mut line = [0; 12];
    stream.read_exact(&mut line).unwrap();
    str::from_utf8(&line[9..]).unwrap().parse().unwrap()
}

fn what_cannot_be_watched_is_refused(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    open(n1, json!({}));
    create(n1, "other", json!({}));
    for (arguments, code, part) in [
        ("--network none", 4, "none"),
        ("--endpoint none", 4, "none"),
        ("--network shop --service none", 4, "none"),
        ("--sample 0", 2, "0 is not in 1.."),
        ("--count 0", 2, "0 is not in 1.."),
        ("--type lost", 2, "flow, drop"),
        ("--network", 2, "--network"),
    ] {
        let refused = n1.ctl(&format!("monitor {arguments}"));
        assert_eq!(refused.code, Some(code), "{arguments}: {refused}");
        assert!(refused.stderr.contains(part), "{arguments}: {refused}");
    }
    let answer = |path: &str| n1.client().call("GET", path, None).unwrap();
    for path in
        ["/v1/monitor?sample=0", "/v1/monitor?sample=-1", "/v1/monitor?type=all", "/v1/monitor?net=a"]
    {
        let refused = answer(path);
        assert_eq!((refused.status, &refused.body["code"]), (400, &json!("invalid")), "{path}");
    }
    let mut watchers: Vec<UnixStream> = (0..32).map(|_| request(n1, "/v1/monitor")).collect();
    assert!(watchers.iter_mut().all(|watcher| status(watcher) == 200));
    let refused = answer("/v1/monitor");
    assert_eq!((refused.status, &refused.body["code"]), (409, &json!("conflict")));
    watchers.pop();
    wait_for("there is room again", || status(&mut request(n1, "/v1/monitor")) == 200);
}
