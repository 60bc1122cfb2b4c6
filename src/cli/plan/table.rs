//! A verdict for people: a table, and how full each network will be.

use std::io::IsTerminal;

use crate::cli::failure::Failure;
use crate::cli::output;
use crate::plan::verdict::{FamilyVerdict, NetworkVerdict, State, Verdict};

/// How wide a bar is.
const WIDTH: usize = 24;

/// Prints the table and the bars.
pub(super) fn print(verdict: &Verdict) -> Result<(), Failure> {
    let header =
        ["NETWORK", "NEEDED", "ENDPOINTS", "SURGE", "VIPS", "FREE", "FITS", "SHORT", "MORE STACKS"];
    output::print_table(&header, verdict.networks.iter().map(row))?;
    let bars = bars(&verdict.networks, is_colourful());
    if bars.is_empty() { Ok(()) } else { output::print(&format!("\n{bars}")) }
}

/// One line for a network: of its families the one of which least is left.
fn row(network: &NetworkVerdict) -> Vec<String> {
    let (free, short, more) = match network.tightest() {
        None => ("-".to_owned(), "-".to_owned(), "-".to_owned()),
        Some(family) => (
            format!("{}{}", family.stock.free, if network.state == State::New { " (new)" } else { "" }),
            family.short.to_string(),
            family.more.map_or_else(|| "-".to_owned(), |more| more.to_string()),
        ),
    };
    let fits = match (network.state, network.fits) {
        (State::Missing, _) => "no network",
        (State::Exists | State::New, true) => "yes",
        (State::Exists | State::New, false) => "no",
    };
    let total = network.total;
    let numbers = [network.needed, total.endpoints, total.surge, total.vips];
    let mut row = vec![network.name.clone()];
    row.extend(numbers.map(|number| number.to_string()));
    row.extend([free, fits.to_owned(), short, more]);
    row
}

/// Whether whoever reads the standard output wants colours.
fn is_colourful() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn bars(networks: &[NetworkVerdict], colourful: bool) -> String {
    let width = networks.iter().map(|network| network.name.len()).max().unwrap_or_default();
    let mut text = String::new();
    for network in networks {
        let Some(family) = network.tightest() else { continue };
        let percent = percent(family, network.needed);
        let (on, off) = match percent {
            _ if !colourful => ("", ""),
            0..80 => ("\x1b[32m", "\x1b[0m"),
            80..=100 => ("\x1b[33m", "\x1b[0m"),
            _ => ("\x1b[31m", "\x1b[0m"),
        };
        let bar = bar(percent);
        text.push_str(&format!("{:width$}   {on}[{bar}]{off} {percent:>3} %\n", network.name));
    }
    text
}

/// How much of a network is used after the deployment; above 100 only if it does not fit.
fn percent(family: &FamilyVerdict, needed: u64) -> u128 {
    let (usable, free) = (family.stock.usable, family.stock.free);
    let used = usable.saturating_sub(free).saturating_add(needed.into());
    let hundredfold = used.saturating_mul(100);
    if used > usable { hundredfold.div_ceil(usable.max(1)) } else { hundredfold / usable.max(1) }
}

fn bar(percent: u128) -> String {
    let filled = usize::try_from(percent.min(100)).unwrap_or(100) * WIDTH / 100;
    format!("{}{}", "#".repeat(filled), ".".repeat(WIDTH - filled))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::demand::Count;
    use crate::plan::verdict::{Family, Stock};

    fn network(name: &str, usable: u128, free: u128, needed: u64) -> NetworkVerdict {
        let short = u128::from(needed).saturating_sub(free);
        let (family, stock, fits) = (Family::Ipv4, Stock { usable, free }, short == 0);
        let families = vec![FamilyVerdict { family, stock, fits, short, more: None }];
        let (total, state) = (Count::default(), State::Exists);
        let name = name.to_owned();
        NetworkVerdict { name, state, fits, needed, total, families, services: Vec::new() }
    }

    #[test]
    fn a_bar_shows_how_full_a_network_will_be() {
        let networks = [
            network("web", 200, 100, 46),
            network("longer", 253, 253, 0),
            network("full", 253, 3, 3),
            network("over", 253, 3, 4),
            network("empty", 0, 0, 2),
        ];
        let expected = "\
web      [#################.......]  73 %
longer   [........................]   0 %
full     [########################] 100 %
over     [########################] 101 %
empty    [########################] 200 %
";
        assert_eq!(bars(&networks, false), expected);
        let coloured = bars(&networks[2..4], true);
        assert!(coloured.contains("\x1b[33m[") && coloured.contains("]\x1b[0m 101 %"), "{coloured:?}");
    }
}
