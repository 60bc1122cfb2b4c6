//! Compiles the eBPF programs of `ebpf/` with clang; the agent carries them (`src/kernel/ebpf`).

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::{env, fs};

/// The programs: one file each, over the headers beside them.
const PROGRAMS: [&str; 11] = [
    "from_container",
    "to_container",
    "into_container",
    "to_wire",
    "from_wire",
    "connect",
    "getpeername",
    "sendmsg",
    "recvmsg",
    "tcp_state",
    "drops",
];
/// Compilers that are tried in turn, where the variable CLANG names none.
const COMPILERS: [&str; 2] = ["clang", "clang-14"];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=ebpf");
    println!("cargo::rerun-if-env-changed=CLANG");
    match PROGRAMS.iter().try_for_each(|program| compile(program)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("cargo::error={error}");
            ExitCode::FAILURE
        }
    }
}

fn compile(program: &str) -> Result<(), String> {
    let variable = |name| env::var(name).map_err(|error| format!("{name}: {error}"));
    let target = PathBuf::from(variable("OUT_DIR")?).join(format!("{program}.o"));
    let named = env::var("CLANG").ok();
    let compilers: Vec<&str> = named.as_deref().map_or(COMPILERS.to_vec(), |named| vec![named]);
    let headers = format!("-I/usr/include/{}-linux-gnu", variable("CARGO_CFG_TARGET_ARCH")?);
    let mut tried = String::new();
    for compiler in compilers {
        let mut command = Command::new(compiler);
        // With -g there is BTF, which says what the maps are; -mcpu=v3 is what Linux 5.12 understands.
        command.args(["-std=gnu11", "-g", "-O2", "-mcpu=v3", "-Wall", "-Wextra", "-Werror"]);
        command.args(["-target", "bpf", "-c", &headers, "-o"]).arg(&target);
        match command.arg(format!("ebpf/{program}.c")).output() {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr).replace('\n', " | ");
                // A file that is left over would be taken for the new one.
                let _ = fs::remove_file(&target);
                return Err(format!("{compiler} cannot compile ebpf/{program}.c: {said}"));
            }
            Err(error) => tried.push_str(&format!("{compiler}: {error}; ")),
        }
    }
    Err(format!("{tried}the eBPF programs need clang: install clang-14 and libbpf-dev"))
}
