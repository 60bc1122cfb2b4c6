//! Which engine balances the connections of services on this node.

use anyhow::Context as _;
use tracing::warn;

use crate::api::{ApiError, ErrorCode};
use crate::config::EngineChoice;
use crate::kernel;
use crate::kernel::ebpf::Ebpf;
use crate::kernel::ipvs::{self, Ipvs};
use crate::model::{EndpointMode, Engine, Scheduler};

/// What to do where the kernel has no IPVS.
const HINT: &str = "load its module (modprobe ip_vs; where that does not find it, install the \
                    modules of the running kernel) or give lb = \"ebpf\", and restart netctld";

/// What to do where the kernel takes no programs.
const HINT_EBPF: &str = "it needs Linux 6.6 or newer with eBPF for traffic control; give lb = \"ipvs\"";

/// Chooses the engine. It asks the kernel, which loads the module where it can, and changes nothing.
///
/// # Errors
/// When one is asked for by its name and cannot be used.
pub(super) fn choose(choice: EngineChoice, connections: u32) -> anyhow::Result<Engine> {
    match choice {
        EngineChoice::None => Ok(Engine::None),
        EngineChoice::Ipvs => {
            Ipvs::open().with_context(|| format!("lb is ipvs, but it cannot be used: {HINT}"))?;
            Ok(Engine::Ipvs)
        }
        EngineChoice::Ebpf => {
            let tried = Ebpf::open(connections).and_then(|ebpf| ebpf.load(0));
            tried.with_context(|| format!("lb is ebpf, but it cannot be used: {HINT_EBPF}"))?;
            Ok(Engine::Ebpf)
        }
        EngineChoice::Auto => match Ipvs::open() {
            Ok(_) => Ok(Engine::Ipvs),
            Err(ipvs::Error::NoIpvs) => {
                warn!("this kernel has no IPVS: services cannot be balanced on this node; {HINT}");
                Ok(Engine::Missing)
            }
            Err(error) => Err(error.into()),
        },
    }
}

/// Whether a service that is reached in this way can be made on a node with this engine.
///
/// # Errors
/// Says what is missing, and what to do.
pub(super) fn check(engine: Engine, mode: EndpointMode) -> Result<(), ApiError> {
    match (engine, mode) {
        (Engine::Missing, EndpointMode::Vip) => {
            let text = format!(
                "the kernel of this node has no IPVS (module ip_vs), which balances a service with an \
                 address of its own: {HINT}, or give --endpoint-mode dnsrr"
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
