//! How a container asks for names: what is asked for, and the file that says it.

use std::net::IpAddr;

use clap::Args;

use crate::api::ResolverView;

/// What of the network's own answers is to be otherwise (resolv.conf(5)).
#[derive(Debug, Clone, Default, Args)]
pub(super) struct Resolver {
    /// A name server to ask; can be repeated [default: the network's gateways]
    #[arg(long = "dns", value_name = "ADDRESS")]
    servers: Vec<IpAddr>,
    /// A domain that is added to names; can be repeated [default: the network's]
    #[arg(long = "dns-search", value_name = "DOMAIN", value_parser = domain)]
    search: Vec<String>,
    /// An option for the resolver, such as ndots:2; can be repeated [default: ndots:0]
    #[arg(long = "dns-option", value_name = "OPTION", value_parser = word)]
    options: Vec<String>,
}

impl Resolver {
    /// The file for a container of whose network this is known.
    pub(super) fn file(&self, known: &ResolverView) -> String {
        fn or<'a, T>(asked: &'a [T], known: &'a [T]) -> &'a [T] {
            if asked.is_empty() { known } else { asked }
        }
        let mut text = String::new();
        for (key, asked, known) in
            [("search", &self.search, &known.search), ("options", &self.options, &known.options)]
        {
            let words = or(asked, known).join(" ");
            if !words.is_empty() {
                text.push_str(&format!("{key} {words}\n"));
            }
        }
        for server in or(&self.servers, &known.servers) {
            text.push_str(&format!("nameserver {server}\n"));
        }
        text
    }
}

/// A word of the file.
fn word(text: &str) -> Result<String, String> {
    match text.is_empty() || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        true => Err("it is not one word".to_owned()),
        false => Ok(text.to_owned()),
    }
}

fn domain(text: &str) -> Result<String, String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    match !text.is_empty() && text.len() <= 253 && text.bytes().all(allowed) {
        true => Ok(text.to_owned()),
        false => Err("it is not a domain: give such as corp.example, or . for none".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> ResolverView {
        ResolverView {
            servers: vec!["10.9.0.1".parse().unwrap(), "fd00:9::1".parse().unwrap()],
            search: vec!["shop.netctl.internal".to_owned()],
            options: vec!["ndots:0".to_owned()],
        }
    }

    #[test]
    fn the_file_is_the_networks_unless_something_else_is_asked_for() {
        assert_eq!(
            Resolver::default().file(&known()),
            "search shop.netctl.internal\noptions ndots:0\nnameserver 10.9.0.1\nnameserver fd00:9::1\n"
        );
        let asked = Resolver {
            servers: vec!["192.0.2.53".parse().unwrap()],
            search: ["a.example", "b.example"].map(str::to_owned).into(),
            options: ["ndots:2", "edns0"].map(str::to_owned).into(),
        };
        assert_eq!(
            asked.file(&known()),
            "search a.example b.example\noptions ndots:2 edns0\nnameserver 192.0.2.53\n"
        );
        assert_eq!(Resolver::default().file(&ResolverView::default()), "");
    }

    #[test]
    fn nothing_adds_a_line_of_its_own() {
        for text in ["", "a b", "a\nnameserver 192.0.2.1", "a\t"] {
            assert!(word(text).is_err() && domain(text).is_err(), "{text:?}");
        }
        assert!(domain(".").is_ok() && domain("corp.example.").is_ok() && domain("a;b").is_err());
    }
}
