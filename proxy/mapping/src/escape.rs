//! Quotes untrusted text in messages: on one line, and without characters that control a terminal.

use std::ffi::OsStr;
use std::fmt::{self, Display, Write};

/// Escapes control characters, and those that change the direction of the following text. Invalid UTF-8 is replaced.
pub fn escaped<T: AsRef<OsStr> + ?Sized>(text: &T) -> Escaped<'_> {
    Escaped(text.as_ref())
}

/// Text that is escaped when it is displayed.
#[derive(Clone, Copy, Debug)]
pub struct Escaped<'a>(&'a OsStr);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.to_string_lossy().chars().try_for_each(|c| match is_plain(c) {
            true => f.write_char(c),
            false => write!(f, "{}", c.escape_default()),
        })
    }
}

/// Whether a character is not escaped. Escaped are control characters, line and paragraph separators, and bidirectional
/// controls (UAX #9, section 2).
pub fn is_plain(c: char) -> bool {
    let is_directional =
        matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !c.is_control() && !is_directional && !matches!(c, '\u{2028}' | '\u{2029}')
}

/// Whether a text needs no quotes in a table, a log line or a shell.
pub(crate) fn needs_no_quotes(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._:/+%#@[]-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    use super::*;

    #[test]
    fn what_could_be_taken_for_something_else_is_escaped() {
        for (text, shown) in [
            (&b"/etc/r\xc3\xa9seau (1).toml"[..], "/etc/réseau (1).toml"),
            (b"a\nb\r\tc", "a\\nb\\r\\tc"),
            (b"\x1b[31mred\x7f", "\\u{1b}[31mred\\u{7f}"),
            ("\u{202e}lmot.\u{2028}\u{85}".as_bytes(), "\\u{202e}lmot.\\u{2028}\\u{85}"),
            (b"\xff'\"\\", "\u{fffd}'\"\\"),
        ] {
            assert_eq!(escaped(OsStr::from_bytes(text)).to_string(), shown);
        }
        assert_eq!(escaped(Path::new("/run/rproxy.sock")).to_string(), "/run/rproxy.sock");
    }
}
