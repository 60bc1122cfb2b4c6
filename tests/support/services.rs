//! Services and drains, as the API's document has them.

use serde_json::{Value, json};

use super::checked::Checked;

/// Makes services of the network `web`, changes and removes them.
pub async fn show(api: &mut Checked<'_>) {
    let none = Value::Null;
    let spec = json!({
        "name": "shop", "networks": ["web"], "replicas": 3, "endpoint_mode": "vip",
        "update_order": "start-first", "update_parallelism": 2, "labels": {"x": ""},
        "addresses": ["10.9.0.80"], "external": [{"address": "192.0.2.10"}],
        "balancing": {
            "scheduler": "mh", "affinity": 600, "prefer": "label=zone", "timeouts": {"tcp_fin": 60},
            "ports": [{"port": 80, "target": 8080}, {"port": 53, "target": 53, "protocol": "udp"}],
        },
        "health": {"test": {"type": "http", "port": 80, "path": "/"}, "interval": 5},
    });
    let made = api.exchange("post", "/v1/services", spec.clone(), 201).await;
    assert_eq!(made["balancing"]["ports"][0], json!({"port": 80, "target": 8080, "protocol": "tcp"}));
    assert_eq!((&made["health"]["retries"], &made["ready"]), (&json!(3), &json!(1)));
    assert_eq!(made["backends"][0]["connections"], json!({"active": 3, "inactive": 4}));
    assert_eq!(made["backends"][1]["out"], "unhealthy: refused");
    assert_eq!(made["timeouts_in_effect"][0]["tcp_fin"], 120);
    assert_eq!((&made["replicas"], &made["network_names"]), (&json!(3), &json!(["web"])));
    let outside = json!({"external": {"address": "192.0.2.10"}, "network_name": "web", "weight": 1, "out": null,
        "connections": {"active": 1, "inactive": 2}});
    assert_eq!(made["external_backends"], json!([outside]));
    let loopback = json!({"name": "x", "networks": ["web"], "replicas": 0, "external": [
        {"address": "127.0.0.1"}]});
    api.exchange("post", "/v1/services", loopback, 400).await;
    api.exchange("post", "/v1/services", spec.clone(), 409).await;
    let nowhere = json!({"name": "x", "networks": ["no"], "replicas": 1});
    api.exchange("post", "/v1/services", nowhere, 404).await;
    api.bad_bodies("/v1/services", json!({"name": "x", "networks": ["web"], "replicas": -1})).await;
    api.failures("post", "/v1/services", spec, &[500, 501, 503]).await;
    assert_eq!(api.exchange("get", "/v1/services", none.clone(), 200).await, json!([made]));
    api.failures("get", "/v1/services", none.clone(), &[500, 503]).await;

    show_update(api).await;
    show_drain(api, "/v1/services/{shop}").await;

    let scale = "/v1/services/{shop}/scale";
    let scaled = api.exchange("put", scale, json!({"replicas": 7}), 200).await;
    assert_eq!(scaled["replicas"], 7);
    api.exchange("put", "/v1/services/{no}/scale", json!({"replicas": 7}), 404).await;
    api.bad_bodies_of("put", scale, json!({"replicas": "many"})).await;
    api.failures("put", scale, json!({"replicas": 7}), &[409, 500, 503]).await;

    let wanted = json!({"name": "plan", "networks": {"web": 3}, "ttl_s": 60});
    api.exchange("post", "/v1/reservations", wanted.clone(), 204).await;
    let nowhere = json!({"name": "plan", "networks": {"no": 3}, "ttl_s": 60});
    api.exchange("post", "/v1/reservations", nowhere, 404).await;
    api.bad_bodies("/v1/reservations", json!({"name": "plan"})).await;
    api.failures("post", "/v1/reservations", wanted, &[409, 500, 503]).await;

    for method in ["get", "delete"] {
        api.failures(method, "/v1/services/{shop}", none.clone(), &[500, 503]).await;
        api.exchange(method, "/v1/services/{no}", none.clone(), 404).await;
        api.exchange(method, "/v1/services/{A}", none.clone(), 400).await;
    }
    assert_eq!(api.exchange("get", "/v1/services/{shop}", none.clone(), 200).await, scaled);
    api.exchange("delete", "/v1/services/{shop}", none, 204).await;
}

async fn show_update(api: &mut Checked<'_>) {
    let path = "/v1/services/{shop}";
    let update = json!({
        "replicas": 4, "scheduler": "wlc", "no_affinity": true, "ports": [{"port": 80, "target": 81}],
        "remove_ports": [{"port": 53, "protocol": "udp"}], "timeouts": {"udp": 9},
        "remove_timeouts": ["tcp_fin"], "prefer": "node", "health": {"retries": 9},
        "update_order": "stop-first", "update_parallelism": 1, "labels": {"y": ""},
        "remove_labels": ["x"], "remove_external": [{"address": "192.0.2.10"}],
        "external": [{"address": "2001:db8::10", "port": 5432}],
    });
    let updated = api.exchange("patch", path, update.clone(), 200).await;
    assert_eq!(
        updated["balancing"],
        json!({
            "scheduler": "wlc", "ports": [{"protocol": "tcp", "port": 80, "target": 81}],
            "timeouts": {"udp": 9}, "prefer": "node",
        })
    );
    assert_eq!((&updated["health"]["interval"], &updated["health"]["retries"]), (&json!(5), &json!(9)));
    assert_eq!((&updated["replicas"], &updated["labels"]), (&json!(4), &json!({"y": ""})));
    assert_eq!(updated["external"], json!([{"address": "2001:db8::10", "port": 5432}]));
    let again = json!({"remove_ports": [{"port": 53, "protocol": "udp"}]});
    api.exchange("patch", path, again, 400).await;
    api.exchange("patch", "/v1/services/{no}", update.clone(), 404).await;
    api.bad_bodies_of("patch", path, json!({"scheduler": "fastest"})).await;
    api.failures("patch", path, update, &[409, 500, 503]).await;
}

/// Drains what the path names, looks how far that is, and ends it.
pub async fn show_drain(api: &mut Checked<'_>, path: &str) {
    let none = Value::Null;
    let drain = format!("{path}/drain");
    let begun = api.exchange("post", &drain, none.clone(), 200).await;
    assert_eq!((&begun["done"], &begun["waiting"]), (&json!(false), &json!(["n2"])));
    let ended = api.exchange("get", &drain, none.clone(), 200).await;
    assert_eq!(
        ended,
        json!({"done": true, "endpoints": 1, "waiting": [], "dead": [], "connections": 0})
    );
    assert_eq!(api.agent.memory.state().drained.len(), 1);
    api.exchange("post", &format!("{path}/activate"), none.clone(), 204).await;
    assert!(api.agent.memory.state().drained.is_empty());
    let (kind, _) = path.split_once("/{").unwrap();
    for (method, action) in [("get", "drain"), ("post", "drain"), ("post", "activate")] {
        api.failures(method, &format!("{path}/{action}"), none.clone(), &[500, 503]).await;
        api.exchange(method, &format!("{kind}/{{no}}/{action}"), none.clone(), 404).await;
        api.exchange(method, &format!("{kind}/{{A}}/{action}"), none.clone(), 400).await;
    }
}

/// Leaves everything as it was.
pub async fn show_names(api: &mut Checked<'_>) {
    let none = Value::Null;
    let path = "/v1/names?name=web.shop&type=AAAA&from=a&network=shop";
    let view = api.exchange("get", path, none.clone(), 200).await;
    assert_eq!((&view["name"], &view["type"]), (&json!("web.shop"), &json!("AAAA")));
    let view = api.exchange("get", "/v1/names?name=web", none.clone(), 200).await;
    assert_eq!((&view["type"], &view["source"]), (&json!("A"), &json!("inside")));
    for (query, status) in [
        ("name=a&from=no", 404),
        ("name=a&from=elsewhere", 409),
        ("", 400),
        ("name=a&x=1", 400),
        ("name=a&from=A", 400),
    ] {
        api.exchange("get", &format!("/v1/names?{query}"), none.clone(), status).await;
    }
    api.failures("get", "/v1/names?name=web", none, &[500, 503]).await;
}
