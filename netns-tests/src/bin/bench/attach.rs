//! What a container waits for: plugging it in, and out.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use world::{Config, Container, Node};

use crate::cni::{self, Cni};
use crate::report::{Better, Metric, Report, percentile};
use crate::{Ground, plain, progress};

pub const HELP: &str = "\
plugging a container in and out, as processes, beside the reference CNI plugins

`netctl endpoint attach` and `netctl endpoint detach` against a running agent, beside ADD and DEL
of the CNI plugins bridge and host-local (a gateway, no masquerading), run as a runtime does. The
time is from the start of each process to its end; an attach is durable in the store and its
interface works when it ends. Both take turns, attach by attach. The stores are on the disk of the
target directory: first the embedded one, then an etcd of one member.

  add_del    ADD plus DEL: median (p50) and 99th percentile (p99)
  add, del   each alone, embedded store, median";

/// One side's times, in milliseconds.
#[derive(Default)]
struct Times {
    add: Vec<f64>,
    del: Vec<f64>,
}

impl Times {
    fn keep(&mut self, add: Duration, del: Duration) {
        self.add.push(add.as_secs_f64() * 1e3);
        self.del.push(del.as_secs_f64() * 1e3);
    }

    fn both(&self) -> impl Iterator<Item = f64> {
        self.add.iter().zip(&self.del).map(|(add, del)| add + del)
    }
}

pub fn run(ground: &Ground) -> Report {
    let mut report = Report::default();
    let plugins = ground.world.node("cni");
    let container = plugins.container("box");
    let cni = Cni::new(plugins);
    let etcd = ground.world.etcd();
    let stores = [("", "embedded", Config::embedded()), ("etcd_", "etcd", Config::etcd(&etcd))];
    for (prefix, store, config) in stores {
        let node = ground.world.node(store);
        let _agent = node.agent(&plain(config));
        node.ok("network create bench --subnet 10.9.0.0/16");
        let (ours, theirs) = measure(ground, store, &node, &cni, &container);
        let mut add = |name: &str, what: &str, ours: f64, theirs: f64| {
            let (name, what) = (format!("{prefix}{name}"), format!("{what}, {store} store, ms"));
            let metric = Metric::versus(name, what, Better::Lower, ours, (cni::NAME, theirs));
            report.metrics.push(metric);
        };
        let at = |times: &Times, percent| percentile(times.both(), percent);
        add("add_del_p50_ms", "ADD + DEL, median", at(&ours, 50), at(&theirs, 50));
        add("add_del_p99_ms", "ADD + DEL, p99", at(&ours, 99), at(&theirs, 99));
        let median = |values: &[f64]| percentile(values.iter().copied(), 50);
        add("add_p50_ms", "ADD, median", median(&ours.add), median(&theirs.add));
        add("del_p50_ms", "DEL, median", median(&ours.del), median(&theirs.del));
    }
    report
}

fn measure(
    ground: &Ground,
    store: &str,
    node: &Arc<Node>,
    cni: &Cni,
    theirs: &Container,
) -> (Times, Times) {
    let mine = node.container("box");
    let (rounds, warm_up) = ground.pick((200, 10), (60, 5));
    let mut times = (Times::default(), Times::default());
    for round in 0..warm_up + rounds {
        if round % 50 == 0 {
            progress(&format!("{store} store: {round} of {} attached and detached", warm_up + rounds));
        }
        let name = format!("box{round}");
        let add =
            netctl(node, &["attach", "--network", "bench", "--name", &name, "--netns", &mine.path]);
        let del = netctl(node, &["detach", "--network", "bench", &name]);
        let their_add = cni.run("ADD", &name, theirs);
        let their_del = cni.run("DEL", &name, theirs);
        if round >= warm_up {
            times.0.keep(add, del);
            times.1.keep(their_add, their_del);
        }
    }
    times
}

/// Runs `netctl endpoint …` and returns its time.
fn netctl(node: &Node, arguments: &[&str]) -> Duration {
    let mut command = std::process::Command::new(world::binary("netctl"));
    command.arg("--socket").arg(node.socket()).arg("endpoint").args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let (output, time) = node.space.enter(|| {
        let start = Instant::now();
        let output = command.output().expect("netctl starts");
        (output, start.elapsed())
    });
    assert!(output.status.success(), "netctl endpoint {arguments:?}: {output:?}");
    time
}
