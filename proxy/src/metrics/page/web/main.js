// Connects the parts: the feed fills the store, and each event, key and scroll shows the view that is chosen.

const store = new Store();
const feed = new Feed(receive, showPhase);
const details = new Details(() => { location.hash = view; });
const views = {
  mappings: new MappingsView(byId("view-mappings")),
  connections: new ConnectionsView(byId("view-connections")),
  errors: new ErrorsView(byId("view-errors")),
  process: new ProcessView(byId("view-process")),
};
const charts = {
  throughput: new Chart(byId("throughput"), ["in", "out"]),
  connections: new Chart(byId("connections-chart"), ["in"]),
  flows: new Chart(byId("flows-chart"), ["in"]),
  errors: new Chart(byId("errors-chart"), ["in"]),
};
const search = byId("search");
const sorting = byId("sorting");
let view = "mappings";
let isScheduled = false;

function receive(event, all) {
  store.apply(event, all);
  schedule();
}

/** Shows everything with the next frame, once. */
function schedule() {
  if (isScheduled) return;
  isScheduled = true;
  // There are no frames while the page is hidden, and nothing to show then.
  requestAnimationFrame(() => {
    isScheduled = false;
    show();
  });
}

function show() {
  if (store.process === null) return;
  showSummary();
  showView();
  details.show(store);
}

/** The words of the search, in lower case. */
function searchedWords() {
  return search.value.toLowerCase().split(/\s+/).filter(Boolean);
}

function showView() {
  const words = searchedWords();
  const found = views[view].show(store, words);
  if (view === "connections") views.connections.ask(store, words, () => view === "connections" && views.connections.show(store, searchedWords()));
  setText(byId("found"), words.length > 0 ? found : "");
}

function showSummary() {
  const { totals, sums, second, process, time } = store;
  setText(byId("total-in"), formatRate(totals.in.at(second)));
  setText(byId("total-out"), formatRate(totals.out.at(second)));
  const peak = Math.max(totals.in.peak(second), totals.out.peak(second));
  setText(byId("peak"), peak > 0 ? `peak of the last minute ${formatRate(peak)}` : "");
  for (const name of ["connections", "flows", "errors"]) {
    setText(byId(`${name}-now`), formatCount(sums[name]));
    charts[name].draw([totals[name]], second);
  }
  setText(byId("connections-rate"), `${formatPerSecond(totals.connections.at(second))} new`);
  setText(byId("flows-rate"), `${formatPerSecond(totals.flows.at(second))} new`);
  setText(byId("errors-rate"), `${formatPerSecond(totals.errors.at(second))}`);
  charts.throughput.draw([totals.in, totals.out], second);
  setText(byId("mappings-number"), formatCount(sums.mappings));
  setText(byId("connections-number"), formatCount(sums.connections + sums.flows));
  setText(byId("errors-number"), sums.errors > 0 ? formatCount(sums.errors) : "");
  setText(byId("uptime"), `up ${formatDuration(Math.max(0, time - process.started_ms))}`);
  setText(byId("version"), `version ${process.version}`);
}

// The connection.

const ENDINGS = {
  draining: "rproxy is ending: it lets connections finish and accepts no new ones.",
};

function showPhase() {
  const isLost = feed.phase === "lost";
  byId("status").dataset.phase = feed.phase;
  setText(byId("status-text"), { connecting: "Connecting", live: "Live", lost: "Connection lost" }[feed.phase]);
  document.body.classList.toggle("stale", isLost);
  document.title = `${isLost ? "Lost: " : ""}rproxy on ${location.host}`;
  byId("notice").hidden = !isLost;
  setClass(byId("notice"), feed.reason === null ? "notice" : "notice warn");
  showNotice();
}

/** Says what was lost, and when the next attempt is. */
function showNotice() {
  if (feed.phase !== "lost") return;
  const since = new Date(feed.lostAt).toLocaleTimeString();
  const seconds = Math.max(0, Math.ceil((feed.retryAt - Date.now()) / 1000));
  const cause = ENDINGS[feed.reason] ?? `No answer from rproxy since ${since}. It may have ended, or too many of these pages are open.`;
  setText(byId("notice-text"), `${cause} ${seconds > 0 ? `Trying again in ${seconds} s.` : "Trying again."}`);
}

// Views and keys.

/** Shows what the address says: a view, or a mapping beside the view that is there. */
function route() {
  const wanted = location.hash.slice(1);
  if (wanted.startsWith("mapping=")) {
    details.open(decodeName(wanted.slice("mapping=".length)));
  } else {
    details.close();
    select(wanted in views ? wanted : "mappings");
  }
  schedule();
}

/** What an address may say by mistake is not a name. */
function decodeName(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function select(name) {
  view = name;
  for (const each of Object.keys(views)) {
    const tab = byId(`tab-${each}`);
    tab.ariaSelected = String(each === name);
    // One stop for the Tab key; the arrow keys choose.
    tab.tabIndex = each === name ? 0 : -1;
    byId(`view-${each}`).hidden = each !== name;
  }
  search.parentElement.hidden = name === "process";
  offerSorting(views[name].table);
}

/** A phone has no heads of columns to sort by. */
function offerSorting(table) {
  sorting.parentElement.hidden = table === undefined;
  const sortable = table?.columns.filter(({ order }) => order) ?? [];
  sorting.replaceChildren(...sortable.map((column) => new Option(`By ${column.title.toLowerCase()}`, column.title, false, column === table.sorted.column)));
}

sorting.addEventListener("change", () => {
  const { table } = views[view];
  table.sortBy(table.columns.find(({ title }) => title === sorting.value));
});

byId("tab-mappings").parentElement.addEventListener("keydown", (event) => {
  const names = Object.keys(views);
  const step = { ArrowRight: 1, ArrowLeft: names.length - 1 }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  const next = names[(names.indexOf(view) + step) % names.length];
  location.hash = next;
  byId(`tab-${next}`).focus();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.matches("input, select") && !details.dialog.open) {
    event.preventDefault();
    search.focus();
  } else if (event.key === "Escape" && event.target === search) {
    search.value = "";
    schedule();
  }
});

search.addEventListener("input", schedule);
byId("retry").addEventListener("click", () => feed.connect());
addEventListener("scroll", () => views[view].table?.render(), { passive: true });
addEventListener("resize", schedule);
addEventListener("hashchange", route);
setInterval(showNotice, 500);

setText(byId("address"), location.host);
route();
showPhase();
feed.connect();
