// A table of any length, of which only the rows in view are in the document.

/** How many rows above and below the view are kept, so that scrolling and the Tab key find them. */
const MARGIN = 8;

const collator = new Intl.Collator("en", { numeric: true });

/**
 * Shows `rows` in an order that the reader chooses. A column has:
 * - `title`, and `hint`, a longer title;
 * - `width`, a track of a grid; `area`, its place in the grid of a phone, and `label`, its title there;
 * - `className` of its cells;
 * - `make(cell)`, which makes what a cell consists of, once;
 * - `fill(cell, row, context)`, which fills it;
 * - `order(row, context)`, a number or text to sort by; `descending`, if the first click sorts so.
 */
class Table {
  /** What `fill` and `order` get beside the row. */
  context = null;
  #rows = [];
  #positions = new Map();
  #elements = new Map();
  #spare = [];
  #headers = [];

  /** `phone` is the value of `grid-template` on a phone; `key(row)` a text that distinguishes rows. */
  constructor(parent, { columns, label, phone, key, sortedBy }) {
    this.columns = columns;
    this.key = key;
    this.sorted = { column: columns[sortedBy], descending: columns[sortedBy].descending ?? false };
    this.head = make("div", "head", ...columns.map((column) => this.#makeHeader(column)));
    this.head.setAttribute("role", "row");
    this.head.ariaRowIndex = "1";
    const headGroup = make("div", "", this.head);
    this.body = make("div", "body");
    for (const group of [headGroup, this.body]) group.setAttribute("role", "rowgroup");
    // A sticky element stays within its parent, which has to be as long as the table.
    headGroup.style.display = "contents";
    this.element = make("div", "table", headGroup, this.body);
    this.element.setAttribute("role", "table");
    this.element.ariaLabel = label;
    this.element.style.setProperty("--columns", columns.map(({ width }) => width).join(" "));
    this.element.style.setProperty("--phone", phone);
    parent.append(this.element);
    this.body.addEventListener("keydown", (event) => this.#moveFocus(event));
    this.#showOrder();
  }

  #makeHeader(column) {
    const button = make("button", "", column.title);
    button.type = "button";
    if (column.hint) button.title = column.hint;
    const header = make("div", column.className ?? "", column.order ? button : column.title);
    header.setAttribute("role", "columnheader");
    button.addEventListener("click", () => this.sortBy(column));
    this.#headers.push(header);
    return header;
  }

  /** Sorts by a column; by the same one again, in the other direction. */
  sortBy(column) {
    const same = this.sorted.column === column;
    this.sorted = { column, descending: same ? !this.sorted.descending : column.descending ?? false };
    this.#showOrder();
    this.show(this.#rows);
  }

  #showOrder() {
    this.#headers.forEach((header, index) => {
      const direction = this.sorted.descending ? "descending" : "ascending";
      setAttribute(header, "aria-sort", this.columns[index] === this.sorted.column ? direction : null);
    });
  }

  /** Replaces the rows. */
  show(rows) {
    this.#rows = this.#sort(rows);
    this.element.ariaRowCount = String(rows.length + 1);
    this.render();
  }

  #sort(rows) {
    const { column: { order }, descending } = this.sorted;
    const sign = descending ? -1 : 1;
    const keyed = rows.map((row) => {
      const key = this.key(row);
      return { row, key, by: order(row, this.context), before: this.#positions.get(key) ?? rows.length };
    });
    // Comparing texts is slow. From the last order, which has hardly changed, each is compared once or twice.
    keyed.sort((a, b) => a.before - b.before);
    keyed.sort((a, b) => sign * compare(a.by, b.by) || compare(a.key, b.key));
    this.#positions = new Map(keyed.map(({ key }, index) => [key, index]));
    return keyed.map(({ row }) => row);
  }

  /** Puts the rows in view into the document, and removes the others. */
  render() {
    const height = parseFloat(getComputedStyle(this.element).getPropertyValue("--row"));
    this.body.style.height = `${this.#rows.length * height}px`;
    const above = -this.body.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(above / height) - MARGIN);
    const end = Math.min(this.#rows.length, Math.ceil((above + innerHeight) / height) + MARGIN);
    const shown = this.#rows.slice(first, Math.max(first, end));
    this.#place(shown, first, height);
  }

  #place(shown, first, height) {
    const focused = document.activeElement;
    const keys = new Set(shown.map((row) => this.key(row)));
    for (const [key, element] of this.#elements) {
      if (keys.has(key)) continue;
      this.#elements.delete(key);
      this.#spare.push(element);
      element.remove();
    }
    let next = this.body.firstElementChild;
    shown.forEach((row, index) => {
      const element = this.#elementOf(row);
      element.style.transform = `translateY(${(first + index) * height}px)`;
      setAttribute(element, "aria-rowindex", String(first + index + 2));
      this.columns.forEach((column, number) => column.fill(element.children[number], row, this.context));
      // In the order of the rows, for readers of the screen and the Tab key.
      if (next === element) next = element.nextElementSibling;
      else this.body.insertBefore(element, next);
    });
    // Moving an element takes the focus from it.
    if (focused !== document.activeElement && this.body.contains(focused)) focused.focus({ preventScroll: true });
  }

  #elementOf(row) {
    const key = this.key(row);
    const element = this.#elements.get(key) ?? this.#spare.pop() ?? this.#makeRow();
    this.#elements.set(key, element);
    return element;
  }

  #makeRow() {
    const cells = this.columns.map((column) => {
      const cell = make("div", `cell ${column.className ?? ""} ${column.area ? `at-${column.area}` : "unplaced"}`);
      cell.setAttribute("role", "cell");
      if (column.area) cell.style.setProperty("--area", column.area);
      if (column.label) cell.dataset.label = column.label;
      column.make?.(cell);
      return cell;
    });
    const row = make("div", "row", ...cells);
    row.setAttribute("role", "row");
    return row;
  }

  /** The arrow keys move between the links of rows. */
  #moveFocus(event) {
    const row = event.target.closest(".row");
    const next = { ArrowDown: row?.nextElementSibling, ArrowUp: row?.previousElementSibling }[event.key];
    const link = next?.querySelector("a");
    if (!link) return;
    event.preventDefault();
    link.focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest" });
  }
}

/** Compares numbers, or texts with numbers in them. */
function compare(a, b) {
  return typeof a === "number" ? a - b : collator.compare(a, b);
}

/** What is shown instead of a table without rows. */
class Placeholder {
  constructor(parent) {
    this.element = make("div", "table empty");
    this.element.hidden = true;
    parent.append(this.element);
  }

  /** Shows a heading and a sentence, which may contain elements; hides itself without a heading. */
  show(heading, ...sentence) {
    this.element.hidden = heading === null;
    if (heading !== null && this.element.textContent !== `${heading}${sentence.map(textOf).join("")}`) {
      this.element.replaceChildren(make("strong", "", heading), ...sentence);
    }
  }
}

function textOf(part) {
  return typeof part === "string" ? part : part.textContent;
}
