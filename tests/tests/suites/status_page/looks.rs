//! How the page looks, and works without a mouse.

use std::env;
use std::fs;
use std::time::Duration;

use serde_json::Value;

use testkit::browser::{ENTER, ESCAPE, RIGHT};
use testkit::client;
use testkit::controlled::mapping;
use testkit::eventually_within;

use super::scene::{Scene, address};

/// The views, by the ids of their tabs.
const VIEWS: [&str; 4] = ["tab-mappings", "tab-connections", "tab-errors", "tab-process"];

/// The file to which [`picture`] writes.
const PICTURE: &str = "RPROXY_STATUS_PICTURE";

pub(super) fn phone() {
    Scene::run(|scene| {
        scene.browser.resize(390, 844);
        let name = "x".repeat(128);
        scene.serve(&[scene.web(&name, 8001), scene.web("web", 8002)]);
        let _client = client::connect(address(8001));
        for view in VIEWS {
            scene.browser.run(&format!("document.getElementById('{view}').click()"));
            let widths = scene.browser.run("return [document.documentElement.scrollWidth, innerWidth]");
            assert_eq!(widths, serde_json::json!([390, 390]), "{view}");
        }
        scene.browser.run("location.hash = 'mapping=' + 'x'.repeat(128)");
        scene.browser.wait_for("document.getElementById('details').open", true);
        let dialog = "return document.getElementById('details').scrollWidth";
        assert!(scene.browser.run(dialog).as_u64().unwrap() <= 390);
    });
}

pub(super) fn schemes() {
    Scene::run(|scene| {
        scene.serve(&[scene.web("web", 8001)]);
        let ground = |scheme: &str| {
            scene.browser.prefer(scheme);
            assert_contrast(scene, scheme);
            luminance(&scene.browser.run("return getComputedStyle(document.body).backgroundColor"))
        };
        assert!(ground("light") > 0.8);
        assert!(ground("dark") < 0.1);
    });
}

/// Checks that texts can be read on what is behind them (WCAG 2, 1.4.3).
#[track_caller]
fn assert_contrast(scene: &Scene, scheme: &str) {
    let texts = [
        "#total-in",
        "#peak",
        ".tile h2",
        "#status",
        "#tab-errors",
        "#search",
        ".head button",
        ".row a",
        ".row .zero",
        ".row .addressed",
        ".tag",
    ];
    for text in texts {
        let colors = scene.browser.run(&format!(
            "let element = document.querySelector('{text}');
            const {{ color }} = getComputedStyle(element);
            const ground = (element) => getComputedStyle(element).backgroundColor;
            while (ground(element) === 'rgba(0, 0, 0, 0)') element = element.parentElement;
            return [color, ground(element)]"
        ));
        let [color, ground] = [&colors[0], &colors[1]].map(luminance);
        let contrast = (color.max(ground) + 0.05) / (color.min(ground) + 0.05);
        assert!(contrast >= 4.5, "{text} in {scheme}: {colors} have a contrast of {contrast:.2}");
    }
}

/// The relative luminance of `rgb(…)`, from 0 to 1.
fn luminance(color: &Value) -> f64 {
    let color = color.as_str().unwrap();
    let numbers = color.trim_start_matches("rgb(").trim_end_matches(')').split(", ");
    let linear = numbers.map(|number| {
        let part: f64 = number.parse::<f64>().unwrap_or_else(|_| panic!("{color}")) / 255.0;
        if part <= 0.04045 { part / 12.92 } else { ((part + 0.055) / 1.055).powf(2.4) }
    });
    linear.zip([0.2126, 0.7152, 0.0722]).map(|(part, weight)| part * weight).sum()
}

pub(super) fn keyboard() {
    Scene::run(|scene| {
        scene.serve(&[scene.web("a", 8001), scene.web("b", 8002)]);
        let focused = "document.activeElement.id || document.activeElement.innerText";
        scene.browser.send_keys("body", "/");
        scene.browser.wait_for(focused, "search");
        scene.browser.send_keys("#search", "b");
        scene.browser.wait_for("document.querySelectorAll('#view-mappings .row').length", 1);
        scene.browser.send_keys("#search", ESCAPE);
        scene.browser.run("document.getElementById('tab-mappings').focus()");
        scene.browser.send_keys("#tab-mappings", RIGHT);
        scene.browser.wait_for(focused, "tab-connections");
        scene.browser.wait_for("document.getElementById('view-connections').hidden", false);
        scene.browser.run("location.hash = 'mappings'");
        scene.browser.wait_for("document.querySelectorAll('#view-mappings .row').length", 2);
        scene.browser.run("document.querySelector('#view-mappings .row a').focus()");
        scene.browser.send_keys("#view-mappings .row a", testkit::browser::DOWN);
        scene.browser.wait_for(focused, "b");
        scene.browser.send_keys("#view-mappings .row:nth-child(2) a", ENTER);
        scene.browser.wait_for("document.getElementById('details').open", true);
        scene.browser.wait_for(focused, "details-name");
        scene.browser.send_keys("#details", ESCAPE);
        scene.browser.wait_for("document.getElementById('details').open", false);
        scene.browser.wait_for("location.hash", "#mappings");
    });
}

pub(super) fn picture() {
    /// What a reader of the README should not have to wait for, in bytes.
    const MOST: usize = 150_000;

    Scene::run(|scene| {
        scene.browser.resize(1280, 720);
        let mut mappings = Vec::new();
        for (name, port) in ["web", "api", "grafana", "postgres", "redis", "mqtt", "registry", "gitlab"]
            .into_iter()
            .zip(8001..)
        {
            mappings.push(scene.web(name, port));
        }
        mappings[7] = mapping("gitlab", "tcp", address(8008), address(1));
        mappings[2]["limits"] = serde_json::json!({ "max_connections": 20 });
        scene.serve(&mappings);
        let clients: Vec<_> = (0..24).map(|number| client::connect(address(8001 + number % 6))).collect();
        client::reset(client::connect(address(8007)));
        (0..3).for_each(|_| drop(client::end_of(address(8008))));
        let file = env::var_os(PICTURE);
        // Half of what the curves show, if somebody will look at it.
        let seconds = if file.is_some() { 45 } else { 3 };
        let mut turn = 0;
        eventually_within(Duration::from_secs(90), "curves", || {
            turn += 1;
            for (number, client) in clients.iter().enumerate() {
                let share = 1 + (turn * 7 + number * 3) % 11;
                client::exchange(client, 1, 1000 * share * (1 + number % 5));
            }
            let path = "return document.querySelector('#throughput path').getAttribute('d')";
            scene.browser.run(path).as_str().unwrap().matches('L').count() >= seconds
        });
        let picture = scene.browser.picture();
        assert!(picture.len() < MOST, "{} bytes", picture.len());
        if let Some(file) = file {
            fs::write(file, picture).unwrap();
        }
    });
}
