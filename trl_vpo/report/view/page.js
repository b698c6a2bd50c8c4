// The page's state is its address (#page=2&q=red): every change writes the address, and the address is drawn.
// page_elements.js stands in front of this file.

// --- data -----------------------------------------------------------------------------------------------------------

const blocks = (kind) => [...document.querySelectorAll(`script.${kind}`)];
const parse = (node) => JSON.parse(node.textContent);

const COUNTS = parse(blocks("counts")[0]);
const ROWS = blocks("rows").flatMap((node) => parse(node).map((row) => ({ ...row, block: node.dataset.number })));
const REJECTED = blocks("rejected").flatMap((node) => parse(node));
const SUMMARY = blocks("summary").flatMap((node) => parse(node));
const PICTURES = new Map(blocks("pictures").map((node) => [node.dataset.number, node])); // parsed when shown
const MOST_OPTIONS = 100;
const DEFAULTS = {
  view: "rows", q: "", source: "", column: "", min: "", max: "", sort: "", order: "asc", problems: "", kind: "",
  size: "10", page: "1", row: "",
};
const CONTROLS = ["q", "source", "column", "min", "max", "sort", "order", "problems", "kind", "size"];

for (const row of ROWS) row.values = new Map(row.columns);
const RANGES = numericColumns();
const KINDS = count(REJECTED.map((entry) => entry.kind));

function numericColumns() {
  const ranges = new Map();
  for (const row of ROWS) {
    for (const [name, value] of row.columns) {
      if (typeof value !== "number") continue;
      const [low, high] = ranges.get(name) ?? [Infinity, -Infinity];
      ranges.set(name, [Math.min(low, value), Math.max(high, value)]);
    }
  }
  return ranges;
}

// [[value, how often], ...], the most frequent first.
function count(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]);
}

function rowText(row) {
  const prompt = (row.prompt ?? []).flatMap(([, parts]) => parts.filter((part) => typeof part === "string"));
  const responses = [row.chosen, row.rejected].map((pieces) => (pieces ?? []).join(""));
  const errors = (row.media ?? []).map((group) => group.error ?? "");
  const columns = row.columns.map(([, value]) => value).filter((value) => typeof value === "string");
  const parts = [row.id, row.source, ...prompt, ...responses, ...columns, ...row.problems, ...errors, row.raw];
  return parts.filter((part) => part !== undefined).join("\n").toLowerCase();
}

const hasProblem = (row) => row.problems.length > 0 || (row.media ?? []).some((group) => "error" in group);

// --- state ----------------------------------------------------------------------------------------------------------

let state = { ...DEFAULTS };

function readAddress() {
  state = { ...DEFAULTS };
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) if (key in DEFAULTS) state[key] = value;
  if (![...byId("size").options].some((option) => option.value === state.size)) state.size = DEFAULTS.size;
  if (!["rejected", "summary"].includes(state.view)) state.view = "rows";
}

function address(changes = {}) {
  const pairs = Object.entries({ ...state, ...changes }).filter(([key, value]) => value !== DEFAULTS[key]);
  return `#${new URLSearchParams(pairs)}`;
}

// `step`: whether the browser's Back button should come back to where we were.
function go(changes, step = true) {
  const next = address(changes);
  if (next !== (location.hash || "#")) history[step ? "pushState" : "replaceState"](null, "", next);
  draw();
}

function results() {
  const query = state.q.toLowerCase();
  if (state.view === "rejected") {
    return REJECTED.filter((entry) => {
      entry.text ??= [entry.id, entry.kind, entry.reason, entry.more].join("\n").toLowerCase();
      return (!state.kind || entry.kind === state.kind) && entry.text.includes(query);
    });
  }
  const low = state.min === "" ? -Infinity : Number(state.min);
  const high = state.max === "" ? Infinity : Number(state.max);
  const bounded = state.column && (state.min !== "" || state.max !== "");
  const found = ROWS.filter((row) => {
    if (state.source && row.source !== state.source) return false;
    if (state.problems && !hasProblem(row)) return false;
    const value = row.values.get(state.column);
    if (bounded && !(typeof value === "number" && value >= low && value <= high)) return false;
    row.text ??= rowText(row);
    return row.text.includes(query);
  });
  return state.sort ? sorted(found) : found;
}

// Rows without a number in the column come last, in either order.
function sorted(rows) {
  const sign = state.order === "desc" ? -1 : 1;
  const key = (row) => (typeof row.values.get(state.sort) === "number" ? row.values.get(state.sort) : null);
  return [...rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (x - y);
  });
}

// --- drawing --------------------------------------------------------------------------------------------------------

function draw() {
  readAddress();
  showControls();
  byId("kinds").replaceChildren(...(state.view === "rejected" ? [kindTable()] : []));
  if (state.view === "summary") {
    byId("content").replaceChildren(summaryTable());
    showPager(1, 1);
    return;
  }
  const found = results();
  const size = Number(state.size);
  const pages = Math.max(1, Math.ceil(found.length / size));
  const at = state.row === "" ? -1 : found.findIndex((item) => String(item.n) === state.row);
  const page = at >= 0 ? Math.floor(at / size) + 1 : Math.min(pages, Math.max(1, Math.trunc(Number(state.page)) || 1));
  state.page = String(page);
  const shown = found.slice((page - 1) * size, page * size);
  showStatus(found.length, (page - 1) * size, shown.length, state.row !== "" && at < 0);
  showPager(page, pages);
  const drawn = state.view === "rows" ? shown.map(drawRow(picturesOf(shown))) : shown.length ? [rejectedTable(shown)] : [];
  byId("content").replaceChildren(...(drawn.length ? drawn : [make("p", { class: "empty" }, emptyText())]));
  if (at >= 0) byId(`row-${state.row}`).closest("article").focus();
}

function emptyText() {
  const all = state.view === "rows" ? ROWS : REJECTED;
  return all.length ? "Nothing matches these filters." : "There are no rows.";
}

function showControls() {
  for (const id of ["filters", "bar"]) byId(id).hidden = state.view === "summary";
  for (const part of byId("filters").querySelectorAll("[data-for]")) part.hidden = part.dataset.for !== state.view;
  for (const link of byId("views").children) {
    if (link.dataset.view === state.view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const name of CONTROLS) {
    const control = byId(name);
    if (control.type === "checkbox") control.checked = state[name] !== "";
    else if (control.value !== state[name]) {
      if (control.tagName === "SELECT" && ![...control.options].some((option) => option.value === state[name])) {
        control.append(new Option(state[name]));
      }
      control.value = state[name];
    }
  }
  const range = RANGES.get(state.column);
  for (const [name, at] of [["min", 0], ["max", 1]]) {
    byId(name).disabled = !range;
    byId(name).placeholder = range ? figure(range[at]) : "";
  }
}

function showStatus(found, start, shown, hidden) {
  const all = state.view === "rows" ? ROWS.length : REJECTED.length;
  const what = state.view === "rows" ? "rows" : "left out";
  const span = shown ? `${start + 1}–${start + shown} of ${found}` : "None";
  const rest = found === all ? what : `that match, ${all} ${what} in all`;
  byId("status").textContent = `${span} ${rest}${hidden ? `. Row ${state.row} is not among them` : ""}`;
}

function showPager(page, pages) {
  for (const pager of document.querySelectorAll(".pager")) {
    pager.hidden = pages === 1;
    pager.querySelector(".page").value = page;
    pager.querySelector(".page").max = pages;
    pager.querySelector(".pages").textContent = `of ${pages}`;
    pager.querySelector("[data-step='-1']").disabled = page === 1;
    pager.querySelector("[data-step='1']").disabled = page === pages;
  }
}

// A function from a row to its pictures. Every block is parsed once a drawing, and then forgotten.
function picturesOf(rows) {
  const parsed = new Map();
  for (const { block } of rows) {
    if (PICTURES.has(block) && !parsed.has(block)) parsed.set(block, parse(PICTURES.get(block)));
  }
  return (row) => parsed.get(row.block)?.[row.n] ?? [];
}

// --- events ---------------------------------------------------------------------------------------------------------

function stepRow(step) {
  const found = results();
  if (state.view !== "rows" || !found.length) return;
  const first = (Number(state.page) - 1) * Number(state.size);
  const at = found.findIndex((row) => String(row.n) === state.row);
  const next = at < 0 ? (step > 0 ? first : first - 1) : at + step;
  if (!found[next]) return;
  go({ row: String(found[next].n), page: "1" }, false);
  byId(`row-${found[next].n}`).closest("article").scrollIntoView({ block: "start" });
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key];
  if (byId("viewer").open) {
    if (step) stepPicture(step);
  } else if (event.target.closest?.("input, select, textarea")) {
    return;
  } else if (event.key === "/") {
    byId("q").focus();
    byId("q").select();
  } else if (step) stepRow(step);
  else return;
  if (step || event.key === "/") event.preventDefault();
}

function turnTo(page) {
  go({ page: String(page), row: "" });
  byId("status").scrollIntoView({ block: "nearest" });
}

function listen() {
  addEventListener("hashchange", draw);
  addEventListener("popstate", draw);
  addEventListener("keydown", onKey);
  for (const name of CONTROLS) {
    const control = byId(name);
    const change = () => go({ [name]: control.type === "checkbox" ? (control.checked ? "1" : "") : control.value, page: "1", row: "" }, false);
    control.addEventListener(control.tagName === "SELECT" || control.type === "checkbox" ? "change" : "input", change);
  }
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", (event) => {
    event.preventDefault();
    go({ ...DEFAULTS, view: state.view });
  });
  for (const pager of document.querySelectorAll(".pager")) {
    for (const button of pager.querySelectorAll("[data-step]")) {
      button.addEventListener("click", () => turnTo(Number(state.page) + Number(button.dataset.step)));
    }
    pager.querySelector(".page").addEventListener("change", (event) => turnTo(event.target.value));
  }
  for (const button of document.querySelectorAll("[data-picture]")) {
    button.addEventListener("click", () => stepPicture(Number(button.dataset.picture)));
  }
  byId("viewer-close").addEventListener("click", () => byId("viewer").close());
}

function start() {
  const { rows, limited, problem_rows: problems, media, media_failures: failures } = COUNTS;
  byId("counts").textContent = [
    limited ? `the first ${rows} rows, the dataset has more` : `${rows} rows`,
    problems ? `${problems} with problems` : "no problems",
    media ? `${media} media` : "",
    failures ? `${failures} of them cannot be shown` : "",
  ].filter(Boolean).join(" · ");
  const sources = count(ROWS.map((row) => row.source).filter((source) => source !== undefined));
  for (const [source, number] of sources.slice(0, MOST_OPTIONS)) byId("source").append(new Option(`${source} (${number})`, source));
  if (sources.length > MOST_OPTIONS) byId("source").append(new Option(`${sources.length - MOST_OPTIONS} more: use the search`, ""));
  for (const [kind, number] of KINDS.slice(0, MOST_OPTIONS)) if (kind) byId("kind").append(new Option(`${kind} (${number})`, kind));
  for (const name of RANGES.keys()) for (const list of ["column", "sort"]) byId(list).append(new Option(name, name));
  for (const [view, items] of [["rejected", REJECTED], ["summary", SUMMARY]]) {
    const link = document.querySelector(`[data-view=${view}]`);
    link.hidden = items.length === 0;
    if (view === "rejected") link.append(` ${items.length}`);
  }
  byId("source").closest("label").hidden = sources.length === 0;
  for (const id of ["column", "sort"]) byId(id).closest("[role=group]").hidden = RANGES.size === 0;
  byId("views").hidden = REJECTED.length + SUMMARY.length === 0;
  listen();
  draw();
}

start();
