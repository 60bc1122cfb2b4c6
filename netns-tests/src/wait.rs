//! Waiting for facts instead of sleeping.

use std::time::{Duration, Instant};

/// How long a fact may take to become true before a test fails.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Waits until `fact` is true; `false` when it was not within `limit`.
pub fn eventually(limit: Duration, mut fact: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if fact() {
            return true;
        }
        if start.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until `fact` is true.
///
/// # Panics
/// When it was not within [`DEADLINE`]; the message names `what`.
#[track_caller]
pub fn wait_for(what: &str, fact: impl FnMut() -> bool) {
    assert!(eventually(DEADLINE, fact), "within {DEADLINE:?} it did not come true: {what}");
}
