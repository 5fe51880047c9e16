//! `rproxy demo`: a real mapping to a built-in backend, without root or containers.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::{AddrError, BackendAddr, HostSocketAddr, Protocol};
use rproxy_sys::fd::close_unclaimed;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::bind::BoundPort;
use crate::bind::family::{everywhere, has_ipv6, has_ipv6_loopback};
use crate::bind::listen::{self, BindError};
use crate::engine::Server;
use crate::log::console;
use crate::runtime::new_runtime;
use crate::runtime::signals::StopSignals;
use crate::sandbox::{self, Mode, Needs, SandboxError};

/// The page that the built-in backend serves.
const PAGE: &str = "\
<!doctype html>
<html lang=\"en\"><meta charset=\"utf-8\"><title>rproxy</title>
<h1>It works</h1>
<p>This page comes from a backend on a loopback address. rproxy relayed it to you.</p>
</html>
";

/// The timeout of a request, which takes well under a millisecond on loopback.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// The maximum length of a request or response, in bytes.
const LONGEST: u64 = 16 * 1024;

/// Runs the demo; with `once`, exits after the fetches instead of serving until a signal.
pub fn main(once: bool) -> ExitCode {
    // A failure does not matter for a demo.
    close_unclaimed().ok();
    let result = new_runtime()
        .map_err(|error| DemoError::step("create the event loop")(error))
        .and_then(|runtime| runtime.block_on(run(once)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            console::err(&format_args!("rproxy: demo: {error}"));
            ExitCode::FAILURE
        }
    }
}

async fn run(once: bool) -> Result<(), DemoError> {
    let mut stop = StopSignals::catch(&[]).map_err(DemoError::step("catch signals"))?;
    let backend = start_backend()?;
    let bound = publish(backend)?;
    let addr = bound.local_addr().map_err(DemoError::step("ask for the published address"))?;
    let mut needs = Needs::to_serve([&bound.port_mapping]);
    // The process is its own client, too.
    needs.tcp_backends.push(addr.port());
    let server = Server::start_port(bound).map_err(DemoError::step("serve the mapping"))?;
    server.look_at_processors();
    let clients = clients(addr);
    sandbox::confine(Mode::Auto, &needs)?;
    server.announce();
    console::out(&format_args!("backend    a built-in web server on {backend}"));
    let note = if has_ipv6() { "" } else { " (this machine has no IPv6)" };
    console::out(&format_args!("mapping    {}/tcp -> {addr}{note}", backend.port()));

    for client in clients {
        let length = timeout(FETCH_TIMEOUT, fetch(client))
            .await
            .unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()))
            .map_err(DemoError::step("fetch the page through the mapping"))?;
        console::out(&format_args!("fetched    http://{client}/ through rproxy: 200 OK, {length} bytes"));
    }
    if !once {
        say_what_next(addr);
        stop.next().await;
    }
    server.drain(async { "the demo is over" }).await;
    Ok(())
}

fn say_what_next(addr: SocketAddr) {
    let port = addr.port();
    console::out(&format_args!(
        "
Serving until Ctrl-C. Try it:
  curl http://127.0.0.1:{port}/
Publish a container's port:
  rproxy --host '{}:8080' --to 172.17.0.2:80
Let dockerd use it, in /etc/docker/daemon.json:
  {{ \"userland-proxy-path\": \"/usr/local/bin/rproxy\" }}",
        everywhere()
    ));
}

/// Binds a free port for IPv4 and IPv6, or for IPv4 alone on a machine without IPv6 sockets.
fn publish(backend: SocketAddr) -> Result<BoundPort, DemoError> {
    let (host, backend) = (HostSocketAddr::new(everywhere(), 0), BackendAddr::try_from(backend)?);
    Ok(BoundPort::bind(PortMapping { protocol: Protocol::Tcp, host, backend, v6only: false })?)
}

/// The addresses to fetch from: loopback in each family that the mapping serves and the machine supports.
fn clients(published: SocketAddr) -> Vec<SocketAddr> {
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, published.port()));
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, published.port()));
    match published {
        SocketAddr::V6(_) if has_ipv6_loopback() => vec![v4, v6],
        _ => vec![v4],
    }
}

/// Fetches `/` from `addr` like a browser; returns the length of the page.
async fn fetch(addr: SocketAddr) -> io::Result<usize> {
    let mut stream = TcpStream::connect(addr).await?;
    let request = format!("GET / HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.take(LONGEST).read_to_string(&mut answer).await?;
    let body = answer
        .strip_prefix("HTTP/1.1 200 OK\r\n")
        .and_then(|rest| rest.split_once("\r\n\r\n"))
        .map(|(_headers, body)| body);
    if body != Some(PAGE) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "what arrived is not the page"));
    }
    Ok(PAGE.len())
}

/// Starts the web server on a free loopback port.
fn start_backend() -> Result<SocketAddr, DemoError> {
    let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listener = listen::bind_tcp(any_port, true)
        // Closing its connections ends them in order, as with other web servers.
        .and_then(|listener| SockRef::from(&listener).set_linger(None).map(|()| listener))
        .and_then(TcpListener::from_std)
        .map_err(DemoError::step("start the backend"))?;
    let addr = listener.local_addr().map_err(DemoError::step("start the backend"))?;
    tokio::spawn(async move {
        while let Ok((client, _peer)) = listener.accept().await {
            tokio::spawn(timeout(FETCH_TIMEOUT, answer(client)));
        }
    });
    Ok(addr)
}

/// Reads one request and responds with the page.
async fn answer(mut client: TcpStream) -> io::Result<()> {
    let mut request = Vec::new();
    let mut reader = (&mut client).take(LONGEST);
    while !request.ends_with(b"\r\n\r\n") {
        if reader.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        PAGE.len()
    );
    client.write_all(head.as_bytes()).await?;
    if !request.starts_with(b"HEAD ") {
        client.write_all(PAGE.as_bytes()).await?;
    }
    client.shutdown().await
}

/// Why the demo failed.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error(transparent)]
    Addr(#[from] AddrError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("cannot {step}: {source}")]
    Step { step: &'static str, source: io::Error },
}

impl DemoError {
    fn step(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Step { step, source }
    }
}
