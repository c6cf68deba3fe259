//! The page for people, in a real browser on the node.
//!
//! `PORTREEVE_PICTURE=FILE.png` has the first test take the picture that the documents show.
use std::fs;

use lab::{Cluster, Kind, PodSpec, wait_until};
use serde_json::{Value, json};
use testbed::runner::Test;

use testbed::browser::Browser;
use testbed::{DEADLINE, SOON, TestCluster, connected, deny_ingress, metric, policy};

pub(crate) const TESTS: &[Test] = &testbed::tests![
    page_shows_policy_matrix_reasons_and_live_denials,
    html_in_names_is_shown_as_text,
    five_hundred_pods_fold_into_their_namespaces,
];

const PAGE: &str = "http://127.0.0.1:15020/";

/// A script that gives the words of the cell from one pod to another.
fn cell(from: &str, to: &str) -> String {
    format!(
        "const cell = [...document.querySelectorAll('#matrix td')].find((it) => \
         it.ariaLabel && it.ariaLabel.startsWith('{from} to {to}:'));"
    )
}

fn words(browser: &Browser, from: &str, to: &str) -> String {
    let script = format!("{} return cell && cell.ariaLabel;", cell(from, to));
    let words = browser.wait_for(&format!("the cell {from} to {to}"), &script);
    words.as_str().unwrap().to_owned()
}

/// A shop, its monitoring and its build pods, on two nodes.
fn shop() -> TestCluster {
    let pod = |namespace: &str, name: &str, node: usize, port: u16| {
        PodSpec::new(namespace, name)
            .node(node)
            .label("app", name)
            .port("main", port)
    };
    let cluster = Cluster::builder().nodes(2).pods([
        pod("ci", "runner", 0, 8080),
        pod("monitoring", "grafana", 0, 3000),
        pod("monitoring", "prometheus", 0, 9090),
        pod("shop", "cart", 0, 8080),
        pod("shop", "db", 0, 5432),
        pod("shop", "web", 1, 8080),
    ]);
    let lab = cluster.build().unwrap();
    for pod in lab.pods() {
        pod.serve(&[8080, 5432, 9090]).unwrap();
    }
    let mut bed = TestCluster::of(lab);
    bed.write_policies(&shop_policies());
    bed.enforce(&[]);
    bed
}

fn shop_policies() -> Vec<Value> {
    let of = |namespace: &str, name: &str, spec: Value| {
        let mut policy = policy(name, &spec);
        policy["metadata"]["namespace"] = namespace.into();
        policy
    };
    let app = |name: &str| json!({ "podSelector": { "matchLabels": { "app": name } } });
    let from = |who: Value, to: &str, port: u16| {
        let mut spec = app(to);
        spec["ingress"] = json!([{ "from": [who], "ports": [{ "port": port }] }]);
        spec
    };
    let mut scraper = app("prometheus");
    scraper["namespaceSelector"] =
        json!({ "matchLabels": { "kubernetes.io/metadata.name": "monitoring" } });
    let nowhere = json!({ "podSelector": {}, "policyTypes": ["Egress"], "egress": [{ "to": [{ "namespaceSelector":
        { "matchLabels": { "kubernetes.io/metadata.name": "monitoring" } } }] }] });
    vec![
        of(
            "shop",
            "default-deny",
            json!({ "podSelector": {}, "policyTypes": ["Ingress"] }),
        ),
        of(
            "shop",
            "web-for-all",
            json!({ "podSelector": { "matchLabels": { "app": "web" } }, "ingress": [{}] }),
        ),
        of("shop", "cart-from-web", from(app("web"), "cart", 8080)),
        of("shop", "db-from-cart", from(app("cart"), "db", 5432)),
        of("shop", "scrape-cart", from(scraper, "cart", 8080)),
        of("ci", "monitoring-only", nowhere),
    ]
}

fn page_shows_policy_matrix_reasons_and_live_denials() {
    let bed = shop();
    let pod = |key: &str| bed.lab.pod(key);
    let browser = Browser::on(&bed.lab.node(0), 1400, 980);
    browser.open(PAGE);
    for (from, to, expected) in [
        ("shop/web", "shop/db", "denied"),
        ("shop/cart", "shop/db", "allowed by rules"),
        ("ci/runner", "shop/web", "denied"),
        ("shop/db", "ci/runner", "open, no policy isolates them"),
        ("shop/db", "shop/db", "itself"),
    ] {
        let words = words(&browser, from, to);
        assert!(words.ends_with(expected), "{words}");
    }
    let status = browser.run("return document.getElementById('status').textContent");
    assert_eq!(status, "ready");

    // The keyboard, and a click.
    browser.run(&format!("{} cell.focus();", cell("shop/cart", "shop/cart")));
    browser.run(
        "const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true })); \
         press('ArrowRight'); press('Enter');",
    );
    browser.wait_for(
        "the rule that lets the cart at the database",
        "return document.getElementById('detail').innerText.includes('allowed by shop/db-from-cart (spec.ingress[0])')",
    );
    browser.run(&format!("{} cell.click();", cell("shop/web", "shop/db")));
    browser.wait_for(
        "the policies that deny",
        "return document.getElementById('detail').innerText.includes('shop/db-from-cart and shop/default-deny isolate shop/db')",
    );

    // What happens while the page is open.
    for (from, to, port) in [
        ("shop/cart", "shop/db", 5432),
        ("shop/web", "shop/cart", 8080),
        ("monitoring/prometheus", "shop/cart", 8080),
        ("monitoring/grafana", "monitoring/prometheus", 9090),
    ] {
        connected(&pod(from), pod(to).addr_v4(port));
    }
    for (from, to, port) in [
        ("ci/runner", "shop/db", 5432),
        ("monitoring/grafana", "shop/db", 5432),
        ("shop/web", "shop/db", 5432),
    ] {
        let denied = pod(from).connect(pod(to).addr_v4(port), SOON).unwrap();
        assert_eq!(denied.kind(), Kind::TimedOut);
    }
    let denial = browser.wait_for(
        "the last denial, without a reload",
        "return [...document.querySelectorAll('#denials tbody tr')].map((it) => it.innerText).find((it) => it.includes('shop/web'))",
    );
    for part in ["shop/db", "5432/TCP", "shop/default-deny"] {
        let named = denial.as_str().is_some_and(|it| it.contains(part));
        assert!(named, "{part} is not in {denial}");
    }
    let seen = |what: &str| {
        let cell = cell("shop/web", "shop/db");
        let script = format!("{cell} return cell.ariaLabel.includes('{what}');");
        browser.wait_for(what, &script);
    };
    seen("1 denied");
    if let Some(file) = std::env::var_os("PORTREEVE_PICTURE") {
        fs::write(file, browser.screenshot()).unwrap();
    }
    bed.apply(&[]);
    seen("open, no policy isolates them");
}

fn html_in_names_is_shown_as_text() {
    const NAME: &str = "<img src=x onerror=\"document.title='owned'\">";
    let bed = TestCluster::enforced(&[], &[deny_ingress("b")]);
    // Kubernetes and the daemon refuse such names; the fault that says so has them, though.
    bed.write("evil.json", &pod("x", NAME, "10.244.0.200"));
    let node = bed.lab.node(0);
    wait_until(DEADLINE, "the fault", || {
        metric(&node, "portreeve_config_problems") > 0
    })
    .unwrap();
    let denied = bed
        .lab
        .pod("x/a")
        .connect(bed.lab.pod("x/b").addr_v4(80), SOON);
    assert_eq!(denied.unwrap().kind(), Kind::TimedOut);
    let browser = Browser::on(&node, 1280, 900);
    browser.open(PAGE);
    let faults = browser.wait_for(
        "the fault's text",
        "return document.getElementById('remarks').textContent",
    );
    assert!(faults.as_str().unwrap().contains("onerror"), "{faults}");

    // A daemon that lets such names through, for pods and for policies.
    let quoted = json!(NAME).to_string();
    let inner = json!(quoted[1..quoted.len() - 1]);
    browser.run(&format!(
        "const real = window.fetch; \
         window.fetch = async (path, options) => {{ \
           const answer = await real(path, options); \
           if (answer.status === 304) return answer; \
           const text = await answer.text(); \
           const evil = text.replaceAll('\"a\"', '\"' + {inner} + '\"').replaceAll('x/a', 'x/' + {inner}) \
             .replaceAll('deny-ingress-b', {inner}); \
           return new Response(evil, {{ status: answer.status, headers: answer.headers }}); \
         }}; \
         state.tag = null;"
    ));
    let heads = browser.wait_for(
        "the name in the matrix",
        "const heads = [...document.querySelectorAll('#matrix th[scope=row]')].map((it) => it.textContent); \
         return heads[0].includes('onerror') && heads",
    );
    assert_eq!(heads[0], NAME);
    browser.wait_for(
        "the names in the denials",
        "return document.querySelector('#denials tbody tr').innerText.split('onerror').length > 2",
    );
    browser.run("document.querySelector('#denials tbody button').click()");
    browser.wait_for(
        "the policy's name in the reason",
        "return document.getElementById('detail').textContent.includes('onerror')",
    );
    let images = browser.run("return document.querySelectorAll('img').length");
    assert_eq!(images, 0);

    // And were it HTML, the page's own policy would not let it run.
    browser.run(&format!(
        "document.body.insertAdjacentHTML('beforeend', {});",
        json!(NAME)
    ));
    browser.run("document.querySelector('img').dispatchEvent(new Event('error'))");
    let title = browser.run("return document.title");
    assert_eq!(title, "Portreeve · node-0", "a script of another has run");
}

fn pod(namespace: &str, name: &str, address: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "namespace": namespace, "name": name, "uid": format!("uid-{namespace}-{name}") },
        "spec": { "nodeName": "node-0" },
        "status": { "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }] },
    })
}

fn five_hundred_pods_fold_into_their_namespaces() {
    let bed = TestCluster::enforced(&[], &[deny_ingress("b")]);
    let pods: Vec<Value> = (0..496)
        .map(|n| {
            let address = format!("10.99.{}.{}", n / 200, n % 200 + 1);
            pod(&format!("team-{}", n % 8), &format!("pod-{n}"), &address)
        })
        .collect();
    bed.write(
        "many.json",
        &json!({ "apiVersion": "v1", "kind": "List", "items": pods }),
    );
    bed.apply(&[deny_ingress("b")]);
    let browser = Browser::on(&bed.lab.node(0), 1280, 900);
    browser.open(PAGE);
    let words = words(&browser, "namespace team-0", "namespace x");
    assert!(words.contains("186 of 248 pairs allowed"), "{words}");
    browser.run(
        "[...document.querySelectorAll('tbody .toggle')].find((it) => it.textContent.includes('team-0')).click()",
    );
    let words = self::words(&browser, "team-0/pod-0", "namespace x");
    assert!(words.contains("3 of 4 pairs allowed"), "{words}");
    let cells = browser.run("return document.querySelectorAll('#matrix td').length");
    assert!(cells.as_u64().is_some_and(|cells| cells < 6500), "{cells}");

    // More pods than one answer has: the page asks which namespaces.
    let more: Vec<Value> = (0..20)
        .map(|n| pod("late", &format!("pod-{n}"), &format!("10.98.0.{}", n + 1)))
        .collect();
    bed.write(
        "more.json",
        &json!({ "apiVersion": "v1", "kind": "List", "items": more }),
    );
    browser.wait_for(
        "the request to choose",
        "return document.getElementById('hint').textContent.includes('choose namespaces')",
    );
    browser.run("document.querySelector('#namespaces input[value=late]').click()");
    let words = self::words(&browser, "late/pod-0", "late/pod-1");
    assert!(words.contains("open"), "{words}");
}
