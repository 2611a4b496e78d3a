"use strict";
// Shared by the scripts of the page. Texts become text nodes only; nothing is parsed as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== false && value !== null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function user(text, className) {
  return make("bdi", className ? { class: className } : {}, String(text));
}

function picture(sample, description) {
  if (!sample || !sample.image) return null;
  const image = make("img", { src: sample.image, alt: description });
  image.addEventListener("load", () => {
    if (image.naturalWidth <= 36) image.classList.add("sharp");
  });
  return image;
}

const plainNumber = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const alignedNumber = new Intl.NumberFormat("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });

function number(value, format = plainNumber) {
  if (value === null || value === undefined) return "unknown";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-4 || size >= 1e7) ? value.toExponential(1) : format.format(value);
}
// Mean and standard deviation of each column over the table rows of the training samples.
let columnStatistics = null;
function statistics() {
  if (columnStatistics) return columnStatistics;
  const sums = [];
  for (const { row } of Object.values(data.samples)) {
    (row ?? []).forEach(([, value], column) => {
      const [n, sum, squares] = sums[column] ?? [0, 0, 0];
      if (Number.isFinite(value)) sums[column] = [n + 1, sum + value, squares + value * value];
    });
  }
  columnStatistics = sums.map(([n, sum, squares]) => [sum / n, Math.sqrt(Math.max(0, squares / n - (sum / n) ** 2))]);
  return columnStatistics;
}

// The columns in which a row differs most from the others.
function inShort(row, count) {
  const unusual = row.map(([, value], column) => {
    const [mean, deviation] = statistics()[column] ?? [0, 0];
    return Number.isFinite(value) && deviation ? Math.abs(value - mean) / deviation : 0;
  });
  const order = row.map((_, column) => column).sort((a, b) => unusual[b] - unusual[a]).slice(0, count);
  return order.map((column) => `${row[column][0]}: ${typeof row[column][1] === "number" ? number(row[column][1]) : row[column][1]}`).join(", ");
}

const signed = (value) => (value > 0 ? "+" : "") + number(value, alignedNumber);
const fold = (text) => String(text ?? "").toLowerCase();

// A cell that a spreadsheet could run as a formula is made a text; numbers stay numbers.
function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^[\s]*[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return `"${text.replaceAll('"', '""')}"`;
}
const csv = (rows) => "\ufeff" + rows.map((row) => row.map(csvCell).join(",")).join("\r\n") + "\r\n";

function download(name, rows) {
  const url = URL.createObjectURL(new Blob([csv(rows)], { type: "text/csv;charset=utf-8" }));
  const link = make("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// Charts
const plots = () => (window.Bokeh ? window.Bokeh.documents.flatMap((document) => document.roots()) : []);
const COLORS = {
  light: { helped: "#1b62a5", harmed: "#b3312a", plain: "#1b62a5", muted: "#6b7580", ink: "#59616a", grid: "#e3dfd7" },
  dark: { helped: "#8cc0f2", harmed: "#f6a29a", plain: "#8cc0f2", muted: "#a6adb5", ink: "#a6adb5", grid: "#30363c" },
};

const root = document.documentElement;
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
const theme = () => root.dataset.theme || (prefersDark.matches ? "dark" : "light");

function paintCharts() {
  const colors = COLORS[theme()];
  for (const plot of plots()) {
    for (const model of plot.references()) {
      const kind = model.type;
      if (/Axis$/.test(kind)) {
        model.axis_label_text_color = model.major_label_text_color = colors.ink;
        model.axis_line_color = model.major_tick_line_color = colors.ink;
      } else if (kind === "Grid" && model.grid_line_color) {
        model.grid_line_color = colors.grid;
      } else if (kind === "ColumnDataSource" && model.data.color) {
        const from = theme() === "dark" ? COLORS.light : COLORS.dark;
        const roles = new Map(["helped", "harmed", "muted"].map((role) => [from[role], colors[role]]));
        const swap = (color) => roles.get(color) ?? color;
        model.data = { ...model.data, color: Array.from(model.data.color, swap) };
      }
    }
  }
}

function showTrajectory(position) {
  const lines = data.trajectories[position];
  if (!lines) return;
  const colors = COLORS[theme()];
  for (const plot of plots()) {
    for (const model of plot.references()) {
      if (model.name === "trajectory-lines") {
        model.data = {
          xs: lines.map((line) => line[0]),
          ys: lines.map((line) => line[1]),
          color: lines.map((line) => colors[line[2]]),
          name: lines.map((line) => line[3]),
        };
      }
    }
  }
}

// Each chart is drawn when it comes near the view: drawing is most of the work of loading.
function drawCharts(afterwards) {
  const block = byId("charts");
  if (!block || !window.Bokeh) return;
  const waiting = new Map(Object.entries(JSON.parse(block.textContent)).map(([name, item]) => [`chart-${name}`, item]));
  const draw = async (id) => {
    const item = waiting.get(id);
    if (!item) return;
    waiting.delete(id);
    await window.Bokeh.embed.embed_item(item, id);
    paintCharts();
    afterwards();
  };
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) draw(entry.target.id);
  }, { rootMargin: "800px" });
  for (const id of waiting.keys()) near.observe(byId(id));
  window.addEventListener("beforeprint", () => Array.from(waiting.keys()).forEach(draw));
}

// Light and dark
function paintSwitch() {
  byId("theme").textContent = theme() === "dark" ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `Switch to the ${theme() === "dark" ? "light" : "dark"} page`);
}
byId("theme").hidden = false;
byId("theme").addEventListener("click", () => {
  root.dataset.theme = theme() === "dark" ? "light" : "dark";
  paintSwitch();
  paintCharts();
});
prefersDark.addEventListener("change", () => { paintSwitch(); paintCharts(); });
paintSwitch();

// The section in view
const links = new Map(Array.from(document.querySelectorAll("nav a"), (a) => [a.hash.slice(1), a]));
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(entry.target.id).setAttribute("aria-current", "true");
  }
}, { rootMargin: "-30% 0px -65% 0px" });
for (const section of document.querySelectorAll("main > section")) watcher.observe(section);
