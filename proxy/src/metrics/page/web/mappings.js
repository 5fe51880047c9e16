// The view of mappings.

/** The backend of a mapping, as a place in the list may show it: `172.17.0.2:80`. */
function backendOf(mapping) {
  return mapping.stats.backend ?? "";
}

/** Fills a cell with a number that is faint if it is 0. */
function fillNumber(cell, value, format) {
  setText(cell, format(value));
  cell.classList.toggle("zero", value === 0);
}

/** A column of numbers; `read(mapping, second)` is the number. */
function numberColumn(title, width, read, format, more = {}) {
  return {
    title, width, className: "right", descending: true,
    order: (mapping, { second }) => read(mapping, second),
    fill: (cell, mapping, { second }) => fillNumber(cell, read(mapping, second), format),
    ...more,
  };
}

const NAME_COLUMN = {
  title: "Name", width: "minmax(140px, 1.1fr)", area: "name", className: "tagged",
  order: (mapping) => mapping.name,
  make(cell) {
    cell.append(make("a"), make("span", "tag warn"));
  },
  fill(cell, mapping) {
    const [link, tag] = cell.children;
    setText(link, mapping.name);
    setAttribute(link, "href", mapping.draining ? null : `#mapping=${encodeURIComponent(mapping.name)}`);
    setAttribute(cell, "title", mapping.name);
    setText(tag, mapping.draining ? "draining" : "");
  },
};

const LISTENS_COLUMN = {
  title: "Listens on", width: "minmax(150px, 1.3fr)", className: "tagged addressed", area: "from",
  order: (mapping) => mapping.listens,
  make(cell) {
    cell.append(make("span"), make("span", "tag"));
  },
  fill(cell, mapping) {
    const [address, protocol] = cell.children;
    setText(address, mapping.listens);
    setText(protocol, mapping.stats.protocol ?? "");
    setAttribute(cell, "title", mapping.listens);
  },
};

const BACKEND_COLUMN = {
  title: "Backend", width: "minmax(130px, 1fr)", className: "addressed", area: "to", label: "→",
  order: backendOf,
  fill(cell, mapping) {
    setText(cell, backendOf(mapping));
    setAttribute(cell, "title", backendOf(mapping));
  },
};

/** Connections, and how many there may be. */
const CONNECTIONS_COLUMN = {
  title: "Conns", hint: "TCP connections now, and max_connections", width: "minmax(70px, .55fr)", className: "right", descending: true,
  area: "connections", label: "TCP",
  order: (mapping) => mapping.stats.connections,
  make(cell) {
    cell.append(make("span"), make("span", "of"));
  },
  fill(cell, mapping) {
    const { connections, limits } = mapping.stats;
    const limit = limits?.max_connections;
    const [now, most] = cell.children;
    setText(now, formatCount(connections));
    setClass(now, limit !== undefined && connections >= 0.8 * limit ? "full" : connections === 0 ? "zero" : "");
    setText(most, limit === undefined ? "" : ` / ${formatCount(limit)}`);
  },
};

const ACTIVITY_COLUMN = {
  title: "Last minute", width: "126px", area: "spark", className: "sparked",
  make(cell) {
    const spark = cell.appendChild(make("div", "spark"));
    cell.chart = new Chart(spark, ["in", "out"], { filled: false });
  },
  fill(cell, mapping, { second }) {
    cell.chart.draw([mapping.in, mapping.out], second);
  },
};

const ERRORS_COLUMN = {
  title: "Errors", hint: "Since the mapping was added", width: "64px", className: "right", descending: true, area: "errors", label: "Errors",
  order: (mapping) => mapping.errors,
  fill(cell, mapping) {
    fillNumber(cell, mapping.errors, formatCount);
    cell.classList.toggle("failed", mapping.errors > 0);
  },
};

const MAPPING_COLUMNS = [
  NAME_COLUMN,
  LISTENS_COLUMN,
  BACKEND_COLUMN,
  CONNECTIONS_COLUMN,
  numberColumn("Flows", "56px", (mapping) => mapping.stats.flows, formatCount,
    { hint: "UDP flows now", area: "flows", label: "UDP" }),
  numberColumn("In", "84px", (mapping, second) => mapping.rate("bytes_in", second), formatRate,
    { hint: "To the backend, per second", area: "in" }),
  numberColumn("Out", "84px", (mapping, second) => mapping.rate("bytes_out", second), formatRate,
    { hint: "To clients, per second", area: "out" }),
  ACTIVITY_COLUMN,
  numberColumn("Total", "76px", (mapping) => mapping.stats.bytes_in + mapping.stats.bytes_out, formatBytes,
    { hint: "Bytes in both directions, since the mapping was added" }),
  ERRORS_COLUMN,
];

const MAPPINGS_ON_PHONE = `
  "name name errors spark" 24px
  "from from to to" 22px
  "in out connections flows" 22px / minmax(0, 1.15fr) minmax(0, 1.15fr) minmax(0, 1fr) minmax(0, .85fr)`;

/** All mappings that the search finds. */
class MappingsView {
  constructor(parent) {
    this.table = new Table(parent, {
      columns: MAPPING_COLUMNS, label: "Mappings", phone: MAPPINGS_ON_PHONE, key: ({ key }) => key, sortedBy: 0,
    });
    this.placeholder = new Placeholder(parent);
  }

  /** Shows what a store has. Returns how many there are, in words. */
  show(store, words) {
    const all = [...store.mappings.values()];
    const found = words.length === 0 ? all : all.filter((mapping) => mapping.matches(words));
    this.table.context = { second: store.second };
    this.table.element.hidden = found.length === 0;
    this.table.show(found);
    if (found.length > 0) this.placeholder.show(null);
    else if (all.length > 0) this.placeholder.show("Nothing found", `None of the ${plural(all.length, "mapping")} matches the search.`);
    else this.placeholder.show("No mappings yet", "Add one, for example with ", make("code", "", "rproxy ctl add --host 0.0.0.0:8080 --to 172.17.0.2:80"));
    return `${formatExact(found.length)} of ${plural(all.length, "mapping")}`;
  }
}
