//! From what a network's connections are balanced by to entries of the eBPF maps, and what has to change
//! there. Nothing here speaks with the kernel.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::kernel::ebpf::{
    ADDRESS_GATEWAY, ADDRESS_OUTSIDE, ADDRESS_SERVICE, Address, Backend, Block, BlockKey, FRONT_SLOTS,
    Front, FrontKey, Meaning, Place, Port, SCHEDULER_HASH, SCHEDULER_LEAST, SCHEDULER_TURN, Timeouts,
};
use crate::lb::{self, Balancer, Spread};
use crate::model::{Protocol, Scheduler};

/// A network's entries. What the programs count in them, turns and open connections, is 0 here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) addresses: BTreeMap<Place, Meaning>,
    pub(super) gateways: BTreeMap<Place, Address>,
    pub(super) timeouts: BTreeMap<u32, Timeouts>,
    pub(super) fronts: BTreeMap<FrontKey, Front>,
    pub(super) slots: BTreeMap<BlockKey, Block>,
    pub(super) backends: BTreeMap<u32, Backend>,
}

/// Gives fronts and backends of all networks their numbers, from 1.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    front: u32,
    backend: u32,
}

impl Numbers {
    /// A backend's number is given up to this one.
    pub(super) fn skip_backends(&mut self, last: u32) {
        self.backend = self.backend.max(last);
    }

    /// Those of a table are given.
    pub(super) fn take(&mut self, table: &Table) {
        let fronts = table.fronts.values().map(|front| front.id);
        self.front = fronts.fold(self.front, u32::max);
        self.backend = table.backends.keys().copied().fold(self.backend, u32::max);
    }

    fn front(&mut self) -> u32 {
        self.front += 1;
        self.front
    }

    fn backend(&mut self) -> u32 {
        self.backend += 1;
        self.backend
    }
}

impl Table {
    /// The entries that balance so in the network with this number. What is in a table already keeps its
    /// number, and so its connections and what was counted.
    pub(super) fn wanted(network: u32, balancer: &Balancer, now: &Self, numbers: &mut Numbers) -> Self {
        let mut table = Self::default();
        if balancer.fronts.is_empty() {
            return table;
        }
        let place = |address: &std::net::IpAddr| Place::new(network, *address);
        for address in &balancer.addresses {
            let is_outside = balancer.outside.iter().any(|(_, service)| service == address);
            let kind = if is_outside { ADDRESS_OUTSIDE } else { ADDRESS_SERVICE };
            table.addresses.insert(place(address), Meaning::of(kind));
        }
        for (backend, gateway) in &balancer.gateways {
            table.gateways.insert(place(backend), (*gateway).into());
            table.addresses.insert(place(gateway), Meaning::of(ADDRESS_GATEWAY));
        }
        let lb::Timeouts { tcp, tcp_fin, udp } = balancer.timeouts;
        table.timeouts.insert(network, Timeouts { tcp, tcp_fin, udp });
        let numbered = now.numbers();
        for (front, spread) in &balancer.fronts {
            let key = key_of(network, front);
            let id = now.fronts.get(&key).map_or_else(|| numbers.front(), |front| front.id);
            let mut all = Vec::new();
            for (socket, weight) in &spread.backends {
                let number = numbered.get(&(id, *socket)).copied();
                let number = number.unwrap_or_else(|| numbers.backend());
                table.backends.insert(number, backend(id, *socket, spread, *weight));
                all.push(number);
            }
            let slots: Vec<u32> = spread.slots().iter().filter_map(|at| all.get(*at)).copied().collect();
            let (scheduler, affinity) = (scheduler(spread.scheduler), spread.affinity.unwrap_or(0));
            let front = Front { id, scheduler, affinity, slots: 0, turn: 0, first: [0; FRONT_SLOTS] };
            let (front, blocks) = front.with_slots(&slots);
            table.fronts.insert(key, front);
            table.slots.extend(blocks);
        }
        table
    }

    /// The backends' numbers, by their fronts' and where they are.
    pub(super) fn numbers(&self) -> BTreeMap<(u32, SocketAddr), u32> {
        let number = |(number, backend): (&u32, &Backend)| ((backend.front, backend.socket()), *number);
        self.backends.iter().map(number).collect()
    }

    /// Whether nothing is balanced.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The key of a front.
pub(super) fn key_of(network: u32, front: &lb::Front) -> FrontKey {
    let (address, port, protocol) = match *front {
        lb::Front::Port { protocol, address, port } => (address, port, number(protocol)),
        lb::Front::All { address, .. } => (address, 0, 0),
    };
    FrontKey { network, address: address.into(), port: port.into(), protocol, zero: 0 }
}

/// The protocol's number (IANA).
pub(super) fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

fn scheduler(scheduler: Scheduler) -> u32 {
    match scheduler {
        Scheduler::Rr | Scheduler::Wrr => SCHEDULER_TURN,
        Scheduler::Lc | Scheduler::Wlc => SCHEDULER_LEAST,
        Scheduler::Sh | Scheduler::Mh => SCHEDULER_HASH,
    }
}

fn backend(front: u32, socket: SocketAddr, spread: &Spread, weight: u32) -> Backend {
    // By the fewest connections alone, whatever the weights are.
    let weight = if spread.scheduler == Scheduler::Lc { weight.min(1) } else { weight };
    let (address, port) = (socket.ip().into(), Port::from(socket.port()));
    Backend { address, port, zero: 0, front, weight, open: 0 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::kernel::ebpf::difference;

    const NETWORK: u32 = 4711;

    fn spread(scheduler: Scheduler, backends: &[(&str, u32)]) -> Spread {
        let backends = backends.iter().map(|(backend, weight)| (backend.parse().unwrap(), *weight));
        Spread { scheduler, affinity: None, backends: backends.collect() }
    }

    fn balancer(fronts: &[(lb::Front, Spread)]) -> Balancer {
        let address = |(front, _): &(lb::Front, Spread)| match front {
            lb::Front::Port { address, .. } | lb::Front::All { address, .. } => *address,
        };
        Balancer {
            addresses: fronts.iter().map(address).collect(),
            fronts: fronts.iter().cloned().collect(),
            timeouts: lb::Timeouts::DEFAULT,
            ..Balancer::default()
        }
    }

    fn port(port: u16) -> lb::Front {
        lb::Front::Port { protocol: Protocol::Tcp, address: [10, 9, 0, 2].into(), port }
    }

    #[test]
    fn what_stays_keeps_its_number_and_what_is_new_gets_another() {
        let mut numbers = Numbers::default();
        let two = spread(Scheduler::Rr, &[("10.9.0.5:80", 1), ("10.9.0.6:80", 1)]);
        let first = balancer(&[(port(80), two.clone()), (port(81), two)]);
        let before = Table::wanted(NETWORK, &first, &Table::default(), &mut numbers);
        let numbers_of = |table: &Table| table.backends.keys().copied().collect::<BTreeSet<_>>();
        assert_eq!(numbers_of(&before), [1, 2, 3, 4].into());
        let other = spread(Scheduler::Rr, &[("10.9.0.6:80", 0), ("10.9.0.7:80", 1)]);
        let second = balancer(&[(port(80), other), (port(82), spread(Scheduler::Rr, &[]))]);
        let after = Table::wanted(NETWORK, &second, &before, &mut numbers);
        assert_eq!(numbers_of(&after), [2, 5].into());
        let front = |port_number| after.fronts[&key_of(NETWORK, &port(port_number))];
        assert_eq!((front(80).id, front(80).slots, front(82).id, front(82).slots), (1, 1, 3, 0));
        assert_eq!((front(80).first[..2].to_vec(), after.slots.len()), (vec![5, 0], 0));
        assert_eq!((after.backends[&2].weight, after.backends[&5].weight), (0, 1));
        // A later agent, which has read them, goes on with other numbers.
        let mut again = Numbers::default();
        again.take(&after);
        assert_eq!((again.front(), again.backend()), (4, 6));
        assert!(Table::wanted(NETWORK, &Balancer::default(), &after, &mut again).is_empty());
    }

    #[test]
    fn only_what_differs_is_changed() {
        let mut numbers = Numbers::default();
        let weights = |weight| {
            let spread = spread(Scheduler::Wlc, &[("10.9.0.5:80", 1), ("10.9.0.6:80", weight)]);
            balancer(&[(port(80), spread)])
        };
        let before = Table::wanted(NETWORK, &weights(1), &Table::default(), &mut numbers);
        let after = Table::wanted(NETWORK, &weights(3), &before, &mut numbers);
        let (set, gone) = difference(&before.backends, &after.backends);
        assert_eq!((set, gone), (vec![(2, after.backends[&2])], vec![]));
        assert_eq!(difference(&before.fronts, &after.fronts), (vec![], vec![]));
        let (set, gone) = difference(&after.fronts, &BTreeMap::new());
        assert_eq!((set.len(), gone.len()), (0, 1));
    }

    #[test]
    fn the_fewest_connections_count_without_weights_where_it_is_asked_for() {
        let weights = |scheduler| {
            let one =
                balancer(&[(port(80), spread(scheduler, &[("10.9.0.5:80", 7), ("10.9.0.6:80", 0)]))]);
            let table = Table::wanted(NETWORK, &one, &Table::default(), &mut Numbers::default());
            table.backends.values().map(|backend| backend.weight).collect::<Vec<_>>()
        };
        assert_eq!((weights(Scheduler::Lc), weights(Scheduler::Wlc)), (vec![1, 0], vec![7, 0]));
    }
}
