//! How results are written: tables and lines for people, JSON for programs.

use std::io::{ErrorKind, Write};

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;

use super::failure::Failure;
use crate::model::EndpointState;

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// Tables, and `Key: value` lines
    Table,
    /// All there is, as the API has it
    Json,
}

/// Writes to the standard output. A reader that has gone (`| head`) is no failure.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    print_while_read(text).map(drop)
}

/// Writes to the standard output; `false`: its reader has gone.
pub(super) fn print_while_read(text: &str) -> Result<bool, Failure> {
    let mut output = std::io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::failed(format!("cannot write the result: {error}"))),
    }
}

/// Writes one line.
pub(super) fn print_line(text: &str) -> Result<(), Failure> {
    print(&format!("{}\n", clean(text)))
}

/// Writes a value as JSON.
pub(super) fn print_json(value: &(impl Serialize + ?Sized)) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value);
    let text = text.map_err(|error| Failure::failed(format!("cannot write the result: {error}")))?;
    print(&format!("{text}\n"))
}

/// Writes a table: no lines, columns as wide as they must be.
pub(super) fn print_table(
    header: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
) -> Result<(), Failure> {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header.iter().copied());
    table.add_rows(rows.map(|row| row.iter().map(|cell| clean(cell)).collect::<Vec<_>>()));
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    print(&format!("{}\n", table.trim_fmt()))
}

/// Lines `Key: value` about one thing, the values aligned. Further values of a key stand below.
#[derive(Debug, Default)]
pub(super) struct Details(Vec<(&'static str, Vec<String>)>);

impl Details {
    /// Adds a key with one value.
    pub(super) fn with(self, key: &'static str, value: impl ToString) -> Self {
        self.with_all(key, [value])
    }

    /// Adds a key with any number of values.
    pub(super) fn with_all(
        mut self,
        key: &'static str,
        values: impl IntoIterator<Item = impl ToString>,
    ) -> Self {
        self.0.push((key, values.into_iter().map(|value| clean(&value.to_string())).collect()));
        self
    }
}

impl std::fmt::Display for Details {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = 2 + self.0.iter().map(|(key, _)| key.len()).max().unwrap_or_default();
        for (key, values) in &self.0 {
            let first = values.first().map_or("-", String::as_str);
            writeln!(f, "{:width$}{first}", format!("{key}:"))?;
            for value in values.iter().skip(1) {
                writeln!(f, "{:width$}{value}", "")?;
            }
        }
        Ok(())
    }
}

/// Writes results one after the other: as a JSON list, or as details with a line between.
pub(super) fn print_all<T: Serialize>(
    format: Format,
    values: &[T],
    details: impl Fn(&T) -> Details,
) -> Result<(), Failure> {
    match format {
        Format::Json => print_json(values),
        Format::Table => {
            let all = values.iter().map(|value| details(value).to_string()).collect::<Vec<_>>();
            print(&all.join("\n"))
        }
    }
}

/// `key=value` texts of labels.
pub(super) fn labels(labels: &std::collections::BTreeMap<String, String>) -> Vec<String> {
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect()
}

/// Whether an endpoint takes connections, and why not.
pub(super) fn state(state: EndpointState, reason: &str) -> String {
    if reason.is_empty() { state.to_string() } else { format!("{state}: {reason}") }
}

/// The text, or a dash where there is none.
pub(super) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// Values with commas between.
pub(super) fn joined(values: impl IntoIterator<Item = impl ToString>) -> String {
    values.into_iter().map(|value| value.to_string()).collect::<Vec<_>>().join(",")
}

/// The text without control characters but line ends: others' labels and messages must not steer
/// the terminal.
pub(super) fn clean(text: &str) -> String {
    let mut cleaned = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() && character != '\n' {
            cleaned.extend(character.escape_default());
        } else {
            cleaned.push(character);
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn details_are_aligned_and_further_values_stand_below() {
        let details = Details::default().with("ID", 7).with_all("Subnets", ["a", "b"]);
        let details = details.with_all("Labels", Vec::<String>::new());
        assert_eq!(details.to_string(), "ID:      7\nSubnets: a\n         b\nLabels:  -\n");
    }

    proptest! {
        #[test]
        fn no_text_steers_the_terminal(text in "(\\PC|\\pC){0,40}") {
            prop_assert!(clean(&text).chars().all(|c| !c.is_control() || c == '\n'));
        }
    }
}
