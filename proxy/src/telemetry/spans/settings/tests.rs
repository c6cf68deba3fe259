//! Flags and variables, and what they come to.
use opentelemetry::Key;

use super::*;

fn args(endpoint: Option<&str>) -> TelemetryArgs {
    TelemetryArgs {
        otlp_endpoint: endpoint.map(str::to_owned),
        trace_allowed: 1.0,
    }
}

fn read(
    endpoint: Option<&str>,
    variables: &[(&str, &str)],
) -> Result<Option<Settings>, SettingsError> {
    Settings::read(&args(endpoint), "node-1", |name| {
        let found = variables.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| (*value).to_owned())
    })
}

#[test]
fn collector_settings_follow_flag_then_variables_then_port() {
    use Transport::{Grpc, Http};
    let base = "OTEL_EXPORTER_OTLP_ENDPOINT";
    let traces = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
    let protocol = "OTEL_EXPORTER_OTLP_PROTOCOL";
    type Row<'a> = (
        Option<&'a str>,
        &'a [(&'a str, &'a str)],
        Option<(Transport, &'a str)>,
    );
    let rows: &[Row<'_>] = &[
        (None, &[], None),
        (None, &[(base, "")], None),
        (
            Some("http://c:4317"),
            &[("OTEL_SDK_DISABLED", "true")],
            None,
        ),
        (Some("http://c:4317"), &[], Some((Grpc, "http://c:4317"))),
        (
            Some("http://c:4317"),
            &[(base, "http://d:4317")],
            Some((Grpc, "http://c:4317")),
        ),
        (
            Some("http://c:4318"),
            &[],
            Some((Http, "http://c:4318/v1/traces")),
        ),
        (
            Some("http://c:4318/"),
            &[],
            Some((Http, "http://c:4318/v1/traces")),
        ),
        (
            Some("http://c/v1/traces"),
            &[],
            Some((Http, "http://c/v1/traces")),
        ),
        (
            Some("http://[fd00::1]:4318"),
            &[],
            Some((Http, "http://[fd00::1]:4318/v1/traces")),
        ),
        (
            None,
            &[(base, "http://c:4318")],
            Some((Http, "http://c:4318/v1/traces")),
        ),
        (
            None,
            &[(base, "http://c:9"), (protocol, "http/protobuf")],
            Some((Http, "http://c:9/v1/traces")),
        ),
        (
            None,
            &[(base, "http://c:4318"), (protocol, "grpc")],
            Some((Grpc, "http://c:4318")),
        ),
        (
            Some("https://c:4318"),
            &[],
            Some((Http, "https://c:4318/v1/traces")),
        ),
        (Some("https://c"), &[], Some((Grpc, "https://c"))),
        (
            None,
            &[(base, "http://c:1"), (traces, "http://d:4318/x")],
            Some((Http, "http://d:4318/x")),
        ),
    ];
    for (flag, variables, expected) in rows {
        let settings = read(*flag, variables).unwrap();
        let found = settings.map(|it| (it.transport, it.endpoint));
        let found = found
            .as_ref()
            .map(|(transport, url)| (*transport, url.as_str()));
        assert_eq!(found, *expected, "{flag:?} {variables:?}");
    }
}

#[test]
fn invalid_setting_names_its_variable() {
    let to = Some("http://c:4317");
    for (flag, variables, named) in [
        (
            to,
            [("OTEL_BSP_MAX_QUEUE_SIZE", "many")],
            "OTEL_BSP_MAX_QUEUE_SIZE is \"many\"",
        ),
        (
            to,
            [("OTEL_EXPORTER_OTLP_TIMEOUT", "0")],
            "OTEL_EXPORTER_OTLP_TIMEOUT is \"0\"",
        ),
        (
            to,
            [("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")],
            "give grpc or http/protobuf",
        ),
        (
            to,
            [("OTEL_RESOURCE_ATTRIBUTES", "a=b,c")],
            "OTEL_RESOURCE_ATTRIBUTES has \"c\"",
        ),
        (
            Some("collector:4317"),
            [("X", "")],
            "--otlp-endpoint is \"collector:4317\"",
        ),
        (
            None,
            [("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://c")],
            "OTEL_EXPORTER_OTLP_ENDPOINT is \"ftp://c\"",
        ),
        (
            to,
            [("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/k")],
            "OTEL_EXPORTER_OTLP_CLIENT_KEY is set without OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
        ),
        (
            to,
            [("OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE", "/c")],
            "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE is set without OTEL_EXPORTER_OTLP_CLIENT_KEY",
        ),
    ] {
        let refused = read(flag, &variables)
            .map(|_| ())
            .expect_err(named)
            .to_string();
        assert!(refused.contains(named), "{refused}");
    }
}

#[test]
fn resource_attributes_can_be_overridden_by_variables() {
    let resource = |variables: &[(&str, &str)], name: &'static str| {
        let settings = read(Some("http://c:4317"), variables).unwrap().unwrap();
        let value = settings.resource.get(&Key::from_static_str(name));
        value.map(|value| value.to_string())
    };
    let attributes = [(
        "OTEL_RESOURCE_ATTRIBUTES",
        "k8s.pod.name=p%201, service.name=s",
    )];
    let service = [attributes[0], ("OTEL_SERVICE_NAME", "t")];
    for (found, expected) in [
        (resource(&[], "service.name"), "portreeve"),
        (resource(&[], "k8s.node.name"), "node-1"),
        (resource(&attributes, "service.name"), "s"),
        (resource(&attributes, "k8s.pod.name"), "p 1"),
        (resource(&service, "service.name"), "t"),
    ] {
        assert_eq!(found.as_deref(), Some(expected));
    }
}

#[test]
fn sampling_share_is_from_0_to_1() {
    assert_eq!(share("0.25"), Ok(0.25));
    for text in ["", "x", "-0.1", "1.1", "NaN"] {
        assert!(share(text).is_err(), "{text:?}");
    }
}
