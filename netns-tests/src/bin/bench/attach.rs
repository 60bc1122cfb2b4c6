//! What a container waits for: plugging it in, and out.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use netctl::api::AttachRequest;
use netctl::api::client::Client;
use tokio::runtime::Runtime;
use world::{Config, Container, Node};

use crate::cni::{self, Cni};
use crate::crowd::request;
use crate::report::{Better, Metric, Report, percentile};
use crate::{Ground, plain, progress};

pub const HELP: &str = "\
plugging a container in and out, beside the reference CNI plugins

Through a running agent in two ways: by calls of its API, as the daemon of a container engine makes
them, and by `netctl endpoint attach` and `netctl endpoint detach`; beside ADD and DEL of the CNI
plugins bridge and host-local (a gateway, no masquerading), run as a runtime does. The time is from
the call to its answer, or from the start of each process to its end; an attach is durable in the
store and its interface works when it ends. All take turns, attach by attach. The stores are on the
disk of the target directory: first the embedded one, then an etcd of one member.

  api_add_del       ADD plus DEL by calls: median (p50) and 99th percentile (p99)
  add_del           the same by processes
  api_add, api_del, each alone, median
  add, del";

/// One way's times, in milliseconds.
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
        node.ok(&format!("network create {NETWORK} --subnet 10.9.0.0/16"));
        let all = measure(ground, store, &node, &cni, &container);
        let mut add = |name: &str, what: &str, ours: f64, theirs: f64| {
            let (name, what) = (format!("{prefix}{name}"), format!("{what}, {store} store, ms"));
            let metric = Metric::versus(name, what, Better::Lower, ours, (cni::NAME, theirs));
            report.metrics.push(metric);
        };
        for (prefix, how, ours) in [("api_", "calls", &all.calls), ("", "processes", &all.processes)] {
            for percent in [50, 99] {
                let at = |times: &Times| percentile(times.both(), percent);
                let what = format!("ADD + DEL by {how}, p{percent}");
                add(&format!("{prefix}add_del_p{percent}_ms"), &what, at(ours), at(&all.cni));
            }
            let median = |values: &[f64]| percentile(values.iter().copied(), 50);
            let (name, what) = (format!("{prefix}add_p50_ms"), format!("ADD by {how}, median"));
            add(&name, &what, median(&ours.add), median(&all.cni.add));
            let (name, what) = (format!("{prefix}del_p50_ms"), format!("DEL by {how}, median"));
            add(&name, &what, median(&ours.del), median(&all.cni.del));
        }
    }
    report
}

const NETWORK: &str = "bench";

/// The times of all ways.
#[derive(Default)]
struct All {
    calls: Times,
    processes: Times,
    cni: Times,
}

fn measure(ground: &Ground, store: &str, node: &Arc<Node>, cni: &Cni, theirs: &Container) -> All {
    let mine = node.container("box");
    let mut caller = Caller::new(node);
    let (rounds, warm_up) = ground.pick((200, 10), (60, 5));
    let mut all = All::default();
    for round in 0..warm_up + rounds {
        if round % 50 == 0 {
            progress(&format!("{store} store: {round} of {} attached and detached", warm_up + rounds));
        }
        let name = format!("box{round}");
        let attach = ["attach", "--network", NETWORK, "--name", &name, "--netns", &mine.path];
        let add = netctl(node, &attach);
        let del = netctl(node, &["detach", "--network", NETWORK, &name]);
        let their_add = cni.run("ADD", &name, theirs);
        let their_del = cni.run("DEL", &name, theirs);
        let name = format!("called{round}");
        let called_add = caller.attach(&name, &mine);
        let called_del = caller.detach(&name);
        // What the last one left to the kernel to do is nobody's in the next round.
        cni.run("ADD", &name, theirs);
        cni.run("DEL", &name, theirs);
        if round >= warm_up {
            all.processes.keep(add, del);
            all.cni.keep(their_add, their_del);
            all.calls.keep(called_add, called_del);
        }
    }
    all
}

/// A client of the agent's API that stays.
struct Caller {
    client: Client,
    runtime: Runtime,
}

impl Caller {
    fn new(node: &Node) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be made");
        Self { client: Client::new(node.socket()), runtime }
    }

    fn attach(&mut self, name: &str, container: &Container) -> Duration {
        let request = AttachRequest {
            name: Some(name.parse().expect("it is a name")),
            ..request(NETWORK, &container.path)
        };
        let start = Instant::now();
        self.runtime.block_on(self.client.attach(&request)).expect("the agent attaches");
        start.elapsed()
    }

    fn detach(&mut self, name: &str) -> Duration {
        let start = Instant::now();
        self.runtime.block_on(self.client.detach(name, Some(NETWORK))).expect("the agent detaches");
        start.elapsed()
    }
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
