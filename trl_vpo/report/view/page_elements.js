"use strict";
// What the page shows of one row, and its tables: records of the data -> elements. Data become text nodes and values of
// attributes that hold no code, never markup.

const byId = (id) => document.getElementById(id);

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function drawRow(pictures) {
  return (row) => {
    const urls = [...pictures(row)];
    const article = make("article", { tabindex: "-1", "aria-labelledby": `row-${row.n}` },
      make("h2", { id: `row-${row.n}` },
        make("a", { href: address({ row: String(row.n), page: "1" }), title: "Link to this row" }, `Row ${row.n}`),
        row.id === undefined ? null : make("span", {}, make("bdi", {}, row.id)),
        row.source === undefined ? null : make("span", { class: "soft" }, make("bdi", {}, row.source))));
    if (row.problems.length) article.append(make("ul", {}, ...row.problems.map((p) => make("li", { class: "error" }, p))));
    if (row.raw !== undefined) article.append(make("pre", { dir: "auto", tabindex: "0" }, row.raw));
    if (row.media?.length) article.append(make("div", { class: "media" }, ...row.media.map((group) => drawGroup(group, urls, row))));
    if (row.prompt) article.append(drawPrompt(row.prompt));
    if (row.chosen) {
      article.append(make("div", { class: "sides" }, drawSide(row, "chosen", "Chosen"), drawSide(row, "rejected", "Rejected"),
        ...(row.other_chosen ? [drawSide(row, "other_chosen", "Chosen for the other media")] : [])));
    }
    if (row.notes.length) article.append(make("ul", { class: "notes soft" }, ...row.notes.map((note) => make("li", {}, note))));
    const sided = row.chosen ? /^(chosen|rejected)_/ : /^$/;
    const rest = row.columns.filter(([name, value]) => !(sided.test(name) && typeof value === "number"));
    if (rest.length) article.append(drawFigures(rest));
    for (const [name, text] of row.more) {
      const glimpse = text.replace(/\s+/g, " ").slice(0, 80) + (text.length > 80 ? " …" : "");
      article.append(make("details", {}, make("summary", {}, make("b", {}, make("bdi", {}, name)), make("bdi", {}, glimpse)),
        make("pre", { dir: "auto", tabindex: "0" }, text)));
    }
    return article;
  };
}

function drawGroup(group, urls, row) {
  const caption = make("figcaption", {}, make("b", {}, group.title), " ", make("bdi", {}, group.what));
  if (group.error !== undefined) return make("figure", {}, caption, make("p", { class: "error" }, group.error));
  const count = group.pictures.length;
  const shots = group.pictures.map(([width, height, text], at) => ({
    url: urls.shift(), width, height, text,
    label: [`row ${row.n}`, group.title.toLowerCase(), count > 1 ? `${at + 1} of ${count}` : "", text].filter(Boolean).join(", "),
  }));
  const items = shots.map((shot, at) => {
    const image = make("img", { src: shot.url, alt: `Enlarge ${shot.label}`, width: shot.width, height: shot.height, decoding: "async" });
    const button = make("button", { type: "button" }, image);
    button.addEventListener("click", () => openViewer(shots, at));
    return make("li", {}, button, shot.text ? make("span", {}, shot.text) : null);
  });
  return make("figure", {}, caption, make("ol", { class: count > 1 ? "strip" : "strip single" }, ...items));
}

function drawPrompt(messages) {
  return make("section", { class: "prompt", "aria-label": "Prompt" }, ...messages.map(([role, parts]) =>
    make("div", {}, make("span", { class: "role" }, role),
      make("p", { class: "text", dir: "auto" }, ...parts.map((part) =>
        typeof part === "string" ? part : make("span", { class: "slot" }, `${part[0]} ${part[1]}`))))));
}

function drawSide(row, side, title) {
  const text = row[side].map((piece, at) => (at % 2 ? make("mark", { class: side }, piece) : piece));
  const figures = row.columns.filter(([name, value]) => name.startsWith(`${side}_`) && typeof value === "number");
  const messages = row[`${side}_messages`];
  return make("section", { class: `side ${side}` }, make("h3", {}, title), make("p", { class: "text", dir: "auto" }, ...text),
    messages === undefined ? null : make("pre", { dir: "auto", tabindex: "0" }, messages),
    figures.length ? drawFigures(figures.map(([name, value]) => [name.slice(side.length + 1), value])) : null);
}

function drawFigures(pairs) {
  return make("dl", {}, ...pairs.map(([name, value]) => make("div", {}, make("dt", {}, make("bdi", {}, name)),
    make("dd", { dir: "auto", title: typeof value === "number" ? String(value) : undefined }, figure(value)))));
}

// Four digits are enough to compare by; the full number is in the title.
function figure(value) {
  return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(4))) : String(value);
}

function kindTable() {
  const rows = KINDS.map(([kind, number]) => make("tr", {}, make("td", {}, make("bdi", {}, kind || "no kind given")),
    make("td", { class: "number" }, String(number)), make("td", { class: "number" }, `${((100 * number) / REJECTED.length).toFixed(1)} %`)));
  return make("table", {}, make("caption", {}, "Left out, by reason"), head("Reason", "Inputs", "Share"), make("tbody", {}, ...rows));
}

function rejectedTable(entries) {
  return make("table", {}, make("caption", {}, "Inputs"), head("Id", "Reason", "What happened"), make("tbody", {}, ...entries.map((entry) =>
    make("tr", {}, make("td", {}, make("bdi", {}, entry.id)), make("td", {}, make("bdi", {}, entry.kind)),
      make("td", { dir: "auto" }, entry.reason, entry.more
        ? make("details", {}, make("summary", {}, "Further fields"), make("pre", { dir: "auto", tabindex: "0" }, entry.more)) : null)))));
}

function summaryTable() {
  return make("table", { class: "figures" }, make("caption", {}, "Run summary"), head("Figure", "Value"), make("tbody", {}, ...SUMMARY.map(([name, value]) =>
    make("tr", {}, make("td", {}, make("bdi", {}, name)), make("td", { dir: "auto" }, String(value))))));
}

const head = (...names) => make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name))));

// --- enlarged pictures ----------------------------------------------------------------------------------------------

let viewed = { shots: [], at: 0 };

function openViewer(shots, at) {
  showPicture(shots, at);
  byId("viewer").showModal();
}

function showPicture(shots, at) {
  viewed = { shots, at };
  byId("viewer-image").src = shots[at].url;
  byId("viewer-image").alt = shots[at].label;
  byId("viewer-caption").textContent = shots[at].label;
  for (const button of document.querySelectorAll("[data-picture]")) {
    button.hidden = shots.length === 1;
    button.disabled = !shots[at + Number(button.dataset.picture)];
  }
}

function stepPicture(step) {
  if (viewed.shots[viewed.at + step]) showPicture(viewed.shots, viewed.at + step);
}
