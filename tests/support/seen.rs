//! What the agent in memory sees of packets.

use netctl::api::{ApiError, MonitorQuery, Sighting};
use tokio::sync::mpsc::{Receiver, channel};

use super::State;

/// Tells all that there is to tell, and ends.
pub fn watch(state: &mut State, query: MonitorQuery) -> Result<Receiver<Sighting>, ApiError> {
    if let Some(network) = &query.network {
        state.network(network.as_str())?;
    }
    let (sender, receiver) = channel(state.sightings.len().max(1));
    for sighting in state.sightings.drain(..) {
        // There is room for all.
        let _ = sender.try_send(sighting);
    }
    state.monitored.push(query);
    Ok(receiver)
}
