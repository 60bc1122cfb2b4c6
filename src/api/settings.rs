//! What clients need of an agent's configuration.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Level;

/// The agent's configuration, as far as its clients go by it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SettingsView {
    /// The prefix length of the IPv4 subnet that the default pool gives to a network.
    pub pool_prefix: u8,
    /// The same of IPv6.
    pub pool6_prefix: u8,
    /// From which use of a network's addresses on it runs full, in per cent.
    pub address_warning: u8,
    /// From which use on it is about to be full, in per cent.
    pub address_alarm: u8,
    /// What all names are below of.
    #[serde(default)]
    pub dns_domain: String,
    /// The loopback address at which names are answered on the host itself; `null`: nowhere.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub dns_host: Option<IpAddr>,
}

impl Default for SettingsView {
    /// What an agent has whose configuration says nothing.
    fn default() -> Self {
        Self {
            pool_prefix: 24,
            pool6_prefix: 64,
            address_warning: 80,
            address_alarm: 95,
            dns_domain: "netctl.internal".to_owned(),
            dns_host: None,
        }
    }
}

impl SettingsView {
    /// The level of a use in per cent.
    pub fn level(&self, percent: u128) -> Level {
        match percent {
            _ if percent >= self.address_alarm.into() => Level::Alarm,
            _ if percent >= self.address_warning.into() => Level::Warning,
            _ => Level::Fine,
        }
    }
}

/// How many per cent of some addresses are used: whole ones, and more than 100 only where more are
/// used than there are.
pub fn percent(used: u128, usable: u128) -> u128 {
    // Of numbers so large the last bits do not matter.
    let bits = if used.max(usable).leading_zeros() < 7 { 7 } else { 0 };
    let (hundredfold, usable) = ((used >> bits).saturating_mul(100), usable >> bits);
    match usable {
        // Without addresses nothing is used, but what is used is too much.
        0 => hundredfold,
        _ if used >> bits > usable => hundredfold.div_ceil(usable),
        _ => hundredfold / usable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_use_in_per_cent_passes_100_only_where_there_is_too_little() {
        for (used, usable, expected) in [
            (0, 0, 0),
            (2, 0, 200),
            (0, 253, 0),
            (252, 253, 99),
            (253, 253, 100),
            (254, 253, 101),
            (u128::MAX, u128::MAX, 100),
            (u128::MAX / 2, u128::MAX, 49),
        ] {
            assert_eq!(percent(used, usable), expected, "{used} of {usable}");
        }
    }

    #[test]
    fn levels_begin_where_the_configuration_says() {
        let settings = SettingsView { address_warning: 50, address_alarm: 50, ..Default::default() };
        assert_eq!(
            [49, 50, 101].map(|percent| settings.level(percent)),
            [Level::Fine, Level::Alarm, Level::Alarm]
        );
        let usual = SettingsView::default();
        assert_eq!(
            [79, 80, 95].map(|percent| usual.level(percent)),
            [Level::Fine, Level::Warning, Level::Alarm]
        );
    }
}
