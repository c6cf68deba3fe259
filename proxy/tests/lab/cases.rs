//! The policy crate's case files, as their own loader reads them.
#[expect(dead_code, reason = "the policy crate's tests look at more")]
#[path = "../../../policy/tests/support/case.rs"]
pub(crate) mod case;
#[expect(
    dead_code,
    reason = "the loader's world can do more than files can write"
)]
#[path = "../../../policy/tests/support/world.rs"]
pub(crate) mod world;
