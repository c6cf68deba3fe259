//! Errors of requests to the API server, with remedies.
//!
//! Knows the client's errors and the API's status codes (Kubernetes API conventions, "HTTP Status
//! codes"); nothing of what happens next.
use std::error::Error;

use crate::objects::Kind;

/// A request to the API server, or the stream that it opened, has failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// There is neither a kubeconfig nor an in-cluster configuration.
    #[error(
        "no usable client configuration: {0}; run in a pod with a service account, or set KUBECONFIG to a file with a server, its CA and credentials"
    )]
    Config(String),
    /// No connection, or it broke.
    #[error(
        "the API server cannot be reached: {0}; check that it runs and that this node has a route to it"
    )]
    Unreachable(String),
    /// It accepts requests, and does not answer them.
    #[error("the API server does not answer: no data for {0} s; check its load and its log")]
    Silent(u64),
    /// One side does not accept the other's certificate.
    #[error("no TLS with the API server: {problem}; {remedy}")]
    Tls {
        /// The library's message.
        problem: String,
        /// Whether to check the clock, the name or the CA.
        remedy: &'static str,
    },
    /// 401.
    #[error(
        "the API server does not accept our credentials (401 {0}); the token has expired or belongs to another cluster: it is read again at every try"
    )]
    Unauthorized(String),
    /// 403.
    #[error(
        "not permitted to {verb} {resource} (403 {message}); grant it in the ClusterRole: {{apiGroups: [\"{group}\"], resources: [\"{resource}\"], verbs: [\"{verb}\"]}}"
    )]
    Forbidden {
        /// `list`, `watch`, `create`.
        verb: &'static str,
        /// API group; empty for the core.
        group: &'static str,
        /// `pods`, ...
        resource: &'static str,
        /// The API server's message.
        message: String,
    },
    /// 410: the resource version is no longer known.
    #[error("the resource version has expired (410 {0}); listing everything again")]
    Expired(String),
    /// Any other status.
    #[error("the API server rejected the request ({code} {message}); see its log")]
    Refused {
        /// HTTP status.
        code: u16,
        /// The API server's message.
        message: String,
    },
    /// Not JSON, or not of the API's shape.
    #[error(
        "cannot parse the API server's response: {0}; check that the address is that of a Kubernetes API server"
    )]
    Malformed(String),
}

/// The request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RequestInfo {
    pub(super) verb: &'static str,
    pub(super) group: &'static str,
    pub(super) resource: &'static str,
}

impl RequestInfo {
    pub(super) fn of(verb: &'static str, kind: Kind) -> Self {
        Self {
            verb,
            group: kind.group(),
            resource: kind.resource(),
        }
    }
}

impl ApiError {
    /// The cause, for a metric's label.
    #[must_use]
    pub fn cause(&self) -> &'static str {
        match self {
            Self::Config(_) => "config",
            Self::Unreachable(_) => "unreachable",
            Self::Silent(_) => "silent",
            Self::Tls { .. } => "tls",
            Self::Unauthorized(_) => "unauthorized",
            Self::Forbidden { .. } => "forbidden",
            Self::Expired(_) => "expired",
            Self::Refused { .. } => "refused",
            Self::Malformed(_) => "malformed",
        }
    }

    /// Every value of [`Self::cause`].
    pub const CAUSES: [&'static str; 9] = [
        "config",
        "unreachable",
        "silent",
        "tls",
        "unauthorized",
        "forbidden",
        "expired",
        "refused",
        "malformed",
    ];

    /// Whether a list that failed to stream with this error is worth a request for pages, as in client-go: an API
    /// server can fail to stream for many reasons, such as an etcd before 3.4.31 or 3.5.13 (500). Our configuration,
    /// credentials and rights, and TLS, matter for pages too.
    pub(super) fn pages_may_succeed(&self) -> bool {
        !matches!(
            self,
            Self::Config(_) | Self::Tls { .. } | Self::Unauthorized(_) | Self::Forbidden { .. }
        )
    }

    /// Whether the server cannot stream lists at all: servers without the feature refuse the parameter; older ones
    /// ignore it and never report that the list is complete.
    pub(super) fn cannot_stream(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                code: 400 | 404 | 405 | 422,
                ..
            } | Self::Silent(_)
        )
    }

    pub(super) fn config(error: &(dyn Error + 'static)) -> Self {
        Self::Config(chain(error))
    }

    pub(super) fn from_client(error: &kube::Error, request: RequestInfo) -> Self {
        match error {
            kube::Error::Api(status) => Self::from_status(status, request),
            kube::Error::SerdeError(error) => Self::Malformed(error.to_string()),
            kube::Error::FromUtf8(error) => Self::Malformed(error.to_string()),
            kube::Error::HyperError(_)
            | kube::Error::Service(_)
            | kube::Error::ReadEvents(_)
            | kube::Error::HttpError(_) => Self::from_transport(error),
            _ => Self::config(error),
        }
    }

    pub(super) fn from_status(status: &kube::core::Status, request: RequestInfo) -> Self {
        let message = match (status.message.as_str(), status.reason.as_str()) {
            ("", reason) => reason.to_owned(),
            (message, _) => message.to_owned(),
        };
        match status.code {
            401 => Self::Unauthorized(message),
            403 => Self::Forbidden {
                verb: request.verb,
                group: request.group,
                resource: request.resource,
                message,
            },
            410 => Self::Expired(message),
            code => Self::Refused { code, message },
        }
    }

    fn from_transport(error: &(dyn Error + 'static)) -> Self {
        let text = chain(error);
        // The library's error types are private to it or several layers down; its messages are stable.
        let remedy = if text.contains("not valid yet") || text.contains("certificate expired") {
            "compare this node's clock with the certificate's dates"
        } else if text.contains("not valid for") || text.contains("NotValidForName") {
            "use an address that the API server's certificate names, or set tls-server-name"
        } else if text.contains("certificate") || text.contains("UnknownIssuer") {
            "check that the CA of the client configuration is that of the API server"
        } else {
            return Self::Unreachable(text);
        };
        Self::Tls {
            problem: text,
            remedy,
        }
    }
}

/// An error with its causes, without repetition.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16, message: &str) -> kube::core::Status {
        kube::core::Status::failure(message, "").with_code(code)
    }

    #[test]
    fn missing_permission_names_verb_resource_and_rbac_rule() {
        let request = RequestInfo::of("watch", Kind::NetworkPolicy);
        let error = ApiError::from_status(&status(403, "no"), request);
        assert_eq!(
            error.to_string(),
            "not permitted to watch networkpolicies (403 no); grant it in the ClusterRole: \
             {apiGroups: [\"networking.k8s.io\"], resources: [\"networkpolicies\"], verbs: [\"watch\"]}"
        );
    }

    #[test]
    fn every_cause_has_its_label() {
        let request = RequestInfo::of("list", Kind::Pod);
        for (error, cause) in [
            (
                ApiError::from_status(&status(401, "x"), request),
                "unauthorized",
            ),
            (ApiError::from_status(&status(410, "x"), request), "expired"),
            (ApiError::from_status(&status(500, "x"), request), "refused"),
        ] {
            assert_eq!(error.cause(), cause);
            assert!(ApiError::CAUSES.contains(&cause));
        }
    }

    #[test]
    fn clock_and_ca_errors_have_different_remedies() {
        for (words, remedy) in [
            (
                "invalid peer certificate: certificate not valid yet: ...",
                "clock",
            ),
            (
                "invalid peer certificate: certificate expired: ...",
                "clock",
            ),
            ("invalid peer certificate: UnknownIssuer", "CA"),
            (
                "invalid peer certificate: certificate not valid for name \"x\"",
                "names",
            ),
        ] {
            let error = kube::Error::Service(words.into());
            let error = ApiError::from_client(&error, RequestInfo::of("list", Kind::Pod));
            assert_eq!(error.cause(), "tls", "{words}");
            assert!(error.to_string().contains(remedy), "{error}");
        }
    }
}
