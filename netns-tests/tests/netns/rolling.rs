//! Containers of a service are replaced while clients go on: not one request fails.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use nix::sys::signal::Signal;
use world::{Load, Node, Process, World};

use crate::cluster::Cluster;

crate::tests![no_request_fails_while_containers_are_replaced];

/// How many containers the service has, and how many replacements there are of each order.
const REPLICAS: usize = 3;
const REPLACEMENTS: usize = 50;
/// How many requests there are between two replacements, at least.
const MORE: u64 = 5;

fn no_request_fails_while_containers_are_replaced(world: &World) {
    let cluster = Cluster::with(world, 2, &Default::default(), |config| config.set("rest", "0s"));
    let (n1, n2) = (cluster.n1(), cluster.n2());
    n1.ok("network create shop --subnet 10.9.0.0/24");
    n1.ok(&format!(
        "service create web --network shop --vip 10.9.0.200 --replicas {REPLICAS} --port 80:8080 \
         --update-order start-first --health-http 8080/ --health-interval 1s"
    ));
    let clients = [n1.attach("shop", "client1"), n2.attach("shop", "client2")];
    let node = |number: usize| -> &Node { [n1, n2][number % 2] };
    let mut running: Vec<Web> = (0..REPLICAS).map(|number| Web::start(node(number), number)).collect();
    running.iter().for_each(Web::wait_ready);
    let load = Load::start(clients.iter().map(|client| &client.space), request);
    load.goes_on(MORE, "the service answers");
    for number in REPLICAS..REPLICAS + REPLACEMENTS {
        let new = Web::start(node(number), number);
        new.wait_ready();
        running.remove(0).leave();
        running.push(new);
        load.goes_on(MORE, "after a start-first replacement");
    }
    for number in (REPLICAS + REPLACEMENTS..).take(REPLACEMENTS) {
        running.remove(0).leave();
        let new = Web::start(node(number), number);
        new.wait_ready();
        running.push(new);
        load.goes_on(MORE, "after a stop-first replacement");
    }
    let (done, failures) = load.finish();
    assert!(
        failures.is_empty(),
        "{} of {done} requests failed: {:?}",
        failures.len(),
        &failures[..failures.len().min(5)]
    );
    for web in running {
        web.leave();
    }
}

/// A container with a web server.
struct Web<'a> {
    node: &'a Node,
    name: String,
    process: Process,
}

impl<'a> Web<'a> {
    fn start(node: &'a Node, number: usize) -> Self {
        let name = format!("web{number}");
        let server = world::binary("web");
        let mut command =
            node.netctl_command(&["run", "--network", "shop", "--service", "web", "--name", &name]);
        command.arg("--").arg(server).args(["8080", &name]);
        let log = std::fs::File::create(node.dir().join(format!("{name}.log"))).unwrap();
        Self { node, process: Process::start(&mut command, &log), name }
    }

    fn wait_ready(&self) {
        self.node.ok(&format!("endpoint wait --network shop {}", self.name));
    }

    /// Ends it in the order that loses nothing: first nobody sends to it any more.
    fn leave(mut self) {
        self.node.ok(&format!("endpoint drain --network shop {} --wait --timeout 60s", self.name));
        self.process.signal(Signal::SIGTERM);
        assert!(self.process.ended(), "{} ends", self.name);
    }
}

/// One request over a connection of its own; gives the name of the container that answers.
fn request() -> std::io::Result<String> {
    let address: SocketAddr = "10.9.0.200:80".parse().unwrap();
    let limit = Duration::from_secs(30);
    let mut stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let name = answer.split_once("\r\n\r\n").and_then(|(_, body)| body.split_whitespace().next());
    match name.filter(|_| answer.starts_with("HTTP/1.1 200 ")) {
        Some(name) => Ok(name.to_owned()),
        None => Err(std::io::Error::other(format!("{answer:?}"))),
    }
}
