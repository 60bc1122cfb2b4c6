//! Maps.

use std::collections::BTreeMap;

use netctl::kernel::ebpf::{Counts, Ebpf, Meaning, Place, SlotKey};

use crate::ground::{NETWORK, address, directory};

pub fn entries_are_written_read_and_removed_by_the_thousand() {
    let ebpf = Ebpf::open_in(&directory(), 16).unwrap();
    let slots = &ebpf.maps().slots;
    assert_eq!(slots.entries().unwrap(), []);
    let key = |slot| SlotKey { front: 7, slot };
    let all: Vec<(SlotKey, u32)> = (0..10_000).map(|slot| (key(slot), slot * 3)).collect();
    slots.insert_all(&all).unwrap();
    let read: BTreeMap<SlotKey, u32> = slots.entries().unwrap().into_iter().collect();
    assert_eq!(read, all.iter().copied().collect());
    assert_eq!(slots.get(&key(5000)).unwrap(), Some(15_000));
    slots.insert(&key(5000), &1).unwrap();
    assert_eq!(slots.get(&key(5000)).unwrap(), Some(1));
    // Some are not there, at the beginning, in between and at the end.
    assert!(slots.remove(&key(0)).unwrap() && !slots.remove(&key(0)).unwrap());
    assert!(slots.remove(&key(4500)).unwrap());
    let keys: Vec<SlotKey> = (0..9_000).chain(20_000..20_003).map(key).collect();
    slots.remove_all(&keys).unwrap();
    let left: BTreeMap<SlotKey, u32> = slots.entries().unwrap().into_iter().collect();
    assert_eq!(left, (9_000..10_000).map(|slot| (key(slot), slot * 3)).collect());
}

pub fn what_is_counted_on_each_processor_comes_by_the_ten_thousand() {
    let ebpf = Ebpf::open_in(&directory(), 16).unwrap();
    let counts = &ebpf.maps().counts;
    // More at once than the kernel keeps ready.
    let numbers: Vec<u32> = (1..=60_000).collect();
    counts.insert_all(&numbers).unwrap();
    for number in numbers.iter().step_by(997).chain(&[60_000]) {
        let values = counts.get(number).unwrap().unwrap();
        assert!(values.iter().all(|value| *value == Counts::default()), "{number}");
    }
    assert_eq!(counts.get(&0).unwrap(), None);
    counts.remove_all(&numbers).unwrap();
    assert_eq!(counts.get(&60_000).unwrap(), None);
}

pub fn a_full_map_says_so() {
    let ebpf = Ebpf::open_in(&directory(), 16).unwrap();
    let addresses = &ebpf.maps().addresses;
    let place = |number: u32| Place { network: number, address: address("10.9.0.80") };
    let room = 1 << 18;
    let all: Vec<(Place, Meaning)> = (0..room).map(|number| (place(number), Meaning::of(1))).collect();
    addresses.insert_all(&all).unwrap();
    let error = addresses.insert(&place(room), &Meaning::of(1)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::E2BIG), "{error}");
    assert!(addresses.insert_all(&[(place(room), Meaning::of(1))]).is_err());
    addresses.insert(&place(room - 1), &Meaning::of(2)).unwrap();
}

pub fn maps_outlive_who_opened_them_and_grow_when_they_are_to() {
    let directory = directory();
    let place = Place { network: NETWORK, address: address("10.9.0.80") };
    let slot = SlotKey { front: 1, slot: 0 };
    let first = Ebpf::open_in(&directory, 16).unwrap();
    first.maps().addresses.insert(&place, &Meaning::of(1)).unwrap();
    first.maps().slots.insert(&slot, &9).unwrap();
    first.maps().events.insert(&0).unwrap();
    drop(first);
    // Room for more connections needs another map for them, and for nothing else.
    for connections in [16, 32, 8] {
        let again = Ebpf::open_in(&directory, connections).unwrap();
        assert_eq!(again.maps().addresses.get(&place).unwrap(), Some(Meaning::of(1)));
        assert_eq!(again.maps().slots.get(&slot).unwrap(), Some(9));
        let pinned = aya::maps::MapData::from_pin(directory.join("connections")).unwrap();
        assert_eq!(pinned.info().unwrap().max_entries(), connections * 2);
    }
}
