//! A JSON value without the parts of a Kubernetes object that nobody reads.
//!
//! They are dropped while parsing, so a dump of a cluster or a page of its pods is never in memory
//! whole. Knows nothing of where the text comes from, nor of what an object means.
use std::fmt;

use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Number, Value};

/// A JSON value, read strictly (no key twice) and sparingly (see [`BULKY`]).
#[derive(Clone, Debug)]
pub(crate) struct Trimmed(pub(crate) Value);

/// Keys under which an object of a cluster keeps most of its bytes and nothing that is read. What they
/// hold is dropped while parsing if it is a list or mapping; plain values stay, they may be labels.
const BULKY: [&str; 10] = [
    "managedFields",
    "annotations",
    "env",
    "volumes",
    "volumeMounts",
    "resources",
    "conditions",
    "containerStatuses",
    "initContainerStatuses",
    "images",
];

impl<'de> Deserialize<'de> for Trimmed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer
            .deserialize_any(TreeVisitor { keep: true })
            .map(Self)
    }
}

#[derive(Clone, Copy)]
struct TreeVisitor {
    /// Whether lists and mappings are kept.
    keep: bool,
}

impl<'de> DeserializeSeed<'de> for TreeVisitor {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
        Ok(Value::String(value.to_string()))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Value, E> {
        Ok(Value::String(value.to_string()))
    }

    /// `80.0` and `8e1` are the whole number 80, as for kubectl.
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        if value.fract() == 0.0 && value.abs() < 1e15 {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "whole and below 2^53, so exact"
            )]
            return Ok((value as i64).into());
        }
        Ok(Number::from_f64(value).map_or_else(|| Value::String(value.to_string()), Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_bytes<E>(self, value: &[u8]) -> Result<Value, E> {
        Ok(Value::String(String::from_utf8_lossy(value).into_owned()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        if !self.keep {
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(Value::Null);
        }
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        if !self.keep {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(Value::Null);
        }
        let mut entries = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let keep = !BULKY.contains(&key.as_str());
            let value = map.next_value_seed(Self { keep })?;
            if entries.contains_key(&key) {
                let message = format_args!("the key {key:?} is given twice");
                return Err(serde::de::Error::custom(message));
            }
            entries.insert(key, value);
        }
        Ok(Value::Object(entries))
    }
}
