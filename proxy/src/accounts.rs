//! The users and groups of this machine, by name or number.
//!
//! Names are only looked up in `/etc/passwd` and `/etc/group`: other sources would need shared libraries, which a static
//! program does not have.

use std::fs;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// The number of a user, which may be written as one.
///
/// # Errors
/// What is wrong, and a way out.
pub(crate) fn user_id(name: &str) -> Result<u32, String> {
    numbered(name, || Ok(User::find(&read(PASSWD)?, name)?.uid))
}

/// The number of a group, which may be written as one.
///
/// # Errors
/// What is wrong, and a way out.
pub(crate) fn group_id(name: &str) -> Result<u32, String> {
    numbered(name, || find_group(&read(GROUP)?, name))
}

/// A user and the group of the same account. The group of a user without one has to be known.
///
/// # Errors
/// What is wrong, and a way out.
pub(crate) fn user_with_group(name: &str) -> Result<(u32, u32), String> {
    let found = read(PASSWD).and_then(|passwd| User::find(&passwd, name));
    match (name.parse(), found) {
        (Ok(_number), Err(_none)) => Err("a numeric user needs a group, as in 65534:65534".to_owned()),
        (Ok(number), Ok(user)) => Ok((number, user.gid)),
        (Err(_), found) => found.map(|user| (user.uid, user.gid)),
    }
}

fn numbered(name: &str, find: impl FnOnce() -> Result<u32, String>) -> Result<u32, String> {
    match name.parse() {
        // -1, which chown(2) takes for no change.
        Ok(u32::MAX) => Err(format!("{name} is not the number of a user or group; write another one")),
        Ok(number) => Ok(number),
        Err(_name) => find(),
    }
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}; a number works, too"))
}

/// An account of passwd(5).
struct User {
    uid: u32,
    gid: u32,
}

impl User {
    fn find(passwd: &str, name: &str) -> Result<Self, String> {
        let line = line_of(passwd, name)
            .ok_or_else(|| format!("no user {name:?} in {PASSWD}; a number works, too"))?;
        let damaged = || format!("its line in {PASSWD} is damaged");
        Ok(Self { uid: number(line, 2).ok_or_else(damaged)?, gid: number(line, 3).ok_or_else(damaged)? })
    }
}

/// The number of a group of group(5).
fn find_group(group: &str, name: &str) -> Result<u32, String> {
    let line =
        line_of(group, name).ok_or_else(|| format!("no group {name:?} in {GROUP}; a number works, too"))?;
    number(line, 2).ok_or_else(|| format!("its line in {GROUP} is damaged"))
}

/// Returns the line of `name` in a file of colon-separated fields.
fn line_of<'a>(file: &'a str, name: &str) -> Option<&'a str> {
    file.lines().find(|line| line.split(':').next() == Some(name) && !name.is_empty())
}

/// Parses a field of a line as a number.
fn number(line: &str, field: usize) -> Option<u32> {
    line.split(':').nth(field)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str =
        "root:x:0:0:root:/root:/bin/bash\nproxy:x:13:14:proxy:/bin:/usr/sbin/nologin\nbad:x\n";
    const GROUPS: &str = "root:x:0:\nweb:x:33:proxy\nbad:x\n";

    #[test]
    fn names_are_those_of_the_files() {
        let user = |name| User::find(USERS, name).map(|user| (user.uid, user.gid));
        assert_eq!((user("proxy"), find_group(GROUPS, "web")), (Ok((13, 14)), Ok(33)));
        for (message, part) in [
            (user("nobody").unwrap_err(), "no user \"nobody\" in /etc/passwd; a number works"),
            (user("bad").unwrap_err(), "its line in /etc/passwd is damaged"),
            (user("").unwrap_err(), "no user"),
            (
                find_group(GROUPS, "nogroup").unwrap_err(),
                "no group \"nogroup\" in /etc/group; a number works",
            ),
            (find_group(GROUPS, "bad").unwrap_err(), "its line in /etc/group is damaged"),
        ] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn numbers_need_no_name() {
        assert_eq!((user_id("4711"), group_id("4711"), user_id("root")), (Ok(4711), Ok(4711), Ok(0)));
        assert!(user_id("4294967295").unwrap_err().contains("is not the number of a user"));
        assert!(user_with_group("4711").unwrap_err().contains("needs a group"));
        assert_eq!(user_with_group("root"), Ok((0, 0)));
    }
}
