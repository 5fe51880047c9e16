//! The paths that are served, and the errors of HTTP.

use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body as _, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::{Method, Request, Response, StatusCode};

use super::source::Source;

/// The maximum length of a request's body, in bytes. No request needs one.
const LONGEST_BODY: u64 = 16 * 1024;

/// The body of a response.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Answers a request.
pub(super) async fn answer(request: Request<Incoming>, source: Source) -> Response<Body> {
    if let Some(refusal) = refusal(&request) {
        return refusal;
    }
    match request.uri().path() {
        "/healthz" => match source.check_pulse().await {
            Ok(()) => text(StatusCode::OK, "ok\n"),
            Err(error) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
        },
        _ => text(StatusCode::NOT_FOUND, "not found; there is /healthz\n"),
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

/// A response of plain text.
pub(super) fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(text.into()).boxed_unsync());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
