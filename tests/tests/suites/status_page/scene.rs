//! An `rproxy` with a status page, and a browser that shows it.

use std::net::SocketAddr;

use serde_json::Value;

use testkit::backend::TcpBackend;
use testkit::browser::Browser;
use testkit::controlled::{Controlled, mapping};
use testkit::eventually_equal;
use testkit::netns::Namespace;

/// Where each page is, in a namespace of its own.
pub(super) const ADDRESS: &str = "127.0.0.1:9090";

/// The address of the page.
pub(super) const URL: &str = "http://127.0.0.1:9090/";

/// What is on the page.
pub(super) struct Scene {
    pub(super) proxy: Controlled,
    pub(super) browser: Browser,
    pub(super) backend: TcpBackend,
}

impl Scene {
    /// Runs a test inside a new namespace, with a page that shows no mappings yet. Nothing may be written to the
    /// console of the browser: no error, and no violation of the policy.
    #[track_caller]
    pub(super) fn run(test: impl FnOnce(&Self) + Send) {
        Namespace::new().run(|| {
            let proxy = Controlled::start(&["--metrics", ADDRESS]);
            let scene = Self { proxy, browser: Browser::start(), backend: TcpBackend::echo() };
            scene.open();
            test(&scene);
            assert_eq!(scene.problems(), Vec::<String>::new());
        });
    }

    /// Opens the page, and waits until it is live.
    #[track_caller]
    pub(super) fn open(&self) {
        self.browser.open(URL);
        self.browser.wait_for("document.getElementById('status-text').innerText", "Live");
    }

    /// Serves mappings from addresses of loopback to the backend, and waits until the page shows them.
    #[track_caller]
    pub(super) fn serve(&self, mappings: &[Value]) {
        self.proxy.apply(mappings).success();
        self.browser.wait_for("document.querySelectorAll('#view-mappings .row').length", mappings.len());
    }

    /// A TCP mapping of a port of loopback to the backend.
    pub(super) fn web(&self, name: &str, port: u16) -> Value {
        mapping(name, "tcp", address(port), self.backend.address())
    }

    /// The texts of the cells of all rows of a view that are in the document, in order.
    #[track_caller]
    pub(super) fn rows(&self, view: &str) -> Vec<Vec<String>> {
        let rows = self.browser.run(&format!(
            "return [...document.querySelectorAll('#view-{view} .row')].map(
                (row) => [...row.children].map((cell) => cell.innerText.trim().replace(/\\s+/g, ' ')))"
        ));
        serde_json::from_value(rows).unwrap()
    }

    /// The names in the list of mappings, in order.
    #[track_caller]
    pub(super) fn names(&self) -> Vec<String> {
        self.rows("mappings").into_iter().map(|row| row[0].clone()).collect()
    }

    /// Waits until the list of mappings has these names, in order.
    #[track_caller]
    pub(super) fn wait_for_names(&self, expected: &[&str]) {
        eventually_equal("names", &expected.iter().map(ToString::to_string).collect(), || self.names());
    }

    /// What is wrong according to the browser.
    pub(super) fn problems(&self) -> Vec<String> {
        let entries = self.browser.console().into_iter();
        // Pages of the browser itself write notes, too.
        entries
            .filter(|(level, _text)| level != "INFO")
            .map(|(level, text)| format!("{level} {text}"))
            .collect()
    }
}

/// A port of loopback in a namespace of its own.
pub(super) fn address(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}
