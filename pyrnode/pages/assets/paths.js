// Particles in time: one slider moves those of all runs.
"use strict";
(() => {
  const slider = document.getElementById("time");
  if (!slider) return;
  const play = document.getElementById("play"), output = document.getElementById("time-value");
  const box = document.getElementById("drawn-particles");
  const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [220, 200, 40]]; // viridis
  const LIGHT = [[190, 140, 230], [120, 160, 240], [70, 200, 190], [130, 225, 120], [245, 230, 80]];
  let playing = 0;

  const dark = () => matchMedia("(prefers-color-scheme: dark)").matches && !document.documentElement.classList.contains("printing");

  function colour(share) {
    const ramp = dark() ? LIGHT : RAMP, place = share * (ramp.length - 1), i = Math.min(ramp.length - 2, Math.floor(place));
    return `rgb(${ramp[i].map((c, k) => Math.round(c + (ramp[i + 1][k] - c) * (place - i))).join(",")})`;
  }

  function ranks(start) { // particles that begin near one another have like colours
    const key = start.map((z) => (z.length > 1 ? Math.atan2(z[1], z[0]) : z[0]));
    const order = key.map((_, i) => i).sort((a, b) => key[a] - key[b]);
    const rank = [];
    order.forEach((particle, i) => { rank[particle] = i / Math.max(1, order.length - 1); });
    return rank;
  }

  function canvasOf(path) {
    const figure = document.createElement("figure"), canvas = document.createElement("canvas"), caption = document.createElement("figcaption");
    const name = report.data.runs[path.run].name;
    canvas.setAttribute("role", "img");
    canvas.dataset.paths = path.run;
    caption.textContent = name + (path.of > 2 ? `: the first two of ${path.of} coordinates` : "");
    figure.append(canvas, caption);
    box.append(figure);
    return canvas;
  }

  function draw(path, canvas, share) {
    const size = canvas.clientWidth, dots = devicePixelRatio || 1;
    if (!size) return;
    canvas.width = canvas.height = Math.round(size * dots);
    const c = canvas.getContext("2d");
    c.scale(dots, dots);
    const place = share * (path.times.length - 1), i = Math.min(path.times.length - 2, Math.floor(place)), part = place - i;
    const rank = ranks(path.z[0]), flat = path.z[0][0].length === 1;
    const reach = 1.06 * Math.max(2.6, ...path.z.flat(2).map(Math.abs)), middle = size / 2;
    const y = (v) => middle - (v / reach) * (middle - 4);
    const now = (n) => path.z[i][n].map((v, k) => v + (path.z[i + 1][n][k] - v) * part);
    const end = path.times[path.times.length - 1];
    const x = flat ? (t) => 8 + ((size - 16) * t) / end : (v) => middle + (v / reach) * (middle - 4);
    c.strokeStyle = report.style("--grid");
    if (flat) { c.beginPath(); c.moveTo(x(share * end), 0); c.lineTo(x(share * end), size); c.stroke(); }
    else for (const r of [1, 2]) { c.beginPath(); c.arc(middle, middle, (r / reach) * (middle - 4), 0, 7); c.stroke(); }
    path.z[0].forEach((_, n) => {
      const here = now(n);
      c.strokeStyle = c.fillStyle = colour(rank[n]);
      c.globalAlpha = 0.35;
      c.beginPath();
      for (let k = 0; k <= i; k++) { if (flat) c.lineTo(x(path.times[k]), y(path.z[k][n][0])); else c.lineTo(x(path.z[k][n][0]), y(path.z[k][n][1])); }
      if (flat) c.lineTo(x(share * end), y(here[0])); else c.lineTo(x(here[0]), y(here[1]));
      c.stroke();
      c.globalAlpha = 1;
      c.beginPath();
      if (flat) c.arc(x(share * end), y(here[0]), 2.6, 0, 7); else c.arc(x(here[0]), y(here[1]), 2.6, 0, 7);
      c.fill();
    });
  }

  function words(share, end) {
    const where = share === 0 ? ", the data" : share === 1 ? ", the base" : "";
    return `t = ${(share * end).toFixed(2)} of ${end.toFixed(2)}${where}`;
  }

  let canvases = [];
  function show() {
    const share = slider.value / slider.max, end = report.data.paths.length ? Math.max(...report.data.paths[0].times) : 1;
    slider.setAttribute("aria-valuetext", words(share, end));
    output.textContent = words(share, end);
    report.data.paths.forEach((path, n) => {
      draw(path, canvases[n], share);
      const about = `${path.z[0].length} particles of ${report.data.runs[path.run].name} at ${words(share, end)}`;
      canvases[n].setAttribute("aria-label", `${about}; the table has their spread`);
    });
  }

  function rebuild() {
    box.replaceChildren();
    canvases = report.data.paths.map(canvasOf);
    document.getElementById("time-controls").hidden = !canvases.length;
    show();
  }

  function stop() { cancelAnimationFrame(playing); playing = 0; play.textContent = "Play"; }

  play.addEventListener("click", () => {
    if (playing) { stop(); return; }
    if (+slider.value === +slider.max) slider.value = 0;
    play.textContent = "Pause";
    const begun = performance.now(), from = +slider.value;
    const frame = (now) => {
      slider.value = Math.min(+slider.max, from + ((now - begun) / 4000) * slider.max);
      show();
      if (+slider.value < +slider.max) playing = requestAnimationFrame(frame); else stop();
    };
    playing = requestAnimationFrame(frame);
  });
  slider.addEventListener("input", () => { stop(); show(); });
  new ResizeObserver(show).observe(box);
  report.onRedraw(rebuild);
  rebuild();
})();
