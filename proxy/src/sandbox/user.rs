//! The user to change to: `USER[:GROUP]`, by name or number.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::str::FromStr;

use nix::unistd::{Gid, Uid, fchown};

use crate::accounts;

/// A user and a group.
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
}

impl FromStr for User {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (uid, gid) = match text.split_once(':') {
            Some((user, group)) => (accounts::user_id(user)?, accounts::group_id(group)?),
            None => accounts::user_with_group(text)?,
        };
        Ok(Self { text: text.to_owned(), uid: Uid::from_raw(uid), gid: Gid::from_raw(gid) })
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

    #[test]
    fn users_and_groups_are_names_or_numbers() {
        for (text, uid, gid) in [("root", 0, 0), ("root:7", 0, 7), ("9:8", 9, 8), ("9:root", 9, 0)] {
            let user: User = text.parse().unwrap();
            assert_eq!((user.uid.as_raw(), user.gid.as_raw()), (uid, gid), "{text}");
        }
    }

    #[test]
    fn others_are_refused_with_a_way_out() {
        for (text, part) in [
            ("no.such.user", "no user \"no.such.user\""),
            ("", "no user \"\""),
            ("root:no.such.group", "no group \"no.such.group\""),
            ("root:", "no group \"\""),
            ("9", "as in 65534:65534"),
            ("-1:0", "no user"),
        ] {
            let message = text.parse::<User>().unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
