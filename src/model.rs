//! What a network, a node and an endpoint are: parsed, validated, and without any IO.
//!
//! Every type here can be built only with valid content, so the rest of the code does not check
//! again. [`object`] names the kernel objects that the others are turned into.

pub mod balancing;
pub mod check;
pub mod endpoint;
pub mod engine;
pub mod external;
pub mod finding;
pub mod health;
pub mod id;
pub mod name;
pub mod network;
pub mod node;
pub mod object;
pub mod service;
pub mod snapshot;
pub mod subnet;
pub mod update;

pub use balancing::{Balancing, BalancingError, Prefer, Protocol, Scheduler, ServicePort};
pub use check::{CheckAnswer, CheckRequest};
pub use endpoint::{Attachment, Endpoint};
pub use engine::Engine;
pub use external::{External, ExternalError};
pub use finding::{Finding, FindingKind};
pub use health::{EndpointState, HealthCheck, HealthTest};
pub use id::{CheckId, ClusterId, EndpointId, MacAddr, NetworkId, NodeId, ServiceId, Vni};
pub use name::{IfName, Name, NodeName};
pub use network::{ExpandSpec, Network, NetworkSpec};
pub use node::Node;
pub use service::{EndpointMode, Reservation, Service, ServiceSpec, UpdateOrder};
pub use snapshot::{Snapshot, Versioned};
pub use subnet::{Subnet, SubnetError};
pub use update::{HealthUpdate, PortKey, ServiceUpdate, TimeoutKind};
