//! `netctl run`: a command in a container of its own.

use std::fs;

use nix::sys::signal::Signal;
use world::{Node, Output, Process, World, wait_for};

use crate::cluster::{Cluster, DUAL};

crate::tests![
    a_command_has_its_network_and_files,
    the_exit_status_is_passed_on,
    two_commands_on_two_nodes_reach_each_other,
    a_killed_run_leaves_nothing,
    a_signal_reaches_the_command,
    what_cannot_run_leaves_nothing,
];

#[track_caller]
fn run(node: &Node, name: &str, script: &str) -> Output {
    node.netctl(&["run", "--network", "shop", "--name", name, "--", "sh", "-c", script])
}

/// Starts a command in the background and waits until it is plugged in.
#[track_caller]
fn background(node: &Node, name: &str, script: &str) -> Process {
    let log = fs::File::create(node.dir().join(format!("run-{name}.log"))).unwrap();
    let arguments = ["run", "--network", "shop", "--name", name, "--", "sh", "-c", script];
    let process = Process::start(&mut node.netctl_command(&arguments), &log);
    let started = format!("run-{name}.log");
    wait_for("the command has started", || {
        fs::read_to_string(node.dir().join(&started)).unwrap_or_default().contains("started")
    });
    process
}

/// Nothing of any container is left on the machine.
#[track_caller]
fn nothing_is_left(node: &Node, before: &[String]) {
    wait_for("the endpoint is released", || {
        node.ok("-o json endpoint ls").json().as_array().is_some_and(Vec::is_empty)
    });
    wait_for("its namespace is gone", || namespaces(node) == before);
}

fn namespaces(node: &Node) -> Vec<String> {
    let state = node.kernel_state();
    let names = state.namespaces().into_iter().filter(|name| !name.starts_with("netctl-"));
    names.map(str::to_owned).collect()
}

/// Whether some process has this text in its command line.
fn process_with(text: &str) -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let own = std::process::id().to_string();
    processes.filter(|entry| entry.file_name() != own.as_str()).any(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    })
}

fn a_command_has_its_network_and_files(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let files = n1.space.sh("cat /etc/hosts /etc/resolv.conf");
    let before = namespaces(n1);
    let output =
        run(n1, "web", "ip -o address show; ip route; cat /etc/hosts; echo; cat /etc/resolv.conf");
    assert!(output.success(), "{output}");
    for word in ["eth0", "10.9.0.", "fd00:9::", "default via 10.9.0.1", "localhost"] {
        assert!(output.stdout.contains(word), "{word}: {output}");
    }
    let own =
        |line: &str| line.starts_with("10.9.0.") && line.split_whitespace().any(|word| word == "web");
    assert!(output.stdout.lines().any(own), "hosts names the container: {output}");
    assert_eq!(n1.space.sh("cat /etc/hosts /etc/resolv.conf"), files);
    let written = run(n1, "writer", "echo 10.1.1.1 mine >>/etc/hosts");
    assert!(written.success(), "{written}");
    assert_eq!(n1.space.sh("cat /etc/hosts /etc/resolv.conf"), files);
    nothing_is_left(n1, &before);
}

fn the_exit_status_is_passed_on(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let before = namespaces(n1);
    assert_eq!(run(n1, "a", "exit 7").code, Some(7));
    assert_eq!(run(n1, "b", "kill -TERM $$").code, Some(128 + 15));
    nothing_is_left(n1, &before);
}

fn two_commands_on_two_nodes_reach_each_other(world: &World) {
    let cluster = Cluster::new(world, 2);
    cluster.n1().ok(&format!("network create shop {DUAL}"));
    let _web = background(cluster.n1(), "web", "echo started; exec sleep 1000");
    for address in cluster.n1().addresses("shop", "web") {
        let script = format!("ping -n -c 1 -w 10 {address}");
        let output = run(cluster.n2(), "client", &script);
        assert!(output.success(), "{output}");
    }
}

fn a_killed_run_leaves_nothing(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let before = namespaces(n1);
    let mark = "98765.4321";
    let mut process = background(n1, "web", &format!("echo started; sleep {mark} & wait"));
    assert!(process_with(mark));
    process.stop(Signal::SIGKILL);
    wait_for("the command and its children are gone", || !process_with(mark));
    nothing_is_left(n1, &before);
}

fn a_signal_reaches_the_command(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let before = namespaces(n1);
    for (signal, name) in [(Signal::SIGTERM, "TERM"), (Signal::SIGINT, "INT"), (Signal::SIGHUP, "HUP")] {
        let script = format!("trap 'exit 42' {name}; echo started; while :; do sleep 0.05; done");
        let mut process = background(n1, &name.to_lowercase(), &script);
        assert_eq!(process.stop(signal).code(), Some(42), "{name}");
    }
    nothing_is_left(n1, &before);
}

fn what_cannot_run_leaves_nothing(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let before = namespaces(n1);
    let output = n1.ctl("run --network shop --name a -- /no/such/program");
    assert_eq!(output.code, Some(127), "{output}");
    assert!(output.stderr.contains("/no/such/program"), "{output}");
    let output = n1.ctl("run --network nothing --name a -- true");
    assert_eq!(output.code, Some(4), "{output}");
    nothing_is_left(n1, &before);
    let _web = background(n1, "web", "echo started; exec sleep 1000");
    let before = (namespaces(n1), n1.kernel_state().shape());
    let output = n1.ctl("run --network shop --name web -- true");
    assert_eq!(output.code, Some(5), "{output}");
    wait_for("nothing of the second one is left", || {
        before.1.difference(&n1.kernel_state().shape()).is_empty()
    });
    n1.ok("endpoint inspect --network shop web");
}
