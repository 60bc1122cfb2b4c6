//! What packets did, for those who watch: the programs write it, one reader takes it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::time::Duration;

use aya::maps::{Map as AnyMap, MapData, RingBuf};
use nix::time::{ClockId, clock_gettime};

use super::layout::{LAYOUT, Report, Watching};
use super::{DIRECTORY, Error, Maps};

/// What is counted of a node, in the order of `enum event`.
pub const EVENTS: [&str; 9] = [
    "table-full",
    "no-backend",
    "port-taken",
    "foreign-source",
    "no-route",
    "no-memory",
    "not-shown",
    "name-told",
    "fragments",
];

/// The reports of a node's programs. Nobody writes any until somebody wants them.
pub struct Reports {
    maps: Maps,
    ring: RingBuf<MapData>,
}

impl Reports {
    /// Those of the programs that an agent has loaded on this node; `None`: there are none.
    ///
    /// # Errors
    /// When their maps cannot be opened.
    pub fn of_agent() -> Result<Option<Self>, Error> {
        let directory = Path::new(DIRECTORY).join(LAYOUT.to_string());
        if directory.join("reports").exists() { Self::open_in(&directory).map(Some) } else { Ok(None) }
    }

    /// Those of the programs whose maps are pinned in this directory.
    ///
    /// # Errors
    /// As above.
    pub fn open_in(directory: &Path) -> Result<Self, Error> {
        let maps = Maps::open(directory)?;
        let failed = |source| Error::Map { action: "open", map: "reports", source };
        let fd = maps.reports.try_clone().map_err(failed)?;
        let ring = MapData::from_fd(fd).and_then(|data| RingBuf::try_from(AnyMap::RingBuf(data)));
        Ok(Self { ring: ring.map_err(|error| failed(io::Error::other(error)))?, maps })
    }

    /// Has the programs report for so long: each packet that is not carried, and one of so many others, 0 for
    /// none; only those of a network, by its number, or with 0 of all.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn want(&self, every: u32, network: u32, time: Duration) -> io::Result<()> {
        let until = match time {
            Duration::ZERO => 0,
            time => nanoseconds()?.saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)),
        };
        self.maps.watching.insert(&0, &Watching { until, every, network })
    }

    /// How many could not be shown, so far, since nobody read the others in time.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn not_shown(&self) -> io::Result<u64> {
        let event = EVENTS.iter().position(|event| *event == "not-shown").unwrap_or_default();
        self.maps.event(event as u32)
    }

    /// Takes the next one that is there.
    pub fn take(&mut self) -> Option<Report> {
        loop {
            let bytes = self.ring.next()?;
            // Nobody but the programs writes there, and they write nothing else.
            if let Ok(report) = bytemuck::try_pod_read_unaligned(&bytes) {
                return Some(report);
            }
        }
    }
}

impl AsRawFd for Reports {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl std::fmt::Debug for Reports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reports").finish_non_exhaustive()
    }
}

/// The time that reports bear: nanoseconds of `CLOCK_MONOTONIC`.
///
/// # Errors
/// When the system has no such clock.
pub fn nanoseconds() -> io::Result<u64> {
    Ok(Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_nanos() as u64)
}
