//! Variables in values, and the files that set them, as Docker Compose has them.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::Problem;

/// Values by name.
pub type Variables = BTreeMap<String, String>;

/// How long a value may become.
const MAX_LENGTH: usize = 1 << 16;
/// How deep defaults may be nested.
const MAX_DEPTH: usize = 32;

/// A value with its variables filled in.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Filled<'a> {
    pub(super) text: Cow<'a, str>,
    /// Those that were asked for without a default and are not set.
    pub(super) unset: Vec<&'a str>,
}

/// Fills in the variables of a value.
///
/// `$NAME`, `${NAME}`; `${NAME:-default}`, `${NAME:?error}` and `${NAME:+other}`, which take an empty
/// value for none, and the same without the colon, which do not; `$$` is a dollar sign. Defaults may
/// have variables in them.
///
/// # Errors
/// Says what is wrong with the form, or which variable must be set.
pub(super) fn fill<'a>(text: &'a str, variables: &Variables) -> Result<Filled<'a>, String> {
    if !text.contains('$') {
        return Ok(Filled { text: text.into(), unset: Vec::new() });
    }
    let mut filler = Filler { rest: text, variables, unset: Vec::new(), depth: 0 };
    let filled = filler.run(true)?;
    Ok(Filled { text: filled.into(), unset: filler.unset })
}

struct Filler<'a, 'v> {
    rest: &'a str,
    variables: &'v Variables,
    unset: Vec<&'a str>,
    /// How many `${` are open.
    depth: usize,
}

impl<'a> Filler<'a, '_> {
    /// Reads up to the end, or to the `}` that closes what is open. What is not `live` is not used:
    /// nothing has to be set for it.
    fn run(&mut self, live: bool) -> Result<String, String> {
        let (mut filled, mut braces) = (String::new(), 0);
        while let Some(character) = self.rest.chars().next() {
            self.rest = &self.rest[character.len_utf8()..];
            match character {
                '$' => filled.push_str(&self.variable(live)?),
                '}' if self.depth > 0 && braces == 0 => return Ok(filled),
                _ => {
                    match character {
                        '{' => braces += 1,
                        '}' => braces -= 1,
                        _ => {}
                    }
                    filled.push(character);
                }
            }
            if filled.len() > MAX_LENGTH {
                return Err(format!("is longer than {MAX_LENGTH} bytes with its variables"));
            }
        }
        if self.depth > 0 { Err("a ${ is not closed".to_owned()) } else { Ok(filled) }
    }

    /// What stands behind a `$`.
    fn variable(&mut self, live: bool) -> Result<String, String> {
        if let Some(rest) = self.rest.strip_prefix('$') {
            self.rest = rest;
            return Ok("$".to_owned());
        }
        if let Some(rest) = self.rest.strip_prefix('{') {
            self.rest = rest;
            self.depth += 1;
            if self.depth > MAX_DEPTH {
                return Err(format!("variables are nested deeper than {MAX_DEPTH}"));
            }
            let filled = self.braced(live)?;
            self.depth -= 1;
            return Ok(filled);
        }
        let name = self.name()?;
        Ok(self.value(name, live))
    }

    /// What stands behind a `${`, with its `}`.
    fn braced(&mut self, live: bool) -> Result<String, String> {
        let name = self.name()?;
        if let Some(rest) = self.rest.strip_prefix('}') {
            self.rest = rest;
            return Ok(self.value(name, live));
        }
        let after = self.rest.strip_prefix(':');
        let (empty_counts, rest) = (after.is_none(), after.unwrap_or(self.rest));
        let value = self.variables.get(name).filter(|value| empty_counts || !value.is_empty()).cloned();
        let operator = rest.chars().next();
        self.rest = rest.get(1..).unwrap_or_default();
        match (operator, value) {
            (Some('-'), Some(value)) => self.run(false).map(|_| value),
            (Some('-'), None) => self.run(live),
            (Some('+'), Some(_)) => self.run(live),
            (Some('+'), None) => self.run(false).map(|_| String::new()),
            (Some('?'), Some(value)) => self.run(false).map(|_| value),
            (Some('?'), None) => match self.run(live)? {
                _ if !live => Ok(String::new()),
                message if message.is_empty() => Err(format!("the variable {name} must be set")),
                message => Err(format!("the variable {name} must be set: {message}")),
            },
            _ => Err(format!("${{{name} is not followed by }}, -, ?, + or a colon and one of these")),
        }
    }

    fn name(&mut self) -> Result<&'a str, String> {
        let inner = |c: char| c == '_' || c.is_ascii_alphanumeric();
        let end = self.rest.find(|c| !inner(c)).unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err("a $ is not followed by a variable: write $$ for a dollar sign".to_owned());
        }
        self.rest = rest;
        Ok(name)
    }

    fn value(&mut self, name: &'a str, live: bool) -> String {
        let value = self.variables.get(name);
        if value.is_none() && live {
            self.unset.push(name);
        }
        value.cloned().unwrap_or_default()
    }
}

/// Reads a file of variables: lines `NAME=VALUE`, with comments, quotes, `export`, and variables in
/// values. A name alone is taken from `environment`, whose values win here too.
///
/// # Errors
/// Says which lines cannot be used.
pub fn read_file(text: &str, file: &str, environment: &Variables) -> Result<Variables, Vec<Problem>> {
    let (mut known, mut problems) = (environment.clone(), Vec::new());
    let (mut found, mut rest, mut line) = (Variables::new(), text.trim_start_matches('\u{feff}'), 1);
    while !rest.is_empty() {
        let start = rest;
        let result = entry(&mut rest, &known);
        match result {
            Ok(Some((name, value))) => {
                if !environment.contains_key(name) {
                    known.insert(name.to_owned(), value.clone());
                }
                found.insert(name.to_owned(), value);
            }
            Ok(None) => {}
            Err(text) => {
                let (file, path) = (file.to_owned(), String::new());
                Problem { file, line, column: 1, path, text }.keep(&mut problems);
            }
        }
        line += start[..start.len() - rest.len()].matches('\n').count();
    }
    if problems.is_empty() { Ok(found) } else { Err(problems) }
}

/// Takes one line, or more where a quoted value has several, off the text.
fn entry<'a>(rest: &mut &'a str, known: &Variables) -> Result<Option<(&'a str, String)>, String> {
    let (line, behind) = rest.split_once('\n').unwrap_or((rest, ""));
    let whole = *rest;
    *rest = behind;
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let line = line.strip_prefix("export ").map_or(line, str::trim_start);
    let Some((name, value)) = line.split_once('=') else {
        return check_name(line).map(|()| None);
    };
    let (name, value) = (name.trim_end(), value.trim_start());
    check_name(name)?;
    let Some(quote) = value.chars().next().filter(|c| matches!(c, '\'' | '"')) else {
        let end = if value.starts_with('#') { 0 } else { value.find(" #").unwrap_or(value.len()) };
        return Ok(Some((name, fill(value[..end].trim_end(), known)?.text.into_owned())));
    };
    // The value may go on behind the line's end.
    let begin = whole.find('=').map_or(0, |at| at + 1);
    let begin = begin + whole[begin..].find(quote).map_or(0, |at| at + 1);
    let (value, after) = quoted(&whole[begin..], quote).ok_or("the quote is not closed")?;
    let (trailing, behind) = after.split_once('\n').unwrap_or((after, ""));
    *rest = behind;
    if !trailing.trim().is_empty() && !trailing.trim().starts_with('#') {
        return Err("something stands behind the closing quote".to_owned());
    }
    let value = if quote == '"' { fill(&value, known)?.text.into_owned() } else { value };
    Ok(Some((name, value)))
}

fn check_name(name: &str) -> Result<(), String> {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    if !name.is_empty() && name.bytes().all(inner) && !name.starts_with(|c: char| c.is_ascii_digit()) {
        return Ok(());
    }
    Err(format!("{:?} is not the name of a variable: give NAME=VALUE", shortened(name)))
}

/// The text before the closing quote, and what is behind it. Within double quotes a backslash
/// escapes.
fn quoted(text: &str, quote: char) -> Option<(String, &str)> {
    let (mut value, mut characters) = (String::new(), text.char_indices());
    while let Some((at, character)) = characters.next() {
        match character {
            _ if character == quote => return Some((value, &text[at + 1..])),
            '\\' if quote == '"' => match characters.next()?.1 {
                'n' => value.push('\n'),
                'r' => value.push('\r'),
                't' => value.push('\t'),
                '$' => value.push_str("$$"),
                other @ ('"' | '\\') => value.push(other),
                other => value.extend(['\\', other]),
            },
            _ => value.push(character),
        }
    }
    None
}

/// The beginning of a text, for a message.
pub(super) fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(40).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn variables() -> Variables {
        [("A", "1"), ("B", ""), ("LONG_1", "x y")].map(|(k, v)| (k.to_owned(), v.to_owned())).into()
    }

    #[test]
    fn every_form_is_filled_in() {
        for (text, expected) in [
            ("plain", "plain"),
            ("$A", "1"),
            ("a${A}b$A", "a1b1"),
            ("$LONG_1!", "x y!"),
            ("$$A $${A} $$$A", "$A ${A} $1"),
            ("${A:-d}${A-d}", "11"),
            ("${B:-d}${B-d}", "d"),
            ("${C:-d}${C-d}", "dd"),
            ("${C:-}", ""),
            ("${A:+o}${A+o}", "oo"),
            ("${B:+o}${B+o}", "o"),
            ("${C:+o}${C+o}", ""),
            ("${A:?e}${A?e}${B?e}", "11"),
            ("${C:-${D:-${A}}}", "1"),
            ("${C:-${D:-e}f}g", "efg"),
            ("${C:-{\"a\": {}}}", "{\"a\": {}}"),
            ("${C:-$$}", "$"),
            ("${A:-${C:?not needed}}${C:+${D?nor this}}", "1"),
            ("ä${C:-ö}ü}", "äöü}"),
        ] {
            assert_eq!(
                fill(text, &variables()).map(|f| f.text.into_owned()),
                Ok(expected.into()),
                "{text}"
            );
        }
        assert_eq!(fill("$C${D}${E:-e}${A:-$F}", &variables()).unwrap().unset, ["C", "D"]);
    }

    #[test]
    fn a_form_that_cannot_be_used_is_said() {
        for (text, expected) in [
            ("$", "write $$"),
            ("a$ b", "write $$"),
            ("$1", "write $$"),
            ("${}", "write $$"),
            ("${A", "not followed"),
            ("${A!}", "not followed"),
            ("${A:}", "not followed"),
            ("${A:ä}", "not followed"),
            ("${A:-b", "not closed"),
            ("${C:?}", "C must be set"),
            ("${C?why $A}", "C must be set: why 1"),
            ("${B:?}", "B must be set"),
            (&"${C:-".repeat(1000), "nested deeper"),
        ] {
            let error = fill(text, &variables()).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let large = Variables::from([("A".to_owned(), "x".repeat(1000))]);
        assert!(fill(&"$A".repeat(1000), &large).unwrap_err().contains("is longer"));
    }

    #[test]
    fn a_file_of_variables_is_read_as_compose_reads_it() {
        let text = "# first\n\nA=1\nexport B = two words  # said\nC='$A #\n \\n'\nD=\"a\\n\\\"$A\\$A\" # x\n\
                    E=${A}${C:+x}\r\nF=\nG=#\nH\nSET=no\nI=$SET\nJ=a#b";
        let environment = Variables::from([("SET".to_owned(), "yes".to_owned())]);
        let found = read_file(text, "f", &environment).unwrap();
        let expected = [
            ("A", "1"),
            ("B", "two words"),
            ("C", "$A #\n \\n"),
            ("D", "a\n\"1$A"),
            ("E", "1x"),
            ("F", ""),
            ("G", ""),
            ("I", "yes"),
            ("J", "a#b"),
            ("SET", "no"),
        ];
        assert_eq!(found, expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    }

    #[test]
    fn every_line_that_cannot_be_used_is_told() {
        let text = "A=1\nB='x\ny'\n1=x\nC=\"x\" y\n a b\nD=${\nE='x\n";
        let problems = read_file(text, "f", &Variables::new()).unwrap_err();
        let lines: Vec<usize> = problems.iter().map(|problem| problem.line).collect();
        assert_eq!(lines, [4, 5, 6, 7, 8], "{problems:?}");
    }

    proptest! {
        #[test]
        fn no_text_is_a_panic(text in "[$A-C{}:?+\\-=ä'\"\\\\\n #]{0,40}|\\PC{0,40}") {
            let _ = fill(&text, &variables());
            let _ = read_file(&text, "f", &variables());
        }
    }
}
