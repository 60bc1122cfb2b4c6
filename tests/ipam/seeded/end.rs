//! The end of a run: all is collected and released, and then nothing must be left.

use std::collections::BTreeSet;

use netctl::cluster::{Cluster, ClusterError};

use super::{AGENTS, NETWORKS, Shared, agent, plan};
use crate::ground::eventually;
use crate::member::Member;

/// Collects what nobody was told of, releases what somebody was, and looks for what leaked.
///
/// # Errors
/// What was lost, contradicts itself, or is left over.
pub async fn collect(shared: &Shared) -> Result<(), String> {
    let mut last = None;
    for number in 0..AGENTS {
        let plan = plan(Vec::new());
        let member = Member::start(shared.raw.clone(), &shared.nodes[number], &plan).await;
        let member = member.map_err(|e| e.to_string())?;
        nothing_wrong(&member.cluster).await?;
        agent::collect(shared, number, &member).await.map_err(|e| e.to_string())?;
        release(shared, number, &member.cluster).await.map_err(|e| e.to_string())?;
        last = Some(member);
    }
    let cluster = last.ok_or("no agents")?.cluster;
    for service in cluster.services().await.map_err(|e| e.to_string())? {
        cluster.remove_service(&service.name).await.map_err(|e| e.to_string())?;
    }
    nothing_wrong(&cluster).await?;
    // What rests, and what is kept for a while, ends with its lease.
    let sorts = ["addresses", "endpoints", "names", "reservations"];
    eventually("nothing is taken", async || {
        let keys = shared.raw.list("members/").await.ok()?.entries.into_keys();
        let of_sort = |key: &String| sorts.iter().any(|sort| key.split('/').nth(2) == Some(sort));
        (keys.filter(of_sort).count() == 0).then_some(())
    })
    .await;
    for (name, _) in NETWORKS {
        let network = cluster.network(name).await.map_err(|e| e.to_string())?;
        let (ipv4, ipv6) = cluster.counts(&network).await.map_err(|e| e.to_string())?;
        if ipv4.free() != ipv4.usable || ipv6.free() != ipv6.usable {
            return Err(format!("{name} is not free: {ipv4:?} {ipv6:?}"));
        }
        cluster.remove_network(name).await.map_err(|e| e.to_string())?;
    }
    nothing_wrong(&cluster).await?;
    let mut left: BTreeSet<String> = BTreeSet::new();
    for prefix in ["members/", "local/", "base/services/"] {
        left.extend(shared.raw.list(prefix).await.map_err(|e| e.to_string())?.entries.into_keys());
    }
    if left.is_empty() { Ok(()) } else { Err(format!("leaked: {left:?}")) }
}

async fn nothing_wrong(cluster: &Cluster) -> Result<(), String> {
    let check = cluster.check(None).await.map_err(|e| e.to_string())?;
    let found: Vec<_> = check.inconsistencies.iter().map(|found| &found.finding).collect();
    if found.is_empty() { Ok(()) } else { Err(format!("the check finds {found:?}")) }
}

/// Releases what an agent's callers were told that they have.
async fn release(shared: &Shared, number: usize, cluster: &Cluster) -> Result<(), ClusterError> {
    let held: Vec<_> = {
        let told = shared.told.lock().unwrap();
        let own = told.endpoints.values().filter(|entry| entry.agent == number);
        own.map(|entry| entry.endpoint.clone()).collect()
    };
    for endpoint in held {
        if cluster.release(&endpoint).await?.is_none() {
            shared.problem(format!("acknowledged and lost: {endpoint:?}"));
        }
        shared.told.lock().unwrap().end(endpoint.id);
    }
    Ok(())
}
