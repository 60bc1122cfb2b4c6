//! Waiting for facts instead of sleeping, and how much longer everything takes on a slow machine.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// How long a fact may take to become true before a test fails, on a machine of usual speed.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// How many times slower this machine is than a usual one: the whole number in `NETCTL_SLOWNESS`, 1
/// without. `scripts/vm` sets it where the processor is emulated.
///
/// Every limit and every rate of the test ground is given for a machine of usual speed and adjusted
/// by this factor, in [`limit`] and [`rate`] only.
static SLOWNESS: LazyLock<u32> = LazyLock::new(|| match std::env::var("NETCTL_SLOWNESS") {
    Ok(text) => match text.parse() {
        Ok(factor @ 1..=1000) => factor,
        _ => panic!("NETCTL_SLOWNESS is a number from 1 to 1000, not {text:?}"),
    },
    Err(_) => 1,
});

/// A limit of time for this machine.
pub(crate) fn limit(usual: Duration) -> Duration {
    usual * *SLOWNESS
}

/// A rate, in events a second, for this machine.
pub(crate) fn rate(usual: u32) -> u32 {
    (usual / *SLOWNESS).max(1)
}

/// Waits until `fact` is true; `false` when it was not within `usual`, on a machine of usual speed.
pub fn eventually(usual: Duration, mut fact: impl FnMut() -> bool) -> bool {
    let (start, limit) = (Instant::now(), limit(usual));
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
    let deadline = limit(DEADLINE);
    assert!(eventually(DEADLINE, fact), "within {deadline:?} it did not come true: {what}");
}
