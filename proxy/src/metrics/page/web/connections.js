// The view of single connections and flows. They are asked for while they are shown, and never otherwise.

/** The most connections to ask for. A reader who wants to see others searches. */
const MOST_CONNECTIONS = 1000;

/** The least time between two questions, in milliseconds. Events, which lead to them, are not always a second apart. */
const ASK_AGAIN = 800;

const STATES = {
  dialling: "dialling",
  open: "open",
  closed_by_client: "closed by client",
  closed_by_backend: "closed by backend",
  closing: "closing",
};

/** Connections that match a query, asked for again and again, with the rates between two answers. */
class ConnectionsQuery {
  /** The latest answer, or `null`; and whether the process cannot tell. */
  rows = null;
  total = 0;
  unavailable = null;
  /** What the rows were chosen by, and the filter that the process has refused: it is no address after all. */
  filter = {};
  refused = null;
  #before = new Map();
  #time = 0;
  #asked = null;

  /** Asks, unless an answer is awaited or the last one is young. Returns whether there is a new answer. */
  async ask(filter) {
    const query = new URLSearchParams({ ...filter, limit: filter.limit ?? MOST_CONNECTIONS }).toString();
    const now = performance.now();
    if (this.#asked === query && now - this.#time < ASK_AGAIN) return false;
    if (this.#asked !== query) this.#before = new Map();
    [this.#asked, this.#time] = [query, now];
    try {
      const response = await fetch(`api/connections?${query}`);
      if (response.status === 400 && filter.client !== undefined) {
        this.refused = filter.client;
        return true;
      }
      if (!response.ok) throw new Error((await response.text()).trim() || response.statusText);
      const answer = await response.json();
      if (this.#asked === query) this.#take(answer, now, filter);
    } catch (error) {
      [this.rows, this.unavailable] = [null, error.message];
    }
    return true;
  }

  #take({ connections, total }, now, filter) {
    const before = this.#before;
    for (const connection of connections) {
      const { at, bytes_in, bytes_out } = before.get(connection.id) ?? {};
      const elapsed = (now - at) / 1000;
      connection.in = at === undefined ? 0 : (connection.bytes_in - bytes_in) / elapsed;
      connection.out = at === undefined ? 0 : (connection.bytes_out - bytes_out) / elapsed;
      connection.at = now;
    }
    this.#before = new Map(connections.map((connection) => [connection.id, connection]));
    [this.rows, this.total, this.unavailable, this.filter] = [connections, total, null, filter];
  }
}

/** A column with a text of a connection. */
function textColumn(title, width, read, more = {}) {
  return {
    title, width, order: read,
    fill(cell, connection) {
      setText(cell, read(connection));
      setAttribute(cell, "title", read(connection));
    },
    ...more,
  };
}

/** A column with a number of a connection. */
function measureColumn(title, width, read, format, more = {}) {
  return {
    title, width, className: "right", descending: true, order: read,
    fill: (cell, connection) => fillNumber(cell, read(connection), format),
    ...more,
  };
}

const CONNECTION_COLUMNS = [
  textColumn("Client", "minmax(150px, 1.2fr)", ({ client }) => client, { area: "client" }),
  {
    title: "Mapping", width: "minmax(120px, 1fr)", area: "mapping", className: "tagged",
    order: ({ mapping }) => mapping,
    make: (cell) => cell.append(make("span"), make("span", "tag")),
    fill(cell, { mapping, protocol }) {
      setText(cell.children[0], mapping);
      setText(cell.children[1], protocol);
      setAttribute(cell, "title", mapping);
    },
  },
  textColumn("Backend", "minmax(130px, 1fr)", ({ backend }) => backend, { className: "addressed", area: "to", label: "→" }),
  textColumn("State", "minmax(80px, .8fr)", ({ state }) => STATES[state] ?? state, { className: "addressed", area: "state" }),
  textColumn("By", "56px", ({ spliced, protocol }) => protocol === "udp" ? "" : spliced ? "splice" : "copy",
    { className: "addressed", hint: "How the bytes are moved: by splice(2) in the kernel, or copied" }),
  measureColumn("Age", "92px", ({ age_ms }) => age_ms, formatDuration, { area: "age" }),
  measureColumn("Idle", "92px", ({ idle_ms }) => idle_ms, formatDuration),
  measureColumn("In", "84px", (connection) => connection.in, formatRate, { area: "in", hint: "To the backend, per second" }),
  measureColumn("Out", "84px", (connection) => connection.out, formatRate, { area: "out", hint: "To the client, per second" }),
  measureColumn("Total", "76px", ({ bytes_in, bytes_out }) => bytes_in + bytes_out, formatBytes, { hint: "Bytes in both directions" }),
];

const CONNECTIONS_ON_PHONE = `
  "client client client state" 24px
  "mapping mapping to to" 22px
  "in out out age" 22px / minmax(0, 1fr) minmax(0, .6fr) minmax(0, .4fr) minmax(0, 1.2fr)`;

/** Whether a text is an IP address, as a whole. */
function isAddress(text) {
  if (/^[0-9]{1,3}(\.[0-9]{1,3}){3}$/.test(text)) return text.split(".").every((part) => Number(part) <= 255);
  return /^[0-9a-f:.]+$/.test(text) && URL.canParse(`ftp://[${text}]/`);
}

/** Whether a text is a network. */
function isNetwork(text) {
  const [address, prefix, ...more] = text.split("/");
  const longest = address.includes(":") ? 128 : 32;
  return more.length === 0 && /^[0-9]{1,3}$/.test(prefix ?? "") && Number(prefix) <= longest && isAddress(address);
}

/** Connections and flows, of all mappings. */
class ConnectionsView {
  #query = new ConnectionsQuery();

  constructor(parent) {
    this.table = new Table(parent, {
      columns: CONNECTION_COLUMNS, label: "Connections and flows", phone: CONNECTIONS_ON_PHONE,
      key: ({ id, protocol }) => `${protocol} ${id}`, sortedBy: 7,
    });
    this.foot = this.table.element.appendChild(make("p", "foot"));
    this.placeholder = new Placeholder(parent);
  }

  /** Asks for what the search describes, and then calls `shown` if there is an answer to show. */
  ask(store, words, shown) {
    const filter = ConnectionsView.#filter(store, words);
    this.#query.ask(filter.client !== undefined && filter.client === this.#query.refused ? {} : filter).then((answered) => answered && shown());
  }

  /**
   * The part of the search that the process does: what a text does not show, as networks, and what may be missing as all
   * connections are more than it sends. Names of mappings come first, whatever they look like.
   */
  static #filter(store, [word, ...more]) {
    if (word === undefined || more.length > 0) return {};
    const named = [...store.mappings.values()].find(({ name }) => name.toLowerCase() === word);
    if (named !== undefined) return { mapping: named.name };
    const areAllListed = store.sums.connections + store.sums.flows <= MOST_CONNECTIONS;
    return isNetwork(word) || (!areAllListed && isAddress(word)) ? { client: word } : {};
  }

  /** Shows the latest answer. */
  show(store, words) {
    const { rows, total, unavailable, filter } = this.#query;
    const found = (rows ?? []).filter((row) => ConnectionsView.#matches(row, words, filter));
    this.table.element.hidden = found.length === 0;
    this.table.show(found);
    this.foot.hidden = rows === null || rows.length >= total;
    setText(this.foot, `${formatExact(rows?.length ?? 0)} of ${formatExact(total)} are listed. Search for a client's address, a network or the name of a mapping to list others.`);
    if (found.length > 0) this.placeholder.show(null);
    else if (unavailable !== null) this.placeholder.show("Connections are unavailable", unavailable);
    else if (rows === null) this.placeholder.show("Asking for connections", "");
    else if (words.length > 0) this.placeholder.show("Nothing found", "No connection or flow matches the search.");
    else this.placeholder.show("No connections", "No client is connected, and there is no UDP flow.");
    return `${formatExact(found.length)} of ${plural(total, "connection or flow", "connections and flows")}`;
  }

  static #matches({ client, mapping, backend, protocol, state }, words, filter) {
    const text = `${client} ${mapping} ${backend} ${protocol} ${state}`.toLowerCase();
    // A network is not part of a text; the process has looked for it.
    return words.every((word) => text.includes(word) || word === filter.client);
  }
}
