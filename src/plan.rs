//! Whether a deployment fits into the networks' addresses, before it is made.
//!
//! Pure: the text of files, the variables, the number of nodes and what the networks have left come
//! in as values. [`compose`] reads files into stacks, [`demand`] counts the addresses that they
//! need, [`verdict`] sets these beside what there is, and [`sizing`] finds a subnet for what is
//! expected.

pub mod compose;
pub mod demand;
mod fields;
mod problem;
pub mod sizing;
pub mod variables;
pub mod verdict;
mod yaml;

pub use problem::Problem;
