// The view of errors, by mapping and reason.

/** What each kind of error means, and what to do. The kinds are those of `rproxy ctl stats`. */
const REASONS = {
  connect_refused: ["Backend refused the connection", "Nothing listens on the backend's port. Clients were reset."],
  connect_timeout: ["Backend did not answer in time", "No answer within connect_timeout. Clients were reset."],
  connect_failed: ["No connection to the backend", "There was no route, no local port or no descriptor. The log has the reason."],
  reset: ["Connection reset", "The client or the backend reset a connection that was open."],
  idle: ["Idle for too long", "Connections without data for idle_timeout were reset."],
  denied: ["Client denied", "Clients that allow or deny refuse."],
  bad_proxy_header: ["Wrong PROXY header", "What came from a network in accept_proxy had no valid header in time."],
  source_unavailable: ["Client's address unavailable", "The backend could not be reached from the client's address."],
  over_limit: ["Over max_connections", "Clients were reset because the mapping was full."],
  over_source_limit: ["Over max_connections_per_source", "Clients were reset because their source had as many connections as it may."],
  over_rate: ["Over rate", "Clients were reset, or datagrams dropped, because their source came faster than it may."],
  flow_failed: ["Flow not opened", "A datagram was lost: no socket, no local port, or the mapping was about to end."],
  flow_displaced: ["Flow evicted", "A flow was ended to make room for another one."],
  datagram_refused: ["Datagram refused", "The network refused a datagram (ICMP). Nothing may listen on the backend's port."],
  no_buffer: ["No buffer", "A datagram was lost because a queue or a receive buffer was full."],
  too_large: ["Datagram too large", "A datagram was lost because it is larger than the path allows."],
  forged: ["Forged source", "A datagram was dropped because no client can have sent it."],
};

/** The heading and the explanation of a kind. A newer process may have others. */
function reasonOf(kind) {
  return REASONS[kind] ?? [kind, ""];
}

/** How long ago something happened, as seen by this page. */
function formatAgo(recent, second) {
  if (recent === undefined) return "earlier";
  const seconds = second - recent.second;
  return seconds <= 1 ? "now" : seconds < 60 ? `${seconds} s ago` : `${formatDuration(seconds * 1000)} ago`;
}

const ERROR_COLUMNS = [
  {
    title: "Mapping", width: "minmax(130px, 1.1fr)", area: "name",
    order: ({ mapping }) => mapping.name,
    make: (cell) => cell.append(make("a")),
    fill(cell, { mapping }) {
      setText(cell.firstChild, mapping.name);
      setAttribute(cell.firstChild, "href", `#mapping=${encodeURIComponent(mapping.name)}`);
      setAttribute(cell, "title", mapping.name);
    },
  },
  {
    title: "Reason", width: "minmax(220px, 1.1fr)", area: "reason",
    order: ({ kind }) => reasonOf(kind)[0],
    fill(cell, { kind }) {
      setText(cell, reasonOf(kind)[0]);
      setAttribute(cell, "title", kind);
    },
  },
  {
    title: "Explanation", width: "minmax(200px, 2.4fr)", className: "addressed",
    fill(cell, { kind }) {
      setText(cell, reasonOf(kind)[1]);
      setAttribute(cell, "title", reasonOf(kind)[1]);
    },
  },
  {
    title: "Since opened", hint: "Since this page was opened", width: "100px", className: "right", descending: true, area: "recent", label: "Since opened",
    order: ({ recent }) => recent?.count ?? 0,
    fill: (cell, { recent }) => fillNumber(cell, recent?.count ?? 0, formatCount),
  },
  {
    title: "Last seen", width: "110px", className: "right", descending: true, area: "seen",
    order: ({ recent }) => recent?.second ?? 0,
    fill: (cell, { recent }, { second }) => setText(cell, formatAgo(recent, second)),
  },
  {
    title: "Total", hint: "Since the mapping was added", width: "72px", className: "right", descending: true, area: "count",
    order: ({ count }) => count,
    fill: (cell, { count }) => setText(cell, formatCount(count)),
  },
];

const ERRORS_ON_PHONE = `
  "name count" 22px
  "reason reason" 22px
  "recent seen" 24px / minmax(0, 1fr) auto`;

/** The errors of a mapping: `{mapping, kind, count, recent}`. */
function errorsOf(mapping) {
  return Object.entries(mapping.stats.errors).map(([kind, count]) => ({ mapping, kind, count, recent: mapping.recent[kind] }));
}

/** All errors that the search finds. */
class ErrorsView {
  constructor(parent) {
    this.table = new Table(parent, {
      columns: ERROR_COLUMNS, label: "Errors", phone: ERRORS_ON_PHONE,
      key: ({ mapping, kind }) => `${mapping.key} ${kind}`, sortedBy: 4,
    });
    this.placeholder = new Placeholder(parent);
  }

  show(store, words) {
    const all = [...store.mappings.values()].flatMap(errorsOf);
    const found = all.filter(({ mapping, kind }) => words.every((word) => ErrorsView.#matches(mapping, kind, word)));
    this.table.context = { second: store.second };
    this.table.element.hidden = found.length === 0;
    this.table.show(found);
    if (found.length > 0) this.placeholder.show(null);
    else if (all.length > 0) this.placeholder.show("Nothing found", "No error matches the search.");
    else this.placeholder.show("No errors", "Nothing has failed since these mappings were added.");
    return `${formatExact(found.length)} of ${plural(all.length, "error")}`;
  }

  static #matches(mapping, kind, word) {
    return mapping.matches([word]) || `${kind} ${reasonOf(kind)[0]}`.toLowerCase().includes(word);
  }
}
