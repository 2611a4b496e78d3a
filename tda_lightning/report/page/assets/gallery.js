"use strict";
// The gallery of queries, and the ranking of training samples.
const PAGE = 20;
const gallery = { shown: [], chosen: null };
const ranking = { rows: [], key: "value", descending: true, start: 0, chosen: null };

const sampleOf = (id) => data.samples[id] ?? {};
const words = (text) => new Set(fold(text).match(/[\p{L}\p{N}]{3,}/gu) ?? []);
// Words in more than a tenth of the texts, such as articles, are not marked.
const texts = Object.values(data.samples).flatMap((sample) => (sample.text ? [words(sample.text)] : []));
const counts = new Map();
for (const set of texts) for (const word of set) counts.set(word, (counts.get(word) ?? 0) + 1);
const telling = (text) => new Set([...words(text)].filter((word) => (counts.get(word) ?? 0) <= Math.max(3, texts.length / 10)));
const hasRows = data.queries.some((query) => query.row);
const hasText = data.queries.some((query) => query.text);

// Text in which the words of another text are marked.
function marked(text, others, className) {
  const node = make("span", { class: className, dir: "auto" });
  for (const part of text.split(/([\p{L}\p{N}]+)/u)) {
    node.append(others.has(fold(part)) ? make("mark", {}, part) : part);
  }
  return node;
}

// The samples that belong to the most unusual twentieth of the training set.
const unusual = new Set(data.ranking.ids.slice(0, Math.ceil(data.ranking.ids.length / 20)));
const flagged = new Set(data.flagged);
const flagOf = (id) => (flagged.has(id) ? "suspicious" : unusual.has(id) ? "unusual" : "");

function tile(query) {
  const name = query.label || (query.image || query.text ? `${query.id}` : "");
  const mark = query.known ? (query.wrong ? "✗ " : "✓ ") : "";
  const outcome = query.known ? (query.wrong ? ", answered wrong" : ", answered right") : "";
  const excerpt = query.text ? make("span", {}, user(query.text.slice(0, 60))) : null;
  const button = make("button", {
    type: "button",
    class: `tile${query.wrong ? " wrong" : ""}`,
    "aria-pressed": String(query === gallery.chosen),
    "aria-label": `Query ${query.id}, ${query.label ?? ""}${outcome}`,
    "data-query": query.id,
    onclick: () => choose(query),
  }, picture(query, "") ?? excerpt ?? `#${query.id}`, make("span", { class: "name" }, mark, user(name)));
  return button;
}

function card(query, [id, score], others) {
  const sample = sampleOf(id);
  const flag = flagOf(id) ? make("span", { class: "flag" }, flagOf(id)) : null;
  const label = make("span", { class: "label" }, user(sample.label ?? ""), flag);
  const text = sample.text ? marked(sample.text, others, "text") : null;
  return make("li", { class: "card" },
    picture(sample, `Training sample ${id}${sample.label ? `, labelled ${sample.label}` : ""}`),
    label, text,
    sample.note ? user(sample.note, "note") : null,
    make("span", { class: "number" }, `#${id} `, make("span", { class: "score" }, signed(score))));
}

function side(query, name) {
  const items = query[name];
  const helped = name === "helped";
  const title = helped ? "Helped" : "Harmed";
  const goal = query.label ? `“${query.label}”` : "the right answer";
  const sentence = helped
    ? ["These training samples pushed the model toward ", user(goal), "."]
    : query.wrong
      ? ["These training samples pushed the model away from ", user(goal), ", toward its wrong answer ", user(`“${query.answer}”`), "."]
      : ["These training samples pushed the model away from ", user(goal), "."];
  const others = query.text ? telling(query.text) : new Set();
  const list = make("ul", { class: `cards${hasText ? " wide" : ""}` }, ...items.map((item) => card(query, item, others)));
  return make("div", { class: `side ${name}` }, make("h4", {}, title), make("p", {}, ...sentence),
    items.length ? list : make("p", {}, "None."));
}

// Columns in which the query differs most from the other rows come first.
function columnOrder(query, rows) {
  const spread = query.row.map(([, value], column) => {
    const values = rows.map((row) => Number(row[column]?.[1])).filter(Number.isFinite);
    const mean = values.reduce((sum, v) => sum + v, 0) / values.length;
    const deviation = Math.sqrt(values.reduce((sum, v) => sum + (v - mean) ** 2, 0) / values.length);
    return Math.abs(Number(value) - mean) / (deviation || 1) || 0;
  });
  return spread.map((_, column) => column).sort((a, b) => spread[b] - spread[a]);
}

function rowTable(query) {
  const items = [...query.helped.map((item) => ["helped", ...item]), ...query.harmed.map((item) => ["harmed", ...item])];
  const order = columnOrder(query, items.map((item) => sampleOf(item[1]).row ?? []));
  const cells = (row) => order.map((column) => {
    const value = row?.[column]?.[1];
    return make("td", {}, typeof value === "number" ? number(value) : user(value ?? ""));
  });
  const heads = ["", "label", "score"].map((text) => make("th", { scope: "col" }, text));
  const columns = order.map((column) => make("th", { scope: "col" }, user(query.row[column][0])));
  const first = make("tr", { class: "query-row" }, make("th", { scope: "row" }, "query"),
    make("td", {}, user(query.label ?? "")), make("td", {}, ""), ...cells(query.row));
  const rows = items.map(([name, id, score]) => make("tr", { class: name },
    make("th", { scope: "row" }, `#${id} ${name}`), make("td", {}, user(sampleOf(id).label ?? "")),
    make("td", { class: "score" }, signed(score)), ...cells(sampleOf(id).row)));
  const table = make("table", { class: "rows" },
    make("caption", {}, make("span", {},
      "Blue rows helped, red rows harmed. The columns in which the query stands out come first.")),
    make("thead", {}, make("tr", {}, ...heads, ...columns)), make("tbody", {}, first, ...rows));
  return make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Table rows" }, table);
}

function verdict(query) {
  const sure = query.confidence ? ` (${Math.round(100 * query.confidence)} % sure)` : "";
  if (!query.answer) return make("p", {}, query.label ? "Its label is " : "", user(query.label ?? ""));
  if (query.wrong) {
    return make("p", {}, "The model answered ", make("strong", {}, user(query.answer)), sure,
      ". The label is ", make("strong", {}, user(query.label)), ".");
  }
  return make("p", {}, "The model answered ", make("strong", {}, user(query.answer)), sure,
    query.known ? ", like the label." : `. The label is ${query.label ?? "unknown"}.`);
}

const agreementOf = (query) => (query.agreement == null ? "" : ` Rank correlation of both methods for this query: ${number(query.agreement)}.`);

function choose(query) {
  gallery.chosen = query;
  for (const button of byId("query-strip").children) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.query) === query.id));
  }
  const heading = make("h3", {}, `Query ${query.id}${query.wrong ? ": answered wrong" : query.known ? ": answered right" : ""}`);
  const facts = make("div", {}, heading, verdict(query), make("p", { class: "small" }, `Loss ${number(query.loss)}.${agreementOf(query)}`),
    query.note ? make("p", {}, user(query.note)) : null,
    query.text ? make("p", { class: "fulltext", dir: "auto", tabindex: "0" }, query.text) : null);
  const content = hasRows && query.row ? rowTable(query) : make("div", { class: "sides" }, side(query, "helped"), side(query, "harmed"));
  byId("query-detail").replaceChildren(make("div", { class: "query" }, picture(query, `Query ${query.id}`), facts), content);
  showTrajectory(data.queries.indexOf(query));
}

function showQueries() {
  const kind = byId("query-filter").value;
  const search = fold(byId("query-search").value.trim());
  const text = (query) => fold([query.id, query.label, query.answer, query.text, query.note].join(" "));
  gallery.shown = data.queries.filter((query) =>
    (kind === "all" || (query.known && query.wrong === (kind === "wrong"))) && text(query).includes(search));
  const sort = byId("query-sort").value;
  if (sort === "id") gallery.shown.sort((a, b) => a.id - b.id);
  if (sort === "label") gallery.shown.sort((a, b) => fold(a.label).localeCompare(fold(b.label), undefined, { numeric: true }) || a.id - b.id);
  byId("query-strip").replaceChildren(...gallery.shown.map(tile));
  byId("query-count").textContent = `${gallery.shown.length} of ${data.queries.length} queries`;
  if (gallery.shown.length && !gallery.shown.includes(gallery.chosen)) choose(gallery.shown[0]);
}

byId("query-strip").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const tiles = Array.from(byId("query-strip").children);
  const next = tiles[tiles.indexOf(document.activeElement) + step];
  if (!step || !next) return;
  event.preventDefault();
  next.focus();
  next.click();
});
for (const name of ["query-filter", "query-sort"]) byId(name).addEventListener("change", showQueries);
byId("query-search").addEventListener("input", showQueries);
byId("query-export").addEventListener("click", () => download("queries.csv", queryRows()));

function queryRows() {
  const rows = [["query", "label", "answer", "loss", "effect", "rank", "train", "train_label", "score"]];
  for (const query of gallery.shown) {
    for (const name of ["helped", "harmed"]) {
      query[name].forEach(([id, score], rank) => rows.push(
        [query.id, query.label ?? "", query.answer, query.loss, name, rank, id, sampleOf(id).label ?? "", score]));
    }
  }
  return rows;
}

// The ranking
const everyone = data.ranking.ids.map((id, place) => ({
  id, place, value: data.ranking.values[place], label: data.ranking.names[data.ranking.labels[place]],
}));

function showRanking() {
  const search = fold(byId("rank-search").value.trim());
  const label = byId("rank-label").value;
  const text = (row) => fold(`${row.id} ${row.label} ${sampleOf(row.id).text ?? ""}`);
  ranking.rows = everyone.filter((row) => (label === "" || row.label === data.ranking.names[label]) && text(row).includes(search));
  const compare = {
    id: (a, b) => a.id - b.id,
    value: (a, b) => (a.value ?? -Infinity) - (b.value ?? -Infinity),
    label: (a, b) => a.label.localeCompare(b.label, undefined, { numeric: true }) || b.value - a.value,
  }[ranking.key];
  ranking.rows.sort((a, b) => (ranking.descending ? compare(b, a) : compare(a, b)));
  showRankingPage(0);
}

function showRankingPage(start) {
  ranking.start = Math.max(0, Math.min(start, ranking.rows.length - 1));
  ranking.start -= ranking.start % PAGE;
  const rows = ranking.rows.slice(ranking.start, ranking.start + PAGE);
  byId("ranking").tBodies[0].replaceChildren(...rows.map(rankingRow));
  for (const head of document.querySelectorAll("#ranking th[data-key]")) {
    head.setAttribute("aria-sort", head.dataset.key !== ranking.key ? "none" : ranking.descending ? "descending" : "ascending");
  }
  const end = ranking.start + rows.length;
  byId("rank-place").textContent = rows.length ? `${ranking.start + 1} to ${end} of ${ranking.rows.length}` : "No training sample matches.";
  byId("rank-previous").disabled = ranking.start === 0;
  byId("rank-next").disabled = end >= ranking.rows.length;
}

const excerpt = (row) => (row ? inShort(row, 3) : "–");

function rankingRow(row) {
  const sample = sampleOf(row.id);
  const first = picture(sample, `Training sample ${row.id}`)
    ?? make("span", { class: "text", dir: "auto" }, sample.text ?? sample.note ?? excerpt(sample.row));
  return make("tr", { class: row.id === ranking.chosen ? "chosen" : false, "data-sample": row.id },
    make("td", {}, first), make("td", {}, String(row.id)), make("td", {}, user(row.label)), make("td", {}, number(row.value, alignedNumber)));
}

function findInRanking(id) {
  ranking.chosen = id;
  byId("rank-search").value = byId("rank-label").value = "";
  showRanking();
  showRankingPage(ranking.rows.findIndex((row) => row.id === id));
  const row = document.querySelector(`#ranking tr[data-sample="${id}"]`);
  row.scrollIntoView({ block: "center" });
  row.tabIndex = -1;
  row.focus({ preventScroll: true });
}

for (const head of document.querySelectorAll("#ranking th[data-key]")) {
  head.firstElementChild.addEventListener("click", () => {
    ranking.descending = ranking.key === head.dataset.key ? !ranking.descending : head.dataset.key === "value";
    ranking.key = head.dataset.key;
    showRanking();
  });
}
byId("rank-search").addEventListener("input", showRanking);
byId("rank-label").addEventListener("change", showRanking);
byId("rank-previous").addEventListener("click", () => showRankingPage(ranking.start - PAGE));
byId("rank-next").addEventListener("click", () => showRankingPage(ranking.start + PAGE));
byId("rank-export").addEventListener("click", () => download("self_influence.csv",
  [["train", "label", "self_influence"], ...ranking.rows.map((row) => [row.id, row.label, row.value])]));
const named = data.ranking.names.map((name, index) => [name, index]).filter(([name]) => name !== "");
if (named.length > 1 && named.length <= 200) {
  named.sort((a, b) => a[0].localeCompare(b[0], undefined, { numeric: true }));
  byId("rank-label").append(...named.map(([name, index]) => make("option", { value: index }, name)));
} else byId("rank-label").parentElement.hidden = true;
byId("query-filter").parentElement.hidden = !data.queries.some((query) => query.known);

showQueries();
showRanking();
