//! The network interfaces of link-local addresses.

/// Finds network interfaces by name.
///
/// A link-local address needs the index of its interface (RFC 4007, section 11), but users write its name. This crate
/// does no I/O, so the caller of a parser passes in the existing interfaces.
pub trait Interfaces {
    /// The index of the interface `name`, if there is one.
    fn index_of(&self, name: &str) -> Option<u32>;

    /// The name of an interface for hints, preferably one that leads to other machines.
    fn example(&self) -> Option<String>;
}

/// No interfaces: zones are parsed as indexes, as [`Display`](std::fmt::Display) writes them.
#[derive(Clone, Copy, Debug)]
pub struct NoInterfaces;

impl Interfaces for NoInterfaces {
    fn index_of(&self, _name: &str) -> Option<u32> {
        None
    }

    fn example(&self) -> Option<String> {
        None
    }
}

/// Two interfaces, for tests: `lo` is 1 and `eth0` is 2.
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct TwoInterfaces;

#[cfg(test)]
impl Interfaces for TwoInterfaces {
    fn index_of(&self, name: &str) -> Option<u32> {
        [("lo", 1), ("eth0", 2)].into_iter().find(|(known, _)| *known == name).map(|(_, index)| index)
    }

    fn example(&self) -> Option<String> {
        Some("eth0".to_owned())
    }
}
