//! Connects to the API server: reads the client configuration for each client, and makes the client.
//!
//! The next retry therefore uses a token, certificate or kubeconfig that was replaced on disk.
//! TCP keepalive detects dead connections, so that no watch waits for minutes for a server that is
//! gone. Knows nothing of watches.
use std::error::Error;
use std::fmt::Write as _;
use std::time::Duration;

use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt};
use kube::config::KubeConfigOptions;
use kube::{Client, Config};
use ring::digest;
use serde::{Deserialize, Serialize};
use tower::{BoxError, ServiceBuilder};

use super::error::ApiError;

/// How long a TCP handshake may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// TCP keepalive: an idle connection is probed after this time ...
const KEEPALIVE: Duration = Duration::from_secs(15);
/// ... again after each such interval ...
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
/// ... and closed after this many probes without an answer.
const KEEPALIVE_TRIES: u32 = 3;

/// Where the client configuration comes from.
#[derive(Clone, Debug, Default)]
pub(super) enum Connector {
    /// `KUBECONFIG` or `~/.kube/config` if there is one, else the in-cluster configuration.
    #[default]
    Found,
    /// This server, by plain HTTP and without credentials.
    #[cfg(test)]
    Plain(std::net::SocketAddr),
}

/// What identifies a cluster while its API server is unreachable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ClusterIdentity {
    pub(super) server: String,
    /// Digests of the certificate authorities; a rotation keeps one of them for a while.
    pub(super) authorities: Vec<String>,
}

impl ClusterIdentity {
    /// Compares the certificate authorities, or the addresses where there are none.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        if self.authorities.is_empty() && other.authorities.is_empty() {
            return self.server == other.server;
        }
        let known = |authority| other.authorities.contains(authority);
        self.authorities.iter().any(known)
    }
}

impl Connector {
    /// # Errors
    /// If there is no configuration, or it cannot be used.
    pub(super) async fn config(&self) -> Result<Config, ApiError> {
        match self {
            Self::Found => found().await,
            #[cfg(test)]
            Self::Plain(address) => {
                let url = format!("http://{address}").parse();
                Ok(Config::new(url.expect("an address makes a URL")))
            }
        }
    }

    /// # Errors
    /// If there is no configuration, or it cannot be used.
    pub(super) async fn client(&self) -> Result<Client, ApiError> {
        client(&self.config().await?).map_err(|error| ApiError::config(&error))
    }

    /// # Errors
    /// If there is no configuration, or it cannot be used.
    pub(super) async fn identity(&self) -> Result<ClusterIdentity, ApiError> {
        let config = self.config().await?;
        let authorities = config.root_cert.iter().flatten();
        Ok(ClusterIdentity {
            server: config.cluster_url.to_string(),
            authorities: authorities.map(|der| fingerprint(der)).collect(),
        })
    }
}

/// SHA-256 in hexadecimal digits.
pub(super) fn fingerprint(bytes: &[u8]) -> String {
    let digest = digest::digest(&digest::SHA256, bytes);
    digest.as_ref().iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// As in `kubectl`, a kubeconfig has precedence over the in-cluster configuration.
async fn found() -> Result<Config, ApiError> {
    let given = std::env::var_os("KUBECONFIG").is_some_and(|paths| !paths.is_empty());
    let at_home = std::env::home_dir().is_some_and(|home| home.join(".kube/config").exists());
    let refused = |error: &(dyn Error + 'static)| ApiError::config(error);
    if given || at_home {
        let config = Config::from_kubeconfig(&KubeConfigOptions::default()).await;
        return config.map_err(|error| refused(&error));
    }
    Config::incluster().map_err(|error| refused(&error))
}

fn client(config: &Config) -> Result<Client, kube::Error> {
    if let Some(proxy_url) = &config.proxy_url {
        let proxy_url = Box::new(proxy_url.clone());
        return Err(kube::Error::ProxyProtocolUnsupported { proxy_url });
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_WITHIN));
    tcp.set_keepalive(Some(KEEPALIVE));
    tcp.set_keepalive_interval(Some(KEEPALIVE_EVERY));
    tcp.set_keepalive_retries(Some(KEEPALIVE_TRIES));
    tcp.set_tcp_user_timeout(Some(KEEPALIVE + KEEPALIVE_EVERY * KEEPALIVE_TRIES));
    let tls = config.rustls_https_connector_with_connector(tcp)?;
    let http: legacy::Client<_, Body> = legacy::Builder::new(TokioExecutor::new()).build(tls);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace.clone()))
}
