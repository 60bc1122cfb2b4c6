//! What the kernel does not take, and what is said of it.

use netctl::kernel::ipvs::{
    Change, Destination, Error, Flags, Forwarding, Problem, Reason, Scheduler, Service, Timeouts,
    Tunnel, TunnelKind,
};

use crate::world::{
    REAL, VIRTUAL, apply, at, masqueraded, open, read, refused, restore, round_robin, saved, tcp,
};

pub fn a_missing_module_is_told() {
    let mut ipvs = open();
    let key = tcp(VIRTUAL, 80);
    let service = Service::new(key, Scheduler::from("nosuch"));
    let (reason, text) = refused(&mut ipvs, Change::AddService(service.clone()));
    assert_eq!(reason, Reason::NoScheduler);
    assert_eq!(
        text,
        "cannot add the service tcp 10.7.0.1:80 (nosuch): the kernel has no such scheduler: its module \
         ip_vs_<name> is missing (No such file or directory)"
    );
    let engine = Some("nosuch".to_owned());
    let persistent = Service { engine, ..round_robin(key).persistent(60) };
    let (reason, _) = refused(&mut ipvs, Change::AddService(persistent));
    assert_eq!(reason, Reason::NoSchedulerOrEngine);

    apply(&mut ipvs, &[Change::AddService(round_robin(key))]);
    let (reason, _) = refused(&mut ipvs, Change::EditService { service, mask: Flags::all() });
    assert_eq!(reason, Reason::NoScheduler);
    assert_eq!(saved(), ["-A -t 10.7.0.1:80 -s rr"]);
}

pub fn what_is_there_is_not_made_twice() {
    let mut ipvs = open();
    restore(&["-A -t 10.7.0.1:80 -s rr", "-a -t 10.7.0.1:80 -r 10.7.0.2:80 -m -w 1"]);
    let service = tcp(VIRTUAL, 80);
    let again = Service::new(service, Scheduler::LeastConnection);
    let (reason, text) = refused(&mut ipvs, Change::AddService(again));
    assert_eq!(reason, Reason::ServiceExists);
    assert_eq!(
        text,
        "cannot add the service tcp 10.7.0.1:80 (lc): there is such a service already (File exists)"
    );
    let again = Change::AddDestination { service, destination: masqueraded(REAL, 80) };
    let (reason, text) = refused(&mut ipvs, again);
    assert_eq!(reason, Reason::DestinationExists);
    assert!(text.contains("destination 10.7.0.2:80 to the service tcp 10.7.0.1:80"), "{text}");
}

pub fn an_unknown_service_is_told() {
    let mut ipvs = open();
    restore(&["-A -t 10.7.0.1:80 -s rr", "-a -t 10.7.0.1:80 -r 10.7.0.2:80 -m -w 1"]);
    let key = tcp(VIRTUAL, 81);
    let destination = masqueraded(REAL, 80);
    for change in [
        Change::EditService { service: round_robin(key), mask: Flags::all() },
        Change::DeleteService(key),
        Change::AddDestination { service: key, destination },
        Change::EditDestination { service: key, destination },
        Change::DeleteDestination { service: key, destination: destination.key },
        Change::Zero(key),
    ] {
        assert_eq!(refused(&mut ipvs, change.clone()).0, Reason::NoService, "{change}");
    }
    assert_eq!(ipvs.service(&key).unwrap(), None);
    assert_eq!(ipvs.destinations(&key).unwrap_err().reason(), Some(Reason::NoService));
}

pub fn an_unknown_destination_is_told() {
    let mut ipvs = open();
    restore(&["-A -t 10.7.0.1:80 -s rr", "-a -t 10.7.0.1:80 -r 10.7.0.2:80 -m -w 1"]);
    let service = tcp(VIRTUAL, 80);
    let edit = Change::EditDestination { service, destination: masqueraded(REAL, 81) };
    assert_eq!(refused(&mut ipvs, edit).0, Reason::NoDestination);
    let delete = Change::DeleteDestination { service, destination: at("10.7.0.3", 80) };
    let (reason, text) = refused(&mut ipvs, delete);
    assert_eq!(reason, Reason::NoDestination);
    assert!(text.starts_with("cannot delete the destination 10.7.0.3:80 of the service"), "{text}");
}

pub fn a_destination_that_cannot_be_is_refused() {
    let mut ipvs = open();
    let service = tcp(VIRTUAL, 80);
    apply(&mut ipvs, &[Change::AddService(round_robin(service))]);
    let plain = masqueraded(REAL, 80);
    let without_port = Tunnel { kind: TunnelKind::Gue, ..Tunnel::default() };
    for (destination, expected) in [
        (Destination { weight: 1 << 31, ..plain }, Reason::OutOfRange),
        (Destination { upper_threshold: 5, lower_threshold: 6, ..plain }, Reason::OutOfRange),
        (masqueraded("224.0.0.1", 80), Reason::DestinationNotAccepted),
        // Of another family, without a tunnel.
        (masqueraded("fd07::2", 80), Reason::DestinationNotAccepted),
        (
            Destination { forwarding: Forwarding::Tunnel(without_port), ..plain },
            Reason::DestinationNotAccepted,
        ),
    ] {
        let (reason, text) = refused(&mut ipvs, Change::AddDestination { service, destination });
        assert_eq!(reason, expected, "{text}");
    }
    assert_eq!(read(&mut ipvs), [(round_robin(service), Vec::new())]);
}

pub fn a_timeout_that_is_too_long_changes_none() {
    let mut ipvs = open();
    let before = ipvs.timeouts().unwrap();
    let error = ipvs.set_timeouts(Timeouts { tcp: 10, tcp_fin: 10, udp: u32::MAX }).unwrap_err();
    assert_eq!(error.reason(), Some(Reason::TimeoutNotAccepted));
    assert_eq!(ipvs.timeouts().unwrap(), before);
}

pub fn what_makes_no_sense_is_not_sent() {
    let mut ipvs = open();
    let every_port = round_robin(tcp(VIRTUAL, 0));
    let long = Service::new(tcp(VIRTUAL, 80), Scheduler::from("a-name-of-16-chr"));
    let crowded = Destination { upper_threshold: 1 << 31, ..masqueraded(REAL, 80) };
    let wrong = [
        Change::AddService(every_port),
        Change::AddService(long),
        Change::AddDestination { service: tcp(VIRTUAL, 80), destination: crowded },
    ];
    let problems: Vec<_> = ipvs
        .apply(&wrong)
        .into_iter()
        .map(|result| match result.unwrap_err() {
            Error::Invalid { problem, .. } => problem,
            other => panic!("{other}"),
        })
        .collect();
    let name = "a-name-of-16-chr".to_owned();
    assert_eq!(problems, [Problem::PortZero, Problem::Name(name), Problem::Threshold(1 << 31)]);
    assert_eq!(saved(), Vec::<String>::new());
}

/// Takes the effective user away from the calling thread only, and with it all capabilities.
fn become_nobody() {
    const NOBODY: i64 = 65534;
    // SAFETY: the call changes numbers that the kernel has of this thread, and no memory. It is made
    // without the C library, which would change all threads.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, -1i64, NOBODY, -1i64) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

pub fn without_rights_nothing_is_read_or_changed() {
    restore(&["-A -t 10.7.0.1:80 -s rr"]);
    become_nobody();
    let mut ipvs = open();
    let key = tcp(VIRTUAL, 80);
    let (reason, text) = refused(&mut ipvs, Change::DeleteService(key));
    assert_eq!(reason, Reason::NotPermitted);
    assert!(text.contains("this needs CAP_NET_ADMIN"), "{text}");
    for error in [
        ipvs.table().unwrap_err(),
        ipvs.service(&key).unwrap_err(),
        ipvs.timeouts().unwrap_err(),
        ipvs.info().unwrap_err(),
    ] {
        assert_eq!(error.reason(), Some(Reason::NotPermitted), "{error}");
    }
}
