//! Names, as the agent in memory answers them: there is nothing, of whatever type.

use netctl::api::{ApiError, ErrorCode, NameQuery, NameSource, NameView};
use netctl::model::Name;

/// `elsewhere` is an endpoint of another node, `no` is none.
pub fn look_up(query: &NameQuery) -> Result<NameView, ApiError> {
    match query.from.as_ref().map(Name::as_str) {
        Some("elsewhere") => {
            return Err(ApiError::new(ErrorCode::Conflict, "endpoint elsewhere is on node n2"));
        }
        Some("no") => return Err(super::not_found("endpoint no")),
        _ => {}
    }
    Ok(NameView {
        name: query.name.clone(),
        kind: query.kind.clone().unwrap_or_else(|| "A".to_owned()),
        code: "NOERROR".to_owned(),
        records: Vec::new(),
        networks: Vec::new(),
        source: NameSource::Inside,
    })
}
