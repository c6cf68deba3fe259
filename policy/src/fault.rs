//! What is wrong with a policy: one [`InvalidPolicy`] per fault, all of them collected.
//!
//! Knows no rule of the API: the modules that validate do.
use std::fmt;

/// One fault of a NetworkPolicy object; the object is refused as a whole.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error("{field}: {problem}; {remedy}")]
pub struct InvalidPolicy {
    /// Where, as a path into the object: `spec.ingress[0].from[1].ipBlock.cidr`.
    pub field: String,
    /// What is wrong there, with the value that is.
    pub problem: String,
    /// What to write instead.
    pub remedy: String,
}

/// The faults found so far in one object.
#[derive(Debug, Default)]
pub(crate) struct Faults(Vec<InvalidPolicy>);

impl Faults {
    pub(crate) fn push(
        &mut self,
        field: impl fmt::Display,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.0.push(InvalidPolicy {
            field: field.to_string(),
            problem: problem.into(),
            remedy: remedy.into(),
        });
    }

    /// `value` if nothing was found, else everything that was.
    pub(crate) fn or<T>(self, value: T) -> Result<T, Vec<InvalidPolicy>> {
        if self.0.is_empty() {
            Ok(value)
        } else {
            Err(self.0)
        }
    }
}
