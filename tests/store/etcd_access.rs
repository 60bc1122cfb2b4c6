//! Who may use etcd: TLS and authentication.

use std::path::PathBuf;
use std::time::Duration;

use etcd_client::{Permission, PermissionType};
use netctl::store::etcd::{Etcd, EtcdConfig};
use netctl::store::{Event, Store, StoreError, Transaction};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

use crate::ground::{Server, Test, commit, eventually, next, tests, value};

pub fn tests() -> Vec<(&'static str, Test)> {
    tests![
    "etcd":
    tls_with_client_certificates_works,
    a_client_certificate_of_another_authority_is_denied,
    a_missing_client_certificate_is_denied,
    a_server_of_another_authority_is_not_talked_to,
    a_user_with_the_right_password_is_let_in,
    a_wrong_password_is_denied,
    a_missing_password_is_denied,
    a_prefix_that_the_user_may_not_use_is_denied,
    a_token_that_has_ended_is_renewed,
    a_watch_goes_on_after_its_token_has_ended,
    authentication_that_is_enabled_while_the_store_is_used_is_followed,
    ]
}

/// Two authorities, each with a certificate for 127.0.0.1 and one for a client.
struct Certificates(TempDir);

impl Certificates {
    fn make() -> Self {
        let made = Self(tempfile::tempdir().unwrap());
        for authority in ["ours", "other"] {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
            made.write(&format!("{authority}-ca.pem"), &ca.pem());
            for (name, subject) in [("server", "127.0.0.1"), ("client", "netctl")] {
                let key = KeyPair::generate().unwrap();
                let params = CertificateParams::new(vec![subject.to_owned()]).unwrap();
                let certificate = params.signed_by(&key, &ca).unwrap();
                made.write(&format!("{authority}-{name}.pem"), &certificate.pem());
                made.write(&format!("{authority}-{name}-key.pem"), &key.serialize_pem());
            }
        }
        made
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A server of ours that wants client certificates of ours.
    fn server(&self) -> Server {
        Server::spawn(|port| {
            let flag = |name: &str, file: &str| format!("--{name}={}", self.path(file).display());
            vec![
                format!("--listen-client-urls=https://127.0.0.1:{port}"),
                format!("--advertise-client-urls=https://127.0.0.1:{port}"),
                flag("cert-file", "ours-server.pem"),
                flag("key-file", "ours-server-key.pem"),
                flag("trusted-ca-file", "ours-ca.pem"),
                "--client-cert-auth".to_owned(),
            ]
        })
    }

    fn config(&self, server: &Server) -> EtcdConfig {
        EtcdConfig {
            endpoints: vec![format!("https://127.0.0.1:{}", server.port())],
            ca: Some(self.path("ours-ca.pem")),
            certificate: Some(self.path("ours-client.pem")),
            key: Some(self.path("ours-client-key.pem")),
            ..EtcdConfig::default()
        }
    }
}

async fn tls_with_client_certificates_works() {
    let certificates = Certificates::make();
    let server = certificates.server();
    let store = Etcd::new(certificates.config(&server)).unwrap();
    eventually("etcd answers", async || store.get("a").await.ok()).await;
    let mut watch = store.watch("", None);
    assert!(matches!(next(&mut watch).await, Event::Snapshot(_)));
    commit(&store, Transaction::new().put("a", "1")).await;
    assert!(matches!(next(&mut watch).await, Event::Changes(..)));
    assert_eq!(value(&store, "a").await.as_deref(), Some("1"));
}

/// What a store, and a watch on it, says of a server that works.
async fn refusal(
    certificates: &Certificates,
    server: &Server,
    config: EtcdConfig,
) -> (StoreError, String) {
    let good = Etcd::new(certificates.config(server)).unwrap();
    eventually("etcd answers", async || good.get("a").await.ok()).await;
    let store = Etcd::new(config).unwrap();
    let error = store.get("a").await.unwrap_err();
    let Event::Lost(reason) = next(&mut store.watch("", None)).await else { panic!("not lost") };
    (error, reason)
}

async fn a_client_certificate_of_another_authority_is_denied() {
    let certificates = Certificates::make();
    let server = certificates.server();
    let config = EtcdConfig {
        certificate: Some(certificates.path("other-client.pem")),
        key: Some(certificates.path("other-client-key.pem")),
        ..certificates.config(&server)
    };
    let (error, reason) = refusal(&certificates, &server, config).await;
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
    assert!(error.to_string().contains("TLS") && reason.contains("TLS"), "{error}; {reason}");
}

async fn a_missing_client_certificate_is_denied() {
    let certificates = Certificates::make();
    let server = certificates.server();
    let config = EtcdConfig { certificate: None, key: None, ..certificates.config(&server) };
    let (error, reason) = refusal(&certificates, &server, config).await;
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
    assert!(error.to_string().contains("TLS") && reason.contains("TLS"), "{error}; {reason}");
}

async fn a_server_of_another_authority_is_not_talked_to() {
    let certificates = Certificates::make();
    let server = certificates.server();
    let ca = Some(certificates.path("other-ca.pem"));
    let config = EtcdConfig { ca, ..certificates.config(&server) };
    let (error, reason) = refusal(&certificates, &server, config).await;
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
    for text in [error.to_string(), reason] {
        assert!(text.contains("invalid peer certificate"), "{text}");
    }
}

/// Makes root, and the user `netctl` who may use the prefix `netctl/`; and turns authentication
/// on.
async fn authenticate(server: &Server) {
    let mut client = server.client().await;
    client.user_add("root", "root's", None).await.unwrap();
    client.role_add("root").await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.user_add("netctl", "right", None).await.unwrap();
    client.role_add("netctl").await.unwrap();
    let permission = Permission::new(PermissionType::Readwrite, "netctl/").with_prefix();
    client.role_grant_permission("netctl", permission).await.unwrap();
    client.user_grant_role("netctl", "netctl").await.unwrap();
    client.auth_enable().await.unwrap();
}

fn config(server: &Server, password: Option<&str>) -> EtcdConfig {
    let user = password.map(|_| "netctl".to_owned());
    EtcdConfig { user, password: password.map(str::to_owned), ..server.config() }
}

async fn a_user_with_the_right_password_is_let_in() {
    let server = Server::start().await;
    authenticate(&server).await;
    let store = Etcd::new(config(&server, Some("right"))).unwrap();
    let mut watch = store.watch("", None);
    assert!(matches!(next(&mut watch).await, Event::Snapshot(_)));
    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    commit(&store, Transaction::new().absent("a").put_leased("a", "1", lease)).await;
    assert!(matches!(next(&mut watch).await, Event::Changes(..)));
    store.keep_alive(lease).await.unwrap();
    assert_eq!(store.list("").await.unwrap().entries.len(), 1);
    store.revoke(lease).await.unwrap();
    assert_eq!(value(&store, "a").await, None);
}

async fn is_denied(config: EtcdConfig) {
    let name = config.endpoints[0].clone();
    let store = Etcd::new(config).unwrap();
    let errors = [
        store.get("a").await.unwrap_err(),
        store.list("").await.unwrap_err(),
        store.commit(Transaction::new().put("a", "1")).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, StoreError::Denied { .. }), "{error}");
        assert!(error.to_string().contains(&name), "{error}");
    }
    assert!(matches!(next(&mut store.watch("", None)).await, Event::Lost(_)));
}

async fn a_wrong_password_is_denied() {
    let server = Server::start().await;
    authenticate(&server).await;
    is_denied(config(&server, Some("wrong"))).await;
}

async fn a_missing_password_is_denied() {
    let server = Server::start().await;
    authenticate(&server).await;
    is_denied(config(&server, None)).await;
}

async fn a_prefix_that_the_user_may_not_use_is_denied() {
    let server = Server::start().await;
    authenticate(&server).await;
    is_denied(EtcdConfig { prefix: "other".to_owned(), ..config(&server, Some("right")) }).await;
}

async fn a_token_that_has_ended_is_renewed() {
    let mut server = Server::start().await;
    authenticate(&server).await;
    let store = Etcd::new(config(&server, Some("right"))).unwrap();
    for i in 0..3 {
        commit(&store, Transaction::new().put("a", format!("{i}"))).await;
        // etcd keeps its tokens in memory.
        server.restart().await;
    }
    assert_eq!(value(&store, "a").await.as_deref(), Some("2"));
}

async fn a_watch_goes_on_after_its_token_has_ended() {
    let mut server = Server::start().await;
    authenticate(&server).await;
    let store = Etcd::new(config(&server, Some("right"))).unwrap();
    commit(&store, Transaction::new().put("a", "1")).await;
    let mut watch = store.watch("", None);
    assert!(matches!(next(&mut watch).await, Event::Snapshot(_)));
    server.restart().await;
    assert!(matches!(next(&mut watch).await, Event::Lost(_)));
    let last = commit(&store, Transaction::new().put("a", "2")).await;
    loop {
        match next(&mut watch).await {
            Event::Changes(revision, _) if revision == last => return,
            Event::Changes(_, changes) => assert!(changes.is_empty()),
            other => panic!("{other:?}"),
        }
    }
}

async fn authentication_that_is_enabled_while_the_store_is_used_is_followed() {
    let server = Server::start().await;
    authenticate(&server).await;
    let store = Etcd::new(config(&server, Some("right"))).unwrap();
    commit(&store, Transaction::new().put("a", "1")).await;
    let options = etcd_client::ConnectOptions::new().with_user("root", "root's");
    let mut root = etcd_client::Client::connect([server.url()], Some(options)).await.unwrap();
    // Every change of the users makes the tokens of before invalid.
    for i in 0..3 {
        root.user_add(format!("user{i}"), "x", None).await.unwrap();
        commit(&store, Transaction::new().put("a", format!("{i}"))).await;
    }
    root.user_change_password("netctl", "changed").await.unwrap();
    eventually("the old password is denied", async || {
        matches!(store.get("a").await, Err(StoreError::Denied { .. })).then_some(())
    })
    .await;
    root.user_change_password("netctl", "right").await.unwrap();
    commit(&store, Transaction::new().put("a", "3")).await;
}
