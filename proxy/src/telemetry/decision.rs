//! How records, logs and the admin page name a verdict and the path of a connection.

/// How an allowed flow gets to its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum DataPath {
    /// Proxied by two TCP connections.
    Spliced,
    /// Accepted at its first packet, then forwarded by the kernel.
    Kernel,
}

impl DataPath {
    /// The value of `path` in records and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Spliced => "spliced",
            Self::Kernel => "kernel",
        }
    }
}

/// What a record or a metric calls a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VerdictKind {
    Allow,
    Deny,
    /// Allowed once, and denied by a later change while the connection was live.
    Sever,
}

impl VerdictKind {
    /// The value of `verdict` in records and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Sever => "sever",
        }
    }
}
