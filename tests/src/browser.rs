//! A headless Chromium, driven through chromedriver (WebDriver, <https://www.w3.org/TR/webdriver2/>).
//!
//! It reaches only what the network namespace of its starter has: start it inside a [`crate::netns::Namespace`].

use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::process::Process;
use crate::require::{self, Need};
use crate::{PATIENCE, eventually, eventually_equal};

/// What a case needs that starts a [`Browser`].
pub const NEEDS: [Need; 3] = [Need::Root, Need::Program("chromium"), Need::Program("chromedriver")];

/// What Chromium is started with: no window, no sandbox of its own as root, and no traffic of its own.
const FLAGS: [&str; 11] = [
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-sync",
    "--window-size=1280,900",
];

/// Keys, as [`Browser::send_keys`] sends them (<https://www.w3.org/TR/webdriver2/#keyboard-actions>).
pub const ENTER: &str = "\u{E007}";
/// See [`ENTER`].
pub const ESCAPE: &str = "\u{E00C}";
/// See [`ENTER`].
pub const RIGHT: &str = "\u{E014}";
/// See [`ENTER`].
pub const DOWN: &str = "\u{E015}";

/// A running browser with one page.
pub struct Browser {
    /// The address of the session.
    session: String,
    // Dropped in this order: the processes write to the directory.
    _driver: Process,
    _profile: TempDir,
}

impl Browser {
    /// Starts one in the namespace of the calling thread.
    ///
    /// # Panics
    /// If it cannot be started; see [`NEEDS`].
    #[track_caller]
    pub fn start() -> Self {
        let profile = tempfile::tempdir().unwrap();
        let port = free_port();
        let driver = Process::spawn(driver(port, &profile));
        let root = format!("http://127.0.0.1:{port}");
        eventually("chromedriver answers", || minreq::get(format!("{root}/status")).send().is_ok());
        let flags: Vec<String> = FLAGS.map(String::from).into_iter().chain([data_dir(&profile)]).collect();
        let options =
            json!({ "binary": require::find("chromium").expect("chromium is installed"), "args": flags });
        let capabilities =
            json!({ "goog:chromeOptions": options, "goog:loggingPrefs": { "browser": "ALL" } });
        let sessions = format!("{root}/session");
        let session = post(&sessions, &json!({ "capabilities": { "alwaysMatch": capabilities } }));
        let id = session["sessionId"].as_str().unwrap();
        Self { session: format!("{sessions}/{id}"), _driver: driver, _profile: profile }
    }

    /// Opens an address, and waits until it is loaded.
    #[track_caller]
    pub fn open(&self, url: &str) {
        self.post("/url", &json!({ "url": url }));
    }

    /// Runs the body of a function in the page and returns its result.
    #[track_caller]
    pub fn run(&self, script: &str) -> Value {
        self.post("/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// Waits until a JavaScript expression has a value.
    #[track_caller]
    pub fn wait_for(&self, expression: &str, expected: impl Into<Value>) {
        eventually_equal(expression, &expected.into(), || self.run(&format!("return {expression}")));
    }

    /// The text of the first element that a CSS selector finds.
    #[track_caller]
    pub fn text(&self, selector: &str) -> String {
        let text = self.run(&format!("return document.querySelector({}).innerText", json!(selector)));
        text.as_str().unwrap().to_owned()
    }

    /// Clicks into the middle of an element, as a mouse would.
    #[track_caller]
    pub fn click(&self, selector: &str) {
        let element = self.find(selector);
        self.post(&format!("/element/{element}/click"), &json!({}));
    }

    /// Types into an element: text, or a key such as [`ENTER`].
    #[track_caller]
    pub fn send_keys(&self, selector: &str, text: &str) {
        let element = self.find(selector);
        self.post(&format!("/element/{element}/value"), &json!({ "text": text }));
    }

    /// Makes the page as large as a screen of `width` and `height`, in CSS pixels.
    #[track_caller]
    pub fn resize(&self, width: u32, height: u32) {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500 });
        self.devtools("Emulation.setDeviceMetricsOverride", &size);
    }

    /// Prefers a colour scheme: `light` or `dark`.
    #[track_caller]
    pub fn prefer(&self, scheme: &str) {
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.devtools("Emulation.setEmulatedMedia", &features);
    }

    /// What the page and the browser have written to the console since the last call: level and text.
    #[track_caller]
    pub fn console(&self) -> Vec<(String, String)> {
        let entries = self.post("/se/log", &json!({ "type": "browser" }));
        let text = |entry: &Value, key: &str| entry[key].as_str().unwrap().to_owned();
        entries
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| (text(entry, "level"), text(entry, "message")))
            .collect()
    }

    /// A picture of what is visible, as a PNG file.
    #[track_caller]
    pub fn picture(&self) -> Vec<u8> {
        let picture = self.devtools("Page.captureScreenshot", &json!({ "format": "png" }));
        STANDARD.decode(picture["data"].as_str().unwrap()).unwrap()
    }

    #[track_caller]
    fn find(&self, selector: &str) -> String {
        let found = self.post("/element", &json!({ "using": "css selector", "value": selector }));
        // The key is the same for all elements, and defined by the specification.
        found.as_object().unwrap().values().next().unwrap().as_str().unwrap().to_owned()
    }

    /// Sends a command of the DevTools protocol.
    #[track_caller]
    fn devtools(&self, command: &str, parameters: &Value) -> Value {
        self.post("/goog/cdp/execute", &json!({ "cmd": command, "params": parameters }))
    }

    #[track_caller]
    fn post(&self, path: &str, body: &Value) -> Value {
        post(&format!("{}{path}", self.session), body)
    }
}

/// Sends a command of WebDriver, and returns its result.
#[track_caller]
fn post(url: &str, body: &Value) -> Value {
    // The first page takes longest, on a machine that has other work.
    let timeout = 2 * PATIENCE.as_secs();
    let response = minreq::post(url).with_timeout(timeout).with_json(body).unwrap().send().unwrap();
    let mut answer: Value = response.json().unwrap();
    assert_eq!(response.status_code, 200, "{url}: {answer:#}");
    answer["value"].take()
}

/// chromedriver in a PID namespace, which ends with all processes of the browser when its first one is killed.
fn driver(port: u16, profile: &TempDir) -> Command {
    let mut command = require::command("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.arg(require::find("chromedriver").expect("chromedriver is installed"));
    command.arg(format!("--port={port}"));
    for variable in ["HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"] {
        command.env(variable, profile.path());
    }
    command
}

fn data_dir(profile: &TempDir) -> String {
    format!("--user-data-dir={}", profile.path().join("profile").display())
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}
