//! A verdict for people: a table, and how full each network will be.

use std::io::IsTerminal;

use crate::api::{self, Level, SettingsView};
use crate::cli::failure::Failure;
use crate::cli::output;
use crate::plan::verdict::{FamilyVerdict, NetworkVerdict, PoolSubnet, State, Verdict};

/// How wide a bar is.
const WIDTH: usize = 24;

/// Prints the table and the bars.
pub(super) fn print(verdict: &Verdict, settings: &SettingsView) -> Result<(), Failure> {
    let header =
        ["NETWORK", "NEEDED", "ENDPOINTS", "SURGE", "VIPS", "FREE", "FITS", "SHORT", "MORE STACKS"];
    output::print_table(&header, verdict.networks.iter().map(row))?;
    let bars = bars(&verdict.networks, settings, is_colourful());
    if bars.is_empty() { Ok(()) } else { output::print(&format!("\n{bars}")) }
}

/// One line for a network: of its families the one of which least is left.
fn row(network: &NetworkVerdict) -> Vec<String> {
    let (free, short, more) = match network.tightest() {
        None => ("-".to_owned(), "-".to_owned(), "-".to_owned()),
        Some(family) => (
            format!("{}{}", family.stock.free, origin(network, family)),
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

/// Where the addresses of a network come from that is not there yet.
fn origin(network: &NetworkVerdict, family: &FamilyVerdict) -> String {
    match (network.state, family.pool) {
        (State::Exists | State::Missing, _) => String::new(),
        (State::New, None) => " (new)".to_owned(),
        (State::New, Some(PoolSubnet { prefix, assumed: false })) => format!(" (new, /{prefix})"),
        (State::New, Some(PoolSubnet { prefix, assumed: true })) => {
            format!(" (new, /{prefix} assumed)")
        }
    }
}

/// Whether whoever reads the standard output wants colours.
fn is_colourful() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn bars(networks: &[NetworkVerdict], settings: &SettingsView, colourful: bool) -> String {
    let width = networks.iter().map(|network| network.name.len()).max().unwrap_or_default();
    let mut text = String::new();
    for network in networks {
        let Some(family) = network.tightest() else { continue };
        let percent = percent(family, network.needed);
        let (on, off) = match settings.level(percent) {
            _ if !colourful => ("", ""),
            _ if percent > 100 => ("\x1b[31m", "\x1b[0m"),
            Level::Fine => ("\x1b[32m", "\x1b[0m"),
            Level::Warning => ("\x1b[33m", "\x1b[0m"),
            Level::Alarm => ("\x1b[31m", "\x1b[0m"),
        };
        let bar = bar(percent);
        text.push_str(&format!("{:width$}   {on}[{bar}]{off} {percent:>3} %\n", network.name));
    }
    text
}

/// How much of a network is used after the deployment; above 100 only if it does not fit.
fn percent(family: &FamilyVerdict, needed: u64) -> u128 {
    let (usable, free) = (family.stock.usable, family.stock.free);
    api::percent(usable.saturating_sub(free).saturating_add(needed.into()), usable)
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
        let families = vec![FamilyVerdict { family, stock, pool: None, fits, short, more: None }];
        let (total, state) = (Count::default(), State::Exists);
        let name = name.to_owned();
        NetworkVerdict { name, state, fits, needed, total, families, services: Vec::new() }
    }

    #[test]
    fn a_bar_shows_how_full_a_network_will_be() {
        let networks = [
            network("web", 200, 100, 46),
            network("longer", 253, 253, 0),
            network("warned", 200, 100, 60),
            network("full", 253, 3, 3),
            network("over", 253, 3, 4),
            network("empty", 0, 0, 2),
        ];
        let expected = "\
web      [#################.......]  73 %
longer   [........................]   0 %
warned   [###################.....]  80 %
full     [########################] 100 %
over     [########################] 101 %
empty    [########################] 200 %
";
        let usual = SettingsView::default();
        assert_eq!(bars(&networks, &usual, false), expected);
        let colours = |settings: &SettingsView| -> Vec<String> {
            let coloured = bars(&networks, settings, true);
            coloured.lines().map(|line| line.split_once('[').unwrap().1[..2].to_owned()).collect()
        };
        let (green, yellow, red) = ("32", "33", "31");
        assert_eq!(colours(&usual), [green, green, yellow, red, red, red]);
        // Where they begin is the agent's to say.
        let other = SettingsView { address_warning: 70, address_alarm: 75, ..usual.clone() };
        assert_eq!(colours(&other), [yellow, green, red, red, red, red]);
        assert!(bars(&networks, &usual, true).contains("]\x1b[0m 101 %"));
    }
}
