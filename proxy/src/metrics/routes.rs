//! The paths that are served, and the errors of HTTP.

use std::net::IpAddr;
use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HOST, HeaderValue, VARY};
use hyper::http::uri::Authority;
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::time::timeout;

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

/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

const NOT_FOUND: &str = "not found; there are /, /events, /api/connections, /metrics, /healthz and /readyz\n";

const TOO_LARGE: &str = "the body is too large; none is needed\n";

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
    pub(super) async fn answer(&self, mut request: Request<Incoming>) -> Response<Body> {
        if let Some(refusal) = refusal(&request) {
            return refusal;
        }
        if self.is_loopback && is_for_a_name(&request) {
            return closing(text(
                StatusCode::MISDIRECTED_REQUEST,
                "ask for this server by its address, or as localhost\n",
            ));
        }
        match read_body(request.body_mut()).await {
            Ok(()) => self.route(&request).await,
            Err(refusal) => refusal,
        }
    }

    async fn route(&self, request: &Request<Incoming>) -> Response<Body> {
        let Self { source, viewers, .. } = self;
        match request.uri().path() {
            "/" => page::document(),
            "/events" => page::events(viewers).await,
            "/api/connections" => {
                connections::answer(request.uri().query().unwrap_or_default(), source).await
            }
            "/metrics" => match source.snapshot().await {
                Ok(snapshot) => metrics(snapshot, Format::preferred(request.headers())),
                Err(error) => unavailable(error),
            },
            "/healthz" => check(source.check_live().await),
            "/readyz" => check(source.check_ready().await),
            _ => text(StatusCode::NOT_FOUND, NOT_FOUND),
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
/// browser lets it read what is served there (DNS rebinding); a request for an address is not from such a page. The host may
/// be in the target, too, where it is the one that counts (RFC 9112, section 3.2.2).
fn is_for_a_name<B>(request: &Request<B>) -> bool {
    let named = request.headers().get(HOST).map(|host| host.to_str().ok()?.parse::<Authority>().ok());
    let target = request.uri().authority().cloned().map(Some);
    named.into_iter().chain(target).any(|authority| match authority {
        Some(authority) => is_name(authority.host()),
        None => true,
    })
}

fn is_name(host: &str) -> bool {
    let is_address = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
    !is_address && !host.eq_ignore_ascii_case("localhost")
}

/// The response to a request that no path accepts.
fn refusal<B: hyper::body::Body>(request: &Request<B>) -> Option<Response<Body>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut refusal = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are allowed\n");
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Some(closing(refusal));
    }
    // RFC 9112, section 3.2: who is asked has to be clear.
    let hosts = request.headers().get_all(HOST).iter().count();
    if hosts > 1 || (hosts == 0 && request.version() == Version::HTTP_11) {
        return Some(closing(text(StatusCode::BAD_REQUEST, "one Host header is needed\n")));
    }
    let length = request.body().size_hint().exact();
    (length.is_some_and(|length| length > LONGEST_BODY))
        .then(|| closing(text(StatusCode::PAYLOAD_TOO_LARGE, TOO_LARGE)))
}

/// Reads the body of a request, which means nothing. Without a length, it is known to be too large only then.
async fn read_body(body: &mut Incoming) -> Result<(), Response<Body>> {
    let most = usize::try_from(LONGEST_BODY).unwrap_or(usize::MAX);
    let (status, reason) = match timeout(BODY_TIMEOUT, Limited::new(body, most).collect()).await {
        Ok(Ok(_body)) => return Ok(()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => (StatusCode::PAYLOAD_TOO_LARGE, TOO_LARGE),
        Ok(Err(_broken)) => (StatusCode::BAD_REQUEST, "the body is malformed\n"),
        Err(_elapsed) => (StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time\n"),
    };
    Err(closing(text(status, reason)))
}

/// Ends the connection after a response, because the rest of the request is not read.
fn closing(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(target: &str, hosts: &[&'static str]) -> Request<String> {
        let mut request = Request::new(String::new());
        *request.uri_mut() = target.parse().unwrap();
        for host in hosts {
            request.headers_mut().append(HOST, HeaderValue::from_static(host));
        }
        request
    }

    #[test]
    fn a_server_on_loopback_is_asked_by_its_address_or_as_localhost() {
        for host in ["127.0.0.1:9464", "127.0.0.1", "[::1]:9464", "localhost:9464", "LOCALHOST"] {
            assert!(!is_for_a_name(&request("/", &[host])), "{host}");
            let target = format!("http://{host}/metrics");
            assert!(!is_for_a_name(&request(&target, &[host])), "{target}");
        }
        for host in [
            "rebound.example:9464",
            "localhost.example",
            "127.0.0.1.example",
            "",
            "a b",
            "x@127.0.0.1.example",
        ] {
            assert!(is_for_a_name(&request("/", &[host])), "{host}");
        }
        let target = "http://rebound.example/metrics";
        assert!(is_for_a_name(&request(target, &["127.0.0.1"])), "the target counts");
        assert!(is_for_a_name(&request(target, &[])));
        assert!(is_for_a_name(&request("http://127.0.0.1/", &["rebound.example"])));
        assert!(!is_for_a_name(&request("/", &[])), "HTTP/1.0 need not say");
    }

    #[test]
    fn a_request_names_one_host() {
        let status = |hosts, version| {
            let mut request = request("/", hosts);
            *request.version_mut() = version;
            refusal(&request).map(|refusal| refusal.status())
        };
        let bad = Some(StatusCode::BAD_REQUEST);
        assert_eq!(status(&["127.0.0.1"], Version::HTTP_11), None);
        assert_eq!(status(&[], Version::HTTP_10), None);
        assert_eq!(status(&[], Version::HTTP_11), bad);
        for version in [Version::HTTP_10, Version::HTTP_11] {
            assert_eq!(status(&["127.0.0.1", "127.0.0.1"], version), bad);
            assert_eq!(status(&["127.0.0.1", "rebound.example"], version), bad);
        }
    }
}
