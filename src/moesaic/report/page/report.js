"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const GLYPHS = {
  star: "★", x: "✖", square: "■", "triangle-down": "▼", circle: "●", diamond: "◆", "triangle-up": "▲", pentagon: "⬟",
  hexagon: "⬢", "circle-open": "○", "diamond-open": "◇", "x-thin-open": "✕",
};
const hidden = new Set();
let sorting = { key: null, descending: false };

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = () => document.documentElement.dataset.theme === "dark";
const shade = (style) => (dark() ? style.dark : style.light);
const narrow = () => window.innerWidth < 640;
const missing = (value) => value === null || value === undefined;

function number(value, digits = 4) {
  if (missing(value)) return "—";
  if (value !== 0 && Math.abs(value) >= 1e6) return value.toExponential(2);
  const whole = Math.trunc(Math.abs(value)).toString().length;
  return value.toLocaleString("en", {
    minimumFractionDigits: Math.max(0, digits - whole), maximumFractionDigits: Math.max(0, digits - whole),
  });
}
const percent = (value) => (missing(value) ? "—" : `${+(100 * value).toFixed(1)} %`);
const times = (value) => (missing(value) ? "—" : value.toFixed(2));
const written = (value, quality) => (quality.percent ? percent(value) : number(value));
const range = (low, high, write) =>
  (missing(low) || missing(high) || write(low) === write(high) ? "" : `${write(low)} – ${write(high)}`);

function option(select, value, text) {
  const node = document.createElement("option");
  node.value = value;
  node.textContent = text;
  select.append(node);
}

function chosen() {
  return {
    setting: $("setting").value,
    cell: data.cells.find((cell) => String(cell.id) === $("cell").value) || null,
    quality: data.qualities.find((quality) => quality.name === $("quality").value),
  };
}

/** Timed points of the chosen cell. */
function candidates() {
  const { cell, quality } = chosen();
  return data.points.filter((point) => cell && point.cell === cell.id && point.quality[quality.name]);
}

/** Everything that the table lists: timed points, then those of the same model that were not timed here. */
function listed() {
  const { setting, cell } = chosen();
  const timed = data.points.filter((point) => cell && point.cell === cell.id);
  const seen = new Set(timed.map((point) => point.key));
  const model = data.models[setting];
  return timed.concat(data.points.filter((point) => point.cell === null && point.model === model && !seen.has(point.key)));
}

function swatch(glyph, tint) {
  const node = Object.assign(document.createElement("span"), { className: "swatch", textContent: glyph });
  node.setAttribute("aria-hidden", "true");
  node.style.color = tint;
  return node;
}

function drawLegends() {
  const model = data.models[$("setting").value];
  const labels = data.labels.filter((label) => data.points.some((point) => point.label === label && point.model === model));
  const entries = labels.map((label) => {
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: !hidden.has(label) });
    box.addEventListener("change", () => { hidden[box.checked ? "delete" : "add"](label); drawFront(); drawShares(); drawTable(); });
    const node = document.createElement("label");
    node.append(box, swatch(GLYPHS[data.styles[label].symbol], shade(data.styles[label])), label);
    return node;
  });
  const front = data.cells.length ? [entry("swatch line", "Pareto front")] : [];
  $("methods").replaceChildren($("methods").firstElementChild, ...entries, ...front);
  const rungs = data.rungs.map((rung) => {
    const node = Object.assign(document.createElement("span"), { className: "entry" });
    node.append(swatch(GLYPHS[rung.symbol], shade(rung)), rung.label);
    return node;
  });
  $("rungs").replaceChildren(...rungs, entry("swatch rule", "dense"), entry("swatch rule dashed", "dense_same_tokens"));
}

function entry(look, text) {
  const node = Object.assign(document.createElement("span"), { className: "entry" });
  node.append(Object.assign(document.createElement("span"), { className: look }), text);
  return node;
}

function fillCells() {
  const before = chosen().cell?.label;
  $("cell").replaceChildren();
  const cells = data.cells.filter((cell) => cell.setting === $("setting").value);
  for (const cell of cells) option($("cell"), cell.id, cell.label);
  const same = cells.find((cell) => cell.label === before);
  if (same) $("cell").value = same.id;
}

function draw() {
  drawLegends();
  drawTable();
  return Promise.all([drawFront(), drawShares(), drawGaps()]);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-pressed", String(theme === "dark"));
}

async function loadPlotly() {
  const bytes = Uint8Array.from(atob($("plotly").textContent), (letter) => letter.charCodeAt(0));
  const text = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const script = document.createElement("script");
  script.textContent = text;
  document.head.append(script);
}

async function start() {
  setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  for (const setting of data.settings) option($("setting"), setting, setting);
  for (const quality of data.qualities) option($("quality"), quality.name, quality.label);
  $("quality").value = data.quality;
  $("setting").parentElement.hidden = data.settings.length < 2;
  for (const id of ["cell", "ideal"]) $(id).parentElement.hidden = !data.cells.length;
  fillCells();
  $("setting").addEventListener("change", () => { fillCells(); draw(); });
  $("cell").addEventListener("change", () => { drawFront(); drawTable(); });
  $("quality").addEventListener("change", () => { drawFront(); drawShares(); drawTable(); });
  $("ideal").addEventListener("change", drawFront);
  $("theme").addEventListener("click", () => { setTheme(dark() ? "light" : "dark"); draw(); });
  await loadPlotly();
  await draw();
  document.body.dataset.ready = "1";
}
