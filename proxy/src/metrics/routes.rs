//! The paths that are served, and the errors of HTTP.

use std::net::IpAddr;

use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HOST, HeaderMap, HeaderValue, VARY};
use hyper::http::uri::Authority;
use hyper::{Method, Request, Response, StatusCode};

use super::connections;
use super::exposition::Exposition;
use super::format::Format;
use super::page;
use super::page::viewers::Viewers;
use super::response::{Body, text};
use super::snapshot::Snapshot;
use super::source::{Source, SourceError};

/// The maximum length of a request's body, in bytes. No request needs one.
const LONGEST_BODY: u64 = 16 * 1024;

/// What answers requests.
#[derive(Clone, Debug)]
pub(super) struct Routes {
    source: Source,
    viewers: Viewers,
    /// Whether only programs on this machine can ask.
    is_loopback: bool,
}

impl Routes {
    /// Answers from `source`, if `is_loopback` only programs on this machine.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(super) fn new(source: Source, is_loopback: bool) -> Self {
        Self { viewers: Viewers::start(source.clone()), source, is_loopback }
    }

    /// Answers a request.
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        match refusal(&request) {
            Some(refusal) => refusal,
            None if self.is_loopback && is_for_a_name(request.headers()) => {
                text(StatusCode::MISDIRECTED_REQUEST, "ask for this server by its address, or as localhost\n")
            }
            None => self.route(&request).await,
        }
    }

    async fn route(&self, request: &Request<Incoming>) -> Response<Body> {
        let Self { source, viewers, .. } = self;
        match request.uri().path() {
            "/" => page::document(),
            "/events" => page::events(viewers),
            "/api/connections" => {
                connections::answer(request.uri().query().unwrap_or_default(), source).await
            }
            "/metrics" => match source.snapshot().await {
                Ok(snapshot) => metrics(snapshot, Format::preferred(request.headers())),
                Err(error) => unavailable(error),
            },
            "/healthz" => check(source.check_live().await),
            "/readyz" => check(source.check_ready().await),
            _ => text(StatusCode::NOT_FOUND, "not found; there are /, /metrics, /healthz and /readyz\n"),
        }
    }
}

fn metrics(snapshot: Snapshot, format: Format) -> Response<Body> {
    let body = Exposition::new(snapshot, format).boxed_unsync();
    let mut response = text(StatusCode::OK, "").map(|_none| body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    response.headers_mut().insert(VARY, HeaderValue::from_static("Accept"));
    response
}

fn check(result: Result<(), SourceError>) -> Response<Body> {
    match result {
        Ok(()) => text(StatusCode::OK, "ok\n"),
        Err(error) => unavailable(error),
    }
}

fn unavailable(error: SourceError) -> Response<Body> {
    text(StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n"))
}

/// Whether a request is for a host with a name. A web page can have a name of its own lead to 127.0.0.1, after which the
/// browser lets it read what is served there (DNS rebinding); a request for an address is not from such a page.
fn is_for_a_name(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(HOST) else { return false };
    let authority = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok());
    let Some(host) = authority.as_ref().map(Authority::host) else { return true };
    let is_address = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
    !is_address && !host.eq_ignore_ascii_case("localhost")
}

/// The response to a request that no path accepts.
fn refusal(request: &Request<Incoming>) -> Option<Response<Body>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut refusal = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are allowed\n");
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Some(closing(refusal));
    }
    // Without a length, the body is read up to the buffer of the connection, and no further.
    let length = request.body().size_hint().exact();
    (length.is_some_and(|length| length > LONGEST_BODY))
        .then(|| closing(text(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large; none is needed\n")))
}

/// Ends the connection after a response, because the rest of the request is not read.
fn closing(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_on_loopback_is_asked_by_its_address_or_as_localhost() {
        let is_for_a_name = |host: &'static str| {
            is_for_a_name(&HeaderMap::from_iter([(HOST, HeaderValue::from_static(host))]))
        };
        for host in ["127.0.0.1:9464", "127.0.0.1", "[::1]:9464", "localhost:9464", "LOCALHOST"] {
            assert!(!is_for_a_name(host), "{host}");
        }
        for host in [
            "rebound.example:9464",
            "localhost.example",
            "127.0.0.1.example",
            "",
            "a b",
            "x@127.0.0.1.example",
        ] {
            assert!(is_for_a_name(host), "{host}");
        }
        assert!(!super::is_for_a_name(&HeaderMap::new()), "HTTP/1.0 need not say");
    }
}
