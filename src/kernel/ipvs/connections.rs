//! The connections of IPVS, which the kernel shows as text (`ip_vs_conn_seq_show` in
//! net/netfilter/ipvs/ip_vs_conn.c).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Protocol;

/// A connection of the thread's namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// Its protocol.
    pub protocol: Protocol,
    /// Where it comes from.
    pub client: SocketAddr,
    /// Which address and port of a service it asked for.
    pub service: SocketAddr,
    /// Who has it.
    pub destination: SocketAddr,
    /// Whether the destination has answered.
    pub answered: bool,
    /// Whether one of them has ended it.
    pub ending: bool,
}

impl std::fmt::Display for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { protocol, client, service, destination, .. } = self;
        write!(f, "{protocol} {client} -> {service} -> {destination}")
    }
}

/// Reads the connections of the thread's namespace. What only keeps a client at its destination is none.
///
/// # Errors
/// When the file cannot be read. Where IPVS is not loaded there is none, and no connection.
pub fn connections() -> io::Result<Vec<Connection>> {
    match std::fs::read_to_string("/proc/thread-self/net/ip_vs_conn") {
        Ok(text) => Ok(text.lines().filter_map(parse).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A line: `TCP 0A090005 9C40 0A090002 0050 0A090006 1F90 ESTABLISHED     899`.
fn parse(line: &str) -> Option<Connection> {
    let mut words = line.split_whitespace();
    let protocol = match words.next()? {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        "SCTP" => Protocol::Sctp,
        _ => return None,
    };
    let mut socket = || {
        let address = address(words.next()?)?;
        Some(SocketAddr::new(address, u16::from_str_radix(words.next()?, 16).ok()?))
    };
    let (client, service, destination) = (socket()?, socket()?, socket()?);
    // A template has no port of the client's.
    if client.port() == 0 {
        return None;
    }
    let state = words.next()?;
    let begins = matches!(state, "NONE" | "SYN_SENT" | "SYN_RECV" | "INIT1" | "INIT" | "COOKIE_SENT");
    let lasts = matches!(state, "ESTABLISHED" | "UDP");
    Some(Connection {
        protocol,
        client,
        service,
        destination,
        answered: !begins,
        ending: !begins && !lasts,
    })
}

/// An address as hexadecimal digits, with colons between those of IPv6, and in brackets or not.
fn address(word: &str) -> Option<IpAddr> {
    let word = word.trim_start_matches('[').trim_end_matches(']');
    if word.contains(':') {
        return word.parse::<Ipv6Addr>().ok().map(IpAddr::V6);
    }
    u32::from_str_radix(word, 16).ok().map(|bits| Ipv4Addr::from(bits).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_read_and_what_is_none_is_passed_over() {
        let line = "TCP 0A090005 9C40 0A090002 0050 0A090006 1F90 ESTABLISHED     899";
        let connection = parse(line).unwrap();
        assert_eq!(connection.to_string(), "tcp 10.9.0.5:40000 -> 10.9.0.2:80 -> 10.9.0.6:8080");
        assert_eq!((connection.answered, connection.ending), (true, false));
        let line = "UDP fd00:0009:0000:0000:0000:0000:0000:0005 9C40 \
                    fd00:0009:0000:0000:0000:0000:0000:0002 0035 \
                    fd00:0009:0000:0000:0000:0000:0000:0006 0035 UDP             299";
        let connection = parse(line).unwrap();
        assert_eq!(connection.client, "[fd00:9::5]:40000".parse().unwrap());
        assert_eq!((connection.protocol, connection.ending), (Protocol::Udp, false));
        let states = [("SYN_RECV", (false, false)), ("FIN_WAIT", (true, true))];
        for (state, expected) in states {
            let line = format!("TCP 0A090005 9C40 0A090002 0050 0A090006 1F90 {state} 9");
            let connection = parse(&line).unwrap();
            assert_eq!((connection.answered, connection.ending), expected, "{state}");
        }
        for line in [
            "Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData",
            "TCP 0A090005 0000 0A090002 0050 0A090006 1F90 NONE     359",
            "IP  0A090005 0000 00000001 0000 0A090006 0000 NONE     359",
            "TCP 0A090005 9C40",
            "",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
