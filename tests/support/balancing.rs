//! How the agent in memory balances services.

use std::net::Ipv4Addr;

use netctl::api::{BackendView, Connections, DrainView, ExternalView, TimeoutsView};
use netctl::model::{EndpointId, EndpointState, External};

pub fn timeouts(network: &str) -> TimeoutsView {
    TimeoutsView { network_name: network.to_owned(), tcp: 900, tcp_fin: 120, udp: 300 }
}

/// One that takes connections and two that do not.
pub fn backends(network: &str) -> [BackendView; 3] {
    let dead = Some("its node is dead");
    [
        ("b1", EndpointState::Ready, "", None),
        ("b2", EndpointState::Unhealthy, "refused", Some("unhealthy: refused")),
        ("b3", EndpointState::Ready, "", dead),
    ]
    .map(|(name, state, reason, out)| BackendView {
        endpoint: EndpointId::random(&mut rand::rng()),
        name: name.parse().unwrap(),
        network_name: network.to_owned(),
        node: "n2".parse().unwrap(),
        addresses: vec![Ipv4Addr::new(10, 9, 0, 3).into()],
        state,
        reason: reason.to_owned(),
        weight: u32::from(out.is_none()),
        out: out.map(str::to_owned),
        connections: out.is_none().then_some(Connections { active: 3, inactive: 4 }),
    })
}

/// Targets outside, which take connections.
pub fn external(external: &[External], networks: &[String]) -> Vec<ExternalView> {
    let view = |external: &External, network: &String| ExternalView {
        external: *external,
        network_name: network.clone(),
        weight: 1,
        out: None,
        connections: Some(Connections { active: 1, inactive: 2 }),
    };
    networks.iter().flat_map(|network| external.iter().map(move |e| view(e, network))).collect()
}

/// A drain that waits for n2, or is at its end.
pub fn drain(done: bool) -> DrainView {
    let waiting = if done { Vec::new() } else { vec!["n2".parse().unwrap()] };
    DrainView { done, endpoints: 1, waiting, dead: Vec::new(), connections: u64::from(!done) }
}
