// What the process has told: mappings with their counters and rates, and the process itself.

/** The counters whose rates are shown. */
const RATED = ["bytes_in", "bytes_out", "connections_total", "flows_total"];

/** The number of all errors in a `MappingStats`. */
function sumErrors(stats) {
  let sum = 0;
  for (const kind in stats.errors) sum += stats.errors[kind];
  return sum;
}

/** A mapping, or one that drains. */
class Mapping {
  /** Its latest counters and, unless it drains, what it is: `host`, `ports`, `backend`, `protocol`, `limits`. */
  stats = null;
  draining = false;
  /** All errors, and those of each kind since this page was opened: `{count, second}`, by kind. */
  errors = 0;
  recent = {};
  /** Bytes per second; `null` until there are any. */
  in = null;
  out = null;
  #rates = {};
  #second = 0;
  #words = null;

  constructor(key) {
    this.key = key;
  }

  get name() {
    return this.stats.name;
  }

  /** Takes counters over. Those of the first time have no rates. */
  update(update, second, elapsed) {
    const before = this.stats;
    this.stats = { ...before, ...update };
    this.errors = sumErrors(this.stats);
    this.#words = null;
    if (before === null || elapsed <= 0) return;
    this.#second = second;
    for (const counter of RATED) {
      this.#rates[counter] = Math.max(0, this.stats[counter] - before[counter]) / elapsed;
    }
    this.#record("in", "bytes_in", second);
    this.#record("out", "bytes_out", second);
    for (const [kind, count] of Object.entries(this.stats.errors)) {
      const more = count - (before.errors[kind] ?? 0);
      if (more > 0) this.recent[kind] = { count: (this.recent[kind]?.count ?? 0) + more, second };
    }
  }

  #record(direction, counter, second) {
    const rate = this.#rates[counter];
    if (rate > 0) this[direction] ??= new Series();
    this[direction]?.record(second, rate);
  }

  /** The rate of a counter; 0 if it did not change in the last second. */
  rate(counter, now) {
    return this.#second === now ? this.#rates[counter] ?? 0 : 0;
  }

  /** Where clients connect: `[::]:8080`. Empty if it drains. */
  get listens() {
    return this.stats.host === undefined ? "" : `${this.stats.host}:${this.stats.ports}`;
  }

  /** Whether each of these words, in lower case, is in its name or one of its addresses. */
  matches(words) {
    const { name, backend = "", protocol = "", origin = "" } = this.stats;
    this.#words ??= `${name} ${this.listens} ${backend} ${protocol} ${origin}`.toLowerCase();
    return words.every((word) => this.#words.includes(word));
  }
}

/** Everything that is known. */
class Store {
  mappings = new Map();
  process = null;
  /** The process that was here before, if another one has taken over since this page was opened. */
  before = null;
  /** Of which time, in milliseconds since 1970, by the clock of the process. */
  time = 0;
  /** The number of events, which is that of seconds while the connection lasts. */
  second = 0;
  totals = { in: new Series(), out: new Series(), connections: new Series(), flows: new Series(), errors: new Series() };
  sums = { connections: 0, flows: 0, errors: 0, mappings: 0, attached: 0, draining: 0 };

  /** Takes over an event. With `all`, there is nothing beside what it has. */
  apply(event, all) {
    const elapsed = all ? 0 : (event.time_ms - this.time) / 1000;
    this.second += 1;
    this.time = event.time_ms;
    if (this.process !== null && this.process.pid !== event.process.pid) this.before = this.process;
    this.process = event.process;
    const before = this.sums.errors;
    if (all) this.#forget(new Set(event.mappings.map(({ name }) => name)));
    for (const name of event.removed ?? []) this.mappings.delete(name);
    for (const update of event.mappings ?? []) this.#update(update.name, update, elapsed);
    this.#replaceDraining(event.draining ?? [], elapsed);
    this.#add(elapsed > 0 ? Math.max(0, this.#sumErrors() - before) / elapsed : 0);
  }

  /** Keeps only these, and their curves: after a reconnect, counters may be those of another process. */
  #forget(kept) {
    for (const [key, mapping] of this.mappings) {
      if (kept.has(key)) mapping.stats = null;
      else this.mappings.delete(key);
    }
  }

  #update(key, update, elapsed) {
    let mapping = this.mappings.get(key);
    if (mapping === undefined) {
      mapping = new Mapping(key);
      this.mappings.set(key, mapping);
    }
    mapping.update(update, this.second, elapsed);
    return mapping;
  }

  /** Several mappings that drain may have had one name, also that of one that is served. */
  #replaceDraining(draining, elapsed) {
    const kept = new Set();
    const numbers = new Map();
    for (const update of draining) {
      const number = numbers.get(update.name) ?? 0;
      numbers.set(update.name, number + 1);
      const key = `draining ${number} ${update.name}`;
      this.#update(key, update, elapsed).draining = true;
      kept.add(key);
    }
    for (const [key, mapping] of this.mappings) {
      if (mapping.draining && !kept.has(key)) this.mappings.delete(key);
    }
  }

  #sumErrors() {
    let errors = 0;
    for (const mapping of this.mappings.values()) errors += mapping.errors;
    return errors;
  }

  #add(errorRate) {
    const sums = { connections: 0, flows: 0, errors: 0, mappings: 0, attached: 0, draining: 0 };
    const rates = { in: 0, out: 0, connections: 0, flows: 0, errors: errorRate };
    for (const mapping of this.mappings.values()) {
      sums[mapping.draining ? "draining" : "mappings"] += 1;
      sums.attached += mapping.stats.origin === undefined ? 0 : 1;
      sums.connections += mapping.stats.connections;
      sums.flows += mapping.stats.flows;
      sums.errors += mapping.errors;
      rates.in += mapping.rate("bytes_in", this.second);
      rates.out += mapping.rate("bytes_out", this.second);
      rates.connections += mapping.rate("connections_total", this.second);
      rates.flows += mapping.rate("flows_total", this.second);
    }
    this.sums = sums;
    for (const [name, series] of Object.entries(this.totals)) series.record(this.second, rates[name]);
  }
}
