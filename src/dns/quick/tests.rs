use hickory_proto::op::Message;
use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::SmallRng;

use super::super::answer::tests::{anything, plain, terms, zone};
use super::*;
use crate::dns::answer::{Reply, encode, max_size};

/// What the short way leads to.
fn quick(terms: &Terms<'_>, bytes: &[u8], transport: Transport, seed: u64) -> Option<Vec<u8>> {
    let (query, mut answer) = (PlainQuery::read(bytes)?, Vec::new());
    let rng = &mut SmallRng::seed_from_u64(seed);
    (terms.quick(&query, transport, rng, &mut answer) == Quick::Answered).then_some(answer)
}

/// Both ways to an answer, the quick one where there is one.
fn both(bytes: &[u8], transport: Transport, seed: u64) -> Option<(Message, Message)> {
    static ZONE: std::sync::LazyLock<std::sync::Arc<crate::dns::Zone>> =
        std::sync::LazyLock::new(|| zone(40));
    terms(&ZONE, |terms| {
        let quick = quick(&terms, bytes, transport, seed)?;
        let query = Message::from_vec(bytes).expect("what is plain can be read");
        let Reply::Ours(long) = terms.reply(&query, transport, &mut SmallRng::seed_from_u64(seed))
        else {
            panic!("what is answered the short way is ours")
        };
        let long = encode(long, max_size(&query, transport)).expect("it can be written");
        let read = |bytes: &[u8]| {
            let mut message = Message::from_vec(bytes).expect("it is a message");
            message.answers.sort_by_key(|record| record.data.to_string());
            message
        };
        Some((read(&quick), read(&long)))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5000))]

    #[test]
    fn both_ways_lead_to_the_same_answer(bytes in anything(), seed: u64, tcp: bool) {
        let transport = if tcp { Transport::Tcp } else { Transport::Udp };
        if let Some((quick, long)) = both(&bytes, transport, seed) {
            prop_assert_eq!(quick, long);
        }
    }
}

#[test]
fn plain_queries_are_answered_the_short_way() {
    for (name, kind) in [
        ("web", "A"),
        ("WEB.shop", "AAAA"),
        ("web.Shop.netctl.internal", "A"),
        ("tasks.db", "A"),
        ("e0.shop.netctl.internal", "A"),
        ("gateway", "A"),
    ] {
        for edns in [None, Some(512), Some(4096)] {
            let query = plain(name, kind, edns);
            let answers = both(&query, Transport::Udp, 1);
            // Forty addresses take 640 bytes.
            let is_large = name == "tasks.db" && edns != Some(4096);
            assert_eq!(answers.is_none(), is_large, "{name} {kind} {edns:?}");
            if let Some((quick, long)) = answers {
                assert_eq!(quick, long, "{name} {kind} {edns:?}");
                assert!(!quick.answers.is_empty());
            }
        }
    }
    for (name, kind) in [
        ("web", "MX"),
        ("web", "ANY"),
        ("e0", "AAAA"),
        ("no.shop.netctl.internal", "A"),
        ("shop.netctl.internal", "A"),
        ("netctl.internal", "A"),
        ("www.example.org", "A"),
        ("0.1.9.10.in-addr.arpa", "A"),
        (".", "A"),
    ] {
        assert!(both(&plain(name, kind, None), Transport::Udp, 1).is_none(), "{name} {kind}");
    }
}

#[test]
fn which_of_many_comes_first_is_drawn() {
    let query = plain("tasks.db", "A", Some(1232));
    let first = |seed| {
        terms(&zone(40), |terms| {
            let answer = quick(&terms, &query, Transport::Udp, seed).unwrap();
            Message::from_vec(&answer).unwrap().answers[0].data.to_string()
        })
    };
    let different: std::collections::BTreeSet<String> = (0..50).map(first).collect();
    assert!(different.len() > 15, "{different:?}");
}
