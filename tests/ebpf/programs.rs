//! Loading and attaching programs.

use std::collections::BTreeMap;
use std::process::Command;

use netctl::kernel::ebpf::{Attached, FastPath, Filters, Programs, TunnelEnd, attached, detach};

use crate::ground::{DEVICE, FAMILIES, Ground, OTHER, PASS};
use crate::group::Group;
use crate::packet::{Packet, SYN};

/// How many instructions the verifier may follow in each: what it took when it was written, and a bit,
/// since kernels differ. Who needs more changes it here, and says why: what those see who watch costs 1,200 in
/// each of `netctl_from` and `netctl_wire_out`, 500 in the others; headers that are read in place 300 in each;
/// answering names 2,900; remembering by which way a flow leaves 900 in `netctl_wire_out`; writing how a packet
/// begins with the headers before it 500 in `netctl_wire_in`.
const INSTRUCTIONS: [(&str, u32); 14] = [
    ("netctl_from", 18_000),
    ("netctl_to", 8_000),
    ("netctl_into", 20),
    ("netctl_wire_out", 2_900),
    ("netctl_wire_in", 7_500),
    ("netctl_connect4", 2_000),
    ("netctl_connect6", 2_600),
    ("netctl_send4", 4_900),
    ("netctl_send6", 5_400),
    ("netctl_receive4", 100),
    ("netctl_receive6", 100),
    ("netctl_peer4", 50),
    ("netctl_peer6", 60),
    ("netctl_tcp", 120),
];

pub fn the_verifier_follows_no_more_instructions_than_before() {
    let ground = Ground::new(16);
    let end = TunnelEnd { address: "192.168.50.1".parse().unwrap(), port: 4789 };
    let FastPath { into, to_wire, from_wire } = ground.ebpf.load_path(end).unwrap();
    let all = [&ground.programs, &into, &to_wire, &from_wire];
    let mut found: BTreeMap<&str, u32> = all.into_iter().flat_map(Programs::instructions).collect();
    let group = Group::enter();
    found.extend(ground.ebpf.ask_sockets(&group.path).unwrap().instructions());
    println!("instructions that the verifier has followed: {found:?}");
    for (program, most) in INSTRUCTIONS {
        let found = found[program];
        assert!(found <= most, "{program}: {found}, not {most}");
        assert!(found > 0, "{program}");
    }
}

pub fn a_program_is_attached_once_replaced_and_detached() {
    let ground = Ground::new(16);
    let [v4, _] = FAMILIES;
    ground.web(v4);
    let filters = &mut Filters::open().unwrap();
    assert!(!detach(DEVICE).unwrap());
    assert!(ground.programs.attach(filters, DEVICE).unwrap().changed);
    assert!(!ground.programs.attach(filters, DEVICE).unwrap().changed, "it is there");
    assert!(ground.programs.attach(filters, OTHER).unwrap().changed);
    // That of the next agent takes the place of the first one's.
    let next = ground.ebpf.load(crate::ground::NETWORK).unwrap();
    assert!(next.attach(filters, DEVICE).unwrap().changed);
    assert!(!next.attach(filters, DEVICE).unwrap().changed);
    // And so it does where nobody looks.
    let interface = ground.programs.place(filters, DEVICE).unwrap();
    let there = ground.programs.attach(filters, DEVICE).unwrap();
    assert_eq!(there, Attached { interface, changed: false, slow: false });
    next.place(filters, DEVICE).unwrap();
    let syn = Packet::tcp(SYN, (v4.client, 4000), (v4.service, 80));
    assert_eq!(ground.send(&syn).0, PASS);
    assert!(detach(DEVICE).unwrap());
    assert!(!detach(DEVICE).unwrap());
    assert!(ground.programs.attach(filters, DEVICE).unwrap().changed);
    let error = ground.programs.attach(filters, "none").unwrap_err().to_string();
    assert!(error.contains("none"), "{error}");
}

pub fn a_crossing_runs_its_program_where_it_costs_less_when_there_is_time() {
    let ground = Ground::new(16);
    let end = TunnelEnd { address: "192.168.50.1".parse().unwrap(), port: 4789 };
    let load = || ground.ebpf.load_path(end).unwrap().into;
    let (first, next) = (load(), load());
    let filters = &mut Filters::open().unwrap();
    // Since Linux 6.6.
    let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap());
    let has_tcx = (numbers.next().unwrap(), numbers.next().unwrap()) >= (6, 6);
    let interface = first.attach(filters, DEVICE).unwrap().interface;
    let attached_again = Attached { interface, changed: false, slow: has_tcx };
    assert_eq!(
        first.attach(filters, DEVICE).unwrap(),
        attached_again,
        "it does not take the time by itself"
    );
    first.hasten(DEVICE).unwrap();
    let quick = Attached { slow: false, ..attached_again };
    assert_eq!(first.attach(filters, DEVICE).unwrap(), quick);
    assert_eq!(attached(DEVICE).unwrap(), ["netctl_into"]);
    // That of the next agent takes both places of the first one's.
    assert_eq!(next.attach(filters, DEVICE).unwrap(), Attached { changed: true, ..quick });
    assert_eq!(next.attach(filters, DEVICE).unwrap(), quick);
    // Whoever removes the filter does not end what comes before it, and the filter comes back.
    let removed = Command::new("tc").args(["qdisc", "del", "dev", DEVICE, "clsact"]).status();
    assert!(removed.unwrap().success());
    assert_eq!(!attached(DEVICE).unwrap().is_empty(), has_tcx);
    assert_eq!(next.attach(filters, DEVICE).unwrap(), Attached { changed: true, ..quick });
    assert_eq!(next.attach(filters, DEVICE).unwrap(), quick);
    assert!(detach(DEVICE).unwrap());
    assert!(attached(DEVICE).unwrap().is_empty());
    assert!(!detach(DEVICE).unwrap());
    // Devices of containers come and go too often for it.
    assert!(!ground.programs.attach(filters, OTHER).unwrap().slow);
}
