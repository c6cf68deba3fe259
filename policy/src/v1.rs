//! The `spec` of a `networking.k8s.io/v1` NetworkPolicy as it is written, before validation.
//!
//! Exactly the API's JSON shape. `null` reads as missing, as in the API server. A field that the
//! API does not have is an error: a restriction that was misspelt must not be lost. Whether the
//! values are valid is checked by [`crate::NetworkPolicy::new`].
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, Visitor};

/// `spec` of a NetworkPolicy.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NetworkPolicySpec {
    /// Pods of the policy's namespace that it applies to; empty selects all of them.
    #[serde(deserialize_with = "null_as_default")]
    pub pod_selector: LabelSelector,
    /// `Ingress`, `Egress`; empty asks for the API server's default.
    #[serde(deserialize_with = "null_as_default")]
    pub policy_types: Vec<String>,
    /// Rules for connections to the selected pods.
    #[serde(deserialize_with = "null_as_default")]
    pub ingress: Vec<NetworkPolicyIngressRule>,
    /// Rules for connections from the selected pods.
    #[serde(deserialize_with = "null_as_default")]
    pub egress: Vec<NetworkPolicyEgressRule>,
}

/// One of `spec.ingress`.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NetworkPolicyIngressRule {
    /// Sources; empty is everyone.
    #[serde(deserialize_with = "null_as_default")]
    pub from: Vec<NetworkPolicyPeer>,
    /// Ports of the selected pods; empty is every port of every protocol.
    #[serde(deserialize_with = "null_as_default")]
    pub ports: Vec<NetworkPolicyPort>,
}

/// One of `spec.egress`.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NetworkPolicyEgressRule {
    /// Destinations; empty is everyone.
    #[serde(deserialize_with = "null_as_default")]
    pub to: Vec<NetworkPolicyPeer>,
    /// Ports of the destination; empty is every port of every protocol.
    #[serde(deserialize_with = "null_as_default")]
    pub ports: Vec<NetworkPolicyPort>,
}

/// One of `from` or `to`.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NetworkPolicyPeer {
    /// Pods by their labels.
    pub pod_selector: Option<LabelSelector>,
    /// Namespaces by their labels; without it the policy's own.
    pub namespace_selector: Option<LabelSelector>,
    /// Addresses; excludes the selectors.
    pub ip_block: Option<IpBlock>,
}

/// `ipBlock` of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct IpBlock {
    /// The block, `10.0.0.0/8` or `2001:db8::/32`.
    #[serde(deserialize_with = "null_as_default")]
    pub cidr: String,
    /// Blocks inside `cidr` that are left out of it.
    #[serde(deserialize_with = "null_as_default")]
    pub except: Vec<String>,
}

/// One of `ports`.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NetworkPolicyPort {
    /// `TCP` (default), `UDP` or `SCTP`.
    pub protocol: Option<String>,
    /// A number or a container port's name; without it every port of the protocol.
    pub port: Option<IntOrString>,
    /// The last port of a range that begins with a numeric `port`.
    pub end_port: Option<i64>,
}

/// A `meta/v1` LabelSelector; everything in it must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LabelSelector {
    /// Labels that must be there with just this value.
    #[serde(deserialize_with = "texts_by_key")]
    pub match_labels: BTreeMap<String, String>,
    /// Requirements on labels.
    #[serde(deserialize_with = "null_as_default")]
    pub match_expressions: Vec<LabelSelectorRequirement>,
}

/// One of `matchExpressions`.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LabelSelectorRequirement {
    /// The label's key.
    #[serde(deserialize_with = "text")]
    pub key: String,
    /// `In`, `NotIn`, `Exists` or `DoesNotExist`.
    #[serde(deserialize_with = "null_as_default")]
    pub operator: String,
    /// Values of `In` and `NotIn`.
    #[serde(deserialize_with = "texts")]
    pub values: Vec<String>,
}

/// The API's IntOrString.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IntOrString {
    /// A number; not yet known to be a port.
    Int(i64),
    /// A text; `"80"` in quotes is one too.
    String(String),
}

fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A string that was written as one. A YAML reader would take `010` or `1.0` for the text that it
/// looks like, which is not the value that the API server sees and refuses.
#[derive(Default)]
struct Text(String);

fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(null_as_default::<D, Text>(deserializer)?.0)
}

fn texts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let texts: Vec<Text> = null_as_default(deserializer)?;
    Ok(texts.into_iter().map(|text| text.0).collect())
}

fn texts_by_key<'de, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
where
    D: Deserializer<'de>,
{
    let texts: BTreeMap<String, Text> = null_as_default(deserializer)?;
    Ok(texts.into_iter().map(|(key, text)| (key, text.0)).collect())
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextVisitor)
    }
}

struct TextVisitor;

impl Visitor<'_> for TextVisitor {
    type Value = Text;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string (in YAML, put quotes around what looks like a number or a boolean)")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Text, E> {
        Ok(Text(text.to_owned()))
    }
}

impl<'de> Deserialize<'de> for IntOrString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(IntOrStringVisitor)
    }
}

struct IntOrStringVisitor;

impl Visitor<'_> for IntOrStringVisitor {
    type Value = IntOrString;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port number or a port name")
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<IntOrString, E> {
        Ok(IntOrString::Int(number))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<IntOrString, E> {
        // A number that does not fit is not a port either; validation reports it with its path.
        Ok(IntOrString::Int(i64::try_from(number).unwrap_or(i64::MAX)))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<IntOrString, E> {
        Ok(IntOrString::String(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yaml(text: &str) -> Result<NetworkPolicySpec, String> {
        serde_saphyr::from_str(text).map_err(|e| e.to_string())
    }

    #[test]
    fn null_missing_and_empty_read_alike() {
        let empty = NetworkPolicySpec::default();
        for text in [
            "{}",
            "podSelector: {}",
            "podSelector:\npolicyTypes:\ningress:\negress:\n",
            "podSelector: {matchLabels: , matchExpressions: }",
            "ingress: []\negress: []\npolicyTypes: []",
        ] {
            assert_eq!(yaml(text), Ok(empty.clone()), "{text}");
        }
        let all = NetworkPolicySpec {
            ingress: vec![Default::default()],
            ..empty
        };
        for text in [
            "ingress: [{}]",
            "ingress:\n- from:\n  ports:\n",
            "ingress: [{from: []}]",
        ] {
            assert_eq!(yaml(text), Ok(all.clone()), "{text}");
        }
    }

    #[test]
    fn null_peer_selector_is_absent_empty_is_not() {
        let spec = yaml("ingress: [{from: [{podSelector: , namespaceSelector: {}}]}]").unwrap();
        let peer = &spec.ingress[0].from[0];
        assert_eq!(peer.pod_selector, None);
        assert_eq!(peer.namespace_selector, Some(LabelSelector::default()));
    }

    #[test]
    fn a_quoted_number_is_text() {
        let spec = yaml("podSelector: {matchLabels: {a: '1', b: \"true\", c: v1.0}}").unwrap();
        let values: Vec<_> = spec.pod_selector.match_labels.into_values().collect();
        assert_eq!(values, ["1", "true", "v1.0"]);
    }

    #[test]
    fn ports_are_numbers_or_names() {
        for (text, expected) in [
            ("80", IntOrString::Int(80)),
            ("-1", IntOrString::Int(-1)),
            ("http", IntOrString::String("http".into())),
            ("\"80\"", IntOrString::String("80".into())),
            ("18446744073709551615", IntOrString::Int(i64::MAX)),
        ] {
            let spec = yaml(&format!("ingress: [{{ports: [{{port: {text}}}]}}]")).unwrap();
            assert_eq!(spec.ingress[0].ports[0].port, Some(expected), "{text}");
        }
    }

    #[test]
    fn unknown_api_fields_are_rejected() {
        for (text, why) in [
            ("podselector: {}", "wrong case"),
            ("ingress: [{form: []}]", "misspelt restriction"),
            ("ingress: [{to: []}]", "ingress has from"),
            ("egress: [{from: []}]", "egress has to"),
            (
                "ingress: [{from: [{podSelector: {matchLabel: {}}}]}]",
                "misspelt selector",
            ),
            (
                "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, excepts: []}}]}]",
                "misspelt except",
            ),
            ("ingress: [{ports: [{port: 80.5}]}]", "no whole number"),
            ("ingress: [{ports: [{port: true}]}]", "no port"),
            (
                "ingress: [null]",
                "a rule of nothing would allow everything",
            ),
            ("ingress:\n-\n", "the same, half-written"),
            ("ingress: [{ports: [null]}]", "would open a protocol"),
            (
                "podSelector: {matchLabels: {a: 1}}",
                "label values are text",
            ),
            (
                "podSelector: {matchLabels: {a: null}}",
                "label values are text",
            ),
        ] {
            assert!(yaml(text).is_err(), "{text}: {why}");
        }
    }
}
