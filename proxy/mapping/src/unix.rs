//! The address of a Unix socket (unix(7)).

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use crate::escape::is_plain;

/// What the text of an address of a Unix socket begins with.
pub const PREFIX: &str = "unix:";

/// The most bytes of a path, or of a name behind its `@` (`sun_path` of unix(7) has 108 with a zero byte).
const LONGEST: usize = 107;

/// The address of a Unix socket: its absolute path, `unix:/run/app.sock`, or its name in the network namespace,
/// `unix:@app` (an abstract address, unix(7)). It has neither white space nor what could be taken for
/// something else, so that it is one word in a log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UnixAddr(Arc<str>);

impl UnixAddr {
    /// The path, or `None` for an abstract address.
    pub fn path(&self) -> Option<&Path> {
        (!self.is_abstract()).then(|| Path::new(&*self.0))
    }

    /// Whether it is a name in the network namespace, and not a file.
    pub fn is_abstract(&self) -> bool {
        self.0.starts_with('@')
    }

    /// Its path, or its name behind `@`.
    pub(crate) fn bare(&self) -> &str {
        &self.0
    }

    /// What the kernel calls it: a path, or a zero byte and a name.
    pub fn sun_path(&self) -> String {
        self.0.strip_prefix('@').map_or_else(|| self.0.to_string(), |name| format!("\0{name}"))
    }
}

impl fmt::Display for UnixAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.0)
    }
}

/// Parses what [`Display`](fmt::Display) writes, and also `unix:///run/app.sock`, as URLs have it.
impl FromStr for UnixAddr {
    type Err = UnixAddrError;

    fn from_str(text: &str) -> Result<Self, UnixAddrError> {
        let rest = text.strip_prefix(PREFIX).unwrap_or(text);
        let addr = rest.strip_prefix("//").filter(|path| path.starts_with('/')).unwrap_or(rest);
        let (is_place, len) = match addr.strip_prefix('@') {
            Some(name) => (!name.is_empty(), name.len()),
            // With two slashes, a URL would have a host.
            None => (addr.starts_with('/') && !addr.starts_with("//") && !addr.ends_with('/'), addr.len()),
        };
        if len > LONGEST {
            return Err(UnixAddrError::Long(len));
        }
        if !is_place || addr.contains(|c: char| c.is_whitespace() || !is_plain(c)) {
            return Err(UnixAddrError::Wrong(text.escape_debug().to_string()));
        }
        Ok(Self(addr.into()))
    }
}

/// Why a text is not the address of a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnixAddrError {
    /// It is neither an absolute path nor a name; escaped.
    #[error(
        "'{0}' is not the address of a Unix socket; write unix:/run/app.sock, or unix:@app for an abstract one"
    )]
    Wrong(String),
    /// It has so many bytes.
    #[error(
        "the address of a Unix socket has {0} bytes, and {LONGEST} are the most (unix(7)); write a shorter one"
    )]
    Long(usize),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_names_are_understood() {
        for (text, expected) in [
            ("unix:/run/app.sock", "/run/app.sock"),
            ("unix:///run/app.sock", "/run/app.sock"),
            ("unix:@app", "\0app"),
            ("unix:/run/a:80", "/run/a:80"),
        ] {
            assert_eq!(text.parse::<UnixAddr>().unwrap().sun_path(), expected, "{text}");
        }
        let url: UnixAddr = "unix:///run/app.sock".parse().unwrap();
        assert_eq!(url.to_string(), "unix:/run/app.sock");
        assert!(!url.is_abstract() && url.path().is_some());
        let name: UnixAddr = "unix:@app".parse().unwrap();
        assert!(name.is_abstract() && name.path().is_none());
        let longest = format!("unix:@{}", "a".repeat(107));
        assert_eq!(longest.parse::<UnixAddr>().unwrap().sun_path().len(), 108);
    }

    #[test]
    fn what_no_socket_can_have_is_refused() {
        for text in [
            "unix:",
            "unix:app.sock",
            "unix:@",
            "unix:/",
            "unix:/run/",
            "unix:/run/a\nb",
            "unix:/run/a b",
            "unix:/\0",
            "unix://run/a",
            "unix:/run/a\u{202e}",
        ] {
            let message = text.parse::<UnixAddr>().expect_err(text).to_string();
            assert!(message.contains("write unix:/run/app.sock"), "{text}: {message}");
        }
        let long = format!("unix:/{}", "a".repeat(107)).parse::<UnixAddr>().unwrap_err();
        assert!(long.to_string().contains("108 bytes"), "{long}");
    }
}
