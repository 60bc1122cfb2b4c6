//! Counters and rates of services and destinations.

use netlink_packet_core::DecodeError;

use super::wire;

/// What passed a service or a destination since it was made or its counters were set to zero
/// (`IPVS_STATS_ATTR_*`). Linux before 4.1 counts connections and packets in 32 bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Connections that were scheduled.
    pub connections: u64,
    /// Packets from clients.
    pub incoming_packets: u64,
    /// Packets to clients; 0 where answers do not pass this machine.
    pub outgoing_packets: u64,
    /// Bytes from clients, with IP headers.
    pub incoming_bytes: u64,
    /// Bytes to clients, with IP headers.
    pub outgoing_bytes: u64,
    /// The same per second, of the last seconds.
    pub rates: Rates,
}

/// Averages per second, which the kernel makes anew every two seconds (net/netfilter/ipvs/ip_vs_est.c).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Connections per second.
    pub connections: u64,
    /// Packets from clients per second.
    pub incoming_packets: u64,
    /// Packets to clients per second.
    pub outgoing_packets: u64,
    /// Bytes from clients per second.
    pub incoming_bytes: u64,
    /// Bytes to clients per second.
    pub outgoing_bytes: u64,
}

impl Stats {
    /// Both forms: `STATS`, where some are of 32 bits, and `STATS64`.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut stats = Self::default();
        let rates = &mut stats.rates;
        for attribute in wire::attributes(bytes) {
            let (kind, value) = attribute?;
            let counter = match kind {
                1 => &mut stats.connections,
                2 => &mut stats.incoming_packets,
                3 => &mut stats.outgoing_packets,
                4 => &mut stats.incoming_bytes,
                5 => &mut stats.outgoing_bytes,
                6 => &mut rates.connections,
                7 => &mut rates.incoming_packets,
                8 => &mut rates.outgoing_packets,
                9 => &mut rates.incoming_bytes,
                10 => &mut rates.outgoing_bytes,
                _ => continue,
            };
            *counter = wire::get_counter(value)?;
        }
        Ok(stats)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_both_widths_are_read() {
        let wide = |kind: u16| wire::put(kind, &(u64::from(kind) << 32).to_ne_bytes());
        let narrow = |kind: u16| wire::put_u32(kind, u32::from(kind));
        let mixed: Vec<_> = (1..=11)
            .map(|kind| if [4, 5].contains(&kind) { wide(kind) } else { narrow(kind) })
            .collect();
        let stats = Stats::decode(&wire::bytes(&mixed)).unwrap();
        let expected = Stats {
            connections: 1,
            incoming_packets: 2,
            outgoing_packets: 3,
            incoming_bytes: 4 << 32,
            outgoing_bytes: 5 << 32,
            rates: Rates {
                connections: 6,
                incoming_packets: 7,
                outgoing_packets: 8,
                incoming_bytes: 9,
                outgoing_bytes: 10,
            },
        };
        assert_eq!(stats, expected);
        let all: Vec<_> = (1..=10).map(wide).collect();
        let stats = Stats::decode(&wire::bytes(&all)).unwrap();
        assert_eq!((stats.connections, stats.rates.outgoing_bytes), (1 << 32, 10 << 32));
        assert!(Stats::decode(&wire::bytes(&[wire::put_u16(1, 1)])).is_err());
    }
}
