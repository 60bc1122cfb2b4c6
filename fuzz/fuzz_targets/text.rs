//! What people and other programs write: names, and targets outside.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| netctl_fuzz::text(bytes));
