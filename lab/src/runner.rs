//! A test runner for tests that need [`crate::enter`] before any thread runs.
//!
//! Supports libtest's command line and output as far as `cargo test` and people use them. Tests are
//! named functions; a panic fails the one that it happens in. Output is not captured.

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// libtest's exit code for failed tests.
const FAILED: u8 = 101;

/// A named test: it passes unless it panics.
#[derive(Debug, Clone, Copy)]
pub struct Test {
    /// What it shows, as a sentence.
    pub name: &'static str,
    /// The test itself.
    pub run: fn(),
}

/// Makes a list of [`Test`](crate::runner::Test)s from functions, with the functions' names.
///
/// ```
/// fn two_and_two_is_four() {}
/// let tests = lab::tests![two_and_two_is_four];
/// assert_eq!(tests[0].name, "two_and_two_is_four");
/// ```
#[macro_export]
macro_rules! tests {
    ($($(#[$meta:meta])* $test:path),* $(,)?) => {
        [$($crate::runner::Test { name: stringify!($test), run: $test }),*]
    };
}

thread_local! {
    /// The panic message of this thread's test; `None` outside of a test.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Enters the lab's namespaces and runs the tests that the command line asks for.
///
/// To be called first in `main`. Without privilege every test counts as failed: none is skipped.
#[must_use]
pub fn main(tests: &[Test]) -> ExitCode {
    let args = match Args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(problem) => {
            eprintln!("error: {problem}");
            return ExitCode::from(FAILED);
        }
    };
    let chosen: Vec<Test> = tests
        .iter()
        .copied()
        .filter(|test| args.wants(test.name))
        .collect();
    if args.list {
        chosen
            .iter()
            .for_each(|test| println!("{}: test", test.name));
        if !args.terse {
            println!("\n{} tests, 0 benchmarks", chosen.len());
        }
        return ExitCode::SUCCESS;
    }
    let filtered = tests.len() - chosen.len();
    if chosen.is_empty() {
        // Nothing to run needs no privilege.
        return report(&[], filtered, Duration::ZERO);
    }
    if let Err(error) = crate::enter() {
        let cause = std::error::Error::source(&error).map(|cause| format!(" ({cause})"));
        let message = format!("error: {error}{}", cause.unwrap_or_default());
        eprintln!("{message}");
        let failed: Vec<_> = chosen
            .iter()
            .map(|test| (test.name, Some(message.clone())))
            .collect();
        return report(&failed, filtered, Duration::ZERO);
    }
    let started = Instant::now();
    println!(
        "\nrunning {} test{}",
        chosen.len(),
        if chosen.len() == 1 { "" } else { "s" }
    );
    panic::set_hook(Box::new(remember));
    let results = run(&chosen, args.threads);
    report(&results, filtered, started.elapsed())
}

type Finished = (&'static str, Option<String>);

fn run(tests: &[Test], threads: usize) -> Vec<Finished> {
    let waiting: Mutex<VecDeque<Test>> = Mutex::new(tests.iter().copied().collect());
    let next = || {
        waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    };
    let (done, results) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..threads.clamp(1, tests.len().max(1)) {
            let done = done.clone();
            scope.spawn(move || {
                while let Some(test) = next() {
                    let _ = done.send((test.name, announced(test, threads == 1)));
                }
            });
        }
        drop(done);
        results.iter().collect()
    })
}

/// Runs the test and prints its line: its name beforehand, if no other test can come between.
fn announced(test: Test, alone: bool) -> Option<String> {
    if alone {
        print!("test {} ... ", test.name);
        let _ = io::stdout().flush();
    }
    let failure = failure_of(test);
    let verdict = if failure.is_some() { "FAILED" } else { "ok" };
    if alone {
        println!("{verdict}");
    } else {
        println!("test {} ... {verdict}", test.name);
    }
    failure
}

/// Runs the test on a thread of its own, so that nothing of it leaks into the next.
fn failure_of(test: Test) -> Option<String> {
    let body = move || {
        PANIC.set(Some(String::new()));
        let outcome = panic::catch_unwind(AssertUnwindSafe(test.run));
        let told = PANIC.take().unwrap_or_default();
        outcome.err().map(|payload| {
            if told.is_empty() {
                text_of(&*payload)
            } else {
                told
            }
        })
    };
    match thread::Builder::new().name(test.name.into()).spawn(body) {
        Ok(thread) => thread
            .join()
            .unwrap_or_else(|payload| Some(text_of(&*payload))),
        Err(error) => Some(format!("no thread could be started: {error}")),
    }
}

/// The panic hook: keeps what a test's own thread says for the summary, prints the rest.
fn remember(info: &PanicHookInfo<'_>) {
    let place = info
        .location()
        .map(|at| format!(" at {at}"))
        .unwrap_or_default();
    let current = thread::current();
    let name = current.name().unwrap_or("?");
    let trace = std::backtrace::Backtrace::capture();
    let mut text = format!(
        "thread '{name}' panicked{place}:\n{}",
        text_of(info.payload())
    );
    if trace.status() == std::backtrace::BacktraceStatus::Captured {
        text = format!("{text}\n{trace}");
    }
    let stored = PANIC.with_borrow_mut(|told| told.as_mut().map(|told| *told += &text));
    if stored.is_none() {
        eprintln!("{text}");
    }
}

fn text_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(ToString::to_string);
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "a panic without a message".into())
}

fn report(results: &[Finished], filtered: usize, took: Duration) -> ExitCode {
    let failed: Vec<_> = results
        .iter()
        .filter_map(|(n, f)| Some((*n, f.as_ref()?)))
        .collect();
    if !failed.is_empty() {
        println!("\nfailures:");
        for (name, message) in &failed {
            println!("\n---- {name} ----\n{message}");
        }
        println!("\nfailures:");
        failed.iter().for_each(|(name, _)| println!("    {name}"));
    }
    println!(
        "\ntest result: {}. {} passed; {} failed; 0 ignored; 0 measured; {filtered} filtered out; finished in {:.2}s\n",
        if failed.is_empty() { "ok" } else { "FAILED" },
        results.len() - failed.len(),
        failed.len(),
        took.as_secs_f64()
    );
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(FAILED)
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Args {
    filters: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    list: bool,
    terse: bool,
    ignored: bool,
    threads: usize,
}

impl Args {
    fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut parsed = Self {
            threads: 1,
            ..Self::default()
        };
        let mut args = args.flat_map(|arg| match arg.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => vec![flag.into(), value.to_string()],
            _ => vec![arg],
        });
        while let Some(arg) = args.next() {
            let mut value = || {
                args.next()
                    .ok_or_else(|| format!("{arg} needs a value, as in --test-threads 4"))
            };
            match arg.as_str() {
                "--test-threads" => {
                    let threads = value()?.parse().ok().filter(|threads| *threads > 0);
                    parsed.threads = threads.ok_or("--test-threads needs a number above 0")?;
                }
                "--skip" => parsed.skip.push(value()?),
                "--format" => parsed.terse = value()? == "terse",
                "--color" | "--logfile" => drop(value()?),
                "--list" => parsed.list = true,
                "--exact" => parsed.exact = true,
                "--ignored" => parsed.ignored = true,
                // Nothing is captured, ignored or measured here, so these change nothing.
                "--nocapture" | "--no-capture" | "--show-output" | "--include-ignored"
                | "--test" | "-q" | "--quiet" => {}
                "--bench" => parsed.ignored = true,
                flag if flag.starts_with('-') => {
                    return Err(format!(
                        "unknown flag {flag}; known are --list, --exact, --skip, --test-threads, --nocapture"
                    ));
                }
                _ => parsed.filters.push(arg),
            }
        }
        Ok(parsed)
    }

    fn wants(&self, name: &str) -> bool {
        let hit = |pattern: &String| {
            if self.exact {
                name == pattern
            } else {
                name.contains(pattern.as_str())
            }
        };
        !self.ignored
            && (self.filters.is_empty() || self.filters.iter().any(hit))
            && !self.skip.iter().any(hit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Result<Args, String> {
        Args::parse(line.split_whitespace().map(String::from))
    }

    #[test]
    fn the_command_line_chooses_tests_as_libtest_does() {
        for (line, expected, why) in [
            ("", true, "no filter takes all"),
            ("pod", true, "a part of the name"),
            ("svc pod", true, "any of several"),
            ("svc", false, "no part of the name"),
            ("--exact pod", false, "not the whole name"),
            ("--exact a_pod_answers", true, "the whole name"),
            ("--skip pod", false, "skipped"),
            ("--ignored", false, "none is ignored, so none runs"),
            (
                "--nocapture --test-threads 4 pod",
                true,
                "flags are no filters",
            ),
            (
                "--test-threads=4 svc",
                false,
                "a value after = belongs to its flag",
            ),
        ] {
            assert_eq!(
                args(line).unwrap().wants("a_pod_answers"),
                expected,
                "{line}: {why}"
            );
        }
    }

    #[test]
    fn wrong_command_line_is_rejected() {
        for line in [
            "--frobnicate",
            "--test-threads",
            "--test-threads 0",
            "--test-threads x",
        ] {
            assert!(args(line).is_err(), "{line}");
        }
    }

    #[test]
    fn panic_fails_only_its_own_test() {
        fn passes() {}
        fn fails() {
            assert_eq!(1, 2, "one is not two");
        }
        let results = run(&crate::tests![passes, fails], 1);
        assert!(results[0].1.is_none());
        assert!(results[1].1.as_ref().unwrap().contains("one is not two"));
    }
}
