use super::*;
use crate::model::object::{LinkKind, Route};
use crate::model::{MacAddr, Vni};
use proptest::prelude::*;

/// A kernel in memory: it refuses what the real one refuses, and a device takes along what stands
/// on it.
#[derive(Debug, Clone, Default)]
struct FakeKernel {
    objects: BTreeMap<Key, Object>,
}

impl FakeKernel {
    fn of(objects: &BTreeSet<Object>) -> Self {
        let mut kernel = Self::default();
        for object in objects {
            let _ = kernel.step(&Step::Add(*object));
        }
        kernel
    }

    fn observe(&self) -> BTreeSet<Object> {
        self.objects.values().copied().collect()
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Remove(object) => {
                self.objects.remove(&object.key());
                if let Object::Link(link) = object {
                    self.objects.retain(|_, other| device(other) != Some(link.device));
                }
            }
            Step::Add(object @ Object::Link(_)) => {
                if self.objects.contains_key(&object.key()) {
                    return Err(format!("{object:?}: file exists"));
                }
                self.objects.insert(object.key(), *object);
            }
            Step::Add(object) => {
                if let Some(device) = device(object)
                    && !self.objects.contains_key(&Key::Link(device))
                {
                    return Err(format!("{object:?}: no such device"));
                }
                self.objects.insert(object.key(), *object);
            }
            Step::Change(link) => match self.objects.get_mut(&Key::Link(link.device)) {
                Some(Object::Link(found)) if found.kind == link.kind => *found = *link,
                other => return Err(format!("{link:?}: not {other:?}")),
            },
        }
        Ok(())
    }
}

fn device_strategy() -> impl Strategy<Value = Device> {
    prop_oneof![
        Just(Device::Tunnel),
        Just(Device::Uplink),
        (0u8..3).prop_map(|n| Device::Endpoint(format!("00000000000{n}").parse().unwrap())),
    ]
}

fn mac(n: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, n])
}

fn object() -> impl Strategy<Value = Object> {
    let kind = prop_oneof![
        Just(LinkKind::Veth),
        (1u32..3).prop_map(|vni| LinkKind::Vxlan {
            vni: Vni::new(vni).unwrap(),
            local: "192.0.2.1".parse().unwrap(),
            port: 4789,
            mac: mac(1),
        }),
    ];
    let target = prop_oneof![
        Just(Target::Unreachable),
        device_strategy().prop_map(Target::Device),
        (device_strategy(), 1u8..3)
            .prop_map(|(device, n)| Target::Via(device, std::net::Ipv4Addr::new(192, 0, 2, n).into())),
    ];
    let net = |n: u8| format!("10.9.0.{n}/32").parse().unwrap();
    prop_oneof![
        (device_strategy(), kind, 1300u32..1302, any::<bool>())
            .prop_map(|(device, kind, mtu, up)| Object::Link(Link { device, kind, mtu, up })),
        (device_strategy(), 1u8..4)
            .prop_map(move |(device, n)| Object::Address { device, address: net(n) }),
        (device_strategy(), 1u8..4, 1u8..3).prop_map(|(device, n, m)| Object::Neighbour {
            device,
            address: std::net::Ipv4Addr::new(10, 9, 0, n).into(),
            mac: mac(m),
        }),
        (1u8..4, 1u8..3).prop_map(|(m, n)| Object::Fdb {
            mac: mac(m),
            remote: std::net::Ipv4Addr::new(192, 0, 2, n).into(),
            port: 4789,
        }),
        (1u8..6, target, prop::option::of(1300u32..1302)).prop_map(move |(n, target, mtu)| {
            Object::Route(Route { destination: net(n), target, mtu })
        }),
    ]
}

/// A set that can exist: one object per key, and every device that something stands on.
fn state() -> impl Strategy<Value = BTreeSet<Object>> {
    prop::collection::vec(object(), 0..30).prop_map(|mut objects| {
        objects.sort();
        FakeKernel::of(&objects.into_iter().collect()).observe()
    })
}

proptest! {
    #[test]
    fn every_state_becomes_the_desired_one_and_then_nothing_is_left_to_do(
        before in state(), desired in state(),
    ) {
        let mut kernel = FakeKernel::of(&before);
        for step in plan(&desired, &before) {
            prop_assert_eq!(kernel.step(&step), Ok(()));
        }
        prop_assert_eq!(kernel.observe(), desired.clone());
        prop_assert_eq!(plan(&desired, &kernel.observe()), vec![]);
    }

    /// Steps fail at random, and a killed agent starts over: it converges all the same.
    #[test]
    fn failures_and_kills_only_delay(
        before in state(), desired in state(), fails in prop::collection::vec(any::<bool>(), 0..60),
        killed_after in 0usize..20,
    ) {
        let mut kernel = FakeKernel::of(&before);
        let mut fails = fails.into_iter();
        for step in plan(&desired, &kernel.observe()).iter().take(killed_after) {
            if !fails.next().unwrap_or(false) {
                let _ = kernel.step(step);
            }
        }
        for step in plan(&desired, &kernel.observe()) {
            if !fails.next().unwrap_or(false) {
                let _ = kernel.step(&step);
            }
        }
        for step in plan(&desired, &kernel.observe()) {
            prop_assert_eq!(kernel.step(&step), Ok(()));
        }
        prop_assert_eq!(kernel.observe(), desired);
    }

    /// What is recorded step by step is what the kernel then has.
    #[test]
    fn a_recorded_state_is_the_kernels(before in state(), desired in state()) {
        let mut observed = before.clone();
        for step in plan(&desired, &before) {
            record(&mut observed, &step);
        }
        prop_assert_eq!(observed, desired);
    }

    #[test]
    fn what_stays_is_not_touched(before in state(), desired in state()) {
        let steps = plan(&desired, &before);
        let remade: BTreeSet<Device> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Remove(Object::Link(link)) => Some(link.device),
                _ => None,
            })
            .collect();
        for object in before.intersection(&desired) {
            let touched = steps.iter().any(|step| matches!(step, Step::Add(o) | Step::Remove(o) if o == object));
            let remade = device(object).is_some_and(|device| remade.contains(&device));
            prop_assert!(!touched || remade, "{object:?}");
        }
    }
}
