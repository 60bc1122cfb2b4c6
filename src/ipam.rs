//! Address management: which subnet a new network gets, which address a new endpoint gets.
//!
//! Pure: what is taken comes in as a value, the answer is a proposal. The store's transaction
//! decides, and refuses a proposal that came too late.

pub mod count;
pub mod ledger;
pub mod pool;
mod space;

pub use count::{Count, NodeCount, SubnetCount};
pub use ledger::{Block, Blocks, Ledger, NewBlock, OwnBlock, Proposal};
