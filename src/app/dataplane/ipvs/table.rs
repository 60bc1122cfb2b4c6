//! From what a network's connections are balanced by to the table of IPVS, and the changes that
//! make one table of another. Nothing here speaks with the kernel.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use crate::kernel::ipvs::{
    Change, Destination, DestinationKey, Entry, Family, Flags, Forwarding, Protocol, Scheduler, Service,
    ServiceKey,
};
use crate::lb::{Balancer, Front, Spread};
use crate::model;

/// What the kernel has, or should have: virtual services with their destinations.
pub(super) type Table = BTreeMap<ServiceKey, (Service, BTreeMap<DestinationKey, Destination>)>;

/// The table that balances so.
pub(super) fn desired(balancer: &Balancer) -> Table {
    let rows = balancer.fronts.iter().filter_map(|(front, spread)| {
        let key = key_of(front)?;
        let destinations = spread.backends.iter().map(|(backend, weight)| {
            let key = DestinationKey::from(*backend);
            (key, Destination::new(key, Forwarding::Masquerade, *weight))
        });
        Some((key, (service(key, spread), destinations.collect())))
    });
    rows.collect()
}

/// The table that the kernel tells of.
pub(super) fn observed(entries: &[Entry]) -> Table {
    let row = |entry: &Entry| {
        let destinations = entry.destinations.iter().map(|state| state.destination);
        let destinations = destinations.map(|destination| (destination.key, destination)).collect();
        (entry.state.service.key, (entry.state.service.clone(), destinations))
    };
    entries.iter().map(row).collect()
}

/// The virtual service for a front; `None` for a mark that no packet can bear.
pub(super) fn key_of(front: &Front) -> Option<ServiceKey> {
    match *front {
        Front::Port { protocol, address, port } => {
            let protocol = match protocol {
                model::Protocol::Tcp => Protocol::Tcp,
                model::Protocol::Udp => Protocol::Udp,
                model::Protocol::Sctp => Protocol::Sctp,
            };
            Some(ServiceKey::Address { protocol, address, port })
        }
        Front::All { address, mark } => {
            Some(ServiceKey::Mark { family: Family::of(address), mark: NonZeroU32::new(mark)? })
        }
    }
}

fn service(key: ServiceKey, spread: &Spread) -> Service {
    let (scheduler, flags) = match spread.scheduler {
        model::Scheduler::Rr => (Scheduler::RoundRobin, Flags::empty()),
        model::Scheduler::Wrr => (Scheduler::WeightedRoundRobin, Flags::empty()),
        model::Scheduler::Lc => (Scheduler::LeastConnection, Flags::empty()),
        model::Scheduler::Wlc => (Scheduler::WeightedLeastConnection, Flags::empty()),
        // Without the flag a client whose hash leads to a backend of weight 0 gets nothing.
        model::Scheduler::Sh => (Scheduler::SourceHashing, Flags::SH_FALLBACK),
        model::Scheduler::Mh => (Scheduler::MaglevHashing, Flags::MH_FALLBACK),
    };
    let mut service = Service::new(key, scheduler);
    service.flags = flags;
    match spread.affinity {
        Some(seconds) => service.persistent(seconds),
        None => service,
    }
}

/// The changes that make `now` what is `wanted`. Destinations come before those that go, so that a
/// service which keeps one has one at every moment.
pub(super) fn changes(now: &Table, wanted: &Table) -> Vec<Change> {
    let mut changes = Vec::new();
    for key in now.keys().filter(|key| !wanted.contains_key(key)) {
        changes.push(Change::DeleteService(*key));
    }
    let none = BTreeMap::new();
    for (key, (service, destinations)) in wanted {
        let there = match now.get(key) {
            None => {
                changes.push(Change::AddService(service.clone()));
                &none
            }
            Some((found, there)) => {
                if found != service {
                    changes.push(Change::EditService { service: service.clone(), mask: Flags::all() });
                }
                there
            }
        };
        for (id, destination) in destinations {
            let (service, destination) = (*key, *destination);
            match there.get(id) {
                None => changes.push(Change::AddDestination { service, destination }),
                Some(found) if *found != destination => {
                    changes.push(Change::EditDestination { service, destination });
                }
                Some(_) => {}
            }
        }
        for id in there.keys().filter(|id| !destinations.contains_key(id)) {
            changes.push(Change::DeleteDestination { service: *key, destination: *id });
        }
    }
    changes
}

/// Records in a table that a change was made.
pub(super) fn record(table: &mut Table, change: &Change) {
    match change {
        Change::AddService(service) => {
            table.insert(service.key, (service.clone(), BTreeMap::new()));
        }
        Change::EditService { service, .. } => {
            if let Some((found, _)) = table.get_mut(&service.key) {
                *found = service.clone();
            }
        }
        Change::DeleteService(key) => {
            table.remove(key);
        }
        Change::AddDestination { service, destination }
        | Change::EditDestination { service, destination } => {
            if let Some((_, destinations)) = table.get_mut(service) {
                destinations.insert(destination.key, *destination);
            }
        }
        Change::DeleteDestination { service, destination } => {
            if let Some((_, destinations)) = table.get_mut(service) {
                destinations.remove(destination);
            }
        }
        // Counters are no part of it.
        Change::Zero(_) | Change::ZeroAll => {}
        Change::Flush => table.clear(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn spread(scheduler: model::Scheduler, backends: &[(&str, u32)]) -> Spread {
        let backends = backends.iter().map(|(backend, weight)| (backend.parse().unwrap(), *weight));
        Spread { scheduler, affinity: None, backends: backends.collect() }
    }

    fn port(port: u16) -> Front {
        Front::Port { protocol: model::Protocol::Tcp, address: [10, 9, 0, 2].into(), port }
    }

    fn all(address: &str, mark: u32) -> Front {
        Front::All { address: address.parse().unwrap(), mark }
    }

    fn table(fronts: &[(Front, Spread)]) -> Table {
        desired(&Balancer { fronts: fronts.iter().cloned().collect(), ..Balancer::default() })
    }

    fn show(changes: &[Change]) -> Vec<String> {
        changes.iter().map(Change::to_string).collect()
    }

    #[test]
    fn doing_the_changes_makes_the_table_the_wanted_one_and_then_there_are_none() {
        let rr = |backends: &[(&str, u32)]| spread(model::Scheduler::Rr, backends);
        let tables = [
            table(&[]),
            table(&[(port(80), rr(&[("10.9.0.5:80", 1), ("10.9.0.6:80", 0)]))]),
            table(&[(port(80), rr(&[("10.9.0.6:80", 1), ("10.9.0.7:80", 1)])), (port(81), rr(&[]))]),
            table(&[(port(80), spread(model::Scheduler::Wlc, &[("10.9.0.6:80", 7)]))]),
            table(&[(all("10.9.0.2", 7), rr(&[("10.9.0.6:0", 1)])), (all("fd00:9::2", 7), rr(&[]))]),
        ];
        for before in &tables {
            for wanted in &tables {
                let mut now = before.clone();
                for change in changes(before, wanted) {
                    record(&mut now, &change);
                }
                assert_eq!(now, *wanted);
                assert_eq!(changes(&now, wanted), []);
            }
        }
    }

    #[test]
    fn only_what_differs_is_changed() {
        let rr = |weight| spread(model::Scheduler::Rr, &[("10.9.0.5:80", 1), ("10.9.0.6:80", weight)]);
        let (before, drained) = (table(&[(port(80), rr(1))]), table(&[(port(80), rr(0))]));
        let steps = show(&changes(&before, &drained));
        assert_eq!(
            steps,
            ["change the destination 10.9.0.6:80 of the service tcp 10.9.0.2:80"].map(String::from)
        );
        let replaced = table(&[(port(80), spread(model::Scheduler::Rr, &[("10.9.0.7:80", 1)]))]);
        assert_eq!(
            show(&changes(&before, &replaced)),
            [
                "add the destination 10.9.0.7:80 to the service tcp 10.9.0.2:80",
                "delete the destination 10.9.0.5:80 of the service tcp 10.9.0.2:80",
                "delete the destination 10.9.0.6:80 of the service tcp 10.9.0.2:80",
            ]
        );
        let wlc = spread(model::Scheduler::Wlc, &[("10.9.0.5:80", 1), ("10.9.0.6:80", 1)]);
        assert_eq!(
            show(&changes(&before, &table(&[(port(80), wlc)]))),
            ["change the service tcp 10.9.0.2:80 (wlc)"]
        );
        assert_eq!(show(&changes(&before, &table(&[]))), ["delete the service tcp 10.9.0.2:80"]);
    }

    #[test]
    fn a_service_is_as_it_was_asked_for() {
        let mut sticky = spread(model::Scheduler::Sh, &[]);
        sticky.affinity = Some(300);
        let (service, _) = &table(&[(all("fd00:9::2", 9), sticky)]).into_values().next().unwrap();
        let key = ServiceKey::Mark { family: Family::V6, mark: NonZeroU32::new(9).unwrap() };
        assert_eq!((service.key, service.timeout), (key, 300));
        assert_eq!(service.flags, Flags::PERSISTENT | Flags::SH_FALLBACK);
        assert_eq!(service.scheduler, Scheduler::SourceHashing);
        let backend: SocketAddr = "10.9.0.5:8080".parse().unwrap();
        let one = spread(model::Scheduler::Rr, &[("10.9.0.5:8080", 3)]);
        let (_, destinations) = &table(&[(port(80), one)]).into_values().next().unwrap();
        let destination = destinations[&DestinationKey::from(backend)];
        assert_eq!((destination.weight, destination.forwarding), (3, Forwarding::Masquerade));
    }
}
