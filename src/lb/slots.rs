//! From weights to slots: the order in which backends take turns, and the table in which a client's hash
//! finds its own.
//!
//! An engine that has no schedulers of its own (eBPF) needs nothing else: a turn is the next slot, a hash
//! the slot of that number.

use crate::model::Scheduler;

use super::Spread;

/// The most slots of turns: where weights need more, they are taken about.
const MOST_TURNS: u64 = 1024;
/// How large a table of hashes may be: prime numbers (the paper on Maglev, Eisenbud and others, NSDI 2016,
/// 5.3).
const SIZES: [usize; 8] = [251, 509, 1021, 2039, 4093, 8191, 16_381, 65_521];
/// How many slots there are for each backend, at least, so that their shares differ by little.
const FOR_EACH: usize = 100;

impl Spread {
    /// The slots: in each the position of a backend among all. None where no backend takes connections.
    pub fn slots(&self) -> Vec<usize> {
        let ready: Vec<(usize, u32)> = self
            .backends
            .values()
            .enumerate()
            .filter_map(|(position, weight)| (*weight > 0).then_some((position, *weight)))
            .collect();
        match self.scheduler {
            Scheduler::Rr | Scheduler::Lc | Scheduler::Wlc => ready.iter().map(|(at, _)| *at).collect(),
            Scheduler::Wrr => turns(&ready),
            Scheduler::Sh | Scheduler::Mh => {
                let names: Vec<String> = self.backends.keys().map(ToString::to_string).collect();
                let named = |(at, weight): &(usize, u32)| {
                    (*at, *weight, names.get(*at).map_or("", String::as_str))
                };
                hashes(&ready.iter().map(named).collect::<Vec<_>>())
            }
        }
    }
}

/// Each as often as its weight says, and as evenly between the others as can be: the one that is furthest
/// behind its share is next.
fn turns(ready: &[(usize, u32)]) -> Vec<usize> {
    let divisor = ready.iter().fold(0, |divisor, (_, weight)| gcd(divisor, u64::from(*weight))).max(1);
    let total: u64 = ready.iter().map(|(_, weight)| u64::from(*weight) / divisor).sum();
    let mut shares: Vec<(usize, i64)> = ready
        .iter()
        .map(|(at, weight)| {
            let weight = u64::from(*weight) / divisor;
            let share = if total > MOST_TURNS { (weight * MOST_TURNS / total).max(1) } else { weight };
            (*at, share as i64)
        })
        .collect();
    // The same share for all is one turn for each.
    let all: i64 = shares.iter().map(|(_, share)| share).sum();
    let mut behind: Vec<i64> = vec![0; shares.len()];
    let mut turns = Vec::new();
    for _ in 0..all {
        for (behind, (_, share)) in behind.iter_mut().zip(&shares) {
            *behind += *share;
        }
        // The first of those that are equally far behind.
        let next = (0..behind.len()).rev().max_by_key(|at| behind.get(*at).copied());
        if let Some((behind, (at, _))) =
            next.and_then(|next| Some((behind.get_mut(next)?, shares.get_mut(next)?)))
        {
            *behind -= all;
            turns.push(*at);
        }
    }
    turns
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A table of Maglev's: every backend goes through the slots in an order of its own, and takes the first
/// that is free, in turns and as often as its weight says. When one comes or goes, few others change.
fn hashes(ready: &[(usize, u32, &str)]) -> Vec<usize> {
    if ready.is_empty() {
        return Vec::new();
    }
    let size = SIZES.iter().copied().find(|size| *size >= ready.len() * FOR_EACH);
    let size = size.unwrap_or(SIZES[SIZES.len() - 1]);
    let mut orders: Vec<(usize, usize)> = ready
        .iter()
        .map(|(_, _, name)| {
            let (offset, skip) = (hash(name, 1), hash(name, 2));
            (offset as usize % size, skip as usize % (size - 1) + 1)
        })
        .collect();
    let heaviest = ready.iter().map(|(_, weight, _)| *weight).max().unwrap_or(1);
    let (mut table, mut left) = (vec![None; size], size);
    let mut credit: Vec<u64> = vec![0; ready.len()];
    while left > 0 {
        for (number, (at, weight, _)) in ready.iter().enumerate() {
            let (Some(credit), Some((next, skip))) = (credit.get_mut(number), orders.get_mut(number))
            else {
                continue;
            };
            *credit += u64::from(*weight);
            if *credit < u64::from(heaviest) || left == 0 {
                continue;
            }
            *credit -= u64::from(heaviest);
            while table.get(*next).is_some_and(Option::is_some) {
                *next = (*next + *skip) % size;
            }
            if let Some(slot) = table.get_mut(*next) {
                *slot = Some(*at);
                left -= 1;
            }
        }
    }
    table.into_iter().flatten().collect()
}

/// FNV-1a (draft-eastlake-fnv), which starts with a number of its own for each use, its bits mixed.
fn hash(name: &str, use_number: u64) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325 ^ use_number;
    let hash = name
        .bytes()
        .fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let hash = (hash ^ hash >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^ hash >> 32
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::SocketAddr;

    use super::*;

    fn spread(scheduler: Scheduler, weights: &[u32]) -> Spread {
        let backend = |(at, weight): (usize, &u32)| {
            (SocketAddr::from(([10, 9, (at >> 8) as u8, at as u8], 80)), *weight)
        };
        let backends = weights.iter().enumerate().map(backend).collect();
        Spread { scheduler, affinity: None, backends }
    }

    fn counts(slots: &[usize]) -> BTreeMap<usize, usize> {
        let mut counts = BTreeMap::new();
        for slot in slots {
            *counts.entry(*slot).or_default() += 1;
        }
        counts
    }

    #[test]
    fn who_has_no_weight_has_no_slot() {
        use Scheduler::{Lc, Mh, Rr, Sh, Wlc, Wrr};
        for scheduler in [Rr, Wrr, Lc, Wlc, Sh, Mh] {
            assert_eq!(spread(scheduler, &[]).slots(), [0; 0]);
            assert_eq!(spread(scheduler, &[0, 0]).slots(), [0; 0]);
            let slots = spread(scheduler, &[0, 1, 0, 1]).slots();
            assert_eq!(counts(&slots).into_keys().collect::<Vec<_>>(), [1, 3], "{scheduler}");
        }
    }

    #[test]
    fn turns_are_as_many_as_weights_say_and_never_bunched() {
        assert_eq!(spread(Scheduler::Rr, &[7, 1, 1]).slots(), [0, 1, 2]);
        assert_eq!(spread(Scheduler::Wrr, &[1, 3, 1]).slots(), [1, 0, 1, 2, 1]);
        assert_eq!(spread(Scheduler::Wrr, &[200, 100]).slots(), [0, 1, 0]);
        assert_eq!(spread(Scheduler::Wrr, &[5]).slots(), [0]);
        // More than there is room for: about so, and the least still has its turn.
        let many = counts(&spread(Scheduler::Wrr, &[65_535, 30_000, 1]).slots());
        assert_eq!(many[&2], 1);
        assert!((690..=720).contains(&many[&0]) && (310..=330).contains(&many[&1]), "{many:?}");
    }

    #[test]
    fn a_table_of_hashes_is_even_and_changes_little() {
        let before = spread(Scheduler::Mh, &[1; 10]).slots();
        assert!(before.len() >= 1000);
        let share = before.len() / 10;
        for (backend, count) in counts(&before) {
            assert!(count.abs_diff(share) <= share / 50 + 1, "{backend}: {count} of {share}");
        }
        // One of ten takes nothing any more: what had the others stays with them, but for a few.
        let mut weights = [1; 10];
        weights[3] = 0;
        let after = spread(Scheduler::Mh, &weights).slots();
        let moved = before.iter().zip(&after).filter(|(a, b)| **a != 3 && a != b).count();
        assert!(moved < before.len() / 20, "{moved} of {}", before.len());
        // Twice the weight, twice the slots.
        let heavy = counts(&spread(Scheduler::Sh, &[1, 2]).slots());
        assert!(heavy[&1].abs_diff(2 * heavy[&0]) <= 2, "{heavy:?}");
        // Thousands fit.
        let many = counts(&spread(Scheduler::Mh, &[1; 3000]).slots());
        assert_eq!(many.len(), 3000);
    }
}
