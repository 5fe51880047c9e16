//! What is meant by keys that there are not, and by lines that are no TOML.

use super::keys::KEYS;
use super::mistake::Found;
use super::values::example;

/// How similar two words have to be for one to be a slip of the other, by Jaro and Winkler.
const SIMILAR: f64 = 0.8;

/// The key of a mapping that `written` is meant to be, if it resembles one.
pub(super) fn meant_key(written: &str) -> Option<&'static str> {
    let plain = written.to_lowercase().replace('-', "_");
    match &*plain {
        "listen" | "bind" | "address" => return Some("host"),
        "backend" | "target" | "upstream" | "forward" => return Some("to"),
        _ => {}
    }
    let score = |key: &str| strsim::jaro_winkler(&plain, key);
    let best = KEYS.into_iter().max_by(|a, b| score(a).total_cmp(&score(b)))?;
    (score(best) >= SIMILAR).then_some(best)
}

/// What to say about a key of a mapping that there is not.
pub(super) fn unknown_key(written: &str) -> String {
    match meant_key(written) {
        Some(key) => format!("unknown key `{written}`; did you mean `{key}`?"),
        None => format!("unknown key `{written}`; the keys are {}", KEYS.join(", ")),
    }
}

/// What to say about a key that is in no table, or about a table that there is not.
pub(super) fn unknown_table(written: &str, is_table: bool) -> String {
    let resembles = |table: &str| strsim::jaro_winkler(&written.to_lowercase(), table) >= SIMILAR;
    match (is_table, meant_key(written)) {
        (true, _) if resembles("mapping") => format!("unknown table `{written}`; did you mean [[mapping]]?"),
        (true, _) if resembles("defaults") => format!("unknown table `{written}`; did you mean [defaults]?"),
        (true, _) => format!("unknown table `{written}`; the tables are [[mapping]] and [defaults]"),
        (false, Some(key)) => format!("`{written}` is in no table; write [[mapping]] in a line before {key}"),
        (false, None) => format!("unknown key `{written}`; a file has the tables [[mapping]] and [defaults]"),
    }
}

/// All that is to be said about a file with lines that are no TOML: these, and what was `found` in other lines. What
/// is missing may be in the former.
pub(super) fn beside_errors(text: &str, errors: &[toml::de::Error], found: Vec<Found>) -> Vec<Found> {
    let mut broken: Vec<usize> = Vec::new();
    let mut all: Vec<Found> = Vec::new();
    for error in errors {
        let line = line_start(text, place(text, error));
        // What follows in the same line follows from it.
        if !broken.contains(&line) {
            broken.push(line);
            all.push(explain(text, error));
        }
    }
    // Behind a heading that cannot be read, everything is another table's.
    if !broken.iter().any(|start| is_heading(&text[*start..])) {
        all.extend(found.into_iter().filter(|found| {
            let start = line_start(text, found.start());
            !broken.contains(&start) && !is_heading(&text[start..])
        }));
    }
    all
}

fn is_heading(rest: &str) -> bool {
    rest.trim_start_matches([' ', '\t']).starts_with('[')
}

/// Where the line begins that has `at`.
fn line_start(text: &str, at: usize) -> usize {
    let at = (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[..at].rfind('\n').map_or(0, |end| end + 1)
}

/// Where an error is: not behind the end of its line, where it was noticed.
fn place(text: &str, error: &toml::de::Error) -> usize {
    let at = error.span().unwrap_or_default().start.min(text.len());
    if at > 0 && text.as_bytes().get(at - 1) == Some(&b'\n') && text[at..].trim().is_empty() {
        at - 1
    } else {
        at
    }
}

/// What the parser says about a line that is no TOML, or what is meant by it.
pub(super) fn explain(text: &str, error: &toml::de::Error) -> Found {
    let start = line_start(text, place(text, error));
    let line = text[start..].lines().next().unwrap_or_default();
    if line.trim_start().starts_with("[mapping]") {
        return Found::at(
            start..start,
            "[mapping] is one table, and there is one already; write [[mapping]] for each",
        );
    }
    if error.message() == "duplicate key" {
        let place = error.span().unwrap_or_default();
        return Found::at(place, "duplicate key; leave one of the two out");
    }
    match meant_line(line) {
        Some((column, message)) => Found::at(start + column..start + line.len(), message),
        None => Found::from(error.clone()),
    }
}

/// What is meant by a line with a key whose value lacks its quotes, and where the value is.
fn meant_line(line: &str) -> Option<(usize, String)> {
    let separator = line.find(['=', ':'])?;
    let key = meant_key(line[..separator].trim())?;
    let value = line[separator + 1..].split('#').next().unwrap_or_default();
    let column = separator + 1 + (value.len() - value.trim_start().len());
    let is_quote = |c: char| matches!(c, '"' | '\'' | '“' | '”' | '„' | '‘' | '’');
    let bare = |text: &str| text.trim().trim_matches(is_quote).replace(['"', '\\'], "");
    let meant = match (example(key).chars().next(), bare(value)) {
        (_, value) if value.is_empty() => example(key).to_owned(),
        (Some('"'), value) => format!("\"{value}\""),
        (Some('['), value) => {
            let items = value.trim_matches(['[', ']']).split(',').map(bare).filter(|item| !item.is_empty());
            let items: Vec<String> = items.map(|item| format!("\"{item}\"")).collect();
            format!("[{}]", items.join(", "))
        }
        (Some('t'), value) if ["no", "off", "false"].contains(&&*value.to_lowercase()) => "false".to_owned(),
        _ => example(key).to_owned(),
    };
    Some((column, format!("{key}: this is no value in TOML; write {key} = {meant}")))
}
