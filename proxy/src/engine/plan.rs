//! Computes the difference between served and wanted mappings.
//!
//! A pure function, used by `apply` and by a reload of the configuration. Mappings are identified by their
//! names. An unchanged mapping is not touched.

use std::collections::HashMap;

use rproxy_mapping::Mapping;
use rproxy_mapping::name::Name;

/// The steps from one set of mappings to another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Mappings to add, with their names.
    pub add: Vec<(Name, Mapping)>,
    /// Mappings that keep their sockets but have another backend or other limits, with their names.
    pub change: Vec<(Name, Mapping)>,
    /// Mappings to remove. A mapping that has to listen elsewhere is listed here and in `add`.
    pub remove: Vec<Name>,
    /// The number of mappings that do not change.
    pub unchanged: usize,
}

impl Plan {
    /// The mappings to serve that are not served as they are.
    pub fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        self.add.iter().chain(&self.change).map(|(_name, mapping)| mapping)
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.change.is_empty() && self.remove.is_empty()
    }
}

/// Computes the steps from the mappings in `served` to those in `wanted`.
///
/// # Errors
/// The name that two of the wanted mappings share.
pub fn plan<'a>(
    served: impl IntoIterator<Item = (&'a Name, &'a Mapping)>,
    wanted: impl IntoIterator<Item = Mapping>,
) -> Result<Plan, Name> {
    let mut served: HashMap<&Name, &Mapping> = served.into_iter().collect();
    let mut seen = HashMap::new();
    let mut plan = Plan::default();
    for mapping in wanted {
        let name = mapping.name();
        if seen.insert(name.clone(), ()).is_some() {
            return Err(name);
        }
        match served.remove(&name) {
            None => plan.add.push((name, mapping)),
            Some(old) if *old == mapping => plan.unchanged += 1,
            Some(old) if keeps_sockets(old, &mapping) => plan.change.push((name, mapping)),
            Some(_elsewhere) => {
                plan.remove.push(name.clone());
                plan.add.push((name, mapping));
            }
        }
    }
    plan.remove.extend(served.into_keys().cloned());
    plan.remove.sort();
    Ok(plan)
}

/// Whether both mappings listen on the same sockets.
pub(super) fn keeps_sockets(old: &Mapping, new: &Mapping) -> bool {
    let sockets = |mapping: &Mapping| {
        let count = mapping.backend_ports().count();
        (mapping.protocols(), mapping.host_ports(), mapping.is_v6only(), count)
    };
    old.host() == new.host() && sockets(old) == sockets(new)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use proptest::prelude::*;
    use rproxy_mapping::addr::{Protocol, Protocols};
    use rproxy_mapping::limits::Limits;

    use super::*;

    fn mapping(name: u8, host_port: u16, backend: u8, limit: Option<u64>) -> Mapping {
        let range = |port: u16| Some(format!("{port}").parse().unwrap());
        let host = ("127.0.0.1".parse().unwrap(), range(host_port));
        let backend = (format!("192.0.2.{backend}").parse().unwrap(), "80".parse().unwrap());
        let limits = Limits { idle_timeout: limit.map(Duration::from_secs), ..Limits::default() };
        let mapping = Mapping::new(Protocols::One(Protocol::Tcp), host, backend).unwrap();
        mapping.named(format!("m{name}").parse().unwrap()).limited(limits).unwrap()
    }

    prop_compose! {
        fn any_set()(set in proptest::collection::btree_map(
            0..8_u8, (1..4_u16, 1..3_u8, proptest::option::of(1..3_u64)), 0..8,
        )) -> BTreeMap<Name, Mapping> {
            let mappings = set.into_iter().map(|(name, (port, backend, limit))| mapping(name, port, backend, limit));
            mappings.map(|mapping| (mapping.name(), mapping)).collect()
        }
    }

    proptest! {
        #[test]
        fn the_steps_lead_from_one_set_to_the_other_and_touch_nothing_else(old in any_set(), new in any_set()) {
            let plan = plan(&old, new.values().cloned()).unwrap();
            let mut set = old.clone();
            for name in &plan.remove {
                prop_assert!(set.remove(name).is_some(), "{name} is not there");
            }
            for (name, mapping) in &plan.change {
                let before = set.insert(name.clone(), mapping.clone()).unwrap();
                prop_assert_ne!(&before, mapping);
                prop_assert_eq!(before.host_ports(), mapping.host_ports());
            }
            for (name, mapping) in &plan.add {
                prop_assert!(set.insert(name.clone(), mapping.clone()).is_none(), "{name} is there");
            }
            prop_assert_eq!(&set, &new);
            let same = new.iter().filter(|(name, mapping)| old.get(*name) == Some(*mapping)).count();
            prop_assert_eq!(plan.unchanged, same);
        }

        #[test]
        fn there_is_nothing_to_do_twice(set in any_set()) {
            prop_assert!(plan(&set, set.values().cloned()).unwrap().is_empty());
        }
    }

    #[test]
    fn any_step_is_something_to_do() {
        let one = [mapping(1, 80, 1, None)];
        let served: BTreeMap<Name, Mapping> = one.iter().map(|one| (one.name(), one.clone())).collect();
        let is_empty = |wanted: &[Mapping]| plan(&served, wanted.iter().cloned()).unwrap().is_empty();
        assert!(is_empty(&one));
        assert!(!is_empty(&[]), "one is removed");
        assert!(!is_empty(&[mapping(1, 80, 2, None)]), "it changes");
        assert!(!is_empty(&[one[0].clone(), mapping(2, 81, 1, None)]), "another one is added");
    }

    #[test]
    fn a_name_that_two_have_is_refused() {
        let twice = [mapping(1, 80, 1, None), mapping(1, 81, 1, None)];
        assert_eq!(plan([], twice), Err("m1".parse().unwrap()));
    }
}
