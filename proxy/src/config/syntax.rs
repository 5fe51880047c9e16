//! Explains lines that are not valid TOML.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use toml_parser::parser::{Event, EventKind, RecursionGuard, ValidateWhitespace, parse_document};
use toml_parser::{ParseError, Source};

use super::keys::{LONGEST_VALUE, is_accepted};
use super::mistake::{Found, Lines, MOST, Mistakes};
use super::names::meant_anywhere;
use super::values::example;

/// The maximum number of errors that the parser is given.
const MOST_ERRORS: usize = 100_000;

/// The maximum nesting of arrays and tables, the same as in the parser of `toml`.
const DEEPEST: u32 = 80;

/// Returns the part of a text that is worth parsing, up to the first invalid line after [`MOST`] others, and
/// whether that is less than all of it.
///
/// The parser stores every error, so its input must not have too many.
pub(super) fn before_too_many_errors(text: &str) -> (&str, bool) {
    let lines = Lines::of(text);
    let mut broken: BTreeSet<usize> = BTreeSet::new();
    let (mut seen, mut end) = (0, None);
    each_error(text, |error| {
        let at = error.unexpected().map_or(0, |place| place.start()).min(text.len());
        broken.insert(lines.start_of(at));
        if broken.len() > MOST + 1 {
            broken.pop_last();
        }
        seen += 1;
        if seen == MOST_ERRORS {
            end = (0..=at).rev().find(|at| text.is_char_boundary(*at));
        }
    });
    let line = broken.last().copied().filter(|_line| broken.len() > MOST);
    match line.into_iter().chain(end).min() {
        Some(end) => (&text[..end], true),
        None => (text, false),
    }
}

/// Calls `note` for each syntax error, without storing any.
fn each_error(text: &str, note: impl FnMut(ParseError)) {
    let note = RefCell::new(note);
    let source = Source::new(text);
    let tokens = source.lex().into_vec();
    let mut decode = |event: Event| {
        let Some(raw) = source.get(event) else { return };
        let mut note = |error| note.borrow_mut()(error);
        match event.kind() {
            EventKind::SimpleKey => raw.decode_key(&mut (), &mut note),
            EventKind::Scalar => drop(raw.decode_scalar(&mut (), &mut note)),
            _ => {}
        }
    };
    let mut whitespace = ValidateWhitespace::new(&mut decode, source);
    let mut receiver = RecursionGuard::new(&mut whitespace, DEEPEST);
    parse_document(&tokens, &mut receiver, &mut |error| note.borrow_mut()(error));
}

/// Combines the syntax errors of a file with what was `found` in its other lines. Errors about missing keys
/// are left out if the key may be in an invalid line.
pub(super) fn beside_errors(text: &str, errors: &[toml::de::Error], found: Mistakes) -> Mistakes {
    let lines = Lines::of(text);
    let mut broken: BTreeMap<usize, &toml::de::Error> = BTreeMap::new();
    for error in errors {
        // Further errors in the same line are consequences of the first.
        broken.entry(lines.start_of(place(text, error))).or_insert(error);
    }
    drop_consequences(text, &mut broken);
    let mut all = Mistakes::with_more(broken.len() > MOST || found.more);
    all.extend(broken.iter().take(MOST).map(|(start, error)| explain(text, *start, error)));
    // After an invalid heading, keys are attributed to the wrong table.
    if !broken.keys().any(|start| is_heading(&text[*start..])) {
        all.extend(found.into_iter().filter(|found| {
            let start = lines.start_of(found.start());
            !broken.contains_key(&start) && !is_heading(&text[start..])
        }));
    }
    all
}

/// Removes the errors about duplicate keys behind a second `[mapping]`: each is one of another mapping.
fn drop_consequences(text: &str, broken: &mut BTreeMap<usize, &toml::de::Error>) {
    let mut is_of_another = false;
    let mut seen = 0;
    broken.retain(|start, error| {
        let line = &text[*start..];
        if is_heading(line) {
            (is_of_another, seen) = (line.trim_start().starts_with("[mapping]"), *start);
            return true;
        }
        // Each line is looked at once.
        is_of_another = is_of_another && !text[seen..*start].lines().skip(1).any(is_heading);
        seen = *start;
        !(is_of_another && error.message() == "duplicate key")
    });
}

fn is_heading(rest: &str) -> bool {
    rest.trim_start_matches([' ', '\t']).starts_with('[')
}

/// The position of an error: at most the end of its line, even if it was detected after that.
fn place(text: &str, error: &toml::de::Error) -> usize {
    let at = error.span().unwrap_or_default().start.min(text.len());
    let is_behind = at > 0 && text.as_bytes()[at - 1] == b'\n' && at == text.len();
    if is_behind { at - 1 } else { at }
}

/// The parser's message for the invalid line at `start`, or a suggestion of what it should be.
fn explain(text: &str, start: usize, error: &toml::de::Error) -> Found {
    let line = text[start..].lines().next().unwrap_or_default();
    if line.trim_start().starts_with("[mapping]") {
        return Found::at(
            start..start,
            "[mapping] is one table, and there is one already; write [[mapping]] for each",
        );
    }
    if error.message() == "duplicate key" {
        let place = error.span().unwrap_or_default();
        return Found::at(place, "duplicate key; remove one of the two");
    }
    match meant_line(line) {
        Some((column, message)) => Found::at(start + column..start + line.len(), message),
        None => Found::from(error.clone()),
    }
}

/// A suggestion for a line with a known key and an invalid value, and the column of the value.
fn meant_line(line: &str) -> Option<(usize, String)> {
    let separator = line.find(['=', ':'])?;
    let key = meant_anywhere(line[..separator].trim())?;
    let value = line[separator + 1..].split('#').next().unwrap_or_default();
    let column = separator + 1 + (value.len() - value.trim_start().len());
    let no_value = format!("{key}: this is not a TOML value");
    let message = match meant_value(key, value.trim()) {
        Some(meant) => format!("{no_value}; write {key} = {meant}"),
        None => {
            format!("{no_value}; write one key and its value in each line, as in {key} = {}", example(key))
        }
    };
    Some((column, message))
}

/// The accepted value of `key` that the invalid `value` probably means, if there is one.
fn meant_value(key: &str, value: &str) -> Option<String> {
    if value.len() > LONGEST_VALUE {
        return None;
    }
    let is_quote = |c: char| matches!(c, '"' | '\'' | '“' | '”' | '„' | '‘' | '’');
    let bare = |text: &str| text.trim().trim_matches(is_quote).replace(['"', '\\'], "");
    let is_off = ["no", "off", "false"].contains(&&*bare(value).to_lowercase());
    let meant = |value: &str| match (example(key).chars().next(), bare(value)) {
        (_, value) if value.is_empty() => example(key).to_owned(),
        (Some('"'), value) => format!("\"{value}\""),
        (Some('['), _) => {
            let items = value.trim_matches(['[', ']']).split([',', ' ', '\t']).map(bare);
            let items: Vec<String> =
                items.filter(|item| !item.is_empty()).map(|item| format!("\"{item}\"")).collect();
            format!("[{}]", items.join(", "))
        }
        (Some('t'), _) if is_off => "false".to_owned(),
        _ => example(key).to_owned(),
    };
    // Removes what follows a value in other languages.
    let before_comment = value.split("//").next().unwrap_or_default().trim_end();
    let candidates = [value, value.trim_end_matches([',', ';']), before_comment];
    candidates.into_iter().map(meant).find(|meant| is_accepted(key, meant))
}

#[cfg(test)]
mod tests {
    use super::super::names::KEYS;
    use super::*;

    #[test]
    fn every_example_is_accepted() {
        for key in KEYS {
            assert!(is_accepted(key, example(key)), "{key}");
        }
    }

    #[test]
    fn the_parser_is_given_few_errors() {
        for junk in ["x\n", "=\n", "# \u{1}\n", "x = \"\\q\"\n", "x = 1__1\n", "# \u{1}", "\\q", "ü\u{1}"] {
            let text = format!("# é\n{}", junk.repeat(300_000));
            let (start, is_cut) = before_too_many_errors(&text);
            let mut errors = 0;
            each_error(start, |_error| errors += 1);
            assert!(errors <= MOST_ERRORS + 1, "{junk:?}: {errors}");
            assert!(is_cut == (start.len() < text.len()));
            let is_a_line = !junk.ends_with('\n');
            assert!(is_a_line || start.lines().count() == 1 + MOST, "{junk:?}: {}", start.lines().count());
        }
        assert_eq!(before_too_many_errors("x\n[[mapping]]\n"), ("x\n[[mapping]]\n", false));
    }

    #[test]
    fn what_is_suggested_is_accepted() {
        for (line, meant) in [
            ("host = \"127.0.0.1:80\",", Some("\"127.0.0.1:80\"")),
            ("host = 127.0.0.1:80;", Some("\"127.0.0.1:80\"")),
            ("host = 127.0.0.1:80 // web", Some("\"127.0.0.1:80\"")),
            ("host = \"[::]:80\"; to = \"10.0.0.1:80\"", None),
            ("host = 127.0.0.1", None),
            ("to = web:80", Some("\"web:80\"")),
            ("name = my web", None),
            ("proto = tcp udp", None),
            ("proto = tcp,udp", None),
            ("idle_timeout = soon", None),
            ("on_limit = refuse", None),
            ("allow = [\"10.0.0.0/8\" \"fd00::/8\"]", Some("[\"10.0.0.0/8\", \"fd00::/8\"]")),
            ("allow = lan", None),
            ("deny = [10.0.0.0/8; fd00::/8]", None),
            ("attach = yes", Some("true")),
            ("attach = off", Some("false")),
            ("attach = rproxy", Some("true")),
        ] {
            let (_column, message) = meant_line(line).unwrap();
            let key = line.split(' ').next().unwrap();
            match meant {
                Some(meant) => {
                    assert!(message.ends_with(&format!("; write {key} = {meant}")), "{line}: {message}")
                }
                None => {
                    assert!(message.contains("write one key and its value in each line"), "{line}: {message}")
                }
            }
        }
    }
}
