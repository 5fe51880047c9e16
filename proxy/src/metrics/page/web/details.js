// What is known about one mapping, beside the list.

/** How many of its connections are listed. */
const LISTED = 50;

/** Shows the mapping of the address (`#mapping=NAME`) in a dialog. */
class Details {
  #query = new ConnectionsQuery();
  #name = null;
  #parts = null;

  /** `onClose` is called when the reader closes it. */
  constructor(onClose) {
    this.dialog = byId("details");
    this.body = byId("details-body");
    byId("details-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => {
      if (this.#name === null) return;
      this.#name = null;
      onClose();
    });
    // A click on the dialog itself is one beside its contents.
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog && event.offsetX < 0) this.dialog.close();
    });
  }

  /** Opens the dialog for a mapping. */
  open(name) {
    if (this.#name === name) return;
    this.#name = name;
    this.#query = new ConnectionsQuery();
    this.#make();
    if (!this.dialog.open) this.dialog.showModal();
    // The name is read out first; otherwise the button that closes would be.
    byId("details-name").focus();
  }

  /** Closes it, if the address is another one. */
  close() {
    this.#name = null;
    if (this.dialog.open) this.dialog.close();
  }

  #make() {
    setText(byId("details-name"), this.#name);
    const figures = { in: make("dd", "", "–"), out: make("dd", "", "–") };
    const chart = make("div", "chart");
    const traffic = make("div", "tile wide", make("h2", "", "Throughput"), make("dl", "flow",
      make("div", "in", make("dt", "", "In, to the backend"), figures.in),
      make("div", "out", make("dt", "", "Out, to clients"), figures.out)), chart);
    const [facts, limits, errors, clients] = ["Mapping", "Limits and options", "Errors", "Connections"].map((title) => makeCard(title, make("div")));
    this.body.replaceChildren(traffic, facts, errors, clients, limits);
    this.#parts = { figures, chart: new Chart(chart, ["in", "out"]), facts, limits, errors, clients };
  }

  /** Shows what a store has, if the dialog is open. */
  show(store) {
    if (this.#name === null) return;
    const mapping = store.mappings.get(this.#name);
    if (mapping === undefined) {
      if (store.process !== null) this.body.replaceChildren(make("p", "empty", make("strong", "", "No such mapping"), "It may have been removed."));
      return;
    }
    if (!this.#parts.facts.isConnected) this.#make();
    const { figures, chart, facts, limits, errors } = this.#parts;
    setText(figures.in, formatRate(mapping.rate("bytes_in", store.second)));
    setText(figures.out, formatRate(mapping.rate("bytes_out", store.second)));
    chart.draw([mapping.in, mapping.out], store.second);
    replace(facts, Details.#makeFacts(mapping));
    replace(limits, Details.#makeLimits(mapping.stats.limits ?? {}));
    replace(errors, Details.#makeErrors(mapping, store.second));
    this.#query.ask({ mapping: this.#name, limit: LISTED }).then(() => this.#showClients());
  }

  static #makeFacts({ listens, stats }) {
    const has = (protocol) => stats.protocol?.includes(protocol);
    return makePairs([
      ["Listens on", listens],
      ["Backend", stats.backend],
      ["Protocol", stats.protocol?.toUpperCase()],
      ["TCP connections", has("tcp") ? `${formatExact(stats.connections)} now, ${formatExact(stats.connections_total)} in all` : undefined],
      ["UDP flows", has("udp") ? `${formatExact(stats.flows)} now, ${formatExact(stats.flows_total)} in all` : undefined],
      ["Bytes", `${formatBytes(stats.bytes_in)} in, ${formatBytes(stats.bytes_out)} out`],
      ["Datagrams", has("udp") ? `${formatExact(stats.datagrams_in)} in, ${formatExact(stats.datagrams_out)} out` : undefined],
      ["Attached by", stats.origin && `${stats.origin}${stats.process ? `, process ${stats.process}` : ""}`],
    ]);
  }

  static #makeLimits(limits) {
    const rows = Object.entries(limits).map(([key, value]) => [key, Array.isArray(value) ? value.join(", ") : String(value)]);
    return rows.length > 0 ? makePairs(rows) : make("p", "sub", "All have their defaults.");
  }

  static #makeErrors(mapping, second) {
    const errors = errorsOf(mapping);
    if (errors.length === 0) return make("p", "sub", "None");
    return make("dl", "reasons", ...errors.map(({ kind, count, recent }) => {
      const [heading, explanation] = reasonOf(kind);
      const term = make("dt", "", make("span", "", heading), make("span", "failed", formatExact(count)));
      return make("div", "", term, make("dd", "", `${explanation} Last seen: ${formatAgo(recent, second)}.`));
    }));
  }

  #showClients() {
    const { rows, total, unavailable } = this.#query;
    const { clients } = this.#parts;
    if (rows === null) replace(clients, make("p", "sub", unavailable ?? ""));
    else if (rows.length === 0) replace(clients, make("p", "sub", "None"));
    else replace(clients, make("div", "", Details.#makeList(rows), ...rows.length < total ? [make("p", "sub", `${formatExact(rows.length)} of ${formatExact(total)}`)] : []));
  }

  static #makeList(rows) {
    return make("div", "clients", ...rows.flatMap((row) => [
      make("span", "", row.client),
      make("span", "addressed", STATES[row.state] ?? row.state),
      make("span", "right", formatRate(row.in + row.out)),
    ]));
  }
}

/** Replaces what is below the title of a card, if the text differs, so that a reader can select it. */
function replace(card, contents) {
  if (card.lastChild.textContent !== contents.textContent) card.replaceChild(contents, card.lastChild);
}
