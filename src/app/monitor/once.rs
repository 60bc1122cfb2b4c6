//! Each dropped packet is told once. The kernel tells of every one that it drops, also of those of which a rule or
//! a program has told already, or the error that it has sent: these say why in words of ours.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::names::{Ends, ends};
use super::sources::{Found, What};

/// How long the kernel's word waits: the log of rules gathers for 50 ms.
const WAITS: Duration = Duration::from_millis(250);
/// How many packets are remembered, and wait, at most.
const MANY: usize = 512;

#[derive(Debug, Default)]
pub(super) struct Once {
    /// What was told by others, and when.
    told: VecDeque<(Instant, Ends)>,
    /// What the kernel has said, and until when it waits.
    waiting: VecDeque<(Instant, Ends, Found)>,
}

impl Once {
    /// What is to be told now that this was found.
    pub(super) fn take(&mut self, found: Found, now: Instant) -> Vec<Found> {
        while self.told.front().is_some_and(|(then, _)| now.duration_since(*then) >= 2 * WAITS) {
            self.told.pop_front();
        }
        let Some(ends) = ends(&found.what) else { return vec![found] };
        if !matches!(found.what, What::Freed(..)) {
            match self.waiting.iter().position(|(_, waiting, _)| *waiting == ends) {
                Some(same) => drop(self.waiting.remove(same)),
                None => self.told.push_back((now, ends)),
            }
            if self.told.len() > MANY {
                self.told.pop_front();
            }
            return vec![found];
        }
        if let Some(same) = self.told.iter().position(|(_, told)| *told == ends) {
            self.told.remove(same);
            return Vec::new();
        }
        self.waiting.push_back((now + WAITS, ends, found));
        let is_full = self.waiting.len() > MANY;
        is_full
            .then(|| self.waiting.pop_front())
            .flatten()
            .map(|(.., found)| found)
            .into_iter()
            .collect()
    }

    /// When something has waited long enough.
    pub(super) fn next(&self) -> Option<Instant> {
        self.waiting.front().map(|(until, ..)| *until)
    }

    /// What has.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Found> {
        let many = self.waiting.iter().take_while(|(until, ..)| *until <= now).count();
        self.waiting.drain(..many).map(|(.., found)| found).collect()
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use jiff::Timestamp;

    use super::*;
    use crate::api::Point;
    use crate::app::monitor::freed::Of;
    use crate::kernel::Dropped;

    fn packet(port: u16) -> Dropped {
        let mut packet = Vec::new();
        let builder = PacketBuilder::ipv4([10, 9, 0, 2], [10, 9, 0, 3], 64).udp(4000, port);
        builder.write(&mut packet, &[0; 9]).unwrap();
        Dropped { reason: String::new(), packet, devices: [None; 2] }
    }

    fn found(what: What) -> Found {
        Found { time: Timestamp::UNIX_EPOCH, share: 0, what }
    }

    fn by_rule(port: u16) -> Found {
        found(What::Dropped(Point::Sandbox, None, packet(port)))
    }

    fn by_kernel(port: u16) -> Found {
        found(What::Freed(Point::Sandbox, Of::Number(7), packet(port)))
    }

    #[test]
    fn what_a_rule_tells_the_kernel_does_not_tell_again() {
        let (mut once, start) = (Once::default(), Instant::now());
        assert_eq!(once.take(by_rule(1), start).len(), 1);
        assert!(once.take(by_kernel(1), start).is_empty());
        // In the other order, as the log comes later.
        assert!(once.take(by_kernel(2), start).is_empty());
        assert_eq!(once.next(), Some(start + WAITS));
        assert_eq!(once.take(by_rule(2), start).len(), 1);
        assert_eq!(once.next(), None);
        // As often as it was told, and no more.
        once.take(by_rule(3), start);
        assert!(once.take(by_kernel(3), start).is_empty());
        assert!(once.take(by_kernel(3), start).is_empty());
        assert!(once.due(start).is_empty());
        assert_eq!(once.due(start + WAITS).len(), 1);
        assert_eq!(once.next(), None);
        // Long ago it was another one.
        once.take(by_rule(4), start);
        once.take(by_kernel(4), start + 2 * WAITS);
        assert_eq!(once.due(start + 3 * WAITS).len(), 1);
    }

    #[test]
    fn a_flood_waits_in_bounded_room_and_none_is_swallowed() {
        let (mut once, start) = (Once::default(), Instant::now());
        let told: usize = (0..MANY + 10).map(|_| once.take(by_kernel(7), start).len()).sum();
        assert_eq!((told, once.due(start + WAITS).len()), (10, MANY));
        for _ in 0..MANY + 10 {
            once.take(by_rule(7), start);
        }
        assert_eq!(once.told.len(), MANY);
    }

    #[test]
    fn what_is_no_dropped_packet_is_told_at_once() {
        let (mut once, start) = (Once::default(), Instant::now());
        assert_eq!(once.take(found(What::Lost(3)), start).len(), 1);
        let cut = Dropped { packet: vec![0x45], ..packet(1) };
        assert_eq!(once.take(found(What::Freed(Point::Host, Of::Number(7), cut)), start).len(), 1);
        assert!(once.told.is_empty() && once.next().is_none());
    }
}
