//! An agent that is killed at each step of an attach, from the first of a network on its machine: nothing
//! is left behind, and a retry succeeds. With eBPF, where an attach has twice as many steps, each second
//! one is followed by a retry, and the others by the container's end.

use std::fs::{self, File};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use world::{Config, KernelState, NodeOptions, Process, World, eventually, wait_for};

use crate::cluster::{Cluster, DUAL};

crate::tests![
    a_retry_after_a_kill_at_any_step_succeeds,
    a_retry_after_a_kill_at_any_step_succeeds_with_ebpf,
    a_kill_at_any_step_leaves_nothing_of_a_container_that_goes,
];

/// The system calls that change something outside of the agent.
const STEPS: &str =
    "sendmsg,sendto,write,writev,pwrite64,mount,umount2,setns,unshare,fsync,fdatasync,rename,bpf";

/// How often an attach must be whole before there is no such step.
const WHOLE: usize = 5;

const ATTACH: &str = "endpoint attach --network shop --name c1 --netns /run/netns/c1";

/// How often a step is tried again of something else that the agent does, at all times.
const OTHERS: usize = 3;

/// When an agent was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Killed {
    /// Before it has answered.
    During,
    /// Before it was asked, or after it has answered.
    Otherwise,
}

/// What happens after the agent's death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// Whoever asked asks again.
    Retry,
    /// The container goes, and nobody says so.
    Gone,
}

fn a_retry_after_a_kill_at_any_step_succeeds_with_ebpf(world: &World) {
    Scene::new(world, |config| config).at_steps(1, 2, After::Retry);
}

fn a_kill_at_any_step_leaves_nothing_of_a_container_that_goes(world: &World) {
    Scene::new(world, |config| config).at_steps(2, 2, After::Gone);
}

fn a_retry_after_a_kill_at_any_step_succeeds(world: &World) {
    Scene::new(world, |_| Config::embedded()).at_steps(1, 1, After::Retry);
}

/// A machine, and what it and the store have without a network.
struct Scene {
    cluster: Cluster,
    kernel: KernelState,
    keys: Vec<String>,
}

impl Scene {
    fn new(world: &World, adjust: impl Fn(Config) -> Config) -> Self {
        let rest = |config| adjust(config).set("rest", "0s");
        let cluster = Cluster::with(world, 1, &NodeOptions::default(), rest);
        let kernel = cluster.n1().kernel_state();
        let mut scene = Self { kernel, cluster, keys: Vec::new() };
        // The first network of all leaves counters.
        scene.attach();
        scene.remove(After::Retry);
        wait_for("the sandbox is gone", || scene.cluster.n1().kernel_state().namespaces().is_empty());
        scene.kernel = scene.cluster.n1().kernel_state().shape();
        scene.keys = scene.keys();
        scene
    }

    fn keys(&self) -> Vec<String> {
        self.cluster.etcd.keys().into_keys().collect()
    }

    /// Makes the network and a container, and plugs it in; tells whether that succeeded.
    fn attach(&self) -> bool {
        let n1 = self.cluster.n1();
        n1.ok(&format!("network create shop {DUAL}"));
        n1.container("c1");
        n1.ctl(ATTACH).success()
    }

    /// Takes all away again.
    #[track_caller]
    fn remove(&self, after: After) {
        let n1 = self.cluster.n1();
        if after == After::Retry {
            n1.ok("endpoint detach --network shop c1");
        }
        n1.space.sh("ip netns del c1");
        wait_for("nobody is in the network", || {
            n1.ok("-o json endpoint ls").json().as_array().is_some_and(Vec::is_empty)
        });
        // What is left in the store would go with the network.
        wait_for("nothing of anybody is left there", || {
            let checked = n1.ctl("ipam check");
            checked.success() && checked.stdout.contains("0 left")
        });
        n1.ok("network rm shop");
    }

    /// What is not as it was before.
    fn left(&self) -> String {
        let mut text = self.kernel.difference(&self.cluster.n1().kernel_state().shape());
        let keys = self.keys();
        if keys != self.keys {
            text.push_str(&format!("{keys:?} instead of {:?}", self.keys));
        }
        text
    }

    /// Attaches with a kill at this step, and at all that are so many behind another.
    fn at_steps(&mut self, first: usize, stride: usize, after: After) {
        // A thread counts its own calls only, so one whole attach without a kill may be luck: each step is
        // tried several times before it counts as one that no attach has.
        let (mut step, mut whole, mut others) = (first, 0, 0);
        while whole < WHOLE {
            assert!(step <= 200, "an attach has more than 200 steps");
            let n1 = self.cluster.nodes[0].clone();
            n1.ok(&format!("network create shop {DUAL}"));
            let c1 = n1.container("c1");
            let killed = self.killed_at(step);
            // Who was not killed is not asked again, and says that it goes.
            let after = if killed.is_some() { after } else { After::Retry };
            if killed.is_some() {
                self.cluster.kill(0);
                self.cluster.start(0);
                if after == After::Retry {
                    let again = n1.ctl(ATTACH);
                    assert!(again.success(), "step {step}: {again}");
                }
            }
            if after == After::Retry {
                assert!(c1.space.reaches("10.9.0.1"), "step {step}");
            }
            drop(c1);
            self.remove(after);
            let settled = eventually(Duration::from_secs(20), || self.left().is_empty());
            assert!(settled, "step {step}: {}", self.left());
            match killed {
                Some(Killed::Otherwise) if others < OTHERS => others += 1,
                Some(_) => (step, whole, others) = (step + stride, 0, 0),
                None => whole += 1,
            }
        }
        assert!(step > 20, "only {} steps were found", step - 1);
    }

    /// Plugs the container in with a kill at a step; tells whether there was one, and when.
    #[track_caller]
    fn killed_at(&mut self, step: usize) -> Option<Killed> {
        let n1 = self.cluster.nodes[0].clone();
        let mut strace = self.trace(step);
        let began = self.cluster.agent_runs(0);
        let outcome = n1.ctl(ATTACH);
        // The kernel lets the agent go then. Asked kindly, strace may wait for the first thread of a
        // process that was killed, which ends after those that nobody has waited for.
        strace.stop(Signal::SIGKILL);
        if n1.ctl("version").success() {
            assert!(outcome.success(), "step {step}: {outcome}");
            return None;
        }
        let died = eventually(Duration::from_secs(10), || !self.cluster.agent_runs(0));
        assert!(died, "step {step}: an agent that runs answers: {outcome}");
        Some(if began && !outcome.success() { Killed::During } else { Killed::Otherwise })
    }

    /// Lets every thread of the running agent be killed at its `step`th system call from now on.
    fn trace(&mut self, step: usize) -> Process {
        let node = self.cluster.nodes[0].clone();
        let pid = self.cluster.agent(0).pid();
        let log = File::create(node.dir().join("strace.log")).unwrap();
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-e", &format!("trace={STEPS}")]);
        command.args(["-e", &format!("inject={STEPS}:signal=SIGKILL:when={step}")]);
        command.args(["-p", &pid.to_string()]);
        let process = Process::start(&mut command, &log);
        let traced = format!("TracerPid:\t{}\n", process.pid());
        wait_for("strace holds the agent, or has killed it", || {
            let tasks = fs::read_dir(format!("/proc/{pid}/task"));
            let held = tasks.is_ok_and(|tasks| {
                tasks.flatten().all(|task| {
                    let status = fs::read_to_string(task.path().join("status"));
                    status.is_ok_and(|status| status.contains(&traced))
                })
            });
            held || !self.cluster.agent_runs(0)
        });
        process
    }
}
