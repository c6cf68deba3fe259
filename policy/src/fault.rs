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
    /// What is wrong there, with the value.
    pub problem: String,
    /// What to write instead.
    pub remedy: String,
}

/// Faults of one object that are named; further ones are only counted.
const NAMED: usize = 100;

/// The faults found so far in one object.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    named: Vec<InvalidPolicy>,
    more: usize,
}

impl Faults {
    pub(crate) fn push(
        &mut self,
        field: impl fmt::Display,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        if self.named.len() >= NAMED {
            self.more += 1;
            return;
        }
        self.named.push(InvalidPolicy {
            field: field.to_string(),
            problem: problem.into(),
            remedy: remedy.into(),
        });
    }

    /// `value` if there are no faults, else all of them.
    pub(crate) fn or<T>(mut self, value: T) -> Result<T, Vec<InvalidPolicy>> {
        if self.named.is_empty() {
            return Ok(value);
        }
        if self.more > 0 {
            self.named.push(InvalidPolicy {
                field: "spec".to_owned(),
                problem: format!("{} more faults are not named", self.more),
                remedy: "correct the first ones first".to_owned(),
            });
        }
        Err(self.named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_faults_are_named() {
        let mut faults = Faults::default();
        for number in 0..1_000 {
            faults.push(number, "wrong", "correct it");
        }
        let named = faults.or(()).unwrap_err();
        assert_eq!(named.len(), NAMED + 1);
        assert_eq!(named[NAMED].problem, "900 more faults are not named");
    }
}
