//! Address allocation.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use crate::addr::Subnet4;

/// Why no address can be allocated.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IpamError {
    /// Every address of the pool has a container.
    #[error("no free address in {0}: detach a container, or use a larger --subnet")]
    Exhausted(Subnet4),
    /// The requested address cannot be a container's.
    #[error("{ip} cannot be given in {subnet}: choose from {first} to {last}")]
    NotAssignable {
        /// The requested address.
        ip: Ipv4Addr,
        /// The pool.
        subnet: Subnet4,
        /// Its first address for containers.
        first: Ipv4Addr,
        /// Its last one.
        last: Ipv4Addr,
    },
    /// Another container has the address.
    #[error("address {0} is in use: leave out --ip, or choose another")]
    InUse(Ipv4Addr),
}

/// The next free address after `last`, the most recently allocated one, wrapping around at the end of the
/// pool.
///
/// A freed address is reused only after the whole pool, so that a client which still has it cached does not
/// reach a new container.
///
/// # Errors
/// If every address is used.
/// When every address is used.
pub fn next_free(
    subnet: Subnet4,
    used: &BTreeSet<Ipv4Addr>,
    last: Option<Ipv4Addr>,
) -> Result<Ipv4Addr, IpamError> {
    /// Offset 0 is the network's own address and 1 the gateway's.
    const FIRST: u32 = 2;
    let capacity = subnet.capacity();
    let start = last.filter(|ip| subnet.is_assignable(*ip)).map_or(0, |ip| subnet.offset(ip) - FIRST + 1);
    // At most one more candidate than there are used addresses has to be checked.
    (0..capacity)
        .map(|step| subnet.nth(FIRST + (start + step) % capacity))
        .find(|ip| !used.contains(ip))
        .ok_or(IpamError::Exhausted(subnet))
}

/// Checks that a container can have `ip`.
///
/// # Errors
/// If it is outside of the pool or in use.
pub fn claim(subnet: Subnet4, used: &BTreeSet<Ipv4Addr>, ip: Ipv4Addr) -> Result<Ipv4Addr, IpamError> {
    if !subnet.is_assignable(ip) {
        let last = subnet.nth(subnet.capacity() + 1);
        return Err(IpamError::NotAssignable { ip, subnet, first: subnet.nth(2), last });
    }
    if used.contains(&ip) { Err(IpamError::InUse(ip)) } else { Ok(ip) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet4 {
        text.parse().unwrap()
    }

    fn ip(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(172, 17, 0, last)
    }

    #[test]
    fn addresses_come_in_order() {
        let pool = subnet("172.17.0.0/16");
        let mut used = BTreeSet::new();
        let mut last = None;
        for expected in 2..6 {
            let given = next_free(pool, &used, last).unwrap();
            assert_eq!(given, ip(expected));
            used.insert(given);
            last = Some(given);
        }
    }

    #[test]
    fn a_freed_address_waits_until_the_pool_was_walked() {
        let pool = subnet("172.17.0.0/29"); // .2 to .6
        let mut last = None;
        let given: Vec<_> = (0..7)
            .map(|_| {
                let ip = next_free(pool, &BTreeSet::new(), last).unwrap();
                last = Some(ip);
                ip.octets()[3]
            })
            .collect();
        assert_eq!(given, [2, 3, 4, 5, 6, 2, 3]);
    }

    #[test]
    fn an_address_in_use_is_passed_over() {
        let pool = subnet("172.17.0.0/29");
        let used = BTreeSet::from([ip(3), ip(4)]);
        assert_eq!(next_free(pool, &used, Some(ip(2))).unwrap(), ip(5));
        assert_eq!(next_free(pool, &used, Some(ip(6))).unwrap(), ip(2));
    }

    #[test]
    fn a_full_pool_says_so() {
        let pool = subnet("172.17.0.0/30");
        let error = next_free(pool, &BTreeSet::from([ip(2)]), Some(ip(2))).unwrap_err();
        assert_eq!(error, IpamError::Exhausted(pool));
    }

    #[test]
    fn a_wish_outside_of_the_pool_or_in_use_is_refused() {
        let pool = subnet("172.17.0.0/29");
        assert!(matches!(claim(pool, &BTreeSet::new(), ip(1)), Err(IpamError::NotAssignable { .. })));
        assert!(matches!(claim(pool, &BTreeSet::new(), ip(7)), Err(IpamError::NotAssignable { .. })));
        assert_eq!(claim(pool, &BTreeSet::from([ip(3)]), ip(3)), Err(IpamError::InUse(ip(3))));
        assert_eq!(claim(pool, &BTreeSet::new(), ip(6)), Ok(ip(6)));
    }
}
