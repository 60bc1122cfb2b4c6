//! Where settings come from: flags, environment and file become text by key, each with its place.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::{DEFAULT_FILE, Flags, Problem};

/// What a setting's text looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    One,
    /// `true` or `false`.
    Truth,
    Many,
    /// `KEY=VALUE` texts; a table in the file.
    Pairs,
    /// The same, where a key may have several values: in the file lists.
    Lists,
}

/// All keys, as the file has them; those of a section with its name before a dot.
const KEYS: [(&str, Shape); 45] = [
    ("node", Shape::One),
    ("state_dir", Shape::One),
    ("run_dir", Shape::One),
    ("socket", Shape::One),
    ("socket_group", Shape::One),
    ("metrics", Shape::One),
    ("underlay", Shape::One),
    ("tunnel_port", Shape::One),
    ("pools", Shape::Many),
    ("pool_prefix", Shape::One),
    ("pools6", Shape::Many),
    ("pool6_prefix", Shape::One),
    ("vni_first", Shape::One),
    ("vni_last", Shape::One),
    ("lease", Shape::One),
    ("rest", Shape::One),
    ("address_warning", Shape::One),
    ("address_alarm", Shape::One),
    ("resync", Shape::One),
    ("lb", Shape::One),
    ("lb_connections", Shape::One),
    ("fast_path", Shape::Truth),
    ("socket_lb", Shape::Truth),
    ("cgroup", Shape::One),
    ("health_user", Shape::One),
    ("log", Shape::One),
    ("log_format", Shape::One),
    ("labels", Shape::Pairs),
    ("dns.domain", Shape::One),
    ("dns.ttl", Shape::One),
    ("dns.address", Shape::One),
    ("dns.host", Shape::One),
    ("dns.rate", Shape::One),
    ("dns.upstreams", Shape::Many),
    ("dns.forward", Shape::Lists),
    ("store.kind", Shape::One),
    ("store.path", Shape::One),
    ("store.endpoints", Shape::Many),
    ("store.prefix", Shape::One),
    ("store.ca", Shape::One),
    ("store.cert", Shape::One),
    ("store.key", Shape::One),
    ("store.user", Shape::One),
    ("store.password_file", Shape::One),
    ("store.timeout", Shape::One),
];

/// The sections of the file, whose keys have a dot in [`KEYS`].
const SECTIONS: [&str; 2] = ["dns", "store"];
/// What the names of environment variables begin with.
const VARIABLE: &str = "NETCTLD_";
/// The variable for `--config`.
const FILE_VARIABLE: &str = "NETCTLD_CONFIG";

/// A setting's text, not yet checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Text {
    /// A single value.
    One(String),
    /// A list; `KEY=VALUE` each for labels.
    Many(Vec<String>),
}

/// A setting and where it was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) text: Text,
    pub(super) source: String,
}

/// The settings that were given, by key.
pub(super) type Settings = BTreeMap<&'static str, Setting>;

/// Gathers the settings; a later layer replaces an earlier one's.
pub(super) fn gather(
    flags: &Flags,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    problems: &mut Vec<Problem>,
) -> Settings {
    let (variables, file) = from_environment(environment, problems);
    let path = flags.config.clone().or(file.map(Into::into));
    let mut settings = from_file(path.as_deref(), problems);
    settings.extend(variables);
    settings.extend(flags.given().map(|(key, text)| {
        let name = if key == "labels" { "label" } else { key };
        (key, Setting { text, source: format!("--{}", name.replace(['.', '_'], "-")) })
    }));
    settings
}

/// Reads our variables, and which file they name.
fn from_environment(
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    problems: &mut Vec<Problem>,
) -> (Settings, Option<OsString>) {
    let mut settings = Settings::new();
    let mut file = None;
    for (name, value) in environment {
        let Some(name) = name.to_str().filter(|name| name.starts_with(VARIABLE)) else { continue };
        if name == FILE_VARIABLE {
            file = Some(value);
            continue;
        }
        let source = name.to_owned();
        let Some(&(key, shape)) = KEYS.iter().find(|(key, _)| variable(key) == name) else {
            let names = KEYS.iter().map(|(key, _)| variable(key)).chain([FILE_VARIABLE.to_owned()]);
            let message = format!("there is no such setting{}", suggestion(name, names));
            problems.push(Problem { source, message });
            continue;
        };
        let Ok(value) = value.into_string() else {
            problems.push(Problem { source, message: "the value is not UTF-8".to_owned() });
            continue;
        };
        let text = match shape {
            Shape::One | Shape::Truth => Text::One(value),
            Shape::Many | Shape::Pairs | Shape::Lists => Text::Many(
                value.split(',').map(str::trim).filter(|v| !v.is_empty()).map(str::to_owned).collect(),
            ),
        };
        settings.insert(key, Setting { text, source });
    }
    (settings, file)
}

fn variable(key: &str) -> String {
    format!("{VARIABLE}{}", key.replace('.', "_").to_uppercase())
}

/// Reads the file: the named one, or the default one, which may be missing.
fn from_file(named: Option<&Path>, problems: &mut Vec<Problem>) -> Settings {
    let path = named.unwrap_or(Path::new(DEFAULT_FILE));
    match std::fs::read_to_string(path) {
        Ok(text) => parse(&path.display().to_string(), &text, problems),
        Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => Settings::new(),
        Err(error) => {
            let source = path.display().to_string();
            problems.push(Problem { source, message: format!("cannot be read: {error}") });
            Settings::new()
        }
    }
}

/// Parses a file's text; errors name `file:line`.
fn parse(file: &str, text: &str, problems: &mut Vec<Problem>) -> Settings {
    let place = |offset: usize| {
        let before = text.as_bytes().iter().take(offset);
        format!("{file}:{}", 1 + before.filter(|byte| **byte == b'\n').count())
    };
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        let source = place(error.span().map_or(0, |span| span.start));
        problems.push(Problem { source, message: error.message().to_owned() });
    }
    let mut settings = Settings::new();
    if !errors.is_empty() {
        return settings;
    }
    for (key, value) in table.get_ref() {
        match value.get_ref() {
            DeValue::Table(section) if SECTIONS.contains(&&**key.get_ref()) => {
                for (name, value) in section {
                    let full = format!("{}.{}", key.get_ref(), name.get_ref());
                    let source = place(name.span().start);
                    take(&full, value.get_ref(), source, &mut settings, problems);
                }
            }
            other => take(key.get_ref(), other, place(key.span().start), &mut settings, problems),
        }
    }
    settings
}

/// Takes one key of the file.
fn take(
    name: &str,
    value: &DeValue<'_>,
    source: String,
    settings: &mut Settings,
    problems: &mut Vec<Problem>,
) {
    let Some(&(key, shape)) = KEYS.iter().find(|(key, _)| *key == name) else {
        let names = KEYS.iter().map(|(key, _)| (*key).to_owned()).chain(SECTIONS.map(str::to_owned));
        let message = format!("there is no setting {name:?}{}", suggestion(name, names));
        problems.push(Problem { source, message });
        return;
    };
    match text(value, shape) {
        Ok(text) => {
            settings.insert(key, Setting { text, source: format!("{source}: {key}") });
        }
        Err(expected) => {
            let message = format!("{key} is a TOML {}: give {expected}", value.type_str());
            problems.push(Problem { source, message });
        }
    }
}

/// The text of a value; else what would have been right.
fn text(value: &DeValue<'_>, shape: Shape) -> Result<Text, &'static str> {
    let one = |value: &DeValue<'_>| match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().to_owned()),
        _ => None,
    };
    match (shape, value) {
        (Shape::One, value) => one(value).map(Text::One).ok_or("one text or number"),
        (Shape::Truth, DeValue::Boolean(value)) => Ok(Text::One(value.to_string())),
        (Shape::Truth, _) => Err("true or false"),
        (Shape::Many, DeValue::Array(values)) => {
            let texts = values.iter().map(|value| one(value.get_ref())).collect::<Option<Vec<_>>>();
            texts.map(Text::Many).ok_or("a list of texts")
        }
        (Shape::Many, _) => Err("a list of texts, such as [\"…\"]"),
        (Shape::Pairs, DeValue::Table(table)) => {
            let pair = |(key, value): (&toml::Spanned<_>, &toml::Spanned<_>)| {
                Some(format!("{}={}", key.get_ref(), one(value.get_ref())?))
            };
            table.iter().map(pair).collect::<Option<_>>().map(Text::Many).ok_or("a table of texts")
        }
        (Shape::Pairs, _) => Err("a table of texts, such as {rack = \"7\"}"),
        (Shape::Lists, DeValue::Table(table)) => {
            let pairs = |(key, value): (&toml::Spanned<_>, &toml::Spanned<DeValue<'_>>)| {
                let texts: Option<Vec<String>> = match value.get_ref() {
                    DeValue::Array(values) => values.iter().map(|value| one(value.get_ref())).collect(),
                    value => Some(vec![one(value)?]),
                };
                let pair = |text| format!("{}={text}", key.get_ref());
                Some(texts?.into_iter().map(pair).collect::<Vec<_>>())
            };
            let all: Option<Vec<_>> = table.iter().map(pairs).collect();
            all.map(|all| Text::Many(all.concat())).ok_or("a table of lists of texts")
        }
        (Shape::Lists, _) => Err("a table of lists, such as {corp = [\"192.0.2.53\"]}"),
    }
}

/// The nearest of the names, if one is near.
fn suggestion(given: &str, names: impl Iterator<Item = String>) -> String {
    let distance = |name: &str| strsim::damerau_levenshtein(given, name);
    let nearest = names.min_by_key(|name| distance(name)).filter(|name| distance(name) <= 3);
    nearest.map(|name| format!("; did you mean {name}?")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_a_flag_and_every_flag_a_key() {
        let command = <Flags as clap::CommandFactory>::command();
        let mut flags: Vec<String> =
            command.get_arguments().map(|argument| argument.get_id().to_string()).collect();
        flags.retain(|flag| !matches!(flag.as_str(), "config" | "cleanup" | "check_config"));
        let keys: Vec<String> = KEYS.iter().map(|(key, _)| key.replace('.', "_")).collect();
        assert_eq!(flags, keys);
    }

    #[test]
    fn every_flag_reaches_its_key() {
        for (key, _) in KEYS {
            let name = if key == "labels" { "label" } else { key };
            let flag = format!("--{}", name.replace(['.', '_'], "-"));
            let flags = <Flags as clap::Parser>::parse_from(["netctld", &flag, "x"]);
            let given: Vec<_> = flags.given().map(|(key, _)| key).collect();
            assert_eq!(given, [key]);
        }
    }
}
