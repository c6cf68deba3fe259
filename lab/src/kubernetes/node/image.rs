//! Container images that no registry has: an archive as `docker save` writes it, made of a directory.
//!
//! Knows nothing of who runs them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::kubernetes::{KubernetesError, write};
use crate::process::{find_program, search_path};
use crate::tools::ToolError;

/// An image to be imported, see [`Node::import`](super::Node::import).
#[derive(Debug, Clone, Copy)]
pub struct Image<'a> {
    /// Its whole name, such as `docker.io/library/web:1`.
    pub name: &'a str,
    /// Its root file system.
    pub root: &'a Path,
    /// Its variables, as `NAME=value`.
    pub environment: &'a [&'a str],
    /// The default command of a container.
    pub command: &'a [&'a str],
}

impl Image<'_> {
    /// Writes the archive, at a path below `directory`.
    pub(super) fn archive(&self, directory: &Path) -> Result<PathBuf, KubernetesError> {
        let work = directory.join("image");
        fs::create_dir_all(&work).map_err(|source| KubernetesError::File {
            path: work.clone(),
            source,
        })?;
        let mut tar = tool("tar", "tar")?;
        tar.args(["--owner=0", "--group=0", "-C"]).arg(self.root);
        run(tar.args(["-cf"]).arg(work.join("layer.tar")).arg("."))?;
        let mut sum = tool("sha256sum", "coreutils")?;
        let sum = run(sum.arg(work.join("layer.tar")))?;
        let layer = sum.split_whitespace().next().unwrap_or_default();
        let config = json!({
            "architecture": architecture(), "os": "linux",
            "config": { "Env": self.environment, "Cmd": self.command },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer}")] },
        });
        let manifest = json!([{
            "Config": "config.json", "RepoTags": [self.name], "Layers": ["layer.tar"],
        }]);
        write(work.join("config.json"), &config.to_string())?;
        write(work.join("manifest.json"), &manifest.to_string())?;
        let archive = directory.join("image.tar");
        let mut tar = tool("tar", "tar")?;
        tar.arg("-C").arg(&work).arg("-cf").arg(&archive);
        run(tar.args(["manifest.json", "config.json", "layer.tar"]))?;
        Ok(archive)
    }
}

/// Makes a root file system with a shell and the usual programs, which needs no library.
pub(super) fn busybox(root: &Path) -> Result<(), KubernetesError> {
    const PACKAGE: &str = "busybox-static";
    let program = find_program(Path::new("busybox")).ok_or(ToolError::Missing {
        program: "busybox",
        package: PACKAGE,
    })?;
    let at = root.join("bin/busybox");
    let copied = ["bin", "proc", "sys", "dev", "etc", "tmp"]
        .iter()
        .try_for_each(|directory| fs::create_dir_all(root.join(directory)))
        .and_then(|()| fs::copy(program, &at).map(drop));
    copied.map_err(|source| KubernetesError::File { path: at, source })?;
    let mut install = tool("chroot", "coreutils")?;
    install
        .arg(root)
        .args(["/bin/busybox", "--install", "-s", "/bin"]);
    // In there it finds no library: another package's would not run.
    run(&mut install).map(drop).map_err(|error| match error {
        KubernetesError::Failed { called, complaint } => KubernetesError::Failed {
            called,
            complaint: format!(
                "{complaint}; the busybox of the package {PACKAGE} needs no library"
            ),
        },
        other => other,
    })
}

fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    }
}

fn tool(program: &'static str, package: &'static str) -> Result<Command, ToolError> {
    let file = find_program(Path::new(program)).ok_or(ToolError::Missing { program, package })?;
    let mut command = Command::new(file);
    command.env("PATH", search_path());
    Ok(command)
}

/// Runs a tool and hands back what it wrote on standard output.
fn run(command: &mut Command) -> Result<String, KubernetesError> {
    let called = format!("{command:?}");
    let failed = |complaint: String| KubernetesError::Failed {
        called: called.clone(),
        complaint,
    };
    let said = command
        .stdin(File::open("/dev/null").map_err(|error: io::Error| failed(error.to_string()))?)
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !said.status.success() {
        let complaint = String::from_utf8_lossy(&said.stderr).trim().to_owned();
        return Err(failed(complaint));
    }
    Ok(String::from_utf8_lossy(&said.stdout).into())
}
