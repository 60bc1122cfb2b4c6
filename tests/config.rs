//! The agent's configuration, from flags, environment and file.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser as _;
use netctl::config::{Config, ConfigError, EngineChoice, Flags, StoreConfig};

/// Loads with flags, variables and a file's text. The node is named, so that the host's name does
/// not matter.
fn load(flags: &[&str], variables: &[(&str, &str)], file: &str) -> Result<Config, ConfigError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.toml");
    std::fs::write(&path, file).unwrap();
    let path = path.to_str().unwrap().to_owned();
    let mut all = vec!["netctld", "--config", &path];
    all.extend(flags);
    if !flags.contains(&"--node") && !file.contains("node =") {
        all.extend(["--node", "n1"]);
    }
    let variables = variables.iter().map(|(key, value)| (OsString::from(key), OsString::from(value)));
    Config::load(&Flags::parse_from(all), variables)
}

fn errors(flags: &[&str], variables: &[(&str, &str)], file: &str) -> String {
    load(flags, variables, file).unwrap_err().to_string()
}

#[test]
fn the_defaults_are_the_documented_ones() {
    let config = load(&[], &[], "").unwrap();
    assert_eq!(config.node.as_str(), "n1");
    assert_eq!(config.state_dir, PathBuf::from("/var/lib/netctl"));
    assert_eq!(config.socket, PathBuf::from("/run/netctl/netctl.sock"));
    assert_eq!((config.socket_group, config.metrics), (None, None));
    let user = config.health_user;
    assert_eq!((user.name.as_str(), user.uid.as_raw()), ("nobody", 65534));
    assert_eq!(config.tunnel_port, 4789);
    assert_eq!(config.pools[0].to_string(), "10.128.0.0/9");
    assert_eq!((config.pool_prefix, config.pool6_prefix), (24, 64));
    assert_eq!((config.vni_first.number(), config.vni_last.number()), (4097, 16_777_215));
    assert_eq!(config.lease, Duration::from_secs(10));
    assert_eq!(config.rest, Duration::from_secs(60));
    assert_eq!(config.resync, Duration::from_secs(10));
    let store = StoreConfig::Embedded { path: "/var/lib/netctl/store.redb".into() };
    assert_eq!(config.store, store);
}

#[test]
fn a_flag_wins_over_the_environment_and_that_over_the_file() {
    let file = "tunnel_port = 1\nlease = \"3s\"\nrest = \"4s\"";
    let variables = [("NETCTLD_TUNNEL_PORT", "2"), ("NETCTLD_LEASE", "5s")];
    let config = load(&["--tunnel-port", "3"], &variables, file).unwrap();
    assert_eq!(config.tunnel_port, 3);
    assert_eq!(config.lease, Duration::from_secs(5));
    assert_eq!(config.rest, Duration::from_secs(4));
}

#[test]
fn the_metrics_are_served_where_every_layer_can_say() {
    let metrics = |flags: &[&str], variables: &[(&str, &str)], file: &str| {
        load(flags, variables, file).unwrap().metrics.map(|address| address.to_string())
    };
    let (file, variables) = ("metrics = \"[::1]:1\"", [("NETCTLD_METRICS", "127.0.0.1:2")]);
    assert_eq!(metrics(&[], &[], file).as_deref(), Some("[::1]:1"));
    assert_eq!(metrics(&[], &variables, file).as_deref(), Some("127.0.0.1:2"));
    assert_eq!(metrics(&["--metrics", "0.0.0.0:3"], &variables, file).as_deref(), Some("0.0.0.0:3"));
}

#[test]
fn what_balances_is_chosen_in_every_layer_and_what_is_not_there_is_refused() {
    let lb = |flags: &[&str], variables: &[(&str, &str)], file: &str| {
        load(flags, variables, file).unwrap().lb.engine
    };
    assert_eq!(lb(&[], &[], ""), EngineChoice::Auto);
    let (file, variables) = ("lb = \"ipvs\"", [("NETCTLD_LB", "none")]);
    assert_eq!(lb(&[], &[], file), EngineChoice::Ipvs);
    assert_eq!(lb(&[], &variables, file), EngineChoice::None);
    assert_eq!(lb(&["--lb", "auto"], &variables, file), EngineChoice::Auto);
    assert_eq!(lb(&["--lb", "ebpf"], &variables, file), EngineChoice::Ebpf);
    assert!(errors(&[], &[], "lb = \"haproxy\"").contains("give auto, ipvs, ebpf or none"));
    assert_eq!(load(&[], &[], "").unwrap().lb.connections, 131_072);
    assert_eq!(load(&[], &[], "lb_connections = 5000").unwrap().lb.connections, 5000);
    for wrong in ["1023", "many", "-1"] {
        let refused = errors(&[&format!("--lb-connections={wrong}")], &[], "");
        assert!(refused.contains("is not a number from 1024 to 16777216"), "{refused}");
    }
}

#[test]
fn sockets_are_asked_only_where_that_is_said_and_only_by_ebpf() {
    let lb = |flags: &[&str], file: &str| load(flags, &[], file).unwrap().lb;
    assert_eq!((lb(&[], "").sockets, lb(&[], "").cgroup), (false, None));
    let file = "socket_lb = true\ncgroup = \"/sys/fs/cgroup/pods\"";
    let asked = lb(&[], file);
    assert!(asked.sockets);
    assert_eq!(asked.cgroup.as_deref(), Some(std::path::Path::new("/sys/fs/cgroup/pods")));
    assert!(!lb(&["--socket-lb", "false"], file).sockets);
    assert!(lb(&["--socket-lb=true", "--lb=ebpf"], "").sockets);
    for engine in ["ipvs", "none"] {
        let refused = errors(&["--socket-lb=true", &format!("--lb={engine}")], &[], "");
        assert!(refused.contains("only ebpf asks sockets: give lb = \"ebpf\" or \"auto\""), "{refused}");
    }
    assert!(errors(&["--socket-lb=maybe"], &[], "").contains("neither true nor false"));
    assert!(errors(&["--cgroup=pods"], &[], "").contains("pods"), "it begins with a slash");
}

#[test]
fn the_environment_can_name_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.toml");
    std::fs::write(&path, "node = \"from-file\"").unwrap();
    let variables = [(OsString::from("NETCTLD_CONFIG"), path.into_os_string())];
    let config = Config::load(&Flags::default(), variables).unwrap();
    assert_eq!(config.node.as_str(), "from-file");
}

#[test]
fn a_named_file_must_exist() {
    let flags = Flags::parse_from(["netctld", "--config", "/nowhere/c.toml", "--node", "n1"]);
    let error = Config::load(&flags, []).unwrap_err().to_string();
    assert!(error.starts_with("/nowhere/c.toml: cannot be read"), "{error}");
}

#[test]
fn every_mistake_is_named_at_once_with_its_place() {
    let file = "tunnel_port = 70000\n\nlease = \"1s\"\npools = [\"10.0.0.0/8\", \"10.9.0.0/16\"]\n\
                [store]\nkind = \"paper\"\n";
    let error = errors(&["--resync", "never"], &[("NETCTLD_VNI_FIRST", "0")], file);
    let lines: Vec<&str> = error.lines().collect();
    for (place, part) in [
        ("c.toml:1: tunnel_port:", "70000"),
        ("c.toml:3: lease:", "2s to 5m"),
        ("c.toml:4: pools:", "overlap"),
        ("c.toml:6: store.kind:", "paper"),
        ("--resync:", "never"),
        ("NETCTLD_VNI_FIRST:", "1 to 16777215"),
    ] {
        assert!(lines.iter().any(|l| l.contains(place) && l.contains(part)), "{place}: {error}");
    }
    assert_eq!(lines.len(), 6, "{error}");
}

#[test]
fn unknown_keys_are_refused_with_a_suggestion() {
    let file = "tunel_port = 1\nzebra = 2\n[store]\nendpoint = []\n[stor]\n";
    let error = errors(&[], &[("NETCTLD_LEESE", "3s")], file);
    for (place, meant) in [
        ("c.toml:1:", "did you mean tunnel_port?"),
        ("c.toml:4:", "did you mean store.endpoints?"),
        ("c.toml:5:", "did you mean store?"),
        ("NETCTLD_LEESE:", "did you mean NETCTLD_LEASE?"),
    ] {
        let found = error.lines().any(|line| line.contains(place) && line.contains(meant));
        assert!(found, "{place}: {error}");
    }
    let zebra = error.lines().find(|line| line.contains("zebra")).unwrap();
    assert!(!zebra.contains("did you mean"), "{error}");
}

#[test]
fn toml_that_cannot_be_read_is_named_by_its_line() {
    let error = errors(&[], &[], "log = \"info\"\nnode = = 1\n");
    assert!(error.contains("c.toml:2:"), "{error}");
}

#[test]
fn a_value_of_another_type_is_refused() {
    for file in [
        "log = true",
        "pools = \"10.0.0.0/8\"",
        "labels = [\"a\"]",
        "store = 1",
        "lease = 1.5",
        "fast_path = \"yes\"",
        "fast_path = 1",
    ] {
        let error = errors(&[], &[], file);
        assert!(error.contains("c.toml:1:"), "{file}: {error}");
    }
}

#[test]
fn values_that_do_not_fit_each_other_are_refused() {
    for (file, part) in [
        ("vni_first = 10\nvni_last = 9", "c.toml:2: vni_last:"),
        ("pools = [\"10.9.0.0/25\"]", "holds no /24"),
        ("pools6 = [\"10.9.0.0/16\"]", "not an IPv6 range"),
        ("pools = [\"10.9.0.1/16\"]", "did you mean 10.9.0.0/16"),
        ("state_dir = \"here\"", "absolute"),
        ("lease = \"2500ms\"", "whole seconds"),
        ("log = \"info,=x=y\"", "c.toml:1: log:"),
        ("socket_group = \"no-such-group-here\"", "no group"),
        ("health_user = \"no-such-user-here\"", "no user"),
        ("metrics = \"9980\"", "c.toml:1: metrics:"),
        ("metrics = \"localhost:9980\"", "give such as 127.0.0.1:9980"),
        ("metrics = \"127.0.0.1:0\"", "127.0.0.1:9980"),
        ("metrics = \"127.0.0.1:70000\"", "127.0.0.1:9980"),
        ("lb = \"ipv\"", "c.toml:1: lb:"),
        ("node = \"Not_A_Host!\"", "node name"),
        ("underlay = \"a/b\"", "neither an address"),
        ("[dns]\ndomain = \"a..b\"", "c.toml:2: dns.domain: \"a..b\" is not a domain"),
        ("[dns]\nttl = \"2h\"", "0s to 1h"),
        ("[dns]\naddress = \"10.0.0.1\"", "169.254.128.0 to 169.254.254.255, or none"),
        ("[dns]\naddress = \"169.254.64.1\"", "cannot be used"),
        ("[dns]\nhost = \"10.0.0.1\"", "dns.host: \"10.0.0.1\" is not a loopback address"),
        ("[dns]\nhost = \"127.0.0.53\"", "127.0.0.53 is systemd-resolved's own: give another"),
        ("[dns]\nhost = \"127.0.0.54\"", "127.0.0.54 is systemd-resolved's own"),
        ("[dns]\nrate = -1", "1 to 1000000, or 0"),
        ("[dns]\nupstreams = [\"dns.example\"]", "is not ADDRESS[:PORT]"),
        ("[dns]\nforward = [\"corp\"]", "a table of lists"),
        ("[dns]\nforward = { corp = [\"a\"] }", "\"a\" is not ADDRESS[:PORT]"),
        ("[dns]\nforward = { \"a b\" = \"192.0.2.1\" }", "\"a b\" is not a domain"),
        ("[dns]\ndomian = \"a\"", "did you mean dns.domain?"),
        ("[store]\nendpoints = [\"http://a:1\"]", "kind of store is embedded"),
        ("[store]\nkind = \"etcd\"", "needs store.endpoints"),
        ("[store]\nkind = \"etcd\"\nendpoints = [\"a:1\"]", "http://HOST:PORT"),
        ("[store]\nkind = \"etcd\"\nendpoints = [\"http://a:1\", \"https://b:1\"]", "some https"),
        (
            "[store]\nkind = \"etcd\"\nendpoints = [\"http://a:1\"]\nca = \"/dev/null\"",
            "uses no certificate",
        ),
        (
            "[store]\nkind = \"etcd\"\nendpoints = [\"https://a:1\"]\ncert = \"/dev/null\"",
            "store.key is needed",
        ),
        (
            "[store]\nkind = \"etcd\"\nendpoints = [\"https://a:1\"]\nuser = \"u\"",
            "password_file is needed",
        ),
        ("[store]\nkind = \"etcd\"\nendpoints = [\"https://a:1\"]\nca = \"/no/ca\"", "cannot be read"),
        ("[store]\nkind = \"etcd\"\nendpoints = [\"https://a:1\"]\ntimeout = \"3s\"", "100ms to 2s"),
        ("[store]\nkind = \"etcd\"\nendpoints = [\"https://a:1\"]\nprefix = \"x\"", "ends with '/'"),
    ] {
        let error = errors(&[], &[], file);
        assert!(error.contains(part), "{file}: {error}");
        assert_eq!(error.lines().count(), 1, "{file}: {error}");
    }
}

#[test]
fn lists_and_labels_come_from_every_layer() {
    let file = "pools = [\"10.1.0.0/16\", \"10.2.0.0/16\"]\n[labels]\nrack = \"7\"\nrow = 3\n";
    let config = load(&[], &[], file).unwrap();
    assert_eq!(config.pools.len(), 2);
    assert_eq!(config.labels["row"], "3");
    let variables = [("NETCTLD_POOLS", "10.3.0.0/16, 10.4.0.0/16"), ("NETCTLD_LABELS", "a=b,c=d=e")];
    let config = load(&[], &variables, file).unwrap();
    assert_eq!(config.pools[1].to_string(), "10.4.0.0/16");
    assert_eq!((config.labels.len(), config.labels["c"].as_str()), (2, "d=e"));
    let flags = ["--pools", "10.5.0.0/16,10.6.0.0/16", "--label", "x=y"];
    let config = load(&flags, &variables, file).unwrap();
    assert_eq!(config.pools[0].to_string(), "10.5.0.0/16");
    assert_eq!(config.labels["x"], "y");
}

#[test]
fn name_servers_come_from_every_layer() {
    let file = "[dns]\ndomain = \"corp.example.\"\nttl = \"30s\"\naddress = \"none\"\nrate = 0\n\
                upstreams = [\"192.0.2.1\", \"[2001:db8::1]:5353\"]\n\
                forward = { consul = [\"127.0.0.1:8600\", \"127.0.0.2\"], \"lab.corp\" = \"192.0.2.9\" }";
    let dns = load(&[], &[], file).unwrap().dns;
    assert_eq!((dns.domain.to_string(), dns.ttl.as_secs()), ("corp.example.".to_owned(), 30));
    assert_eq!((dns.address, dns.rate), (None, 0));
    assert_eq!(dns.upstreams[0].to_string(), "192.0.2.1:53");
    assert_eq!(dns.upstreams[1].to_string(), "[2001:db8::1]:5353");
    let forward: Vec<String> = dns
        .forward
        .iter()
        .map(|(domain, servers)| {
            let servers: Vec<String> = servers.iter().map(|server| server.to_string()).collect();
            format!("{domain} {}", servers.join(" "))
        })
        .collect();
    assert_eq!(forward, ["lab.corp. 192.0.2.9:53", "consul. 127.0.0.1:8600 127.0.0.2:53"]);
    let variables = [("NETCTLD_DNS_FORWARD", "a=192.0.2.1,a=192.0.2.2:54"), ("NETCTLD_DNS_RATE", "7")];
    let flags = ["--dns-domain", "x.example", "--dns-forward", "b=192.0.2.3"];
    let dns = load(&[], &variables, file).unwrap().dns;
    assert_eq!((dns.forward.values().next().unwrap().len(), dns.rate), (2, 7));
    let dns = load(&flags, &variables, file).unwrap().dns;
    assert_eq!((dns.forward.len(), dns.domain.to_string()), (1, "x.example.".to_owned()));
    let default = load(&[], &[], "").unwrap().dns;
    assert_eq!(default.address.unwrap().to_string(), "169.254.53.53");
    assert_eq!((default.domain.to_string(), default.rate), ("netctl.internal.".to_owned(), 10_000));
}

#[test]
fn what_is_printed_gives_the_same_configuration_again() {
    let etcd = "underlay = \"192.0.2.0/24\"\nsocket_group = \"0\"\nrest = \"90s\"\npools6 = []\n\
                metrics = \"[::1]:9980\"\n\
                log_format = \"json\"\n[dns]\naddress = \"none\"\nupstreams = [\"192.0.2.1\"]\n\
                forward = { corp = [\"192.0.2.2\"] }\n[labels]\n\"a.b\" = \"c \\\"d\\\"\"\n[store]\nkind = \"etcd\"\n\
                endpoints = [\"https://a:1\", \"https://[::1]:2\"]\ncert = \"/dev/null\"\n\
                key = \"/dev/null\"\nca = \"/dev/null\"\nuser = \"u\"\npassword_file = \"/dev/null\"";
    for file in ["", etcd] {
        let config = load(&[], &[], file).unwrap();
        let again = load(&[], &[], &config.to_toml()).unwrap();
        assert_eq!(again, config, "{}", config.to_toml());
    }
}

#[test]
fn the_help_names_every_flag_with_its_default() {
    let mut command = <Flags as clap::CommandFactory>::command();
    command.clone().debug_assert();
    let help = command.render_long_help().to_string();
    for part in ["--underlay", "[default: 4789]", "--store-endpoints", "--check-config", "Examples:"] {
        assert!(help.contains(part), "{part}: {help}");
    }
}
