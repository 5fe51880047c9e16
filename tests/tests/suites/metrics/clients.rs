//! Clients that misbehave.

use std::io::{Read, Write};
use std::net::TcpStream;

use testkit::client;
use testkit::{PATIENCE, eventually};

use super::http::{Response, get, get_on, get_with, send};
use super::prometheus::Scene;
use super::scrape::Scrape;

/// More than the connections that are kept.
const MOST: usize = 70;

pub(super) fn statuses() {
    let scene = Scene::start();
    let status = |request: &str| {
        let answer = send(scene.metrics, request.as_bytes());
        Response::parse(&answer)
            .map_or_else(|| String::from_utf8_lossy(&answer).into_owned(), |answer| answer.code().to_owned())
    };
    let close = "Host: 127.0.0.1\r\nConnection: close\r\n";
    let long = "a".repeat(20_000);
    for (request, expected) in [
        (format!("GET /healthz HTTP/1.1\r\n{close}\r\n"), "200"),
        (format!("GET /readyz HTTP/1.1\r\n{close}\r\n"), "200"),
        (format!("GET /metrics HTTP/1.1\r\n{close}\r\n"), "200"),
        ("GET /metrics HTTP/1.1\r\nHost: rebound.example\r\nConnection: close\r\n\r\n".to_owned(), "421"),
        (format!("GET /metrics?x=y HTTP/1.1\r\n{close}\r\n"), "200"),
        ("GET /metrics HTTP/1.0\r\n\r\n".to_owned(), "200"),
        (format!("GET /metrics/ HTTP/1.1\r\n{close}\r\n"), "404"),
        (format!("GET /../etc/passwd HTTP/1.1\r\n{close}\r\n"), "404"),
        (format!("GET /Metrics HTTP/1.1\r\n{close}\r\n"), "404"),
        (format!("POST /metrics HTTP/1.1\r\n{close}Content-Length: 1\r\n\r\nx"), "405"),
        (format!("DELETE /healthz HTTP/1.1\r\n{close}\r\n"), "405"),
        (format!("BREW / HTTP/1.1\r\n{close}\r\n"), "405"),
        (format!("GET /{long} HTTP/1.1\r\n{close}\r\n"), "431"),
        (format!("GET / HTTP/1.1\r\n{close}X: {long}\r\n\r\n"), "431"),
        (format!("GET / HTTP/1.1\r\n{close}{}\r\n", "X: y\r\n".repeat(1000)), "431"),
        (format!("GET /metrics HTTP/1.1\r\n{close}Content-Length: 100000\r\n\r\n"), "413"),
        (format!("GET /metrics HTTP/1.1\r\n{close}Content-Length: x\r\n\r\n"), "400"),
        ("GET\r\n\r\n".to_owned(), "400"),
        ("\u{16}\u{3}\u{1}hello\r\n\r\n".to_owned(), "400"),
    ] {
        let start = request.chars().take(60).collect::<String>();
        assert_eq!(status(&request), expected, "{start}");
    }
    let refused = send(scene.metrics, format!("PUT /metrics HTTP/1.1\r\n{close}\r\n").as_bytes());
    assert!(Response::parse(&refused).unwrap().headers.contains("allow: get, head"));
    for (path, has_length) in [("/healthz", true), ("/metrics", false)] {
        let head = send(scene.metrics, format!("HEAD {path} HTTP/1.1\r\n{close}\r\n").as_bytes());
        let head = Response::parse(&head).unwrap();
        assert_eq!((head.code(), head.body.as_str()), ("200", ""));
        assert_eq!(head.headers.contains("content-length: 3"), has_length);
    }
    // Several requests on a connection, one of which is chunked.
    let stream = client::connect(scene.metrics);
    for _ in 0..3 {
        assert!(get_on(&stream, "/healthz").starts_with("HTTP/1.1 200 OK"));
    }
    assert!(get_with(scene.metrics, "/metrics", "Accept: */*;q=x,,;\r\n").headers.contains("text/plain"));
}

pub(super) fn hosts_and_bodies() {
    let scene = Scene::start();
    let close = "Host: 127.0.0.1\r\nConnection: close\r\n";
    let long = "a".repeat(20_000);
    let (chunked, chunk) = ("Transfer-Encoding: chunked\r\n\r\n", format!("4e20\r\n{long}\r\n"));
    for (request, expected) in [
        (format!("GET http://rebound.example/metrics HTTP/1.1\r\n{close}\r\n"), "421"),
        (format!("GET /metrics HTTP/1.1\r\n{close}Host: rebound.example\r\n\r\n"), "400"),
        (format!("GET /metrics HTTP/1.1\r\n{close}Host: 127.0.0.1\r\n\r\n"), "400"),
        ("GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n".to_owned(), "400"),
        (format!("GET /metrics HTTP/1.1\r\n{close}{chunked}1\r\nx\r\n0\r\n\r\n"), "200"),
        (format!("GET /metrics HTTP/1.1\r\n{close}{chunked}{}0\r\n\r\n", chunk.repeat(60)), "413"),
        (format!("GET /metrics HTTP/1.1\r\n{close}{chunked}x\r\n"), "400"),
    ] {
        let answer = send(scene.metrics, request.as_bytes());
        let start = request.chars().take(100).collect::<String>();
        assert_eq!(Response::parse(&answer).expect(&start).code(), expected, "{start}");
    }
}

pub(super) fn slow_and_many() {
    let scene = Scene::start();
    // The first keeps its connection by asking for something, the others send no more than a part of a request.
    let partly = |_| {
        let stream = client::connect(scene.metrics);
        (&stream).write_all(b"GET /metrics HTTP/1.1\r\nHost:").unwrap();
        stream
    };
    let before = scene.proxy.process.descriptors();
    let slow: Vec<TcpStream> = (0..1000).map(partly).collect();
    assert_eq!(get(scene.metrics, "/healthz").code(), "200", "the oldest has made room");
    let open = scene.proxy.process.descriptors();
    assert!(open < before + MOST, "{open} descriptors, and {before} before");
    let scrape = Scrape::of(scene.metrics);
    assert_eq!(scrape.value("rproxy_mapping_connections_total{mapping=\"web\"}"), 1.0);
    for stream in &slow {
        stream.set_read_timeout(Some(2 * PATIENCE)).unwrap();
        let mut answer = Vec::new();
        // It ends, in order or not.
        match { stream }.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
        }
        assert!(!answer.starts_with(b"HTTP/1.1 200"));
    }
    eventually("all are gone", || scene.proxy.process.descriptors() <= before);
}

pub(super) fn exhausted() {
    let scene = Scene::start();
    let before = scene.proxy.process.descriptors();
    scene.proxy.process.limit_descriptors(before);
    let clients: Vec<_> = (0..3).map(|_| get(scene.metrics, "/readyz")).collect();
    assert!(clients.iter().all(|client| client.code() == "200"), "{clients:?}");
    let scrape = Scrape::of(scene.metrics);
    assert_eq!(scrape.value("rproxy_process_max_fds"), before as f64);
    scene.proxy.process.limit_descriptors(before + 100);
    assert_eq!(get(scene.metrics, "/readyz").code(), "200");
}
