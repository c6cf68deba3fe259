//! Certificates for a test, made by openssl: two CAs, and the certificates of the first.
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

/// A directory of PEM files.
pub struct Certificates(TempDir);

impl Certificates {
    /// `ca`, which signs `server` for these addresses and `client`, and `stranger`, which signs no other certificate.
    pub fn make(server: &[IpAddr]) -> Self {
        let made = Self(TempDir::new().unwrap());
        made.issue("ca", &[]);
        made.issue("stranger", &[]);
        let names: Vec<_> = server.iter().map(|ip| format!("IP:{ip}")).collect();
        let names = format!("subjectAltName={}", names.join(","));
        for (name, named) in [
            ("server", &names[..]),
            ("client", "subjectAltName=DNS:client"),
        ] {
            let (ca, key) = (made.certificate("ca"), made.key("ca"));
            let signed = ["-CA", &ca, "-CAkey", &key, "-addext", named];
            let end = ["-addext", "basicConstraints=critical,CA:FALSE"];
            made.issue(name, &[signed.as_slice(), &end].concat());
        }
        made
    }

    /// The file of `name`'s certificate.
    pub fn certificate(&self, name: &str) -> String {
        self.file(name, "crt")
    }

    /// The file of `name`'s private key.
    pub fn key(&self, name: &str) -> String {
        self.file(name, "key")
    }

    fn file(&self, name: &str, kind: &str) -> String {
        let path: PathBuf = self.0.path().join(format!("{name}.{kind}"));
        path.to_str().unwrap().to_owned()
    }

    fn issue(&self, name: &str, more: &[&str]) {
        let (certificate, key) = (self.certificate(name), self.key(name));
        let subject = format!("/CN={name}");
        let made = Command::new("openssl")
            .args(["req", "-x509", "-nodes", "-days", "2", "-subj", &subject])
            .args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"])
            .args(["-keyout", &key, "-out", &certificate])
            .args(more)
            .output()
            .expect("openssl makes the certificates; install it by `apt install openssl`");
        let said = String::from_utf8_lossy(&made.stderr);
        assert!(
            made.status.success() && fs::exists(&certificate).unwrap(),
            "{said}"
        );
    }
}
