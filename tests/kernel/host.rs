//! The host's namespace, nftables, and the whole.

use std::collections::BTreeSet;

use netctl::kernel::{self, Error, Netns, nft};

use crate::world::{Container, MTU, Node, Space, net, sh, try_sh};

const SCRIPT: &str = "table inet netctl
delete table inet netctl
table inet netctl {
  set seen { type ipv4_addr; flags dynamic,timeout; timeout 1m; }
  chain in { type filter hook input priority 0; policy accept; counter; add @seen { ip saddr }; }
}
";

pub fn an_uplink_is_made_once_and_put_right() {
    let mut node = Node::alone();
    let uplink = node.uplink();
    let name = &uplink.name;
    let index = |node: &Node| node.space.sh(&format!("cat /sys/class/net/{name}/ifindex"));
    // Duplicate address detection ends by itself.
    let state =
        |node: &Node| node.space.sh(&format!("ip -o addr show dev {name}")).replace(" tentative", "");
    node.host.ensure_pair(&mut node.sandbox, &uplink).unwrap();
    let before = (index(&node), state(&node));
    for address in ["169.254.64.0/31", "fd6e:6574:6374:6c00::/127"] {
        assert!(before.1.contains(address), "{}", before.1);
    }
    node.host.ensure_pair(&mut node.sandbox, &uplink).unwrap();
    for damage in
        ["addr flush dev", "link set down dev", "link set mtu 1300 dev", "addr add 169.254.99.1/24 dev"]
    {
        node.space.sh(&format!("ip {damage} {name}"));
    }
    node.host.ensure_pair(&mut node.sandbox, &uplink).unwrap();
    assert_eq!((index(&node), state(&node)), before);
    // Something else bears the name: of this end, then of the other.
    node.space.sh(&format!("ip link del {name}"));
    node.space.sh(&format!("ip link add {name} mtu {MTU} type bridge"));
    node.host.ensure_pair(&mut node.sandbox, &uplink).unwrap();
    node.space.sh(&format!("ip link del {name}"));
    node.sh("ip link add up0 type bridge");
    node.host.ensure_pair(&mut node.sandbox, &uplink).unwrap();
    assert!(state(&node).contains("169.254.64.0/31"));
    assert!(node.sh("ip -o -d link show up0").contains("veth"));
}

pub fn uplinks_that_are_not_wanted_go_and_others_stay() {
    let mut node = Node::alone();
    let uplink = node.uplink();
    node.host.ensure_pair(&mut node.sandbox, &uplink).unwrap();
    node.space.sh("ip link add nc-0123456789ab type veth peer name other");
    node.space.sh("ip link add nc-mine type veth peer name mine");
    let errors = node.host.remove_pairs_but(&BTreeSet::from([uplink.name.clone()]));
    assert!(errors.is_empty(), "{errors:?}");
    let links = node.space.sh("ip -o link");
    assert!(links.contains(&uplink.name) && links.contains("nc-mine"), "{links}");
    assert!(!links.contains("nc-0123456789ab"), "{links}");
}

pub fn forwarding_keeps_router_advertisements() {
    let node = Node::alone();
    let get = |setting: &str| node.space.sh(&format!("sysctl -n net.{setting}")).trim().to_owned();
    node.space.sh("ip link add off type bridge");
    node.space.sh(
        "sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.ul.accept_ra=1 net.ipv6.conf.off.accept_ra=0",
    );
    node.host.forward(false, false).unwrap();
    assert_eq!((get("ipv4.ip_forward"), get("ipv6.conf.all.forwarding")), ("0".into(), "0".into()));
    node.host.forward(true, true).unwrap();
    assert_eq!((get("ipv4.ip_forward"), get("ipv6.conf.all.forwarding")), ("1".into(), "1".into()));
    assert_eq!(
        (get("ipv6.conf.ul.accept_ra"), get("ipv6.conf.off.accept_ra")),
        ("2".into(), "0".into())
    );
    node.host.forward(false, false).unwrap();
    assert_eq!(get("ipv4.ip_forward"), "1");
}

pub fn the_inventory_is_without_ours() {
    let mut node = Node::alone();
    let uplink = node.uplink();
    node.host.ensure_pair(&mut node.sandbox, &uplink).unwrap();
    node.space.sh("ip addr add 2001:db8:5::1/64 dev ul nodad");
    node.space.sh("ip route add 10.20.0.0/16 via 192.0.2.9");
    node.space.sh("ip route add default via 192.0.2.9");
    node.space.sh("ip route add blackhole 10.30.0.0/16");
    node.space.sh("ip route add unreachable 10.40.0.0/16");
    // Halves of a way out are one; all addresses for private use are not.
    for range in ["0.0.0.0/1", "128.0.0.0/1"] {
        node.space.sh(&format!("ip route add {range} via 192.0.2.9"));
    }
    for range in ["2000::/3", "fc00::/7"] {
        node.space.sh(&format!("ip route add {range} dev ul"));
    }
    let inventory = node.host.inventory().unwrap();
    let [interface] = inventory.interfaces.as_slice() else { panic!("{inventory:?}") };
    assert_eq!((interface.name.as_str(), interface.mtu, interface.up), ("ul", 1500, true));
    assert_eq!(interface.addresses, [net("192.0.2.1/24"), net("2001:db8:5::1/64")]);
    let expected =
        ["192.0.2.0/24", "10.20.0.0/16", "10.40.0.0/16", "2001:db8:5::/64", "fc00::/7"].map(net);
    assert_eq!(inventory.subnets, BTreeSet::from(expected));
    assert_eq!(inventory.gateways, ["192.0.2.9".parse().unwrap()].into());
}

pub fn a_table_is_installed_recognised_and_removed() {
    let space = Space::new("t");
    let netns = space.netns();
    space.sh("ip link set lo up");
    space.sh("nft add table inet other");
    assert_eq!(nft::fingerprint(&netns).unwrap(), None);
    nft::install(&netns, SCRIPT).unwrap();
    let installed = nft::fingerprint(&netns).unwrap();
    assert!(installed.is_some());
    // Counters and sets that fill themselves change nothing.
    space.sh("ping -c 1 -W 2 127.0.0.1");
    assert!(space.sh("nft list table inet netctl").contains("127.0.0.1"));
    assert_eq!(nft::fingerprint(&netns).unwrap(), installed);
    nft::install(&netns, SCRIPT).unwrap();
    assert_eq!(nft::fingerprint(&netns).unwrap(), installed);
    space.sh("nft add rule inet netctl in drop");
    assert_ne!(nft::fingerprint(&netns).unwrap(), installed);
    for _ in 0..2 {
        nft::remove(&netns).unwrap();
        assert_eq!(nft::fingerprint(&netns).unwrap(), None);
    }
    assert!(space.sh("nft list tables").contains("other"));
    assert_eq!(sh("nft list tables"), "");
}

pub fn a_script_with_an_error_changes_nothing() {
    let space = Space::new("t");
    let netns = space.netns();
    nft::install(&netns, SCRIPT).unwrap();
    let before = nft::fingerprint(&netns).unwrap();
    let script = "delete table inet netctl\nadd rule inet missing chain drop\n";
    let error = nft::install(&netns, script).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&space.name) && text.contains("missing"), "{text}");
    assert_eq!(nft::fingerprint(&netns).unwrap(), before);
}

pub fn cleaning_up_leaves_the_namespace_as_it_was() {
    let mut node = Node::alone();
    let look = |node: &Node| {
        ["ip -o link", "ip -o addr", "ip route", "ip -6 route", "nft list ruleset"]
            // Duplicate address detection ends by itself.
            .map(|line| node.space.sh(line).replace(" tentative", ""))
    };
    let names = || sh("ls /run/netns");
    node.space.sh("nft add table inet other");
    let before = look(&node);
    let container = Container::new(10);
    let inside = container.inside();
    node.plug(&container.plug).unwrap();
    node.reconcile(&node.base().union(&container.objects()).copied().collect());
    let uplink = node.uplink();
    node.host.ensure_pair(&mut node.sandbox, &uplink).unwrap();
    nft::install(node.host.netns(), SCRIPT).unwrap();
    sh("touch /run/netns/netctl-00000000aaaa /run/netns/netctl-mine");
    let sandbox = node.sandbox_name();
    assert_ne!(look(&node), before);
    let errors = kernel::cleanup(&mut node.host);
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(look(&node), before);
    assert_eq!(container.inside(), inside);
    assert!(!names().contains(&sandbox) && !names().contains("aaaa"), "{}", names());
    assert!(names().contains("netctl-mine") && names().contains(&container.space.name));
    sh("rm /run/netns/netctl-mine");
}

pub fn this_system_passes_the_probe() {
    let links = sh("ip -o link");
    kernel::probe().unwrap();
    assert_eq!(sh("ip -o link"), links);
    assert!(try_sh("nft list tables").1.is_empty());
    // Without privileges, all that is missing is named at once.
    let error = std::thread::spawn(|| {
        let (uid, none) = (nix::unistd::Uid::from_raw(65534), nix::unistd::Uid::from_raw(0));
        // SAFETY: this changes the calling thread's user only, and the thread ends with it.
        let result = unsafe {
            nix::libc::syscall(nix::libc::SYS_setresuid, uid.as_raw(), uid.as_raw(), none.as_raw())
        };
        assert_eq!(result, 0);
        kernel::probe().unwrap_err()
    });
    let error = error.join().unwrap();
    let text = error.to_string();
    assert!(matches!(error, Error::Probe(_)));
    assert!(text.contains("CAP_NET_ADMIN") && text.contains("CAP_SYS_ADMIN"), "{text}");
    assert!(Netns::current().is_ok());
}
