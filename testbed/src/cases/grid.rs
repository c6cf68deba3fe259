//! The truth table of a probe, and its form in a case's file.

/// Rows are sources, columns destinations, both in the order of `parties`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grid {
    /// `namespace/pod` or the name of an external host.
    pub parties: Vec<String>,
    /// `None`: nobody's business here (two external hosts).
    pub cells: Vec<Vec<Option<bool>>>,
}

impl Grid {
    /// Reads the form that [`Grid::draw`] writes.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut lines = text
            .lines()
            .map(|line| line.split_whitespace().map(str::to_owned));
        let mut header = lines.next().ok_or("a grid is empty")?;
        if header.next().as_deref() != Some("to") {
            return Err("the first line of a grid starts with `to` and names the columns".into());
        }
        let parties: Vec<String> = header.collect();
        let mut cells = Vec::new();
        for (row, party) in lines.zip(&parties) {
            let words: Vec<String> = row.collect();
            if words.first() != Some(party) || words.len() != parties.len() + 1 {
                return Err(format!(
                    "the row of {party} has its name and one cell per column, not {words:?}"
                ));
            }
            cells.push(
                words[1..]
                    .iter()
                    .map(|word| cell(word))
                    .collect::<Result<_, _>>()?,
            );
        }
        if cells.len() != parties.len() || text.lines().count() != parties.len() + 1 {
            return Err(format!(
                "a grid of {} columns has as many rows",
                parties.len()
            ));
        }
        Ok(Self { parties, cells })
    }

    /// The grid as text. A cell that differs from `expected` is shown as `[observed]`.
    pub fn draw(&self, expected: &Self) -> String {
        let width = self
            .parties
            .iter()
            .map(String::len)
            .max()
            .unwrap_or_default();
        let mut text = format!("{:width$}  {}\n", "to", self.parties.join(" "));
        for (row, party) in self.parties.iter().enumerate() {
            text += &format!("{party:width$} ");
            for (column, to) in self.parties.iter().enumerate() {
                let (cell, wanted) = (self.cells[row][column], expected.cells[row][column]);
                let sign = cell.map_or("-", |allowed| if allowed { "." } else { "X" });
                let sign = if cell == wanted {
                    sign.to_owned()
                } else {
                    format!("[{sign}]")
                };
                text += &format!(" {sign:^0$}", to.len());
            }
            text.push('\n');
        }
        text
    }
}

fn cell(word: &str) -> Result<Option<bool>, String> {
    match word {
        "." => Ok(Some(true)),
        "X" => Ok(Some(false)),
        "-" => Ok(None),
        _ => Err(format!(
            "a cell is `.` (allowed), `X` (denied) or `-`, not `{word}`"
        )),
    }
}
