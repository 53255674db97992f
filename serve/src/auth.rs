//! What requests show of who asks: tokens, and where a browser's page came from.

use std::net::IpAddr;

use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, header};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::error::{Code, Error};

/// A token that a request shows.
pub struct Shown {
    /// As it came.
    pub token: String,
    /// Whether browsers add it by themselves.
    pub by_browser: bool,
}

/// The token that headers show: `Authorization: Bearer TOKEN`, `Api-Key`, or `Basic`, as the password of any user.
pub fn shown(headers: &HeaderMap) -> Option<Shown> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, shown) = value.split_once(' ')?;
    let is = |known: &str| scheme.eq_ignore_ascii_case(known);
    let shown = shown.trim();
    match () {
        () if is("Bearer") || is("Api-Key") => {
            Some(Shown { token: shown.to_owned(), by_browser: false })
        }
        () if is("Basic") => {
            Some(Shown { token: password(shown).unwrap_or_default(), by_browser: true })
        }
        () => None,
    }
}

/// The password of HTTP's `Basic` scheme.
fn password(shown: &str) -> Option<String> {
    let text = String::from_utf8(STANDARD.decode(shown).ok()?).ok()?;
    text.split_once(':').map(|(_, password)| password.to_owned())
}

/// Refuses web pages: where there is no token, any page that a browser on this machine shows could
/// ask otherwise. Robots send no `Origin`, or that of this server, as its own page does.
///
/// # Errors
/// [`Code::ForbiddenOrigin`].
pub fn check_origin(headers: &HeaderMap) -> Result<(), Error> {
    match headers.get(header::ORIGIN) {
        None => Ok(()),
        Some(origin) if is_own(origin, headers.get(header::HOST)) => Ok(()),
        Some(origin) => {
            let message = format!("{origin:?} is a web page of another site");
            let hint = "with --token-file or --client-tokens, pages that send `Authorization: Bearer` are served; \
                        websocket-client sends no origin with suppress_origin=True";
            Err(Error::new(Code::ForbiddenOrigin, message).hint(hint))
        }
    }
}

/// Refuses to show robots' pictures to pages of other sites. Browsers send no `Origin` with a page's requests to its
/// own server, so that [`check_origin`] does not see a page whose owner has given its name our address.
///
/// # Errors
/// [`Code::ForbiddenOrigin`].
pub fn check_page(headers: &HeaderMap) -> Result<(), Error> {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let host = host.and_then(|host| host.parse::<Authority>().ok());
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    if !site.is_none_or(|site| [&b"same-origin"[..], b"none"].contains(&site)) {
        let message = "the page of another site asks, and this server has no token";
        return Err(Error::new(Code::ForbiddenOrigin, message));
    }
    if !host.as_ref().is_some_and(|host| is_address(host.host())) {
        let message = "without a token, the page is shown at this machine's address alone";
        let hint = "open it as http://127.0.0.1:8000, or as the machine's address; or start the server with --token-file";
        return Err(Error::new(Code::ForbiddenOrigin, message).hint(hint));
    }
    Ok(())
}

/// Whether a host is named by its address, or is this machine: no page's owner can choose what that is.
fn is_address(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    address.is_ok() || host.eq_ignore_ascii_case("localhost")
}

/// Whether the origin is the server that was asked, as Python's websocket-client has it.
///
/// The server must have been asked by its address: a page's owner can give the page's name our address
/// once the page is loaded, and the two are then the same.
fn is_own(origin: &HeaderValue, host: Option<&HeaderValue>) -> bool {
    let authority = |text: &str| text.parse::<Authority>().ok();
    let origin = origin.to_str().ok().and_then(|origin| authority(origin.strip_prefix("http://")?));
    let host = host.and_then(|host| authority(host.to_str().ok()?));
    let (Some(origin), Some(host)) = (origin, host) else { return false };
    let port = |authority: &Authority| authority.port_u16().unwrap_or(80);
    origin.host().eq_ignore_ascii_case(host.host())
        && port(&origin) == port(&host)
        && is_address(host.host())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn web_pages_are_refused() {
        let mut headers = HeaderMap::new();
        assert!(check_origin(&headers).is_ok());
        headers.insert(header::ORIGIN, "https://example.org".parse().unwrap());
        assert_eq!(check_origin(&headers).unwrap_err().code, Code::ForbiddenOrigin);
    }

    #[test]
    fn the_page_is_shown_to_this_server_s_own_page_by_its_address() {
        let check = |host: &str, site: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().unwrap());
            site.map(|site| headers.insert("sec-fetch-site", site.parse().unwrap()));
            check_page(&headers)
        };
        for host in ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "192.168.1.7"] {
            for site in [None, Some("same-origin"), Some("none")] {
                assert!(check(host, site).is_ok(), "{host} {site:?}");
            }
            for site in ["cross-site", "same-site", ""] {
                assert_eq!(check(host, Some(site)).unwrap_err().code, Code::ForbiddenOrigin);
            }
        }
        for host in ["example.org", "example.org:8000", "127.0.0.1.example.org", "localhost.x"] {
            assert!(check(host, Some("same-origin")).is_err(), "{host} may be anyone's");
        }
        assert!(check_page(&HeaderMap::new()).is_err());
    }

    #[test]
    fn the_server_itself_is_no_web_page_and_a_page_of_its_name_is() {
        let check = |origin: &str, host: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ORIGIN, origin.parse().unwrap());
            host.map(|host| headers.insert(header::HOST, host.parse().unwrap()));
            check_origin(&headers).is_ok()
        };
        for (origin, host) in [
            ("http://127.0.0.1:8000", "127.0.0.1:8000"),
            ("http://LocalHost:8000", "localhost:8000"),
            ("http://[::1]:8000", "[::1]:8000"),
            ("http://192.168.1.7", "192.168.1.7:80"),
        ] {
            assert!(check(origin, Some(host)), "{origin} at {host}");
        }
        for (origin, host) in [
            ("http://127.0.0.1:3000", Some("127.0.0.1:8000")),
            ("http://localhost:8000", Some("127.0.0.1:8000")),
            ("https://127.0.0.1:8000", Some("127.0.0.1:8000")),
            ("http://example.org:8000", Some("example.org:8000")),
            ("http://127.0.0.1.example.org", Some("127.0.0.1.example.org")),
            ("http://127.0.0.1", Some("127.0.0.1:8000")),
            ("null", Some("127.0.0.1:8000")),
            ("http://127.0.0.1:8000", None),
        ] {
            assert!(!check(origin, host), "{origin} at {host:?}");
        }
    }
}
