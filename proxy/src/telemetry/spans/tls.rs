//! TLS with a collector at `https://`: verifies its certificate, and presents one if it asks.
//!
//! Files are read once, at the start. Knows certificates, not what is sent over them.
use std::path::PathBuf;

use hyper_rustls::{ConfigBuilderExt as _, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::settings::Transport;

/// A PEM file and the variable that named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct File {
    pub(super) variable: &'static str,
    pub(super) path: PathBuf,
}

/// The configured certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Files {
    /// The CA certificates for the collector; `None`: those of this host.
    pub(super) authorities: Option<File>,
    /// The daemon's own certificate with its chain, and its key.
    pub(super) own: Option<(File, File)>,
}

/// Why there can be no connection to a collector at `https://`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// A file is not what it should be.
    #[error("{variable} names {}, which has no {what} that can be read; give a PEM file", path.display())]
    File {
        /// The variable.
        variable: &'static str,
        /// What it says.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// What was found.
        #[source]
        source: pem::Error,
    },
    /// A CA certificate cannot be used.
    #[error("{variable} names {}, which has a certificate that cannot be used", path.display())]
    Authority {
        /// The variable.
        variable: &'static str,
        /// What it says.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: rustls::Error,
    },
    /// There are no CA certificates for the collector.
    #[error(
        "cannot verify the collector: this host has no CA certificates; give the collector's CA in OTEL_EXPORTER_OTLP_CERTIFICATE"
    )]
    Nobody(#[source] std::io::Error),
    /// Certificate and key do not match.
    #[error("{variable} names {}, whose certificate cannot be used with the key", path.display())]
    Own {
        /// The variable of the certificate.
        variable: &'static str,
        /// What it says.
        path: PathBuf,
        /// What is wrong with them.
        #[source]
        source: rustls::Error,
    },
    /// The library has no protocol to offer.
    #[error("TLS cannot be set up")]
    Setup(#[source] rustls::Error),
}

/// Connects by TCP, and over that by TLS where the URL says so.
pub(super) type Connector = HttpsConnector<HttpConnector>;

/// The connector to a collector at `url`, with or without TLS.
///
/// # Errors
/// What is wrong with which file; nothing is read for a collector without TLS.
pub(super) fn connector(
    url: &str,
    files: &Files,
    transport: Transport,
) -> Result<Connector, TlsError> {
    let nothing = Files::default();
    let config = if url.starts_with("https://") {
        config(files, authorities(files.authorities.as_ref())?)?
    } else {
        config(&nothing, Some(RootCertStore::empty()))?
    };
    let schemes = HttpsConnectorBuilder::new()
        .with_tls_config(config)
        .https_or_http();
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    Ok(match transport {
        Transport::Grpc => schemes.enable_http2().wrap_connector(tcp),
        Transport::Http => schemes.enable_http1().wrap_connector(tcp),
    })
}

/// `None`: those of this host.
fn authorities(file: Option<&File>) -> Result<Option<RootCertStore>, TlsError> {
    let Some(file) = file else {
        return Ok(None);
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file)? {
        let added = roots.add(certificate);
        added.map_err(|source| TlsError::Authority {
            variable: file.variable,
            path: file.path.clone(),
            source,
        })?;
    }
    Ok(Some(roots))
}

fn config(files: &Files, roots: Option<RootCertStore>) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?;
    let trusting = match roots {
        Some(roots) => builder.with_root_certificates(roots),
        None => builder.with_native_roots().map_err(TlsError::Nobody)?,
    };
    let Some((certificate, key)) = &files.own else {
        return Ok(trusting.with_no_client_auth());
    };
    let chain = certificates(certificate)?;
    let secret = PrivateKeyDer::from_pem_file(&key.path);
    let secret = secret.map_err(|source| key.unreadable("private key", source))?;
    trusting
        .with_client_auth_cert(chain, secret)
        .map_err(|source| TlsError::Own {
            variable: certificate.variable,
            path: certificate.path.clone(),
            source,
        })
}

/// At least one.
fn certificates(file: &File) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(&file.path).and_then(Iterator::collect);
    let all: Vec<_> = read.map_err(|source| file.unreadable("certificate", source))?;
    if all.is_empty() {
        return Err(file.unreadable("certificate", pem::Error::NoItemsFound));
    }
    Ok(all)
}

impl File {
    fn unreadable(&self, what: &'static str, source: pem::Error) -> TlsError {
        TlsError::File {
            variable: self.variable,
            path: self.path.clone(),
            what,
            source,
        }
    }
}

#[cfg(test)]
mod tests;
