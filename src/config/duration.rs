//! Durations as people write them: `1500ms`, `10s`, `1m30s`, `2h`.

use std::fmt;
use std::time::Duration;

/// The units, longest first: name and milliseconds.
const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// Text that is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a duration: give numbers with ms, s, m or h, such as 10s or 1m30s")]
pub struct ParseDurationError {
    text: String,
}

/// Reads a duration: whole numbers, each with a unit, the longer units first. `0` needs no unit.
///
/// # Errors
/// When it is anything else.
pub fn parse(text: &str) -> Result<Duration, ParseDurationError> {
    let error = || ParseDurationError { text: text.chars().take(40).collect() };
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let (mut rest, mut milliseconds, mut units) = (text, 0_u64, &UNITS[..]);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, behind) = rest.split_at(digits);
        let letters = behind.bytes().take_while(u8::is_ascii_lowercase).count();
        let (unit, behind) = behind.split_at(letters);
        let index = units.iter().position(|(name, _)| *name == unit).ok_or_else(error)?;
        let number: u64 = number.parse().map_err(|_| error())?;
        let part = number.checked_mul(units[index].1).ok_or_else(error)?;
        milliseconds = milliseconds.checked_add(part).ok_or_else(error)?;
        (rest, units) = (behind, &units[index + 1..]);
    }
    if text.is_empty() { Err(error()) } else { Ok(Duration::from_millis(milliseconds)) }
}

/// A duration as [`parse`] reads it; what is below a millisecond is left out.
#[derive(Debug, Clone, Copy)]
pub struct Shown(pub Duration);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        if rest == 0 {
            return f.write_str("0s");
        }
        for (unit, milliseconds) in UNITS {
            let number = rest / milliseconds;
            rest %= milliseconds;
            if number > 0 {
                write!(f, "{number}{unit}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, milliseconds) in [
            ("0", 0),
            ("0s", 0),
            ("1500ms", 1500),
            ("10s", 10_000),
            ("1m30s", 90_000),
            ("2h", 7_200_000),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for text in
            ["", "10", "s", "-1s", "1.5s", "1s1h", "1s1s", " 1s", "1 s", "1d", "99999999999999999999s"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse(&format!("{}h", u64::MAX)).is_err());
    }

    proptest! {
        #[test]
        fn a_duration_reads_back_what_it_shows(milliseconds in 0..u64::MAX / 2) {
            let duration = Duration::from_millis(milliseconds);
            prop_assert_eq!(parse(&Shown(duration).to_string()), Ok(duration));
        }

        #[test]
        fn no_text_is_a_panic(text in "\\PC*") {
            let _ = parse(&text);
        }
    }
}
