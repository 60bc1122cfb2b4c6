//! Connections to etcd: which endpoint answers, with TLS and authentication.

use std::path::Path;
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, GetOptions, Identity, TlsOptions};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

use super::EtcdConfig;
use super::fault::Fault;
use crate::store::StoreError;

/// How long an endpoint is waited for before the next one is tried beside it.
const STAGGER: Duration = Duration::from_millis(150);

/// HTTP/2 pings while something is under way. etcd takes more than one in five seconds for abuse.
const PING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3));

/// With TLS 1.3, a server refuses a client's certificate after the client has finished: it says
/// why and closes, and which of the two is seen first is chance. So a connection that is closed
/// at once is tried again, and closed so often it means the same.
const REFUSALS: usize = 5;
const REFUSAL_PAUSE: Duration = Duration::from_millis(10);

/// The way to etcd: one connection that calls share, made when it is needed.
pub(super) struct Link {
    config: EtcdConfig,
    current: Mutex<Current>,
}

#[derive(Default)]
struct Current {
    client: Option<Client>,
    /// Counts the connections, so that nobody forgets one that is newer than the one that failed.
    generation: u64,
    /// Which endpoint is tried first.
    preferred: usize,
}

/// The shared connection, as one call sees it.
pub(super) struct Connection {
    pub(super) client: Client,
    generation: u64,
    /// Whether it was made for this call, so that who we are was checked just now.
    pub(super) fresh: bool,
}

impl Link {
    /// Checks what can be checked without a connection.
    pub(super) fn new(config: EtcdConfig) -> Result<Self, StoreError> {
        options(&config).map_err(|reason| StoreError::Failed { store: config.name(), reason })?;
        Ok(Self { config, current: Mutex::default() })
    }

    pub(super) fn config(&self) -> &EtcdConfig {
        &self.config
    }

    /// The shared connection; one caller makes it, the others wait, each until its deadline.
    pub(super) async fn connection(&self, deadline: Instant) -> Result<Connection, Fault> {
        let locked = timeout_at(deadline, self.current.lock()).await;
        let mut current = locked.map_err(|_| self.late())?;
        let generation = current.generation;
        if let Some(client) = current.client.clone() {
            return Ok(Connection { client, generation, fresh: false });
        }
        let (client, endpoint) = self.dial(current.preferred, deadline).await?;
        let generation = generation + 1;
        *current = Current { client: Some(client.clone()), generation, preferred: endpoint };
        Ok(Connection { client, generation, fresh: true })
    }

    /// Gives up a connection that failed; the next call makes a new one.
    pub(super) async fn forget(&self, connection: &Connection) {
        let mut current = self.current.lock().await;
        if current.generation == connection.generation {
            current.client = None;
        }
    }

    /// Makes a connection of one's own.
    pub(super) async fn separate(&self, deadline: Instant) -> Result<Client, Fault> {
        let preferred = match self.current.try_lock() {
            Ok(current) => current.preferred,
            Err(_) => 0,
        };
        Ok(self.dial(preferred, deadline).await?.0)
    }

    /// Tries the endpoints, each a little after the one before it, and takes the first that
    /// answers a read.
    async fn dial(&self, preferred: usize, deadline: Instant) -> Result<(Client, usize), Fault> {
        let count = self.config.endpoints.len();
        let mut waiting = (0..count).map(|i| (preferred + i) % count);
        let (mut running, mut faults) = (JoinSet::new(), Vec::new());
        loop {
            let started = waiting.next();
            if let Some(index) = started {
                let config = self.config.clone();
                running.spawn(async move { open(&config, index).await.map(|client| (client, index)) });
            }
            let stagger = async {
                match started {
                    Some(_) => sleep(STAGGER).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ended = running.join_next() => match ended {
                    Some(Ok(Ok(found))) => return Ok(found),
                    Some(Ok(Err(fault))) => faults.push(fault),
                    Some(Err(panic)) => faults.push(Fault::Failed(panic.to_string())),
                    None => return Err(worst(faults)),
                },
                () = stagger => {}
                () = tokio::time::sleep_until(deadline) => {
                    faults.push(self.late());
                    return Err(worst(faults));
                }
            }
        }
    }

    pub(super) fn late(&self) -> Fault {
        Fault::Unreachable(format!("no answer within {:?}", self.config.timeout))
    }
}

/// The fault that says most about what to do.
fn worst(faults: Vec<Fault>) -> Fault {
    let wrong = |fault: &&Fault| matches!(fault, Fault::Denied(_) | Fault::Failed(_));
    if let Some(fault) = faults.iter().find(wrong) {
        return fault.clone();
    }
    let mut reasons: Vec<_> = faults.iter().map(Fault::reason).collect();
    reasons.dedup();
    Fault::Unsent(reasons.join("; "))
}

/// Connects to one endpoint, and reads, so that it is known to answer (and to have a quorum).
async fn open(config: &EtcdConfig, index: usize) -> Result<Client, Fault> {
    let endpoint = config.endpoints.get(index).map(String::as_str).unwrap_or_default();
    let options = options(config).map_err(Fault::Failed)?;
    let mut attempts = 0;
    loop {
        attempts += 1;
        match probe(config, endpoint, options.clone()).await {
            Err(Fault::Unreachable(reason)) if config.ca.is_some() => {
                if attempts == REFUSALS {
                    let reason = format!("TLS: etcd closes the connection at once ({reason})");
                    return Err(Fault::Denied(reason));
                }
            }
            result => return result,
        }
        sleep(REFUSAL_PAUSE).await;
    }
}

async fn probe(config: &EtcdConfig, endpoint: &str, options: ConnectOptions) -> Result<Client, Fault> {
    let client = Client::connect([endpoint], Some(options)).await?;
    let options = GetOptions::new().with_keys_only();
    client.kv_client().get(config.probe_key(), Some(options)).await?;
    Ok(client)
}

fn options(config: &EtcdConfig) -> Result<ConnectOptions, String> {
    let mut options = ConnectOptions::new()
        .with_require_leader(true)
        .with_auto_token_refresh(true)
        .with_keep_alive(PING.0, PING.1)
        .with_keep_alive_while_idle(false)
        .with_connect_timeout(config.timeout);
    match (&config.user, &config.password) {
        (Some(user), Some(password)) => options = options.with_user(user, password),
        (None, None) => {}
        (Some(_), None) => return Err("a user is given without a password".to_owned()),
        (None, Some(_)) => return Err("a password is given without a user".to_owned()),
    }
    if let Some(tls) = tls(config)? {
        options = options.with_tls(tls);
    }
    Ok(options)
}

/// Reads the certificates. They are read for each connection, so renewed ones need no restart.
fn tls(config: &EtcdConfig) -> Result<Option<TlsOptions>, String> {
    if config.endpoints.is_empty() {
        return Err("no endpoint is given".to_owned());
    }
    let secure = |endpoint: &&String| endpoint.starts_with("https://");
    let plain = |endpoint: &&String| !secure(endpoint);
    let Some(ca) = &config.ca else {
        return match config.endpoints.iter().find(secure) {
            Some(endpoint) => Err(format!("{endpoint} needs the certificate of its authority (ca)")),
            None if config.certificate.is_some() || config.key.is_some() => {
                Err("a client certificate is given without a ca".to_owned())
            }
            None => Ok(None),
        };
    };
    if let Some(endpoint) = config.endpoints.iter().find(plain) {
        return Err(format!("{endpoint} is not https, but a ca is given"));
    }
    let tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read(ca)?));
    match (&config.certificate, &config.key) {
        (Some(certificate), Some(key)) => {
            let identity = Identity::from_pem(read(certificate)?, read(key)?);
            Ok(Some(tls.identity(identity)))
        }
        (None, None) => Ok(Some(tls)),
        (Some(path), None) => Err(format!("{} is given without its key", path.display())),
        (None, Some(path)) => Err(format!("{} is given without its certificate", path.display())),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}
