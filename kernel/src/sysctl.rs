//! The node's network sysctls, also from a container.
use std::{fs, io};

/// Where a container has the node's `/proc/sys/net`; its own is read-only unless it is privileged.
pub const NODES_OWN: &str = "/host/proc/sys/net";

/// Whether a sysctl, named by its file under /proc/sys/net, is there and not 0.
pub fn is_on(name: &str) -> bool {
    fs::read_to_string(format!("/proc/sys/net/{name}")).is_ok_and(|value| value.trim() != "0")
}

/// Writes a sysctl.
///
/// # Errors
/// What the kernel answers.
pub fn write(name: &str, value: &str) -> io::Result<()> {
    match fs::write(format!("/proc/sys/net/{name}"), value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            fs::write(format!("{NODES_OWN}/{name}"), value).map_err(|_| error)
        }
        result => result,
    }
}
