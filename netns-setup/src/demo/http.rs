//! A minimal HTTP server and client for the demonstration.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

/// Longer than any response on one machine takes; only waited for when packets are dropped on purpose.
const LIMIT: Duration = Duration::from_secs(2);

/// Responds to every request with `text` and the client's address, until the process ends.
pub(super) fn serve(listener: TcpListener, text: &'static str) {
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Errors of a client that disconnects early are ignored.
            drop(answer(stream, text));
        }
    });
}

fn answer(mut stream: TcpStream, text: &str) -> io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    let client = stream.peer_addr()?.ip().to_canonical();
    for line in BufReader::new(&stream).lines() {
        if line?.is_empty() {
            break;
        }
    }
    let body = format!("{text}, {client}\n");
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// Fetches the page at `address`; returns its status line and body.
pub(super) fn fetch(address: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    write!(stream, "GET / HTTP/1.0\r\nHost: {}\r\n\r\n", address.ip())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.lines().next().unwrap_or_default();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    Ok(format!("{status}: {}", body.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_served_is_fetched() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        serve(listener, "hello");
        assert_eq!(fetch(address).unwrap(), "HTTP/1.0 200 OK: hello, 127.0.0.1");
    }
}
