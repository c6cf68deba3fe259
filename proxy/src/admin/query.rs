//! Parses the query of a request URL.
use std::sync::Arc;

use percent_encoding::percent_decode_str;
use policy::{Endpoint, PodKey, Protocol};

use crate::cli::ask::{self, Question};
use crate::telemetry::decision::VerdictKind;

/// `key=value&...`, percent-encoded where need be (RFC 3986, section 3.4).
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// Reads what follows the question mark.
    ///
    /// # Errors
    /// If a parameter is not one of `known`, or comes twice.
    pub(super) fn parse(text: &str, known: &[&str]) -> Result<Self, String> {
        let mut found: Vec<(String, String)> = Vec::new();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let key = percent_decoded(key);
            if !known.contains(&&*key) {
                return Err(format!(
                    "unknown parameter {key:?}; there are: {}",
                    known.join(", ")
                ));
            }
            if found.iter().any(|(other, _)| *other == key) {
                return Err(format!("{key} is given twice; give it once"));
            }
            found.push((key, percent_decoded(value)));
        }
        Ok(Self(found))
    }

    /// A parameter's value, if it is given and not empty.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let mut found = self.0.iter().filter(|(name, _)| name == key);
        found
            .next()
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    }

    /// `from`, `to`, `port` and `protocol`.
    ///
    /// # Errors
    /// Which parameter is missing or invalid.
    pub(super) fn question(&self) -> Result<Question, String> {
        let usage = "ask /explain?from=NAMESPACE/POD&to=ADDRESS&port=80&protocol=TCP";
        let given = |name| {
            self.get(name)
                .ok_or_else(|| format!("{name} is missing; {usage}"))
        };
        Ok(Question {
            from: given("from")?.to_owned(),
            to: given("to")?.to_owned(),
            port: port(given("port")?)?,
            protocol: self.protocol()?,
        })
    }

    /// Whether `output` selects text rather than JSON.
    ///
    /// # Errors
    /// If it has another value.
    pub(super) fn is_text(&self) -> Result<bool, String> {
        match self.get("output").unwrap_or("json") {
            "json" => Ok(false),
            "text" => Ok(true),
            other => Err(format!("{other:?} is not an output; there are: json, text")),
        }
    }

    /// `protocol`; TCP if none is given.
    ///
    /// # Errors
    /// If it is none.
    pub(super) fn protocol(&self) -> Result<Protocol, String> {
        ask::protocol(self.get("protocol").unwrap_or("TCP")).map_err(|error| error.to_string())
    }

    /// `port`, if one is given.
    ///
    /// # Errors
    /// If it is none.
    pub(super) fn port(&self) -> Result<Option<u16>, String> {
        self.get("port").map(port).transpose()
    }

    /// `pod`, `namespace` and `verdict`.
    ///
    /// # Errors
    /// If one of them is invalid.
    pub(super) fn filter(&self) -> Result<Filter, String> {
        let pod = self.get("pod").map(|text| match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok(PodKey {
                namespace: namespace.into(),
                name: name.into(),
            }),
            _ => Err(format!("{text:?} is not a pod; write it as NAMESPACE/NAME")),
        });
        let verdict = self.get("verdict").map(|text| {
            let mut words = [VerdictKind::Allow, VerdictKind::Deny, VerdictKind::Sever].into_iter();
            words
                .find(|kind| kind.name() == text)
                .ok_or_else(|| format!("{text:?} is not a verdict; there are: allow, deny, sever"))
        });
        Ok(Filter {
            pod: pod.transpose()?,
            namespace: self.get("namespace").map(Into::into),
            verdict: verdict.transpose()?,
        })
    }
}

/// Which connections are asked for; `None` matches all.
#[derive(Clone, Debug, Default)]
pub(super) struct Filter {
    /// Either end is this pod.
    pod: Option<PodKey>,
    /// Either end is in this namespace.
    namespace: Option<Arc<str>>,
    verdict: Option<VerdictKind>,
}

impl Filter {
    /// Whether a connection between these endpoints, if they are pods, matches.
    pub(super) fn admits(&self, kind: VerdictKind, ends: [Option<&Endpoint>; 2]) -> bool {
        let any = |is_asked_for: &dyn Fn(&PodKey) -> bool| {
            let mut pods = ends.iter().flatten();
            pods.any(|end| is_asked_for(&end.identity.key))
        };
        self.verdict.is_none_or(|asked| asked == kind)
            && self
                .pod
                .as_ref()
                .is_none_or(|asked| any(&|key| key == asked))
            && self
                .namespace
                .as_ref()
                .is_none_or(|asked| any(&|key| key.namespace == *asked))
    }
}

fn port(text: &str) -> Result<u16, String> {
    text.parse()
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| format!("{text:?} is no port; use a number from 1 to 65535"))
}

/// Decodes `%XX` (RFC 3986); invalid UTF-8 is replaced.
fn percent_decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPLAIN: &[&str] = &["from", "to", "port", "protocol"];

    fn question(text: &str) -> Result<Question, String> {
        Query::parse(text, EXPLAIN)?.question()
    }

    #[test]
    fn query_is_parsed_or_names_the_fault() {
        let read =
            question("from=x/a&to=10.0.0.1&port=80").map(|q| (q.from, q.to, q.port, q.protocol));
        assert_eq!(
            read,
            Ok(("x/a".into(), "10.0.0.1".into(), 80, Protocol::Tcp))
        );
        let encoded =
            question("from=x%2Fa&to=fd00%3a%3A1&port=80&protocol=udp").map(|q| (q.from, q.to));
        assert_eq!(encoded, Ok(("x/a".into(), "fd00::1".into())));
        for (query, named) in [
            ("to=x/a&port=80", "from is missing"),
            ("from=x/a&port=80", "to is missing"),
            ("from=x/a&to=x/b", "port is missing"),
            ("from=x/a&to=x/b&port=0", "\"0\" is no port"),
            ("from=x/a&to=x/b&port=http", "\"http\" is no port"),
            ("from=x/a&to=x/b&port=80&protocol=QUIC", "QUIC"),
            ("form=x/a", "unknown parameter \"form\""),
            ("from=x/a&from=x/b", "from is given twice"),
        ] {
            let refused = question(query).map(|_| ()).expect_err(query);
            assert!(refused.contains(named), "{query}: {refused}");
        }
    }

    #[test]
    fn invalid_filter_is_rejected_and_not_ignored() {
        let filter = |text: &str| {
            let query = Query::parse(text, &["pod", "namespace", "verdict"])?;
            query.filter()
        };
        assert!(filter("").is_ok_and(|all| all.admits(VerdictKind::Allow, [None, None])));
        assert!(
            filter("verdict=deny").is_ok_and(|it| !it.admits(VerdictKind::Allow, [None, None]))
        );
        assert!(filter("namespace=x").is_ok_and(|it| !it.admits(VerdictKind::Allow, [None, None])));
        for wrong in ["pod=a", "pod=x/", "verdict=drop", "pods=x/a"] {
            assert!(filter(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn invalid_percent_codes_stay_unchanged() {
        for (text, expected) in [
            ("a%20b", "a b"),
            ("100%", "100%"),
            ("%zz", "%zz"),
            ("%+5", "%+5"),
            ("%2", "%2"),
            ("%ff", "\u{fffd}"),
        ] {
            assert_eq!(percent_decoded(text), expected);
        }
    }
}
