//! What was measured: a table for people, one line for programs.

/// Which way a metric is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Higher,
    Lower,
}

/// One metric, measured in turns on our side and on a peer's.
#[derive(Debug)]
pub struct Metric {
    /// Its name, which ends with its unit.
    pub name: String,
    /// What it is, for people.
    pub what: String,
    pub better: Better,
    pub ours: Vec<f64>,
    /// The peers' names and values; those at the same place were measured in the same turn.
    peers: Vec<(&'static str, Vec<f64>)>,
}

impl Metric {
    /// A metric without values.
    pub fn new(name: impl Into<String>, what: impl Into<String>, better: Better) -> Self {
        Self { name: name.into(), what: what.into(), better, ours: Vec::new(), peers: Vec::new() }
    }

    /// A metric of ours alone, with its only value.
    pub fn single(name: &str, what: &str, better: Better, value: f64) -> Self {
        Self { ours: vec![value], ..Self::new(name, what, better) }
    }

    /// A metric with one value on each side.
    pub fn versus(
        name: impl Into<String>,
        what: impl Into<String>,
        better: Better,
        ours: f64,
        peer: (&'static str, f64),
    ) -> Self {
        Self { ours: vec![ours], peers: vec![(peer.0, vec![peer.1])], ..Self::new(name, what, better) }
    }

    /// Keeps a turn's two values.
    pub fn add(&mut self, ours: f64, peer: &'static str, theirs: f64) {
        self.ours.push(ours);
        self.add_peer(peer, theirs);
    }

    /// Keeps a peer's value of a turn.
    pub fn add_peer(&mut self, peer: &'static str, theirs: f64) {
        match self.peers.iter_mut().find(|(name, _)| *name == peer) {
            Some((_, values)) => values.push(theirs),
            None => self.peers.push((peer, vec![theirs])),
        }
    }

    /// The median of the turns' ratios; above 1 means that ours is better.
    fn ratio(&self, theirs: &[f64]) -> f64 {
        let ratios = self.ours.iter().zip(theirs).map(|(ours, theirs)| match self.better {
            Better::Higher => ours / theirs,
            Better::Lower => theirs / ours,
        });
        median(ratios)
    }
}

/// All metrics of a benchmark.
#[derive(Debug, Default)]
pub struct Report {
    pub metrics: Vec<Metric>,
}

impl Report {
    /// Prints the table and the line.
    pub fn print(&self, name: &str) {
        println!("\n{:44} {:>12} {:>22} {:>7}", name, "netctl", "beside", "ratio");
        for metric in &self.metrics {
            let ours = number(median(metric.ours.iter().copied()));
            if metric.peers.is_empty() {
                println!("{:44} {ours:>12}", metric.what);
            }
            for (peer, values) in &metric.peers {
                let theirs = format!("{peer} {}", number(median(values.iter().copied())));
                let ratio = metric.ratio(values);
                println!("{:44} {ours:>12} {theirs:>22} {ratio:>7.2}", metric.what);
            }
        }
        println!("{}", self.line(name));
    }

    fn line(&self, name: &str) -> String {
        let mut line = format!("RESULT {name}");
        for metric in &self.metrics {
            let key = &metric.name;
            line.push_str(&format!(" ours_{key}={}", number(median(metric.ours.iter().copied()))));
            for (peer, values) in &metric.peers {
                let theirs = number(median(values.iter().copied()));
                let ratio = metric.ratio(values);
                line.push_str(&format!(" {peer}_{key}={theirs} ratio_{key}_vs_{peer}={ratio:.2}"));
            }
        }
        line
    }
}

/// The middle value; 0 where there is none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    percentile(values, 50)
}

/// The value that `percent` of all do not exceed (nearest rank; the median of an even number is
/// the mean of the two in the middle).
pub fn percentile(values: impl IntoIterator<Item = f64>, percent: usize) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let at = |rank: usize| values.get(rank.saturating_sub(1)).copied().unwrap_or_default();
    let rank = (values.len() * percent).div_ceil(100);
    if percent == 50 && values.len().is_multiple_of(2) {
        return f64::midpoint(at(rank), at(rank + 1));
    }
    at(rank)
}

fn number(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let values = || (1..=200).map(f64::from);
        assert_eq!(percentile(values(), 99), 198.0);
        assert_eq!(median(values()), 100.5);
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
    }

    #[test]
    fn a_ratio_above_one_means_that_ours_is_better() {
        let mut rate = Metric::new("pps", "", Better::Higher);
        let mut time = Metric::new("ms", "", Better::Lower);
        for (ours, theirs) in [(2.0, 1.0), (4.0, 2.0), (9.0, 1.0)] {
            rate.add(ours, "peer", theirs);
            time.add(theirs, "peer", ours);
        }
        let report = Report { metrics: vec![rate, time] };
        let line = "RESULT x ours_pps=4.000 peer_pps=1.000 ratio_pps_vs_peer=2.00 \
                    ours_ms=1.000 peer_ms=4.000 ratio_ms_vs_peer=2.00";
        assert_eq!(report.line("x"), line);
    }
}
