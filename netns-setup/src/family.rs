//! Address families, and how the tools call them.

/// An address family, and with it one of the two programs of iptables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4, `iptables`.
    V4,
    /// IPv6, `ip6tables`.
    V6,
}

/// The tables of the kernel that the programs of iptables change. Rules of both apply, and each program sees only its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Variant {
    /// Those of the programs that are called without a variant, which the administrator has chosen.
    #[default]
    Chosen,
    /// Those of nftables (`iptables-nft`).
    Nft,
    /// The older ones (`iptables-legacy`).
    Legacy,
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
    pub fn restore(self, variant: Variant) -> &'static str {
        match (self, variant) {
            (Self::V4, Variant::Chosen) => "iptables-restore",
            (Self::V4, Variant::Nft) => "iptables-nft-restore",
            (Self::V4, Variant::Legacy) => "iptables-legacy-restore",
            (Self::V6, Variant::Chosen) => "ip6tables-restore",
            (Self::V6, Variant::Nft) => "ip6tables-nft-restore",
            (Self::V6, Variant::Legacy) => "ip6tables-legacy-restore",
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
    pub fn save(self, variant: Variant) -> &'static str {
        match (self, variant) {
            (Self::V4, Variant::Chosen) => "iptables-save",
            (Self::V4, Variant::Nft) => "iptables-nft-save",
            (Self::V4, Variant::Legacy) => "iptables-legacy-save",
            (Self::V6, Variant::Chosen) => "ip6tables-save",
            (Self::V6, Variant::Nft) => "ip6tables-nft-save",
            (Self::V6, Variant::Legacy) => "ip6tables-legacy-save",
        }
    }
}
