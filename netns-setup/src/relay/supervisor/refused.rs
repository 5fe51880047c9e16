//! The ports that the relay does not serve now, though it should.

use std::collections::BTreeMap;

use super::log::log;
use crate::model::MappingKey;
use crate::relay::message::Unserved;

/// The ports, and why.
#[derive(Debug, Default)]
pub(super) struct Refused(BTreeMap<MappingKey, String>);

impl Refused {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn contains(&self, key: &MappingKey) -> bool {
        self.0.contains_key(key)
    }

    /// Adds ports. Each reason is logged once.
    pub(super) fn add(&mut self, keys: impl Iterator<Item = MappingKey>, why: &str) {
        let news = keys.filter(|key| self.0.insert(*key, why.to_owned()).as_deref() != Some(why));
        let news: Vec<_> = news.map(|key| key.to_string()).collect();
        if !news.is_empty() {
            log(&format!("{} not served until that is possible: {why}", subject(&news)));
        }
    }

    /// Keeps only those ports.
    pub(super) fn retain(&mut self, is_kept: impl Fn(&MappingKey) -> bool) {
        self.0.retain(|key, _why| is_kept(key));
    }

    /// Forgets those ports, which are served again.
    pub(super) fn forget(&mut self, is_served: impl Fn(&MappingKey) -> bool) {
        let served: Vec<_> = self.0.keys().filter(|key| is_served(key)).copied().collect();
        served.iter().for_each(|key| drop(self.0.remove(key)));
        let served: Vec<_> = served.iter().map(ToString::to_string).collect();
        if !served.is_empty() {
            log(&format!("{} served again", subject(&served)));
        }
    }

    pub(super) fn listed(&self) -> Vec<Unserved> {
        self.0.iter().map(|(key, why)| Unserved { key: *key, why: why.clone() }).collect()
    }
}

/// Ports as the subject of a sentence.
fn subject(ports: &[String]) -> String {
    match ports {
        [one] => format!("host port {one} is"),
        [first, .., last] => format!("host ports {first} to {last} ({}) are", ports.len()),
        [] => "no host port is".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_a_subject() {
        let ports = ["*:80/tcp", "*:81/tcp", "*:82/tcp"].map(str::to_owned);
        assert_eq!(subject(&ports[..1]), "host port *:80/tcp is");
        assert_eq!(subject(&ports), "host ports *:80/tcp to *:82/tcp (3) are");
    }
}
