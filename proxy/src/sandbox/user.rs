//! The user to change to: `USER[:GROUP]`, by name or number.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::str::FromStr;

use nix::unistd::{Gid, Uid, fchown};

/// A user and a group.
///
/// Names are only looked up in `/etc/passwd` and `/etc/group`: other sources would need shared libraries,
/// which a static program does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    text: String,
    uid: Uid,
    gid: Gid,
}

impl User {
    pub(super) fn uid(&self) -> Uid {
        self.uid
    }

    pub(super) fn gid(&self) -> Gid {
        self.gid
    }

    /// Makes this user the owner of a socket. Only sockets of the same user can share a port (socket(7),
    /// `SO_REUSEPORT`).
    ///
    /// # Errors
    /// Those of fchown(2).
    pub fn own(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        Ok(fchown(socket, Some(self.uid), Some(self.gid))?)
    }

    fn find(text: &str, passwd: &str, group: &str) -> Result<Self, String> {
        let (user, group_name) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let account = find(passwd, user);
        let uid = match (user.parse(), account) {
            (Ok(number), _) => number,
            (Err(_), Some(account)) => number(account, 2).ok_or("its line in /etc/passwd is damaged")?,
            (Err(_), None) => return Err(format!("no user {user:?} in /etc/passwd; a number works, too")),
        };
        let gid = match group_name {
            Some(name) => match (name.parse(), find(group, name)) {
                (Ok(number), _) => number,
                (Err(_), Some(line)) => number(line, 2).ok_or("its line in /etc/group is damaged")?,
                (Err(_), None) => {
                    return Err(format!("no group {name:?} in /etc/group; a number works, too"));
                }
            },
            None => account
                .and_then(|account| number(account, 3))
                .ok_or("a numeric user needs a group, as in 65534:65534")?,
        };
        Ok(Self { text: text.to_owned(), uid: Uid::from_raw(uid), gid: Gid::from_raw(gid) })
    }
}

/// Returns the line of `name` in a file of colon-separated fields (passwd(5), group(5)).
fn find<'a>(file: &'a str, name: &str) -> Option<&'a str> {
    file.lines().find(|line| line.split(':').next() == Some(name) && !name.is_empty())
}

/// Parses a field of a line as a number.
fn number(line: &str, field: usize) -> Option<u32> {
    line.split(':').nth(field)?.parse().ok()
}

impl FromStr for User {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self::find(text, &read("/etc/passwd"), &read("/etc/group"))
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nproxy:x:13:14:proxy:/bin:/usr/sbin/nologin\nbad:x\n";
    const GROUP: &str = "root:x:0:\nweb:x:33:proxy\n";

    #[test]
    fn users_and_groups_are_names_or_numbers() {
        for (text, uid, gid) in
            [("proxy", 13, 14), ("proxy:web", 13, 33), ("proxy:7", 13, 7), ("9:8", 9, 8), ("9:web", 9, 33)]
        {
            let user = User::find(text, PASSWD, GROUP).unwrap();
            assert_eq!((user.uid.as_raw(), user.gid.as_raw()), (uid, gid), "{text}");
        }
    }

    #[test]
    fn others_are_refused_with_a_way_out() {
        for (text, part) in [
            ("nobody", "no user \"nobody\""),
            ("", "no user \"\""),
            ("proxy:no", "no group \"no\""),
            ("proxy:", "no group \"\""),
            ("9", "as in 65534:65534"),
            ("bad", "damaged"),
            ("-1:0", "no user"),
        ] {
            let message = User::find(text, PASSWD, GROUP).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
