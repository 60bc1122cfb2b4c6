//! Any datagram of a container: it is answered within bounds, and the short way and the long one say
//! the same.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| netctl_fuzz::query(bytes));
