//! Any datagram of a container: it is answered within bounds, and the short way and the long one say
//! the same.

#![no_main]

use hickory_proto::op::Message;
use libfuzzer_sys::fuzz_target;
use netctl::dns::answer::{Reply, Transport, encode, max_size, unreadable};
use netctl::dns::{PlainQuery, Quick};
use rand::SeedableRng as _;
use rand::rngs::SmallRng;

fuzz_target!(|bytes: &[u8]| {
    let terms = netctl_fuzz::terms();
    for transport in [Transport::Udp, Transport::Tcp] {
        let mut quick = Vec::new();
        let plain = PlainQuery::read(bytes);
        let led = plain.map(|query| terms.quick(&query, transport, &mut rng(), &mut quick));
        let Ok(query) = Message::from_vec(bytes) else {
            assert_ne!(led, Some(Quick::Answered), "what cannot be read is not answered");
            assert!(unreadable(bytes).is_none_or(|answer| answer.len() == 12));
            continue;
        };
        let reply = terms.reply(&query, transport, &mut rng());
        if led == Some(Quick::Foreign) {
            // What floods are made of is refused before that.
            assert!(!matches!(reply, Reply::Nothing));
        }
        let Reply::Ours(message) = reply else {
            assert_ne!(led, Some(Quick::Answered));
            continue;
        };
        let long = encode(message, max_size(&query, transport)).expect("it can be written");
        assert!(long.len() <= usize::from(max_size(&query, transport)));
        let long = Message::from_vec(&long).expect("what we write can be read");
        if led == Some(Quick::Answered) {
            let quick = Message::from_vec(&quick).expect("what we write can be read");
            assert_eq!(sorted(quick), sorted(long));
        }
    }
});

fn rng() -> SmallRng {
    SmallRng::seed_from_u64(1)
}

fn sorted(mut message: Message) -> Message {
    message.answers.sort_by_key(|record| record.data.to_string());
    message
}
