// The charts of a report and their controls. What is drawn comes from the JSON in #data; text is only ever set as text.
"use strict";
window.report = (() => {
  const COLOURS = 8, DASHES = [[], [8, 4], [3, 3], [10, 3, 2, 3]];
  const HEIGHT = 230, FEW = 12, CROWD = 6;
  const $ = (id) => document.getElementById(id);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  let data = JSON.parse($("data").textContent);
  const hidden = new Set();
  const charts = new Map();
  let at = null; // the place on the axis that is read, null for the end
  let zoom = null; // [from, to], null for the whole

  const along = () => $("along").value;
  const unit = () => +$("unit").value;
  const unitName = () => $("unit").selectedOptions[0].textContent;
  const single = () => data.runs.length === 1;
  const crowded = () => data.runs.length - hidden.size > CROWD;

  function say(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const far = size !== 0 && (size >= 1e6 || size < 1e-3);
    return (far ? (+value.toPrecision(3)).toExponential() : String(+value.toPrecision(5))).replaceAll("-", "−").replace("e+", "e");
  }

  function short(name) { return name.length > 32 ? "…" + name.slice(-31) : name; }

  function place(x) {
    if (along() === "step") return `step ${Math.round(x).toLocaleString("en")}`;
    return x < 120 ? `${x.toFixed(1)} s` : x < 7200 ? `${(x / 60).toFixed(1)} min` : `${(x / 3600).toFixed(2)} h`;
  }

  // -- the numbers ---------------------------------------------------------------------------------------------------

  function smoothed(values, width) { // lines through 2 width + 1 points: their mean, and at an end the last whole window's line
    const half = Math.min(width, (values.length - 1) >> 1);
    return half < 1 ? values : values.map((_, i) => {
      const middle = Math.min(Math.max(i, half), values.length - 1 - half);
      let sum = 0, slope = 0, squares = 0;
      for (let j = -half; j <= half; j++) { sum += values[middle + j]; slope += j * values[middle + j]; squares += j * j; }
      return sum / (2 * half + 1) + (i - middle) * slope / squares;
    });
  }

  function curves(chart) {
    const width = +$("smooth").value, found = [];
    data.runs.forEach((run, number) => chart.series.forEach(([kind, key], place) => {
      const x = run[kind][along()], raw = run[kind][key], last = place === chart.series.length - 1;
      const factor = chart.scaled ? unit() : 1;
      const kept = raw.map((v, i) => v === null || x[i] === null || (chart.log && v <= 0) ? null : v * factor);
      const points = x.map((_, i) => i).filter((i) => kept[i] !== null);
      let values = points.map((i) => kept[i]);
      if (kind === "train" && key !== "learning_rate") values = smoothed(values, width);
      found.push({ number, kind, last, x: points.map((i) => x[i]), y: values });
    }));
    return found;
  }

  function appearance(curve, chart) {
    const thin = !curve.last, mix = single() && !thin && chart.series.length > 1;
    const colour = style(`--c${mix ? 1 : curve.number % COLOURS}`);
    return {
      stroke: thin ? colour + (single() ? "b0" : crowded() ? "30" : "66") : colour,
      width: thin ? 1 : crowded() ? 1.4 : 2,
      dash: DASHES[Math.floor(curve.number / COLOURS) % DASHES.length],
      points: { show: curve.kind === "checked" && !chart.stepped && !crowded() && curve.x.length <= 80, size: 5, fill: colour },
      paths: chart.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
      spanGaps: true,
      show: !hidden.has(curve.number),
    };
  }

  // -- the charts ----------------------------------------------------------------------------------------------------

  function heights(curves, chart) { // what is seen: early losses tower above the rest, and may leave the chart
    const seen = [];
    for (const curve of curves) {
      if (hidden.has(curve.number)) continue;
      curve.y.forEach((y, i) => { if (!zoom || (curve.x[i] >= zoom[0] && curve.x[i] <= zoom[1])) seen.push(y); });
    }
    if (!seen.length) return chart.log ? [0.1, 1] : [0, 1];
    seen.sort((a, b) => a - b);
    const low = seen[0], high = seen[chart.id === "likelihood" ? Math.floor(0.97 * (seen.length - 1)) : seen.length - 1];
    if (chart.log) return high < 3 * low ? [low / 3, high * 3] : [low / 1.3, high * 1.3];
    if (low === high) return low > 0 ? [0, 1.5 * low] : [low - 1, low + 1];
    const margin = 0.08 * Math.max(high - low, 1e-3 * Math.abs(high), 1e-12);
    return [low >= 0 && low < 0.3 * high ? 0 : low - margin, high + margin];
  }

  function axis() {
    return {
      stroke: style("--soft"), grid: { stroke: style("--grid"), width: 1 }, ticks: { stroke: style("--grid"), width: 1 },
      font: "12px system-ui, sans-serif",
    };
  }

  function ticks(u, values) { return values.map((v) => (v === null ? "" : say(v))); }

  function decades(u, axis, low, high) { // the ticks of a logarithmic axis (uPlot's own need limits that are round)
    const wide = Math.log10(high / low), steps = wide > 5 ? [1] : wide > 1.6 ? [1, 3] : [1, 2, 5], found = [];
    const every = Math.max(1, Math.ceil(wide / 6));
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const step of power % every ? [] : steps) {
        const tick = step * 10 ** power;
        if (tick >= low && tick <= high) found.push(tick);
      }
    }
    return found.length ? found : [low, high];
  }

  function draw(chart) {
    const where = document.querySelector(`[data-chart="${chart.id}"]`), found = curves(chart);
    const old = charts.get(chart.id);
    if (old) old.plot.destroy();
    charts.delete(chart.id);
    where.replaceChildren();
    const filled = found.filter((curve) => curve.x.length);
    where.classList.toggle("empty", !filled.length);
    if (!filled.length) { where.textContent = "No values yet."; return; }
    const joined = uPlot.join(filled.map((curve) => [curve.x, curve.y]));
    const record = { chart, curves: filled };
    const options = {
      width: Math.max(200, where.clientWidth), height: HEIGHT, legend: { show: false },
      cursor: { y: false, points: { show: false }, drag: { x: true, y: false, setScale: true } },
      scales: { x: { time: false, range: () => zoom || whole() }, y: { distr: chart.log ? 3 : 1, range: () => heights(filled, chart) } },
      axes: [
        { ...axis(), size: 30, values: (u, v) => v.map((x) => (along() === "step" ? x.toLocaleString("en") : place(x))) },
        { ...axis(), size: 62, values: ticks, ...(chart.log ? { splits: decades, filter: (u, splits) => splits } : {}) },
      ],
      series: [{}, ...filled.map((curve) => appearance(curve, chart))],
      hooks: {
        setCursor: [(u) => { if (u.cursor.left >= 0 && u.over.matches(":hover")) read(u.posToVal(u.cursor.left, "x"), u); }],
        setSelect: [(u) => { if (u.select.width > 5) zoomTo(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")); }],
      },
    };
    record.plot = new uPlot(options, joined, where);
    record.plot.over.addEventListener("dblclick", () => zoomTo(null));
    charts.set(chart.id, record);
    where.setAttribute("aria-label", spoken(chart, filled));
  }

  function spoken(chart, found) {
    const named = found.filter((curve) => curve.last).slice(0, 6).map((curve) => {
      const y = curve.y;
      return `${single() ? "" : data.runs[curve.number].name + " "}from ${say(y[0])} to ${say(y[y.length - 1])}`;
    });
    return `${title(chart)}: ${named.join("; ")}. The numbers are in the table below.`;
  }

  function title(chart) { return chart.title.replace("{unit}", unitName()); }

  function whole() {
    let low = Infinity, high = -Infinity;
    for (const run of data.runs) for (const kind of ["train", "checked"]) for (const x of run[kind][along()]) {
      if (x !== null) { low = Math.min(low, x); high = Math.max(high, x); }
    }
    return low < high ? [low, high] : low === high ? [low - 1, low + 1] : [0, 1];
  }

  function drawAll() {
    for (const chart of data.charts) {
      const named = document.querySelector(`[data-title="${chart.id}"]`);
      if (named) named.textContent = title(chart);
      draw(chart);
    }
    read(at);
  }

  function zoomTo(from, to) {
    const [low, high] = whole();
    zoom = from === null ? null : [Math.max(low, from), Math.min(high, to)];
    if (zoom && (zoom[1] - zoom[0] >= high - low || !(zoom[1] > zoom[0]))) zoom = null;
    for (const { plot } of charts.values()) { plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false); plot.setData(plot.data, true); }
    read(at);
  }

  function zoomBy(factor) {
    const [low, high] = zoom || whole(), centre = Math.min(high, Math.max(low, at ?? high)), half = ((high - low) * factor) / 2;
    const start = Math.max(whole()[0], Math.min(centre - half, whole()[1] - 2 * half));
    zoomTo(start, start + 2 * half);
  }

  // -- reading -------------------------------------------------------------------------------------------------------

  function valueAt(curve, x) { // at x, or at the last point before it
    let low = 0, high = curve.x.length;
    while (low < high) { const middle = (low + high) >> 1; if (curve.x[middle] <= x) low = middle + 1; else high = middle; }
    return low ? curve.y[low - 1] : null;
  }

  function read(x, source) {
    const [low, high] = zoom || whole();
    at = x;
    const here = Math.min(high, Math.max(low, x ?? high)), slider = $("at");
    slider.value = Math.round((1000 * (here - low)) / (high - low));
    slider.setAttribute("aria-valuetext", place(here));
    $("at-value").textContent = place(here);
    for (const { chart, curves: found, plot } of charts.values()) {
      if (plot !== source) plot.setCursor(x === null ? { left: -10, top: -10 } : { left: plot.valToPos(here, "x"), top: 5 }, false);
      const shown = found.filter((curve) => !hidden.has(curve.number) && (curve.last || !crowded()));
      const items = shown.slice(0, FEW).map((curve) => item(curve, chart, valueAt(curve, here)));
      if (shown.length > FEW) items.push(document.createTextNode(`and ${shown.length - FEW} more, in the table`));
      document.querySelector(`[data-readout="${chart.id}"]`).replaceChildren(...items);
    }
  }

  function item(curve, chart, value) {
    const span = document.createElement("span"), svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const colour = single() && curve.last && chart.series.length > 1 ? 1 : curve.number % COLOURS;
    svg.setAttribute("class", `swatch c${colour} d${Math.floor(curve.number / COLOURS) % 4}`);
    svg.setAttribute("viewBox", "0 0 32 12");
    svg.setAttribute("aria-hidden", "true");
    for (const [key, given] of Object.entries({ x1: 1, x2: 31, y1: 6, y2: 6 })) line.setAttribute(key, given);
    if (!curve.last) line.setAttribute("opacity", "0.5");
    svg.append(line);
    const two = chart.series.length > 1, kind = curve.kind === "train" ? "training" : "validation";
    const name = single() ? (two ? kind : "") : short(data.runs[curve.number].name) + (two ? `, ${kind}` : "");
    span.append(svg, `${name} ${say(value)}`);
    return span;
  }

  // -- controls ------------------------------------------------------------------------------------------------------

  function boxes() {
    for (const box of all("[data-run]")) {
      box.checked = !hidden.has(+box.dataset.run);
      box.onchange = () => {
        if (box.checked) hidden.delete(+box.dataset.run); else hidden.add(+box.dataset.run);
        drawAll();
      };
    }
  }

  const actions = {
    in: () => zoomBy(0.5), out: () => zoomBy(2), reset: () => zoomTo(null),
    all: () => { hidden.clear(); boxes(); drawAll(); },
    none: () => { data.runs.forEach((_, i) => hidden.add(i)); boxes(); drawAll(); },
  };
  for (const button of all("[data-do]")) button.addEventListener("click", actions[button.dataset.do]);
  $("along").addEventListener("change", () => { zoom = at = null; drawAll(); });
  $("unit").addEventListener("change", drawAll);
  $("smooth").addEventListener("input", drawAll);
  $("at").addEventListener("input", (event) => {
    const [low, high] = zoom || whole();
    read(low + ((high - low) * event.target.value) / 1000);
  });
  $("more").addEventListener("toggle", drawAll);

  // The size of the window, its colours, and paper.
  let waiting = 0;
  new ResizeObserver(() => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => {
      for (const { plot } of charts.values()) {
        const width = plot.root.parentNode.clientWidth;
        if (width && width !== plot.width) plot.setSize({ width: Math.max(200, width), height: HEIGHT });
      }
    });
  }).observe(document.querySelector("main"));
  const redrawn = [drawAll];
  const redraw = () => redrawn.forEach((f) => f());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let opened = [];
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printing");
    opened = all("details:not([open])");
    opened.forEach((one) => { one.open = true; });
    redraw();
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    opened.forEach((one) => { one.open = false; });
    redraw();
  });

  boxes();
  drawAll();
  return {
    get data() { return data; },
    charts, style,
    onRedraw: (f) => redrawn.push(f),
    update(fresh) { data = fresh; boxes(); redraw(); },
  };
})();
