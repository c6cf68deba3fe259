//! Where spans go and how: the daemon's flags, then OpenTelemetry's standard environment variables.
//!
//! Read once, into values that are valid. Headers are left to the exporter, which reads
//! `OTEL_EXPORTER_OTLP_HEADERS` itself.
use std::str::FromStr;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_sdk::Resource;
use opentelemetry_semantic_conventions::attribute::{K8S_NODE_NAME, SERVICE_NAME, SERVICE_VERSION};
use percent_encoding::percent_decode_str;

use super::tls::{File, Files};

/// The flags about spans; each can be given as an environment variable too.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct TelemetryArgs {
    /// Send a span per connection to this OTLP collector [default: $OTEL_EXPORTER_OTLP_ENDPOINT].
    #[arg(long, value_name = "URL", env = "PORTREEVE_OTLP_ENDPOINT")]
    otlp_endpoint: Option<String>,
    /// Share of allowed connections that become spans, 0 to 1; denied ones always do.
    #[arg(
        long,
        value_name = "RATIO",
        default_value = "1.0",
        value_parser = share,
        env = "PORTREEVE_TRACE_ALLOWED"
    )]
    trace_allowed: f64,
}

/// What is wrong with a variable.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SettingsError {
    /// It is no number.
    #[error("{variable} is {value:?}; give a whole number, at least 1")]
    Number {
        /// Its name.
        variable: &'static str,
        /// What it says.
        value: String,
    },
    /// It is not a supported protocol.
    #[error("{variable} is {value:?}; give grpc or http/protobuf")]
    Protocol {
        /// Its name.
        variable: &'static str,
        /// What it says.
        value: String,
    },
    /// The collector's URL cannot be used.
    #[error(
        "{source_name} is {url:?}; give http://HOST:PORT or https://HOST:PORT of an OTLP collector"
    )]
    Endpoint {
        /// Flag or variable.
        source_name: &'static str,
        /// What it says.
        url: String,
    },
    /// A client certificate and its key must both be set.
    #[error("{given} is set without {missing}; a certificate and its key go together")]
    Half {
        /// The one that is set.
        given: &'static str,
        /// The one that is not.
        missing: &'static str,
    },
    /// An attribute has no value or no name.
    #[error("OTEL_RESOURCE_ATTRIBUTES has {entry:?}; write name=value, with commas in between")]
    Attribute {
        /// What it says.
        entry: String,
    },
}

/// The protocol to send spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Grpc,
    /// `http/protobuf`.
    Http,
}

/// Valid settings.
#[derive(Debug)]
pub(super) struct Settings {
    /// With a path if the transport wants one.
    pub(super) endpoint: String,
    pub(super) transport: Transport,
    /// Of certificates, for a collector at `https://`.
    pub(super) files: Files,
    pub(super) resource: Resource,
    /// Share of allowed connections.
    pub(super) allowed: f64,
    /// Records that may wait.
    pub(super) room: usize,
    /// Spans in one request.
    pub(super) batch: usize,
    /// How long a record waits for others to be sent with it.
    pub(super) delay: Duration,
    /// How long a collector may take to answer.
    pub(super) timeout: Duration,
}

impl Settings {
    /// Reads flags and variables; `None` if there is no collector, or `OTEL_SDK_DISABLED` is true.
    ///
    /// # Errors
    /// What is wrong with which variable.
    pub(super) fn read(
        args: &TelemetryArgs,
        node: &str,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, SettingsError> {
        // An empty variable is an unset one (OpenTelemetry's specification).
        let variables = Variables(|name: &str| variable(name).filter(|value| !value.is_empty()));
        let disabled = (variables.0)("OTEL_SDK_DISABLED");
        if disabled.is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        let flag = args.otlp_endpoint.clone().filter(|url| !url.is_empty());
        let given = flag.map(|url| ("--otlp-endpoint", url)).or_else(|| {
            variables.first([
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
                "OTEL_EXPORTER_OTLP_ENDPOINT",
            ])
        });
        let Some((source_name, url)) = given else {
            return Ok(None);
        };
        if !url.starts_with("http://") && !url.starts_with("https://") {
            return Err(SettingsError::Endpoint { source_name, url });
        }
        let transport = variables.transport(&url)?;
        let whole = source_name == "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
        let timeout = variables.number(
            [
                "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
                "OTEL_EXPORTER_OTLP_TIMEOUT",
            ],
            10_000,
        )?;
        let longest = variables.number(["OTEL_BSP_EXPORT_TIMEOUT"], 30_000)?;
        let room = variables.number(["OTEL_BSP_MAX_QUEUE_SIZE"], 8192)?;
        let batch = variables.number(["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"], 512)?;
        let delay = variables.number(["OTEL_BSP_SCHEDULE_DELAY"], 1000)?;
        Ok(Some(Self {
            endpoint: endpoint(url, transport, whole),
            transport,
            files: variables.files()?,
            resource: variables.resource(node)?,
            allowed: args.trace_allowed,
            room,
            batch: batch.min(room),
            delay: Duration::from_millis(delay as u64),
            timeout: Duration::from_millis(timeout.min(longest) as u64),
        }))
    }
}

/// The environment, or a test's.
struct Variables<F>(F);

impl<F: Fn(&str) -> Option<String>> Variables<F> {
    /// The first of these that is set.
    fn first<const N: usize>(&self, names: [&'static str; N]) -> Option<(&'static str, String)> {
        names
            .into_iter()
            .find_map(|name| Some((name, (self.0)(name)?)))
    }

    fn number<const N: usize>(
        &self,
        names: [&'static str; N],
        default: usize,
    ) -> Result<usize, SettingsError> {
        let Some((variable, value)) = self.first(names) else {
            return Ok(default);
        };
        match value.trim().parse() {
            Ok(number) if number > 0 => Ok(number),
            _ => Err(SettingsError::Number { variable, value }),
        }
    }

    /// The configured protocol, else HTTP for port 4318 or a URL with a path, else gRPC.
    fn transport(&self, url: &str) -> Result<Transport, SettingsError> {
        let configured = self.first([
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
            "OTEL_EXPORTER_OTLP_PROTOCOL",
        ]);
        match configured {
            Some((_, value)) if value == "grpc" => Ok(Transport::Grpc),
            Some((_, value)) if value == "http/protobuf" => Ok(Transport::Http),
            Some((variable, value)) => Err(SettingsError::Protocol { variable, value }),
            None => {
                let (authority, path) = parts(url);
                let http = authority.ends_with(":4318") || !path.is_empty();
                Ok(if http {
                    Transport::Http
                } else {
                    Transport::Grpc
                })
            }
        }
    }

    /// OpenTelemetry's three files, each for traces or for all signals.
    fn files(&self) -> Result<Files, SettingsError> {
        let file = |names| {
            let (variable, path) = self.first(names)?;
            let path = path.into();
            Some(File { variable, path })
        };
        let authorities = file([
            "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
            "OTEL_EXPORTER_OTLP_CERTIFICATE",
        ]);
        let own = file([
            "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE",
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
        ]);
        let key = file([
            "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY",
            "OTEL_EXPORTER_OTLP_CLIENT_KEY",
        ]);
        let half = |given: File, missing| {
            let given = given.variable;
            Err(SettingsError::Half { given, missing })
        };
        let own = match (own, key) {
            (Some(own), Some(key)) => Some((own, key)),
            (None, None) => None,
            (Some(own), None) => return half(own, "OTEL_EXPORTER_OTLP_CLIENT_KEY"),
            (None, Some(key)) => return half(key, "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"),
        };
        Ok(Files { authorities, own })
    }

    /// The resource attributes: the service, its version, the node, and those that the operator adds (the
    /// pod's name and uid, say).
    fn resource(&self, node: &str) -> Result<Resource, SettingsError> {
        let mut attributes = vec![
            KeyValue::new(SERVICE_NAME, "portreeve"),
            KeyValue::new(SERVICE_VERSION, env!("CARGO_PKG_VERSION")),
            KeyValue::new(K8S_NODE_NAME, node.to_owned()),
        ];
        let added = (self.0)("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
        for entry in added.split(',').filter(|entry| !entry.trim().is_empty()) {
            let pair = entry
                .split_once('=')
                .map(|(name, value)| (name.trim(), value.trim()));
            match pair {
                Some((name, value)) if !name.is_empty() => {
                    let value = percent_decode_str(value).decode_utf8_lossy();
                    attributes.push(KeyValue::new(name.to_owned(), value.into_owned()));
                }
                _ => {
                    let entry = entry.to_owned();
                    return Err(SettingsError::Attribute { entry });
                }
            }
        }
        if let Some(name) = (self.0)("OTEL_SERVICE_NAME") {
            attributes.push(KeyValue::new(SERVICE_NAME, name));
        }
        // Of two with the same name the last one wins.
        let builder = Resource::builder_empty();
        Ok(attributes
            .into_iter()
            .fold(
                builder,
                opentelemetry_sdk::resource::ResourceBuilder::with_attribute,
            )
            .build())
    }
}

/// Host and port of a URL, and its path without slashes at its ends.
fn parts(url: &str) -> (&str, &str) {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    (authority, path.trim_matches('/'))
}

/// The URL that the exporter is to be given: a base URL lacks the path of traces, for HTTP.
fn endpoint(url: String, transport: Transport, whole: bool) -> String {
    if transport == Transport::Grpc || whole || parts(&url).1.ends_with("v1/traces") {
        return url;
    }
    format!("{}/v1/traces", url.trim_end_matches('/'))
}

/// A ratio from 0 to 1.
fn share(text: &str) -> Result<f64, String> {
    match f64::from_str(text) {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("give a number from 0 to 1".to_owned()),
    }
}

#[cfg(test)]
mod tests;
