//! One YAML document as a tree whose nodes know their places.
//!
//! Aliases share their node and merge keys (`<<`) are resolved. Whatever the text, the tree is
//! bounded as if its aliases were written out: whoever walks it needs no bounds of its own.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;
use std::rc::Rc;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle};

use super::Problem;

/// How deep maps and lists may be nested.
const MAX_DEPTH: usize = 64;
/// How many values a document may have with its aliases written out.
const MAX_WEIGHT: usize = 1_000_000;

/// Where something stands, in lines and columns from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) line: usize,
    pub(super) column: usize,
}

impl From<Marker> for Place {
    fn from(marker: Marker) -> Self {
        Self { line: marker.line().max(1), column: marker.col() + 1 }
    }
}

/// A value with its place; that of an alias is where the anchor stands.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) value: Value,
    /// How deep it is: 0 for what holds nothing.
    depth: usize,
    /// How many values it is made of, itself among them.
    weight: usize,
}

#[derive(Debug)]
pub(super) enum Value {
    Null,
    /// Any scalar: what it should be is known by whoever reads it.
    Text(String),
    List(Vec<Rc<Node>>),
    Map(Map),
}

/// The values of a map by their keys.
pub(super) type Map = BTreeMap<Rc<str>, Entry>;

/// A value of a map and where its key stands.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) key: Place,
    pub(super) node: Rc<Node>,
}

/// Reads the only document of a text. What is wrong is added to `problems`; the tree may be of use
/// even then.
pub(super) fn read(text: &str, file: &str, problems: &mut Vec<Problem>) -> Option<Rc<Node>> {
    let mut builder = Builder { file, open: Vec::new(), anchors: BTreeMap::new(), root: None, problems };
    match builder.run(text) {
        Ok(()) => builder.root,
        Err(problem) => {
            problem.keep(builder.problems);
            None
        }
    }
}

struct Builder<'a> {
    file: &'a str,
    /// The maps and lists that are being read, outermost first.
    open: Vec<Open>,
    anchors: BTreeMap<usize, Rc<Node>>,
    root: Option<Rc<Node>>,
    problems: &'a mut Vec<Problem>,
}

struct Open {
    place: Place,
    anchor: usize,
    depth: usize,
    weight: usize,
    content: Content,
}

enum Content {
    List(Vec<Rc<Node>>),
    Map { own: Map, key: Option<(Rc<str>, Place)>, merge: Option<(Place, Rc<Node>)> },
}

impl Builder<'_> {
    fn run(&mut self, text: &str) -> Result<(), Problem> {
        let mut parser = Parser::new_from_str(text);
        let mut documents = 0;
        while let Some(event) = parser.next_event() {
            let (event, span) = event
                .map_err(|error| self.problem((*error.marker()).into(), error.info().to_owned()))?;
            let place = Place::from(span.start);
            match event {
                Event::DocumentStart(_) => {
                    documents += 1;
                    if documents > 1 {
                        let text = "a second document begins here: give one file for each";
                        return Err(self.problem(place, text));
                    }
                }
                Event::Alias(anchor) => match self.anchors.get(&anchor) {
                    Some(node) => self.take(Rc::clone(node), place)?,
                    None => return Err(self.problem(place, "an alias of what it stands in")),
                },
                Event::Scalar(text, style, anchor, _) => {
                    let null = style == ScalarStyle::Plain && is_null(&text);
                    let value = if null { Value::Null } else { Value::Text(text.into_owned()) };
                    self.finish(Node { place, value, depth: 0, weight: 1 }, anchor)?;
                }
                Event::SequenceStart(anchor, _) => {
                    self.start(place, anchor, Content::List(Vec::new()))?;
                }
                Event::MappingStart(anchor, _) => {
                    self.start(place, anchor, Content::Map { own: Map::new(), key: None, merge: None })?;
                }
                Event::SequenceEnd | Event::MappingEnd => self.end()?,
                Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
            }
        }
        Ok(())
    }

    fn start(&mut self, place: Place, anchor: usize, content: Content) -> Result<(), Problem> {
        if self.open.len() >= MAX_DEPTH {
            return Err(self.too_deep(place));
        }
        self.open.push(Open { place, anchor, depth: 0, weight: 1, content });
        Ok(())
    }

    fn end(&mut self) -> Result<(), Problem> {
        let Some(open) = self.open.pop() else { return Ok(()) };
        let value = match open.content {
            Content::List(list) => Value::List(list),
            Content::Map { mut own, merge, .. } => {
                if let Some((place, merge)) = merge {
                    self.merge(&mut own, place, &merge);
                }
                Value::Map(own)
            }
        };
        let node = Node { place: open.place, value, depth: open.depth, weight: open.weight };
        self.finish(node, open.anchor)
    }

    /// Adds what a map lacks from the map or maps of its `<<`; of these the first wins.
    fn merge(&mut self, own: &mut Map, place: Place, merge: &Rc<Node>) {
        let list = if let Value::List(list) = &merge.value { list } else { &vec![Rc::clone(merge)] };
        for node in list {
            match &node.value {
                Value::Map(map) => {
                    for (key, entry) in map {
                        own.entry(Rc::clone(key)).or_insert_with(|| entry.clone());
                    }
                }
                Value::Null | Value::Text(_) | Value::List(_) => {
                    let problem = self.problem(place, "<< needs a map or a list of maps");
                    problem.keep(self.problems);
                }
            }
        }
    }

    /// A node is complete.
    fn finish(&mut self, node: Node, anchor: usize) -> Result<(), Problem> {
        let (place, node) = (node.place, Rc::new(node));
        if anchor > 0 {
            self.anchors.insert(anchor, Rc::clone(&node));
        }
        self.take(node, place)
    }

    /// Puts a node where it belongs: into what is open, or at the root.
    fn take(&mut self, node: Rc<Node>, place: Place) -> Result<(), Problem> {
        if self.open.len() + node.depth > MAX_DEPTH {
            return Err(self.too_deep(place));
        }
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        open.depth = open.depth.max(node.depth + 1);
        open.weight += node.weight;
        if open.weight > MAX_WEIGHT {
            let text = format!("more than {MAX_WEIGHT} values with all aliases written out");
            return Err(self.problem(place, text));
        }
        match &mut open.content {
            Content::List(list) => list.push(node),
            Content::Map { own, key, merge } => match key.take() {
                None => match &node.value {
                    Value::Text(text) => *key = Some((text.as_str().into(), place)),
                    Value::Null | Value::List(_) | Value::Map(_) => {
                        return Err(self.problem(place, "a key must be a text"));
                    }
                },
                Some((key, at)) if &*key == "<<" => {
                    if merge.replace((at, node)).is_some() {
                        self.twice(&key, at);
                    }
                }
                Some((key, at)) => match own.entry(Rc::clone(&key)) {
                    Slot::Vacant(slot) => {
                        slot.insert(Entry { key: at, node });
                    }
                    Slot::Occupied(_) => self.twice(&key, at),
                },
            },
        }
        Ok(())
    }

    fn twice(&mut self, key: &str, place: Place) {
        let problem = self.problem(place, format!("{key:?} is there twice"));
        problem.keep(self.problems);
    }

    fn too_deep(&self, place: Place) -> Problem {
        self.problem(place, format!("nested deeper than {MAX_DEPTH} maps and lists"))
    }

    fn problem(&self, place: Place, text: impl Into<String>) -> Problem {
        let mut path = String::new();
        // A few are enough to find it.
        for open in self.open.iter().take(8) {
            match &open.content {
                Content::Map { key: Some((key, _)), .. } if path.is_empty() => path.push_str(key),
                Content::Map { key: Some((key, _)), .. } => path.push_str(&format!(".{key}")),
                Content::Map { key: None, .. } => break,
                Content::List(list) => path.push_str(&format!("[{}]", list.len())),
            }
        }
        let Place { line, column } = place;
        Problem { file: self.file.to_owned(), line, column, path, text: text.into() }
    }
}

fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> (Option<Rc<Node>>, Vec<String>) {
        let mut problems = Vec::new();
        let node = read(text, "f", &mut problems);
        (node, problems.iter().map(Problem::to_string).collect())
    }

    fn shown(node: &Node) -> String {
        match &node.value {
            Value::Null => "~".to_owned(),
            Value::Text(text) => text.clone(),
            Value::List(list) => {
                format!("[{}]", list.iter().map(|node| shown(node)).collect::<Vec<_>>().join(" "))
            }
            Value::Map(map) => {
                let parts = map.iter().map(|(key, entry)| format!("{key}={}", shown(&entry.node)));
                format!("{{{}}}", parts.collect::<Vec<_>>().join(" "))
            }
        }
    }

    #[test]
    fn aliases_and_merge_keys_are_resolved_and_own_keys_win() {
        for (text, expected) in [
            ("a: &x {k: 1, l: 2}\nb: {<<: *x, l: 3}", "{a={k=1 l=2} b={k=1 l=3}}"),
            ("b: {l: 3, <<: [{l: 4, m: 5}, {m: 6, n: 7}]}", "{b={l=3 m=5 n=7}}"),
            ("a: &x {<<: {k: 1}}\nb: {<<: *x}\nc: [*x, 2]", "{a={k=1} b={k=1} c=[{k=1} 2]}"),
            ("&k a: 1\nb: *k", "{a=1 b=a}"),
            ("a: ~\nb:\nc: 'null'\nd: \"\"", "{a=~ b=~ c=null d=}"),
            ("\u{feff}a: 1\r\nb: 2\r\n", "{a=1 b=2}"),
        ] {
            let (node, problems) = parse(text);
            assert_eq!((node.map(|node| shown(&node)), problems), (Some(expected.to_owned()), vec![]));
        }
    }

    #[test]
    fn what_cannot_be_used_has_its_place() {
        for (text, expected) in [
            ("a: 1\nb:\n  c: 2\n  c: 3\na: 4", "f:4:3: b: \"c\" is there twice"),
            ("a: 1\n---\nb: 2", "f:2:1: a second document begins here: give one file for each"),
            ("a: {<<: [1]}", "f:1:5: a: << needs a map or a list of maps"),
            ("a: {<<: {}, <<: {}}", "f:1:13: a: \"<<\" is there twice"),
            ("a: &x [*x]", "f:1:8: a[0]: an alias of what it stands in"),
            ("a: 1\n[b]: 2", "f:2:1: a key must be a text"),
            ("a:\n - b\n - {~: 1}", "f:3:5: a[1]: a key must be a text"),
        ] {
            assert_eq!(parse(text).1.first().map(String::as_str), Some(expected), "{text}");
        }
        for text in ["a: *none", "a: [", "a: 1\n b: 2", "a: \"", "\0", "a: 1\n\tb: 2"] {
            let (node, problems) = parse(text);
            assert!(node.is_none() && problems.len() == 1, "{text:?}: {problems:?}");
        }
    }

    #[test]
    fn an_empty_text_is_no_tree_and_no_problem() {
        for text in ["", "# only\n", "\n\n"] {
            let (node, problems) = parse(text);
            assert!(node.is_none() && problems.is_empty());
        }
    }

    #[test]
    fn aliases_of_aliases_and_nesting_are_bounded() {
        let mut laughs = "a0: &a0 [lol]\n".to_owned();
        let mut merges = "a0: &a0 {k: v}\n".to_owned();
        let mut chain = "a0: &a0 [x]\n".to_owned();
        for n in 1..200 {
            let last = n - 1;
            let nine = format!("*a{last}, ").repeat(9);
            laughs.push_str(&format!("a{n}: &a{n} [{nine}]\n"));
            merges.push_str(&format!("a{n}: &a{n} {{<<: [{nine}]}}\n"));
            chain.push_str(&format!("a{n}: &a{n} [*a{last}]\n"));
        }
        let block = (0..5000).map(|n| format!("{}a:\n", " ".repeat(n))).collect::<String>();
        for (text, expected) in [
            (laughs, "aliases written out"),
            (merges, "aliases written out"),
            (chain, "nested deeper"),
            ("[".repeat(100), "nested deeper"),
            ("[".repeat(100_000), ""),
            (block, "nested deeper"),
            ("- ".repeat(100_000), "nested deeper"),
            ("? ".repeat(100_000), ""),
        ] {
            let (node, problems) = parse(&text);
            assert!(node.is_none() && problems[0].contains(expected), "{problems:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_tree_or_a_problem(text in "[-a\\[\\]{}:,?&*!|>'\"%@` \n\t#<~.x0]{0,60}|\\PC{0,60}") {
            let (node, problems) = parse(&text);
            prop_assert!(node.is_none() || problems.iter().all(|problem| problem.contains(": ")));
        }
    }
}
