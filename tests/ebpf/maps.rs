//! Maps.

use std::collections::BTreeMap;
use std::net::IpAddr;

use netctl::kernel::ebpf::{Address, Ebpf, Meaning, Place};

use crate::ground::{NETWORK, address, directory};

pub fn entries_are_written_read_and_removed_by_the_thousand() {
    let ebpf = Ebpf::open_in(&directory(), 16).unwrap();
    let gateways = &ebpf.maps().gateways;
    assert_eq!(gateways.entries().unwrap(), []);
    let key = |number| Place::new(number, address("10.9.0.80"));
    let value = |number: u32| Address::from(IpAddr::from(number.to_be_bytes()));
    let entry = |number| (key(number), value(number * 3));
    let all: Vec<(Place, Address)> = (0..10_000).map(entry).collect();
    gateways.insert_all(&all).unwrap();
    let read: BTreeMap<Place, Address> = gateways.entries().unwrap().into_iter().collect();
    assert_eq!(read, all.iter().copied().collect());
    assert_eq!(gateways.get(&key(5000)).unwrap(), Some(value(15_000)));
    gateways.insert(&key(5000), &value(1)).unwrap();
    assert_eq!(gateways.get(&key(5000)).unwrap(), Some(value(1)));
    // Some are not there, at the beginning, in between and at the end.
    assert!(gateways.remove(&key(0)).unwrap() && !gateways.remove(&key(0)).unwrap());
    assert!(gateways.remove(&key(4500)).unwrap());
    let keys: Vec<Place> = (0..9_000).chain(20_000..20_003).map(key).collect();
    gateways.remove_all(&keys).unwrap();
    let left: BTreeMap<Place, Address> = gateways.entries().unwrap().into_iter().collect();
    assert_eq!(left, (9_000..10_000).map(entry).collect());
}

pub fn a_full_map_says_so() {
    let ebpf = Ebpf::open_in(&directory(), 16).unwrap();
    let addresses = &ebpf.maps().addresses;
    let place = |number: u32| Place::new(number, address("10.9.0.80"));
    let room = 1 << 17;
    let all: Vec<(Place, Meaning)> = (0..room).map(|number| (place(number), Meaning::of(1))).collect();
    addresses.insert_all(&all).unwrap();
    let error = addresses.insert(&place(room), &Meaning::of(1)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::E2BIG), "{error}");
    assert!(addresses.insert_all(&[(place(room), Meaning::of(1))]).is_err());
    addresses.insert(&place(room - 1), &Meaning::of(2)).unwrap();
}

pub fn maps_outlive_who_opened_them_and_grow_when_they_are_to() {
    let directory = directory();
    let place = Place::new(NETWORK, address("10.9.0.80"));
    let first = Ebpf::open_in(&directory, 16).unwrap();
    first.maps().addresses.insert(&place, &Meaning::of(1)).unwrap();
    first.maps().gateways.insert(&place, &place.address).unwrap();
    drop(first);
    // Room for more connections needs another map for them, and for nothing else.
    for connections in [16, 32, 8] {
        let again = Ebpf::open_in(&directory, connections).unwrap();
        assert_eq!(again.maps().addresses.get(&place).unwrap(), Some(Meaning::of(1)));
        assert_eq!(again.maps().gateways.get(&place).unwrap(), Some(place.address));
        let pinned = aya::maps::MapData::from_pin(directory.join("connections")).unwrap();
        assert_eq!(pinned.info().unwrap().max_entries(), connections * 2);
    }
}
