//! Address families, and how the tools call them.

/// An address family, and with it one of the two programs of iptables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4, `iptables`.
    V4,
    /// IPv6, `ip6tables`.
    V6,
}

impl Family {
    /// The protocol.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// What the names of the kernel's options have after `CONFIG_IP`.
    #[must_use]
    pub fn config(self) -> &'static str {
        match self {
            Self::V4 => "",
            Self::V6 => "V6",
        }
    }

    /// The `ip` command of this family.
    #[must_use]
    pub fn ip(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip -6",
        }
    }

    /// The program that loads rules.
    #[must_use]
    pub fn restore(self) -> &'static str {
        match self {
            Self::V4 => "iptables-restore",
            Self::V6 => "ip6tables-restore",
        }
    }

    /// The program that lists the rules of iptables-legacy.
    #[must_use]
    pub fn legacy_save(self) -> &'static str {
        match self {
            Self::V4 => "iptables-legacy-save",
            Self::V6 => "ip6tables-legacy-save",
        }
    }

    /// The file with the names of the tables that iptables-legacy has used in this network namespace.
    #[must_use]
    pub fn legacy_tables(self) -> &'static str {
        match self {
            Self::V4 => "/proc/thread-self/net/ip_tables_names",
            Self::V6 => "/proc/thread-self/net/ip6_tables_names",
        }
    }

    /// The program that lists rules.
    #[must_use]
    pub fn save(self) -> &'static str {
        match self {
            Self::V4 => "iptables-save",
            Self::V6 => "ip6tables-save",
        }
    }
}
