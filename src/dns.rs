//! Names: what the containers of a network can ask for, and what is answered.
//!
//! A [`Zone`] is a pure function of what is known of one network. [`Names`] are the zones of one
//! client: a container finds the names of all networks that it is on, and of no other.

pub mod answer;
mod name;
mod names;
mod packed;
mod plain;
mod quick;
mod simple;
mod zone;

/// The port of name servers (RFC 1035, 4.2).
pub const PORT: u16 = 53;

pub use name::DomainName;
pub use names::{Found, Names};
pub use packed::Packed;
pub use plain::PlainQuery;
pub use quick::Quick;
pub use simple::{Rest, Simple, nothing};
pub use zone::{Entry, Kind, Zone};
