//! `portreeve check`: whether X may connect to Y, and why.
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use policy::{Cluster, Direction, Exempt, OwnNode, Protocol, Side, Verdict};
use serde::{Deserialize, Serialize};

use super::resolve::{End, common};
use super::{AskError, SourceArgs, WRONG, coloured, finish, protocol};

/// Check whether X may connect to Y. Exit status 0: allowed. 1: denied. 2: the question or the manifests are wrong.
#[derive(Args, Debug)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Who opens the connection: namespace/pod or an IP address
    #[arg(long, value_name = "X", required_unless_present = "queries")]
    from: Option<String>,
    /// To whom: namespace/pod or an IP address
    #[arg(long, value_name = "Y", required_unless_present = "queries")]
    to: Option<String>,
    /// To which port of it
    #[arg(long, value_name = "N", required_unless_present = "queries",
          value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// TCP, UDP or SCTP
    #[arg(long, value_name = "PROTOCOL", default_value = "TCP", value_parser = protocol)]
    protocol: Protocol,
    /// How to answer
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    /// Answer many questions: JSON lines like {"from":"x/a","to":"10.0.0.1","port":80,
    /// "protocol":"TCP"} from this file (-: standard input), answers as JSON lines in this order
    #[arg(long, value_name = "FILE", conflicts_with_all = ["from", "to", "port", "protocol", "output"])]
    queries: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// Runs `portreeve check`.
pub(crate) fn check(args: &CheckArgs) -> ExitCode {
    finish(run(args))
}

fn run(args: &CheckArgs) -> Result<ExitCode, AskError> {
    let cluster = args.source.load()?;
    let mut out = io::stdout().lock();
    if let Some(path) = &args.queries {
        return answer_all(&cluster, path, &mut out);
    }
    // clap requires all three.
    let question = Question {
        from: args.from.clone().unwrap_or_default(),
        to: args.to.clone().unwrap_or_default(),
        port: args.port.unwrap_or_default(),
        protocol: args.protocol,
    };
    let answer = Answer::to(&cluster, question, OwnNode::Allow)?;
    match args.output {
        Output::Json => writeln!(out, "{}", answer.json())?,
        Output::Text => answer.write(&cluster, &mut out, coloured(io::stdout().is_terminal()))?,
    }
    Ok(ExitCode::from(u8::from(!answer.verdict.allowed())))
}

/// Answers one query like `check`, in JSON; `own_node` is the daemon's setting.
///
/// # Errors
/// If a pod is unknown or the port is invalid.
pub(crate) fn explain(
    cluster: &Cluster,
    question: Question,
    own_node: OwnNode,
) -> Result<String, String> {
    let answer = Answer::to(cluster, question, own_node).map_err(|error| error.to_string())?;
    Ok(answer.json())
}

/// Answers one query like `check`, in text; `own_node` is the daemon's setting.
///
/// # Errors
/// As [`explain`].
pub(crate) fn tell(
    cluster: &Cluster,
    question: Question,
    own_node: OwnNode,
) -> Result<String, String> {
    let answer = Answer::to(cluster, question, own_node).map_err(|error| error.to_string())?;
    let mut text = Vec::new();
    let written = answer.write(cluster, &mut text, false);
    written.map_err(|error| error.to_string())?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A query: source, destination, port and protocol.
pub(crate) struct Question {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) port: u16,
    pub(crate) protocol: Protocol,
}

/// A line of `--queries`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Query {
    from: String,
    to: String,
    port: u16,
    protocol: Option<String>,
}

impl Query {
    fn read(line: &[u8]) -> Result<Question, String> {
        let query: Self = serde_json::from_slice(line).map_err(|error| {
            format!(
                "invalid query: {error}; write {}",
                r#"{"from":"x/a","to":"10.0.0.1","port":80,"protocol":"TCP"}"#
            )
        })?;
        if query.port == 0 {
            return Err("port 0 is not valid; use a number from 1 to 65535".to_owned());
        }
        let named = protocol(query.protocol.as_deref().unwrap_or("TCP"));
        let protocol = named.map_err(|error| error.to_string())?;
        Ok(Question {
            from: query.from,
            to: query.to,
            port: query.port,
            protocol,
        })
    }
}

/// Answers every line with a line, an invalid one with an `error`; skips blank lines.
fn answer_all(cluster: &Cluster, path: &Path, out: &mut impl Write) -> Result<ExitCode, AskError> {
    let unreadable = |source| AskError::Queries {
        path: path.to_owned(),
        source,
    };
    let mut input: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        Box::new(BufReader::new(File::open(path).map_err(unreadable)?))
    };
    let mut code = ExitCode::SUCCESS;
    let mut line = Vec::new();
    while next_line(&mut input, &mut line).map_err(unreadable)? {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let answer = Query::read(&line).and_then(|question| {
            Answer::to(cluster, question, OwnNode::Allow).map_err(|error| error.to_string())
        });
        match answer {
            Ok(answer) => writeln!(out, "{}", answer.json())?,
            Err(error) => {
                code = ExitCode::from(WRONG);
                writeln!(out, "{}", serde_json::json!({ "error": error }))?;
            }
        }
    }
    out.flush()?;
    Ok(code)
}

/// Reads a line, truncated if it is too long for a query. False at the end.
fn next_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    const LONGEST: u64 = 64 << 10;
    line.clear();
    input.by_ref().take(LONGEST).read_until(b'\n', line)?;
    if line.len() as u64 == LONGEST && line.last() != Some(&b'\n') {
        input.skip_until(b'\n')?;
    }
    Ok(!line.is_empty())
}

struct Answer {
    question: Question,
    addresses: (IpAddr, IpAddr),
    verdict: Verdict,
}

/// The answer in JSON; the order of the keys is the order of the fields.
#[derive(Serialize)]
struct Json<'a> {
    verdict: &'static str,
    from: &'a str,
    to: &'a str,
    port: u16,
    protocol: String,
    egress: &'a Side,
    ingress: &'a Side,
    exempt: Option<Exempt>,
    reason: String,
}

impl Answer {
    fn to(cluster: &Cluster, question: Question, own_node: OwnNode) -> Result<Self, AskError> {
        let from = End::new(cluster, &question.from)?;
        let to = End::new(cluster, &question.to)?;
        let addresses = common(&from, &to)?;
        let (from, to) = (cluster.party(addresses.0), cluster.party(addresses.1));
        let verdict = policy::judge(from, to, Some(question.port), question.protocol, own_node);
        Ok(Self {
            question,
            addresses,
            verdict,
        })
    }

    fn json(&self) -> String {
        let json = Json {
            verdict: if self.verdict.allowed() {
                "allow"
            } else {
                "deny"
            },
            from: &self.question.from,
            to: &self.question.to,
            port: self.question.port,
            protocol: self.question.protocol.to_string(),
            egress: &self.verdict.egress,
            ingress: &self.verdict.ingress,
            exempt: self.verdict.exempt,
            reason: self.verdict.reason(),
        };
        serde_json::to_string(&json).unwrap_or_else(|error| {
            // Plain strings and numbers always serialise.
            serde_json::json!({ "error": error.to_string() }).to_string()
        })
    }

    /// Prints the answer as text: the endpoints, the verdict, and the policies and rules of each endpoint.
    fn write(&self, cluster: &Cluster, out: &mut impl Write, colour: bool) -> io::Result<()> {
        let (word, code) = if self.verdict.allowed() {
            ("ALLOW", 32)
        } else {
            ("DENY", 31)
        };
        let word = if colour {
            format!("\x1b[1;{code}m{word}\x1b[0m")
        } else {
            word.to_owned()
        };
        let (from, to) = self.addresses;
        let from = who(cluster, &self.question.from, from);
        let to = who(cluster, &self.question.to, to);
        let Question { port, protocol, .. } = self.question;
        writeln!(out, "{word}  {from} -> {to}, port {port}/{protocol}")?;
        let exempt = match self.verdict.exempt {
            Some(Exempt::SelfTraffic) => "a pod always reaches itself, whatever policies say",
            Some(Exempt::Node) => {
                "a pod and the node that it runs on always reach each other, whatever policies say"
            }
            None => {
                let egress = side(&self.verdict.egress, &self.question.from, Direction::Egress);
                writeln!(out, "  egress:  {egress}")?;
                let ingress = side(&self.verdict.ingress, &self.question.to, Direction::Ingress);
                return writeln!(out, "  ingress: {ingress}");
            }
        };
        writeln!(out, "  {exempt}")
    }
}

/// `x/a (10.0.0.1)`, or `10.0.0.1 (pod x/a)`, or `10.0.0.1 (no pod)`.
fn who(cluster: &Cluster, name: &str, address: IpAddr) -> String {
    if name.contains('/') {
        return format!("{name} ({address})");
    }
    match cluster.endpoint(address) {
        Some(endpoint) => format!("{name} (pod {})", endpoint.identity.key),
        None => format!("{name} (no pod)"),
    }
}

fn side(side: &Side, who: &str, direction: Direction) -> String {
    let field = match direction {
        Direction::Egress => "egress",
        Direction::Ingress => "ingress",
    };
    if !side.isolated {
        return format!("open, no policy isolates {who} for {field}");
    }
    if side.allowed {
        let rules = side.rules.iter();
        let rules: Vec<_> = rules
            .map(|rule| format!("{} (spec.{field}[{}])", rule.policy, rule.index))
            .collect();
        return format!("allowed by {}", rules.join(" and "));
    }
    let names: Vec<_> = side.policies.iter().map(ToString::to_string).collect();
    let verb = if names.len() == 1 {
        "isolates"
    } else {
        "isolate"
    };
    let isolate = format!("{} {verb} {who}", names.join(" and "));
    if side.contested {
        return format!("denied, {isolate}, whose address several running pods claim");
    }
    format!("denied, {isolate} and no rule allows this")
}
