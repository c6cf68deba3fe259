//! What can go wrong with the control plane.

use std::io;
use std::path::PathBuf;

use crate::netns::NetnsError;
use crate::process::ProcessError;
use crate::tools::{NotBuilt, ToolError};
use crate::wait::WaitTimedOut;

/// Why the control plane did not start, or failed a request.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// The environment asks for a release that there is not.
    #[error("{variable}={value}: unset it, or set it to oldest (`make test-oldest`)")]
    Release {
        /// The variable.
        variable: &'static str,
        /// What it is set to.
        value: String,
    },
    /// A program of it has not been built.
    #[error(transparent)]
    NotBuilt(#[from] NotBuilt),
    /// A namespace could not be made or entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// `ip` failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A program could not be started.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// Something did not happen in time.
    #[error(transparent)]
    TimedOut(#[from] WaitTimedOut),
    /// A program ended, or did not serve in time.
    #[error("{program} does not serve; its log ends with:\n{log}")]
    NotServing {
        /// Which.
        program: &'static str,
        /// The end of its log.
        log: String,
    },
    /// A file could not be written.
    #[error("{path} could not be written; see its permissions and the space on the disk")]
    File {
        /// Which.
        path: PathBuf,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The gateway to the API server is gone or speaks no HTTP.
    #[error("the API server does not answer {request}; see gateway.log and apiserver.log")]
    NoAnswer {
        /// Method and path.
        request: String,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// The API server refuses a request.
    #[error("the API server refuses {request} with {status}: {message}")]
    Refused {
        /// Method and path.
        request: String,
        /// The HTTP status.
        status: u16,
        /// Its words.
        message: String,
    },
    /// An object without a kind, a name or the like.
    #[error("an object to be published has no {field}: {object}; give it one")]
    Incomplete {
        /// What it lacks.
        field: &'static str,
        /// The object as JSON.
        object: String,
    },
    /// A cgroup could not be made or used.
    #[error(
        "cannot create cgroups below {path}; run as root, where /sys/fs/cgroup is mounted and writable (docker run --privileged --cgroupns=host -v /sys/fs/cgroup:/sys/fs/cgroup)"
    )]
    Cgroups {
        /// Where.
        path: PathBuf,
        /// What the kernel answered.
        #[source]
        source: io::Error,
    },
    /// A tool failed.
    #[error("`{called}`: {complaint}")]
    Failed {
        /// What was called.
        called: String,
        /// What it wrote on standard error.
        complaint: String,
    },
    /// `kubectl` failed.
    #[error("`kubectl {args}`: {complaint}")]
    Kubectl {
        /// What it was called with.
        args: String,
        /// What it wrote on standard error.
        complaint: String,
    },
}
