//! What most tests begin with: some machines with agents over one etcd.

use std::sync::Arc;

use nix::sys::signal::Signal;
use world::{Agent, Config, Container, Etcd, Node, NodeOptions, Sockets, World};

use crate::engine;

/// Machines `n1`, `n2`, … with an agent on each.
pub(crate) struct Cluster {
    agents: Vec<Option<Agent>>,
    /// The machines.
    pub nodes: Vec<Arc<Node>>,
    /// Their configurations.
    pub configs: Vec<Config>,
    /// Their store.
    pub etcd: Etcd,
}

impl Cluster {
    /// `count` machines on a usual underlay.
    #[track_caller]
    pub fn new(world: &World, count: usize) -> Self {
        Self::with(world, count, &NodeOptions::default(), |config| config)
    }

    /// `count` machines; `adjust` changes each agent's configuration.
    #[track_caller]
    pub fn with(
        world: &World,
        count: usize,
        options: &NodeOptions,
        adjust: impl Fn(Config) -> Config,
    ) -> Self {
        let mut cluster =
            Self { agents: Vec::new(), nodes: Vec::new(), configs: Vec::new(), etcd: world.etcd() };
        for number in 1..=count {
            let node = world.node_with(&format!("n{number}"), options);
            let config = if options.ipv4 {
                Config::etcd(&cluster.etcd)
            } else {
                Config::etcd6(&cluster.etcd).set("underlay", node.ipv6())
            };
            cluster.nodes.push(node);
            // What is not about services runs by the path that skips the stack, too.
            let config = if world::in_vm() {
                config
            } else {
                let config = config.set("lb", &engine::lb()).raw("lb_connections", "16384");
                if engine::asks_sockets() { asking(config) } else { config }
            };
            cluster.configs.push(adjust(config));
            cluster.agents.push(None);
            cluster.start(number - 1);
        }
        cluster
    }

    /// Makes the network `shop` with a container on each of the first two machines, which reach each
    /// other; gives them, and the second one's IPv4 address.
    #[track_caller]
    pub fn shop(&self) -> (Container, Container, String) {
        self.n1().ok(&format!("network create shop {DUAL}"));
        let (a, b) = (self.n1().attach("shop", "a"), self.n2().attach("shop", "b"));
        let address = self.n2().addresses("shop", "b").remove(0);
        assert!(a.space.reaches(&address));
        (a, b, address)
    }

    /// The first machine.
    pub fn n1(&self) -> &Node {
        &self.nodes[0]
    }

    /// The second machine.
    pub fn n2(&self) -> &Node {
        &self.nodes[1]
    }

    /// Starts a machine's agent.
    #[track_caller]
    pub fn start(&mut self, index: usize) {
        self.agents[index] = Some(self.nodes[index].agent(&self.configs[index]));
    }

    /// Ends a machine's agent, and gives the sockets that were kept for the next one.
    #[track_caller]
    pub fn terminate_keeping(&mut self, index: usize) -> Sockets {
        let agent = self.agents[index].take().expect("the agent runs");
        let kept = agent.take_kept();
        agent.terminate();
        kept
    }

    /// Starts a machine's agent with the sockets that an earlier one had kept.
    #[track_caller]
    pub fn start_with(&mut self, index: usize, sockets: Sockets) {
        self.agents[index] = Some(self.nodes[index].agent_with(&self.configs[index], sockets));
    }

    /// Starts a machine's agent that cannot get ready.
    pub fn launch(&mut self, index: usize) {
        self.agents[index] = Some(self.nodes[index].agent_under(&self.configs[index], &[]));
    }

    /// Stops a machine's agent where it is.
    pub fn freeze(&mut self, index: usize) {
        self.agents[index].as_mut().expect("the agent runs").signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn thaw(&mut self, index: usize) {
        self.agents[index].as_mut().expect("the agent runs").signal(Signal::SIGCONT);
    }

    /// Kills a machine's agent without warning.
    #[track_caller]
    pub fn kill(&mut self, index: usize) {
        self.agents[index].take().expect("the agent runs").kill();
    }

    /// Ends a machine's agent as a service manager does.
    #[track_caller]
    pub fn terminate(&mut self, index: usize) {
        self.agents[index].take().expect("the agent runs").terminate();
    }

    /// Whether a machine's agent has not ended by itself.
    pub fn agent_runs(&mut self, index: usize) -> bool {
        self.agents[index].as_mut().is_some_and(Agent::runs)
    }

    /// The running agent of a machine.
    pub fn agent(&self, index: usize) -> &Agent {
        self.agents[index].as_ref().expect("the agent runs")
    }
}

/// The same machine with its containers' sockets asked for services.
pub(crate) fn asking(config: Config) -> Config {
    let group = world::group().to_str().expect("its path is a text");
    config.raw("socket_lb", "true").set("cgroup", group)
}

/// The subnets of a network of both families, as most tests use it.
pub(crate) const DUAL: &str = "--subnet 10.9.0.0/24 --subnet fd00:9::/64";

/// A container that is plugged into the network `shop`, with its addresses.
pub(crate) struct Member {
    pub container: Container,
    pub addresses: Vec<String>,
}

/// Plugs a new container in.
#[track_caller]
pub(crate) fn member(node: &Node, name: &str) -> Member {
    let container = node.attach("shop", name);
    Member { container, addresses: node.addresses("shop", name) }
}

/// The nodes that `node ls` shows as alive.
pub(crate) fn alive(node: &Node) -> Vec<String> {
    let nodes = node.ctl("-o json node ls");
    let nodes = if nodes.success() { nodes.json() } else { return Vec::new() };
    let nodes = nodes.as_array().cloned().unwrap_or_default();
    let alive = nodes.iter().filter(|node| node["alive"] == true);
    alive.map(|node| node["name"].as_str().unwrap_or_default().to_owned()).collect()
}
