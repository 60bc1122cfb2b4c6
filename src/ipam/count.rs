//! How many addresses are used, by whom, and how many are left.

use ipnetwork::IpNetwork;

/// How a network's addresses of one family are used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Addresses that may be given out; saturates at `u128::MAX`.
    pub usable: u128,
    /// Those that endpoints have.
    pub endpoints: u128,
    /// Those that services have as their own.
    pub services: u128,
    /// Those that rest.
    pub resting: u128,
    /// Those that are kept for services' endpoints, and by reservations.
    pub reserved: u128,
}

impl Count {
    /// How many may be given out now.
    pub fn free(&self) -> u128 {
        self.unreserved().saturating_sub(self.reserved)
    }

    /// How many nobody has, kept or not.
    pub fn unreserved(&self) -> u128 {
        let used = [self.endpoints, self.services, self.resting];
        used.into_iter().fold(self.usable, u128::saturating_sub)
    }
}

/// How the addresses of one subnet are used. What is kept for services is kept of a network and a
/// family, not of a subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubnetCount {
    /// The subnet.
    pub cidr: IpNetwork,
    /// How its addresses are used, nothing of them being kept.
    pub count: Count,
    /// Those that the network's owner keeps from everybody.
    pub excluded: u128,
}

/// What one node has of a network's addresses of one family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeCount {
    /// Its blocks.
    pub blocks: u128,
    /// The addresses that may be given out of them and that nobody has.
    pub free: u128,
}
