//! Many at once, and what outlasts the module.

use std::process::{Command, Stdio};

use netctl::kernel::ipvs::{Change, Error, Reason, Scheduler, Service};

use crate::world::{
    Table, apply, at, changes, eventually, masqueraded, open, read, refused, restore, round_robin,
    saved, sorted, tcp,
};

const SERVICES: u16 = 1000;
const DESTINATIONS: u16 = 10;

fn large() -> Table {
    let service = |number: u16| {
        let address = format!("10.7.{}.{}", number / 250, number % 250 + 1);
        let destinations = (1..=DESTINATIONS).map(|port| masqueraded("10.8.0.1", port)).collect();
        (round_robin(tcp(&address, 80)), destinations)
    };
    let mut table: Table = (0..SERVICES).map(service).collect();
    table.sort();
    table
}

fn lines(table: &Table) -> Vec<String> {
    let of = |(service, destinations): &(Service, Vec<_>)| {
        let at = service.key.to_string().replace("tcp ", "");
        let line = |port| format!("-a -t {at} -r 10.8.0.1:{port} -m -w 1");
        let mut lines = vec![format!("-A -t {at} -s rr")];
        lines.extend((1..=destinations.len()).map(line));
        lines
    };
    table.iter().flat_map(of).collect()
}

pub fn ten_thousand_destinations_are_made_and_read() {
    let table = large();
    let lines = lines(&table);
    let mut ipvs = open();
    apply(&mut ipvs, &changes(&table));
    assert!(read(&mut ipvs) == table, "what we read of what we made");
    assert!(saved() == sorted(lines.iter().map(String::as_str)), "what ipvsadm says of what we made");
    apply(&mut ipvs, &[Change::Flush]);
    restore(&lines.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(read(&mut ipvs) == table, "what we read of what ipvsadm made");
}

pub fn each_of_a_batch_has_its_answer() {
    let mut ipvs = open();
    // Of every four: one that is done, one that is done already, one for which something is missing,
    // one that is not sent.
    let four = |port: u16| {
        let service = round_robin(tcp("10.7.0.1", port));
        [
            Change::AddService(service.clone()),
            Change::AddService(service),
            Change::DeleteService(tcp("10.7.0.9", port)),
            Change::AddService(Service::new(tcp("10.7.0.9", port), Scheduler::from(""))),
        ]
    };
    let changes: Vec<_> = (1..=500).flat_map(four).collect();
    let results = ipvs.apply(&changes);
    assert_eq!(results.len(), 2000);
    for (four, port) in results.chunks(4).zip(1u16..) {
        let request = |result: &Result<(), Error>| match result {
            Err(Error::Refused { reason, request, .. }) => Some((*reason, request.to_string())),
            _ => None,
        };
        assert!(four[0].is_ok(), "{:?}", four[0]);
        let twice = format!("add the service tcp 10.7.0.1:{port} (rr)");
        assert_eq!(request(&four[1]), Some((Reason::ServiceExists, twice)));
        let unknown = format!("delete the service tcp 10.7.0.9:{port}");
        assert_eq!(request(&four[2]), Some((Reason::NoService, unknown)));
        assert!(matches!(four[3], Err(Error::Invalid { .. })), "{:?}", four[3]);
    }
    assert_eq!(read(&mut ipvs).len(), 500);
}

pub fn a_module_that_was_loaded_anew_is_found_again() {
    let unload = || {
        // The namespaces of earlier tests, with their services, end a moment after those.
        eventually("ip_vs and its schedulers can be unloaded", || {
            let modules = std::fs::read_to_string("/proc/modules").unwrap();
            let names = modules.lines().filter_map(|line| line.split(' ').next());
            let names: Vec<_> = names.filter(|name| name.starts_with("ip_vs_")).collect();
            let rmmod = Command::new("rmmod").args(names).arg("ip_vs").stderr(Stdio::null()).status();
            rmmod.expect("rmmod runs").success().then_some(())
        });
    };
    let key = tcp("10.7.0.1", 80);
    let (mut reader, mut writer) = (open(), open());
    unload();
    assert_eq!(reader.table().unwrap(), []);
    assert_eq!(reader.service(&key).unwrap(), None);
    assert!(writer.apply(&[Change::AddService(round_robin(key))])[0].is_ok());
    assert_eq!(saved(), ["-A -t 10.7.0.1:80 -s rr"]);
    apply(&mut writer, &[Change::Flush]);
    unload();
    let delete = Change::DeleteDestination { service: key, destination: at("10.7.0.2", 80) };
    assert_eq!(refused(&mut writer, delete).0, Reason::NoService);
}
