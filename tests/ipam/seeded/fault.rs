//! Faults that a run's audits must tell: each is written into the store behind the agents' backs.

use netctl::model::{Endpoint, NetworkId};
use netctl::store::{Outcome, Transaction};

use super::{NETWORKS, Shared};
use crate::facts::usable;

/// The endpoint that a fault makes, or names.
pub const STRANGER: &str = "00000000000f";

#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// Two endpoints have one address.
    Duplicate,
    /// An endpoint that somebody was told of is gone, with all that was its own.
    Lost,
    /// An address is taken by an endpoint that does not exist.
    Leaked,
    /// An address rests, and no lease ends that.
    RestsForEver,
}

impl Fault {
    /// Does it to the network in which something is free.
    ///
    /// # Errors
    /// When the store does not take it, or has nothing to do it to.
    pub async fn inject(self, shared: &Shared) -> Result<(), String> {
        let network = shared.networks[1];
        let transaction = match self {
            Self::Duplicate => duplicate(&victim(shared, network)?)?,
            Self::Lost => keys(&victim(shared, network)?)
                .into_iter()
                .fold(Transaction::new(), |transaction, key| transaction.delete(key)),
            Self::Leaked => Transaction::new().put(free(shared, network).await?, quoted(STRANGER)),
            Self::RestsForEver => Transaction::new().put(free(shared, network).await?, ""),
        };
        match shared.raw.commit(transaction).await.map_err(|error| error.to_string())? {
            Outcome::Committed(_) => Ok(()),
            Outcome::Conflict => Err("nothing was compared".to_owned()),
        }
    }
}

/// An endpoint that somebody was told of, and that nobody is releasing.
fn victim(shared: &Shared, network: NetworkId) -> Result<Endpoint, String> {
    let told = shared.told.lock().unwrap();
    let mut held = told.endpoints.values().filter(|entry| !entry.ending).map(|entry| &entry.endpoint);
    // What a service keeps would tell of one that has drawn on it.
    let victim = held.find(|endpoint| endpoint.network == network && endpoint.drawn.is_none());
    victim.cloned().ok_or_else(|| "nothing is held".to_owned())
}

/// All keys of an endpoint.
fn keys(endpoint: &Endpoint) -> Vec<String> {
    let Endpoint { id, name, node, network, .. } = endpoint;
    let address = |address| format!("members/{network}/addresses/{address}");
    let mut keys: Vec<String> = endpoint.addresses.iter().map(address).collect();
    keys.push(format!("members/{network}/endpoints/{id}"));
    keys.push(format!("members/{network}/names/{name}"));
    keys.push(format!("local/{node}/{network}/{id}"));
    keys
}

/// Another endpoint with the same addresses, complete but for their keys.
fn duplicate(endpoint: &Endpoint) -> Result<Transaction, String> {
    let id = STRANGER.parse().map_err(|_| "it is no id")?;
    let name = "stranger".parse().map_err(|_| "it is no name")?;
    let other = Endpoint { id, name, ..endpoint.clone() };
    let (network, node) = (other.network, &other.node);
    let record = serde_json::to_vec(&other).map_err(|error| error.to_string())?;
    Ok(Transaction::new()
        .put(format!("members/{network}/endpoints/{id}"), record)
        .put(format!("members/{network}/names/{}", other.name), quoted(STRANGER))
        .put(format!("local/{node}/{network}/{id}"), ""))
}

/// The key of an address that nobody has.
async fn free(shared: &Shared, network: NetworkId) -> Result<String, String> {
    let prefix = format!("members/{network}/addresses/");
    let taken = shared.raw.list(&prefix).await.map_err(|error| error.to_string())?.entries;
    let subnet = NETWORKS[1].1[0].parse().map_err(|_| "it is no subnet")?;
    let mut keys = usable(subnet).into_iter().map(|address| format!("{prefix}{address}"));
    keys.find(|key| !taken.contains_key(key)).ok_or_else(|| "nothing is free".to_owned())
}

fn quoted(id: &str) -> String {
    format!("{id:?}")
}
