//! Where it was measured, without which a figure says nothing, and what the kernel knows of threads.
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A line on the machine, the kernel, HAProxy and the run itself.
pub(crate) fn facts(rounds: u32, window: Duration, took: Duration) -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .and_then(|line| line.split_once(": "))
        .map_or("unknown CPU", |(_, model)| model);
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let load = read("/proc/loadavg");
    let load: Vec<_> = load.split(' ').take(2).collect();
    format!(
        "{cores} cores of {model}, shared by client, proxies and server; Linux {}; {}. Medians of {rounds} rounds of {} ms (least-most); \
         a ratio is the median of the rounds' ratios. Load average at the end {} (1 minute), {} (5 minutes). Took {:.0} s.",
        read("/proc/sys/kernel/osrelease").trim(),
        haproxy_version(),
        window.as_millis(),
        load.first().unwrap_or(&"?"),
        load.get(1).unwrap_or(&"?"),
        took.as_secs_f64(),
    )
}

/// CPU time of the thread whose directory this is, such as `/proc/1/task/1`; nothing once it has ended.
pub(crate) fn cpu_time(task: impl AsRef<Path>) -> Duration {
    // proc(5): time on the CPU comes first.
    let stat = fs::read_to_string(task.as_ref().join("schedstat")).unwrap_or_default();
    let on_cpu = stat.split(' ').next().and_then(|time| time.parse().ok());
    Duration::from_nanos(on_cpu.unwrap_or(0))
}

fn haproxy_version() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    let asked = Command::new("haproxy")
        .arg("-v")
        .env("PATH", format!("{path}:/usr/sbin"))
        .output();
    let said = asked.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
    said.ok()
        .and_then(|said| {
            let line = said.lines().next()?;
            Some(line.split(" - ").next()?.to_owned())
        })
        .unwrap_or_else(|| "no HAProxy".to_owned())
}
