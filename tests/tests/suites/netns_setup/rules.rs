//! The rules as the tools list them.

use testkit::suite::Case;

use super::stage::{Backend, Stage, assert_same, case, for_each_firewall, serve};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![case("nft holds one table with ports in maps", nft_table)];
    cases.extend(for_each_firewall("the nat table is the story's", nat_table));
    cases.extend(for_each_firewall("check finds what repair mends", check_and_repair));
    cases.extend(for_each_firewall("down leaves the rules of others", others_stay));
    cases.extend(for_each_firewall("the rules are found after iptables was switched", switched));
    cases
}

/// S11, rule by rule and in this order.
fn nat_table(stage: &Stage, backend: Backend) {
    if backend == Backend::Nft {
        return;
    }
    stage.ok(&format!("up {}", backend.option()));
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    stage.ok("publish web -p 80:80");
    let shown = stage.host("iptables -t nat -S");
    let rules: Vec<&str> = shown.lines().filter(|line| line.starts_with("-A")).collect();
    assert_eq!(
        rules,
        [
            "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
            "-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER",
            "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
            "-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE",
            "-A DOCKER -i docker0 -j RETURN",
            "-A DOCKER ! -i docker0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 172.17.0.2:80",
        ],
        "{shown}"
    );
    let filter = stage.host("iptables -S");
    for rule in [
        "-A FORWARD -j DOCKER-FORWARD",
        "-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT",
        "-A DOCKER ! -i docker0 -o docker0 -j DROP",
    ] {
        assert!(filter.lines().any(|line| line == rule), "{rule} is not in\n{filter}");
    }
    let raw = stage.host("iptables -t raw -S");
    assert!(raw.contains("-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP"), "{raw}");
}

fn nft_table(stage: &Stage) {
    stage.ok("up --firewall nft");
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    stage.ok("publish web -p 80:80 -p 10.0.0.11:81:80");
    let listing = stage.host("nft list ruleset");
    assert_eq!(listing.lines().filter(|line| line.starts_with("table ")).count(), 1, "{listing}");
    assert!(listing.contains("table inet netns-setup-docker0 {"), "{listing}");
    assert!(listing.contains("elements = { tcp . 80 : 172.17.0.2 . 80 }"), "{listing}");
    assert!(listing.contains("elements = { 10.0.0.11 . tcp . 81 : 172.17.0.2 . 80 }"), "{listing}");
    // Chains that are registered anew let a packet through that meets neither the old nor the new ones.
    let handles = || {
        let listing = stage.host("nft -a list table inet netns-setup-docker0");
        let lines = listing.lines().filter(|line| line.contains("# handle")).map(str::to_owned);
        lines.collect::<Vec<_>>()
    };
    let before = handles();
    stage.ok("publish web -p 82:80 -p 53:53/udp --via dnat");
    stage.ok("unpublish web -p 80:80");
    assert_eq!(handles(), before, "elements change, and nothing else");
    stage.host("nft flush chain inet netns-setup-docker0 to-containers");
    let other = |lines: Vec<String>| -> Vec<String> {
        lines
            .into_iter()
            .filter(|line| !["accept", "drop"].iter().any(|verdict| line.contains(verdict)))
            .collect()
    };
    stage.ok("repair");
    assert_eq!(other(handles()), other(before), "the chain that differs is filled again");
}

fn check_and_repair(stage: &Stage, backend: Backend) {
    stage.ok(&format!("up {}", backend.option()));
    stage.ok("attach web");
    stage.ok("publish web -p 80:80");
    let intact = stage.dump();
    let veth = stage.host("ip -o link show master docker0");
    let veth = veth.split(": ").nth(1).unwrap().split('@').next().unwrap();
    let break_rules = match backend {
        Backend::Nft => "nft flush chain inet netns-setup-docker0 to-containers".to_owned(),
        _ => "iptables -t nat -F DOCKER".to_owned(),
    };
    for (damage, finding) in [
        ("ip link set dev docker0 down".to_owned(), "docker0 is down"),
        ("ip address delete 172.17.0.1/16 dev docker0".to_owned(), "docker0 lacks 172.17.0.1/16"),
        ("ip link delete dev docker0".to_owned(), "the bridge docker0 is missing"),
        (format!("ip link set dev {veth} nomaster"), "is not a port of docker0"),
        (format!("ip link delete dev {veth}"), "the veth pair"),
        ("ip -n web route delete default".to_owned(), "the default route by 172.17.0.1"),
        ("ip -n web link set dev eth0 down".to_owned(), "eth0 in /run/netns/web is down"),
        ("ip netns delete web".to_owned(), "the network namespace web is missing"),
        ("sysctl -w net.ipv4.ip_forward=0".to_owned(), "net.ipv4.ip_forward is not 1"),
        (break_rules, "differ"),
    ] {
        stage.host(&damage);
        let output = stage.run("check");
        assert_eq!(output.status.code(), Some(1), "{damage}: {output:#?}");
        assert!(output.stdout.contains(finding), "{damage}: {output:#?}");
        stage.ok("repair");
        assert_eq!(stage.ok("check"), "everything is as it should be\n", "{damage}");
        assert_same(&stage.dump(), &intact, &damage);
    }
    assert_eq!(stage.ok("repair"), "nothing to repair\n");
    relay_comes_back(stage);
}

fn relay_comes_back(stage: &Stage) {
    let list: serde_json::Value = serde_json::from_str(&stage.ok("list --json")).unwrap();
    let pid = list[0]["mappings"][0]["relay"]["pid"].as_u64().unwrap();
    // Its supervisor, with which it ends.
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().to_owned();
    stage.host(&format!("kill -KILL {parent}"));
    // Both are gone when their socket is.
    while stage.host("ss -Hlnt").contains("*:80") {}
    let output = stage.run("check");
    assert!(output.stdout.contains("the relay does not serve *:80/tcp"), "{output:#?}");
    stage.ok("repair");
    assert!(stage.host("ss -Hlnt").contains("*:80"));
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
}

fn others_stay(stage: &Stage, backend: Backend) {
    for rule in [
        "iptables -A FORWARD -s 192.0.2.0/24 -j DROP",
        // Equal to one of ours, and before another one.
        "iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
        "iptables -t nat -A POSTROUTING -s 192.0.2.0/24 -j MASQUERADE",
        "iptables -t raw -A PREROUTING -s 192.0.2.0/24 -j DROP",
        "nft add table inet theirs",
    ] {
        stage.host(rule);
    }
    let before = stage.dump();
    stage.ok(&format!("up {}", backend.option()));
    stage.ok("attach web");
    stage.ok("publish web -p 80:80 -p 81:81 --via dnat");
    stage.ok("down");
    assert_same(&stage.dump(), &before, "after all");
    assert!(stage.host("nft list tables").contains("inet theirs"));
}

/// As by `update-alternatives --set iptables …`.
fn switched(stage: &Stage, backend: Backend) {
    let bare = stage.dump();
    stage.ok(&format!("up --subnet6 fd00:d0c::/64 --transparent {}", backend.option()));
    stage.ok("attach web");
    stage.ok("publish web -p 80:80");
    let before = stage.dump();
    assert_eq!(stage.run_switched("check").success(), "everything is as it should be\n");
    stage.run_switched("publish web -p 90:80").success();
    stage.run_switched("unpublish web -p 90:80").success();
    assert_same(&stage.dump(), &before, "changed by the other program");
    stage.run_switched("down").success();
    assert_same(&stage.dump(), &bare, "down");
}
