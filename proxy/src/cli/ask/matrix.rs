//! `portreeve matrix`: the verdict for every pair of pods.
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use comfy_table::{CellAlignment, Table};
use policy::{Cluster, OwnNode, Protocol};
use serde::Serialize;

use super::resolve::{End, common};
use super::{AskError, SourceArgs, coloured, finish, protocol};

/// Print the verdict for every pair of pods, sources as rows.
#[derive(Args, Debug)]
pub(crate) struct MatrixArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// To which port
    #[arg(long, value_name = "N", default_value_t = 80,
          value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// TCP, UDP or SCTP
    #[arg(long, value_name = "P", default_value = "TCP", value_parser = protocol)]
    protocol: Protocol,
    /// How to answer
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Table,
    Json,
    Csv,
}

/// Runs `portreeve matrix`.
pub(crate) fn matrix(args: &MatrixArgs) -> ExitCode {
    finish(run(args))
}

fn run(args: &MatrixArgs) -> Result<ExitCode, AskError> {
    let cluster = args.source.load()?;
    let matrix = Matrix::of(&cluster, args.port, args.protocol);
    let mut out = io::BufWriter::new(io::stdout().lock());
    match args.output {
        Output::Json => {
            serde_json::to_writer(&mut out, &matrix).map_err(io::Error::from)?;
            writeln!(out)?;
        }
        Output::Csv => matrix.csv(&mut out)?,
        Output::Table => matrix.table(&mut out, coloured(io::stdout().is_terminal()))?,
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// Rows are sources; the order of the keys is the order of the fields.
#[derive(Serialize)]
struct Matrix {
    port: u16,
    protocol: String,
    pods: Vec<String>,
    allowed: Vec<Vec<bool>>,
}

impl Matrix {
    /// Pods that have ended or have no address are left out, with a message. Pods
    /// without an address family in common cannot connect either.
    fn of(cluster: &Cluster, port: u16, protocol: Protocol) -> Self {
        let mut ends = Vec::new();
        for pod in cluster.pods() {
            match End::of(cluster, pod) {
                Ok(end) => ends.push(end),
                Err(error) => eprintln!("portreeve: left out: {error}"),
            }
        }
        let allows = |from: &End, to: &End| {
            common(from, to).is_ok_and(|(from, to)| {
                let (from, to) = (cluster.party(from), cluster.party(to));
                policy::allows(from, to, Some(port), protocol, OwnNode::Allow)
            })
        };
        let allowed = ends
            .iter()
            .map(|from| ends.iter().map(|to| allows(from, to)).collect())
            .collect();
        let pods = ends.into_iter().map(|end| end.name).collect();
        Self {
            port,
            protocol: protocol.to_string(),
            pods,
            allowed,
        }
    }

    fn rows(&self) -> impl Iterator<Item = (&str, &[bool])> {
        self.pods
            .iter()
            .map(String::as_str)
            .zip(self.allowed.iter().map(Vec::as_slice))
    }

    /// Kubernetes names have no characters that CSV has to quote.
    fn csv(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "from,{}", self.pods.join(","))?;
        for (pod, row) in self.rows() {
            let cells: Vec<String> = row.iter().map(ToString::to_string).collect();
            writeln!(out, "{pod},{}", cells.join(","))?;
        }
        Ok(())
    }

    fn table(&self, out: &mut impl Write, colour: bool) -> io::Result<()> {
        const WIDEST: usize = 120;
        // If the names do not fit, the columns are headed by row numbers.
        let numbered = self.pods.iter().map(|pod| pod.len() + 3).sum::<usize>() > WIDEST;
        let mut table = Table::new();
        let corner = "from \\ to".to_owned();
        let columns = self.pods.iter().zip(1_usize..);
        let columns = columns.map(|(pod, number)| {
            if numbered {
                number.to_string()
            } else {
                pod.clone()
            }
        });
        table.set_header(std::iter::once(corner).chain(columns));
        for (number, (pod, row)) in (1_usize..).zip(self.rows()) {
            let name = if numbered {
                format!("{number} {pod}")
            } else {
                pod.to_owned()
            };
            let cells = row
                .iter()
                .map(|allowed| if *allowed { "✓" } else { "✗" }.to_owned());
            table.add_row(std::iter::once(name).chain(cells));
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Center);
        }
        let mut text = table.trim_fmt();
        if colour {
            text = text
                .replace('✓', "\x1b[32m✓\x1b[0m")
                .replace('✗', "\x1b[31m✗\x1b[0m");
        }
        writeln!(out, "{text}")?;
        let all = self.pods.len() * self.pods.len();
        let allowed = self
            .allowed
            .iter()
            .flatten()
            .filter(|allowed| **allowed)
            .count();
        let Self { port, protocol, .. } = self;
        writeln!(
            out,
            "port {port}/{protocol}: {allowed} of {all} allowed (✓), rows are sources"
        )
    }
}
