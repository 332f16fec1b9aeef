//! What keeps web pages away from the API.
//!
//! A browser on the operator's machine reaches a loopback address too, so any page that it shows
//! could try. Three rules stop them. A request whose `Host` is a name that was not configured is
//! refused: that is how a page gets around the same-origin rule (DNS rebinding), and it has to use
//! a name of its own for that, never an IP address. A request with another page's `Origin` is
//! refused. And POST takes nothing but JSON, which a page cannot send elsewhere without a preflight
//! request, which is not answered.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::App;
use super::error::ApiError;

pub(super) async fn check(State(app): State<App>, request: Request, next: Next) -> Response {
    // A probe learns nothing but that the process lives, and may use any name.
    if request.uri().path() != "/healthz"
        && let Err(error) = admit(&request, &app.names)
    {
        return error.into_response();
    }
    next.run(request).await
}

fn admit<B>(request: &axum::http::Request<B>, names: &[String]) -> Result<(), ApiError> {
    let authority = match request.uri().authority() {
        // HTTP/2 has the host here.
        Some(authority) => authority.clone(),
        None => single(request.headers(), header::HOST.as_str())
            .and_then(|host| host.parse().ok())
            .ok_or_else(|| ApiError::invalid("the request has no usable Host header"))?,
    };
    if !is_admitted(&authority, names) {
        let text = format!(
            "the host name `{}` is not one of this console; add it to console.names, or use the \
             IP address",
            authority.host()
        );
        return Err(ApiError::new(StatusCode::FORBIDDEN, "foreign_host", text));
    }
    if request.headers().contains_key(header::ORIGIN) {
        let own = single(request.headers(), header::ORIGIN.as_str()).is_some_and(|origin| {
            let origin = origin.strip_prefix("http://").or(origin.strip_prefix("https://"));
            origin.is_some_and(|origin| origin.eq_ignore_ascii_case(authority.as_str()))
        });
        if !own {
            let text = "requests from other web pages are refused";
            return Err(ApiError::new(StatusCode::FORBIDDEN, "foreign_origin", text));
        }
    }
    if request.method() == Method::POST && !is_json(request.headers()) {
        let text = "POST takes content-type: application/json";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "content_type", text));
    }
    Ok(())
}

fn is_admitted(authority: &Authority, names: &[String]) -> bool {
    let host = authority.host();
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    address.parse::<IpAddr>().is_ok()
        || host.eq_ignore_ascii_case("localhost")
        || names.iter().any(|name| host.eq_ignore_ascii_case(name))
}

fn is_json(headers: &HeaderMap) -> bool {
    single(headers, header::CONTENT_TYPE.as_str()).is_some_and(|value| {
        let essence = value.split(';').next().unwrap_or_default().trim();
        essence.eq_ignore_ascii_case("application/json")
    })
}

/// The header's value where it is there once, as text.
fn single<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_origins_and_content_types() {
        #[track_caller]
        fn check(method: Method, headers: &[(&str, &str)], expected: Result<(), u16>) {
            let mut request = axum::http::Request::builder().method(method.clone()).uri("/");
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let request = request.body(()).unwrap();
            let names = ["sluicebox.internal".to_owned()];
            let actual = admit(&request, &names).map_err(|e| e.into_response().status().as_u16());
            assert_eq!(actual, expected, "{method} {headers:?}");
        }
        for host in [
            "127.0.0.1:7070",
            "10.1.2.3",
            "[::1]:7070",
            "localhost:7070",
            "LOCALHOST",
            "Sluicebox.internal:7070",
        ] {
            check(Method::GET, &[("host", host)], Ok(()));
        }
        for host in
            ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "sluicebox"]
        {
            check(Method::GET, &[("host", host)], Err(403));
        }
        check(Method::GET, &[], Err(400));
        check(Method::GET, &[("host", "a b")], Err(400));
        check(Method::GET, &[("host", "localhost"), ("host", "evil.example")], Err(400));

        let host = ("host", "localhost:7070");
        check(Method::GET, &[host, ("origin", "http://localhost:7070")], Ok(()));
        check(Method::GET, &[host, ("origin", "https://localhost:7070")], Ok(()));
        for origin in ["null", "http://localhost", "http://localhost:8080", "http://evil.example"] {
            check(Method::GET, &[host, ("origin", origin)], Err(403));
        }

        check(Method::POST, &[host], Err(415));
        check(Method::POST, &[host, ("content-type", "application/json")], Ok(()));
        check(Method::POST, &[host, ("content-type", "Application/JSON; charset=utf-8")], Ok(()));
        for kind in ["text/plain", "application/x-www-form-urlencoded", "application/jsonx"] {
            check(Method::POST, &[host, ("content-type", kind)], Err(415));
        }
    }
}
