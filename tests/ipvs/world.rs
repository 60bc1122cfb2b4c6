//! A namespace, and `ipvsadm` in it.

use std::io::Write as _;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use netctl::kernel::ipvs::{
    Change, Destination, DestinationKey, Error, Family, Forwarding, Ipvs, Protocol, Reason, Scheduler,
    Service, ServiceKey,
};
use nix::sched::{CloneFlags, unshare};

/// The virtual address and the addresses of real servers, all on `lo`.
pub const VIRTUAL: &str = "10.7.0.1";
pub const REAL: &str = "10.7.0.2";

/// Moves the calling thread into a namespace of its own, which goes with it.
pub fn fresh_namespace() {
    unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
    let lines = "link set lo up\naddress add 10.7.0.1/24 dev lo\naddress add 10.7.0.2/24 dev lo\n\
                 address add fd07::1/64 dev lo nodad\n";
    feed("ip -batch -", lines);
}

/// Runs a command line, which must succeed, in the calling thread's namespace.
pub fn sh(line: &str) -> String {
    feed(line, "")
}

fn feed(line: &str, input: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-c", line]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("sh runs");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// What `ipvsadm -Sn` prints, a line for each service and destination, sorted.
pub fn saved() -> Vec<String> {
    sorted(sh("ipvsadm -Sn").lines())
}

pub fn sorted<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut lines: Vec<_> = lines.into_iter().map(|line| line.trim_end().to_owned()).collect();
    lines.sort();
    lines
}

/// Has `ipvsadm` make what such lines say.
pub fn restore(lines: &[&str]) {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    feed("ipvsadm -R", &text);
}

/// Waits until something holds. A virtual machine without hardware support is slow.
pub fn eventually<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "not so after 60 s: {what}");
        std::thread::yield_now();
    }
}

pub fn open() -> Ipvs {
    Ipvs::open().expect("this kernel has IPVS")
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn tcp(address: &str, port: u16) -> ServiceKey {
    ServiceKey::Address { protocol: Protocol::Tcp, address: ip(address), port }
}

pub fn mark(family: Family, mark: u32) -> ServiceKey {
    ServiceKey::Mark { family, mark: mark.try_into().unwrap() }
}

pub fn round_robin(key: ServiceKey) -> Service {
    Service::new(key, Scheduler::RoundRobin)
}

pub fn at(address: &str, port: u16) -> DestinationKey {
    DestinationKey { address: ip(address), port }
}

pub fn masqueraded(address: &str, port: u16) -> Destination {
    Destination::new(at(address, port), Forwarding::Masquerade, 1)
}

/// Services with their destinations, without counters, sorted.
pub type Table = Vec<(Service, Vec<Destination>)>;

/// The changes that make a table of nothing.
pub fn changes(table: &Table) -> Vec<Change> {
    let of = |(service, destinations): &(Service, Vec<Destination>)| {
        let key = service.key;
        let add = |destination: &Destination| Change::AddDestination {
            service: key,
            destination: *destination,
        };
        let mut changes = vec![Change::AddService(service.clone())];
        changes.extend(destinations.iter().map(add));
        changes
    };
    table.iter().flat_map(of).collect()
}

/// Makes changes that must succeed.
pub fn apply(ipvs: &mut Ipvs, changes: &[Change]) {
    for (change, result) in changes.iter().zip(ipvs.apply(changes)) {
        result.unwrap_or_else(|error| panic!("{change}: {error}"));
    }
}

/// Makes one change that must fail, and returns why it did.
pub fn refused(ipvs: &mut Ipvs, change: Change) -> (Reason, String) {
    let result = ipvs.apply(std::slice::from_ref(&change)).pop().unwrap();
    let error = result.expect_err(&format!("the kernel takes it: {change:?}"));
    match &error {
        Error::Refused { reason, .. } => (*reason, error.to_string()),
        _ => panic!("not refused by the kernel: {error}"),
    }
}

/// What is in the kernel.
pub fn read(ipvs: &mut Ipvs) -> Table {
    let entry = |entry: netctl::kernel::ipvs::Entry| {
        let mut destinations: Vec<_> =
            entry.destinations.iter().map(|state| state.destination).collect();
        destinations.sort();
        (entry.state.service, destinations)
    };
    let mut table: Table = ipvs.table().unwrap().into_iter().map(entry).collect();
    table.sort();
    table
}

/// What we make `ipvsadm` prints in these lines, and what it makes of these lines we read.
pub fn both_ways(mut table: Table, lines: &[&str]) {
    table.sort();
    table.iter_mut().for_each(|(_, destinations)| destinations.sort());
    let mut ipvs = open();
    apply(&mut ipvs, &changes(&table));
    assert_eq!(saved(), sorted(lines.iter().copied()), "what ipvsadm says of what we made");
    assert_eq!(read(&mut ipvs), table, "what we read of what we made");
    apply(&mut ipvs, &[Change::Flush]);
    restore(lines);
    assert_eq!(read(&mut ipvs), table, "what we read of what ipvsadm made");
    apply(&mut ipvs, &[Change::Flush]);
}
