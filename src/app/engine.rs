//! Which engine balances the connections of services on this node.

use std::path::PathBuf;

use anyhow::Context as _;
use tracing::warn;

use crate::api::{ApiError, ErrorCode};
use crate::config::{EngineChoice, LbConfig};
use crate::kernel;
use crate::kernel::ebpf::Ebpf;
use crate::kernel::ipvs::{self, Ipvs};
use crate::model::{EndpointMode, Engine, Scheduler};

/// What to do where the kernel has no IPVS.
const HINT: &str = "load its module (modprobe ip_vs; where that does not find it, install the \
                    modules of the running kernel), and restart netctld";

/// What to do where the kernel takes no programs.
const HINT_EBPF: &str = "it needs Linux 6.1 or newer with eBPF for traffic control, and the file system \
                         /sys/fs/bpf; give lb = \"ipvs\"";

/// An engine, and why it is that one.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) engine: Engine,
    pub(super) reason: String,
}

/// Chooses the engine. It asks the kernel, which loads the module where it can, and changes nothing.
///
/// # Errors
/// When one is asked for by its name and cannot be used.
pub(super) fn choose(choice: EngineChoice, connections: u32) -> anyhow::Result<Chosen> {
    let try_ebpf = || Ebpf::open(connections).and_then(|ebpf| ebpf.load(0));
    let asked = |engine| Ok(Chosen { engine, reason: "it is asked for".to_owned() });
    match choice {
        EngineChoice::None => asked(Engine::None),
        EngineChoice::Ipvs => {
            Ipvs::open().with_context(|| format!("lb is ipvs, but it cannot be used: {HINT}"))?;
            asked(Engine::Ipvs)
        }
        EngineChoice::Ebpf => {
            try_ebpf().with_context(|| format!("lb is ebpf, but it cannot be used: {HINT_EBPF}"))?;
            asked(Engine::Ebpf)
        }
        EngineChoice::Auto => {
            let ebpf = try_ebpf().map(drop);
            // Opening it loads the module: not where that is not needed.
            let ipvs = || Ipvs::open().map(drop);
            Ok(prefer(ebpf, ipvs)?)
        }
    }
}

/// The faster engine of those that can be used: eBPF.
fn prefer(
    ebpf: Result<(), kernel::ebpf::Error>,
    ipvs: impl FnOnce() -> Result<(), ipvs::Error>,
) -> Result<Chosen, ipvs::Error> {
    let Err(no_ebpf) = ebpf else {
        let reason = "the faster one, and this kernel takes its programs".to_owned();
        return Ok(Chosen { engine: Engine::Ebpf, reason });
    };
    match ipvs() {
        Ok(()) => {
            let reason = format!("ebpf cannot be used here: {no_ebpf}");
            Ok(Chosen { engine: Engine::Ipvs, reason })
        }
        Err(ipvs::Error::NoIpvs) => {
            let reason = format!("this kernel has no IPVS, and ebpf cannot be used: {no_ebpf}");
            warn!("services cannot be balanced on this node: {reason}; {HINT}");
            Ok(Chosen { engine: Engine::Missing, reason })
        }
        Err(error) => Err(error),
    }
}

/// The control group whose sockets are asked; `None`: none are.
///
/// # Errors
/// When that is wanted, and the system has no control groups of version 2.
pub(super) fn asked_group(config: &LbConfig, engine: Engine) -> anyhow::Result<Option<PathBuf>> {
    if !config.sockets {
        return Ok(None);
    }
    if engine != Engine::Ebpf {
        warn!(%engine, "sockets are not asked for services, as socket_lb says: only ebpf does");
        return Ok(None);
    }
    let found = match &config.cgroup {
        Some(cgroup) => Some(cgroup.clone()),
        None => kernel::ebpf::control_groups().context("what is mounted cannot be read")?,
    };
    let missing = "socket_lb needs control groups of version 2, and no cgroup2 is mounted: mount it (mount -t \
                   cgroup2 none /sys/fs/cgroup), or give socket_lb = false";
    found.map(Some).context(missing)
}

/// Whether a service that is reached in this way can be made on a node with this engine.
///
/// # Errors
/// Says what is missing, and what to do.
pub(super) fn check(engine: Engine, mode: EndpointMode) -> Result<(), ApiError> {
    match (engine, mode) {
        (Engine::Missing, EndpointMode::Vip) => {
            let text = format!(
                "the kernel of this node takes no eBPF programs and has no IPVS (module ip_vs): one of \
                 them balances a service with an address of its own (`netctl node inspect` has the \
                 reason); {HINT}, or give --endpoint-mode dnsrr"
            );
            Err(ApiError::new(ErrorCode::Unsupported, text))
        }
        (Engine::Ipvs | Engine::Ebpf | Engine::None, _) | (Engine::Missing, EndpointMode::Dnsrr) => {
            Ok(())
        }
    }
}

/// Whether this node's kernel has a scheduler. Others may lack it still: their agents log that.
///
/// # Errors
/// Names the module that is missing, and what to do.
pub(super) async fn check_scheduler(engine: Engine, scheduler: Scheduler) -> Result<(), ApiError> {
    if engine != Engine::Ipvs {
        return Ok(());
    }
    let tried = tokio::task::spawn_blocking(move || kernel::has_scheduler(scheduler.as_str())).await;
    let tried = tried.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
    if tried? { Ok(()) } else { Err(no_scheduler(scheduler)) }
}

fn no_scheduler(scheduler: Scheduler) -> ApiError {
    let text = format!(
        "the kernel of this node does not have the scheduler {scheduler} (module ip_vs_{scheduler}): \
         load its module (modprobe ip_vs_{scheduler}; where that does not find it, install the modules \
         of the running kernel), or choose another scheduler"
    );
    ApiError::new(ErrorCode::Unsupported, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> kernel::ebpf::Error {
        kernel::ebpf::Error::Missing { program: "netctl_from" }
    }

    #[test]
    fn the_faster_engine_that_can_be_used_is_taken_with_a_reason() {
        let chosen = prefer(Ok(()), || panic!("its module is not needed")).unwrap();
        assert_eq!(chosen.engine, Engine::Ebpf);
        let chosen = prefer(Err(refused()), || Ok(())).unwrap();
        assert_eq!(chosen.engine, Engine::Ipvs);
        assert!(chosen.reason.contains("netctl_from"), "{}", chosen.reason);
        let chosen = prefer(Err(refused()), || Err(ipvs::Error::NoIpvs)).unwrap();
        assert_eq!(chosen.engine, Engine::Missing);
        assert!(["IPVS", "netctl_from"].iter().all(|word| chosen.reason.contains(word)));
    }

    #[test]
    fn only_a_service_that_needs_what_is_missing_is_refused() {
        for engine in [Engine::Ipvs, Engine::Ebpf, Engine::None, Engine::Missing] {
            assert!(check(engine, EndpointMode::Dnsrr).is_ok());
            assert_eq!(check(engine, EndpointMode::Vip).is_err(), engine == Engine::Missing);
        }
        let refused = check(Engine::Missing, EndpointMode::Vip).unwrap_err();
        assert_eq!(refused.code, ErrorCode::Unsupported);
        for word in ["ip_vs", "modprobe", "--endpoint-mode dnsrr"] {
            assert!(refused.to_string().contains(word), "{word}: {refused}");
        }
    }
}
