//! How long to wait between tries.

use std::time::Duration;

/// The first pause.
const FIRST: Duration = Duration::from_millis(100);
/// The longest.
const LONGEST: Duration = Duration::from_secs(2);

/// Pauses between tries at a store that fails: each is twice as long as the one before, up to two
/// seconds, less a random part, so that those who lost it together do not come back together.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The pause after one more failure.
    pub fn pause(&mut self) -> Duration {
        let whole = FIRST.saturating_mul(1 << self.failures.min(10)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        whole.mul_f64(rand::random_range(0.5..=1.0))
    }

    /// Begins anew after a success.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_doubled_up_to_the_longest_and_begin_anew_after_a_success() {
        let mut backoff = Backoff::default();
        for _ in 0..2 {
            for whole in [100, 200, 400, 800, 1600, 2000, 2000] {
                let pause = backoff.pause();
                let whole = Duration::from_millis(whole);
                assert!(whole / 2 <= pause && pause <= whole, "{pause:?} of {whole:?}");
            }
            for _ in 0..100 {
                assert!(backoff.pause() <= LONGEST);
            }
            backoff.reset();
        }
    }

    #[test]
    fn pauses_differ() {
        let pauses: std::collections::BTreeSet<_> =
            (0..20).map(|_| Backoff::default().pause()).collect();
        assert!(pauses.len() > 1);
    }
}
