//! What is wrong in a file, and where.

use std::fmt;

/// How many problems of a file are kept: who has more to correct asks again.
const MOST: usize = 100;

/// Something in a file that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file, as its reader was told.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
    /// The field, as `services.web.deploy`; empty where there is none.
    pub path: String,
    /// What is wrong, and what could be given.
    pub text: String,
}

impl Problem {
    /// Adds the problem to those of its file, unless there are very many already.
    pub(super) fn keep(self, problems: &mut Vec<Self>) {
        if problems.len() < MOST {
            problems.push(self);
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: ", self.file, self.line, self.column)?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.text)
    }
}
