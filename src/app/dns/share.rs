//! What each client may have at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::Asker;

/// How many of something each client has.
#[derive(Debug)]
pub(super) struct Shares {
    most: usize,
    taken: Mutex<HashMap<Asker, usize>>,
}

/// One of them; dropping it gives it back.
#[derive(Debug)]
pub(super) struct Share {
    of: Arc<Shares>,
    asker: Asker,
}

impl Shares {
    /// At most so many for one client.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, taken: Mutex::default() })
    }

    /// `None`: it has as many already as one may have.
    pub(super) fn take(self: &Arc<Self>, asker: Asker) -> Option<Share> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(asker).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Share { of: self.clone(), asker })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.of.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.asker) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.asker);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Side;
    use super::*;

    #[test]
    fn one_client_has_so_many_and_another_its_own() {
        let shares = Shares::new(3);
        let asker = |last: u8| (Side::Network("aaaaaaaaaaaa".parse().unwrap()), [10, 9, 0, last].into());
        let mut all: Vec<_> = (0..3).map(|_| shares.take(asker(2)).unwrap()).collect();
        assert!(shares.take(asker(2)).is_none());
        assert!(shares.take(asker(3)).is_some());
        all.pop();
        all.push(shares.take(asker(2)).expect("one was given back"));
        drop(all);
        assert!(shares.taken.lock().unwrap().is_empty());
    }
}
