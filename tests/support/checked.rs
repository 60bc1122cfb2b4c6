//! Answers of the API, held against its document.

use std::collections::BTreeSet;

use netctl::api::ErrorCode;
use netctl::api::server::MAX_BODY;
use serde_json::Value;

use super::memory::Agent;
use super::{refused, scrape, send, send_json};

pub type Operation = (String, String, u16);

/// Talks to an agent and holds every answer against the document.
pub struct Checked<'a> {
    pub agent: &'a Agent,
    pub document: Value,
    seen: BTreeSet<Operation>,
}

impl<'a> Checked<'a> {
    pub fn new(agent: &'a Agent, document: Value) -> Self {
        Self { agent, document, seen: BTreeSet::new() }
    }

    /// The operations of the document, with each of their statuses, that were not seen.
    pub fn missed(&self) -> Vec<Operation> {
        self.operations().difference(&self.seen).cloned().collect()
    }

    /// All operations of the document with each of their statuses.
    fn operations(&self) -> BTreeSet<Operation> {
        let mut all = BTreeSet::new();
        for (path, methods) in self.document["paths"].as_object().unwrap() {
            for (method, operation) in methods.as_object().unwrap() {
                for status in operation["responses"].as_object().unwrap().keys() {
                    all.insert((method.clone(), path.clone(), status.parse().unwrap()));
                }
            }
        }
        all
    }

    fn assert_valid(&self, schema: &Value, value: &Value, what: &str) {
        let mut schema = schema.clone();
        schema["components"] = self.document["components"].clone();
        let validator = jsonschema::validator_for(&schema).unwrap();
        let errors: Vec<String> = validator.iter_errors(value).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{what}: {value}: {errors:?}");
    }

    /// Sends a request to a path of the document, given as its template with values for its
    /// parameters, and checks the answer's status and schema.
    pub async fn exchange(&mut self, method: &str, path: &str, body: Value, status: u16) -> Value {
        let plain = path.split('?').next().unwrap();
        let template = plain.replace("{web}", "{network}").replace("{a}", "{endpoint}");
        let template = template.replace("{no}", if plain.contains("nodes") { "{node}" } else { "{no}" });
        let template = match plain.split('/').nth(2) {
            Some("networks") => template.replace("{no}", "{network}").replace("{A}", "{network}"),
            Some("services") => template
                .replace("{no}", "{service}")
                .replace("{A}", "{service}")
                .replace("{shop}", "{service}"),
            Some("endpoints") => template.replace("{no}", "{endpoint}").replace("{A}", "{endpoint}"),
            _ => template.replace("{n1}", "{node}").replace("{n2}", "{node}").replace("{A}", "{node}"),
        };
        let operation = self.document["paths"][&template][method].clone();
        assert!(operation.is_object(), "{method} {template} is not in the document");
        let request = &operation["requestBody"]["content"]["application/json"]["schema"];
        if (200..300).contains(&status) && request.is_object() {
            self.assert_valid(request, &body, &format!("{method} {path}"));
        }
        let sent = path.replace(['{', '}'], "");
        let (found, answer) = send_json(&self.agent.socket, &method.to_uppercase(), &sent, &body).await;
        assert_eq!(found, status, "{method} {path}: {answer}");
        let response = &operation["responses"][status.to_string()];
        assert!(response.is_object(), "{method} {path}: {status} is not in the document");
        let content = response["content"].as_object().and_then(|content| content.values().next());
        match content.map(|content| &content["schema"]) {
            None => assert_eq!(answer, Value::Null, "{method} {path}"),
            Some(schema) => self.assert_valid(schema, &answer, &format!("{method} {path} {status}")),
        }
        self.seen.insert((method.to_owned(), template, status));
        answer
    }

    /// Asks for the metrics in each of their forms, which are text.
    pub async fn exchange_metrics(&mut self) {
        let response = &self.document["paths"]["/metrics"]["get"]["responses"]["200"];
        let kinds = response["content"].as_object().unwrap().clone();
        assert_eq!(kinds.len(), 2, "{kinds:?}");
        for (accepted, kind) in [
            ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
            (
                "text/plain;q=0.1, application/openmetrics-text;version=1.0.0",
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            ),
        ] {
            let (status, found, text) = scrape(&self.agent.socket, accepted).await;
            assert_eq!((status, found.as_str()), (200, kind));
            assert!(kinds.contains_key(kind.split(';').next().unwrap()), "{kind}: {kinds:?}");
            assert!(text.contains("netctl_build_info{") && text.ends_with("# EOF\n"), "{text}");
        }
        self.seen.insert(("get".to_owned(), "/metrics".to_owned(), 200));
    }

    /// Lets the agent fail with each of the codes that have a documented status.
    pub async fn failures(&mut self, method: &str, path: &str, body: Value, statuses: &[u16]) {
        for &status in statuses {
            let code = match status {
                409 => ErrorCode::Exhausted,
                500 => ErrorCode::Internal,
                501 => ErrorCode::Unsupported,
                503 => ErrorCode::StoreReplaced,
                _ => ErrorCode::Timeout,
            };
            self.agent.memory.state().fail_next = Some(code);
            self.exchange(method, path, body.clone(), status).await;
        }
    }

    /// Sends bodies that are refused before the agent sees them.
    pub async fn bad_bodies(&mut self, path: &str, bad: Value) {
        self.bad_bodies_of("post", path, bad).await;
    }

    /// The same with another method.
    pub async fn bad_bodies_of(&mut self, method: &str, path: &str, bad: Value) {
        self.exchange(method, path, bad, 400).await;
        let verb = method.to_uppercase();
        let (socket, sent) = (&self.agent.socket, path.replace(['{', '}'], ""));
        let large = send(socket, &verb, &sent, "application/json", vec![b' '; MAX_BODY + 1]).await;
        refused(large, 413, "invalid");
        refused(send(socket, &verb, &sent, "text/plain", b"{}".to_vec()).await, 415, "invalid");
        let template = path.replace("{web}", "{network}").replace("{shop}", "{service}");
        self.seen.insert((method.to_owned(), template.clone(), 413));
        self.seen.insert((method.to_owned(), template, 415));
    }
}
