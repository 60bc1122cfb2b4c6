//! What the callers of an agent do, at random.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use netctl::cluster::{Claimed, ClusterError, EndpointRequest};
use netctl::ipam::Count;
use netctl::model::{EndpointMode, ExpandSpec, NetworkId, ServiceSpec, UpdateOrder};
use rand::RngExt as _;
use rand::rngs::StdRng;

use super::{MORE, NETWORKS, Shared};
use crate::member::{Member, name, request};

/// How many endpoints an agent has before it rather releases some.
const ENOUGH: usize = 70;
/// How many services there are at most.
const SERVICES: u32 = 6;

pub struct Caller {
    pub shared: Arc<Shared>,
    pub agent: usize,
    pub member: Arc<Member>,
    pub dice: StdRng,
}

impl Caller {
    pub async fn call(mut self) {
        while self.shared.next() {
            let many = self.shared.told.lock().unwrap().len(self.agent) > ENOUGH;
            let end = match self.dice.random_range(0..1000) {
                0..500 if !many => self.claim().await,
                0..900 => self.release().await,
                900..940 => self.create().await,
                940..960 => self.scale().await,
                960..980 => self.remove().await,
                980..985 => self.reserve().await,
                985..992 => self.expand().await,
                _ => self.shrink().await,
            };
            match end {
                Ok(what) => self.shared.note(what),
                Err(error) => self.refused(error),
            }
        }
    }

    /// What the store did not do, and what cannot be, is no fault; anything else is.
    fn refused(&self, error: ClusterError) {
        let sort = format!("{error:?}");
        let sort = sort.split([' ', '(', '{']).next().unwrap_or_default();
        let free = |count: &Count| count.free();
        match &error {
            ClusterError::Exhausted { count, .. } if free(count) > 0 && count.reserved == 0 => {
                self.shared.problem(format!("exhausted with something free: {error}"));
            }
            ClusterError::Store(_)
            | ClusterError::Exhausted { .. }
            | ClusterError::TooFew { .. }
            | ClusterError::AddressTaken { .. }
            | ClusterError::NotOfService { .. }
            | ClusterError::NoService(_)
            | ClusterError::ServiceExists(_)
            | ClusterError::SubnetInUse { .. }
            | ClusterError::SubnetReserved { .. }
            | ClusterError::NoSubnet { .. }
            | ClusterError::Contention(_) => self.shared.note(sort),
            _ => self.shared.problem(format!("unexpected: {error}")),
        }
    }

    fn network(&mut self) -> (NetworkId, &'static str) {
        let which = usize::from(self.dice.random_bool(0.6));
        (self.shared.networks[which], NETWORKS[which].0)
    }

    fn some_service(&mut self) -> netctl::model::Name {
        name(&format!("s{}", self.dice.random_range(0..SERVICES)))
    }

    async fn claim(&mut self) -> Result<&'static str, ClusterError> {
        let (id, _) = self.network();
        let snapshot = self.member.view.latest().snapshot;
        let network = match snapshot.networks.get(&id) {
            Some(network) => network.as_ref().clone(),
            None => self.member.cluster.network(&id.to_string()).await?,
        };
        let mut wanted = EndpointRequest { ..request() };
        if self.dice.random_bool(0.6) {
            wanted.name = Some(name(&format!("box{}", self.shared.number())));
        }
        if self.dice.random_bool(0.15) {
            wanted.service = Some(self.some_service());
        } else if self.dice.random_bool(0.1)
            && let Some(subnet) = network.subnets.first()
            && let Some(address) = subnet.cidr().iter().nth(self.dice.random_range(2..31))
            && subnet.is_usable(address)
        {
            wanted.addresses = vec![address];
        }
        let mut claimed = self.member.cluster.claim(&network, &wanted, &snapshot.alive).await;
        let mut again = false;
        // Who gave a name finds out what became of it, or gives up.
        while matches!(claimed, Err(ClusterError::Store(_)))
            && wanted.name.is_some()
            && self.dice.random_bool(0.8)
            && self.shared.next()
        {
            again = true;
            claimed = self.member.cluster.claim(&network, &wanted, &snapshot.alive).await;
        }
        let (endpoint, what) = match claimed? {
            Claimed::New(endpoint, _) => (endpoint, "claimed"),
            Claimed::Existing(endpoint) if again => (endpoint, "claimed before"),
            Claimed::Existing(endpoint) => {
                self.shared.problem(format!("the first of its name exists: {endpoint:?}"));
                return Ok("claimed");
            }
        };
        let told = self.shared.told.lock().unwrap().acknowledge(self.agent, endpoint);
        told.unwrap_or_else(|problem| self.shared.problem(problem));
        Ok(what)
    }

    async fn release(&mut self) -> Result<&'static str, ClusterError> {
        let begun = self.shared.told.lock().unwrap().begin(self.agent, &mut self.dice);
        let Some((endpoint, again)) = begun else { return Ok("nothing to release") };
        let released = match self.dice.random_bool(0.6) {
            true => self.member.cluster.withdraw(&endpoint).await,
            false => self.member.cluster.release(&endpoint).await,
        };
        let mut told = self.shared.told.lock().unwrap();
        match released {
            Ok(revision) => {
                if revision.is_none() && !again {
                    self.shared.problem(format!("acknowledged and lost: {endpoint:?}"));
                }
                told.end(endpoint.id);
                Ok(if revision.is_some() { "released" } else { "released before" })
            }
            Err(error) => {
                told.doubt(self.agent, endpoint.id);
                Err(error)
            }
        }
    }

    async fn create(&mut self) -> Result<&'static str, ClusterError> {
        let networks = match self.dice.random_range(0..3) {
            0 => vec!["tight".to_owned()],
            1 => vec!["roomy".to_owned()],
            _ => vec!["tight".to_owned(), "roomy".to_owned()],
        };
        let modes = [EndpointMode::Vip, EndpointMode::Dnsrr];
        let orders = [UpdateOrder::StopFirst, UpdateOrder::StartFirst];
        let spec = ServiceSpec {
            name: self.some_service(),
            networks,
            replicas: self.dice.random_range(0..5),
            endpoint_mode: modes[self.dice.random_range(0..2)],
            update_order: orders[self.dice.random_range(0..2)],
            update_parallelism: 1,
            addresses: Vec::new(),
            external: Vec::new(),
            balancing: Default::default(),
            health: None,
            reservation: None,
            labels: BTreeMap::new(),
        };
        let alive = self.member.view.latest().snapshot.alive;
        self.member.cluster.create_service(&spec, &alive).await.map(|_| "service created")
    }

    async fn scale(&mut self) -> Result<&'static str, ClusterError> {
        let (service, replicas) = (self.some_service(), self.dice.random_range(0..8));
        self.member.cluster.scale_service(&service, replicas).await.map(|_| "service scaled")
    }

    async fn remove(&mut self) -> Result<&'static str, ClusterError> {
        let service = self.some_service();
        self.member.cluster.remove_service(&service).await.map(|()| "service removed")
    }

    async fn reserve(&mut self) -> Result<&'static str, ClusterError> {
        let (_, network) = self.network();
        let wanted = BTreeMap::from([(network.to_owned(), self.dice.random_range(1..6))]);
        let own = name(&format!("r{}", self.shared.number()));
        let reserved = self.member.cluster.reserve(&own, &wanted, Duration::from_secs(1)).await;
        reserved.map(|()| "reserved")
    }

    async fn expand(&mut self) -> Result<&'static str, ClusterError> {
        let subnet = MORE[self.dice.random_range(0..MORE.len())];
        let spec: ExpandSpec =
            serde_json::from_value(serde_json::json!({ "subnets": [subnet] })).expect("it is one");
        self.member.cluster.expand_network("tight", &spec).await.map(|_| "expanded")
    }

    async fn shrink(&mut self) -> Result<&'static str, ClusterError> {
        let subnet: IpNetwork = MORE[self.dice.random_range(0..MORE.len())].parse().expect("it is one");
        self.member.cluster.shrink_network("tight", subnet).await.map(|_| "shrunk")
    }
}
