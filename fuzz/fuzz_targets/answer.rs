//! Any answer of another name server: it is told, kept and told once more, the same both times.

#![no_main]

use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};
use libfuzzer_sys::fuzz_target;
use netctl::dns::answer::{Transport, encode, max_size, relayed};
use netctl::dns::{Packed, PlainQuery};

fuzz_target!(|bytes: &[u8]| {
    let Ok(answer) = Message::from_vec(bytes) else { return };
    let mut query = Message::query();
    query.metadata.recursion_desired = true;
    let (name, kind) = match answer.queries.first() {
        Some(question) => (question.name().clone(), question.query_type()),
        None => (Name::from_ascii("www.example.org.").expect("it is a name"), RecordType::A),
    };
    query.add_query(Query::query(name, kind));
    let told = relayed(&query, &answer);
    let Some(long) = encode(told.clone(), max_size(&query, Transport::Udp)) else { return };
    assert!(long.len() <= usize::from(max_size(&query, Transport::Udp)));
    let bytes = query.to_vec().expect("a query can be written");
    // Only what is whole is kept.
    if answer.metadata.truncation {
        return;
    }
    if let (Some(packed), Some(plain)) = (Packed::new(&told), PlainQuery::read(&bytes)) {
        let mut written = Vec::new();
        if packed.write(&plain, 0, Transport::Udp, &mut written) {
            let read = |bytes: &[u8]| Message::from_vec(bytes).ok();
            assert_eq!(read(&written), read(&long));
        }
    }
});
