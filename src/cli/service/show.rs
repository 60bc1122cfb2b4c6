//! Services as they are shown.

use std::process::ExitCode;
use std::time::Duration;

use crate::api::{BackendView, Connections, ExternalView, ServiceView, TimeoutsView};
use crate::cli::Session;
use crate::cli::failure::{Exit, Failure, Tally};
use crate::cli::output::{self, Details, Format};
use crate::config::duration::Shown;
use crate::model::{EndpointMode, HealthCheck, UpdateOrder};

/// Does `netctl service ls`.
pub(super) async fn ls(session: &Session, quiet: bool) -> Result<ExitCode, Failure> {
    let views = session.client.services().await?;
    if quiet {
        for view in &views {
            output::print_line(view.service.name.as_str())?;
        }
    } else if session.format == Format::Json {
        output::print_json(&views)?;
    } else {
        let row = |view: ServiceView| {
            vec![
                view.service.id.to_string(),
                view.service.name.to_string(),
                mode(&view).to_owned(),
                format!("{}/{}", view.ready, view.service.replicas),
                view.network_names.join(","),
                output::joined(ports(&view)),
                output::joined(view.service.addresses.values().flatten()),
                output::joined(&view.service.external),
            ]
        };
        let header = ["ID", "NAME", "MODE", "REPLICAS", "NETWORKS", "PORTS", "ADDRESSES", "EXTERNAL"];
        output::print_table(&header, views.into_iter().map(row))?;
    }
    Ok(Exit::Done.into())
}

/// Does `netctl service inspect`.
pub(super) async fn inspect(session: &Session, services: &[String]) -> Result<ExitCode, Failure> {
    let (mut tally, mut views) = (Tally::new(), Vec::new());
    for name in services {
        views.extend(tally.take(session.client.service(name).await));
    }
    output::print_all(session.format, &views, details)?;
    Ok(tally.exit())
}

fn mode(view: &ServiceView) -> &'static str {
    match view.service.endpoint_mode {
        EndpointMode::Vip => "vip",
        EndpointMode::Dnsrr => "dnsrr",
    }
}

fn ports(view: &ServiceView) -> Vec<String> {
    let ports = &view.service.balancing.ports;
    match view.service.endpoint_mode {
        EndpointMode::Dnsrr => vec!["-".to_owned()],
        EndpointMode::Vip if ports.is_empty() => vec!["all".to_owned()],
        EndpointMode::Vip => ports.iter().map(ToString::to_string).collect(),
    }
}

fn seconds(seconds: u32) -> Shown {
    Shown(Duration::from_secs(seconds.into()))
}

fn details(view: &ServiceView) -> Details {
    let service = &view.service;
    let order = match service.update_order {
        UpdateOrder::StopFirst => "stop-first",
        UpdateOrder::StartFirst => "start-first",
    };
    let details = Details::default()
        .with("ID", service.id)
        .with("Name", &service.name)
        .with("Endpoint mode", mode(view))
        .with("Replicas", format!("{}, {} ready", service.replicas, view.ready))
        .with("Update", format!("{order}, {} at a time", service.update_parallelism))
        .with_all("Networks", &view.network_names)
        .with_all("Addresses", service.addresses.values().flatten());
    let details = match service.endpoint_mode {
        EndpointMode::Vip => balancing(view, details),
        EndpointMode::Dnsrr => details,
    };
    details
        .with("Health check", service.health.as_ref().map_or_else(|| "none".to_owned(), health))
        .with_all("Backends", view.backends.iter().map(backend))
        .with_all("External", view.external_backends.iter().map(external))
        .with_all("Labels", output::labels(&service.labels))
}

fn balancing(view: &ServiceView, details: Details) -> Details {
    let balancing = &view.service.balancing;
    let none = || "none".to_owned();
    let asked = balancing.timeouts;
    let asked = [("tcp", asked.tcp), ("tcp-fin", asked.tcp_fin), ("udp", asked.udp)];
    let asked = asked.iter().filter_map(|(key, time)| Some(format!("{key} {}", seconds((*time)?))));
    details
        .with_all("Ports", ports(view))
        .with("Scheduler", balancing.scheduler)
        .with("Affinity", balancing.affinity.map_or_else(none, |time| seconds(time).to_string()))
        .with("Preferred", balancing.prefer.as_ref().map_or_else(none, ToString::to_string))
        .with_all("Timeouts", asked)
        .with_all("In effect", view.timeouts_in_effect.iter().map(timeouts))
}

fn timeouts(view: &TimeoutsView) -> String {
    let TimeoutsView { network_name, tcp, tcp_fin, udp } = view;
    let (tcp, tcp_fin, udp) = (seconds(*tcp), seconds(*tcp_fin), seconds(*udp));
    format!("{network_name}: tcp {tcp}, tcp-fin {tcp_fin}, udp {udp}")
}

fn health(check: &HealthCheck) -> String {
    format!(
        "{}, every {}, fails after {}, start period {}, {} retries",
        check.test,
        seconds(check.interval),
        seconds(check.timeout),
        seconds(check.start_period),
        check.retries
    )
}

fn backend(view: &BackendView) -> String {
    let BackendView { name, network_name, node, state, weight, .. } = view;
    let addresses = output::joined(&view.addresses);
    let own = output::state(*state, &view.reason);
    let why = match &view.out {
        None => own,
        Some(why) if *why == own => format!("out ({why})"),
        Some(why) => format!("out ({why}; {own})"),
    };
    let open = connections(view.connections);
    format!("{name} on {node}, {network_name} {addresses}: {why}, weight {weight}{open}")
}

fn external(view: &ExternalView) -> String {
    let ExternalView { external, network_name, weight, .. } = view;
    let why = view.out.as_ref().map_or_else(|| "not checked".to_owned(), |why| format!("out ({why})"));
    let open = connections(view.connections);
    format!("{external} from {network_name}: {why}, weight {weight}{open}")
}

fn connections(open: Option<Connections>) -> String {
    open.map_or_else(String::new, |open| {
        format!(", {} active and {} inactive connections from here", open.active, open.inactive)
    })
}
