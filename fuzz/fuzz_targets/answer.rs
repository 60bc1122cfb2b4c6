//! Any answer of another name server: it is told, kept and told once more, the same both times.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| netctl_fuzz::answer(bytes));
