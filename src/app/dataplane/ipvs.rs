//! The balancer of one sandbox: its table of IPVS, as far as it is known, and what it should be.

mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use tracing::{debug, warn};

use super::balancing::{Balancing, Load};
use crate::kernel::ipvs::{self, DestinationState, Entry, Ipvs, ServiceKey, Timeouts};
use crate::kernel::{self, Sandbox};
use crate::lb::Balancer;
use crate::model::EndpointId;
use crate::model::object::Object;
use table::Table;

/// The IPVS of one sandbox.
pub(super) struct ByIpvs {
    ipvs: Ipvs,
    table: Table,
    timeouts: Timeouts,
    /// What it balances by now.
    balancer: Balancer,
    /// Whether the settings are known to be right, and connection tracking is on.
    tracked: Option<bool>,
    /// How many entries somebody else changed that are not put right yet.
    drifted: u64,
    mended: u64,
}

impl ByIpvs {
    /// Opens the IPVS of a sandbox and reads what is in its table.
    pub(super) fn open(sandbox: &Sandbox) -> Result<Self, kernel::Error> {
        let mut ipvs = sandbox.open_ipvs()?;
        let (entries, timeouts) = read(sandbox, &mut ipvs)?;
        let table = table::observed(&entries);
        let balancer = Balancer::default();
        Ok(Self { ipvs, table, timeouts, balancer, tracked: None, drifted: 0, mended: 0 })
    }

    /// Puts the settings and timeouts of the namespace right.
    fn set_up(&mut self, sandbox: &Sandbox, balancer: &Balancer) -> Result<(), kernel::Error> {
        let tracked = !balancer.own.is_empty() || !balancer.outside.is_empty();
        if self.tracked != Some(tracked) {
            sandbox.set_ipvs(tracked)?;
            self.tracked = Some(tracked);
        }
        let crate::lb::Timeouts { tcp, tcp_fin, udp } = balancer.timeouts;
        let wanted = Timeouts { tcp, tcp_fin, udp };
        if wanted != self.timeouts {
            self.ipvs.set_timeouts(wanted).map_err(kernel::Error::ipvs(sandbox.name()))?;
            self.timeouts = wanted;
        }
        Ok(())
    }

    fn loads_of(&self, entries: &[Entry]) -> Vec<Load> {
        let states = entries.iter().map(|entry| (entry.state.service.key, &entry.destinations));
        let by_key: BTreeMap<ServiceKey, &Vec<DestinationState>> = states.collect();
        let mut loads = Vec::new();
        for front in self.balancer.fronts.keys() {
            let Some(key) = table::key_of(front) else { continue };
            let states = by_key.get(&key).into_iter().copied().flatten();
            loads.extend(states.map(|state| {
                let key = state.destination.key;
                Load {
                    front: *front,
                    backend: SocketAddr::new(key.address, key.port),
                    weight: state.destination.weight,
                    active: state.active,
                    inactive: state.inactive,
                    connections: state.stats.connections,
                    incoming_bytes: state.stats.incoming_bytes,
                    outgoing_bytes: state.stats.outgoing_bytes,
                }
            }));
        }
        loads
    }
}

impl Balancing for ByIpvs {
    fn reread(&mut self, sandbox: &Sandbox, _: &BTreeSet<Object>) -> Result<Vec<Load>, kernel::Error> {
        let (entries, timeouts) = read(sandbox, &mut self.ipvs)?;
        let (table, loads) = (table::observed(&entries), self.loads_of(&entries));
        let changed = table::changes(&table, &self.table).len() as u64;
        if changed > 0 {
            warn!(sandbox = sandbox.name(), changed, "table of IPVS was changed: it is put back");
        }
        (self.drifted, self.table, self.timeouts) = (changed, table, timeouts);
        self.tracked = None;
        Ok(loads)
    }

    fn balancer(&self) -> &Balancer {
        &self.balancer
    }

    fn repaired(&mut self) -> u64 {
        std::mem::take(&mut self.mended)
    }

    fn converge(&mut self, sandbox: &Sandbox, balancer: &Balancer) -> Result<(), kernel::Error> {
        let mut outcome = Ok(());
        if !balancer.fronts.is_empty() {
            outcome = self.set_up(sandbox, balancer);
        }
        let changes = table::changes(&self.table, &table::desired(balancer));
        for (change, result) in changes.iter().zip(self.ipvs.apply(&changes)) {
            match result {
                Ok(()) => {
                    debug!(sandbox = sandbox.name(), %change, "balancing");
                    table::record(&mut self.table, change);
                }
                Err(error) => {
                    warn!(sandbox = sandbox.name(), %error, "not balanced as it should be");
                    outcome = Err(kernel::Error::ipvs(sandbox.name())(error));
                }
            }
        }
        if outcome.is_ok() {
            self.mended += std::mem::take(&mut self.drifted);
        } else {
            // What it has now is not certain: another hand may have been quicker.
            self.table = table::observed(&self.ipvs.table().unwrap_or_default());
        }
        self.balancer = balancer.clone();
        outcome
    }

    fn loads(&mut self, sandbox: &Sandbox) -> Result<Vec<Load>, kernel::Error> {
        let entries = self.ipvs.table().map_err(kernel::Error::ipvs(sandbox.name()))?;
        Ok(self.loads_of(&entries))
    }

    fn follow(&mut self, _: &Sandbox, _: &BTreeSet<Object>) -> Result<(), kernel::Error> {
        // It balances what is routed to its addresses, wherever it comes from.
        Ok(())
    }

    fn take_over(
        &mut self,
        _: &Sandbox,
        _: &BTreeSet<Object>,
        _: &[ipvs::Connection],
    ) -> Result<Vec<ipvs::Connection>, kernel::Error> {
        // They are its own.
        Ok(Vec::new())
    }

    fn unfollow(&mut self, _: &[EndpointId]) {}

    fn has_rules_for(&self, balancer: &Balancer) -> bool {
        self.balancer.has_rules_for(balancer)
    }
}

fn read(sandbox: &Sandbox, ipvs: &mut Ipvs) -> Result<(Vec<Entry>, Timeouts), kernel::Error> {
    let failed = |error| kernel::Error::ipvs(sandbox.name())(error);
    Ok((ipvs.table().map_err(failed)?, ipvs.timeouts().map_err(failed)?))
}
