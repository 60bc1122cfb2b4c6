//! The overlay network and service discovery of a cluster, as a per-node agent.
//!
//! The layers, lowest first; a module uses only what stands below it:
//!
//! - [`model`]: what a network, a node and an endpoint are, and the kernel objects they need.
//! - `ipam`, [`plan`], `lb`, `dns`, `overlay`, `reconcile`: pure decisions over the model. No clock, no socket, no
//!   kernel: they are tested without root.
//! - [`store`], `kernel`, [`api`], `config`: the edges, one module each; they do not know each
//!   other.
//! - `cluster`: changes and views of the shared state, as transactions on the store.
//! - `app`: the agent, where everything is wired; `cli`: the command.

#![warn(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

pub mod api;
pub mod app;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod dns;
pub mod ipam;
pub mod kernel;
pub mod lb;
pub mod model;
pub mod overlay;
pub mod plan;
pub mod reconcile;
pub mod store;
