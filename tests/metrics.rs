//! The TCP port of the metrics: it has nothing else, and no request holds it up.

#[path = "support/memory.rs"]
mod memory;

use std::sync::Arc;
use std::time::Duration;

use memory::Agent;
use netctl::api::server;
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};

/// Serves the metrics on a TCP port of this machine's own, sends bytes, and gives what comes until the
/// end.
async fn from_the_port(bytes: &[u8]) -> String {
    let agent = Agent::start();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = agent.memory.clone() as Arc<_>;
    let server = tokio::spawn(server::serve_metrics(listener, service, std::future::pending()));
    let answer = exchange(TcpStream::connect(address).await.unwrap(), bytes).await;
    server.abort();
    answer
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) -> String {
    // What is refused early may not be read to its end.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut answer));
    let _ = read.await.expect("the connection was not ended");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn the_port_says_what_the_socket_says() {
    let agent = Agent::start();
    let request = b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let socket = exchange(UnixStream::connect(&agent.socket).await.unwrap(), request).await;
    let port = from_the_port(request).await;
    let body = |answer: &str| answer.split_once("\r\n\r\n").unwrap().1.to_owned();
    assert!(body(&port).starts_with("# TYPE netctl_build_info gauge"), "{port}");
    assert_eq!(body(&port), body(&socket));
}

#[tokio::test]
async fn the_port_of_the_metrics_has_nothing_else() {
    let ask = async |method: &str, path: &str| {
        from_the_port(format!("{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await
    };
    let answer = ask("GET", "/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("# EOF\n"), "{answer}");
    assert!(answer.contains("netctl_build_info{version=\"0.1.0\"} 1"), "{answer}");
    assert!(ask("HEAD", "/metrics").await.starts_with("HTTP/1.1 200"));
    for path in ["/", "/metrics/", "/metrics/x", "/v1/version", "/v1/networks", "/../metrics", "*"] {
        let answer = ask("GET", path).await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{path}: {answer}");
    }
    for method in ["POST", "DELETE", "BREW"] {
        let answer = ask(method, "/metrics").await;
        assert!(answer.starts_with("HTTP/1.1 405"), "{method}: {answer}");
    }
    assert!(ask("DELETE", "/v1/networks/web").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn the_port_of_the_metrics_reads_no_large_request() {
    let long = format!("GET /metrics HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "x".repeat(100_000));
    assert!(!from_the_port(long.as_bytes()).await.contains("200 OK"));
    let path = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "x".repeat(100_000));
    assert!(!from_the_port(path.as_bytes()).await.contains("200 OK"));
    // A body is not waited for.
    let body = "GET /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\nx";
    assert!(from_the_port(body.as_bytes()).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test(start_paused = true)]
async fn a_connection_to_the_port_of_the_metrics_ends_in_time() {
    assert_eq!(from_the_port(b"").await, "");
    assert!(!from_the_port(b"GET /metrics HTTP/1.1\r\nhost: x\r\n").await.contains("200 OK"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_bytes_bring_down_the_port_of_the_metrics(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        head in prop_oneof![Just(""), Just("GET "), Just("GET /metrics HTTP/1.1\r\n")],
    ) {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().start_paused(true).build().unwrap().block_on(async {
            let bytes = [head.as_bytes(), &bytes, b"\r\n\r\n"].concat();
            let answer = from_the_port(&bytes).await;
            assert!(answer.is_empty() || answer.starts_with("HTTP/1."), "{answer}");
        });
    }
}
