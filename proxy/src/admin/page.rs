//! `/`: the web page. One file without other assets, and a Content-Security-Policy that forbids any.
use std::time::SystemTime;

use http_body_util::Either;
use hyper::header::{CONTENT_SECURITY_POLICY, HeaderMap, HeaderValue};
use hyper::{StatusCode, body::Bytes};

use super::Answer;

/// The page. It gets its data from the other paths and writes it as text, never as HTML.
const HTML: &str = include_str!("page/page.html");

/// The page and its security headers.
pub(super) struct Page {
    policy: HeaderValue,
    /// Distinguishes the entity tags of this process from those of an earlier one.
    started: u128,
}

impl Page {
    /// Allows the page's own script and style by their digests, and nothing else.
    pub(super) fn new() -> Self {
        let digest = |element| {
            let digest = ring::digest::digest(&ring::digest::SHA256, inside(element).as_bytes());
            base64(digest.as_ref())
        };
        let policy = format!(
            "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; \
             img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            digest("script"),
            digest("style"),
        );
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self {
            // Base64 and the directives above are valid in a header.
            policy: HeaderValue::try_from(policy)
                .unwrap_or_else(|_| HeaderValue::from_static("default-src 'none'")),
            started: since.map_or(0, |since| since.as_nanos()),
        }
    }

    pub(super) fn answer(&self) -> Answer {
        Answer {
            status: StatusCode::OK,
            kind: "text/html; charset=utf-8",
            body: Either::Left(Bytes::from_static(HTML.as_bytes()).into()),
            tag: Some(self.tag(0)),
        }
    }

    /// The entity tag of this process's responses in this generation.
    pub(super) fn tag(&self, generation: u64) -> String {
        format!("\"{:x}-{generation}\"", self.started)
    }

    pub(super) fn guard(&self, headers: &mut HeaderMap) {
        headers.insert(CONTENT_SECURITY_POLICY, self.policy.clone());
    }
}

/// The text of the page's only element of this name; empty if there is none.
fn inside(element: &str) -> &'static str {
    let (opening, closing) = (format!("<{element}>"), format!("</{element}>"));
    let after = HTML.split_once(&opening).map_or("", |(_, after)| after);
    after.split_once(&closing).map_or("", |(text, _)| text)
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let at = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for place in 0..4 {
            text.push(if place <= chunk.len() {
                let sextet = bits >> (18 - 6 * place) & 63;
                char::from(ALPHABET[sextet as usize])
            } else {
                '='
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_matches_rfc_4648() {
        for (text, expected) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(text.as_bytes()), expected);
        }
    }

    #[test]
    fn page_is_self_contained_and_loads_nothing() {
        for element in ["script", "style"] {
            assert!(inside(element).len() > 1000, "{element}");
            assert_eq!(HTML.matches(&format!("</{element}>")).count(), 1);
        }
        for loader in [
            "src=",
            "href=",
            "url(",
            "@import",
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "style=",
            "onclick=",
        ] {
            assert!(!HTML.contains(loader), "the page has {loader}");
        }
    }
}
