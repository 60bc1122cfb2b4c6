//! The difference between what should be and what is, as steps.
//!
//! Pure. Doing the steps makes the observed set the desired one; where a step fails, observing and
//! planning again goes on from there. A plan for a state that is right already is empty.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use crate::model::object::{Device, Key, Link, Object, Step, Target, links};

/// The steps from `observed` to `desired`: removals first, dependent objects before the devices
/// they stand on; then additions in the order device, address, neighbour, forwarding entry, route.
///
/// An object that only changes is replaced in one step, so there is no moment without it. A device
/// that must be made anew takes everything that stands on it along; all of that is added again.
pub fn plan(desired: &BTreeSet<Object>, observed: &BTreeSet<Object>) -> Vec<Step> {
    let wanted_links: BTreeMap<Device, Link> = links(desired).map(|link| (link.device, link)).collect();
    let found_links: BTreeMap<Device, Link> = links(observed).map(|link| (link.device, link)).collect();
    let keeps =
        |link: &Link| wanted_links.get(&link.device).is_some_and(|wanted| wanted.kind == link.kind);
    let going: BTreeSet<Device> =
        found_links.values().filter(|link| !keeps(link)).map(|link| link.device).collect();
    // What stands on a device that goes or is not there is as good as absent.
    let stands = |object: &Object| match object {
        Object::Link(_) => true,
        other => device(other)
            .is_none_or(|device| found_links.contains_key(&device) && !going.contains(&device)),
    };
    let standing: BTreeSet<Object> = observed.iter().copied().filter(stands).collect();

    let wanted_keys: BTreeSet<Key> = desired.iter().map(Object::key).collect();
    let mut steps = Vec::new();
    for object in standing.iter().rev().filter(|object| !desired.contains(object)) {
        let remove = match object {
            Object::Link(link) => going.contains(&link.device),
            other => !wanted_keys.contains(&other.key()),
        };
        if remove {
            steps.push(Step::Remove(*object));
        }
    }
    for object in desired.difference(&standing) {
        steps.push(match object {
            Object::Link(link)
                if found_links.contains_key(&link.device) && !going.contains(&link.device) =>
            {
                Step::Change(*link)
            }
            other => Step::Add(*other),
        });
    }
    steps
}

/// Records in an observed set that a step was done.
pub fn record(observed: &mut BTreeSet<Object>, step: &Step) {
    match step {
        Step::Remove(Object::Link(link)) => {
            observed.retain(|object| device(object) != Some(link.device));
        }
        Step::Remove(object) => {
            observed.remove(object);
        }
        Step::Add(object) => replace(observed, *object),
        Step::Change(link) => replace(observed, Object::Link(*link)),
    }
}

fn replace(observed: &mut BTreeSet<Object>, object: Object) {
    if observed.insert(object) {
        // Objects with the same key stand beside each other, because keys are what they are
        // ordered by first.
        let same = |other: &&Object| other.key() == object.key();
        let before = observed.range(..object).next_back().filter(same).copied();
        let after = observed.range((Bound::Excluded(object), Bound::Unbounded)).next();
        let after = after.filter(same).copied();
        for other in before.into_iter().chain(after) {
            observed.remove(&other);
        }
    }
}

/// The device that an object is or stands on.
pub fn device(object: &Object) -> Option<Device> {
    match object {
        Object::Link(link) => Some(link.device),
        Object::Address { device, .. } | Object::Neighbour { device, .. } => Some(*device),
        Object::Fdb { .. } => Some(Device::Tunnel),
        Object::Route(route) => match route.target {
            Target::Unreachable => None,
            Target::Device(device) | Target::Via(device, _) => Some(device),
        },
    }
}

#[cfg(test)]
mod tests;
