//! The console: one page for a browser, served from the program itself.
//!
//! Three files without anything from elsewhere, so that it works where there is no network, and under a
//! policy that allows nothing else: no script or style in the page, no other origin, no frame around it.
//! It asks the same routes as everybody, so what [`guard`](super::guard) keeps out, it keeps out here:
//! another page can neither read what it shows nor press its buttons.
//!
//! Whatever comes from rows, S2 or transforms is put on the page as text. Values of a row come only when
//! an operator asks for those of one message.

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};

const PAGE: &str = include_str!("console/index.html");
const STYLE: &str = include_str!("console/console.css");
const SCRIPT: &str = include_str!("console/console.js");

/// The icon is empty, and in the page.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A page for a browser, and for everybody else what there is to ask.
pub(super) async fn root(headers: HeaderMap) -> Response {
    let accepts = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let is_browser = accepts.is_some_and(|accept| accept.contains("text/html"));
    let mut response = if is_browser {
        file("text/html; charset=utf-8", PAGE)
    } else {
        super::ROOT_TEXT.into_response()
    };
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("accept"));
    response
}

pub(super) async fn style() -> Response {
    file("text/css; charset=utf-8", STYLE)
}

pub(super) async fn script() -> Response {
    file("text/javascript; charset=utf-8", SCRIPT)
}

fn file(content_type: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ];
    (headers, text).into_response()
}
