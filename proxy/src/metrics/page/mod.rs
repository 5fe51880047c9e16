//! The status page: one document with its styles and its script, both part of the program.
//!
//! The parts of the script are one ECMAScript module, in this order, so that they share their names and no others.

mod snapshot;
pub(super) mod viewers;

use http_body_util::{BodyExt, Full};
use hyper::header::{CONTENT_SECURITY_POLICY, HeaderName, HeaderValue, REFERRER_POLICY, RETRY_AFTER};
use hyper::{Response, StatusCode};

use self::viewers::{MOST_VIEWERS, Viewers};
use super::response::{Body, of_type, text};

/// What `<style>` contains.
macro_rules! style {
    () => {
        concat!("\n", include_str!("web/page.css"))
    };
}

/// What `<script>` contains.
macro_rules! script {
    () => {
        concat!(
            "\n",
            include_str!("web/format.js"),
            include_str!("web/dom.js"),
            include_str!("web/series.js"),
            include_str!("web/store.js"),
            include_str!("web/feed.js"),
            include_str!("web/table.js"),
            include_str!("web/mappings.js"),
            include_str!("web/connections.js"),
            include_str!("web/errors.js"),
            include_str!("web/process.js"),
            include_str!("web/details.js"),
            include_str!("web/main.js"),
        )
    };
}

/// The document.
const PAGE: &str = concat!(
    include_str!("web/head.html"),
    "<style>",
    style!(),
    "</style>\n",
    include_str!("web/body.html"),
    "<script type=\"module\">",
    script!(),
    "</script>\n</body>\n</html>\n",
);

/// The Content-Security-Policy of the document (<https://www.w3.org/TR/CSP3/>): its own style and script, by their
/// hashes, requests to where it is from, and nothing else. No text can become markup (Trusted Types).
const POLICY: &str = "default-src 'none'; \
    script-src 'sha256-ozbqy6QGfjh4G9U41iJaWVqn89tZDKT7ucmfnYxD+KI='; \
    style-src 'sha256-0zeZ1X5cRGJCx3ZK4eL99VyA4WLJyhlG64COSGZtrzk='; \
    connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
    require-trusted-types-for 'script'; trusted-types 'none'";

/// The headers of the document, beside those of all responses. Documents of other origins get no reference to its window.
const HEADERS: [(HeaderName, &str); 4] = [
    (CONTENT_SECURITY_POLICY, POLICY),
    (REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// The response with the document.
pub(super) fn document() -> Response<Body> {
    let mut response = of_type("text/html; charset=utf-8", Full::from(PAGE).boxed_unsync());
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// The response with the events of another viewer.
pub(super) async fn events(viewers: &Viewers) -> Response<Body> {
    if let Some(events) = viewers.admit().await {
        return of_type("text/event-stream", events.boxed_unsync());
    }
    let message = format!("{MOST_VIEWERS} viewers are connected already\n");
    let mut response = text(StatusCode::SERVICE_UNAVAILABLE, message);
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
    response
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::state::stats::FailureKind;

    #[test]
    fn the_policy_allows_the_style_and_the_script_of_the_page_and_no_others() {
        for (directive, text) in [("script-src", script!()), ("style-src", style!())] {
            let allowed = format!(" {directive} 'sha256-{}';", STANDARD.encode(Sha256::digest(text)));
            assert!(POLICY.contains(&allowed), "after a change, write{allowed} in POLICY");
        }
        assert!(!POLICY.contains("unsafe"));
        assert_eq!((PAGE.matches("<script").count(), PAGE.matches("<style").count()), (1, 1));
        assert!(!PAGE.contains(" style=\"") && !PAGE.contains(" onclick"), "the policy would block them");
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        // Names of specifications are no addresses that a browser would load.
        let page = PAGE.replace("http://www.w3.org/2000/svg", "");
        for loads in ["http://", "https://", "//cdn", "@import", "url("] {
            assert!(!page.contains(loads), "{loads}");
        }
    }

    #[test]
    fn every_error_has_an_explanation() {
        for kind in FailureKind::ALL {
            let entry = format!("  {}: [", kind.as_str());
            assert!(script!().contains(&entry), "{entry}… is not in REASONS of errors.js");
        }
    }

    #[test]
    fn no_text_is_parsed_as_markup() {
        for sink in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "srcdoc"] {
            assert!(!script!().contains(sink), "{sink}");
        }
    }
}
