//! Containers of a service are replaced while clients go on: not one request fails.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use nix::sys::signal::Signal;
use world::{Load, Node, Process, World, wait_for};

use crate::cluster::Cluster;
use crate::engine::lb;
use crate::shop::destinations;

crate::tests![no_request_fails_while_containers_are_replaced];

/// Those that take many minutes in there.
pub(crate) const LONG: &[crate::Test] = &[(
    "no_request_fails_while_containers_are_replaced_a_hundred_times",
    no_request_fails_while_containers_are_replaced_a_hundred_times,
)];

/// How many containers the service has.
const REPLICAS: usize = 3;
/// How many requests there are between two replacements, at least.
const MORE: u64 = 5;

fn no_request_fails_while_containers_are_replaced(world: &World) {
    replace(world, 2);
}

fn no_request_fails_while_containers_are_replaced_a_hundred_times(world: &World) {
    replace(world, 50);
}

/// So many replacements of each order.
fn replace(world: &World, replacements: usize) {
    let cluster = Cluster::with(world, 2, &Default::default(), |config| {
        config.set("lb", &lb()).set("rest", "0s").set("lease", "60s")
    });
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
    // That they are ready the other machine hears a little later.
    for sandbox in [n1.sandbox("shop"), n2.sandbox("shop")] {
        let ready = || destinations(&sandbox).values().filter(|weight| **weight == 1).count();
        wait_for("every machine sends to all of them", || ready() == REPLICAS);
    }
    let load = Load::start(clients.iter().map(|client| &client.space), request);
    let goes_on = |what: &str| {
        load.goes_on(MORE, what);
        let failures = load.failures();
        assert!(failures.is_empty(), "{what}: {failures:?}");
    };
    goes_on("the service answers");
    for number in (REPLICAS..).take(replacements) {
        let new = Web::start(node(number), number);
        new.wait_ready();
        running.remove(0).leave();
        running.push(new);
        goes_on("after a start-first replacement");
    }
    for number in (REPLICAS + replacements..).take(replacements) {
        running.remove(0).leave();
        let new = Web::start(node(number), number);
        new.wait_ready();
        running.push(new);
        goes_on("after a stop-first replacement");
    }
    let (done, failures) = load.finish();
    assert!(failures.is_empty(), "{} of {done} requests failed: {failures:?}", failures.len());
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
        let drain = format!("endpoint drain --network shop {} --wait --timeout 60s", self.name);
        // On a busy machine the store may be late; to drain it again changes nothing.
        wait_for("nobody sends to it any more", || self.node.ctl(&drain).success());
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
