//! The API over a real socket: what the document says is what is answered, whatever is asked.

#[path = "support/checked.rs"]
mod checked;
#[path = "support/memory.rs"]
mod memory;
#[path = "api/monitor.rs"]
mod monitor;
#[path = "support/monitor.rs"]
mod seen;
#[path = "support/services.rs"]
mod services;

use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use checked::Checked;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use memory::Agent;
use netctl::api::client::{Client, ClientError};
use netctl::api::server::{self, BindError, MAX_BODY};
use netctl::api::{ApiError, AttachRequest, Attached, ErrorCode, Expanded};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Sends one request as it is.
async fn send(socket: &Path, method: &str, path: &str, kind: &str, body: Vec<u8>) -> (u16, Value) {
    let stream = UnixStream::connect(socket).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(async { drop(connection.await) });
    let mut request = Request::builder()
        .method(Method::from_bytes(method.as_bytes()).unwrap())
        .uri(path)
        .header("host", "netctl");
    if !kind.is_empty() {
        request = request.header("content-type", kind);
    }
    let request = request.body(Full::new(Bytes::from(body))).unwrap();
    let response = sender.send_request(request).await.unwrap();
    let status = response.status().as_u16();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let value = if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).unwrap() };
    (status, value)
}

async fn send_json(socket: &Path, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    send(socket, method, path, "application/json", body).await
}

/// Asks for the metrics; gives the status, the content's type, and the text.
async fn scrape(socket: &Path, accepted: &str) -> (u16, String, String) {
    let stream = UnixStream::connect(socket).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(async { drop(connection.await) });
    let request = Request::get("/metrics").header("host", "netctl").header("accept", accepted);
    let response = sender.send_request(request.body(Full::new(Bytes::new())).unwrap()).await.unwrap();
    let status = response.status().as_u16();
    let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, kind, String::from_utf8(bytes.to_vec()).unwrap())
}

/// Waits for a condition; twenty seconds without it are a failure.
async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < Duration::from_secs(20), "not in time: {what}");
        tokio::task::yield_now().await;
    }
}

/// Asserts that an answer is an error of ours and gives its message.
fn refused(answer: (u16, Value), status: u16, code: &str) -> String {
    assert_eq!(answer.0, status, "{}", answer.1);
    let keys: Vec<_> = answer.1.as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys, ["code", "message"]);
    assert_eq!(answer.1["code"], code, "{}", answer.1);
    answer.1["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn every_operation_answers_as_documented_with_every_status() {
    let agent = Agent::start();
    let (_, document) = send_json(&agent.socket, "GET", "/v1/openapi.json", &Value::Null).await;
    let mut api = Checked::new(&agent, document);
    assert_eq!(api.document["openapi"].as_str().unwrap().split('.').next(), Some("3"));
    api.exchange("get", "/v1/openapi.json", Value::Null, 200).await;
    let version = api.exchange("get", "/v1/version", Value::Null, 200).await;
    assert_eq!(version["node"], "n1");
    let settings = api.exchange("get", "/v1/settings", Value::Null, 200).await;
    assert_eq!((&settings["pool_prefix"], &settings["address_alarm"]), (&json!(24), &json!(95)));
    api.failures("get", "/v1/settings", Value::Null, &[500, 503]).await;
    api.exchange_metrics().await;
    show_networks(&mut api).await;
    show_subnets(&mut api).await;
    services::show(&mut api).await;
    show_endpoints(&mut api).await;
    show_check(&mut api).await;
    show_nodes(&mut api).await;
    monitor::show(&mut api).await;
    services::show_names(&mut api).await;
    let missed = api.missed();
    assert!(missed.is_empty(), "documented and not shown: {missed:?}");
}

/// Leaves the network `web`.
async fn show_networks(api: &mut Checked<'_>) {
    let none = Value::Null;
    let web = json!({
        "name": "web", "subnets": ["10.9.0.0/24", "fd00:9::/64"], "gateways": ["10.9.0.254"],
        "ranges": ["10.9.0.128/25"], "reserved": ["10.9.0.9"], "ipv6": false, "vni": 77,
        "mtu": 1400, "internal": true, "labels": {"team": "shop"},
    });
    let made = api.exchange("post", "/v1/networks", web.clone(), 201).await;
    assert_eq!((&made["vni"], &made["internal"]), (&json!(77), &json!(true)));
    assert_eq!((&made["ipv4"]["level"], &made["ipv4"]["full_in"]), (&json!("fine"), &json!(null)));
    assert_eq!(made["subnet_usage"][0]["cidr"], "10.9.0.0/24");
    assert_eq!(made["node_usage"][0]["ipv4"]["blocks"], 1);
    api.exchange("post", "/v1/networks", web.clone(), 409).await;
    api.bad_bodies("/v1/networks", json!({"name": "web", "mtu": 1})).await;
    api.failures("post", "/v1/networks", json!({"name": "x"}), &[500, 503]).await;
    let all = api.exchange("get", "/v1/networks", none.clone(), 200).await;
    assert_eq!(all[0], made);
    api.failures("get", "/v1/networks", none.clone(), &[500, 503]).await;
    assert_eq!(api.exchange("get", "/v1/networks/{web}", none.clone(), 200).await, made);
}

/// Adds a subnet to the network `web`, and removes it.
async fn show_subnets(api: &mut Checked<'_>) {
    let none = Value::Null;
    let path = "/v1/networks/{web}/subnets";
    let more = json!({
        "subnets": ["10.10.0.0/24"], "gateways": ["10.10.0.254"], "ranges": ["10.10.0.128/25"],
        "reserved": ["10.10.0.9"],
    });
    let expanded = api.exchange("post", path, more.clone(), 201).await;
    assert_eq!(expanded["subnets"][2]["gateway"], "10.10.0.254");
    assert_eq!(api.exchange("post", path, more.clone(), 200).await, expanded);
    let overlapping = json!({"subnets": ["10.10.0.0/25"]});
    api.exchange("post", path, overlapping, 409).await;
    api.exchange("post", "/v1/networks/{no}/subnets", more.clone(), 404).await;
    api.bad_bodies(path, json!({"subnets": []})).await;
    api.failures("post", path, more, &[500, 503]).await;

    let one = "/v1/networks/{web}/subnets?subnet=10.10.0.0%2F24";
    api.exchange("delete", path, none.clone(), 400).await;
    api.failures("delete", one, none.clone(), &[409, 500, 503]).await;
    let shrunk = api.exchange("delete", one, none.clone(), 200).await;
    assert_eq!(shrunk["subnets"].as_array().unwrap().len(), 2);
    api.exchange("delete", one, none.clone(), 404).await;
}

/// Uses the network `web`, and removes it.
async fn show_endpoints(api: &mut Checked<'_>) {
    let none = Value::Null;
    let attach = json!({
        "network": "web", "name": "a", "netns": "/run/netns/a", "interface": "eth7",
        "addresses": ["10.9.0.7"], "mac": "02:00:00:00:00:07", "labels": {"x": ""}, "wait_ms": 5,
        "service": "shop", "weight": 3,
    });
    let endpoint = api.exchange("post", "/v1/endpoints", attach.clone(), 201).await;
    assert_eq!(endpoint["gateways"], json!(["10.9.0.254"]));
    assert_eq!(endpoint["weight"], 3);
    assert_eq!(api.exchange("post", "/v1/endpoints", attach.clone(), 200).await, endpoint);
    let nowhere = json!({"network": "no", "netns": "/n"});
    api.exchange("post", "/v1/endpoints", nowhere, 404).await;
    api.bad_bodies("/v1/endpoints", json!({"network": "a/b", "netns": "/n"})).await;
    api.failures("post", "/v1/endpoints", attach.clone(), &[409, 500, 501, 503, 504]).await;
    let list = api.exchange("get", "/v1/endpoints?network=web&node=n1", none.clone(), 200).await;
    assert_eq!(list, json!([endpoint]));
    let other = api.exchange("get", "/v1/endpoints?node=n2", none.clone(), 200).await;
    assert_eq!(other, json!([]));
    api.exchange("get", "/v1/endpoints?node=A", none.clone(), 400).await;
    api.exchange("get", "/v1/endpoints?network=no", none.clone(), 404).await;
    api.failures("get", "/v1/endpoints", none.clone(), &[500, 503]).await;

    let one = "/v1/endpoints/{a}?network=web";
    assert_eq!(api.exchange("get", one, none.clone(), 200).await, endpoint);
    api.exchange("delete", "/v1/networks/{web}", none.clone(), 409).await;
    services::show_drain(api, "/v1/endpoints/{a}").await;
    for (method, action) in [("get", "drain"), ("post", "drain"), ("post", "activate")] {
        let path = format!("/v1/endpoints/{{a}}/{action}?network=web");
        api.failures(method, &path, none.clone(), &[409]).await;
    }
    let detached = api.exchange("delete", one, none.clone(), 200).await;
    assert_eq!(detached["id"], endpoint["id"]);
    for method in ["get", "delete"] {
        api.failures(method, "/v1/endpoints/{a}", none.clone(), &[409, 500, 503]).await;
        api.exchange(method, "/v1/endpoints/{no}", none.clone(), 404).await;
        api.exchange(method, "/v1/endpoints/{A}", none.clone(), 400).await;
        api.failures(method, "/v1/networks/{web}", none.clone(), &[500, 503]).await;
        api.exchange(method, "/v1/networks/{no}", none.clone(), 404).await;
        api.exchange(method, "/v1/networks/{A}", none.clone(), 400).await;
    }
    api.exchange("delete", "/v1/networks/{web}", none.clone(), 204).await;
}

async fn show_check(api: &mut Checked<'_>) {
    let none = Value::Null;
    api.agent.memory.state().findings = vec![("leak", true), ("double", false)];
    for (method, path, repaired, left) in
        [("get", "/v1/ipam/check", 0, 2), ("post", "/v1/ipam/repair", 1, 1)]
    {
        let found = api.exchange(method, path, none.clone(), 200).await;
        assert_eq!(found["repaired"].as_array().unwrap().len(), repaired);
        assert_eq!(found["findings"].as_array().unwrap().len(), left);
        assert_eq!(found["findings"][left - 1]["node"], "n2");
        assert_eq!(
            found["nodes"][1],
            json!({"node": "n2", "outcome": "compared", "reason": "", "cut": 0})
        );
        let local = api.exchange(method, &format!("{path}?local=true"), none.clone(), 200).await;
        assert_eq!(local["nodes"].as_array().unwrap().len(), 1);
        assert!(local["findings"].as_array().unwrap().iter().all(|found| found["node"].is_null()));
        api.exchange(method, &format!("{path}?local=perhaps"), none.clone(), 400).await;
        api.exchange(method, &format!("{path}?network=no"), none.clone(), 404).await;
        api.exchange(method, &format!("{path}?network=A"), none.clone(), 400).await;
        api.failures(method, path, none.clone(), &[500, 503]).await;
    }
}

async fn show_nodes(api: &mut Checked<'_>) {
    let none = Value::Null;
    let nodes = api.exchange("get", "/v1/nodes", none.clone(), 200).await;
    assert_eq!(nodes[1]["alive"], false);
    api.failures("get", "/v1/nodes", none.clone(), &[500, 503]).await;
    api.exchange("get", "/v1/nodes/{n1}", none.clone(), 200).await;
    api.exchange("get", "/v1/nodes/{no}", none.clone(), 404).await;
    api.exchange("get", "/v1/nodes/{A}", none.clone(), 400).await;
    api.failures("get", "/v1/nodes/{n1}", none.clone(), &[500, 503]).await;
    services::show_drain(api, "/v1/nodes/{n1}").await;
    api.exchange("delete", "/v1/nodes/{n2}", none.clone(), 204).await;
    api.exchange("delete", "/v1/nodes/{n1}", none.clone(), 409).await;
    api.exchange("delete", "/v1/nodes/{no}", none.clone(), 404).await;
    api.exchange("delete", "/v1/nodes/{A}", none.clone(), 400).await;
    api.failures("delete", "/v1/nodes/{n2}", none, &[500, 503]).await;
}

#[tokio::test]
async fn malformed_json_is_refused_with_the_field_or_the_place() {
    let agent = Agent::start();
    let post = async |body: &str| {
        let kind = "application/json; charset=utf-8";
        let answer = send(&agent.socket, "POST", "/v1/networks", kind, body.into()).await;
        refused(answer, 400, "invalid")
    };
    for (body, part) in [
        ("", "EOF"),
        ("{", "EOF"),
        ("[]", "the body"),
        ("nul", "the body"),
        ("{\"name\": 5}", "field name"),
        ("{\"name\": \"web\", \"subnets\": [\"10.9.0.0/99\"]}", "field subnets[0]"),
        ("{\"name\": \"web\", \"labels\": {\"a\": 1}}", "field labels.a"),
        ("{\"name\": \"web\", \"colour\": 1}", "colour"),
        ("{\"name\": \"web\", \"name\": \"b\"}", "duplicate field"),
        ("{\"name\": \"web\"} x", "trailing"),
        ("{\"name\": \"\\u0000\"}", "field name"),
    ] {
        let message = post(body).await;
        assert!(message.contains(part), "{body}: {message}");
    }
    let deep = post(&"[".repeat(100_000)).await;
    assert!(deep.len() < 300, "{deep}");
    let long = post(&json!({"name": "x".repeat(300)}).to_string()).await;
    assert!(long.contains("field name") && long.contains("too long") && long.len() < 200, "{long}");
    assert!(agent.memory.state().networks.is_empty());
}

#[tokio::test]
async fn names_that_are_paths_or_endless_are_refused_everywhere() {
    let agent = Agent::start();
    let long = "x".repeat(300);
    let names = ["..", "%2e%2e", "%2E%2E%2F%2E%2E%2Fetc", "a%2Fb", "a%00b", "%ff%fe", "%20", "A", &long];
    for name in names {
        for kind in ["networks", "endpoints", "nodes"] {
            let methods: &[&str] = if kind == "nodes" { &["GET"] } else { &["GET", "DELETE"] };
            for method in methods {
                let path = format!("/v1/{kind}/{name}");
                let message =
                    refused(send_json(&agent.socket, method, &path, &Value::Null).await, 400, "invalid");
                assert!(message.len() < 250, "{message}");
            }
        }
        let query = format!("/v1/endpoints?network={name}");
        refused(send_json(&agent.socket, "GET", &query, &Value::Null).await, 400, "invalid");
    }
}

#[tokio::test]
async fn unknown_paths_methods_and_parameters_are_refused_in_our_form() {
    let agent = Agent::start();
    let paths = ["/", "/v1", "/v2/version", "/v1/networks/", "/v1/networks/a/b", "/v1/../etc/passwd"];
    for path in paths {
        refused(send_json(&agent.socket, "GET", path, &Value::Null).await, 404, "not_found");
    }
    for (method, path) in [
        ("PUT", "/v1/networks"),
        ("DELETE", "/v1/networks"),
        ("POST", "/v1/version"),
        ("PATCH", "/v1/endpoints/a"),
        ("BREW", "/v1/nodes"),
    ] {
        refused(send_json(&agent.socket, method, path, &Value::Null).await, 405, "invalid");
    }
    for path in ["/v1/endpoints?netwrok=a", "/v1/endpoints/a?node=b"] {
        let message = refused(send_json(&agent.socket, "GET", path, &Value::Null).await, 400, "invalid");
        assert!(message.contains("unknown field"), "{message}");
    }
}

#[tokio::test]
async fn a_body_that_never_ends_is_cut_off() {
    let agent = Agent::start();
    let body = vec![b'x'; 2 * MAX_BODY];
    let answer = send(&agent.socket, "POST", "/v1/endpoints", "application/json", body).await;
    assert!(refused(answer, 413, "invalid").contains("too large"));
    let (status, _) = send_json(&agent.socket, "GET", "/v1/version", &Value::Null).await;
    assert_eq!(status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_clients_at_once_lose_nothing() {
    let agent = Agent::start();
    let client = Client::new(&agent.socket);
    client.create_network(&serde_json::from_value(json!({"name": "web"})).unwrap()).await.unwrap();
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..64 {
        let client = client.clone();
        clients.spawn(async move {
            for round in 0..8 {
                let request = json!({
                    "network": "web", "netns": "/n", "name": format!("e{number}-{round}"),
                });
                let request: AttachRequest = serde_json::from_value(request).unwrap();
                let attached = client.attach(&request).await.unwrap();
                assert!(matches!(attached, Attached::Created(_)));
                assert!(matches!(client.attach(&request).await.unwrap(), Attached::Existing(_)));
            }
        });
    }
    clients.join_all().await;
    assert_eq!(client.endpoints(Some("web"), None).await.unwrap().len(), 64 * 8);
}

#[tokio::test]
async fn the_client_gives_what_the_agent_says() {
    let agent = Agent::start();
    let client = Client::new(&agent.socket);
    let spec = serde_json::from_value(json!({"name": "web", "subnets": ["10.9.0.0/24"]})).unwrap();
    let made = client.create_network(&spec).await.unwrap();
    assert_eq!(client.network(&made.network.id.to_string()).await.unwrap(), made);
    assert_eq!(client.networks().await.unwrap(), std::slice::from_ref(&made));
    let refused = client.create_network(&spec).await.unwrap_err();
    assert!(matches!(refused, ClientError::Api(ApiError { code: ErrorCode::Conflict, .. })));
    for name in ["..", "a/b?c=d", "ä", ""] {
        let error = client.network(name).await.unwrap_err();
        let expected = if name.is_empty() { ErrorCode::NotFound } else { ErrorCode::Invalid };
        assert!(matches!(error, ClientError::Api(e) if e.code == expected), "{name}");
    }
    let more = serde_json::from_value(json!({"subnets": ["10.10.0.0/24"]})).unwrap();
    let Expanded::Changed(expanded) = client.expand_network("web", &more).await.unwrap() else {
        panic!("the network has the subnet before it is added")
    };
    let again = client.expand_network("web", &more).await.unwrap();
    assert_eq!(again, Expanded::Unchanged(expanded));
    let shrunk = client.shrink_network("web", "10.10.0.0/24".parse().unwrap()).await.unwrap();
    assert_eq!(shrunk, made);
    client.remove_network("web").await.unwrap();
    let gone = client.detach("a", Some("web")).await.unwrap_err();
    assert!(matches!(gone, ClientError::Api(ApiError { code: ErrorCode::NotFound, .. })));
    assert_eq!(client.nodes().await.unwrap().len(), 2);
    assert!(client.node("n1").await.unwrap().this);
}

#[tokio::test]
async fn the_client_connects_anew_when_the_agent_was_restarted() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let client = Client::new(&socket);
    for _ in 0..2 {
        let agent = Agent::start();
        let _ = std::fs::remove_file(&socket);
        std::os::unix::fs::symlink(&agent.socket, &socket).unwrap();
        for _ in 0..3 {
            assert_eq!(client.version().await.unwrap().node.as_str(), "n1");
        }
    }
    let error = client.version().await.unwrap_err();
    assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(socket.to_str().unwrap()) && text.contains("systemctl status netctld"));
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[tokio::test]
async fn the_socket_is_root_s_or_its_group_s_whatever_the_umask() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run/netctl/netctl.sock");
    // Root can give it to any group, others only to one of theirs.
    let group = if Uid::effective().is_root() { Gid::from_raw(7) } else { Gid::current() };
    let group = Some(group);
    for (group, expected, mask) in
        [(None, 0o600, 0o000), (group, 0o660, 0o077), (None, 0o600, 0o077), (group, 0o660, 0o000)]
    {
        let _ = std::fs::remove_dir_all(path.parent().unwrap());
        let before = umask(Mode::from_bits_truncate(mask));
        let listener = server::bind(&path, group).unwrap();
        umask(before);
        assert_eq!(mode(&path), expected);
        assert_eq!(mode(path.parent().unwrap()), 0o755);
        if let Some(group) = group {
            assert_eq!(std::fs::metadata(&path).unwrap().gid(), group.as_raw());
        }
        drop(listener);
    }
    let left: Vec<_> = std::fs::read_dir(path.parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "something was left beside the socket: {left:?}");
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("netctl.sock");
    let live = server::bind(&path, None).unwrap();
    let inode = std::fs::metadata(&path).unwrap().ino();
    let error = server::bind(&path, None).unwrap_err();
    assert!(matches!(error, BindError::Live { .. }), "{error}");
    assert_eq!(std::fs::metadata(&path).unwrap().ino(), inode);
    drop(live);
    assert!(std::fs::metadata(&path).unwrap().file_type().is_socket());
    let again = server::bind(&path, None).unwrap();
    UnixStream::connect(&path).await.unwrap();
    drop(again);
}

#[tokio::test]
async fn a_file_that_is_no_socket_is_never_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("netctl.sock");
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(server::bind(&path, None), Err(BindError::NotASocket { .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let link = directory.path().join("link.sock");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(matches!(server::bind(&link, None), Err(BindError::NotASocket { .. })));
    let long = directory.path().join("x".repeat(108));
    assert!(matches!(server::bind(&long, None), Err(BindError::Path { .. })));
}

#[tokio::test]
async fn a_running_request_is_answered_at_shutdown() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let agent = Agent::start();
    let listener = server::bind(&path, None).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let memory = agent.memory.clone();
    let server = tokio::spawn(server::serve(listener, memory.clone() as Arc<_>, async {
        drop(stopped.await);
    }));
    let client = Client::new(&path);
    client.create_network(&serde_json::from_value(json!({"name": "web"})).unwrap()).await.unwrap();
    memory.gate.forget_permits(memory.gate.available_permits());
    let request = serde_json::from_value(json!({"network": "web", "netns": "/n"})).unwrap();
    let attach = tokio::spawn(async move { client.attach(&request).await });
    until("it attaches", async || !memory.state().attached.is_empty()).await;
    drop(stop);
    until("the socket is closed", async || UnixStream::connect(&path).await.is_err()).await;
    memory.gate.add_permits(1);
    assert!(matches!(attach.await.unwrap(), Ok(Attached::Created(_))));
    server.await.unwrap();
}

#[tokio::test]
async fn a_change_is_made_to_its_end_when_its_client_leaves() {
    let agent = Agent::start();
    let client = Client::new(&agent.socket);
    client.create_network(&serde_json::from_value(json!({"name": "web"})).unwrap()).await.unwrap();
    let gate = &agent.memory.gate;
    gate.forget_permits(gate.available_permits());
    let body = r#"{"network":"web","netns":"/n","name":"a"}"#;
    let mut leaver = UnixStream::connect(&agent.socket).await.unwrap();
    let request = format!(
        "POST /v1/endpoints HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    leaver.write_all(request.as_bytes()).await.unwrap();
    until("it attaches", async || !agent.memory.state().attached.is_empty()).await;
    drop(leaver);
    // The server has seen the end of that connection when it has served one that came later.
    client.version().await.unwrap();
    gate.add_permits(1);
    until("the endpoint is there", async || {
        client.version().await.unwrap();
        !agent.memory.state().endpoints.is_empty()
    })
    .await;
}

/// Sends bytes on a new connection to an agent in this runtime, whose clock jumps when nothing
/// else can happen, and gives what comes until the end.
async fn until_the_end(bytes: &[u8]) -> String {
    let agent = Agent::start();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = server::bind(&path, None).unwrap();
    tokio::spawn(server::serve(listener, agent.memory.clone() as Arc<_>, std::future::pending()));
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = String::new();
    // By this runtime's clock, which jumps.
    let read = tokio::time::timeout(Duration::from_secs(60), stream.read_to_string(&mut answer));
    read.await.expect("the connection was not ended").unwrap();
    answer
}

#[tokio::test(start_paused = true)]
async fn a_head_that_does_not_arrive_ends_the_connection() {
    assert_eq!(until_the_end(b"").await, "");
    assert!(!until_the_end(b"GET /v1/version HTTP/1.1\r\nhost: x\r\n").await.contains("200"));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_arrive_is_refused() {
    let head = b"POST /v1/networks HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                 content-length: 100\r\n\r\n{";
    let answer = until_the_end(head).await;
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("did not arrive"), "{answer}");
}

#[tokio::test]
async fn more_connections_than_are_served_wait_for_a_place() {
    let agent = Agent::start();
    let question = b"GET /v1/version HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut open = Vec::new();
    for _ in 0..255 {
        let mut stream = UnixStream::connect(&agent.socket).await.unwrap();
        stream.write_all(question).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'H');
        open.push(stream);
    }
    let client = Client::new(&agent.socket);
    client.version().await.unwrap();
    let mut late = UnixStream::connect(&agent.socket).await.unwrap();
    late.write_all(question).await.unwrap();
    // Whoever has a place is answered many times meanwhile.
    for _ in 0..64 {
        client.version().await.unwrap();
    }
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let unanswered = recv(late.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN);
    assert!(unanswered, "there was a place for one more");
    open.pop();
    assert_eq!(late.read_u8().await.unwrap(), b'H');
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_bytes_are_answered_in_another_form(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let agent = Agent::start();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let body = bytes.clone();
            let answer = send(&agent.socket, "POST", "/v1/networks", "application/json", body).await;
            refused(answer, 400, "invalid");
        });
    }
}
