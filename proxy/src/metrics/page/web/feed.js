// The connection to the process: server-sent events, and what happens when they stop.

/** How long the process may be silent, in milliseconds. It sends an event a second. */
const SILENCE = 10_000;

/** The waits before attempts to connect again, in milliseconds. The last one is repeated. */
const WAITS = [1000, 2000, 3000, 5000];

/**
 * Follows `/events`, and connects again whenever it ends. An `EventSource` alone would give up if the process answers
 * with an error, as it does when too many viewers are there, and would not notice a network that is silent.
 */
class Feed {
  /** `connecting`, `live` or `lost`. */
  phase = "connecting";
  /** When the connection was lost, and when the next attempt is made, as `Date.now()` has it. */
  lostAt = 0;
  retryAt = 0;
  /** Why the process ended the stream, if it said so: `draining`. */
  reason = null;
  #source = null;
  #silence = 0;
  #retry = 0;
  #attempts = 0;

  /** `onEvent` gets each event's contents, and whether these are everything; `onPhase` is called when a member changes. */
  constructor(onEvent, onPhase) {
    this.onEvent = onEvent;
    this.onPhase = onPhase;
  }

  /** Connects, or does so at once instead of after the wait. */
  connect() {
    this.#close();
    this.#source = new EventSource("events");
    this.#source.addEventListener("state", (event) => this.#receive(event, true));
    this.#source.addEventListener("changes", (event) => this.#receive(event, false));
    this.#source.addEventListener("end", (event) => { this.reason = JSON.parse(event.data).reason; });
    this.#source.addEventListener("error", () => this.#lose());
    this.#listen();
  }

  #receive(event, all) {
    this.#listen();
    this.onEvent(JSON.parse(event.data), all);
    if (this.phase === "live") return;
    this.phase = "live";
    this.reason = null;
    this.#attempts = 0;
    this.onPhase();
  }

  #listen() {
    clearTimeout(this.#silence);
    this.#silence = setTimeout(() => this.#lose(), SILENCE);
  }

  #lose() {
    this.#close();
    if (this.phase !== "lost") this.lostAt = Date.now();
    this.phase = "lost";
    const wait = WAITS[Math.min(this.#attempts, WAITS.length - 1)];
    this.#attempts += 1;
    this.retryAt = Date.now() + wait;
    this.#retry = setTimeout(() => this.connect(), wait);
    this.onPhase();
  }

  #close() {
    clearTimeout(this.#retry);
    clearTimeout(this.#silence);
    this.#source?.close();
    this.#source = null;
  }
}
