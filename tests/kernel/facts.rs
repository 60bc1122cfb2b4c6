//! What is in a sandbox, and changes to it.

use std::collections::BTreeSet;

use ipnetwork::IpNetwork;
use netctl::kernel::{Error, delete_sandbox};
use netctl::model::object::{Device, Link, LinkKind, Object, Route, Step, Target};
use netctl::model::{MacAddr, Vni};

use crate::world::{Container, Node, PORT, ip, net, route, sh, two_nodes};

pub fn what_was_applied_is_observed() {
    let ([mut a, b], [container, _other]) = two_nodes(["192.0.2.1", "192.0.2.2"], 24);
    let uplink = a.uplink();
    a.host.ensure_pair(&mut a.sandbox, &uplink).unwrap();
    let via = |device, address| Target::Via(device, ip(address));
    let mtu = Route {
        destination: net("10.8.0.0/16"),
        target: via(Device::Uplink, "169.254.64.0"),
        mtu: Some(1280),
    };
    let more = [
        Object::Link(Link { device: Device::Uplink, kind: LinkKind::Veth, mtu: uplink.mtu, up: true }),
        Object::Address { device: Device::Uplink, address: net("169.254.64.1/31") },
        Object::Address { device: Device::Uplink, address: net("fd6e:6574:6374:6c00::1/127") },
        route("0.0.0.0/0", via(Device::Uplink, "169.254.64.0")),
        route("::/0", via(Device::Uplink, "fd6e:6574:6374:6c00::")),
        Object::Route(mtu),
        // IPv4 through an IPv6 next hop.
        route("10.7.0.0/16", Target::Via(Device::Tunnel, b.mac.link_local().into())),
        // A port of its own.
        Object::Fdb { mac: MacAddr([2, 0, 0, 0, 0, 9]), remote: ip("192.0.2.9"), port: PORT + 1 },
        Object::Neighbour {
            device: Device::Tunnel,
            address: ip("fe80::9"),
            mac: MacAddr([2, 0, 0, 0, 0, 9]),
        },
    ];
    let known = [a.base(), a.towards(&b, &["10.9.0.128/25", "fd00:9::100/120"]), container.objects()];
    let wanted: BTreeSet<Object> = known.into_iter().flatten().chain(more).collect();
    a.reconcile(&wanted);
    assert_eq!(a.observe(), wanted);
    a.reconcile(&BTreeSet::new());
    let left = a.observe();
    assert!(
        left.iter()
            .all(|object| matches!(object, Object::Link(link) if link.device == Device::Loopback)),
        "{left:?}"
    );
}

pub fn applying_twice_is_as_good_as_once() {
    let mut node = Node::alone();
    let container = Container::new(10);
    node.plug(&container.plug).unwrap();
    let other = Node::new(2, "192.0.2.2", 78);
    let wanted: BTreeSet<Object> =
        [node.base(), container.objects(), node.towards(&other, &["10.9.0.128/25"])]
            .into_iter()
            .flatten()
            .collect();
    let add: Vec<Step> = wanted.iter().map(|object| Step::Add(*object)).collect();
    let remove: Vec<Step> = wanted.iter().rev().map(|object| Step::Remove(*object)).collect();
    for round in 0..2 {
        let failed = node.apply(&add);
        assert!(failed.is_empty(), "{round}: {failed:?}");
        assert_eq!(node.observe(), wanted);
    }
    for round in 0..2 {
        let failed = node.apply(&remove);
        assert!(failed.is_empty(), "{round}: {failed:?}");
    }
    assert_eq!(node.observe().len(), 1);
}

pub fn what_somebody_removes_is_seen_and_put_back() {
    let ([mut a, b], [container, _other]) = two_nodes(["192.0.2.1", "192.0.2.2"], 24);
    let wanted = a.observe();
    let device = container.device();
    for damage in [
        "ip addr del 10.9.0.1/32 dev lo".to_owned(),
        "ip route del unreachable 10.9.0.0/24 proto 110".to_owned(),
        "ip route replace 10.9.0.128/25 dev lo proto 110".to_owned(),
        "ip -6 route del fd00:9::100/120".to_owned(),
        "ip neigh del 192.0.2.2 dev vx0".to_owned(),
        "ip neigh replace 192.0.2.2 dev vx0 lladdr 02:00:00:00:00:77 nud permanent".to_owned(),
        format!("bridge fdb del {} dev vx0", b.mac),
        format!("bridge fdb replace {} dev vx0 dst 192.0.2.77 self permanent", b.mac),
        format!("ip link set {device} down"),
        "ip link set vx0 mtu 1300".to_owned(),
        "ip link set vx0 address 02:00:00:00:00:66".to_owned(),
        "ip link del vx0".to_owned(),
    ] {
        a.sh(&damage);
        assert_ne!(a.observe(), wanted, "{damage}");
        a.reconcile(&wanted);
        // What went along with a device comes back too.
        a.reconcile(&wanted);
        assert_eq!(a.observe(), wanted, "{damage}");
    }
    assert!(container.reaches("10.9.0.130"));
}

pub fn objects_of_others_are_not_seen() {
    let mut node = Node::alone();
    node.reconcile(&node.base());
    for line in [
        "ip link add other type bridge",
        "ip link set other up",
        "ip addr add 10.66.0.1/24 dev other",
        "ip addr add 10.66.1.1/32 dev lo",
        "ip addr add fd66::1/64 dev vx0",
        "ip route add 10.67.0.0/24 dev other",
        "ip route add 10.68.0.0/24 dev vx0 proto static",
        "ip neigh add 10.66.0.9 dev vx0 lladdr 02:00:00:00:00:66 nud permanent",
        "ip route add 10.69.0.0/24 dev vx0 table 100 proto 110",
    ] {
        node.sh(line);
    }
    assert_eq!(node.observe(), node.base());
}

pub fn a_wrong_device_in_the_place_of_ours_is_foreign() {
    let mut node = Node::alone();
    let kind = |node: &mut Node| {
        node.observe().iter().find_map(|object| match object {
            Object::Link(link) if link.device == Device::Tunnel => Some(link.kind),
            _ => None,
        })
    };
    let local = node.underlay;
    for wrong in [
        "type bridge".to_owned(),
        // Its socket is in the sandbox.
        format!("type vxlan id 77 local {local} dstport {PORT} nolearning"),
    ] {
        node.sh(&format!("ip link add vx0 {wrong}"));
        assert_eq!(kind(&mut node), Some(LinkKind::Foreign), "{wrong}");
        let failed = node.apply(&[Step::Add(node.tunnel())]);
        assert_eq!(failed.len(), 1, "{failed:?}");
        node.reconcile(&node.base());
        assert_eq!(node.observe(), node.base());
        node.sh("ip link del vx0");
    }
    let learning = format!("type vxlan id 77 local {local} dstport {PORT} learning");
    sh(&format!("ip -n {} link add vx0 netns {} {learning}", node.space.name, node.sandbox_name()));
    assert_eq!(kind(&mut node), Some(LinkKind::Foreign));
}

pub fn a_route_is_replaced_by_one_with_its_destination() {
    let mut node = Node::alone();
    node.reconcile(&node.base());
    for (destination, gateway) in [("10.9.0.0/25", "192.0.2.9"), ("fd00:9::/80", "fe80::9")] {
        let targets = [
            Target::Unreachable,
            Target::Device(Device::Tunnel),
            Target::Via(Device::Tunnel, ip(gateway)),
            Target::Via(Device::Tunnel, ip("fe80::8")),
            Target::Unreachable,
        ];
        for target in targets {
            let failed = node.apply(&[Step::Add(route(destination, target))]);
            assert!(failed.is_empty(), "{failed:?}");
            let found = node.observe();
            let routes = found.iter().filter(
                |object| matches!(object, Object::Route(route) if route.destination == net(destination)),
            );
            assert_eq!(routes.collect::<Vec<_>>(), [&route(destination, target)]);
        }
    }
}

pub fn a_mark_for_removal_that_is_left_over_is_taken_back() {
    let mut node = Node::alone();
    let (stays, goes) = (Container::new(10), Container::new(11));
    node.plug(&stays.plug).unwrap();
    node.plug(&goes.plug).unwrap();
    let wanted: BTreeSet<Object> = node.base().union(&stays.objects()).copied().collect();
    node.reconcile(&wanted.union(&goes.objects()).copied().collect());
    node.sh(&format!("ip link set {} group 110", stays.device()));
    assert!(!node.observe().is_superset(&wanted));
    node.reconcile(&wanted.union(&goes.objects()).copied().collect());
    node.reconcile(&wanted);
    assert_eq!(node.observe(), wanted);
}

pub fn a_failing_step_does_not_stop_the_others() {
    let mut node = Node::alone();
    node.reconcile(&node.base());
    let wrong = route("10.5.0.0/16", Target::Device(Device::Uplink));
    let uplink =
        Object::Link(Link { device: Device::Uplink, kind: LinkKind::Veth, mtu: 1400, up: true });
    let right = route("10.6.0.0/16", Target::Unreachable);
    // The VNI is in use on this host already.
    let other = Node::new(3, "192.0.2.1", 77);
    let twice = other.sandbox_name();
    let failed = node.apply(&[Step::Add(uplink), Step::Add(wrong), Step::Add(right)]);
    let steps: Vec<Step> = failed.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, [Step::Add(uplink), Step::Add(wrong)]);
    assert!(failed.iter().all(|(_, error)| matches!(error, Error::NoDevice { .. })), "{failed:?}");
    assert!(node.observe().contains(&right));
    let mut sandbox = netctl::kernel::Sandbox::open(&twice).unwrap();
    let tunnel = node.tunnel();
    let failed = sandbox.apply(&mut node.host, &[Step::Add(tunnel)]);
    assert!(failed[0].1.to_string().contains("VNI"), "{failed:?}");
}

pub fn more_steps_than_fit_in_one_send_are_all_taken() {
    let mut node = Node::alone();
    let routes = (0..2000u32).map(|n| {
        let address = std::net::Ipv4Addr::from(0x0a64_0000 + n);
        Object::Route(Route {
            destination: IpNetwork::from(ip(&address.to_string())),
            target: Target::Unreachable,
            mtu: None,
        })
    });
    let entries = (0..2000u16).map(|n| {
        let [high, low] = n.to_be_bytes();
        Object::Fdb { mac: MacAddr([2, 1, 0, 0, high, low]), remote: ip("192.0.2.2"), port: PORT }
    });
    let wanted: BTreeSet<Object> = node.base().into_iter().chain(routes).chain(entries).collect();
    node.reconcile(&wanted);
    assert_eq!(node.observe(), wanted);
    node.reconcile(&node.base());
    assert_eq!(node.observe(), node.base());
}

pub fn settings_are_put_right() {
    let node = Node::alone();
    let all = [
        "net.ipv4.ip_forward",
        "net.ipv4.conf.all.rp_filter",
        "net.ipv6.conf.all.forwarding",
        "net.ipv6.conf.default.accept_ra",
    ];
    let read = || all.map(|setting| node.sh(&format!("sysctl -n {setting}")).trim().to_owned());
    let right = read();
    assert_eq!(right, ["1", "0", "1", "0"]);
    for (setting, value) in all.iter().zip(["0", "1", "0", "1"]) {
        node.sh(&format!("sysctl -qw {setting}={value}"));
    }
    assert_ne!(read(), right);
    node.sandbox.check_settings().unwrap();
    assert_eq!(read(), right);
}

pub fn a_vni_is_free_when_its_sandbox_has_gone() {
    let mut node = Node::alone();
    let name = node.sandbox_name();
    for _ in 0..3 {
        node.reconcile(&node.base());
        assert_eq!(Vni::new(77), Some(node.vni));
        delete_sandbox(&name).unwrap();
        node.sandbox = netctl::kernel::Sandbox::create(&name).unwrap();
    }
}
