//! A machine: its own network, its own /run, and what runs on it.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MsFlags, mount};

use crate::agent::{Agent, Config, Sockets, binary};
use crate::client::Client;
use crate::dump::KernelState;
use crate::process::{self, Output};
use crate::space::Space;
use crate::world::{FILES, Place};

/// What is special about a machine's eth0.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// Whether it has an IPv4 address.
    pub ipv4: bool,
    /// Whether it has an IPv6 address.
    pub ipv6: bool,
    /// Its MTU.
    pub mtu: u32,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self { ipv4: true, ipv6: true, mtu: 1500 }
    }
}

/// A machine on the underlay.
#[derive(Debug)]
pub struct Node {
    name: String,
    dir: PathBuf,
    pub(crate) place: Place,
    /// Its network namespace and mounts.
    pub space: Space,
}

impl Node {
    pub(crate) fn new(name: &str, dir: &Path, place: Place) -> Self {
        fs::create_dir_all(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        let space = Space::new(name, || furnish(dir));
        Self { name: name.to_owned(), dir: dir.to_owned(), place, space }
    }

    /// Its name, which is also the agent's node name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its IPv4 address on the underlay.
    pub fn ipv4(&self) -> &str {
        &self.place.ipv4
    }

    /// Its IPv6 address on the underlay.
    pub fn ipv6(&self) -> &str {
        &self.place.ipv6
    }

    /// A folder of the machine that outlives its agents.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The path of the agent's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("netctl.sock")
    }

    /// Starts the agent and waits until it says that it is ready.
    ///
    /// # Panics
    /// When it ends instead, or is not ready in time.
    #[track_caller]
    pub fn agent(&self, config: &Config) -> Agent {
        let mut agent = Agent::start(self, config, &[]);
        agent.wait_ready();
        agent
    }

    /// Starts the agent under `wrapper` (a program and its arguments), ready or not.
    pub fn agent_under(&self, config: &Config, wrapper: &[&str]) -> Agent {
        Agent::start(self, config, wrapper)
    }

    /// Starts an agent that takes over the sockets which an earlier one had kept, and waits until it is
    /// ready.
    #[track_caller]
    pub fn agent_with(&self, config: &Config, sockets: Sockets) -> Agent {
        let shell = ["sh", "-c", "LISTEN_PID=$$ exec \"$@\"", "sh"];
        let mut agent = Agent::start_with(self, config, &shell, sockets);
        agent.wait_ready();
        agent
    }

    /// Runs the agent's program to its end: for configurations that it must refuse, and for
    /// `--cleanup`.
    #[track_caller]
    pub fn netctld(&self, config: &Config, arguments: &[&str]) -> Output {
        let mut command = self.space.command(binary("netctld"));
        command.arg("--config").arg(config.write(self)).args(arguments).env_remove("NOTIFY_SOCKET");
        process::output(&mut command, Duration::from_secs(30))
    }

    /// Runs `netctl` with these arguments.
    #[track_caller]
    pub fn netctl(&self, arguments: &[&str]) -> Output {
        process::output(&mut self.netctl_command(arguments), Duration::from_secs(60))
    }

    /// Runs `netctl` with words that are separated by blanks.
    #[track_caller]
    pub fn ctl(&self, arguments: &str) -> Output {
        self.netctl(&arguments.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs `netctl`, which must succeed.
    #[track_caller]
    pub fn ok(&self, arguments: &str) -> Output {
        let output = self.ctl(arguments);
        assert!(output.success(), "netctl {arguments} on {}: {output}", self.name);
        output
    }

    /// A `netctl` command that is not started yet.
    pub fn netctl_command(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = self.space.command(binary("netctl"));
        command.arg("--socket").arg(self.socket()).args(arguments);
        command
    }

    /// A client of the agent's API.
    pub fn client(&self) -> Client {
        Client::new(self.socket())
    }

    /// Makes a container: a network namespace at /run/netns/NAME.
    pub fn container(&self, name: &str) -> Container {
        let path = format!("/run/netns/{name}");
        let space = self.space.new_net(&format!("{}/{name}", self.name), || {
            File::create(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            let own = Some("/proc/thread-self/ns/net");
            mount(own, path.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .unwrap_or_else(|error| panic!("{path}: {error}"));
        });
        space.sh("ip link set lo up");
        Container { name: name.to_owned(), path, space }
    }

    /// Makes a container and plugs it into a network under its own name.
    ///
    /// # Panics
    /// When the agent refuses.
    #[track_caller]
    pub fn attach(&self, network: &str, name: &str) -> Container {
        self.attach_with(network, name, "")
    }

    /// The same with further options.
    #[track_caller]
    pub fn attach_with(&self, network: &str, name: &str, options: &str) -> Container {
        let container = self.container(name);
        let path = &container.path;
        self.ok(&format!("endpoint attach --network {network} --name {name} --netns {path} {options}"));
        container
    }

    /// The sandbox of a network on this machine.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn sandbox(&self, network: &str) -> Space {
        let path = self.sandbox_path(network);
        self.space.at(&format!("{}/{network}", self.name), &path)
    }

    /// Where the sandbox of a network is, or would be.
    #[track_caller]
    pub fn sandbox_path(&self, network: &str) -> String {
        format!("/run/netns/netctl-{}", self.network_id(network))
    }

    /// The id of a network.
    #[track_caller]
    pub fn network_id(&self, network: &str) -> String {
        let network = self.ok(&format!("-o json network inspect {network}")).json();
        text(&one(network), "id")
    }

    /// The addresses of an endpoint, as text.
    #[track_caller]
    pub fn addresses(&self, network: &str, endpoint: &str) -> Vec<String> {
        let command = format!("-o json endpoint inspect --network {network} {endpoint}");
        let endpoint = one(self.ok(&command).json());
        let addresses = endpoint["addresses"].as_array().expect("an endpoint has addresses");
        addresses.iter().map(|address| address.as_str().unwrap_or_default().to_owned()).collect()
    }

    /// What the kernel has, here and in all named namespaces.
    pub fn kernel_state(&self) -> KernelState {
        KernelState::read(&self.space)
    }
}

/// A network namespace that stands for a container.
#[derive(Debug)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// The path of its namespace on its machine.
    pub path: String,
    /// The namespace.
    pub space: Space,
}

/// `inspect` prints one object, or a list with one.
fn one(value: serde_json::Value) -> serde_json::Value {
    match value {
        serde_json::Value::Array(mut list) if list.len() == 1 => list.remove(0),
        other => other,
    }
}

#[track_caller]
fn text(value: &serde_json::Value, key: &str) -> String {
    value[key].as_str().unwrap_or_else(|| panic!("no {key} in {value}")).to_owned()
}

/// Gives a machine a /run of its own, in which the world's files are still seen, a /sys of its
/// own network with the control groups, and copies of the files that name resolution reads.
fn furnish(dir: &Path) {
    const NONE: Option<&str> = None;
    let bind = |from: &Path, to: &Path| {
        mount(Some(from), to, NONE, MsFlags::MS_BIND, NONE)
            .unwrap_or_else(|error| panic!("mount {} at {}: {error}", from.display(), to.display()));
    };
    for file in ["/etc/hosts", "/etc/resolv.conf"] {
        let copy = dir.join(Path::new(file).file_name().unwrap_or_default());
        fs::copy(file, &copy).unwrap_or_else(|error| panic!("copy {file}: {error}"));
        bind(&copy, &Path::new(file).canonicalize().unwrap_or_else(|_| file.into()));
    }
    let files = File::open(FILES).unwrap_or_else(|error| panic!("{FILES}: {error}"));
    for (kind, at) in [("tmpfs", "/run"), ("sysfs", "/sys"), ("cgroup2", "/sys/fs/cgroup")] {
        mount(Some(kind), at, Some(kind), MsFlags::empty(), NONE)
            .unwrap_or_else(|error| panic!("mount {at}: {error}"));
    }
    fs::create_dir_all(FILES).unwrap_or_else(|error| panic!("{FILES}: {error}"));
    bind(Path::new(&format!("/proc/self/fd/{}", files.as_raw_fd())), Path::new(FILES));
    // As ip-netns(8) and the container engines do before they make the first namespace.
    let names = Path::new("/run/netns");
    fs::create_dir_all(names).unwrap_or_else(|error| panic!("{}: {error}", names.display()));
    bind(names, names);
    mount(NONE, names, NONE, MsFlags::MS_SHARED, NONE)
        .unwrap_or_else(|error| panic!("share {}: {error}", names.display()));
}
