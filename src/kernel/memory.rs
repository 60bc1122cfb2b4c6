//! The agent's own memory.

/// Gives back to the kernel what is free. By itself glibc keeps, for each thread, nearly all that was ever
/// needed at a time: more than the agent needs at rest.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no pointer goes in; any thread may call it at any time (malloc_trim(3)).
    unsafe {
        libc::malloc_trim(0);
    }
}
