//! Tells in time that a network's addresses run out: at two levels of use, and with an estimate of
//! when, from how fast it grew.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::agent::Agent;
use crate::api::{Level, percent};
use crate::config::duration::Shown;
use crate::ipam::Count;
use crate::model::{Network, NetworkId, Snapshot, Versioned};

/// How often it is looked.
const EVERY: Duration = Duration::from_secs(5);
/// How far back growth is looked at.
const HISTORY: Duration = Duration::from_secs(3600);
/// How far use must fall below a level before that counts as left.
const SLACK: u128 = 2;

/// From which part of its addresses on, in per cent, a network's use is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Levels {
    pub(super) warning: u8,
    pub(super) alarm: u8,
}

/// What was seen of one family of a network.
#[derive(Debug, Default)]
struct Course {
    level: Level,
    used: VecDeque<(Instant, u128)>,
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
        let level = level_at(levels, count, self.level);
        let before = std::mem::replace(&mut self.level, level);
        (before != level).then_some(level)
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

    /// The level that a count reaches, and when nothing will be left; that is unknown of networks
    /// that this node does not use, and where use did not grow.
    pub(super) fn of(&self, network: NetworkId, ipv4: bool, count: &Count) -> (Level, Option<Duration>) {
        let courses = self.courses();
        let course = courses.get(&(network, ipv4));
        let before = course.map_or(Level::Fine, |course| course.level);
        let ends_in = course.and_then(|course| course.ends_in(count, Instant::now()));
        (level_at(self.levels, count, before), ends_in)
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

/// Watches the networks that this node uses, for ever.
pub(super) async fn watch(agent: Arc<Agent>) {
    let levels = agent.pressure.levels;
    let mut ticks = tokio::time::interval(EVERY);
    loop {
        ticks.tick().await;
        let snapshot = agent.snapshot();
        let mut courses = agent.pressure.courses();
        courses.retain(|(id, _), _| snapshot.members.contains_key(id));
        for network in followed(&snapshot) {
            for (ipv4, family) in [(true, "IPv4"), (false, "IPv6")] {
                let count = agent.cluster().known_count(network, ipv4);
                let (now, course) = (Instant::now(), courses.entry((network.id, ipv4)).or_default());
                let Some(level) = course.see(levels, &count, now) else { continue };
                let Count { usable, endpoints, services, resting, reserved } = count;
                let (network, free) = (&network.name, count.free());
                let ends_in = course
                    .ends_in(&count, now)
                    .map_or("unknown".to_owned(), |time| Shown(time).to_string());
                match level {
                    Level::Fine => {
                        info!(%network, family, usable, free, "enough addresses are free again");
                    }
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
        }
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
