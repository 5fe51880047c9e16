//! Commands in messages, which have to be about the same state.

use std::path::Path;

use crate::state;

/// Completes the commands in messages.
#[derive(Debug, Clone, Default)]
pub struct Hints {
    /// The option that every command needs.
    option: String,
}

impl Hints {
    /// Those for the state in this directory.
    #[must_use]
    pub fn about(state_dir: &Path) -> Self {
        if state_dir == Path::new(state::DEFAULT_DIR) {
            return Self::default();
        }
        let path = state_dir.display().to_string();
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@".contains(c);
        let path =
            if path.chars().all(is_plain) { path } else { format!("'{}'", path.replace('\'', r"'\''")) };
        Self { option: format!(" --state-dir {path}") }
    }

    /// Adds the option to each command that `text` has between backquotes.
    #[must_use]
    pub fn complete(&self, text: &str) -> String {
        let is_command = |place: usize, part: &str| {
            place % 2 == 1 && part.starts_with("netns-setup ") && !part.contains("--state-dir")
        };
        let parts = text.split('`').enumerate().map(|(place, part)| match is_command(place, part) {
            true => format!("{part}{}", self.option),
            false => part.to_owned(),
        });
        parts.collect::<Vec<_>>().join("`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_about_the_same_state() {
        let text = "2 differences found: run `netns-setup repair`, or `netns-setup down`; see `ip rule`";
        let of = |directory: &str| Hints::about(Path::new(directory)).complete(text);
        assert_eq!(of(state::DEFAULT_DIR), text);
        let expected = "2 differences found: run `netns-setup repair --state-dir /tmp/x`, or `netns-setup down --state-dir \
                        /tmp/x`; see `ip rule`";
        assert_eq!(of("/tmp/x"), expected);
        assert!(of("/tmp/it's x").contains(r"repair --state-dir '/tmp/it'\''s x'`"));
    }
}
