//! Watching packets.

use netctl::api::client::{Client, ClientError};
use netctl::api::{ApiError, ErrorCode, MonitorQuery, SightingKind};
use serde_json::Value;

use super::checked::Checked;
use super::memory::Agent;
use super::seen;

/// Watches packets.
pub async fn show(api: &mut Checked<'_>) {
    let none = Value::Null;
    let seen = seen::sightings();
    api.agent.memory.state().sightings = seen[..1].to_vec();
    let told = api.exchange("get", "/v1/monitor?type=flow&sample=7", none.clone(), 200).await;
    assert_eq!(told, serde_json::to_value(&seen[0]).unwrap());
    let asked = api.agent.memory.state().monitored.pop().unwrap();
    assert_eq!((asked.kind, asked.sample), (Some(SightingKind::Flow), Some(7)));
    for refused in ["type=all", "sample=-1", "sample=many", "network=A", "more=1"] {
        api.exchange("get", &format!("/v1/monitor?{refused}"), none.clone(), 400).await;
    }
    api.exchange("get", "/v1/monitor?network=no", none.clone(), 404).await;
    api.failures("get", "/v1/monitor", none, &[409, 500, 503]).await;
}

#[tokio::test]
async fn a_client_gets_each_sighting_as_it_was_told() {
    let agent = Agent::start();
    let client = Client::new(&agent.socket);
    let seen = seen::sightings();
    agent.memory.state().sightings.clone_from(&seen);
    let query = MonitorQuery {
        network: None,
        endpoint: Some("a".parse().unwrap()),
        service: Some("web".parse().unwrap()),
        kind: Some(SightingKind::Drop),
        sample: Some(1),
    };
    let mut told = client.monitor(&query).await.unwrap();
    for sighting in seen {
        assert_eq!(told.next().await.unwrap(), Some(sighting));
    }
    assert_eq!(told.next().await.unwrap(), None);
    assert_eq!(agent.memory.state().monitored, [query]);
    let unknown = MonitorQuery { network: Some("no".parse().unwrap()), ..MonitorQuery::default() };
    let error = client.monitor(&unknown).await.unwrap_err();
    assert!(matches!(error, ClientError::Api(ApiError { code: ErrorCode::NotFound, .. })), "{error}");
}
