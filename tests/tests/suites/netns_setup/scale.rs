//! Scale: two hundred containers and two thousand ports.

use std::time::Instant;

use testkit::suite::Case;

use super::stage::{Backend, Stage, assert_reaches, for_each_firewall, serve};

const CONTAINERS: u16 = 200;
const PORTS_EACH: u16 = 10;

pub(crate) fn cases() -> Vec<Case> {
    for_each_firewall("two hundred containers, two thousand ports", grow)
}

#[expect(clippy::print_stdout, reason = "figures for whoever looks; nothing depends on them")]
fn grow(stage: &Stage, backend: Backend) {
    stage.ok(&format!("up {}", backend.option()));
    let mut rules = Vec::new();
    let start = Instant::now();
    for number in 0..CONTAINERS {
        stage.ok(&format!("attach c{number}"));
        let first = 10_000 + number * PORTS_EACH;
        let last = first + PORTS_EACH - 1;
        stage.ok(&format!("publish c{number} -p {first}-{last}:{first}-{last} --via dnat"));
        if number == 0 || number == CONTAINERS - 1 {
            rules.push(count_rules(stage, backend));
        }
    }
    println!("{backend:?}: {CONTAINERS} containers in {:.1?}, rules {rules:?}", start.elapsed());
    let ports = usize::from(PORTS_EACH);
    let (few, many) = (rules[0], rules[1]);
    match backend {
        Backend::Nft => assert_eq!(few, many, "rules do not depend on ports"),
        // A translation, an accepting rule and a masquerading rule for each port, one drop for each container.
        _ => assert_eq!(many - few, usize::from(CONTAINERS - 1) * (3 * ports + 1)),
    }
    let last = testkit::netns::Namespace::new();
    stage.ok(&format!("attach served --netns {}", last.path().display()));
    let _server = serve(&last, 80);
    stage.ok("publish served -p 80:80 --via dnat");
    assert_reaches(&stage.client, testkit::topology::HOST_V4, 80);
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
    stage.ok("down");
}

fn count_rules(stage: &Stage, backend: Backend) -> usize {
    match backend {
        Backend::Nft => {
            let listing = stage.host("nft -a list ruleset");
            listing.lines().filter(|line| line.contains("# handle") && !line.contains('{')).count()
        }
        _ => stage.host("iptables-save").lines().filter(|line| line.starts_with("-A")).count(),
    }
}
