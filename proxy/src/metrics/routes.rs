//! The paths that are served, and the errors of HTTP.

use hyper::body::{Body as _, Incoming};
use hyper::header::{ALLOW, CONNECTION, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};

use super::connections;
use super::page;
use super::page::viewers::Viewers;
use super::response::{Body, text};
use super::source::Source;

/// The maximum length of a request's body, in bytes. No request needs one.
const LONGEST_BODY: u64 = 16 * 1024;

/// What answers requests.
#[derive(Clone, Debug)]
pub(super) struct Routes {
    source: Source,
    viewers: Viewers,
}

impl Routes {
    /// Answers from `source`.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(super) fn new(source: Source) -> Self {
        Self { viewers: Viewers::start(source.clone()), source }
    }

    /// Answers a request.
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        match refusal(&request) {
            Some(refusal) => refusal,
            None => self.route(request.uri()).await,
        }
    }

    async fn route(&self, uri: &Uri) -> Response<Body> {
        let Self { source, viewers } = self;
        match uri.path() {
            "/" => page::document(),
            "/events" => page::events(viewers),
            "/api/connections" => connections::answer(uri.query().unwrap_or_default(), source).await,
            "/healthz" => match source.check_pulse().await {
                Ok(()) => text(StatusCode::OK, "ok\n"),
                Err(error) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
            },
            _ => text(StatusCode::NOT_FOUND, "not found; there are / and /healthz\n"),
        }
    }
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
