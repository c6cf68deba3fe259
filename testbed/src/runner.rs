//! Runs tests that need [`lab::enter`] before any thread runs, with libtest's command line and output.
//!
//! Tests are named functions; a panic fails the one that it happens in. Output is not captured.
use std::panic::resume_unwind;
use std::process::ExitCode;
use std::thread;

use clap::Parser;
use libtest_mimic::{Arguments, Failed, Trial};

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
/// let tests = testbed::tests![two_and_two_is_four];
/// assert_eq!(tests[0].name, "two_and_two_is_four");
/// ```
#[macro_export]
macro_rules! tests {
    ($($(#[$meta:meta])* $test:path),* $(,)?) => {
        [$($crate::runner::Test { name: stringify!($test), run: $test }),*]
    };
}

/// libtest's arguments, with any number of filters as libtest has it.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    libtest: Arguments,
    #[arg(
        value_name = "FILTER",
        help = "More filters; a test needs to match one"
    )]
    more: Vec<String>,
}

/// Enters the lab's namespaces and runs the tests that the command line asks for, one at a time by default.
///
/// To be called first in `main`. Without privilege every test counts as failed: none is skipped.
#[must_use]
pub fn run(tests: &[Test]) -> ExitCode {
    let mut args = Args::parse();
    args.libtest.test_threads.get_or_insert(1);
    let entered = if args.libtest.list {
        Ok(())
    } else {
        lab::enter().map(drop).map_err(|error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(" ({cause})"));
            format!("{error}{}", cause.unwrap_or_default())
        })
    };
    let trials = chosen(&mut args, tests)
        .map(|test| trial(test, entered.clone()))
        .collect();
    libtest_mimic::run(&args.libtest, trials).exit_code()
}

/// The tests that match one of several filters; a single filter is left to libtest.
fn chosen(args: &mut Args, tests: &[Test]) -> impl Iterator<Item = Test> {
    let mut filters = std::mem::take(&mut args.more);
    if !filters.is_empty() {
        filters.extend(args.libtest.filter.take());
    }
    let exact = args.libtest.exact;
    tests.iter().copied().filter(move |test| {
        let matches = |filter: &String| test.name == filter || !exact && test.name.contains(filter);
        filters.is_empty() || filters.iter().any(matches)
    })
}

/// Runs on a thread of its own, so that nothing of it leaks into the next; a panic names the thread.
fn trial(test: Test, entered: Result<(), String>) -> Trial {
    Trial::test(test.name, move || {
        entered?;
        let thread = thread::Builder::new().name(test.name.into());
        let thread = thread.spawn(test.run).map_err(Failed::from)?;
        thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_pod_answers() {}
    fn a_pod_fails() {
        assert_eq!(1, 2, "one is not two");
    }
    const TESTS: &[Test] = &crate::tests![a_pod_answers, a_pod_fails];

    /// Runs both tests, without output.
    fn passed_and_failed(entered: Result<(), String>) -> (u64, u64) {
        let args = Arguments::from_iter(["x", "--logfile", "/dev/null"]);
        let trials = TESTS.iter().map(|test| trial(*test, entered.clone()));
        let conclusion = libtest_mimic::run(&args, trials.collect());
        (conclusion.num_passed, conclusion.num_failed)
    }

    #[test]
    fn several_filters_choose_any_match() {
        for (line, expected) in [
            ("x svc answers", 1),
            ("x pod a", 2),
            ("x --exact pod a_pod_answers", 1),
            ("x svc node", 0),
            ("x --test-threads 4 pod", 2),
        ] {
            let mut args = Args::parse_from(line.split(' '));
            assert_eq!(chosen(&mut args, TESTS).count(), expected, "{line}");
        }
    }

    #[test]
    fn panic_fails_only_its_own_test() {
        assert_eq!(passed_and_failed(Ok(())), (1, 1));
    }

    #[test]
    fn tests_without_privilege_fail() {
        assert_eq!(passed_and_failed(Err("no privilege".to_owned())), (0, 2));
    }
}
