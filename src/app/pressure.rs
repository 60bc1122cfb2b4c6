//! Tells in time that a network's addresses run out: at two levels of use, and where an estimate of
//! when, from how fast it grew, is near.
//!
//! A node watches the networks that it uses. What services and reservations take of others is seen
//! by the node that is asked for them, at that moment.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use super::agent::Agent;
use crate::api::{Level, percent};
use crate::cluster::ClusterError;
use crate::config::duration::Shown;
use crate::ipam::Count;
use crate::model::{Name, Network, NetworkId, Snapshot, Versioned};

/// How often it is looked.
const EVERY: Duration = Duration::from_secs(5);
/// How far back growth is looked at.
const HISTORY: Duration = Duration::from_secs(3600);
/// How far use must fall below a level before that counts as left.
const SLACK: u128 = 2;
/// How near the end must be for each level, where growth is steady.
const WARNING_BEFORE: Duration = Duration::from_secs(24 * 3600);
const ALARM_BEFORE: Duration = Duration::from_secs(3600);
/// How many times farther it must be before that level counts as left.
const FARTHER: u32 = 2;
/// Growth is steady that was seen for so long, and in each part of that time: not a deployment that
/// is made once.
const STEADY: Duration = Duration::from_secs(900);
const PARTS: u32 = 3;

/// From which part of its addresses on, in per cent, a network's use is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Levels {
    pub(super) warning: u8,
    pub(super) alarm: u8,
}

/// What was seen of one family of a network.
#[derive(Debug, Default)]
struct Course {
    /// The level by use, and by growth.
    reached: (Level, Level),
    used: VecDeque<(Instant, u128)>,
    /// When it was looked at last.
    seen: Option<Instant>,
}

impl Course {
    /// Takes what is seen now; gives the level when it has changed.
    fn see(&mut self, levels: Levels, count: &Count, now: Instant) -> Option<Level> {
        let used = count.usable - count.free();
        while self.used.front().is_some_and(|(at, _)| now.duration_since(*at) > HISTORY) {
            self.used.pop_front();
        }
        if self.used.back().is_none_or(|(_, last)| *last != used) {
            self.used.push_back((now, used));
        }
        self.seen = Some(now);
        let before = self.level();
        let by_use = level_at(levels, count, self.reached.0);
        self.reached = (by_use, self.level_by_growth(count, now));
        (before != self.level()).then_some(self.level())
    }

    fn level(&self) -> Level {
        self.reached.0.max(self.reached.1)
    }

    /// The level of when it ends; one that was reached is not left at once.
    fn level_by_growth(&self, count: &Count, now: Instant) -> Level {
        let Some(end) = self.ends_in(count, now) else { return Level::Fine };
        let (steady, before) = (self.is_steady(now), self.reached.1);
        let reaches = |level: Level, limit: Duration| {
            (steady && end <= limit) || (before >= level && end <= limit * FARTHER)
        };
        if reaches(Level::Alarm, ALARM_BEFORE) {
            Level::Alarm
        } else if reaches(Level::Warning, WARNING_BEFORE) {
            Level::Warning
        } else {
            Level::Fine
        }
    }

    fn is_steady(&self, now: Instant) -> bool {
        let Some((since, _)) = self.used.front() else { return false };
        let time = now.duration_since(*since);
        let at = |part: u32| {
            let moment = *since + time * part / PARTS;
            self.used.iter().take_while(|(at, _)| *at <= moment).last().map(|(_, used)| *used)
        };
        time >= STEADY && (0..PARTS).all(|part| at(part) < at(part + 1))
    }

    /// Whether it tells something still, though nobody watches it.
    fn is_recent(&self, now: Instant) -> bool {
        self.seen.is_some_and(|seen| now.duration_since(seen) <= HISTORY)
    }

    /// When nothing will be left if it goes on as it did; `None`: it did not grow.
    fn ends_in(&self, count: &Count, now: Instant) -> Option<Duration> {
        if count.free() == 0 {
            return Some(Duration::ZERO);
        }
        let (since, first) = self.used.front()?;
        let (_, last) = self.used.back()?;
        let grown = last.checked_sub(*first).filter(|grown| *grown > 0)?;
        let seconds = now.duration_since(*since).as_secs_f64() * count.free() as f64 / grown as f64;
        Duration::try_from_secs_f64(seconds.round()).ok()
    }
}

/// The level that a count reaches; one that was reached `before` is not left at once.
fn level_at(levels: Levels, count: &Count, before: Level) -> Level {
    let percent = percent(count.usable - count.free(), count.usable);
    let reaches = |level: u8, held: bool| {
        percent >= u128::from(level).saturating_sub(if held { SLACK } else { 0 })
    };
    if reaches(levels.alarm, before == Level::Alarm) {
        Level::Alarm
    } else if reaches(levels.warning, before >= Level::Warning) {
        Level::Warning
    } else {
        Level::Fine
    }
}

/// How full the networks are that this node uses, and where that leads.
#[derive(Debug)]
pub(super) struct Pressure {
    pub(super) levels: Levels,
    /// By network and whether it is IPv4.
    courses: Mutex<BTreeMap<(NetworkId, bool), Course>>,
}

impl Pressure {
    pub(super) fn new(levels: Levels) -> Self {
        Self { levels, courses: Mutex::default() }
    }

    /// The level that a count reaches, by use or by when nothing will be left; that is unknown of
    /// networks that this node did not see grow.
    pub(super) fn of(&self, network: NetworkId, ipv4: bool, count: &Count) -> (Level, Option<Duration>) {
        let courses = self.courses();
        let course = courses.get(&(network, ipv4));
        let (now, reached) =
            (Instant::now(), course.map_or_else(Default::default, |course| course.reached));
        let ends_in = course.and_then(|course| course.ends_in(count, now));
        let by_growth = course.map_or(Level::Fine, |course| course.level_by_growth(count, now));
        (level_at(self.levels, count, reached.0).max(by_growth), ends_in)
    }

    /// Takes how a network is used now, and tells where its level has changed.
    fn take(&self, network: &Network, (ipv4, family): (bool, &str), count: &Count) {
        let (now, mut courses) = (Instant::now(), self.courses());
        let course = courses.entry((network.id, ipv4)).or_default();
        if let Some(level) = course.see(self.levels, count, now) {
            tell(&network.name, family, level, count, course.ends_in(count, now));
        }
    }

    /// Forgets networks that are gone, and what was seen long ago of those that nobody watches.
    fn keep(&self, snapshot: &Snapshot) {
        let now = Instant::now();
        self.courses().retain(|(id, _), course| {
            snapshot.members.contains_key(id)
                || (snapshot.networks.contains_key(id) && course.is_recent(now))
        });
    }

    fn courses(&self) -> MutexGuard<'_, BTreeMap<(NetworkId, bool), Course>> {
        self.courses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The networks that this node uses and of whose members it has heard.
pub(super) fn followed(snapshot: &Snapshot) -> impl Iterator<Item = &Arc<Versioned<Network>>> {
    let heard = snapshot.members.iter().filter(|(_, members)| members.revision > 0);
    heard.filter_map(|(id, _)| snapshot.networks.get(id))
}

/// Says what has changed.
fn tell(network: &Name, family: &str, level: Level, count: &Count, ends_in: Option<Duration>) {
    let (free, ends_in) = (count.free(), ends_in.map_or("unknown".to_owned(), |t| Shown(t).to_string()));
    let Count { usable, endpoints, services, resting, reserved } = *count;
    match level {
        Level::Fine => info!(%network, family, usable, free, "enough addresses are free again"),
        Level::Warning => warn!(
            %network, family, usable, endpoints, services, resting, reserved, free, ends_in,
            "network runs out of addresses: netctl network expand gives it more"
        ),
        Level::Alarm => warn!(
            %network, family, usable, endpoints, services, resting, reserved, free, ends_in,
            "network is about to be full: netctl network expand gives it more"
        ),
    }
}

/// Watches the networks that this node uses, for ever.
pub(super) async fn watch(agent: Arc<Agent>) {
    let mut ticks = tokio::time::interval(EVERY);
    loop {
        ticks.tick().await;
        let snapshot = agent.snapshot();
        agent.pressure.keep(&snapshot);
        for network in followed(&snapshot) {
            for family in [(true, "IPv4"), (false, "IPv6")] {
                let count = agent.cluster().known_count(network, family.0);
                agent.pressure.take(network, family, &count);
            }
        }
    }
}

impl Agent {
    /// Looks at networks of which a service or a reservation has just taken addresses: those that
    /// this node uses are watched anyway, and of others perhaps nobody else tells.
    pub(super) async fn look_at(&self, references: impl IntoIterator<Item = String>) {
        for reference in references {
            if let Err(error) = self.look_at_one(&reference).await {
                // It comes after a change that is made.
                debug!(network = reference, %error, "use of the network's addresses not read");
            }
        }
    }

    async fn look_at_one(&self, reference: &str) -> Result<(), ClusterError> {
        let network = self.cluster().network(reference).await?;
        if self.snapshot().members.contains_key(&network.id) {
            return Ok(());
        }
        let survey = self.cluster().survey(&network).await?;
        self.pressure.take(&network, (true, "IPv4"), &survey.ipv4);
        self.pressure.take(&network, (false, "IPv6"), &survey.ipv6);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEVELS: Levels = Levels { warning: 80, alarm: 95 };

    fn count(endpoints: u128) -> Count {
        Count { usable: 100, endpoints, ..Count::default() }
    }

    #[test]
    fn each_level_is_told_once_on_the_way_up_and_down() {
        let (mut course, now) = (Course::default(), Instant::now());
        let told: Vec<_> = [10, 79, 80, 85, 79, 78, 95, 94, 93, 92, 80, 77, 0]
            .map(|endpoints| course.see(LEVELS, &count(endpoints), now))
            .into_iter()
            .collect();
        let (fine, warning, alarm) = (Some(Level::Fine), Some(Level::Warning), Some(Level::Alarm));
        assert_eq!(
            told,
            [None, None, warning, None, None, None, alarm, None, None, warning, None, fine, None]
        );
    }

    #[test]
    fn a_network_without_addresses_of_a_family_is_not_full() {
        let mut course = Course::default();
        assert_eq!(course.see(LEVELS, &Count::default(), Instant::now()), None);
    }

    #[test]
    fn the_level_is_that_of_the_count_at_hand() {
        let pressure = Pressure::new(LEVELS);
        let (used, other): (NetworkId, NetworkId) =
            ("aaaaaaaaaaaa".parse().unwrap(), "bbbbbbbbbbbb".parse().unwrap());
        let mut courses = pressure.courses();
        let (course, now) = (courses.entry((used, true)).or_default(), Instant::now());
        course.see(LEVELS, &count(90), now - Duration::from_secs(60));
        course.see(LEVELS, &count(96), now);
        drop(courses);
        let level = |network, ipv4, endpoints| pressure.of(network, ipv4, &count(endpoints)).0;
        for (endpoints, expected) in
            [(100, Level::Alarm), (93, Level::Alarm), (92, Level::Warning), (77, Level::Fine)]
        {
            assert_eq!(level(used, true, endpoints), expected, "{endpoints}");
        }
        // Of what was not seen before no level is held, and nobody knows where it leads.
        for (network, ipv4) in [(used, false), (other, true)] {
            assert_eq!(level(network, ipv4, 94), Level::Warning);
            assert_eq!(level(network, ipv4, 79), Level::Fine);
            assert_eq!(pressure.of(network, ipv4, &count(100)), (Level::Alarm, None));
        }
        // Six a minute, and four are left.
        let left = pressure.of(used, true, &count(96)).1.unwrap();
        assert!((40..60).contains(&left.as_secs()), "{left:?}");
        assert_eq!(pressure.of(used, true, &count(100)).1, Some(Duration::ZERO));
    }

    /// The levels that are told of a thousand addresses, where so many are used after so many minutes.
    fn told(course: &[(u64, u128)]) -> Vec<(u64, Level)> {
        let (mut seen, start) = (Course::default(), Instant::now());
        let told = course.iter().filter_map(|(minute, endpoints)| {
            let count = Count { usable: 1000, endpoints: *endpoints, ..Count::default() };
            let now = start + Duration::from_secs(60 * minute);
            seen.see(LEVELS, &count, now).map(|level| (*minute, level))
        });
        told.collect()
    }

    #[test]
    fn steady_growth_that_ends_within_a_day_or_an_hour_is_told_at_any_use() {
        // One a minute, of which 985 are left after fifteen: 16 hours.
        let slow: Vec<_> = (0..=60).map(|minute| (minute, u128::from(minute))).collect();
        assert_eq!(told(&slow), [(15, Level::Warning)]);
        // Ten a minute: 850 are left after fifteen, 85 minutes; sixty after forty.
        let fast: Vec<_> = (0..=50).map(|minute| (minute, 10 * u128::from(minute))).collect();
        assert_eq!(told(&fast), [(15, Level::Warning), (40, Level::Alarm)]);
        // One in an hour is no day's end.
        assert_eq!(told(&[(0, 0), (20, 1), (40, 2), (59, 3), (60, 3)]), []);
    }

    #[test]
    fn a_deployment_that_is_made_once_is_no_growth() {
        let once: Vec<_> = (0..=59).map(|minute| (minute, if minute < 3 { 0 } else { 300 })).collect();
        assert_eq!(told(&once), []);
        // Nor is what was not seen for long enough.
        let short: Vec<_> = (0..15).map(|minute| (minute, 20 * u128::from(minute))).collect();
        assert_eq!(told(&short), []);
    }

    #[test]
    fn growth_that_slows_down_is_left_where_the_end_is_twice_as_far() {
        // One a minute for half an hour, then none: after an hour that was long ago.
        let stops: Vec<_> = (0..=100).map(|minute| (minute, u128::from(minute.min(30)))).collect();
        let told = told(&stops);
        assert_eq!(told[0], (15, Level::Warning));
        assert_eq!((told.len(), told[1].1), (2, Level::Fine), "{told:?}");
        assert!((61..=91).contains(&told[1].0), "{told:?}");
    }

    #[test]
    fn the_level_of_growth_is_shown_too() {
        let pressure = Pressure::new(LEVELS);
        let id: NetworkId = "aaaaaaaaaaaa".parse().unwrap();
        let now = Instant::now();
        for (minutes_ago, endpoints) in [(30, 10), (20, 20), (10, 30), (0, 45)] {
            let before = now - Duration::from_secs(60 * minutes_ago);
            pressure.courses().entry((id, true)).or_default().see(LEVELS, &count(endpoints), before);
        }
        // More than one a minute, and 55 are left.
        let (level, end) = pressure.of(id, true, &count(45));
        assert_eq!(level, Level::Alarm, "{end:?}");
        assert_eq!(pressure.of(id, false, &count(40)), (Level::Fine, None));
    }

    #[test]
    fn the_end_is_where_growth_leads() {
        let (mut course, start) = (Course::default(), Instant::now());
        let later = |minutes: u64| start + Duration::from_secs(60 * minutes);
        course.see(LEVELS, &count(10), start);
        assert_eq!(course.ends_in(&count(10), later(1)), None);
        course.see(LEVELS, &count(40), later(10));
        // Three a minute, and sixty are left.
        assert_eq!(course.ends_in(&count(40), later(10)), Some(Duration::from_secs(1200)));
        // What was long ago does not count.
        course.see(LEVELS, &count(40), later(100));
        assert_eq!(course.ends_in(&count(40), later(100)), None);
    }
}
