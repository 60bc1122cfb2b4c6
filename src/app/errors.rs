//! What the agent's failures are for the API's clients.

use super::dataplane::PlugError;
use crate::api::{ApiError, ErrorCode};
use crate::cluster::ClusterError;
use crate::kernel;
use crate::store::StoreError;

impl From<ClusterError> for ApiError {
    fn from(error: ClusterError) -> Self {
        let code = match &error {
            ClusterError::Store(StoreError::Unreachable { .. }) | ClusterError::Contention(_) => {
                ErrorCode::Unavailable
            }
            ClusterError::Store(_) | ClusterError::Unreadable { .. } => ErrorCode::Internal,
            ClusterError::Replaced(_) => ErrorCode::StoreReplaced,
            ClusterError::Invalid(_)
            | ClusterError::Address { .. }
            | ClusterError::MtuTooLarge { .. }
            | ClusterError::NewFamily { .. }
            | ClusterError::ServiceInvalid(_) => ErrorCode::Invalid,
            ClusterError::NoNetwork(_)
            | ClusterError::NoEndpoint(_)
            | ClusterError::NoSubnet { .. }
            | ClusterError::NoNode(_)
            | ClusterError::NoService(_)
            | ClusterError::NotOfService { .. } => ErrorCode::NotFound,
            ClusterError::NetworkExists(_)
            | ClusterError::ServiceExists(_)
            | ClusterError::NameReserved { .. }
            | ClusterError::Removing(_)
            | ClusterError::VniTaken { .. }
            | ClusterError::SubnetExists { .. }
            | ClusterError::SubnetOverlaps { .. }
            | ClusterError::HostOverlaps { .. }
            | ClusterError::AddressTaken { .. }
            | ClusterError::EndpointExists { .. }
            | ClusterError::Ambiguous { .. }
            | ClusterError::Elsewhere { .. }
            | ClusterError::NodeTaken { .. } => ErrorCode::Conflict,
            ClusterError::InUse { .. }
            | ClusterError::NodeAlive(_)
            | ClusterError::LastSubnet { .. }
            | ClusterError::SubnetInUse { .. }
            | ClusterError::SubnetReserved { .. }
            | ClusterError::HasService { .. } => ErrorCode::InUse,
            ClusterError::NoneLeft(..)
            | ClusterError::Exhausted { .. }
            | ClusterError::TooFew { .. } => ErrorCode::Exhausted,
        };
        Self::new(code, error.to_string())
    }
}

impl From<PlugError> for ApiError {
    fn from(error: PlugError) -> Self {
        match error {
            PlugError::NotReady(reason) => Self::new(ErrorCode::Timeout, reason),
            PlugError::Unsupported(reason) => Self::new(ErrorCode::Unsupported, reason),
            PlugError::Refused(error) => Self::from(&*error),
        }
    }
}

impl From<kernel::Error> for ApiError {
    fn from(error: kernel::Error) -> Self {
        Self::from(&error)
    }
}

impl From<&kernel::Error> for ApiError {
    fn from(error: &kernel::Error) -> Self {
        let code = match error {
            // A container that ends while it is attached.
            gone if gone.namespace_is_gone() => ErrorCode::Invalid,
            kernel::Error::Conflict { .. } => ErrorCode::Conflict,
            lacking if lacking.is_unsupported() => ErrorCode::Unsupported,
            _ => ErrorCode::Internal,
        };
        Self::new(code, error.to_string())
    }
}
