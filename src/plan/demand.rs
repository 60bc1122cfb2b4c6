//! How many addresses stacks need on each network.

use std::collections::BTreeMap;

use serde::Serialize;

use super::compose::{Mode, Network, Origin, Service, Stack};

/// What is needed of a network: addresses of each of its families.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    /// Who makes the network: a stack, where one does, although others call it external.
    pub origin: Origin,
    /// The sum of the parts.
    pub total: Count,
    /// What each service needs, in the order of the stacks.
    pub parts: Vec<Part>,
}

/// What a service needs of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    /// The service's stack.
    pub stack: String,
    /// The service.
    pub service: String,
    /// What it needs.
    #[serde(flatten)]
    pub count: Count,
}

/// Numbers of addresses by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Those of containers.
    pub endpoints: u64,
    /// Those of containers that start before the ones they replace have stopped.
    pub surge: u64,
    /// Those of services.
    pub vips: u64,
}

impl Count {
    /// All of them.
    pub fn sum(&self) -> u64 {
        self.endpoints + self.surge + self.vips
    }
}

/// What stacks need, by the names of the networks, on a cluster with so many nodes.
///
/// A global service counts on every node, although constraints may keep it from some.
pub fn demands(stacks: &[Stack], nodes: u32) -> BTreeMap<String, Demand> {
    let mut demands = BTreeMap::new();
    for stack in stacks {
        for service in &stack.services {
            let count = count(service, nodes);
            for network in service.networks.iter().filter_map(|key| stack.networks.get(key)) {
                let (stack, service) = (stack.name.clone(), service.name.clone());
                add(&mut demands, network, Part { stack, service, count });
            }
        }
    }
    demands
}

fn add(demands: &mut BTreeMap<String, Demand>, network: &Network, part: Part) {
    if network.origin == Origin::Machine {
        return;
    }
    let demand = demands.entry(network.name.clone()).or_insert_with(|| Demand {
        origin: network.origin.clone(),
        total: Count::default(),
        parts: Vec::new(),
    });
    if demand.origin == Origin::External {
        demand.origin = network.origin.clone();
    }
    demand.total.endpoints += part.count.endpoints;
    demand.total.surge += part.count.surge;
    demand.total.vips += part.count.vips;
    demand.parts.push(part);
}

/// What a service needs of each of its networks.
fn count(service: &Service, nodes: u32) -> Count {
    let endpoints = match service.mode {
        Mode::Replicated(replicas) | Mode::ReplicatedJob(replicas) => replicas,
        Mode::Global | Mode::GlobalJob => nodes,
    };
    let surge = match service.update {
        update if !update.start_first || service.mode.is_job() => 0,
        update if update.parallelism == 0 => endpoints,
        update => update.parallelism.min(endpoints),
    };
    Count { endpoints: endpoints.into(), surge: surge.into(), vips: service.vip.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::compose::{StackName, Tool, read};

    fn stack(name: &str, text: &str) -> Stack {
        read(text, "f", StackName::Given(name), &BTreeMap::new(), &Tool::Any).unwrap()
    }

    #[test]
    fn a_service_needs_its_containers_their_successors_and_its_own_address() {
        for (deploy, expected) in [
            ("{}", (1, 0, 1)),
            ("{replicas: 0}", (0, 0, 1)),
            ("{replicas: 6, endpoint_mode: dnsrr}", (6, 0, 0)),
            ("{replicas: 6, update_config: {parallelism: 2}}", (6, 0, 1)),
            ("{replicas: 6, update_config: {order: start-first}}", (6, 1, 1)),
            ("{replicas: 6, update_config: {order: start-first, parallelism: 4}}", (6, 4, 1)),
            ("{replicas: 6, update_config: {order: start-first, parallelism: 9}}", (6, 6, 1)),
            ("{replicas: 6, update_config: {order: start-first, parallelism: 0}}", (6, 6, 1)),
            ("{mode: global}", (5, 0, 1)),
            ("{mode: global, update_config: {order: start-first, parallelism: 2}}", (5, 2, 1)),
            ("{mode: replicated-job, replicas: 3, update_config: {order: start-first}}", (3, 0, 0)),
            ("{mode: global-job}", (5, 0, 0)),
        ] {
            let stack = stack("s", &format!("services: {{web: {{deploy: {deploy}}}}}"));
            let demands = demands(&[stack], 5);
            let count = demands["s_default"].total;
            assert_eq!((count.endpoints, count.surge, count.vips), expected, "{deploy}");
            assert_eq!(count.sum(), expected.0 + expected.1 + expected.2);
        }
    }

    #[test]
    fn a_network_is_needed_by_all_services_of_all_stacks_on_it() {
        let shared = "networks: {shared: {external: true}, n: {name: host, external: true}}";
        let a = stack("a", &format!("services: {{x: {{networks: [shared, default]}}}}\n{shared}"));
        let b = format!("services: {{y: {{scale: 2, networks: [shared, n]}}, z: {{}}}}\n{shared}");
        let demands = demands(&[a, stack("b", &b)], 1);
        let names: Vec<&str> = demands.keys().map(String::as_str).collect();
        assert_eq!(names, ["a_default", "b_default", "shared"]);
        let shared = &demands["shared"];
        assert_eq!((shared.total.sum(), &shared.origin), (5, &Origin::External));
        let parts: Vec<_> =
            shared.parts.iter().map(|p| (&*p.stack, &*p.service, p.count.sum())).collect();
        assert_eq!(parts, [("a", "x", 2), ("b", "y", 3)]);
    }

    #[test]
    fn a_network_that_one_stack_makes_is_not_external_for_another() {
        let user = stack("a", "services: {x: {networks: [n]}}\nnetworks: {n: {external: {name: web}}}");
        let maker = stack("b", "services: {y: {networks: [n]}}\nnetworks: {n: {name: web}}");
        for stacks in [[user.clone(), maker.clone()], [maker, user]] {
            assert!(matches!(demands(&stacks, 1)["web"].origin, Origin::Stack { .. }));
        }
    }

    #[test]
    fn the_largest_numbers_are_added_up() {
        let text = "services: {a: {scale: 4294967295}, b: {scale: 4294967295}}";
        let demands = demands(&[stack("s", text)], 1);
        assert_eq!(demands["s_default"].total.sum(), 2 * 4_294_967_295 + 2);
    }
}
