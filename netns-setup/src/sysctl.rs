//! Kernel parameters, in the network namespace of the calling thread.

use std::io;
use std::path::PathBuf;

/// The parameter of an interface. A dot in its name is written as a slash, as `sysctl` does.
#[must_use]
pub fn of_interface(family: &str, interface: &str, parameter: &str) -> String {
    format!("net.{family}.conf.{}.{parameter}", interface.replace('.', "/"))
}

/// Reads a parameter; `None` if this kernel lacks it.
///
/// # Errors
/// If it exists but cannot be read.
pub fn read(key: &str) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path(key)) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sets a parameter.
///
/// # Errors
/// If the kernel refuses.
pub fn write(key: &str, value: &str) -> io::Result<()> {
    std::fs::write(path(key), value)
}

fn path(key: &str) -> PathBuf {
    let swap = |letter| match letter {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    ["/proc/sys/", &key.chars().map(swap).collect::<String>()].concat().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_of_an_interface_survive() {
        assert_eq!(path("net.ipv4.ip_forward"), PathBuf::from("/proc/sys/net/ipv4/ip_forward"));
        let key = of_interface("ipv4", "br.7", "route_localnet");
        assert_eq!(key, "net.ipv4.conf.br/7.route_localnet");
        assert_eq!(path(&key), PathBuf::from("/proc/sys/net/ipv4/conf/br.7/route_localnet"));
    }

    #[test]
    fn a_parameter_that_does_not_exist_is_none() {
        assert_eq!(read("net.ipv4.no_such_thing").unwrap(), None);
    }
}
