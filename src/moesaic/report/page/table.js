/* The table of results. */

/** A time whose whole interval lies below the ideal one: an error to explain, most likely a slow dense arm. */
const beatsIdeal = (point) => !missing(point.ideal) && !missing(point.high) && point.high < point.ideal;

/** Columns of the table: heading, value to sort by, text, and small print. */
function columns() {
  const { quality } = chosen();
  const others = data.qualities.filter((other) => other !== quality);
  const qualityColumn = (one) => ({
    key: one.name, head: one.label.replace(/ (?=\S+$)/, "\n"), value: (point) => point.quality[one.name]?.value,
    text: (point) => written(point.quality[one.name]?.value, one),
    small: (point) => range(point.quality[one.name]?.low, point.quality[one.name]?.high, (v) => written(v, one)),
  });
  const plain = (key, head, write) => ({ key, head, value: (point) => point[key], text: (point) => write(point[key]) });
  return [
    { key: "label", head: "method", words: true, value: (point) => point.label, text: (point) => point.label },
    { key: "budget", head: "budget", value: (point) => point.budget_value, text: (point) => point.budget },
    plain("active", "active\nFFN", percent),
    { key: "front", head: "front", value: (point) => Number(point.quality[quality.name]?.on_front || 0),
      text: (point) => (point.quality[quality.name]?.on_front ? "● yes" : missing(point.ratio) ? "—" : "no"),
      style: (point) => (point.quality[quality.name]?.on_front ? "onfront" : "") },
    qualityColumn(quality),
    { key: "ratio", head: "time /\ndense", value: (point) => point.ratio, text: (point) => times(point.ratio),
      small: (point) => range(point.low, point.high, times) },
    plain("ideal", "ideal\nratio", times),
    { key: "captured", head: "captured\nshare", value: (point) => point.captured, text: (point) => percent(point.captured),
      small: (point) => (beatsIdeal(point) ? "beats the ideal" : "") },
    plain("all_blocks", "all blocks\non", times),
    plain("flops", "FLOPs /\ndense", times),
    plain("sparse_ms", "sparse\nms", (value) => number(value, 3)),
    plain("dense_ms", "dense\nms", (value) => number(value, 3)),
    ...others.map(qualityColumn),
    { key: "executor", head: "executor", words: true, value: (point) => point.executor || "", text: (point) => point.executor || "—" },
    plain("seeds", "seeds", String),
  ];
}

function drawTable() {
  const shown = columns();
  const rows = listed().filter((point) => !hidden.has(point.label));
  const by = shown.find((column) => column.key === sorting.key);
  if (by) rows.sort((a, b) => compare(by.value(a), by.value(b), sorting.descending));
  const table = $("points");
  const focused = document.activeElement?.dataset?.key;
  table.replaceChildren(tableHead(shown), tableBody(shown, rows));
  if (focused) table.querySelector(`button[data-key="${CSS.escape(focused)}"]`)?.focus();
}

function compare(a, b, descending) {
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const order = typeof a === "string" ? a.localeCompare(b) : a - b;
  return descending ? -order : order;
}

function tableHead(shown) {
  const head = document.createElement("thead");
  const row = head.insertRow();
  for (const column of shown) {
    const cell = document.createElement("th");
    cell.scope = "col";
    if (column.words) cell.className = "text";
    cell.setAttribute("aria-sort", sorting.key !== column.key ? "none" : sorting.descending ? "descending" : "ascending");
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.key = column.key;
    button.textContent = column.head;
    button.addEventListener("click", () => {
      sorting = { key: column.key, descending: sorting.key === column.key && !sorting.descending };
      drawTable();
    });
    cell.append(button);
    row.append(cell);
  }
  return head;
}

function tableBody(shown, rows) {
  const body = document.createElement("tbody");
  for (const point of rows) {
    const row = body.insertRow();
    for (const column of shown) {
      const cell = document.createElement(column.key === "label" ? "th" : "td");
      if (column.key === "label") cell.scope = "row";
      cell.textContent = column.text(point);
      cell.className = [column.words ? "text" : "", column.style?.(point) || "", cell.textContent === "—" ? "missing" : ""].join(" ").trim();
      const small = column.small?.(point);
      if (small) cell.append(Object.assign(document.createElement("small"), { textContent: small }));
      row.append(cell);
    }
  }
  return body;
}

start();
