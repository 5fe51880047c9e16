//! Who may connect to a Unix socket that a mapping listens on: the mode and the owner of its file.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The mode, user and group of the file of a Unix socket, as far as they are asked for (systemd.socket(5): `SocketMode=`,
/// `SocketUser=`, `SocketGroup=`). To connect takes write permission (unix(7)).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketPermissions {
    /// The mode; by default 0600.
    pub mode: Option<FileMode>,
    /// The name or number of the user who owns it.
    pub user: Option<Arc<str>>,
    /// The name or number of its group.
    pub group: Option<Arc<str>>,
}

impl SocketPermissions {
    /// Whether something is asked for.
    pub fn is_some(&self) -> bool {
        *self != Self::default()
    }
}

/// Parses the name or number of a user or group (useradd(8)), which is looked up when the socket is bound.
///
/// # Errors
/// A message that says what is wrong.
pub fn parse_owner(text: &str) -> Result<Arc<str>, String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-$@".contains(&byte);
    if text.is_empty() || text.starts_with('-') || !text.bytes().all(is_plain) {
        return Err(format!(
            "'{}' is not a name; write that of a user or group, or its number",
            text.escape_debug()
        ));
    }
    Ok(text.into())
}

/// The permission bits of a file, in octal digits: `0660`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMode(u16);

impl FileMode {
    /// Of a file that only its owner reads and writes.
    pub const PRIVATE: Self = Self(0o600);

    /// The bits.
    pub fn bits(self) -> u32 {
        self.0.into()
    }
}

impl fmt::Display for FileMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl FromStr for FileMode {
    type Err = FileModeError;

    fn from_str(text: &str) -> Result<Self, FileModeError> {
        let is_octal =
            (3..=4).contains(&text.len()) && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        let bits = u16::from_str_radix(text, 8).ok().filter(|bits| is_octal && *bits <= 0o777);
        bits.map(Self).ok_or_else(|| FileModeError(text.escape_debug().to_string()))
    }
}

/// Why a text is not a mode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not the mode of a file; write three octal digits behind a 0, such as \"0660\"")]
pub struct FileModeError(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_has_a_name_or_a_number() {
        for text in ["www-data", "33", "_apt", "user@domain"] {
            assert_eq!(&*parse_owner(text).unwrap(), text);
        }
        for wrong in ["", "-x", "a b", "a:b", "a\n"] {
            parse_owner(wrong).unwrap_err();
        }
    }

    #[test]
    fn a_mode_has_octal_digits() {
        for (text, expected) in [("0660", "0660"), ("666", "0666"), ("0600", "0600"), ("0000", "0000")] {
            assert_eq!(text.parse::<FileMode>().unwrap().to_string(), expected);
        }
        for wrong in ["", "6", "66", "0o660", "+660", "0860", "1777", "00660", "rw-rw----"] {
            let message = wrong.parse::<FileMode>().expect_err(wrong).to_string();
            assert!(message.contains("such as \"0660\""), "{message}");
        }
    }
}
