//! `--metrics`: what Prometheus reads, health checks, and clients that misbehave.

mod clients;
mod http;
mod prometheus;
mod scrape;
mod served;

use testkit::require::Need;
use testkit::suite::Case;

pub(crate) fn cases() -> Vec<Case> {
    let root = &[Need::Root];
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("promtool finds nothing wrong", prometheus::promtool).needs(&[Need::Program("promtool")]),
        case("a Prometheus scrapes it", prometheus::scraped).needs(&[Need::Program("prometheus")]),
        case("each value is that of ctl stats", prometheus::values),
        case("both formats have the same values", prometheus::formats),
        case("all metrics are documented, and no others", prometheus::documented),
        case("a removed mapping counts until it has drained", prometheus::draining),
        case("10,000 mappings", prometheus::many_mappings),
        case("requests get the statuses of HTTP", clients::statuses),
        case("a request names one host, and its body is bounded", clients::hosts_and_bodies),
        case("slow clients are cut, and many bounded", clients::slow_and_many),
        case("when descriptors run out, they are served still", clients::exhausted),
        case("a draining process is not ready", served::draining),
        case("a Unix socket", served::unix_socket),
        case("bad addresses", served::bad_addresses),
        case("the configuration's key, and reloads", served::configuration),
        case("an upgrade passes the socket on", served::upgrade),
        case("confined strictly, as another user", served::confined).needs(root),
        case("whoever can reach it is told", served::exposed),
        case("without it, there is no thread and no descriptor for it", served::off),
    ]
}
