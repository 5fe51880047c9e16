//! Hostile input to every parser without property tests beside it: each input gets a response, and an error is reported
//! in one line.
//!
//! `testdata/hostile` is the corpus. Each input is used unchanged, and then with random damage, for a fixed number of
//! cases. Inputs that reveal a defect are added there. (Docker's flags, the control protocol, control messages and
//! published ports are tested in the crates that parse them.)

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use netns_setup::state::{Found, StateDir};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, TestRunner};
use rproxy::cli::{self, Unparsed};
use rproxy::config;
use rproxy::sandbox::User;

use testkit::suite::Case;

/// Random inputs for each parser.
const CASES: u32 = 4000;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("rproxy's command line", rproxys_command_line),
        Case::new("netns-setup's command line", netns_setups_command_line),
        Case::new("configurations", configurations),
        Case::new("users", users),
        Case::new("netns-setup's state", netns_setups_state),
        Case::new("no link is followed to a state", no_link_is_followed_to_a_state),
    ]
}

fn corpus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/hostile").join(name)
}

fn lines(name: &str) -> Vec<String> {
    fs::read_to_string(corpus(name)).unwrap().lines().map(String::from).collect()
}

/// Tries all of the corpus, and then what becomes of it.
fn attack(corpus: Vec<String>, check: impl Fn(&str)) {
    assert!(!corpus.is_empty());
    corpus.iter().for_each(|text| check(text));
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let inputs = (select(corpus), prop::collection::vec(damage(), 1..4));
    let result = TestRunner::new(config).run(&inputs, |(text, damages)| {
        check(&damages.iter().fold(text, |text, damage| damage.apply(&text)));
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

/// What happens to an input.
#[derive(Clone, Debug)]
struct Damage {
    at: Index,
    removed: usize,
    inserted: String,
}

fn damage() -> impl Strategy<Value = Damage> {
    let special = select(vec![
        "",
        " ",
        "0",
        "-",
        ":",
        "/",
        "[",
        "]",
        "%",
        "\"",
        "{",
        ",",
        "99999999999999999999",
        "\u{0}",
        "é",
    ]);
    let inserted = prop_oneof![special.prop_map(String::from), "[ -~]{0,6}", "\\PC{0,3}"];
    (any::<Index>(), 0..8_usize, inserted).prop_map(|(at, removed, inserted)| Damage {
        at,
        removed,
        inserted,
    })
}

impl Damage {
    fn apply(&self, text: &str) -> String {
        let chars: Vec<char> = text.chars().collect();
        let at = self.at.index(chars.len() + 1);
        let rest = chars.iter().skip(at + self.removed);
        chars.iter().take(at).copied().chain(self.inserted.chars()).chain(rest.copied()).collect()
    }
}

fn words(line: &str) -> Vec<OsString> {
    line.split(' ').map(OsString::from).collect()
}

fn rproxys_command_line() {
    attack(lines("rproxy.txt"), |line| {
        let mistake = match cli::parse(&words(line)) {
            Ok(cli) => cli.serve.mappings().err(),
            Err(Unparsed::Wrong(mistake)) => Some(mistake),
            Err(Unparsed::Asked(_text)) => None,
        };
        if let Some(mistake) = mistake {
            let message = mistake.to_string();
            assert!(
                message.starts_with("rproxy: ") && !message.trim_end().contains('\n'),
                "{line:?}: {message}"
            );
        }
    });
}

fn netns_setups_command_line() {
    attack(lines("netns-setup.txt"), |line| {
        let words = std::iter::once("netns-setup".into()).chain(words(line));
        if let Err(netns_setup::cli::Unparsed::Wrong(message)) =
            netns_setup::cli::Cli::from_args(words.collect())
        {
            assert!(!message.is_empty() && !message.contains(char::is_control), "{line:?}: {message:?}");
        }
    });
}

fn configurations() {
    let text = fs::read_to_string(corpus("config.toml")).unwrap();
    let path = Path::new("rproxy.toml");
    let check = |text: &str| match config::parse(path, text) {
        // What is read can be written, and read again.
        Ok(read) => {
            let attach = read.attach_options(None);
            let written = config::print(
                &read.mappings,
                attach.as_ref(),
                read.metrics.as_ref(),
                config::with_interface_name,
            );
            let again = config::parse(path, &written).unwrap();
            assert_eq!((again.attach_options(None), again.mappings), (attach, read.mappings), "{written}");
        }
        Err(error) => {
            let message = error.to_string();
            assert!(message.lines().all(|line| line.starts_with("rproxy.toml:")), "{text:?}: {message}");
        }
    };
    attack(vec![text.clone()], check);
    // A file cut off anywhere.
    text.char_indices().for_each(|(end, _)| check(&text[..end]));
}

fn users() {
    let corpus = ["root", "root:root", "0:0", "65534:65534", "4294967296:0"].map(String::from).to_vec();
    attack(corpus, |text| {
        if let Err(message) = text.parse::<User>() {
            assert!(!message.is_empty());
        }
    });
}

fn netns_setups_state() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let state = StateDir::create(&path).unwrap();
    fs::copy(corpus("state/up.json"), path.join("state.json")).unwrap();
    assert!(matches!(state.load().unwrap(), Found::Whole(state) if state.current.network.is_some()));
    let files = fs::read_dir(corpus("state")).unwrap();
    let texts = files.map(|file| fs::read_to_string(file.unwrap().path()).unwrap()).collect();
    attack(texts, |text| {
        fs::write(path.join("state.json"), text).unwrap();
        // What is read has to be one that can be written again.
        if let Ok(Found::Whole(loaded)) = state.load() {
            state.save(&loaded).unwrap();
            assert_eq!(state.load().unwrap(), Found::Whole(loaded));
        }
    });
}

fn no_link_is_followed_to_a_state() {
    let dir = tempfile::tempdir().unwrap();
    let (path, elsewhere) = (dir.path().join("state"), dir.path().join("elsewhere.json"));
    let state = StateDir::create(&path).unwrap();
    fs::copy(corpus("state/up.json"), &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, path.join("state.json")).unwrap();
    assert!(state.load().is_err());
    std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
    assert!(StateDir::open(&dir.path().join("link")).is_err());
}
