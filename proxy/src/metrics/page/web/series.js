// What happened in each of the last seconds, and its curve.

/** How many seconds a curve shows. */
const SPAN = 60;

/** Values by second. A second in which nothing was recorded has 0, so that what is idle costs nothing. */
class Series {
  #values = new Float64Array(SPAN);
  #last = 0;

  /** Records the value of a second, which is later than all before. */
  record(second, value) {
    for (let skipped = Math.max(this.#last + 1, second - SPAN + 1); skipped < second; skipped += 1) {
      this.#values[skipped % SPAN] = 0;
    }
    this.#values[second % SPAN] = value;
    this.#last = second;
  }

  /** The value of a second that is at most `SPAN` ago. */
  at(second) {
    return second > this.#last || second <= this.#last - SPAN || second < 1 ? 0 : this.#values[second % SPAN];
  }

  /** The largest value of the seconds up to `now`. */
  peak(now) {
    let peak = 0;
    for (let second = now - SPAN + 1; second <= now; second += 1) peak = Math.max(peak, this.at(second));
    return peak;
  }
}

/** Curves in one frame, with a common scale: one of each class of `classes`, with or without the areas below. */
class Chart {
  #svg;
  #lines = [];
  #areas = [];

  constructor(parent, classes, { filled = true } = {}) {
    const svg = makeSvg("svg", { viewBox: `0 0 ${SPAN - 1} 100`, preserveAspectRatio: "none", "aria-hidden": "true" });
    for (const name of classes) {
      if (filled) this.#areas.push(svg.appendChild(makeSvg("path", { class: `area ${name}` })));
      this.#lines.push(svg.appendChild(makeSvg("path", { class: `line ${name}` })));
    }
    this.#svg = parent.appendChild(svg);
  }

  /** Draws the seconds up to `now` of as many series as there are classes; those that are `null` are flat. */
  draw(all, now) {
    const peak = Math.max(...all.map((series) => series?.peak(now) ?? 0));
    // Nothing is known from before the first second.
    const start = Math.max(0, SPAN - now);
    setAttribute(this.#svg, "class", peak === 0 ? "quiet" : "");
    all.forEach((series, index) => {
      const curve = series === null || peak === 0 ? `M${start} 97H${SPAN - 1}` : Chart.#curve(series, start, now, peak);
      setAttribute(this.#lines[index], "d", curve);
      if (this.#areas.length > 0) setAttribute(this.#areas[index], "d", `${curve}V100H${start}Z`);
    });
  }

  static #curve(series, start, now, peak) {
    let path = "";
    for (let x = start; x < SPAN; x += 1) {
      const y = 97 - 91 * series.at(now - SPAN + 1 + x) / peak;
      path += `${x === start ? "M" : "L"}${x} ${y.toFixed(1)}`;
    }
    return path;
  }
}
