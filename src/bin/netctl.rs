//! The command of netctl.

use std::process::ExitCode;

fn main() -> ExitCode {
    netctl::cli::main()
}
