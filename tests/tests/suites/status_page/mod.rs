//! The status page, as a reader sees it in a real browser, in a network namespace that has nothing but loopback.

mod feed;
mod looks;
mod mappings;
mod scene;
mod text;

use std::time::Duration;

use testkit::browser::NEEDS;
use testkit::require::Need;
use testkit::suite::Case;

/// The browser starts in seconds, but not on a machine with other work.
const DEADLINE: Duration = Duration::from_secs(180);

pub(crate) fn cases() -> Vec<Case> {
    let root = |name: &str, body: fn()| Case::new(name, body).needs(&[Need::Root]).deadline(DEADLINE);
    let case = |name: &str, body: fn()| root(name, body).needs(&NEEDS[1..]);
    vec![
        case("rows are those of ctl stats", mappings::rows),
        case("traffic and changes show without a reload", mappings::live),
        case("search and sort", mappings::search_and_sort),
        case(
            "ten thousand mappings: few rows in the document, and the last one by scrolling",
            mappings::many,
        ),
        case("errors, connections and details of a mapping", mappings::details),
        case("connections are found by client, network, port and mapping", mappings::found_connections),
        case("a phone: nothing is wider than the screen", looks::phone),
        case("light and dark: texts have contrast", looks::schemes),
        case("all of it by keyboard", looks::keyboard),
        case("a picture for the README", looks::picture),
        case("names from users are text, and the policy is strict", text::hostile),
        case("the process ends, and the page says so until it is back", feed::ends_and_returns),
        case("the page says that the process drains", feed::drains),
        case("the page follows an upgrade", feed::upgrades),
        root("a seventeenth viewer, and one that does not read", feed::too_many),
    ]
}
