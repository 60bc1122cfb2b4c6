//! What a name is answered with, and why.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::model::Name;

/// A question for the name server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct NameQuery {
    /// The name, as a container would give it.
    pub name: String,
    /// The type of the records, such as `AAAA` or `SRV`; by default `A`.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The endpoint of this node that is to be answered, by name or id; by default somebody who is on
    /// `network`, or on all networks of this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Name>,
    /// The network of `from`, or that on which is asked, by name or id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Name>,
}

/// What a name is answered with, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NameView {
    /// The name, as it was asked for.
    pub name: String,
    /// The type that was asked for.
    #[serde(rename = "type")]
    pub kind: String,
    /// The code of the answer, such as `NOERROR` or `NXDOMAIN`.
    pub code: String,
    /// The records of the answer.
    pub records: Vec<RecordView>,
    /// The networks whose names who asks finds, the first one first.
    pub networks: Vec<Name>,
    /// Where the answer is from.
    pub source: NameSource,
}

/// A record of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RecordView {
    /// Whose it is.
    pub name: String,
    /// For how many seconds it may be kept.
    pub ttl: u32,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// What it says.
    pub data: String,
}

/// Where an answer is from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NameSource {
    /// From what this node knows of its networks.
    Own {
        /// The network in which it was found.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        network: Option<Name>,
        /// What the name stands for.
        what: String,
    },
    /// From an earlier answer, which was kept.
    Kept {
        /// Who gave it.
        server: String,
        /// How many seconds ago.
        age: u32,
        /// For how many seconds more it is kept.
        left: u32,
    },
    /// Asked for elsewhere just now.
    Forwarded {
        /// Who gave it.
        server: String,
        /// How long that took.
        milliseconds: u64,
    },
    /// Asked for elsewhere just now, and nobody gave an answer.
    Unanswered {
        /// Who was asked.
        servers: Vec<String>,
    },
    /// Not asked for elsewhere: the client is on internal networks only.
    Inside,
}
