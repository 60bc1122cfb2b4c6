//! The fields of a document: what stands in them, with variables filled in, or what is wrong.

use super::Problem;
use super::compose::Tool;
use super::variables::{Filled, Variables, fill, shortened};
use super::yaml::{Entry, Map, Node, Place, Value};

/// A value with the names that lead to it.
#[derive(Debug)]
pub(super) struct Field<'t> {
    pub(super) node: &'t Node,
    pub(super) path: String,
    place: Place,
}

impl<'t> Field<'t> {
    /// The whole document.
    pub(super) fn root(node: &'t Node) -> Self {
        Self { node, path: String::new(), place: node.place }
    }

    /// The value of a key, be it null.
    pub(super) fn entry(&self, key: &str, entry: &'t Entry) -> Self {
        let path = if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) };
        // A null has no place of its own.
        let place = if entry.node.value.is_null() { entry.key } else { entry.node.place };
        Self { node: &entry.node, path, place }
    }

    /// The value of a key; null is none.
    pub(super) fn get(&self, map: &'t Map, key: &str) -> Option<Self> {
        let entry = map.get(key).filter(|entry| !entry.node.value.is_null())?;
        Some(self.entry(key, entry))
    }

    /// An item of a list.
    pub(super) fn item(&self, index: usize, node: &'t Node) -> Self {
        Self { node, path: format!("{}[{index}]", self.path), place: node.place }
    }

    /// The same field, where the key of one of its values stands.
    pub(super) fn at_key(&self, entry: &Entry) -> Self {
        Self { node: self.node, path: self.path.clone(), place: entry.key }
    }
}

impl Value {
    fn is_null(&self) -> bool {
        matches!(self, Self::Null)
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
        }
    }
}

/// Reads fields, and gathers what is wrong with them.
pub(super) struct Reader<'a> {
    pub(super) file: &'a str,
    pub(super) variables: &'a Variables,
    pub(super) tool: &'a Tool,
    pub(super) problems: Vec<Problem>,
}

impl Reader<'_> {
    /// Keeps a problem with a field.
    pub(super) fn problem(&mut self, field: &Field<'_>, text: impl Into<String>) {
        let (file, path, text) = (self.file.to_owned(), field.path.clone(), text.into());
        let Place { line, column } = field.place;
        Problem { file, line, column, path, text }.keep(&mut self.problems);
    }

    fn other_kind<T>(&mut self, field: &Field<'_>, wanted: &str) -> Option<T> {
        self.problem(field, format!("{} is here: give {wanted}", field.node.value.kind()));
        None
    }

    pub(super) fn map<'t>(&mut self, field: &Field<'t>) -> Option<&'t Map> {
        match &field.node.value {
            Value::Map(map) => Some(map),
            Value::Null | Value::Text(_) | Value::List(_) => self.other_kind(field, "a map"),
        }
    }

    /// The items of a list.
    pub(super) fn list<'t>(&mut self, field: &Field<'t>) -> Vec<Field<'t>> {
        match &field.node.value {
            Value::List(list) => {
                list.iter().enumerate().map(|(at, node)| field.item(at, node)).collect()
            }
            Value::Null | Value::Text(_) | Value::Map(_) => {
                self.other_kind(field, "a list").unwrap_or_default()
            }
        }
    }

    /// The map at a key, and the field itself; nothing where the key is missing or null.
    pub(super) fn section<'t>(
        &mut self,
        field: &Field<'t>,
        map: &'t Map,
        key: &str,
    ) -> Option<(Field<'t>, &'t Map)> {
        let field = field.get(map, key)?;
        let map = self.map(&field)?;
        Some((field, map))
    }

    fn filled<'t>(&mut self, field: &Field<'t>, wanted: &str) -> Option<Filled<'t>> {
        let Value::Text(text) = &field.node.value else { return self.other_kind(field, wanted) };
        match fill(text, self.variables) {
            Ok(filled) => Some(filled),
            Err(error) => {
                self.problem(field, error);
                None
            }
        }
    }

    /// A text that is not empty.
    pub(super) fn text(&mut self, field: &Field<'_>) -> Option<String> {
        self.parsed(field, "a text", |text| {
            if text.is_empty() { Err("is empty: give a text".to_owned()) } else { Ok(text.to_owned()) }
        })
    }

    /// A text that a function understands; its error stands behind the text in the message.
    pub(super) fn parsed<T>(
        &mut self,
        field: &Field<'_>,
        wanted: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let filled = self.filled(field, wanted)?;
        match parse(&filled.text) {
            Ok(value) => Some(value),
            Err(error) => {
                let unset = match filled.unset.as_slice() {
                    [] => String::new(),
                    [name] => format!(" ({name} is not set)"),
                    names => format!(" ({} are not set)", names.join(", ")),
                };
                self.problem(field, format!("{:?} {error}{unset}", shortened(&filled.text)));
                None
            }
        }
    }

    /// A number from 0.
    pub(super) fn number(&mut self, field: &Field<'_>) -> Option<u32> {
        self.parsed(field, "a number", |text| {
            let digits = text.strip_prefix('-').unwrap_or(text);
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                Err("is not a number".to_owned())
            } else if digits.len() < text.len() {
                Err("is negative: give 0 or more".to_owned())
            } else {
                digits.parse().map_err(|_| "is too large".to_owned())
            }
        })
    }

    /// A truth value, in any of the spellings that Compose takes.
    pub(super) fn flag(&mut self, field: &Field<'_>) -> Option<bool> {
        self.parsed(field, "true or false", |text| match text.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "y" | "t" | "1" => Ok(true),
            "false" | "no" | "off" | "n" | "f" | "0" => Ok(false),
            _ => Err("is not true or false".to_owned()),
        })
    }

    /// One of several words.
    pub(super) fn choice<T: Copy>(&mut self, field: &Field<'_>, words: &[(&str, T)]) -> Option<T> {
        let wanted = words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
        self.parsed(field, &format!("one of {wanted}"), |text| {
            let found = words.iter().find(|(word, _)| *word == text);
            found.map(|(_, value)| *value).ok_or_else(|| format!("is none of {wanted}"))
        })
    }
}
