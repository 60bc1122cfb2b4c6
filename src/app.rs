//! The agent: where everything is wired.
//!
//! Data flows one way. The store's watches become the view's snapshots; the dataplane turns them
//! into kernel state. Requests of the API are transactions on the store first, then the dataplane
//! does for this node at once what the watch would tell it a moment later.

mod access;
mod acknowledge;
mod agent;
mod check;
mod counted;
mod dataplane;
mod dns;
mod drain;
mod engine;
mod errors;
mod front;
mod gate;
mod handover;
mod health;
mod identity;
mod join;
mod metrics;
mod monitor;
mod networks;
mod place;
mod pressure;
mod record;
mod services;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::api::VersionView;
use crate::api::server::{self, BindError};
use crate::cluster::{Cluster, Defaults, Health, View};
use crate::config::duration::Shown;
use crate::config::{Config, LogFormat};
use crate::kernel;
use crate::model::{Endpoint, Engine, NetworkId, Node};
use crate::store::{Backoff, Store};

use agent::Agent;
use counted::Counted;
use dataplane::{Dataplane, Settings, Tally};
use dns::{InKernel, NameServer};
use front::Front;
use handover::Handover;
use identity::Identity;
use metrics::{Metrics, Networks, Services};
use place::Places;
use pressure::Pressure;
use record::Record;

/// How many times a lease an address must rest so that no live node holds state for it afterwards:
/// [`stay_alive`] renews a lease at most one lease after the dataplane had last caught up, and it
/// lives on for one more; the third is for what a watch and a request may be late.
const LEASES_OF_REST: u32 = 3;
/// How many endpoints whose container is gone are released at once.
const RELEASES_AT_A_TIME: usize = 16;

/// Removes every kernel object of ours from this node, on which no agent may answer at this socket: it
/// would make them again.
///
/// # Errors
/// That one answers; everything that could not be removed.
pub fn cleanup(socket: &Path) -> anyhow::Result<()> {
    if let Err(live @ BindError::Live { .. }) = server::check_free(socket) {
        return Err(live.into());
    }
    let errors = kernel::cleanup(&mut kernel::Host::open()?);
    if errors.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = errors.iter().map(|error| format!("  {error}")).collect();
    anyhow::bail!("not everything was removed:\n{}", lines.join("\n"))
}

/// Runs the agent until it is told to stop; the data path stays as it is then.
///
/// # Errors
/// What keeps it from starting.
pub fn run(config: &Config) -> anyhow::Result<()> {
    start_log(config)?;
    let (handover, messages) = Handover::inherit();
    kernel::probe()?;
    let mut identity = Identity::load(&config.state_dir)?;
    let node = join::describe(config, &identity)?;
    info!(node = %node.name, underlay = %node.underlay, mtu = node.mtu, lb = %node.lb, version = node.version, "netctld starts");
    warn_of_rest(config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.spawn(handover::tell(messages));
    runtime.block_on(serve(config, &mut identity, node, Arc::new(handover)))
}

fn start_log(config: &Config) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log)?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

async fn serve(
    config: &Config,
    identity: &mut Identity,
    node: Node,
    handover: Arc<Handover>,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let store = Counted::new(join::open_store(config)?);
    let metrics = Arc::new(Metrics::new(&node.version));
    metrics.change(|registry| store.register(registry));
    let store: Arc<dyn Store> = Arc::new(store);
    let version = VersionView {
        version: node.version.clone(),
        api: "v1".to_owned(),
        node: node.name.clone(),
        store: store.name(),
        kernel: kernel_release(),
    };
    let front = Arc::new(Front::new(version, metrics.clone()));
    let (stop, stopped) = watch::channel(false);
    let servers = start_servers(config, &front, &stopped).await?;

    let running = async {
        let (cluster, networks) = join::join(&store, config, identity, &node, &front).await?;
        let names = Arc::new(NameServer::new(config.dns.clone(), handover));
        start_agent(config, &node, Arc::new(cluster), networks, (&front, &metrics, names)).await
    };
    let agent = tokio::select! {
        agent = running => Some(agent?),
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
    };
    let outcome = match agent {
        Some((agent, thread)) => {
            let mut thread = tokio::task::spawn_blocking(move || thread.join());
            info!(node = %node.name, "ready");
            tell(&[NotifyState::Ready, NotifyState::Status("ready")]);
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                // Without it nothing works: whoever started the agent is to start it again.
                _ = &mut thread => anyhow::bail!("the dataplane's thread has died"),
            }
            tell(&[NotifyState::Stopping]);
            info!("stopping: the data path stays as it is");
            agent.watchers.stop().await;
            agent.names.stop().await;
            agent.dataplane.stop();
            match thread.await {
                Ok(Ok(())) => Ok(()),
                _ => Err(anyhow::anyhow!("the dataplane's thread did not end in order")),
            }
        }
        None => {
            tell(&[NotifyState::Stopping]);
            Ok(())
        }
    };
    // Whoever waits for an answer has it by now, or gets it within the server's grace.
    let _ = stop.send(true);
    for server in servers {
        server.await.context("a task of the API did not end in order")?;
    }
    outcome
}

/// Opens the API's socket, and the port of the metrics where one is configured.
async fn start_servers(
    config: &Config,
    front: &Arc<Front>,
    stopped: &watch::Receiver<bool>,
) -> anyhow::Result<Vec<JoinHandle<()>>> {
    let group = config.socket_group.as_ref().map(|group| group.gid);
    let listener = server::bind(&config.socket, group)?;
    let until = stopped_when(stopped.clone());
    let mut servers = vec![tokio::spawn(server::serve(listener, front.clone(), until))];
    if let Some(address) = config.metrics {
        let listener = TcpListener::bind(address).await;
        let listener = listener.with_context(|| {
            format!("cannot serve the metrics at {address} (give another with --metrics)")
        })?;
        let until = stopped_when(stopped.clone());
        servers.push(tokio::spawn(server::serve_metrics(listener, front.clone(), until)));
        info!(%address, "metrics are served");
    }
    Ok(servers)
}

/// Completes when the agent is to stop.
async fn stopped_when(mut stopped: watch::Receiver<bool>) {
    // A sender that is gone means the same.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Tells systemd; that nobody listens is no failure.
fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "systemd not told");
    }
}

fn settings(config: &Config, node: &Node, boot: String, names: &NameServer, tally: Tally) -> Settings {
    Settings {
        boot,
        lease: config.lease,
        connections: config.lb.connections,
        fast: config.lb.fast_path,
        cgroup: node.socket_lb.clone(),
        names: names.service(),
        resync: config.resync,
        tally,
    }
}

async fn start_agent(
    config: &Config,
    node: &Node,
    cluster: Arc<Cluster>,
    networks: Vec<NetworkId>,
    (front, metrics, names): (&Arc<Front>, &Metrics, Arc<NameServer>),
) -> anyhow::Result<(Arc<Agent>, std::thread::JoinHandle<()>)> {
    let view = View::start(cluster.clone(), node.name.clone(), networks);
    let (gone, gone_endpoints) = mpsc::unbounded_channel();
    let boot = kernel::boot_id()?;
    let tally = Tally::default();
    metrics.change(|registry| tally.register(registry));
    let loads = tally.loads.clone();
    let settings = settings(config, node, boot.clone(), &names, tally.clone());
    let (dataplane, thread) = Dataplane::start(node.clone(), settings, view.subscribe(), gone)?;
    let dataplane = Arc::new(dataplane);
    let record = Arc::new(Record::new(cluster.clone(), node.clone()));
    let agent = Arc::new(Agent {
        me: node.clone(),
        cluster: cluster.clone(),
        view: view.clone(),
        record: record.clone(),
        dataplane: dataplane.clone(),
        defaults: defaults(config),
        boot,
        names,
        access: access::Access::new(&config.store),
        pressure: Pressure::new(pressure::Levels {
            warning: config.address_warning,
            alarm: config.address_alarm,
        }),
        places: Places::new(),
        watchers: monitor::Watchers::default(),
    });

    metrics.follow(view.clone());
    metrics.bring(Networks(agent.clone()));
    metrics.bring(Services(agent.clone(), loads));
    tokio::spawn(forward_view(view.clone(), dataplane.clone()));
    tokio::spawn(stay_alive(
        cluster.clone(),
        view.clone(),
        dataplane.clone(),
        record.clone(),
        config.lease,
    ));
    tokio::spawn(acknowledge::watch(view.clone(), cluster, dataplane.clone()));
    tokio::spawn(record::keep_true(record));
    tokio::spawn(release_gone(agent.clone(), gone_endpoints));
    tokio::spawn(pressure::watch(agent.clone()));
    let checks = health::Tally::default();
    metrics.change(|registry| checks.register(registry));
    tokio::spawn(health::follow(agent.clone(), config.health_user.clone(), checks));
    tokio::spawn(check::answer(agent.clone()));
    let in_kernel = match node.lb {
        Engine::Ebpf => Some(InKernel::open(config, tally)?),
        Engine::Ipvs | Engine::None | Engine::Missing => None,
    };
    tokio::spawn(dns::serve(agent.clone(), in_kernel));
    tokio::spawn(access::follow(agent.clone(), config.resync));

    let mut known = view.subscribe();
    let current = known.wait_for(|published| published.health == Health::Current).await;
    current.context("the view has ended")?;
    front.open(agent.clone());
    Ok((agent, thread))
}

/// Freed addresses are to rest until no node that counts as alive knows their last holder.
fn warn_of_rest(config: &Config) {
    if config.rest < config.lease * LEASES_OF_REST {
        warn!(
            "freed addresses rest shorter than {LEASES_OF_REST} times a node's lease: another node may still hold routes to them when they are given out again"
        );
    }
}

/// What a network gets that asks for nothing.
fn defaults(config: &Config) -> Defaults {
    Defaults {
        pools: config.pools.clone(),
        pool_prefix: config.pool_prefix,
        pools6: config.pools6.clone(),
        pool6_prefix: config.pool6_prefix,
        vnis: (config.vni_first, config.vni_last),
    }
}

/// Wakes the dataplane whenever the view has changed.
async fn forward_view(view: View, dataplane: Arc<Dataplane>) {
    let mut published = view.subscribe();
    while published.changed().await.is_ok() {
        published.mark_unchanged();
        dataplane.sync();
    }
}

/// Holds the node's lease, as long as its view follows the store and its kernel state the view: who is
/// alive has seen what others removed.
async fn stay_alive(
    cluster: Arc<Cluster>,
    view: View,
    dataplane: Arc<Dataplane>,
    record: Arc<Record>,
    ttl: Duration,
) {
    let mut lease = None;
    let (mut alive, mut backoff) = (true, Backoff::default());
    let mut known = view.subscribe();
    loop {
        let follows = async {
            // What is lost comes back by itself.
            let _ = known.wait_for(|published| published.health == Health::Current).await;
            dataplane.settle().await
        };
        let held = match tokio::time::timeout(ttl, follows).await {
            Ok(Ok(())) => match lease {
                Some(lease) => cluster.stay_alive(lease, &record.node(), ttl).await,
                None => cluster.come_alive(record.node().id, ttl).await,
            }
            .map_err(anyhow::Error::from),
            Ok(Err(stopped)) => Err(stopped.into()),
            Err(_) => {
                let late = Shown(ttl);
                Err(anyhow::anyhow!("view or kernel did not follow the store within {late}"))
            }
        };
        let pause = match held {
            Ok(held) => {
                lease = Some(held);
                alive = true;
                backoff.reset();
                ttl / 3
            }
            Err(error) => {
                if alive {
                    warn!(%error, "lease not renewed: other nodes will take this one for dead");
                }
                alive = false;
                backoff.pause()
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Releases endpoints whose container does not exist any more, several at a time.
async fn release_gone(agent: Arc<Agent>, mut gone: mpsc::UnboundedReceiver<Arc<Endpoint>>) {
    let places = Arc::new(Semaphore::new(RELEASES_AT_A_TIME));
    while let Some(endpoint) = gone.recv().await {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let agent = agent.clone();
        tokio::spawn(async move {
            if let Err(error) = agent.release(&endpoint).await {
                // The dataplane reports it again when it looks again.
                warn!(endpoint = %endpoint.id, %error, "endpoint of a vanished container not released yet");
            }
            drop(place);
        });
    }
}

fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map_or_else(|_| "unknown".to_owned(), |uname| uname.release().to_string_lossy().into_owned())
}
