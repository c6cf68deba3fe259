//! The repository's own rules, held by `tests/tidy.rs`. Nothing to use from elsewhere.
