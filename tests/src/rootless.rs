//! A user without privileges, who may make user namespaces and has no entry in the machine's files.

/// The number of the user.
pub const USER: u32 = 4242;

/// The numbers of users inside of the user's namespaces.
pub const SUBORDINATE: &str = "100000:65536";

/// Runs its arguments as [`USER`], who is known in this mount namespace alone, and may open `/dev/net/tun` as on other
/// machines. Its first argument is a directory with
/// room for mounts; the environment has `USER`, `SUBORDINATE` and `HOME`.
pub const AS_USER: &str = r#"
set -e
dir=$1
shift
mkdir "$dir/etc"
mount --rbind /etc "$dir/etc"
mount -t tmpfs tmpfs /etc
for file in "$dir"/etc/*; do ln -s "$file" /etc/; done
rm -f /etc/passwd /etc/group /etc/subuid /etc/subgid
{ cat "$dir/etc/passwd"; echo "rootless:x:$USER:$USER::$HOME:/bin/sh"; } >/etc/passwd
{ cat "$dir/etc/group"; echo "rootless:x:$USER:"; } >/etc/group
echo "rootless:$SUBORDINATE" >/etc/subuid
cp /etc/subuid /etc/subgid
mount -t tmpfs tmpfs /dev/net
mknod --mode 666 /dev/net/tun c 10 200
mount -t tmpfs tmpfs /run
exec setpriv --reuid "$USER" --regid "$USER" --clear-groups "$@"
"#;
