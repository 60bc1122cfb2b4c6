//! What callers were told: the allocations that were acknowledged and not given back.

use std::collections::BTreeMap;
use std::net::IpAddr;

use netctl::model::{Endpoint, EndpointId, NetworkId};
use rand::RngExt as _;
use rand::rngs::StdRng;

#[derive(Default)]
pub struct Told {
    pub endpoints: BTreeMap<EndpointId, Entry>,
    held: BTreeMap<(NetworkId, IpAddr), EndpointId>,
    /// Those that an agent may release, and those of which it does not know whether it has.
    ready: BTreeMap<usize, Vec<EndpointId>>,
    doubtful: BTreeMap<usize, Vec<EndpointId>>,
    pub given: u64,
}

pub struct Entry {
    pub agent: usize,
    pub endpoint: Endpoint,
    /// Its release was begun.
    pub ending: bool,
}

impl Told {
    /// A caller was told that it has an endpoint.
    ///
    /// # Errors
    /// When somebody else was told that one of its addresses is theirs.
    pub fn acknowledge(&mut self, agent: usize, endpoint: Endpoint) -> Result<(), String> {
        self.given += 1;
        for address in &endpoint.addresses {
            let before = self.held.insert((endpoint.network, *address), endpoint.id);
            let other = before.and_then(|id| self.endpoints.get(&id)).filter(|other| !other.ending);
            if let Some(other) = other {
                return Err(format!("{address} twice: {:?} and {endpoint:?}", other.endpoint));
            }
        }
        self.ready.entry(agent).or_default().push(endpoint.id);
        self.endpoints.insert(endpoint.id, Entry { agent, endpoint, ending: false });
        Ok(())
    }

    pub fn len(&self, agent: usize) -> usize {
        self.ready.get(&agent).map_or(0, Vec::len)
    }

    /// An endpoint for an agent to release, and whether that was tried before.
    pub fn begin(&mut self, agent: usize, dice: &mut StdRng) -> Option<(Endpoint, bool)> {
        let doubtful = self.doubtful.entry(agent).or_default();
        let again = !doubtful.is_empty() && dice.random_bool(0.3);
        let list = if again { doubtful } else { self.ready.entry(agent).or_default() };
        if list.is_empty() {
            return None;
        }
        let id = list.swap_remove(dice.random_range(0..list.len()));
        let entry = self.endpoints.get_mut(&id)?;
        entry.ending = true;
        Some((entry.endpoint.clone(), again))
    }

    /// It is not known whether a release was done.
    pub fn doubt(&mut self, agent: usize, id: EndpointId) {
        self.doubtful.entry(agent).or_default().push(id);
    }

    /// A release was done.
    pub fn end(&mut self, id: EndpointId) {
        self.endpoints.remove(&id);
        self.held.retain(|_, holder| *holder != id);
    }

    /// The agent was killed: what it was releasing is to be released anew by somebody who looks at
    /// the store. Gives these.
    pub fn killed(&mut self, agent: usize) -> Vec<EndpointId> {
        self.doubtful.remove(&agent);
        let ending = self.endpoints.iter().filter(|(_, told)| told.agent == agent && told.ending);
        ending.map(|(id, _)| *id).collect()
    }
}
