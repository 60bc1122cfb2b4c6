//! What the checks of one endpoint have shown: pure, results and times come in.
//!
//! The rules are those of a Dockerfile's `HEALTHCHECK`, but that an endpoint which is pending is
//! looked at more often: within its first `interval`, or its start period where that is longer, a
//! check is made every second, and those that fail do not count.

use std::time::{Duration, Instant};

use crate::model::{EndpointState, HealthCheck};

/// From one check to the next while an endpoint that has just started is waited for.
const SOON: Duration = Duration::from_secs(1);

/// The health of one endpoint, and when it is checked next.
#[derive(Debug, Clone)]
pub(super) struct Course {
    check: HealthCheck,
    state: EndpointState,
    /// Why it does not take connections.
    reason: String,
    /// How many checks have failed since the last success, of those that count.
    failures: u32,
    started: Instant,
    due: Instant,
    /// Which part of a pause is the first one's, in 1/65536: what starts at one moment is checked at
    /// many.
    spread: u16,
}

impl Course {
    /// An endpoint as it is taken up in some state. One that is pending is checked at once, another
    /// within the first interval.
    pub(super) fn new(check: &HealthCheck, state: EndpointState, spread: u16, now: Instant) -> Self {
        let (check, reason) = (check.clone(), String::new());
        let mut course = Self { check, state, reason, failures: 0, started: now, due: now, spread };
        if state != EndpointState::Pending {
            course.due = now + course.part_of(course.interval());
        }
        course
    }

    /// Whether it takes connections, by what was seen so far.
    pub(super) fn state(&self) -> EndpointState {
        self.state
    }

    /// Why it does not: the text of the check that failed last when it became unhealthy.
    pub(super) fn reason(&self) -> &str {
        &self.reason
    }

    /// When the next check is to begin.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Checks otherwise from now on, and soon; failures of before do not count.
    pub(super) fn check_with(&mut self, check: &HealthCheck, now: Instant) {
        if self.check == *check {
            return;
        }
        self.check = check.clone();
        self.failures = 0;
        self.due = self.due.min(now + self.part_of(SOON));
    }

    /// Takes the result of a check, which failed for the reason that is given; whether the state is
    /// another one now.
    pub(super) fn take(
        &mut self,
        result: Result<(), String>,
        (began, ended): (Instant, Instant),
    ) -> bool {
        let (before, interval) = (self.state, self.interval());
        match result {
            Ok(()) => {
                (self.state, self.reason) = (EndpointState::Ready, String::new());
                self.failures = 0;
                self.due = match before {
                    EndpointState::Pending => ended + self.part_of(interval),
                    _ => ended + interval,
                };
            }
            Err(_) if before == EndpointState::Pending && began < self.settled() => {
                self.due = ended + interval.min(SOON);
            }
            Err(reason) => {
                self.failures = self.failures.saturating_add(1);
                if before != EndpointState::Unhealthy && self.failures >= self.check.retries {
                    (self.state, self.reason) = (EndpointState::Unhealthy, reason);
                }
                self.due = ended + interval;
            }
        }
        self.state != before
    }

    /// From when on failures of a pending endpoint count.
    fn settled(&self) -> Instant {
        let start_period = Duration::from_secs(self.check.start_period.into());
        self.started + start_period.max(self.interval())
    }

    fn interval(&self) -> Duration {
        Duration::from_secs(self.check.interval.into())
    }

    fn part_of(&self, pause: Duration) -> Duration {
        pause * self.spread.into() / 65_536
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::HealthTest;

    fn check(interval: u32, start_period: u32, retries: u32) -> HealthCheck {
        HealthCheck { test: HealthTest::Tcp { port: 80 }, interval, timeout: 1, start_period, retries }
    }

    /// Checks that take no time, each when it is due; gives when and to what the state changed, in
    /// milliseconds from the start.
    fn run(course: &mut Course, start: Instant, results: &[bool]) -> Vec<(u128, EndpointState)> {
        let mut changes = Vec::new();
        for well in results {
            let now = course.due();
            let result = if *well { Ok(()) } else { Err(format!("at {now:?}")) };
            if course.take(result, (now, now)) {
                changes.push((now.duration_since(start).as_millis(), course.state()));
                let reason = if *well { String::new() } else { format!("at {now:?}") };
                assert_eq!(course.reason(), reason);
            }
        }
        changes
    }

    #[test]
    fn a_pending_endpoint_is_ready_a_second_after_it_serves_whatever_the_interval() {
        let start = Instant::now();
        let mut course = Course::new(&check(30, 0, 3), EndpointState::Pending, 0, start);
        let changes = run(&mut course, start, &[false, false, false, false, true]);
        assert_eq!(changes, [(4000, EndpointState::Ready)]);
    }

    #[test]
    fn a_pending_endpoint_is_unhealthy_when_a_containers_health_check_would_be() {
        for (start_period, expected) in [(0, 90_000), (10, 90_000), (60, 120_000)] {
            let start = Instant::now();
            let mut course = Course::new(&check(30, start_period, 3), EndpointState::Pending, 0, start);
            let changes = run(&mut course, start, &[false; 200]);
            assert_eq!(changes, [(expected, EndpointState::Unhealthy)], "{start_period}");
        }
    }

    #[test]
    fn a_success_ends_the_start_period() {
        let start = Instant::now();
        let mut course = Course::new(&check(2, 600, 2), EndpointState::Pending, 0, start);
        let changes = run(&mut course, start, &[false, true, false, false, false, true]);
        let expected = [
            (1000, EndpointState::Ready),
            (3000, EndpointState::Unhealthy),
            (7000, EndpointState::Ready),
        ];
        assert_eq!(changes, expected);
    }

    #[test]
    fn an_endpoint_that_is_taken_up_ready_stays_so_until_the_retries_have_failed() {
        let start = Instant::now();
        let mut course = Course::new(&check(10, 600, 3), EndpointState::Ready, 32_768, start);
        let changes = run(&mut course, start, &[false, false, true, false, false, false]);
        assert_eq!(changes, [(55_000, EndpointState::Unhealthy)]);
    }

    #[test]
    fn a_check_that_is_replaced_starts_anew_and_soon() {
        let start = Instant::now();
        let mut course = Course::new(&check(300, 0, 2), EndpointState::Ready, 32_768, start);
        assert_eq!(run(&mut course, start, &[false]), []);
        let now = course.due();
        course.check_with(&check(300, 0, 2), now - Duration::from_secs(100));
        assert_eq!(course.due(), now, "it is the same check");
        let now = start + Duration::from_secs(200);
        course.check_with(&check(5, 0, 2), now);
        assert_eq!(course.due(), now + Duration::from_millis(500));
        assert_eq!(run(&mut course, start, &[false, false]), [(205_500, EndpointState::Unhealthy)]);
    }

    fn state() -> impl Strategy<Value = EndpointState> {
        prop_oneof![
            Just(EndpointState::Pending),
            Just(EndpointState::Ready),
            Just(EndpointState::Unhealthy)
        ]
    }

    proptest! {
        #[test]
        fn the_state_follows_from_the_results(
            (interval, start_period, retries) in (1_u32..40, 0_u32..60, 1_u32..5),
            (first, spread) in (state(), any::<u16>()),
            results in prop::collection::vec((any::<bool>(), 0_u64..3000), 1..60),
        ) {
            let start = Instant::now();
            let check = check(interval, start_period, retries);
            let mut course = Course::new(&check, first, spread, start);
            let pause = Duration::from_secs(interval.into());
            prop_assert!(course.due() >= start && course.due() <= start + pause);
            let mut failed = 0;
            for (well, took) in results {
                let (before, began) = (course.state(), course.due());
                let ended = began + Duration::from_millis(took);
                let result = if well { Ok(()) } else { Err("down".to_owned()) };
                let changed = course.take(result, (began, ended));
                failed = if well { 0 } else { failed + 1 };
                let state = course.state();
                prop_assert_eq!(changed, state != before);
                prop_assert!(course.due() >= ended && course.due() <= ended + pause);
                match (well, before) {
                    (true, _) => prop_assert_eq!(state, EndpointState::Ready),
                    (false, EndpointState::Ready) => {
                        let enough = failed >= retries;
                        prop_assert_eq!(state == EndpointState::Unhealthy, enough);
                    }
                    (false, EndpointState::Pending) if state != before => {
                        let grace = Duration::from_secs(start_period.into()).max(pause);
                        prop_assert!(failed >= retries && began >= start + grace);
                    }
                    (false, _) => prop_assert_eq!(state, before),
                }
            }
        }
    }
}
