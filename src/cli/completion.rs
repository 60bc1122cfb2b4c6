//! `netctl completion`: scripts for shells.

use std::process::ExitCode;

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::{Shell, generate};

use super::failure::{Exit, Failure};
use super::{Cli, output};

const EXAMPLES: &str = "\
Examples:
  netctl completion bash > /etc/bash_completion.d/netctl
  netctl completion zsh > \"${fpath[1]}/_netctl\"
  netctl completion fish > ~/.config/fish/completions/netctl.fish";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// The shell
    shell: Kind,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    Bash,
    Zsh,
    Fish,
}

/// Prints the script.
pub(super) fn print(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let shell = match arguments.shell {
        Kind::Bash => Shell::Bash,
        Kind::Zsh => Shell::Zsh,
        Kind::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    generate(shell, &mut Cli::command(), "netctl", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done.into())
}
