//! What people and other programs write: names, and targets outside.

#![no_main]

use libfuzzer_sys::fuzz_target;
use netctl::dns::DomainName;
use netctl::model::External;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let is_usual = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if let Some(name) = DomainName::parse(text) {
        assert!(name.wire().len() < 255);
        if text.bytes().all(is_usual) {
            assert_eq!(DomainName::parse(&name.to_string()), Some(name));
        }
    }
    if let Ok(external) = text.parse::<External>() {
        assert_eq!(external.to_string().parse(), Ok(external));
    }
});
