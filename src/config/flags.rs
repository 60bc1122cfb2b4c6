//! The agent's command line.

use std::path::PathBuf;

use super::source::Text;

const EXAMPLES: &str = "\
Every setting can be given as a flag, in the environment as NETCTLD_<NAME> (NETCTLD_TUNNEL_PORT, \
NETCTLD_STORE_ENDPOINTS; lists with commas), or in the file; a flag wins over the environment, the \
environment over the file. Durations are numbers with ms, s, m or h.

Examples:
  One machine, everything by default:
    netctld

  A node of a cluster:
    netctld --underlay eth1 --store-kind etcd \\
      --store-endpoints https://10.0.0.1:2379,https://10.0.0.2:2379 \\
      --store-ca /etc/netctl/ca.pem --store-cert /etc/netctl/node.pem --store-key /etc/netctl/node.key

  What would be used, as a file:
    netctld --underlay 192.168.7.0/24 --check-config > /etc/netctl/netctld.toml

  Remove everything that netctl made in this machine's kernel, with the agent stopped:
    netctld --cleanup";

/// The agent of netctl: overlay networks for the containers of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Parser)]
#[command(name = "netctld", version, after_long_help = EXAMPLES)]
#[command(after_help = "Every setting can also be given as NETCTLD_<NAME> or in the file; see --help.")]
pub struct Flags {
    /// The configuration file [default: /etc/netctl/netctld.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Remove all kernel objects of netctl on this node, and exit; not where an agent answers at the
    /// socket: stop it first
    #[arg(long)]
    pub cleanup: bool,
    /// Check the configuration, print what is in effect as TOML, and exit
    #[arg(long, conflicts_with = "cleanup")]
    pub check_config: bool,

    /// This node's name, unique in the cluster [default: the host name in lower case]
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// The directory of what must outlive a reboot [default: /var/lib/netctl]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<String>,
    /// The directory of what need not [default: /run/netctl]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<String>,
    /// The API's socket [default: <run-dir>/netctl.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<String>,
    /// The group (name or number) that may use the socket beside root [default: none]
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,
    /// Where the metrics can also be had over TCP, without a question who asks [default: nowhere]
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<String>,
    /// Where the tunnels run: an address, an interface or a range of this machine [default: its
    /// only address that is neither loopback nor link-local]
    #[arg(long, value_name = "ADDRESS|INTERFACE|CIDR")]
    underlay: Option<String>,
    /// The UDP port of the tunnels; the same on all nodes [default: 4789]
    #[arg(long, value_name = "PORT")]
    tunnel_port: Option<String>,
    /// Where networks get their IPv4 subnet from by default [default: 10.128.0.0/9]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pools: Option<Vec<String>>,
    /// The prefix length of these subnets [default: 24]
    #[arg(long, value_name = "LENGTH")]
    pool_prefix: Option<String>,
    /// Where networks get their IPv6 subnet from by default [default: fd6e:6574:7063::/48]
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pools6: Option<Vec<String>>,
    /// The prefix length of these subnets [default: 64]
    #[arg(long, value_name = "LENGTH")]
    pool6_prefix: Option<String>,
    /// The lowest VNI that networks get by default [default: 4097]
    #[arg(long, value_name = "VNI")]
    vni_first: Option<String>,
    /// The highest [default: 16777215]
    #[arg(long, value_name = "VNI")]
    vni_last: Option<String>,
    /// How long this node counts as alive without a sign of it: 2s to 5m [default: 10s]
    #[arg(long, value_name = "DURATION")]
    lease: Option<String>,
    /// How long a freed address rests before it is given again: 0s to 1h [default: 1m]
    #[arg(long, value_name = "DURATION")]
    rest: Option<String>,
    /// At how many per cent a network's use is told: 1 to 100 [default: 80]
    #[arg(long, value_name = "PERCENT")]
    address_warning: Option<String>,
    /// The same, told as urgent [default: 95]
    #[arg(long, value_name = "PERCENT")]
    address_alarm: Option<String>,
    /// How often the kernel is compared with what it should be: 1s to 10m [default: 10s]
    #[arg(long, value_name = "DURATION")]
    resync: Option<String>,
    /// What balances the connections of services: auto, ipvs, ebpf or none (this node balances
    /// nothing) [default: auto, which is ebpf where the kernel takes its programs, else ipvs]
    #[arg(long, value_name = "ENGINE")]
    lb: Option<String>,
    /// How many connections ebpf balances at once, over all networks; when there are more the oldest
    /// are forgotten. Each takes some 300 bytes [default: 131072]
    #[arg(long, value_name = "NUMBER")]
    lb_connections: Option<String>,
    /// Whether ebpf also carries packets between containers past the kernel's stack where it can: true
    /// or false [default: true]
    #[arg(long, value_name = "BOOL")]
    fast_path: Option<String>,
    /// Whether ebpf also has the sockets of containers asked: a service that one connects to is a backend
    /// from there on, and costs nothing for each packet: true or false [default: false]
    #[arg(long, value_name = "BOOL")]
    socket_lb: Option<String>,
    /// The control group (cgroup2) whose processes have the sockets that are asked, with all below it
    /// [default: where cgroup2 is mounted]
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,
    /// As whom the commands of health checks run: a name or a number [default: nobody]
    #[arg(long, value_name = "USER")]
    health_user: Option<String>,
    /// What is logged: error, warn, info, debug, trace, also by module [default: info]
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// The form of the log's lines: text or json [default: text]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Free text about this node; can be repeated
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Option<Vec<String>>,

    /// The domain below which the names of services and endpoints are [default: netctl.internal]
    #[arg(long, value_name = "DOMAIN", help_heading = "Names")]
    dns_domain: Option<String>,
    /// For how long clients may keep an answer: 0s to 1h [default: 5s]
    #[arg(long, value_name = "DURATION", help_heading = "Names")]
    dns_ttl: Option<String>,
    /// The link-local address at which names are answered in every network, beside its gateways, or
    /// none [default: 169.254.53.53]
    #[arg(long, value_name = "ADDRESS", help_heading = "Names")]
    dns_address: Option<String>,
    /// The loopback address at which this machine itself finds names below the domain, or none
    /// [default: none]
    #[arg(long, value_name = "ADDRESS", help_heading = "Names")]
    dns_host: Option<String>,
    /// How many packets a second one container may send to the name server, 0 for any number; what the kernel answers
    /// does not count [default: 10000]
    #[arg(long, value_name = "N", help_heading = "Names")]
    dns_rate: Option<String>,
    /// Who is asked for all other names [default: the servers of /etc/resolv.conf, as it is then]
    #[arg(long, value_name = "ADDRESS[:PORT]", value_delimiter = ',', help_heading = "Names")]
    dns_upstreams: Option<Vec<String>>,
    /// Who is asked for names below a domain; can be repeated [default: nobody else]
    #[arg(long, value_name = "DOMAIN=ADDRESS[:PORT]", value_delimiter = ',', help_heading = "Names")]
    dns_forward: Option<Vec<String>>,

    /// Where the cluster's state is: embedded (a file, one machine) or etcd [default: embedded]
    #[arg(long, value_name = "KIND", help_heading = "Store")]
    store_kind: Option<String>,
    /// The embedded store's file [default: <state-dir>/store.redb]
    #[arg(long, value_name = "FILE", help_heading = "Store")]
    store_path: Option<String>,
    /// The etcd servers' URLs
    #[arg(long, value_name = "URL", value_delimiter = ',', help_heading = "Store")]
    store_endpoints: Option<Vec<String>>,
    /// What our keys in etcd begin with [default: netctl/]
    #[arg(long, value_name = "PREFIX", help_heading = "Store")]
    store_prefix: Option<String>,
    /// The CA of the etcd servers, PEM [default: the system's]
    #[arg(long, value_name = "FILE", help_heading = "Store")]
    store_ca: Option<String>,
    /// Our certificate for etcd, PEM
    #[arg(long, value_name = "FILE", help_heading = "Store")]
    store_cert: Option<String>,
    /// The key of our certificate, PEM
    #[arg(long, value_name = "FILE", help_heading = "Store")]
    store_key: Option<String>,
    /// Our user in etcd
    #[arg(long, value_name = "USER", help_heading = "Store")]
    store_user: Option<String>,
    /// The file that has the user's password
    #[arg(long, value_name = "FILE", help_heading = "Store")]
    store_password_file: Option<String>,
    /// How long a call of the store may take: 100ms to 2s [default: 1500ms]
    #[arg(long, value_name = "DURATION", help_heading = "Store")]
    store_timeout: Option<String>,
}

impl Flags {
    /// The socket that was given.
    pub fn socket(&self) -> Option<&str> {
        self.socket.as_deref()
    }

    /// The settings that were given, by key.
    pub(super) fn given(&self) -> impl Iterator<Item = (&'static str, Text)> {
        let one = |key, value: &Option<String>| (key, value.clone().map(Text::One));
        let many = |key, value: &Option<Vec<String>>| (key, value.clone().map(Text::Many));
        let all = [
            one("node", &self.node),
            one("state_dir", &self.state_dir),
            one("run_dir", &self.run_dir),
            one("socket", &self.socket),
            one("socket_group", &self.socket_group),
            one("metrics", &self.metrics),
            one("underlay", &self.underlay),
            one("tunnel_port", &self.tunnel_port),
            many("pools", &self.pools),
            one("pool_prefix", &self.pool_prefix),
            many("pools6", &self.pools6),
            one("pool6_prefix", &self.pool6_prefix),
            one("vni_first", &self.vni_first),
            one("vni_last", &self.vni_last),
            one("lease", &self.lease),
            one("rest", &self.rest),
            one("address_warning", &self.address_warning),
            one("address_alarm", &self.address_alarm),
            one("resync", &self.resync),
            one("lb", &self.lb),
            one("lb_connections", &self.lb_connections),
            one("fast_path", &self.fast_path),
            one("socket_lb", &self.socket_lb),
            one("cgroup", &self.cgroup),
            one("health_user", &self.health_user),
            one("log", &self.log),
            one("log_format", &self.log_format),
            many("labels", &self.labels),
            one("dns.domain", &self.dns_domain),
            one("dns.ttl", &self.dns_ttl),
            one("dns.address", &self.dns_address),
            one("dns.host", &self.dns_host),
            one("dns.rate", &self.dns_rate),
            many("dns.upstreams", &self.dns_upstreams),
            many("dns.forward", &self.dns_forward),
            one("store.kind", &self.store_kind),
            one("store.path", &self.store_path),
            many("store.endpoints", &self.store_endpoints),
            one("store.prefix", &self.store_prefix),
            one("store.ca", &self.store_ca),
            one("store.cert", &self.store_cert),
            one("store.key", &self.store_key),
            one("store.user", &self.store_user),
            one("store.password_file", &self.store_password_file),
            one("store.timeout", &self.store_timeout),
        ];
        all.into_iter().filter_map(|(key, text)| Some((key, text?)))
    }
}
