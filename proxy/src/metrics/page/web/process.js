// The view of the process: what it is, how much of its limits is used, and its last reload and upgrade.

/** A pair of a number and its bound, with a meter below. */
function makeUsage(term, { used, limit }) {
  const level = make("i", used > 0.9 * limit ? "bad" : used > 0.75 * limit ? "warn" : "");
  level.style.width = `${Math.min(100, 100 * used / Math.max(1, limit))}%`;
  const meter = make("div", "meter", level);
  meter.setAttribute("role", "meter");
  Object.assign(meter, { ariaLabel: term, ariaValueMin: "0", ariaValueMax: String(limit), ariaValueNow: String(used) });
  return make("div", "", makePairs([[term, `${formatExact(used)} of ${formatExact(limit)}`]]), meter);
}

/** A value in words, unless the process has not told it. */
function known(value, format) {
  return value === undefined ? undefined : format(value);
}

function makeCard(title, ...children) {
  return make("section", "card", make("h3", "", title), ...children);
}

class ProcessView {
  #shown = "";

  constructor(parent) {
    this.parent = parent;
    this.element = parent.appendChild(make("div", "cards"));
  }

  show({ process, before, time, sums }) {
    const cards = [this.#makeIdentity(process, before, time), this.#makeCapacity(process, sums), this.#makeChanges(process, time, sums)];
    // Only what differs is replaced, so that a text can be selected.
    const shown = cards.map((card) => card.textContent).join();
    if (shown !== this.#shown) this.element.replaceChildren(...cards);
    this.#shown = shown;
    return "";
  }

  #makeIdentity({ version, pid, started_ms, workers }, before, time) {
    return makeCard("Process", makePairs([
      ["Version", version],
      ["Process id", String(pid)],
      ["Serving since", formatMoment(started_ms)],
      ["Serving for", formatDuration(Math.max(0, time - started_ms))],
      ["Before it", before && `process ${before.pid}`],
      ["Worker threads", known(workers, formatExact)],
    ]));
  }

  #makeCapacity({ descriptors, flows, log_lines_dropped }, sums) {
    return makeCard("Capacity",
      makePairs([["TCP connections", formatExact(sums.connections)]]),
      descriptors ? makeUsage("Descriptors", descriptors) : "",
      flows ? makeUsage("UDP flows", flows) : makePairs([["UDP flows", formatExact(sums.flows)]]),
      makePairs([["Log lines dropped", known(log_lines_dropped, formatExact), log_lines_dropped > 0 ? "warn" : ""]]));
  }

  #makeChanges({ reload, upgrade }, time, sums) {
    const ago = ({ time_ms }) => `${formatDuration(Math.max(0, time - time_ms))} ago`;
    const attempt = upgrade && (upgrade.state === "failed" ? `failed ${ago(upgrade)}; this process goes on` : "under way");
    return makeCard("Configuration", makePairs([
      ["Mappings", formatExact(sums.mappings)],
      ["Attached by dockerd", formatExact(sums.attached)],
      ["Removed, still draining", formatExact(sums.draining), sums.draining > 0 ? "warn" : ""],
      ["Last reload", reload && ago(reload)],
      ["Its result", reload && (reload.succeeded ? "succeeded" : "failed; nothing has changed"), reload?.succeeded ? "good" : "bad"],
      ["Upgrade", attempt, upgrade?.state === "failed" ? "bad" : "warn"],
    ]));
  }
}
