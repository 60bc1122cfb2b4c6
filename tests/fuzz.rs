//! What the fuzz targets do (`scripts/fuzz`), with some random bytes: so they are built and hold in every run.

#![allow(clippy::expect_used, clippy::panic, reason = "what does not hold has failed")]

#[path = "../fuzz/src/lib.rs"]
mod targets;

use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use proptest::prelude::*;

/// A message with some of its bytes changed, or any bytes.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let kinds = [RecordType::A, RecordType::AAAA, RecordType::SRV, RecordType::PTR, RecordType::ANY];
    let names = ["web.", "db.shop.", "e7.shop.netctl.internal.", "_http._tcp.web.", "www.example.org."];
    let whole = (any::<u16>(), any::<bool>(), 0..kinds.len(), 0..names.len(), 0..3_usize);
    let whole = whole.prop_map(move |(id, is_answer, kind, name, records)| {
        let direction = if is_answer { MessageType::Response } else { MessageType::Query };
        let mut message = Message::new(id, direction, OpCode::Query);
        let name = Name::from_ascii(names[name]).expect("it is a name");
        message.add_query(Query::query(name.clone(), kinds[kind]));
        let record = |last| Record::from_rdata(name.clone(), 60, RData::A(A::new(192, 0, 2, last)));
        message.answers.extend((0..records as u8).map(record));
        message.to_vec().expect("it can be written")
    });
    let changes = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    let changed = (whole, changes).prop_map(|(mut bytes, changes)| {
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes
    });
    prop_oneof![3 => changed, 1 => proptest::collection::vec(any::<u8>(), 0..300)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    #[test]
    fn any_datagram_of_a_container_is_answered_within_bounds(bytes in message()) {
        targets::query(&bytes);
    }

    #[test]
    fn any_answer_of_another_is_told_the_same_twice(bytes in message()) {
        targets::answer(&bytes);
    }

    #[test]
    fn any_text_is_a_name_or_none(text in "[a-z0-9._:\\[\\]-]{0,60}|.{0,40}") {
        targets::text(text.as_bytes());
    }
}
