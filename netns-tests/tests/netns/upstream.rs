//! A name server that does what a test tells it to.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use world::Space;

/// A name server in a namespace that answers as it is told.
pub(crate) struct Upstream {
    end: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<String>>>,
    threads: Vec<JoinHandle<()>>,
}

/// What is sent back for a query, by datagram or (`true`) by stream.
type Answering = dyn Fn(&[u8], bool) -> Vec<Vec<u8>> + Send + Sync;

impl Upstream {
    pub fn start(
        space: &Space,
        address: &str,
        answer: impl Fn(&[u8], bool) -> Vec<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        let (udp, tcp) = space.enter(|| {
            (
                UdpSocket::bind(address).expect("it is free"),
                TcpListener::bind(address).expect("it is free"),
            )
        });
        let (end, asked): (Arc<AtomicBool>, Arc<Mutex<Vec<String>>>) = Default::default();
        udp.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let answer: Arc<Answering> = Arc::new(answer);
        let datagrams = {
            let (end, asked, answer) = (end.clone(), asked.clone(), answer.clone());
            move || {
                let mut buffer = [0; 2048];
                while !end.load(Ordering::Relaxed) {
                    let Ok((length, client)) = udp.recv_from(&mut buffer) else { continue };
                    asked.lock().unwrap().push(name_of(&buffer[..length]));
                    for message in answer(&buffer[..length], false) {
                        udp.send_to(&message, client).unwrap();
                    }
                }
            }
        };
        let stop = end.clone();
        let streams = move || {
            while !stop.load(Ordering::Relaxed) {
                let Ok((mut stream, _)) = tcp.accept() else {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                };
                stream.set_nonblocking(false).unwrap();
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
                stream.read_exact(&mut query).unwrap();
                for message in answer(&query, true) {
                    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
                    stream.write_all(&[&length[..], &message].concat()).unwrap();
                }
            }
        };
        let threads = vec![std::thread::spawn(datagrams), std::thread::spawn(streams)];
        Self { end, asked, threads }
    }

    /// The names that were asked for by datagrams.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Where a message's name ends.
pub(crate) fn name_end(message: &[u8]) -> usize {
    let mut at = 12;
    while message[at] != 0 {
        at += usize::from(message[at]) + 1;
    }
    at + 1
}

/// The name that is asked for, in lower case.
pub(crate) fn name_of(message: &[u8]) -> String {
    let (mut at, mut labels) = (12, Vec::new());
    while message[at] != 0 {
        let end = at + 1 + usize::from(message[at]);
        labels.push(String::from_utf8_lossy(&message[at + 1..end]).to_lowercase());
        at = end;
    }
    labels.join(".")
}

/// An answer with so many addresses 192.0.2.`last`, or the code of an error.
pub(crate) fn answered(query: &[u8], count: u16, last: u8, code: u8) -> Vec<u8> {
    let mut message = query[..name_end(query) + 4].to_vec();
    message[2] |= 0x80;
    message[3] = 0x80 | code;
    message[6..8].copy_from_slice(&count.to_be_bytes());
    message[8..12].fill(0);
    for _ in 0..count {
        message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, last]);
    }
    message
}
