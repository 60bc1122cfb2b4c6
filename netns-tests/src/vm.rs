//! The virtual machine in which tests run that need another kernel.

use std::fs;

/// Whether this program is to run the tests of the virtual machine: `NETCTL_VM` is set.
///
/// # Panics
/// When it is set elsewhere: these tests load and unload kernel modules, which no namespace holds
/// back.
pub fn in_vm() -> bool {
    if std::env::var_os("NETCTL_VM").is_none() {
        return false;
    }
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let is_ours = command_line.split_whitespace().any(|word| word == "netctl.vm");
    assert!(is_ours, "NETCTL_VM is set outside of the virtual machine that scripts/vm starts");
    true
}

/// A kernel module that cannot be loaded, until this is dropped.
///
/// It is the same for everything that runs in the virtual machine: a test that takes one away runs
/// alone.
#[derive(Debug)]
pub struct WithoutModule {
    path: String,
}

impl WithoutModule {
    /// Unloads a module and keeps it from being loaded again, on demand or by name.
    ///
    /// # Panics
    /// When it is in use or built into the kernel.
    pub fn new(module: &str) -> Self {
        assert!(in_vm(), "modules are taken away in the virtual machine only");
        let path = format!("/etc/modprobe.d/without-{module}.conf");
        fs::create_dir_all("/etc/modprobe.d").expect("the folder can be made");
        let without = Self { path };
        fs::write(&without.path, format!("install {module} /bin/false\n"))
            .unwrap_or_else(|error| panic!("{}: {error}", without.path));
        let mut command = std::process::Command::new("modprobe");
        let output = crate::output(command.args(["--remove", module]), crate::DEADLINE);
        assert!(output.success(), "modprobe --remove {module}: {output}");
        without
    }
}

impl Drop for WithoutModule {
    fn drop(&mut self) {
        // It was written above; if somebody else removed it, so much the better.
        let _ = fs::remove_file(&self.path);
    }
}
