//! Label selectors: validated, normalised, and evaluated on labels.
//!
//! Two selectors with the same meaning in another order or spelling are equal, so that they share one
//! id in the cluster. Knows no pods: labels only.
use std::sync::Arc;

use crate::model::Labels;
use crate::problem::Problems;
use crate::{syntax, v1};

/// A `meta/v1` LabelSelector; all requirements must hold; without any, everything matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct LabelSelector {
    /// Sorted and without duplicates.
    requirements: Box<[Requirement]>,
}

/// The pods that one peer of a rule selects.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PeerSelector {
    pub(crate) namespaces: NamespaceScope,
    pub(crate) pods: LabelSelector,
}

/// The namespaces whose pods a peer selects from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum NamespaceScope {
    /// The policy's own: the peer has no `namespaceSelector`.
    Named(Arc<str>),
    /// Those that match `namespaceSelector`.
    Matching(LabelSelector),
}

/// One condition of a [`LabelSelector`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Requirement {
    pub(crate) key: Arc<str>,
    pub(crate) test: Test,
}

/// Values are sorted and without duplicates.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Test {
    In(Box<[Arc<str>]>),
    NotIn(Box<[Arc<str>]>),
    Exists,
    DoesNotExist,
}

impl LabelSelector {
    /// Checks `raw` as the API server does; every fault goes to `problems` under `path`.
    pub(crate) fn new(raw: v1::LabelSelector, path: &str, problems: &mut Problems) -> Self {
        let mut requirements = Vec::new();
        for (key, value) in raw.match_labels {
            let field = format!("{path}.matchLabels");
            check_key(&key, &field, problems);
            check_value(&value, &field, problems);
            requirements.push(Requirement {
                key: key.into(),
                test: Test::In([value.into()].into()),
            });
        }
        for (index, requirement) in raw.match_expressions.into_iter().enumerate() {
            let field = format!("{path}.matchExpressions[{index}]");
            requirements.extend(Requirement::new(requirement, &field, problems));
        }
        requirements.sort();
        requirements.dedup();
        Self {
            requirements: requirements.into(),
        }
    }

    pub(crate) fn matches(&self, labels: &Labels) -> bool {
        self.requirements
            .iter()
            .all(|requirement| requirement.holds(labels))
    }

    /// Sorted and without duplicates; none matches everything.
    pub(crate) fn requirements(&self) -> &[Requirement] {
        &self.requirements
    }
}

impl NamespaceScope {
    pub(crate) fn covers(&self, name: &str, labels: &Labels) -> bool {
        match self {
            Self::Named(own) => **own == *name,
            Self::Matching(selector) => selector.matches(labels),
        }
    }
}

impl Requirement {
    fn new(raw: v1::LabelSelectorRequirement, path: &str, problems: &mut Problems) -> Option<Self> {
        check_key(&raw.key, &format!("{path}.key"), problems);
        for (index, value) in raw.values.iter().enumerate() {
            check_value(value, &format!("{path}.values[{index}]"), problems);
        }
        let takes_values = matches!(raw.operator.as_str(), "In" | "NotIn");
        if takes_values && raw.values.is_empty() {
            problems.push(
                format!("{path}.values"),
                format!("{} has no values", raw.operator),
                "give at least one value, or use Exists or DoesNotExist",
            );
        }
        let mut values: Vec<Arc<str>> = raw.values.into_iter().map(Into::into).collect();
        values.sort();
        values.dedup();
        let test = match raw.operator.as_str() {
            "In" => Test::In(values.into()),
            "NotIn" => Test::NotIn(values.into()),
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                problems.push(
                    format!("{path}.values"),
                    format!("{} takes no values", raw.operator),
                    "remove the values, or use In or NotIn",
                );
                return None;
            }
            "Exists" => Test::Exists,
            "DoesNotExist" => Test::DoesNotExist,
            unknown => {
                problems.push(
                    format!("{path}.operator"),
                    format!("unknown operator {unknown:?}"),
                    "use In, NotIn, Exists or DoesNotExist",
                );
                return None;
            }
        };
        Some(Self {
            key: raw.key.into(),
            test,
        })
    }

    /// Whether `labels` meet this requirement.
    pub(crate) fn holds(&self, labels: &Labels) -> bool {
        self.test.holds(labels.get(&self.key))
    }

    /// Whether it needs a label with the key.
    pub(crate) fn is_positive(&self) -> bool {
        matches!(self.test, Test::In(_) | Test::Exists)
    }
}

impl Test {
    /// `NotIn` and `DoesNotExist` hold for a missing label.
    pub(crate) fn holds(&self, value: Option<&Arc<str>>) -> bool {
        #[cfg(test)]
        asked::ONE.with(|asked| asked.set(asked.get() + 1));
        match self {
            Self::In(values) => value.is_some_and(|value| values.binary_search(value).is_ok()),
            Self::NotIn(values) => value.is_none_or(|value| values.binary_search(value).is_err()),
            Self::Exists => value.is_some(),
            Self::DoesNotExist => value.is_none(),
        }
    }
}

/// Counts comparisons of labels, so that tests can check the cost of an event.
#[cfg(test)]
pub(crate) mod asked {
    use std::cell::Cell;

    thread_local! {
        pub(crate) static ONE: Cell<u64> = const { Cell::new(0) };
    }

    /// The number of comparisons in `event`.
    pub(crate) fn by<T>(event: impl FnOnce() -> T) -> u64 {
        let before = ONE.get();
        let _ = event();
        ONE.get() - before
    }
}

fn check_key(key: &str, field: &str, problems: &mut Problems) {
    if let Some(problem) = syntax::label_key_fault(key) {
        problems.push(
            field,
            problem,
            "write a label key such as app or example.com/app",
        );
    }
}

fn check_value(value: &str, field: &str, problems: &mut Problems) {
    if let Some(problem) = syntax::label_value_fault(value) {
        problems.push(
            field,
            problem,
            "write up to 63 of A-Z, a-z, 0-9, -, _ and .",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(yaml: &str) -> LabelSelector {
        let mut problems = Problems::default();
        let raw = serde_saphyr::from_str(yaml).unwrap();
        let selector = LabelSelector::new(raw, "s", &mut problems);
        problems.or(selector).unwrap()
    }

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|&(k, v)| (k.into(), v.into())).collect()
    }

    #[test]
    fn operators_treat_absent_labels_as_the_api() {
        for (yaml, absent, other, same, empty, why) in [
            ("{}", true, true, true, true, "no requirement"),
            (
                "matchLabels: {a: x}",
                false,
                false,
                true,
                false,
                "value must be equal",
            ),
            (
                "matchLabels: {a: ''}",
                false,
                false,
                false,
                true,
                "empty is not absent",
            ),
            (
                "matchExpressions: [{key: a, operator: In, values: [w, x]}]",
                false,
                false,
                true,
                false,
                "one of the values",
            ),
            (
                "matchExpressions: [{key: a, operator: NotIn, values: [w, x]}]",
                true,
                true,
                false,
                true,
                "absent is not in the set",
            ),
            (
                "matchExpressions: [{key: a, operator: Exists}]",
                false,
                true,
                true,
                true,
                "there",
            ),
            (
                "matchExpressions: [{key: a, operator: DoesNotExist}]",
                true,
                false,
                false,
                false,
                "not there",
            ),
            (
                "{matchLabels: {a: x}, matchExpressions: [{key: b, operator: DoesNotExist}]}",
                false,
                false,
                true,
                false,
                "labels and expressions",
            ),
            (
                "matchExpressions: [{key: a, operator: Exists}, {key: a, operator: NotIn, values: [x]}]",
                false,
                true,
                false,
                true,
                "all must hold",
            ),
        ] {
            let selector = selector(yaml);
            for (pairs, expected) in [
                (&[][..], absent),
                (&[("a", "y")], other),
                (&[("a", "x")], same),
                (&[("a", "")], empty),
            ] {
                assert_eq!(
                    selector.matches(&labels(pairs)),
                    expected,
                    "{yaml} {pairs:?}: {why}"
                );
            }
        }
    }

    #[test]
    fn spelling_does_not_make_another_selector() {
        let one = selector("matchLabels: {b: z, a: x}");
        for same in [
            "matchExpressions: [{key: b, operator: In, values: [z]}, {key: a, operator: In, values: [x, x]}]",
            "{matchLabels: {a: x}, matchExpressions: [{key: b, operator: In, values: [z]}, {key: a, operator: In, values: [x]}]}",
        ] {
            assert_eq!(selector(same), one, "{same}");
        }
        assert_ne!(selector("matchLabels: {a: x}"), one);
    }
}
