//! Compose files, as far as they say which addresses a stack needs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::IpNetwork;

use super::Problem;
use super::fields::{Field, Reader};
use super::variables::Variables;
use super::yaml::{self, Map, Value};
use crate::model::subnet::overlap;
use crate::model::{Name, Subnet};

/// How large a file may be, in bytes.
pub const MAX_BYTES: usize = 4 << 20;

/// The network of a service that names none.
const DEFAULT: &str = "default";
/// Networks of Docker's that are on each machine for itself.
const LOCAL: [&str; 3] = ["host", "none", "bridge"];

/// What a Compose file deploys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    /// Its name.
    pub name: String,
    /// Its services, by name.
    pub services: Vec<Service>,
    /// The networks it names, and the default one, by key.
    pub networks: BTreeMap<String, Network>,
}

/// A number of containers of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name in the stack.
    pub name: String,
    /// The keys of its networks.
    pub networks: BTreeSet<String>,
    /// How many containers there are.
    pub mode: Mode,
    /// Whether it has an address of its own on each network, beside its containers'.
    pub vip: bool,
    /// How its containers are replaced.
    pub update: Update,
}

/// How many containers a service has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// So many.
    Replicated(u32),
    /// One on each node.
    Global,
    /// So many at a time, that end by themselves.
    ReplicatedJob(u32),
    /// One on each node, that ends by itself.
    GlobalJob,
}

impl Mode {
    /// Whether it ends by itself: it is not updated then, and nobody connects to it.
    pub fn is_job(self) -> bool {
        match self {
            Self::Replicated(_) | Self::Global => false,
            Self::ReplicatedJob(_) | Self::GlobalJob => true,
        }
    }
}

/// How the containers of a service are replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Update {
    /// Whether a new container starts before the old one stops.
    pub start_first: bool,
    /// How many at a time; 0: all.
    pub parallelism: u32,
}

/// A network that a stack uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Its name in the cluster.
    pub name: String,
    /// Who makes it.
    pub origin: Origin,
}

/// Who deploys a file: they do not take all of it the same.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Tool {
    /// Nobody said so: what they take differently is a problem.
    #[default]
    Any,
    /// `docker stack deploy`: it passes over `network_mode` and `profiles`.
    Stack,
    /// `docker compose`: of services with profiles it starts those of which one is active.
    Compose {
        /// Those that are; `*` is all.
        profiles: BTreeSet<String>,
    },
}

/// Who makes a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Somebody else: it must be there.
    External,
    /// The stack, unless it is there.
    Stack {
        /// Its subnets; none: they come from the default pool.
        subnets: Vec<Subnet>,
        /// Whether the default pool gives an IPv6 subnet too.
        ipv6: bool,
    },
    /// Each machine for itself: it takes none of the cluster's addresses.
    Machine,
}

/// What a stack is called.
#[derive(Debug, Clone, Copy)]
pub enum StackName<'a> {
    /// So, whatever the file says.
    Given(&'a str),
    /// So, when the file says nothing: any text, of which the characters that a name may have are
    /// taken.
    OrElse(&'a str),
}

/// Whether a text can be the name of a stack.
///
/// # Errors
/// Says what a name may be.
pub fn check_stack_name(text: &str) -> Result<String, String> {
    let outer = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if text.starts_with(outer) && text.chars().all(|c| outer(c) || matches!(c, '-' | '_')) {
        return Ok(text.to_owned());
    }
    Err("cannot be a stack's name: use a-z, 0-9, '-' and '_', a letter or digit first".to_owned())
}

/// Reads a Compose file.
///
/// Keys that do not change how many addresses are needed are passed over. Variables are filled in
/// where a value is used.
///
/// # Errors
/// Everything in the file that cannot be used, in the order of the file; 100 at most.
pub fn read(
    text: &str,
    file: &str,
    name: StackName<'_>,
    variables: &Variables,
    tool: &Tool,
) -> Result<Stack, Vec<Problem>> {
    let mut reader = Reader { file, variables, tool, problems: Vec::new() };
    if text.len() > MAX_BYTES {
        return Err(vec![whole(file, &format!("is larger than {} MiB", MAX_BYTES >> 20))]);
    }
    let root = yaml::read(text, file, &mut reader.problems);
    let stack = root.filter(|root| !matches!(root.value, Value::Null)).and_then(|root| {
        let field = Field::root(&root);
        let map = reader.map(&field)?;
        reader.stack(&field, map, name)
    });
    let mut problems = reader.problems;
    problems.sort_by_key(|problem| (problem.line, problem.column));
    match stack {
        Some(stack) if problems.is_empty() => Ok(stack),
        None if problems.is_empty() => Err(vec![whole(file, "is empty: give a Compose file")]),
        Some(_) | None => Err(problems),
    }
}

/// A problem with a file as a whole.
fn whole(file: &str, text: &str) -> Problem {
    let (file, text) = (file.to_owned(), text.to_owned());
    Problem { file, line: 1, column: 1, path: String::new(), text }
}

impl Reader<'_> {
    fn stack(&mut self, root: &Field<'_>, map: &Map, name: StackName<'_>) -> Option<Stack> {
        self.refuse_others(root, map, "include");
        let name = self.stack_name(root, map, name);
        // Without a name the rest is read all the same, for what is wrong there.
        let prefix = name.as_deref().unwrap_or("stack");
        let declared = self.section(root, map, "networks");
        let mut networks = BTreeMap::new();
        let mut keys = BTreeSet::from([DEFAULT]);
        if let Some((field, map)) = &declared {
            for (key, entry) in *map {
                keys.insert(key);
                if let Some(network) = self.network(&field.entry(key, entry), key, prefix) {
                    networks.insert(key.to_string(), network);
                }
            }
        }
        if !declared.is_some_and(|(_, map)| map.contains_key(DEFAULT)) {
            networks.insert(DEFAULT.to_owned(), Network::plain(format!("{prefix}_{DEFAULT}")));
        }
        let services = self.services(root, map, &keys)?;
        Some(Stack { name: name?, services, networks })
    }

    fn stack_name(&mut self, root: &Field<'_>, map: &Map, name: StackName<'_>) -> Option<String> {
        let fallback = match name {
            StackName::Given(name) => return Some(name.to_owned()),
            StackName::OrElse(fallback) => fallback,
        };
        if let Some(field) = root.get(map, "name") {
            return self.parsed(&field, "a name", check_stack_name);
        }
        let name = fallback.to_ascii_lowercase();
        let name = name.replace(|c: char| !matches!(c, 'a'..='z' | '0'..='9' | '-' | '_'), "");
        let name = name.trim_start_matches(['-', '_']);
        if name.is_empty() {
            self.problem(root, "no name follows from where the file is: give it one with `name:`");
            return None;
        }
        Some(name.to_owned())
    }

    /// A key that brings in what stands in other files, which are not read.
    fn refuse_others(&mut self, field: &Field<'_>, map: &Map, key: &str) {
        if let Some(field) = field.get(map, key) {
            self.problem(&field, "is not followed here: give what `docker compose config` prints");
        }
    }

    fn network(&mut self, field: &Field<'_>, key: &str, stack: &str) -> Option<Network> {
        if matches!(field.node.value, Value::Null) {
            return self.named(field, Network::plain(format!("{stack}_{key}")));
        }
        let map = self.map(field)?;
        let given = field.get(map, "name").map(|field| self.text(&field));
        let (external, old_name) = match field.get(map, "external") {
            None => (false, None),
            Some(field) => self.external(&field)?,
        };
        let driver = field.get(map, "driver").and_then(|field| self.text(&field));
        let ipv6 = field.get(map, "enable_ipv6").and_then(|field| self.flag(&field));
        let subnets = self.subnets(field, map);
        if given.is_some() && old_name.is_some() {
            self.problem(field, "has two names: give `name` and `external: true`");
        }
        let name = match given.unwrap_or(old_name) {
            Some(name) => name,
            None if external => key.to_owned(),
            None => format!("{stack}_{key}"),
        };
        let driver = driver.unwrap_or_default();
        let local = if external { LOCAL.contains(&name.as_str()) } else { is_local(&driver) };
        let origin = match (local, external) {
            (true, _) => Origin::Machine,
            (false, true) => Origin::External,
            (false, false) => Origin::Stack { subnets, ipv6: ipv6.unwrap_or_default() },
        };
        self.named(field, Network { name, origin })
    }

    /// `external`: a truth value or, in old files, a map with the name.
    fn external(&mut self, field: &Field<'_>) -> Option<(bool, Option<String>)> {
        let Value::Map(map) = &field.node.value else { return Some((self.flag(field)?, None)) };
        let name = field.get(map, "name").and_then(|field| self.text(&field));
        Some((true, name))
    }

    /// The network, if it can have its name.
    fn named(&mut self, field: &Field<'_>, network: Network) -> Option<Network> {
        if network.origin != Origin::Machine
            && let Err(error) = Name::from_str(&network.name)
        {
            self.problem(field, error.to_string());
            return None;
        }
        Some(network)
    }

    fn subnets(&mut self, field: &Field<'_>, map: &Map) -> Vec<Subnet> {
        let Some((field, map)) = self.section(field, map, "ipam") else { return Vec::new() };
        let Some(field) = field.get(map, "config") else { return Vec::new() };
        let mut subnets: Vec<Subnet> = Vec::new();
        for item in self.list(&field) {
            let Some(subnet) = self.subnet(&item) else { continue };
            let other = subnets.iter().find(|other| overlap(other.cidr(), subnet.cidr()));
            match other.map(Subnet::cidr) {
                Some(other) => self.problem(&item, format!("{} overlaps {other}", subnet.cidr())),
                None => subnets.push(subnet),
            }
        }
        subnets
    }

    fn subnet(&mut self, item: &Field<'_>) -> Option<Subnet> {
        let map = self.map(item)?;
        let mut address = |field: Field<'_>| self.value::<IpAddr>(&field, "is not an address");
        let gateway = item.get(map, "gateway").and_then(&mut address);
        let reserved = match item.get(map, "aux_addresses") {
            None => BTreeSet::new(),
            Some(field) => {
                let map = self.map(&field)?;
                let each = map.iter().map(|(key, entry)| field.entry(key, entry));
                each.filter_map(|field| self.value(&field, "is not an address")).collect()
            }
        };
        let mut range = |key| {
            let field = item.get(map, key)?;
            self.value::<IpNetwork>(&field, "is not a subnet such as 10.9.0.0/24")
        };
        let (cidr, range) = (range("subnet")?, range("ip_range"));
        match Subnet::new(cidr, gateway, range, reserved) {
            Ok(subnet) => Some(subnet),
            Err(error) => {
                self.problem(item, error.to_string());
                None
            }
        }
    }

    fn value<T: FromStr>(&mut self, field: &Field<'_>, otherwise: &str) -> Option<T> {
        self.parsed(field, "a text", |text| text.parse().map_err(|_| otherwise.to_owned()))
    }

    fn services(
        &mut self,
        root: &Field<'_>,
        map: &Map,
        networks: &BTreeSet<&str>,
    ) -> Option<Vec<Service>> {
        if root.get(map, "services").is_none() {
            self.problem(root, "has no services: is it a Compose file?");
            return None;
        }
        let (field, map) = self.section(root, map, "services")?;
        let each = map.iter().map(|(name, entry)| (name, field.entry(name, entry)));
        Some(each.filter_map(|(name, field)| self.service(&field, name, networks)).collect())
    }

    fn service(&mut self, field: &Field<'_>, name: &str, networks: &BTreeSet<&str>) -> Option<Service> {
        let map = self.map(field)?;
        self.refuse_others(field, map, "extends");
        let active = self.is_active(field, map);
        let networks = self.service_networks(field, map, networks);
        let scale = field.get(map, "scale").and_then(|field| self.number(&field));
        let deploy = self.section(field, map, "deploy");
        let (mode, vip, update) = match &deploy {
            Some((field, map)) => self.deploy(field, map, scale),
            None => (Mode::Replicated(scale.unwrap_or(1)), true, Update::default()),
        };
        let name = name.to_owned();
        active.then_some(Service { name, networks, mode, vip: vip && !mode.is_job(), update })
    }

    /// Whether a service is deployed at all.
    fn is_active(&mut self, field: &Field<'_>, map: &Map) -> bool {
        let Some(field) = field.get(map, "profiles") else { return true };
        let own: Vec<String> = self.list(&field).iter().filter_map(|item| self.text(item)).collect();
        match self.tool {
            _ if own.is_empty() => true,
            Tool::Stack => true,
            Tool::Compose { profiles } => {
                profiles.contains("*") || own.iter().any(|profile| profiles.contains(profile))
            }
            Tool::Any => {
                let text = "docker compose leaves this service out unless a profile of its is active, docker \
                            stack deploy never: say --tool compose, with or without --profile, or --tool stack";
                self.problem(&field, text);
                true
            }
        }
    }

    fn deploy(&mut self, field: &Field<'_>, map: &Map, scale: Option<u32>) -> (Mode, bool, Update) {
        let modes = [
            ("replicated", Mode::Replicated as fn(u32) -> Mode),
            ("global", |_| Mode::Global),
            ("replicated-job", Mode::ReplicatedJob),
            ("global-job", |_| Mode::GlobalJob),
        ];
        let mode = field.get(map, "mode").and_then(|field| self.choice(&field, &modes));
        let given = field.get(map, "replicas");
        let replicas = given.as_ref().and_then(|field| self.number(field));
        let mode = mode.unwrap_or(Mode::Replicated)(replicas.or(scale).unwrap_or(1));
        if let (Some(field), Mode::Global | Mode::GlobalJob) = (given, mode) {
            self.problem(&field, "a global service has no replicas: it runs once on each node");
        }
        let endpoints = [("vip", true), ("dnsrr", false)];
        let vip = field.get(map, "endpoint_mode").and_then(|field| self.choice(&field, &endpoints));
        let mut update = Update::default();
        if let Some((field, map)) = self.section(field, map, "update_config") {
            let orders = [("stop-first", false), ("start-first", true)];
            let order = field.get(map, "order").and_then(|field| self.choice(&field, &orders));
            let parallelism = field.get(map, "parallelism").and_then(|field| self.number(&field));
            update.start_first = order.unwrap_or(update.start_first);
            update.parallelism = parallelism.unwrap_or(update.parallelism);
        }
        (mode, vip.unwrap_or(true), update)
    }

    fn service_networks(
        &mut self,
        field: &Field<'_>,
        map: &Map,
        declared: &BTreeSet<&str>,
    ) -> BTreeSet<String> {
        let (mode, networks) = (field.get(map, "network_mode"), field.get(map, "networks"));
        let keys = networks.as_ref().map(|networks| self.network_keys(networks, declared));
        let keys = keys.filter(|keys| !keys.is_empty()).unwrap_or_else(|| [DEFAULT.to_owned()].into());
        match (mode, networks) {
            (Some(_), _) if *self.tool == Tool::Stack => keys,
            (Some(mode), Some(_)) => {
                self.problem(&mode, "is there beside networks: give one of them");
                BTreeSet::new()
            }
            (Some(mode), None) => {
                self.network_mode(&mode);
                BTreeSet::new()
            }
            (None, _) => keys,
        }
    }

    /// Every mode that there is takes no address of a network's, where it counts.
    fn network_mode(&mut self, field: &Field<'_>) {
        let mode = self.parsed(field, "a text", |text| {
            let of_another = text.starts_with("service:") || text.starts_with("container:");
            if of_another || LOCAL.contains(&text) || text == DEFAULT {
                return Ok(());
            }
            Err("is none of host, none, bridge, default, service:NAME, container:NAME".to_owned())
        });
        if mode.is_some() && *self.tool == Tool::Any {
            let text = "docker compose keeps to this, docker stack deploy passes over it and gives the \
                        service its networks or the default one: say --tool compose or --tool stack";
            self.problem(field, text);
        }
    }

    /// The networks of a service: a list of keys, or a map of keys to addresses and aliases.
    fn network_keys(&mut self, field: &Field<'_>, declared: &BTreeSet<&str>) -> BTreeSet<String> {
        let mut keys = BTreeSet::new();
        if let Value::Map(map) = &field.node.value {
            for (key, entry) in map {
                self.check_declared(&field.at_key(entry), key, declared);
                keys.insert(key.to_string());
                if !matches!(entry.node.value, Value::Null) {
                    self.attachment(&field.entry(key, entry));
                }
            }
            return keys;
        }
        for item in self.list(field) {
            let Some(key) = self.text(&item) else { continue };
            self.check_declared(&item, &key, declared);
            if !keys.insert(key.clone()) {
                self.problem(&item, format!("network {key:?} is there twice"));
            }
        }
        keys
    }

    fn check_declared(&mut self, field: &Field<'_>, key: &str, declared: &BTreeSet<&str>) {
        if !declared.contains(key) {
            let text = format!("there is no network {key:?} under the file's networks");
            self.problem(field, text);
        }
    }

    /// What a service asks for on a network.
    fn attachment(&mut self, field: &Field<'_>) {
        let Some(map) = self.map(field) else { return };
        if let Some(field) = field.get(map, "ipv4_address") {
            self.value::<Ipv4Addr>(&field, "is not an IPv4 address");
        }
        if let Some(field) = field.get(map, "ipv6_address") {
            self.value::<Ipv6Addr>(&field, "is not an IPv6 address");
        }
        if let Some(field) = field.get(map, "aliases") {
            for alias in self.list(&field) {
                self.text(&alias);
            }
        }
    }
}

impl Default for Update {
    fn default() -> Self {
        Self { start_first: false, parallelism: 1 }
    }
}

impl Network {
    /// A network of a stack, of which nothing is said.
    fn plain(name: String) -> Self {
        let origin = Origin::Stack { subnets: Vec::new(), ipv6: false };
        Self { name, origin }
    }
}

/// Whether a driver makes networks that end at the machine.
fn is_local(driver: &str) -> bool {
    LOCAL.contains(&driver) || matches!(driver, "null" | "macvlan" | "ipvlan")
}

#[cfg(test)]
mod tests;
