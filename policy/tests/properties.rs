//! What holds for every cluster and every policy.
//!
//! Seeds are fixed, so that a run is a run; what a failure found is written into a case file or a
//! table, not into a file of seeds.
mod support {
    pub(crate) mod arbitrary;
    pub(crate) mod cluster;
    pub(crate) mod oracle;
    pub(crate) mod rewrite;
}

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use policy::{Budget, Cluster, OwnNode, Resource};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::RngSeed;
use serde_json::{Value, json};

use support::arbitrary::{all_addresses, changes, policies, worlds};
use support::cluster::{
    as_answer, change, check_against_oracle, cluster, judge, key_of, network_policy, pairs,
    protocol, touched_by,
};
use support::oracle::{Answer, Question, Side, answer};
use support::rewrite::{keys, respell, rewritten, shuffled, split, turn, undo, without};
use testbed::cases::world::addresses;
use testbed::cases::world::{Change, World, policy_key};

const PROBES: [(Option<u16>, &str); 6] = [
    (Some(80), "TCP"),
    (Some(81), "TCP"),
    (Some(53), "UDP"),
    (Some(80), "UDP"),
    (Some(81), "SCTP"),
    (None, "1"),
];

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(20),
        max_shrink_iters: 2000,
        max_shrink_time: 10_000,
        ..ProptestConfig::default()
    }
}

/// Every question among `addresses`.
fn questions(addresses: &BTreeSet<IpAddr>) -> Vec<Question<'static>> {
    let mut all = Vec::new();
    for (from, to) in pairs(addresses) {
        for (port, protocol) in PROBES {
            all.push(Question {
                from,
                to,
                port,
                protocol,
                own_node_is_judged: false,
            });
        }
    }
    all
}

/// A question without the port's details: enough to find an answer again.
type Asked = (IpAddr, IpAddr, Option<u16>, &'static str);

/// The whole truth of a cluster.
fn truth(cluster: &Cluster) -> BTreeMap<Asked, Answer> {
    let asked = |question: &Question<'static>| {
        (question.from, question.to, question.port, question.protocol)
    };
    questions(&all_addresses())
        .iter()
        .map(|question| (asked(question), as_answer(&judge(cluster, question))))
        .collect()
}

/// Only whether each connection may be.
fn allowed(cluster: &Cluster) -> BTreeMap<Asked, bool> {
    truth(cluster)
        .into_iter()
        .map(|(asked, answer)| (asked, answer.allowed()))
        .collect()
}

/// The owner of each address, and its state.
fn owners(cluster: &Cluster) -> BTreeMap<IpAddr, (String, bool)> {
    let owner =
        |endpoint: &policy::Endpoint| (endpoint.identity.key.to_string(), endpoint.contested());
    cluster
        .endpoints()
        .map(|(address, endpoint)| (address, owner(endpoint)))
        .collect()
}

fn endpoints(cluster: &Cluster) -> BTreeMap<IpAddr, Arc<policy::Endpoint>> {
    cluster
        .endpoints()
        .map(|(address, endpoint)| (address, Arc::clone(endpoint)))
        .collect()
}

/// The first difference between two truths, if any.
fn difference<T: PartialEq + std::fmt::Debug>(
    one: &BTreeMap<Asked, T>,
    other: &BTreeMap<Asked, T>,
) -> Option<String> {
    let differs = one
        .iter()
        .find(|(asked, answer)| other.get(asked) != Some(answer));
    differs.map(|(asked, answer)| format!("{asked:?}:\n  {answer:?}\n  {:?}", other.get(asked)))
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn verdicts_and_reasons_match_the_reference_model(world in worlds()) {
        let cluster = cluster(&world);
        for mut question in questions(&all_addresses()) {
            check_against_oracle("", &world, &cluster, &question);
            question.own_node_is_judged = true;
            check_against_oracle("own node judged", &world, &cluster, &question);
        }
    }

    #[test]
    fn a_decision_explained_later_equals_the_verdict(world in worlds()) {
        let cluster = cluster(&world);
        for question in questions(&all_addresses()) {
            let (from, to) = (cluster.party(question.from), cluster.party(question.to));
            let (port, protocol) = (question.port, protocol(question.protocol));
            let decided = policy::decide(from, to, port, protocol, OwnNode::Allow);
            let verdict = policy::judge(from, to, port, protocol, OwnNode::Allow);
            prop_assert_eq!(decided.allowed(), verdict.allowed(), "{:?}", question);
            let explained = decided.explain(from.endpoint, to.endpoint);
            prop_assert_eq!(&explained, &verdict, "{:?}", question);
            if !decided.allowed() {
                let [from, to] = [from, to].map(|end| end.endpoint.map(policy::Endpoint::without_rules));
                let kept = decided.explain(from.as_ref(), to.as_ref());
                prop_assert_eq!(kept.reason(), verdict.reason());
            }
        }
    }

    #[test]
    fn the_order_in_which_objects_arrive_never_matters(world in worlds(), keys in keys()) {
        let mut other = Cluster::default();
        for one in shuffled(world.changes(), &keys) {
            change(&mut other, &one);
        }
        let one = cluster(&world);
        prop_assert_eq!(owners(&one), owners(&other));
        prop_assert_eq!(difference(&truth(&one), &truth(&other)), None);
    }

    #[test]
    fn a_pod_always_reaches_itself(world in worlds()) {
        let cluster = cluster(&world);
        for (address, _) in cluster.endpoints() {
            for question in questions(&BTreeSet::from([address])) {
                prop_assert!(judge(&cluster, &question).allowed(), "{question:?}");
            }
        }
    }

    #[test]
    fn added_policy_only_adds_grants_or_isolates_pods(
        world in worlds(),
        policy in policies(),
    ) {
        let key = policy_key(&policy);
        let mut without = world;
        without.apply(&Change::NoPolicy(key.clone()));
        let mut with = without.clone();
        with.apply(&Change::Policy(policy));
        let (before, after) = (truth(&cluster(&without)), truth(&cluster(&with)));
        let with = cluster(&with);
        let chosen = with.selected_by(&key_of(&key));
        let owner = |address| with.endpoint(address).map(|endpoint| endpoint.identity.key.clone());
        let chosen_at = |address| owner(address).is_some_and(|pod| chosen.contains(&pod));
        let name = format!("{}/{}", key.0, key.1);
        for (asked, was) in &before {
            let is = &after[asked];
            let egress = adds_only_its_own(&name, chosen_at(asked.0), &was.egress, &is.egress);
            let ingress = adds_only_its_own(&name, chosen_at(asked.1), &was.ingress, &is.ingress);
            prop_assert_eq!(egress.and(ingress), Ok(()), "{:?}", asked);
        }
    }

    #[test]
    fn budget_opens_nothing_in_any_order(
        world in worlds(),
        keys in keys(),
        steps in proptest::collection::vec(changes(true), 1..8),
        resource in 0..Resource::ALL.len(),
        bound in 0_u64..5,
    ) {
        let budget = Budget::default().with(Resource::ALL[resource], bound);
        let mut world = world;
        let mut grown = Cluster::with_budget(budget);
        for one in world.changes() {
            change(&mut grown, &one);
        }
        for step in &steps {
            world.apply(step);
            change(&mut grown, step);
        }
        let mut shuffled_in = Cluster::with_budget(budget);
        for one in shuffled(world.changes(), &keys) {
            change(&mut shuffled_in, &one);
        }
        prop_assert_eq!(difference(&truth(&grown), &truth(&shuffled_in)), None);
        prop_assert!(grown.refused().eq(shuffled_in.refused()));
        prop_assert!(grown.surplus().eq(shuffled_in.surplus()));
        let whole = allowed(&cluster(&world));
        for (asked, allowed) in allowed(&grown) {
            prop_assert!(!allowed || whole[&asked], "{asked:?} is open by a budget");
        }
    }

    #[test]
    fn policies_that_change_together_mean_the_same(
        world in worlds(),
        steps in proptest::collection::vec(changes(true), 1..12),
        bound in 0_u64..12,
    ) {
        let budget = Budget::default().with(Resource::Rules, bound);
        let (mut one, mut other) = (Cluster::with_budget(budget), Cluster::with_budget(budget));
        let mut world = world;
        let mut policies: BTreeMap<_, _> = world
            .policies
            .keys()
            .map(|key| (key_of(key), None))
            .collect();
        for step in world.changes() {
            change(&mut one, &step);
            change(&mut other, &step);
        }
        for step in &steps {
            world.apply(step);
            change(&mut one, step);
            if !matches!(step, Change::Policy(_) | Change::NoPolicy(_)) {
                change(&mut other, step);
            }
        }
        for policy in world.policies.values() {
            let policy = Arc::new(network_policy(policy));
            policies.insert(policy.key().clone(), Some(policy));
        }
        let held = endpoints(&other);
        let touched = other.change_policies(policies);
        let (holds, mut changed) = (endpoints(&other), all_addresses());
        changed.retain(|address| held.get(address) != holds.get(address));
        prop_assert_eq!(changed, touched.addresses);
        prop_assert!(one.refused().eq(other.refused()));
        prop_assert_eq!(difference(&truth(&one), &truth(&other)), None);
    }

    #[test]
    fn adding_and_removing_objects_leaves_no_trace(world in worlds(), added in changes(false)) {
        let mut cluster = cluster(&world);
        let (before, owned) = (truth(&cluster), owners(&cluster));
        change(&mut cluster, &added);
        for one in undo(&world, &added) {
            change(&mut cluster, &one);
        }
        prop_assert_eq!(owned, owners(&cluster));
        prop_assert_eq!(difference(&before, &truth(&cluster)), None);
    }

    #[test]
    fn incremental_cluster_equals_one_built_at_once(
        world in worlds(),
        steps in proptest::collection::vec(changes(true), 1..12),
    ) {
        let (mut world, mut grown) = (world.clone(), cluster(&world));
        for step in &steps {
            world.apply(step);
            change(&mut grown, step);
        }
        let afresh = cluster(&world);
        prop_assert_eq!(owners(&grown), owners(&afresh));
        prop_assert_eq!(grown.contested(), afresh.contested());
        prop_assert_eq!(difference(&truth(&grown), &truth(&afresh)), None);
        for key in world.policies.keys().map(key_of) {
            prop_assert_eq!(grown.selected_by(&key), afresh.selected_by(&key));
        }
    }

    #[test]
    fn touched_addresses_cover_all_changed_endpoints_and_verdicts(
        world in worlds(),
        steps in proptest::collection::vec(changes(true), 1..6),
    ) {
        let mut cluster = cluster(&world);
        for step in &steps {
            let before = truth(&cluster);
            let held = endpoints(&cluster);
            let touched = touched_by(&mut cluster, step).addresses;
            let (holds, mut changed) = (endpoints(&cluster), all_addresses());
            changed.retain(|address| held.get(address) != holds.get(address));
            prop_assert_eq!(&changed, &touched, "{:?}", step);
            for (asked, was) in &before {
                let (from, to, port, protocol) = *asked;
                let question = Question { from, to, port, protocol, own_node_is_judged: false };
                let is = as_answer(&judge(&cluster, &question));
                let named = touched.contains(&from) || touched.contains(&to);
                prop_assert!(named || *was == is, "{step:?}\n  {asked:?}: {was:?}\n  {is:?}");
            }
        }
    }

    #[test]
    fn repeated_event_touches_nothing(world in worlds(), pick in any::<Index>()) {
        let mut cluster = cluster(&world);
        let said = world.changes();
        let touched = touched_by(&mut cluster, pick.get(&said));
        prop_assert_eq!(touched.addresses, BTreeSet::new());
    }

    #[test]
    fn order_within_a_policy_never_matters(
        world in worlds(),
        keys in keys(),
    ) {
        let turned = rewritten(&world, |mut policy| {
            turn(&mut policy["spec"], &keys);
            vec![policy]
        });
        prop_assert_eq!(difference(&allowed(&cluster(&world)), &allowed(&cluster(&turned))), None);
    }

    #[test]
    fn a_policy_may_be_split_by_its_rules(world in worlds()) {
        let split = rewritten(&world, split);
        prop_assert_eq!(difference(&allowed(&cluster(&world)), &allowed(&cluster(&split))), None);
    }

    #[test]
    fn other_spellings_of_a_policy_mean_the_same(world in worlds()) {
        let spelled = rewritten(&world, |mut policy| {
            respell(&mut policy["spec"]);
            vec![policy]
        });
        prop_assert_eq!(difference(&truth(&cluster(&world)), &truth(&cluster(&spelled))), None);
    }

    #[test]
    fn finished_and_host_network_pods_own_no_address(world in worlds()) {
        let mut gone = world.clone();
        gone.pods.retain(|_, pod| pod.owns_addresses());
        let (world, gone) = (cluster(&world), cluster(&gone));
        prop_assert_eq!(owners(&world), owners(&gone));
        prop_assert_eq!(difference(&truth(&world), &truth(&gone)), None);
    }

    #[test]
    fn ip_block_exception_only_removes_access(world in worlds()) {
        let whole = rewritten(&world, |mut policy| {
            without(&mut policy, "except");
            vec![policy]
        });
        let whole = allowed(&cluster(&whole));
        for (asked, allowed) in allowed(&cluster(&world)) {
            prop_assert!(!allowed || whole[&asked], "{asked:?} is allowed by an exception");
        }
    }

    #[test]
    fn families_agree_in_policies_without_ip_blocks(world in worlds()) {
        let named = |policy: &Value| policy.to_string().contains("ipBlock");
        let mut no_blocks = world;
        no_blocks.policies.retain(|_, policy| !named(policy));
        let cluster = cluster(&no_blocks);
        let pods: Vec<_> = no_blocks.pods.values().map(|pod| &pod.addresses).collect();
        for (from, to) in pods.iter().flat_map(|from| pods.iter().map(move |to| (from, to))) {
            for (port, protocol) in PROBES {
                let ask = |family: usize| {
                    let (from, to) = (from[family], to[family]);
                    let question = Question { from, to, port, protocol, own_node_is_judged: true };
                    as_answer(&judge(&cluster, &question))
                };
                prop_assert_eq!(ask(0), ask(1));
            }
        }
    }
}

proptest! {
    #![proptest_config(config(32))]

    #[test]
    fn contested_address_verdicts_match_the_reference_model(
        world in worlds(),
        steps in proptest::collection::vec(changes(true), 4..10),
    ) {
        let mut world = world;
        steps.iter().for_each(|step| world.apply(step));
        for (number, pod) in world.pods.values_mut().enumerate() {
            pod.started = format!("2026-01-01T00:00:{number:02}Z");
            // The first two claim one address; the others may have rules about it.
            pod.addresses = addresses(number.saturating_sub(1)).into();
        }
        let cluster = cluster(&world);
        for question in questions(&all_addresses()) {
            check_against_oracle("", &world, &cluster, &question);
        }
    }
}

proptest! {
    #![proptest_config(config(6))]

    /// Enough comes and goes for what a cluster keeps in store to be thrown away several times.
    #[test]
    fn many_deleted_policies_leave_no_trace(world in worlds()) {
        let mut grown = cluster(&world);
        for number in 0..1200 {
            change(&mut grown, &Change::Policy(passing(number)));
            change(&mut grown, &Change::NoPolicy(policy_key(&passing(number))));
        }
        prop_assert_eq!(difference(&truth(&cluster(&world)), &truth(&grown)), None);
        for pod in world.pods.values() {
            change(&mut grown, &Change::NoPod(pod.key()));
            change(&mut grown, &Change::Pod(pod.clone()));
        }
        prop_assert_eq!(difference(&truth(&cluster(&world)), &truth(&grown)), None);
    }
}

/// A policy with a peer selector that no other has.
fn passing(number: usize) -> Value {
    let peers = json!([{"podSelector": {"matchLabels": {"app": format!("v{number}")}}}]);
    let spec = json!({"podSelector": {}, "ingress": [{"from": peers}]});
    json!({"metadata": {"namespace": "x", "name": "passing"}, "spec": spec})
}

/// One side of one connection before and after a policy came.
fn adds_only_its_own(policy: &str, chosen: bool, was: &Side, is: &Side) -> Result<(), String> {
    let problem = if !chosen && was != is {
        "a pod that the policy does not select is judged differently"
    } else if was.isolated && was.allowed && !is.allowed {
        "a pod that was isolated already lost a grant"
    } else if was.isolated && !was.allowed && is.allowed && !is.policies.iter().eq([policy]) {
        "a pod that was isolated is allowed by another policy than the new one"
    } else if was.isolated && !is.isolated {
        "isolation ended"
    } else {
        return Ok(());
    };
    Err(format!("{problem}\n  before: {was:?}\n  after:  {is:?}"))
}

#[test]
fn random_clusters_have_allowed_and_denied_flows() {
    // A generator that made everything allowed, or nothing, would test little.
    let mut runner = proptest::test_runner::TestRunner::new(config(64));
    let (allow, deny) = (std::cell::Cell::new(0_u32), std::cell::Cell::new(0_u32));
    let count = |world: World| {
        for question in questions(&all_addresses()) {
            let counter = if answer(&world, &question).allowed() {
                &allow
            } else {
                &deny
            };
            counter.set(counter.get() + 1);
        }
        Ok(())
    };
    runner
        .run(&worlds(), count)
        .expect("counting does not fail");
    let share = f64::from(deny.get()) / f64::from(allow.get() + deny.get());
    assert!(
        (0.1..0.9).contains(&share),
        "{share} of the questions are denied"
    );
}
