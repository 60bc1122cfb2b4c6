//! The addresses of one subnet as bits: which are taken, and which free one comes next.
//!
//! Addresses are counted from the subnet's first. Chunks of 65,536 are kept only where something
//! in them is taken, so an IPv6 subnet costs what its endpoints cost. In a chunk a second row of
//! bits says which words are full, so finding a free address takes as long in a full subnet as in
//! an empty one.

use std::collections::BTreeMap;
use std::ops::Range;

const WORDS: usize = 1024;
const CHUNK: u128 = 64 * WORDS as u128;

/// A set of numbers from a range, most of which may be in it or not.
#[derive(Debug, Clone, Default)]
pub(super) struct Space {
    chunks: BTreeMap<u128, Chunk>,
}

#[derive(Debug, Clone)]
struct Chunk {
    words: Box<[u64; WORDS]>,
    /// Which words have no zero.
    full: [u64; WORDS / 64],
    taken: usize,
}

impl Chunk {
    fn new() -> Self {
        Self { words: Box::new([0; WORDS]), full: [0; WORDS / 64], taken: 0 }
    }

    /// The first zero at or behind `from`.
    fn next_free(&self, from: usize) -> Option<usize> {
        let (word, bit) = (from / 64, from % 64);
        let here = !self.words.get(word)? & (u64::MAX << bit);
        if here != 0 {
            return Some(word * 64 + here.trailing_zeros() as usize);
        }
        let next = word + 1;
        let mut mask = u64::MAX.checked_shl((next % 64) as u32).unwrap_or(0);
        for (index, full) in self.full.iter().enumerate().skip(next / 64) {
            let open = !full & mask;
            if open != 0 {
                let word = index * 64 + open.trailing_zeros() as usize;
                return Some(word * 64 + (!self.words[word]).trailing_zeros() as usize);
            }
            mask = u64::MAX;
        }
        None
    }
}

impl Space {
    /// Takes a number; `false`: it was taken already.
    pub(super) fn take(&mut self, number: u128) -> bool {
        let chunk = self.chunks.entry(number / CHUNK).or_insert_with(Chunk::new);
        let (word, bit) = place(number);
        let before = chunk.words[word];
        chunk.words[word] |= bit;
        if chunk.words[word] == u64::MAX {
            chunk.full[word / 64] |= 1 << (word % 64);
        }
        let new = before & bit == 0;
        chunk.taken += usize::from(new);
        new
    }

    /// Frees a number; `false`: it was free already.
    pub(super) fn free(&mut self, number: u128) -> bool {
        let Some(chunk) = self.chunks.get_mut(&(number / CHUNK)) else { return false };
        let (word, bit) = place(number);
        let was = chunk.words[word] & bit != 0;
        chunk.words[word] &= !bit;
        chunk.full[word / 64] &= !(1 << (word % 64));
        chunk.taken -= usize::from(was);
        if chunk.taken == 0 {
            self.chunks.remove(&(number / CHUNK));
        }
        was
    }

    /// The first number within the range that is free.
    pub(super) fn next_free(&self, range: Range<u128>) -> Option<u128> {
        let mut from = range.start;
        while from < range.end {
            let index = from / CHUNK;
            let Some(chunk) = self.chunks.get(&index) else { return Some(from) };
            // Less than a chunk's size: it fits.
            match chunk.next_free((from % CHUNK) as usize) {
                Some(found) => {
                    let found = index * CHUNK + found as u128;
                    return (found < range.end).then_some(found);
                }
                None => from = (index + 1) * CHUNK,
            }
        }
        None
    }

    /// How many numbers within the range are taken. For ranges of a block's size: it looks at each
    /// word.
    pub(super) fn taken(&self, range: Range<u128>) -> u128 {
        let mut taken = 0;
        let mut from = range.start;
        while from < range.end {
            let Some(chunk) = self.chunks.get(&(from / CHUNK)) else {
                from = (from / CHUNK + 1) * CHUNK;
                continue;
            };
            let (word, _) = place(from);
            let bits = (range.end - from).min(64 - from % 64);
            let mask = u64::MAX >> (64 - bits as u32) << (from % 64) as u32;
            taken += u128::from((chunk.words[word] & mask).count_ones());
            from += bits;
        }
        taken
    }
}

/// The word of a number in its chunk, and its bit in the word.
fn place(number: u128) -> (usize, u64) {
    let within = (number % CHUNK) as usize;
    (within / 64, 1 << (within % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against the obvious model: a set of numbers.
        #[test]
        fn it_does_what_a_set_does(
            steps in prop::collection::vec((any::<bool>(), 0u128..200_000), 0..400),
            asked in prop::collection::vec((0u128..200_000, 0u128..70_000), 20),
        ) {
            let (mut space, mut model) = (Space::default(), BTreeSet::new());
            // Whole words full, as in use.
            for number in 65_000..66_000 {
                space.take(number);
                model.insert(number);
            }
            for (take, number) in steps {
                match take {
                    true => prop_assert_eq!(space.take(number), model.insert(number)),
                    false => prop_assert_eq!(space.free(number), model.remove(&number)),
                }
            }
            for (start, length) in asked.into_iter().chain([(65_000, 1000), (65_001, 1002)]) {
                let range = start..start + length;
                let free = range.clone().find(|number| !model.contains(number));
                prop_assert_eq!(space.next_free(range.clone()), free);
                prop_assert_eq!(space.taken(range.clone()), model.range(range).count() as u128);
            }
        }
    }

    #[test]
    fn what_is_empty_again_costs_nothing() {
        let mut space = Space::default();
        let far = u128::from(u64::MAX);
        assert!(space.take(far) && !space.take(far));
        assert_eq!(space.next_free(far..far + 2), Some(far + 1));
        assert!(space.free(far) && !space.free(far));
        assert!(space.chunks.is_empty());
    }
}
