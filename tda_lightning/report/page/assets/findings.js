"use strict";
// Pictures in the findings: training samples, and wrong answers beside the samples behind them.
const SHOWN_CASES = 6;

// A text of a few words, if there is no picture.
const summary = (item) => item.text || item.note || (item.row ? inShort(item.row, 2) : "");

function sampleTile(id) {
  const sample = sampleOf(id);
  const flag = flagged.has(id) ? ", suspicious label" : "";
  const image = picture(sample, "");
  const name = make("span", { class: "name" }, user(sample.label || `#${id}`));
  return make("button", {
    type: "button",
    class: `tile${flagged.has(id) ? " flagged" : ""}${image ? "" : " wide"}`,
    "aria-label": `Training sample ${id}, ${sample.label ?? ""}${flag}`,
    onclick: () => findInRanking(id),
  }, image ?? name, image ? name : make("span", { class: "excerpt" }, sample.label ? `#${id} ` : "", user(summary(sample).slice(0, 160))));
}

function goToQuery(query) {
  byId("query-filter").value = "all";
  byId("query-search").value = "";
  choose(query);
  showQueries();
  byId("query-detail").scrollIntoView({ block: "start" });
  byId("query-detail").focus({ preventScroll: true });
}

function fillCase(item) {
  const query = data.queries.find((candidate) => candidate.id === Number(item.dataset.query));
  const ids = item.dataset.samples.split(" ").filter(Boolean).map(Number);
  const outcome = query.answer
    ? make("span", {}, "answered ", make("strong", {}, user(query.answer)), ", is ", make("strong", {}, user(query.label ?? "unknown")))
    : make("span", {}, `Query ${query.id}`);
  const image = picture(query, "");
  const text = image ? null : make("span", { class: "excerpt" }, user(summary(query).slice(0, 160)));
  const button = make("button", { type: "button", class: "wrong-query", onclick: () => goToQuery(query) },
    image, make("span", { class: "outcome" }, make("span", { class: "number" }, `Query ${query.id}`), outcome, text));
  item.append(button, make("div", { class: `behind${image ? "" : " texts"}` }, ...ids.map(sampleTile)));
}

for (const list of document.querySelectorAll(".cases")) {
  const items = Array.from(list.children);
  items.forEach((item, place) => { if (place < SHOWN_CASES) fillCase(item); else item.remove(); });
  const wrong = data.queries.filter((query) => query.wrong).length;
  if (wrong > SHOWN_CASES && items.length > SHOWN_CASES) {
    list.after(make("button", {
      type: "button",
      class: "all-cases",
      onclick: () => {
        byId("query-filter").value = "wrong";
        showQueries();
        byId("queries").scrollIntoView();
        byId("query-filter").focus({ preventScroll: true });
      },
    }, `All ${wrong} wrong answers`));
  }
}
for (const strip of document.querySelectorAll(".strip")) strip.append(...strip.dataset.samples.split(" ").map(Number).map(sampleTile));
