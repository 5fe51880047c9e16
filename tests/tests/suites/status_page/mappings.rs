//! The list of mappings, and what is known about each.

use serde_json::{Value, json};

use testkit::browser::ESCAPE;
use testkit::client;
use testkit::controlled::mapping;
use testkit::udp;
use testkit::{eventually, eventually_equal};

use super::scene::{Scene, address};

pub(super) fn rows() {
    Scene::run(|scene| {
        let closed = mapping("closed", "tcp", address(8003), address(1));
        let echo = udp::Backend::echo(udp::local());
        let dns = mapping("dns", "udp", address(8002), echo.address());
        let mut web = scene.web("web", 8001);
        web["limits"] = json!({ "max_connections": 5 });
        scene.serve(&[closed, dns, web]);
        let clients = [client::connect(address(8001)), client::connect(address(8001))];
        clients.iter().for_each(client::ping);
        client::end_of(address(8003));
        let socket = udp::local();
        udp::ask(&socket, address(8002), b"question");
        let from_ctl = || {
            let stats = scene.proxy.json(&["stats"]);
            stats["mappings"].as_array().unwrap().iter().map(expected).collect::<Vec<_>>()
        };
        let shown = || {
            let rows = scene.rows("mappings");
            rows.into_iter().map(|row| [0, 3, 4, 8, 9].map(|cell| row[cell].clone())).collect::<Vec<_>>()
        };
        eventually("the counters arrived", || from_ctl()[0][4] == "1" && from_ctl()[2][1] == "2 / 5");
        eventually_equal("rows", &from_ctl(), shown);
        assert_eq!(scene.rows("mappings")[1][1], "127.0.0.1:8002 udp");
        assert_eq!(scene.rows("mappings")[1][2], echo.address().to_string());
    });
}

/// The cells for counters that are too small for units: name, connections, flows, bytes, errors.
fn expected(stats: &Value) -> [String; 5] {
    let errors: u64 =
        stats["errors"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum();
    let bytes = stats["bytes_in"].as_u64().unwrap() + stats["bytes_out"].as_u64().unwrap();
    let limit = if stats["name"] == "web" { " / 5" } else { "" };
    [
        stats["name"].as_str().unwrap().to_owned(),
        format!("{}{limit}", stats["connections"]),
        stats["flows"].to_string(),
        format!("{bytes} B"),
        errors.to_string(),
    ]
}

pub(super) fn live() {
    Scene::run(|scene| {
        scene.browser.run("window.isStillThere = true");
        scene.serve(&[scene.web("web", 8001)]);
        let cell = |number: usize| scene.rows("mappings")[0][number].clone();
        let client = client::connect(address(8001));
        eventually_equal("connections", &"1".to_owned(), || cell(3));
        eventually("rates in both directions and in sum", || {
            client::exchange(&client, 7, 10_000);
            let total = scene.browser.text("#total-out");
            cell(5).ends_with("B/s") && cell(6).ends_with("B/s") && total.ends_with("B/s")
        });
        let curve = "return document.querySelector('#view-mappings .spark svg').getAttribute('class')";
        eventually("a curve", || scene.browser.run(curve) == "");
        scene.proxy.ctl(&["retarget", "web", "--to", "127.0.0.1:9"]).success();
        eventually_equal("backend", &"127.0.0.1:9".to_owned(), || cell(2));
        scene.proxy.ctl(&["remove", "web"]).success();
        scene.wait_for_names(&["web draining"]);
        drop(client);
        eventually_equal("heading", &"No mappings yet".to_owned(), || {
            scene.browser.text("#view-mappings .empty strong")
        });
        assert_eq!(scene.browser.run("return window.isStillThere"), true, "the page was loaded again");
    });
}

pub(super) fn search_and_sort() {
    Scene::run(|scene| {
        let names = ["a10", "a2", "b", "c"];
        let mappings: Vec<_> =
            names.into_iter().zip(8001..).map(|(name, port)| scene.web(name, port)).collect();
        scene.serve(&mappings);
        assert_eq!(scene.names(), ["a2", "a10", "b", "c"], "numbers in names are numbers");
        for (search, found) in
            [("a", &["a2", "a10"][..]), ("A 8001", &["a10"]), ("127.0.0.1:8004", &["c"]), ("nothing", &[])]
        {
            scene.browser.send_keys("#search", search);
            scene.wait_for_names(found);
            let shown = scene.browser.text("#found");
            assert_eq!(shown, format!("{} of 4 mappings", found.len()));
            scene.browser.send_keys("#search", ESCAPE);
        }
        eventually_equal("all of them", &4, || scene.names().len());
        let clients: Vec<_> = [8003, 8003, 8001].map(|port| client::connect(address(port))).into();
        let heading = |number: usize| format!("#view-mappings .head > :nth-child({number}) button");
        scene.browser.click(&heading(4));
        scene.wait_for_names(&["b", "a10", "a2", "c"]);
        let sorted = "return document.querySelector('#view-mappings .head > :nth-child(4)').ariaSort";
        assert_eq!(scene.browser.run(sorted), "descending");
        scene.browser.click(&heading(4));
        scene.wait_for_names(&["a2", "c", "a10", "b"]);
        assert_eq!(scene.browser.run(sorted), "ascending");
        drop(clients);
        scene.browser.click(&heading(1));
        scene.browser.click(&heading(1));
        scene.wait_for_names(&["c", "b", "a10", "a2"]);
    });
}

pub(super) fn many() {
    /// More than fit on any screen that this is tested with.
    const MOST: usize = 80;

    Scene::run(|scene| {
        let mappings: Vec<_> = (0..10_000).map(|n| scene.web(&format!("m{n}"), 10_000 + n)).collect();
        scene.proxy.apply(&mappings).success();
        let number = || scene.browser.text("#mappings-number");
        eventually_equal("number of mappings", &"10.0k".to_owned(), number);
        let table = "document.querySelector('#view-mappings .table')";
        scene.browser.wait_for(&format!("{table}.ariaRowCount"), "10001");
        assert!((10..MOST).contains(&scene.names().len()), "{} rows", scene.names().len());
        assert_eq!(scene.names()[0], "m0");
        // In steps of a page, as a reader would, and then at once.
        for _ in 0..20 {
            scene.browser.run("scrollBy(0, innerHeight)");
        }
        scene.browser.run("scrollTo(0, document.body.scrollHeight)");
        eventually_equal("the last row", &Some("m9999".to_owned()), || scene.names().pop());
        assert!((10..MOST).contains(&scene.names().len()), "{} rows", scene.names().len());
        let is_visible = "const last = [...document.querySelectorAll('#view-mappings .row')].pop().getBoundingClientRect();
            return last.top >= 0 && last.bottom <= innerHeight";
        assert_eq!(scene.browser.run(is_visible), true);
        // A change of one of them, seen from the other end.
        let client = client::connect(address(10_000));
        scene.browser.run("scrollTo(0, 0)");
        eventually_equal("connections of the first", &"1".to_owned(), || {
            scene.rows("mappings")[0][3].clone()
        });
        drop(client);
    });
}

pub(super) fn details() {
    Scene::run(|scene| {
        let mut web = scene.web("web", 8001);
        web["limits"] = json!({ "max_connections": 1, "on_limit": "reset", "idle_timeout": "1h" });
        scene.serve(&[web]);
        let client = client::connect(address(8001));
        client::ping(&client);
        client::end_of(address(8001));
        scene.browser.click("#tab-errors");
        eventually_equal("errors", &vec![["web".to_owned(), "Over max_connections".to_owned()]], || {
            scene.rows("errors").into_iter().map(|row| [row[0].clone(), row[1].clone()]).collect()
        });
        scene.browser.click("#tab-connections");
        let from = client.local_addr().unwrap().to_string();
        eventually_equal("clients", &vec![[from.clone(), "web tcp".to_owned()]], || {
            scene.rows("connections").into_iter().map(|row| [row[0].clone(), row[1].clone()]).collect()
        });
        scene.browser.click("#tab-mappings");
        scene.browser.click("#view-mappings .row a");
        eventually("everything in the dialog", || {
            let text = scene.browser.text("#details");
            let parts = [
                "web",
                "max_connections",
                "idle_timeout",
                "1h",
                "Over max_connections",
                "127.0.0.1:8001",
                &from,
            ];
            parts.iter().all(|part| text.contains(part))
        });
        scene.browser.click("#details-close");
        scene.browser.wait_for("document.getElementById('details').open", false);
        scene.browser.click("#tab-process");
        let pid = scene.proxy.process.pid().to_string();
        eventually("the process", || {
            let text = scene.browser.text("#view-process");
            [pid.as_str(), "Worker threads", "Descriptors"].iter().all(|part| text.contains(part))
        });
    });
}

pub(super) fn found_connections() {
    Scene::run(|scene| {
        scene.serve(&[scene.web("db:5432", 8001), scene.web("web", 8002)]);
        let [first, second] = [8001, 8002].map(|port| client::connect(address(port)));
        [&first, &second].into_iter().for_each(client::ping);
        scene.browser.click("#tab-connections");
        let [one, other] = [&first, &second].map(|client| client.local_addr().unwrap());
        for (text, clients) in [
            (one.to_string(), &[one][..]),
            (format!(":{}", other.port()), &[other]),
            ("db:5432".to_owned(), &[one]),
            ("db:".to_owned(), &[one]),
            ("web".to_owned(), &[other]),
            ("127.0.0.1/8".to_owned(), &[one, other]),
            ("127.0.0.0/8".to_owned(), &[one, other]),
            ("127.0.0.1".to_owned(), &[one, other]),
            ("fe80:".to_owned(), &[]),
            ("10.0.0.0/8".to_owned(), &[]),
            ("127.0.0.1/99".to_owned(), &[]),
        ] {
            scene.browser.run("document.getElementById('search').value = ''");
            scene.browser.send_keys("#search", &text);
            let mut expected: Vec<String> = clients.iter().map(ToString::to_string).collect();
            expected.sort();
            eventually_equal(&text, &expected, || {
                if expected.is_empty() && !scene.browser.text("#view-connections").contains("Nothing found") {
                    return vec![scene.browser.text("#view-connections")];
                }
                let rows = scene.rows("connections").into_iter();
                let mut rows: Vec<String> = rows.map(|row| row[0].clone()).collect();
                rows.sort();
                if expected.is_empty() { Vec::new() } else { rows }
            });
        }
    });
}
