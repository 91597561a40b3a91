/* The figures: fronts, quality against active share, and the gap ladder. */

function axis(title, extra = {}) {
  return {
    title: { text: title, standoff: 12 }, gridcolor: color("--grid"), linecolor: color("--line"), zeroline: false,
    automargin: true, tickfont: { color: color("--quiet") }, ...extra,
  };
}

function layout(extra) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, color: color("--ink"), size: 13 },
    hoverlabel: { bgcolor: color("--raised"), bordercolor: color("--line"), font: { color: color("--ink"), size: 12.5 }, align: "left" },
    margin: { l: narrow() ? 44 : 58, r: 14, t: 12, b: 48 }, dragmode: false, ...extra,
  };
}

function hover(point, quality) {
  const value = point.quality[quality.name];
  const write = (v) => written(v, quality);
  const lines = [`<b>${point.label}</b> ${point.budget === "—" ? "" : point.budget}`, `active FFN ${percent(point.active)}`];
  lines.push(`${quality.label} ${write(value.value)} ${range(value.low, value.high, write)}`);
  if (point.dense) lines.push("time: the dense arm itself, ratio 1 by definition");
  else {
    lines.push(`time / dense ${times(point.ratio)} ${range(point.low, point.high, times)} (${(1 / point.ratio).toFixed(2)}× as fast)`);
    lines.push(`ideal ${times(point.ideal)}, captured ${percent(point.captured)}`);
    if (!missing(point.sparse_ms)) lines.push(`${number(point.sparse_ms, 3)} ms, dense ${number(point.dense_ms, 3)} ms`);
    if (!missing(point.all_blocks)) lines.push(`all blocks on ${times(point.all_blocks)}`);
    if (point.executor) lines.push(`executor ${point.executor}`);
  }
  lines.push(`${point.seeds} seed${point.seeds === 1 ? "" : "s"}${point.over ? `, time interval over ${point.over}` : ""}`);
  lines.push(value.on_front ? "<b>on the front</b>" : "dominated");
  if (!missing(value.membership)) lines.push(`on the front in ${percent(value.membership)} of seed resamples`);
  return lines.join("<br>");
}

const byWidth = (points) => points.sort((a, b) => a.active - b.active);

function bars(values, lows, highs, tint) {
  const arms = (ends, sign) => values.map((value, i) => (missing(ends[i]) ? 0 : Math.max(0, sign * (ends[i] - value))));
  return { type: "data", symmetric: false, array: arms(highs, 1), arrayminus: arms(lows, -1), color: tint, thickness: 1.2, width: 0 };
}

function methodTrace(label, points, quality) {
  const style = data.styles[label];
  const tint = shade(style);
  const value = (point) => point.quality[quality.name];
  const x = points.map((point) => point.ratio);
  const y = points.map((point) => value(point).value);
  return {
    type: "scatter", mode: "lines+markers", name: label, x, y, text: points.map((point) => hover(point, quality)),
    hovertemplate: "%{text}<extra></extra>", line: { color: tint, width: 1 },
    marker: { color: tint, symbol: style.symbol, size: style.symbol === "star" ? 15 : 11, line: { color: color("--ground"), width: 1.2 } },
    error_x: bars(x, points.map((point) => point.low), points.map((point) => point.high), tint),
    error_y: bars(y, points.map((point) => value(point).low), points.map((point) => value(point).high), tint),
  };
}

function idealTraces(points, quality) {
  const routed = points.filter((point) => !missing(point.ideal));
  const y = (point) => point.quality[quality.name].value;
  return [{
    type: "scatter", mode: "lines", name: "to ideal", hoverinfo: "skip", line: { color: color("--quiet"), width: 1, dash: "dot" },
    x: routed.flatMap((point) => [point.ideal, point.ratio, null]), y: routed.flatMap((point) => [y(point), y(point), null]),
  }, {
    type: "scatter", mode: "markers", name: "ideal", x: routed.map((point) => point.ideal), y: routed.map(y),
    text: routed.map((point) => `${point.label} ${point.budget}: ideal ratio ${times(point.ideal)}`),
    hovertemplate: "%{text}<extra></extra>",
    marker: { symbol: "line-ns-open", size: 11, color: routed.map((point) => shade(data.styles[point.label])), line: { width: 2 } },
  }];
}

function frontTrace(points, quality) {
  const front = points.filter((point) => point.quality[quality.name].on_front)
    .sort((a, b) => a.ratio - b.ratio || b.quality[quality.name].value - a.quality[quality.name].value);
  return {
    type: "scatter", mode: "lines", name: "front", hoverinfo: "skip", line: { shape: "hv", width: 7, color: color("--front") },
    x: front.map((point) => point.ratio), y: front.map((point) => point.quality[quality.name].value),
  };
}

/** Where an axis begins and ends: all values, and their intervals up to a third of their span beyond. */
function visibleRange(values, ends, log) {
  const scale = (list) => list.filter((value) => !missing(value) && (!log || value > 0)).map((value) => (log ? Math.log10(value) : value));
  const [shown, reach] = [scale(values), scale(ends)];
  if (!shown.length) return {};
  const [low, high] = [Math.min(...shown), Math.max(...shown)];
  const span = high - low || Math.abs(high) / 10 || 1;
  const left = Math.max(Math.min(low, ...reach), low - span / 3) - 0.07 * span;
  return { range: [left, Math.min(Math.max(high, ...reach), high + span / 3) + 0.07 * span] };
}

function ratioAxis(points) {
  const values = points.flatMap((point) => [point.ratio, point.ideal]).concat(1);
  const title = narrow() ? "time / dense time (left is faster)" : "measured time / dense time (left is faster)";
  return axis(title, visibleRange(values, points.flatMap((point) => [point.low, point.high]), false));
}

function qualityAxis(points, quality) {
  const scores = points.map((point) => point.quality[quality.name]);
  const values = scores.map((score) => score.value);
  const log = !quality.percent && Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > 4;
  return axis(`${quality.label} (${quality.maximise ? "higher" : "lower"} is better)`, {
    type: log ? "log" : "linear", tickformat: quality.percent ? ".0%" : "", ...(log ? { dtick: "D2" } : {}),
    ...visibleRange(values, scores.flatMap((score) => [score.low, score.high]), log),
  });
}

function drawFront() {
  const { quality } = chosen();
  const all = candidates();
  const points = all.filter((point) => !hidden.has(point.label));
  const labels = [...new Set(points.map((point) => point.label))];
  const traces = [frontTrace(all, quality), ...($("ideal").checked ? idealTraces(points, quality) : []),
    ...labels.map((label) => methodTrace(label, byWidth(points.filter((point) => point.label === label)), quality))];
  $("front").hidden = !all.length;
  const dense = all.find((point) => point.method === "dense");
  const rule = { type: "line", line: { color: color("--quiet"), width: 1, dash: "dash" }, layer: "below" };
  const shapes = [{ ...rule, x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1 }];
  if (dense) {
    const level = dense.quality[quality.name].value;
    shapes.push({ ...rule, xref: "paper", x0: 0, x1: 1, y0: level, y1: level });
  }
  const look = layout({ shapes, xaxis: ratioAxis(points), yaxis: qualityAxis(points, quality) });
  noteFront(all, quality);
  if (!all.length) return Promise.resolve();
  return Plotly.react("front", traces, look, { responsive: true, displaylogo: false, displayModeBar: false });
}

function noteFront(points, quality) {
  const { cell } = chosen();
  if (!points.length) {
    $("front-note").textContent = data.cells.length ? "Nothing here has both this quality and a measured time."
      : "Nothing was timed. Quality against active FFN share is below.";
    return;
  }
  const volume = data.volumes.find((entry) => entry.cell === cell.id && entry.quality === quality.name);
  const text = [`${points.filter((point) => point.quality[quality.name].on_front).length} of ${points.length} points are on the front.`];
  if (volume && !missing(volume.value)) {
    text.push(`Hypervolume ${times(volume.value)}, dense alone ${times(volume.dense)} (${data.reference}).`);
  }
  text.push(`Timed on ${cell.machine}. Dashed: the dense model.`);
  $("front-note").textContent = text.join(" ");
}

/** Every point of the chosen model with the chosen quality and an active share, timed or not; each once. */
function sharePoints(points) {
  const { quality } = chosen();
  const model = data.models[$("setting").value];
  const fitting = points.filter((point) => point.model === model && point.quality[quality.name] && !missing(point.active));
  return [...new Map(fitting.map((point) => [point.key, point])).values()].filter((point) => !hidden.has(point.label));
}

function shareHover(point, quality, what) {
  const value = point.quality[quality.name];
  const write = (v) => written(v, quality);
  return [`<b>${point.label}</b> ${point.budget === "—" ? "" : point.budget}${what}`, `active FFN ${percent(point.active)}`,
    `${quality.label} ${write(value.value)} ${range(value.low, value.high, write)}`,
    `${point.seeds} seed${point.seeds === 1 ? "" : "s"}`].join("<br>");
}

function shareTraces(label, points, oracles, aside, quality) {
  const tint = shade(data.styles[label]);
  const symbol = data.styles[label].symbol;
  const score = (point) => point.quality[quality.name];
  const reference = points[0]?.method.startsWith("static_");
  const place = (list) => ({ x: list.map((point) => point.active + aside), y: list.map((point) => score(point).value) });
  return [{
    type: "scatter", mode: "lines+markers", name: label, ...place(points), text: points.map((point) => shareHover(point, quality, "")),
    hovertemplate: "%{text}<extra></extra>", line: { color: tint, width: reference ? 4 : 1 },
    marker: { color: tint, symbol, size: 10, line: { color: color("--ground"), width: 1.2 } },
    error_y: bars(points.map((point) => score(point).value), points.map((point) => score(point).low), points.map((point) => score(point).high), tint),
  }, {
    type: "scatter", mode: "markers", name: `${label} oracle`, ...place(oracles),
    text: oracles.map((point) => shareHover(point, quality, ", oracle routing, untrained")), hovertemplate: "%{text}<extra></extra>",
    marker: { color: tint, symbol: `${symbol}-open`, size: 9, line: { width: 1.5 } },
  }];
}

function drawShares() {
  const { quality } = chosen();
  const points = sharePoints(data.points);
  const sparse = points.filter((point) => !point.dense);
  const oracles = sharePoints(data.oracles);
  const labels = [...new Set(sparse.map((point) => point.label))];
  const aside = (index) => 0.0022 * (index - (labels.length - 1) / 2);
  const of = (list, label) => byWidth(list.filter((point) => point.label === label));
  const traces = labels.flatMap((label, i) => shareTraces(label, of(sparse, label), of(oracles, label), aside(i), quality));
  const shapes = points.filter((point) => point.dense).map((point) => ({
    type: "line", layer: "below", xref: "paper", x0: 0, x1: 1, y0: point.quality[quality.name].value, y1: point.quality[quality.name].value,
    line: { color: color("--quiet"), width: 1.3, dash: point.method === "dense" ? "solid" : "dash" },
  }));
  $("shares").hidden = !sparse.length;
  $("shares-note").textContent = sparse.length
    ? "Thick: the static slice. Hollow: each method's oracle, untrained; some may lie beyond the picture. Lines across: dense, and dashed dense_same_tokens. Methods at one share stand side by side."
    : "No sparse point has this quality.";
  if (!sparse.length) return Promise.resolve();
  const shares = visibleRange(sparse.map((point) => point.active), [], false);
  return Plotly.react("shares", traces, layout({
    shapes, xaxis: axis("active FFN share (left is sparser)", { tickformat: ".0%", ...shares }), yaxis: qualityAxis(points, quality),
  }), { responsive: true, displaylogo: false, displayModeBar: false });
}

function drawGaps() {
  const model = data.models[$("setting").value];
  const gaps = data.gaps.find((entry) => entry.model === model);
  $("gaps").hidden = $("rungs").hidden = !gaps;
  if (!gaps) return Promise.resolve();
  const names = gaps.rows.map((row) => (narrow() ? row.name.replace("  ", "<br>") : row.name));
  const beyond = (value) => !missing(gaps.limit) && (value - gaps.limit) * (gaps.limit - gaps.dense) > 0;
  const traces = data.rungs.map((rung) => {
    const kept = gaps.rows.map((row, i) => [row.values[rung.rung], names[i]]).filter(([value]) => !missing(value));
    return {
      type: "scatter", mode: "markers", name: rung.label, x: kept.map(([value]) => (beyond(value) ? gaps.limit : value)),
      y: kept.map(([, name]) => name), text: kept.map(([value]) => `${rung.label} ${number(value)}`),
      hovertemplate: "%{y}<br>%{text}<extra></extra>", cliponaxis: false,
      marker: { color: shade(rung), size: 12, line: { color: shade(rung), width: 2 },
        symbol: kept.map(([value]) => (beyond(value) ? (gaps.limit > gaps.dense ? "triangle-right" : "triangle-left") : rung.symbol)) },
    };
  });
  const rule = (level, dash) => ({ type: "line", yref: "paper", y0: 0, y1: 1, x0: level, x1: level, layer: "below", line: { color: color("--quiet"), width: 1.5, dash } });
  const shapes = [];
  if (!missing(gaps.dense)) shapes.push(rule(gaps.dense, "solid"));
  if (!missing(gaps.dense_same_tokens)) shapes.push(rule(gaps.dense_same_tokens, "dash"));
  const annotations = narrow() ? [] : gaps.rows.map((row, i) => outsideNote(row, names[i], beyond)).filter(Boolean);
  const height = 90 + (narrow() ? 46 : 34) * names.length;
  $("gaps").style.height = `${height}px`;
  return Plotly.react("gaps", traces, layout({
    shapes, height, annotations, ...(annotations.length ? { margin: { l: 58, r: 180, t: 12, b: 48 } } : {}), xaxis: axis(gaps.quality + (narrow() ? "" : ` (${gaps.maximise ? "right" : "left"} is better)`), gapRange(gaps, beyond)),
    yaxis: axis("", { autorange: "reversed", type: "category", categoryorder: "array", categoryarray: names, tickfont: { color: color("--ink") } }),
  }), { responsive: true, displaylogo: false, displayModeBar: false });
}

/** What lies beyond the axis, written in the margin of its row. */
function outsideNote(row, name, beyond) {
  const outside = data.rungs.filter((rung) => !missing(row.values[rung.rung]) && beyond(row.values[rung.rung]));
  return outside.length && {
    xref: "paper", x: 1, xanchor: "left", xshift: 6, y: name, showarrow: false, align: "left",
    font: { size: 11, color: color("--quiet") }, text: outside.map((rung) => `${rung.label} ${number(row.values[rung.rung], 3)}`).join("<br>"),
  };
}

/** An axis range that holds every mark and both dense lines, with room at the ends. */
function gapRange(gaps, beyond) {
  const values = gaps.rows.flatMap((row) => Object.values(row.values)).concat(gaps.dense, gaps.dense_same_tokens, gaps.limit);
  const inside = values.filter((value) => !missing(value) && !beyond(value));
  const [low, high] = [Math.min(...inside), Math.max(...inside)];
  const room = 0.04 * (high - low || 1);
  return { range: [low - room, high + room] };
}
