//! The agent: one on every node, as root.

use std::process::ExitCode;

use clap::Parser as _;
use netctl::api::client::DEFAULT_SOCKET;
use netctl::config::{Config, Flags};

fn main() -> ExitCode {
    let flags = Flags::parse();
    let config = Config::load(&flags, std::env::vars_os());
    if flags.cleanup {
        // A configuration that cannot be used does not hinder it.
        let given = || flags.socket().unwrap_or(DEFAULT_SOCKET).into();
        let socket = config.map_or_else(|_| given(), |config| config.socket);
        return end(netctl::app::cleanup(&socket));
    }
    let config = match config {
        Ok(config) => config,
        Err(errors) => {
            eprintln!("netctld: the configuration cannot be used:\n{errors}");
            return ExitCode::from(2);
        }
    };
    if flags.check_config {
        print!("{}", config.to_toml());
        return ExitCode::SUCCESS;
    }
    end(netctl::app::run(&config))
}

fn end(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("netctld: {}", whole(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with what it comes from, as far as it does not say that itself.
fn whole(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        text if text.contains(&cause) => text.to_owned(),
        text => format!("{text}: {cause}"),
    })
}
