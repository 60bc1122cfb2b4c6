//! The schedulers: how a service chooses a destination for a new connection.

use std::fmt;

macro_rules! schedulers {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal;)+) => {
        /// How a service chooses among its destinations (net/netfilter/ipvs/ip_vs_*.c). The kernel
        /// loads the module `ip_vs_<name>` when a service first asks for it.
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Scheduler {
            $($(#[doc = $doc])+ $variant,)+
            /// One that this list does not have, by its name: at most 15 bytes.
            Other(String),
        }

        impl Scheduler {
            /// All that have a name here.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The name by which the kernel and `ipvsadm -s` know it.
            pub fn name(&self) -> &str {
                match self {
                    $(Self::$variant => $name,)+
                    Self::Other(name) => name,
                }
            }
        }

        impl From<&str> for Scheduler {
            fn from(name: &str) -> Self {
                match name {
                    $($name => Self::$variant,)+
                    _ => Self::Other(name.to_owned()),
                }
            }
        }
    };
}

schedulers! {
    /// One after the other.
    RoundRobin = "rr";
    /// One after the other, by weight.
    WeightedRoundRobin = "wrr";
    /// The one with the fewest connections.
    LeastConnection = "lc";
    /// The one with the fewest connections for its weight: what `ipvsadm` takes by default.
    WeightedLeastConnection = "wlc";
    /// By destination address, for caches; away from one that has too much to do.
    LocalityBasedLeastConnection = "lblc";
    /// As [`Self::LocalityBasedLeastConnection`], with a set of destinations for each address.
    LocalityBasedLeastConnectionReplicated = "lblcr";
    /// By a hash of the destination address.
    DestinationHashing = "dh";
    /// By a hash of the source address.
    SourceHashing = "sh";
    /// The one with the shortest expected delay.
    ShortestExpectedDelay = "sed";
    /// One that has nothing to do, else the one with the shortest expected delay.
    NeverQueue = "nq";
    /// The one with the highest weight that is there.
    WeightedFailover = "fo";
    /// The one with the highest weight until it has as many connections as its weight.
    WeightedOverflow = "ovf";
    /// By a consistent hash of the source address (Maglev, NSDI 2016).
    MaglevHashing = "mh";
    /// The less loaded one of two that are drawn by weight.
    WeightedTwoChoices = "twos";
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_means_the_scheduler_that_bears_it() {
        for scheduler in Scheduler::ALL {
            assert_eq!(Scheduler::from(scheduler.name()), *scheduler);
        }
        let other = Scheduler::from("chash");
        assert_eq!(
            (other.clone(), other.to_string()),
            (Scheduler::Other("chash".into()), "chash".into())
        );
    }
}
