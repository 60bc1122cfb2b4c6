//! A freed address is not given out again while a live node could still hold state for it.

use std::process::Command;

use nix::sys::signal::Signal;
use world::{Container, Node, Process, World, wait_for};

use crate::cluster::{Cluster, alive};
use crate::tests;

tests! {
    a_frozen_agents_node_is_dead_before_an_address_it_knows_is_given_again,
    a_stuck_dataplanes_node_is_dead_before_an_address_it_knows_is_given_again,
}

/// Of no node's block, so that every other node has a route for it alone.
const ADDRESS: &str = "10.9.0.200";

/// Three machines: the first one's container reaches `b` on the second at [`ADDRESS`].
fn cluster(world: &World) -> (Cluster, Container) {
    let options = world::NodeOptions::default();
    let cluster =
        Cluster::with(world, 3, &options, |config| config.set("lease", "2s").set("rest", "6s"));
    cluster.n1().ok("network create shop --subnet 10.9.0.0/24");
    let a = cluster.n1().attach("shop", "a");
    cluster.n2().attach_with("shop", "b", &format!("--ip {ADDRESS}"));
    wait_for("the first machine has the route", || a.space.reaches(ADDRESS));
    (cluster, a)
}

/// Frees the address and has the third machine take it; the first one must be dead by then.
#[track_caller]
fn hand_over(cluster: &Cluster) {
    let n3: &Node = &cluster.nodes[2];
    cluster.n2().ok("endpoint detach --network shop b");
    let c = n3.container("c");
    let attach = format!("endpoint attach --network shop --name c --ip {ADDRESS} --netns {}", c.path);
    let mut lived = true;
    wait_for("the address has rested", || {
        lived = alive(n3).contains(&"n1".to_owned());
        n3.ctl(&attach).success()
    });
    assert!(!lived, "the first machine counted as alive when the address was given out");
}

fn a_frozen_agents_node_is_dead_before_an_address_it_knows_is_given_again(world: &World) {
    let (mut cluster, a) = cluster(world);
    cluster.freeze(0);
    hand_over(&cluster);
    cluster.thaw(0);
    wait_for("the new holder is reached", || a.space.reaches(ADDRESS));
    wait_for("all are alive", || alive(cluster.n1()) == ["n1", "n2", "n3"]);
}

fn a_stuck_dataplanes_node_is_dead_before_an_address_it_knows_is_given_again(world: &World) {
    let (cluster, a) = cluster(world);
    let mut stuck = delay_dataplane(cluster.n1(), cluster.agent(0).pid());
    hand_over(&cluster);
    stuck.signal(Signal::SIGINT);
    assert!(stuck.ended(), "strace lets go");
    wait_for("the new holder is reached", || a.space.reaches(ADDRESS));
    wait_for("all are alive", || alive(cluster.n1()) == ["n1", "n2", "n3"]);
}

/// Makes every request of the dataplane's thread to the kernel take a minute; the agent's other
/// threads go on.
pub(crate) fn delay_dataplane(node: &Node, agent: i32) -> Process {
    let tasks = std::fs::read_dir(format!("/proc/{agent}/task")).unwrap();
    let mut tasks = tasks.map(|task| task.unwrap().path());
    let is = |name: &std::path::Path| std::fs::read_to_string(name).unwrap().trim() == "dataplane";
    let task = tasks.find(|task| is(&task.join("comm"))).expect("the agent has a dataplane");
    let log = node.dir().join("strace.log");
    let file = std::fs::File::create(&log).unwrap();
    let mut command = Command::new("strace");
    command.arg("-p").arg(task.file_name().unwrap());
    command.args(["-e", "trace=sendto", "-e", "inject=sendto:delay_enter=60000000"]);
    let process = Process::start(&mut command, &file);
    wait_for("strace holds the thread", || {
        std::fs::read_to_string(&log).unwrap_or_default().contains("attached")
    });
    process
}
