//! What is in the table, made by us or by `ipvsadm`.

use netctl::kernel::ipvs::{
    Change, Destination, Family, Flags, Forwarding, Netmask, Protocol, Scheduler, Service, ServiceKey,
    Timeouts, Tunnel, TunnelFlags, TunnelKind,
};

use crate::world::{
    REAL, VIRTUAL, apply, at, both_ways, changes, fresh_namespace, ip, mark, masqueraded, open, read,
    restore, round_robin, saved, sh, tcp,
};

pub fn every_scheduler() {
    // Debian's kernel is not built with this one.
    let all = Scheduler::ALL.iter().filter(|scheduler| **scheduler != Scheduler::WeightedTwoChoices);
    let (table, lines): (Vec<_>, Vec<_>) = all
        .zip(1..)
        .map(|(scheduler, port)| {
            let service = Service::new(tcp(VIRTUAL, port), scheduler.clone());
            ((service, Vec::new()), format!("-A -t {VIRTUAL}:{port} -s {scheduler}"))
        })
        .unzip();
    assert_eq!(table.len(), 13);
    both_ways(table, &lines.iter().map(String::as_str).collect::<Vec<_>>());
}

pub fn every_flag() {
    let with = |port: u16, scheduler: Scheduler, flags: Flags| {
        let protocol = Protocol::Udp;
        let key = ServiceKey::Address { protocol, address: ip(VIRTUAL), port };
        (Service { flags, ..Service::new(key, scheduler) }, Vec::new())
    };
    let third = Flags::SCHEDULER_1 | Flags::SCHEDULER_2 | Flags::SCHEDULER_3;
    let table = vec![
        with(1, Scheduler::RoundRobin, Flags::ONE_PACKET),
        with(2, Scheduler::SourceHashing, Flags::SH_FALLBACK),
        with(3, Scheduler::SourceHashing, Flags::SH_PORT),
        with(4, Scheduler::SourceHashing, Flags::SH_FALLBACK | Flags::SH_PORT | Flags::ONE_PACKET),
        with(5, Scheduler::MaglevHashing, Flags::MH_FALLBACK),
        with(6, Scheduler::MaglevHashing, Flags::MH_PORT),
        with(7, Scheduler::RoundRobin, third),
    ];
    let lines = [
        "-A -u 10.7.0.1:1 -s rr -o",
        "-A -u 10.7.0.1:2 -s sh -b sh-fallback",
        "-A -u 10.7.0.1:3 -s sh -b sh-port",
        "-A -u 10.7.0.1:4 -s sh -o -b sh-fallback,sh-port",
        "-A -u 10.7.0.1:5 -s mh -b mh-fallback",
        "-A -u 10.7.0.1:6 -s mh -b mh-port",
        "-A -u 10.7.0.1:7 -s rr -b flag-1,flag-2,flag-3",
    ];
    both_ways(table, &lines);
}

pub fn every_kind_of_service() {
    let by = |protocol, address| ServiceKey::Address { protocol, address: ip(address), port: 53 };
    let keys = [
        by(Protocol::Tcp, VIRTUAL),
        by(Protocol::Udp, VIRTUAL),
        by(Protocol::Sctp, VIRTUAL),
        by(Protocol::Tcp, "fd07::1"),
        by(Protocol::Udp, "fd07::1"),
        by(Protocol::Sctp, "fd07::1"),
        mark(Family::V4, 7),
        mark(Family::V6, 7),
        mark(Family::V4, u32::MAX >> 1),
    ];
    let table = keys.map(|key| (round_robin(key), Vec::new())).to_vec();
    let lines = [
        "-A -t 10.7.0.1:53 -s rr",
        "-A -u 10.7.0.1:53 -s rr",
        "-A --sctp-service 10.7.0.1:53 -s rr",
        "-A -t [fd07::1]:53 -s rr",
        "-A -u [fd07::1]:53 -s rr",
        "-A --sctp-service [fd07::1]:53 -s rr",
        "-A -f 7 -s rr",
        "-A -f 7 -6 -s rr",
        "-A -f 2147483647 -s rr",
    ];
    both_ways(table, &lines);
}

pub fn persistence_of_every_kind() {
    let service = |key, timeout, netmask: Option<Netmask>, engine: Option<&str>| {
        let service = round_robin(key).persistent(timeout);
        let netmask = netmask.unwrap_or(service.netmask);
        (Service { netmask, engine: engine.map(str::to_owned), ..service }, Vec::new())
    };
    let sip = ServiceKey::Address { protocol: Protocol::Udp, address: ip(VIRTUAL), port: 5060 };
    let table = vec![
        service(tcp(VIRTUAL, 80), 300, None, None),
        service(tcp(VIRTUAL, 81), 1, Some(Netmask::prefix(Family::V4, 20)), None),
        service(tcp(VIRTUAL, 82), 60, Some(Netmask::V4([255, 0, 255, 0].into())), None),
        service(tcp(VIRTUAL, 0), 86400, None, None),
        service(tcp("fd07::1", 0), 300, Some(Netmask::prefix(Family::V6, 64)), None),
        service(mark(Family::V6, 1), 300, None, None),
        service(sip, 300, None, Some("sip")),
    ];
    let lines = [
        "-A -t 10.7.0.1:80 -s rr -p 300",
        "-A -t 10.7.0.1:81 -s rr -p 1 -M 255.255.240.0",
        "-A -t 10.7.0.1:82 -s rr -p 60 -M 255.0.255.0",
        "-A -t 10.7.0.1:0 -s rr -p 86400",
        "-A -t [fd07::1]:0 -s rr -p 300 -M 64",
        "-A -f 1 -6 -s rr -p 300",
        "-A -u 10.7.0.1:5060 -s rr -p 300 --pe sip",
    ];
    both_ways(table, &lines);
}

pub fn every_way_of_forwarding() {
    let to = |address, forwarding, weight| Destination::new(at(address, 80), forwarding, weight);
    let tunnel = |kind, port, flags| Forwarding::Tunnel(Tunnel { kind, port, flags });
    let (none, sum) = (TunnelFlags::empty(), TunnelFlags::CHECKSUM);
    let ipip = Forwarding::Tunnel(Tunnel::default());
    let remote = TunnelFlags::REMOTE_CHECKSUM;
    let of_ipv4 = vec![
        to("10.7.0.3", Forwarding::Masquerade, 1),
        to("10.7.0.4", Forwarding::Route, 2),
        to("10.7.0.5", ipip, 3),
        to("10.7.0.6", tunnel(TunnelKind::Gue, 6080, none), 4),
        to("10.7.0.7", tunnel(TunnelKind::Gue, 6080, sum), 5),
        to("10.7.0.8", tunnel(TunnelKind::Gue, 6081, remote), 6),
        to("10.7.0.9", tunnel(TunnelKind::Gre, 0, none), 7),
        to("10.7.0.10", tunnel(TunnelKind::Gre, 0, sum), 8),
        // Of another family than the service.
        to("fd07::9", ipip, 9),
    ];
    let of_ipv6 =
        vec![to("fd07::2", Forwarding::Masquerade, 0), to("fd07::3", Forwarding::Route, 65535)];
    let table = vec![
        (round_robin(tcp(VIRTUAL, 80)), of_ipv4),
        (round_robin(tcp("fd07::1", 80)), of_ipv6),
        (round_robin(mark(Family::V4, 3)), vec![masqueraded("10.7.0.3", 0)]),
    ];
    let lines = [
        "-A -t 10.7.0.1:80 -s rr",
        "-a -t 10.7.0.1:80 -r 10.7.0.3:80 -m -w 1",
        "-a -t 10.7.0.1:80 -r 10.7.0.4:80 -g -w 2",
        "-a -t 10.7.0.1:80 -r 10.7.0.5:80 -i -w 3 --tun-type ipip",
        "-a -t 10.7.0.1:80 -r 10.7.0.6:80 -i -w 4 --tun-type gue --tun-port 6080 --tun-nocsum",
        "-a -t 10.7.0.1:80 -r 10.7.0.7:80 -i -w 5 --tun-type gue --tun-port 6080 --tun-csum",
        "-a -t 10.7.0.1:80 -r 10.7.0.8:80 -i -w 6 --tun-type gue --tun-port 6081 --tun-remcsum",
        "-a -t 10.7.0.1:80 -r 10.7.0.9:80 -i -w 7 --tun-type gre --tun-nocsum",
        "-a -t 10.7.0.1:80 -r 10.7.0.10:80 -i -w 8 --tun-type gre --tun-csum",
        "-a -t 10.7.0.1:80 -r [fd07::9]:80 -i -w 9 --tun-type ipip",
        "-A -t [fd07::1]:80 -s rr",
        "-a -t [fd07::1]:80 -r [fd07::2]:80 -m -w 0",
        "-a -t [fd07::1]:80 -r [fd07::3]:80 -g -w 65535",
        "-A -f 3 -s rr",
        "-a -f 3 -r 10.7.0.3:0 -m -w 1",
    ];
    both_ways(table, &lines);
}

/// The words of the line with a destination in what `ipvsadm -Ln …` prints.
fn line_of(destination: &str, options: &str) -> Vec<String> {
    let text = sh(&format!("ipvsadm -Ln {options}"));
    let line = text.lines().find(|line| line.contains(destination)).expect("it is printed");
    line.split_whitespace().map(str::to_owned).collect()
}

pub fn weights_and_thresholds() {
    let mut ipvs = open();
    let limited = Destination {
        weight: i32::MAX as u32,
        upper_threshold: 100,
        lower_threshold: 60,
        ..masqueraded(REAL, 80)
    };
    let table = vec![(round_robin(tcp(VIRTUAL, 80)), vec![limited])];
    apply(&mut ipvs, &changes(&table));
    assert_eq!(line_of(REAL, "--thresholds")[2..4], ["100", "60"]);
    assert_eq!(line_of(REAL, "")[3], i32::MAX.to_string());
    assert_eq!(read(&mut ipvs), table);
    sh("ipvsadm -e -t 10.7.0.1:80 -r 10.7.0.2:80 -m -w 7 -x 9 -y 8");
    let changed = Destination { weight: 7, upper_threshold: 9, lower_threshold: 8, ..limited };
    assert_eq!(read(&mut ipvs)[0].1, [changed]);
}

pub fn ways_that_ipvsadm_cannot_ask_for() {
    let mut ipvs = open();
    // For a number that it does not know it has no word.
    let ways =
        [(Forwarding::Local, "Local"), (Forwarding::Bypass, "(null)"), (Forwarding::Other(7), "(null)")];
    for (forwarding, word) in ways {
        let destination = Destination::new(at(REAL, 80), forwarding, 1);
        let table = vec![(round_robin(tcp(VIRTUAL, 80)), vec![destination])];
        apply(&mut ipvs, &changes(&table));
        assert_eq!(line_of(REAL, "")[2], word);
        assert_eq!(read(&mut ipvs), table);
        apply(&mut ipvs, &[Change::Flush]);
    }
}

pub fn a_service_is_changed_in_place() {
    let mut ipvs = open();
    restore(&["-A -t 10.7.0.1:80 -s rr -p 300 --pe sip", "-a -t 10.7.0.1:80 -r 10.7.0.2:80 -m -w 1"]);
    let service = Service::new(tcp(VIRTUAL, 80), Scheduler::WeightedLeastConnection);
    apply(&mut ipvs, &[Change::EditService { service: service.clone(), mask: Flags::all() }]);
    assert_eq!(
        saved(),
        ["-A -t 10.7.0.1:80 -s wlc", "-a -t 10.7.0.1:80 -r 10.7.0.2:80 -m -w 1"],
        "persistence and engine are gone, the destination is there"
    );
    assert_eq!(read(&mut ipvs), [(service, vec![masqueraded(REAL, 80)])]);
}

pub fn a_mask_leaves_other_flags_alone() {
    let mut ipvs = open();
    restore(&["-A -t 10.7.0.1:80 -s sh -p 300 -b sh-port"]);
    let mut service = Service::new(tcp(VIRTUAL, 80), Scheduler::SourceHashing);
    service.timeout = 60;
    service.flags = Flags::SH_FALLBACK | Flags::ONE_PACKET;
    let mask = Flags::SH_FALLBACK | Flags::SH_PORT;
    apply(&mut ipvs, &[Change::EditService { service, mask }]);
    assert_eq!(saved(), ["-A -t 10.7.0.1:80 -s sh -p 60 -b sh-fallback"]);
}

pub fn destinations_are_changed_and_deleted() {
    let mut ipvs = open();
    let key = tcp("fd07::1", 80);
    restore(&[
        "-A -t [fd07::1]:80 -s rr",
        "-a -t [fd07::1]:80 -r [fd07::2]:80 -m -w 1",
        "-a -t [fd07::1]:80 -r [fd07::3]:80 -m -w 1",
        "-A -t [fd07::1]:81 -s rr",
    ]);
    let destination = Destination::new(at("fd07::3", 80), Forwarding::Route, 0);
    apply(
        &mut ipvs,
        &[
            Change::EditDestination { service: key, destination },
            Change::DeleteDestination { service: key, destination: at("fd07::2", 80) },
            Change::DeleteService(tcp("fd07::1", 81)),
        ],
    );
    assert_eq!(saved(), ["-A -t [fd07::1]:80 -s rr", "-a -t [fd07::1]:80 -r [fd07::3]:80 -g -w 0"]);
    let states = ipvs.destinations(&key).unwrap();
    assert_eq!(states.iter().map(|state| state.destination).collect::<Vec<_>>(), [destination]);
}

pub fn one_service_is_read_by_its_key() {
    let mut ipvs = open();
    restore(&["-A -t 10.7.0.1:80 -s rr", "-A -t 10.7.0.1:81 -s lc", "-A -f 5 -6 -s sh"]);
    let scheduler = |key, ipvs: &mut netctl::kernel::ipvs::Ipvs| {
        ipvs.service(&key).unwrap().map(|state| state.service.scheduler)
    };
    assert_eq!(scheduler(tcp(VIRTUAL, 81), &mut ipvs), Some(Scheduler::LeastConnection));
    assert_eq!(scheduler(mark(Family::V6, 5), &mut ipvs), Some(Scheduler::SourceHashing));
    assert_eq!(scheduler(mark(Family::V4, 5), &mut ipvs), None);
    assert_eq!(scheduler(tcp(VIRTUAL, 82), &mut ipvs), None);
    assert_eq!(ipvs.destinations(&tcp(VIRTUAL, 80)).unwrap(), []);
}

pub fn flushing_leaves_nothing() {
    let mut ipvs = open();
    restore(&[
        "-A -t 10.7.0.1:80 -s rr",
        "-a -t 10.7.0.1:80 -r 10.7.0.2:80 -m -w 1",
        "-A -f 5 -6 -s sh",
    ]);
    assert_eq!(ipvs.services().unwrap().len(), 2);
    apply(&mut ipvs, &[Change::Flush]);
    assert_eq!((saved(), read(&mut ipvs)), (Vec::new(), Vec::new()));
}

pub fn timeouts_are_read_and_set() {
    let mut ipvs = open();
    let printed = || sh("ipvsadm -L --timeout").trim().to_owned();
    sh("ipvsadm --set 1000 130 310");
    assert_eq!(ipvs.timeouts().unwrap(), Timeouts { tcp: 1000, tcp_fin: 130, udp: 310 });
    ipvs.set_timeouts(Timeouts { tcp: 7200, tcp_fin: 0, udp: 60 }).unwrap();
    assert_eq!(printed(), "Timeout (tcp tcpfin udp): 7200 130 60");
    ipvs.set_timeouts(Timeouts { tcp_fin: 5, ..Timeouts::default() }).unwrap();
    assert_eq!(printed(), "Timeout (tcp tcpfin udp): 7200 5 60");
    assert_eq!(ipvs.timeouts().unwrap(), Timeouts { tcp: 7200, tcp_fin: 5, udp: 60 });
}

pub fn the_version_is_told() {
    let info = open().info().unwrap();
    let (major, minor, patch) = info.version;
    let line =
        format!("IP Virtual Server version {major}.{minor}.{patch} (size={})", info.connection_table);
    assert_eq!(sh("ipvsadm -Ln").lines().next(), Some(line.as_str()));
}

pub fn an_opened_ipvs_stays_in_its_namespace() {
    let mut here = open();
    restore(&["-A -t 10.7.0.1:80 -s rr"]);
    fresh_namespace();
    let mut there = open();
    apply(&mut there, &[Change::AddService(round_robin(mark(Family::V4, 1)))]);
    assert_eq!(read(&mut here), [(round_robin(tcp(VIRTUAL, 80)), Vec::new())]);
    assert_eq!(saved(), ["-A -f 1 -s rr"]);
}
