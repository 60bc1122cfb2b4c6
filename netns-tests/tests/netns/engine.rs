//! What the tests of services ask of the engine that balances: IPVS in the virtual machine, eBPF here,
//! where the kernel has no IPVS. With NETCTL_LB the other one is asked for.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};

use netctl::kernel::ebpf::{self, Maps, STATE_ANSWERED};
use world::{Node, Session, Space};

/// Whether eBPF balances although the kernel has IPVS.
static EBPF: AtomicBool = AtomicBool::new(false);

/// Has all tests from here on run with eBPF.
pub(crate) fn use_ebpf() {
    EBPF.store(true, Ordering::Relaxed);
}

/// The engine, as it is configured.
pub(crate) fn lb() -> String {
    let is_ebpf = !world::in_vm() || EBPF.load(Ordering::Relaxed);
    let default = if is_ebpf { "ebpf" } else { "ipvs" };
    std::env::var("NETCTL_LB").unwrap_or_else(|_| default.to_owned())
}

/// Whether all machines have sockets asked, and not those only of the tests that are about that: with
/// NETCTL_SOCKET_LB.
pub(crate) fn asks_sockets() -> bool {
    is_ebpf() && std::env::var_os("NETCTL_SOCKET_LB").is_some()
}

/// Whether it is eBPF.
pub(crate) fn is_ebpf() -> bool {
    lb() == "ebpf"
}

/// Has no agent of a machine find the kernel's file system of eBPF.
pub(crate) fn without_ebpf(node: &Node) {
    node.space.sh("mount -t tmpfs -o ro none /sys/fs");
}

/// What a machine says of what balances there.
pub(crate) fn balancing(node: &Node) -> String {
    let shown = node.ok(&format!("node inspect {}", node.name())).stdout;
    let line = shown.lines().find_map(|line| line.strip_prefix("Balancing"));
    line.map_or_else(|| panic!("{shown}"), |line| line.trim_start_matches(':').trim().to_owned())
}

/// Looks at the maps of a machine; nothing where there are none.
fn look<T: Send + Default>(space: &Space, look: impl Fn(&Maps) -> T + Send + Sync) -> T {
    space.enter(|| Maps::of_agent().map(|maps| look(&maps)).unwrap_or_default())
}

/// Detaches the programs of the containers in a sandbox; tells of how many.
pub(crate) fn detach_containers(sandbox: &Space) -> usize {
    let devices = sandbox.sh("ip -o link show | sed -n 's/^[0-9]*: \\(ve[^@]*\\)@.*/\\1/p'");
    sandbox.enter(|| devices.lines().filter(|device| ebpf::detach(device).unwrap()).count())
}

/// All that is balanced, as text: as `ipvsadm` saves it, or what stands in the maps.
#[track_caller]
pub(crate) fn saved(sandbox: &Space) -> String {
    if !is_ebpf() {
        return sandbox.sh("ipvsadm -Sn");
    }
    let lines = look(sandbox, |maps| {
        let backends = maps.backends.entries().unwrap();
        let mut lines = BTreeSet::new();
        for (key, front) in maps.fronts.entries().unwrap() {
            let address = IpAddr::from(key.address);
            let port = u16::from(key.port);
            lines.insert(format!(
                "{address} {port} {}: {} {} {}",
                key.protocol, front.scheduler, front.affinity, front.slots
            ));
            for (_, backend) in backends.iter().filter(|(_, backend)| backend.front == front.id) {
                let (socket, weight) = (backend.socket(), backend.weight);
                lines.insert(format!("{address} {port} {} -> {socket} {weight}", key.protocol));
            }
        }
        for (network, times) in maps.timeouts.entries().unwrap() {
            lines.insert(format!("{network}: {times:?}"));
        }
        for (place, kind) in maps.addresses.entries().unwrap() {
            lines.insert(format!("{}: {}", IpAddr::from(place.address), kind.kind));
        }
        lines
    });
    lines.into_iter().map(|line| line + "\n").collect()
}

/// The backends with their weights, of each front by itself.
pub(crate) fn rows(sandbox: &Space) -> Vec<(IpAddr, u32)> {
    if is_ebpf() {
        return look(sandbox, |maps| {
            let backends = maps.backends.entries().unwrap();
            backends.iter().map(|(_, backend)| (backend.socket().ip(), backend.weight)).collect()
        });
    }
    // `  -> 0A090005:1F90      Masq    1      0          0`, with IPv6 in brackets.
    let row = |line: &str| {
        let mut words = line.trim_start().strip_prefix("->")?.split_whitespace();
        let (address, _port) = words.next()?.rsplit_once(':')?;
        let weight = words.nth(1)?.parse().ok()?;
        let address = match address.strip_prefix('[') {
            Some(address) => address.strip_suffix(']')?.parse().ok()?,
            None => Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?).into(),
        };
        Some((address, weight))
    };
    let table = sandbox.enter(|| std::fs::read_to_string("/proc/thread-self/net/ip_vs"));
    // Without a file there is no IPVS yet.
    table.unwrap_or_default().lines().filter_map(row).collect()
}

/// How many backends of fronts with all ports there are.
pub(crate) fn with_all_ports(sandbox: &Space) -> usize {
    if is_ebpf() {
        return saved(sandbox).lines().filter(|line| line.contains(" 0 0 -> ")).count();
    }
    saved(sandbox).matches("-a -f ").count()
}

/// How many fronts have clients keep their backend for so many seconds.
pub(crate) fn with_affinity(sandbox: &Space, seconds: u32) -> usize {
    if is_ebpf() {
        return look(sandbox, |maps| {
            let fronts = maps.fronts.entries().unwrap();
            fronts.iter().filter(|(_, front)| front.affinity == seconds).count()
        });
    }
    saved(sandbox).matches(&format!("-p {seconds}")).count()
}

/// Whether connections end after these silences, in seconds: TCP, half closed TCP, UDP.
pub(crate) fn has_timeouts(sandbox: &Space, [tcp, tcp_fin, udp]: [u32; 3]) -> bool {
    if is_ebpf() {
        let expected = ebpf::Timeouts { tcp, tcp_fin, udp };
        return look(sandbox, |maps| {
            maps.timeouts.entries().unwrap().iter().any(|(_, times)| *times == expected)
        });
    }
    sandbox.sh("ipvsadm -L --timeout").contains(&format!(": {tcp} {tcp_fin} {udp}"))
}

/// Whether a client's connection has been established and its entry has not expired by now.
pub(crate) fn is_established(sandbox: &Space, session: &Session) -> bool {
    let port = session.local().port();
    if is_ebpf() {
        return look(sandbox, |maps| {
            let times = maps.timeouts.entries().unwrap();
            let timeout = times.first().map_or(0, |(_, times)| times.tcp);
            let now = ebpf::now().unwrap();
            // The one from the client and the one to it; what came last counts.
            maps.connections.entries().unwrap().iter().any(|(tuple, connection)| {
                let (from, to) = (tuple.source_port.into(), tuple.destination_port.into());
                [from, to].contains(&port)
                    && connection.state == STATE_ANSWERED
                    && now.saturating_sub(connection.seen) < timeout
            })
        });
    }
    // `TCP FROM PORT VIP PORT BACKEND PORT STATE EXPIRES`, the ports in hexadecimal digits.
    let port = format!("{port:04X}");
    let list = sandbox.enter(|| std::fs::read_to_string("/proc/thread-self/net/ip_vs_conn")).unwrap();
    list.lines().any(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.get(2) == Some(&port.as_str()) && words.contains(&"ESTABLISHED")
    })
}
