"use strict";
const DATA = JSON.parse(document.getElementById("page-data").textContent);
const $ = id => document.getElementById(id);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const STD = 0.12, SAMPLES = 160, TRACED = 24, VIEW = 2.5; // blob width, dots, paths drawn, half the height of the plane

// --- the state, which the address holds -------------------------------------------------------

const circle = (n, r, kind) => Array.from({ length: n }, (_, i) => [r * Math.cos(2 * Math.PI * i / n), r * Math.sin(2 * Math.PI * i / n), kind(i)]);
const SETS = {
  "two classes": () => circle(6, 1.35, i => i % 2),
  "ring": () => circle(8, 1.4, i => i < 4 ? 0 : 1),
  "grid": () => [-1, 0, 1].flatMap(i => [-1, 0, 1].map(j => [1.2 * i, 1.2 * j, (i + j) & 1])),
  "moons": () => Array.from({ length: 18 }, (_, k) => { const a = Math.PI * (k >> 1) / 8, s = k & 1 ? -1 : 1; return [s * (1.2 * Math.cos(a) - 0.5), s * (1.2 * Math.sin(a) - 0.3), k & 1]; }),
  "one far away": () => [[-1, 0, 0], [-0.8, 0.35, 0], [-0.9, -0.35, 0], [1.9, 1.2, 1]],
};
const DEFAULTS = {
  data: "two classes", schedule: DATA.model?.schedule ?? "cosine", sampler: DATA.plugins[0] ?? "ddim", n: 6, w: 1,
  seed: 1, at: 0.62, show: "dfpt", digit: "any", cls: 0, nw: DATA.model?.guidance ?? 1, hide: "", blobs: "",
};
const S = { ...DEFAULTS };
let blobs = [], chosen = 0;

function read() {
  Object.assign(S, DEFAULTS);
  for (const part of location.hash.slice(1).split("&")) {
    const cut = part.indexOf("="), key = part.slice(0, cut);
    let value = part.slice(cut + 1);
    try { value = decodeURIComponent(value); } catch { continue; }
    if (!(key in DEFAULTS)) continue;
    if (typeof DEFAULTS[key] !== "number") S[key] = value;
    else if (value !== "" && Number.isFinite(+value)) S[key] = +value;
  }
  if (!SETS[S.data]) S.data = DEFAULTS.data;
  if (!DATA.tables[S.schedule]) S.schedule = DEFAULTS.schedule;
  S.w = Math.min(8, Math.max(0, S.w));
  S.at = Math.min(1, Math.max(0, S.at));
  S.seed = Math.max(0, Math.round(S.seed));
  if (!(S.digit === "any" || /^[0-9]$/.test(S.digit))) S.digit = "any";
  const given = S.blobs.split(";").map(p => p.split(",").map(Number)).filter(p => p.length === 3 && p.every(Number.isFinite));
  blobs = (given.length ? given.slice(0, 40).map(([x, y, c]) => [within(x, VIEW * 1.3), within(y, VIEW * 0.95), c ? 1 : 0]) : SETS[S.data]());
  chosen = 0;
  settle();
}

// Choose a sampler and a number of steps that the schedule has.
function settle() {
  const samplers = DATA.tables[S.schedule];
  if (!samplers[S.sampler]) S.sampler = Object.keys(samplers)[0];
  const have = Object.keys(samplers[S.sampler]).map(Number);
  if (!have.includes(S.n)) S.n = have.reduce((a, b) => Math.abs(b - S.n) < Math.abs(a - S.n) ? b : a);
}

function write() {
  const moved = JSON.stringify(blobs) !== JSON.stringify(SETS[S.data]());
  S.blobs = moved ? blobs.map(([x, y, c]) => `${+x.toFixed(2)},${+y.toFixed(2)},${c}`).join(";") : "";
  const parts = Object.keys(DEFAULTS).filter(k => S[k] !== DEFAULTS[k]).map(k => `${k}=${encodeURIComponent(k === "at" ? +S.at.toFixed(3) : S[k]).replace(/%2C/g, ",").replace(/%3B/g, ";").replace(/%20/g, "+")}`);
  const hash = parts.length ? "#" + parts.join("&").replace(/\+/g, "%20") : location.pathname;
  try { history.replaceState(null, "", hash); } catch { /* some viewers refuse it */ }
}
const within = (v, limit) => Math.min(limit, Math.max(-limit, v));

// --- computing ----------------------------------------------------------------------------------

const unpacked = new Map();
function table(schedule, sampler, n) {
  const key = `${schedule} ${sampler} ${n}`;
  if (!unpacked.has(key)) unpacked.set(key, Engine.table(DATA.tables[schedule][sampler][n]));
  return unpacked.get(key);
}

let R = null; // the run on the plane
function denoiser() {
  const means = new Float64Array(blobs.flatMap(([x, y]) => [x, y])), wanted = Uint8Array.from(blobs, b => b[2] ? 0 : 1);
  return Engine.mixture(means, 2, STD, wanted.some(v => v) ? wanted : null);
}

function compute() {
  const started = performance.now(), { one, many } = denoiser(), g = Engine.normal(S.seed);
  const z = Float64Array.from({ length: 2 * SAMPLES }, g), T = table(S.schedule, S.sampler, S.n);
  const { xs, x0s } = Engine.run(T, z, Engine.normal(S.seed + 7919), many(S.w));
  R = { T, z, one, many, xs, x0s, stops: stops(T), truth: null, error: null };
  R.positions = R.stops.map(i => position(T, i));
  timing.run = performance.now() - started;
}

// Indices of the samples at which λ grows: methods with stages revisit a level.
function stops(T) {
  const found = [];
  for (let i = 0; i <= T.n; i++) if (i === T.n || T.lam[i + 1] > T.lam[i] + 1e-6) found.push(i);
  return found;
}

// Place on the step axis, 0 to 1, which is even in log-SNR λ; clean is the right end.
const LOW = -5.2;
const high = T => Math.max(4.5, T.lam[T.n - 1] + 0.4);
const position = (T, i) => i === 0 ? 0 : i === T.n ? 1 : (Math.max(LOW, T.lam[i]) - LOW) / (high(T) - LOW);
const first = T => (Math.max(LOW, T.lam[0]) - LOW) / (high(T) - LOW);

// The dots at the slider: between two samples they move on the straight line that the step takes.
function here() {
  const last = R.positions.length - 1;
  let k = last - 1;
  while (k > 0 && R.positions[k] > S.at + 1e-9) k--;
  const [from, to] = [R.positions[k], R.positions[k + 1]], f = Math.min(1, Math.max(0, (S.at - from) / (to - from)));
  const done = f > 1 - 1e-6, i = R.stops[k], j = R.stops[k + 1], T = R.T, mix = (a, b) => a + (b - a) * f;
  let alpha = mix(T.alpha[i], T.alpha[j]), sigma = mix(T.sigma[i], T.sigma[j]);
  const size = Math.hypot(alpha, sigma);
  return { k, i, j, f, done, index: done ? k + 1 : k, alpha: alpha / size, sigma: sigma / size, x: p => mix(R.xs[i][p], R.xs[j][p]) };
}

function truth() {
  const started = performance.now(), start = R.xs[0];
  R.truth = Engine.flow(start, R.T.lam[0], STD, R.many(S.w), 44);
  let sum = 0;
  const end = R.xs[R.T.n];
  for (let i = 0; i < end.length; i++) sum += (end[i] - R.truth.end[i]) ** 2;
  R.error = Math.sqrt(sum / SAMPLES);
  timing.truth = performance.now() - started;
}

// How many samples lie within three standard deviations of a blob, and how many blobs have one.
function measure() {
  const targets = blobs.filter(b => S.w === 0 || !b[2]), wanted = targets.length ? targets : blobs, end = R.xs[R.T.n], reached = new Set();
  let on = 0;
  for (let p = 0; p < SAMPLES; p++) {
    let near = -1, best = 3 * STD;
    wanted.forEach(([x, y], k) => { const d = Math.hypot(end[2 * p] - x, end[2 * p + 1] - y); if (d <= best) { best = d; near = k; } });
    if (near >= 0) { on++; reached.add(near); }
  }
  return { on, reached: reached.size, blobs: wanted.length, any: S.w === 0 || !targets.length };
}

// --- drawing the plane ----------------------------------------------------------------------------

const plane = $("plane"), ctx = plane.getContext("2d"), haze = document.createElement("canvas");
let W = 0, H = 0, scale = 1;
const px = x => W / 2 + x * scale, py = y => H / 2 - y * scale;

function fit(canvas) {
  const ratio = Math.min(2, devicePixelRatio || 1), box = canvas.getBoundingClientRect();
  const [w, h] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  const c = canvas.getContext("2d");
  c.setTransform(ratio, 0, 0, ratio, 0, 0);
  c.clearRect(0, 0, box.width, box.height);
  return [c, box.width, box.height];
}

function drawPlane() {
  [, W, H] = fit(plane);
  scale = Math.min(H, W) / 2 / VIEW;
  const now = here(), { alpha } = now, sigma = Math.max(now.sigma, 1e-3);
  if (S.show.includes("d")) drawDensity(alpha, now.sigma);
  if (S.show.includes("f")) drawField(alpha, sigma);
  if (S.show.includes("t") && R.truth) drawTruth(now.sigma / Math.max(alpha, 1e-9));
  if (S.show.includes("p")) drawPaths(now);
  ctx.fillStyle = css("--fg");
  ctx.beginPath();
  for (let p = 0; p < 2 * SAMPLES; p += 2) { const x = px(now.x(p)), y = py(now.x(p + 1)); ctx.moveTo(x + 2.6, y); ctx.arc(x, y, 2.6, 0, 7); }
  ctx.fill();
}

function drawDensity(alpha, sigma) {
  const w = Math.ceil(W / 8), h = Math.ceil(H / 8), point = new Float64Array(2), out = new Float64Array(2), l = new Float64Array(w * h);
  let top = -Infinity;
  for (let j = 0, k = 0; j < h; j++) for (let i = 0; i < w; i++, k++) {
    point[0] = ((i + 0.5) * 8 - W / 2) / scale; point[1] = (H / 2 - (j + 0.5) * 8) / scale;
    l[k] = R.one(point, alpha, Math.max(sigma, 0.02), out, 0);
    if (l[k] > top) top = l[k];
  }
  haze.width = w; haze.height = h;
  const c = haze.getContext("2d"), image = c.createImageData(w, h), [r, g, b] = css("--haze").split(",").map(Number);
  for (let k = 0; k < l.length; k++) { image.data[4 * k] = r; image.data[4 * k + 1] = g; image.data[4 * k + 2] = b; image.data[4 * k + 3] = 125 * Math.exp(0.6 * (l[k] - top)); }
  c.putImageData(image, 0, 0);
  ctx.imageSmoothingEnabled = true;
  ctx.drawImage(haze, 0, 0, w * 8, h * 8);
}

// Arrows point from x to the guess x̂0, half as long as the way to it, at most 20 pixels.
function drawField(alpha, sigma) {
  const gap = Math.max(30, Math.min(W, H) / 16), point = new Float64Array(2), out = new Float64Array(2);
  ctx.strokeStyle = css("--field"); ctx.lineWidth = 1.1;
  ctx.beginPath();
  for (let y = (H / 2) % gap; y < H; y += gap) for (let x = (W / 2) % gap; x < W; x += gap) {
    point[0] = (x - W / 2) / scale; point[1] = (H / 2 - y) / scale;
    R.one(point, alpha, sigma, out, S.w);
    const dx = (out[0] - point[0]) * scale, dy = -(out[1] - point[1]) * scale, far = Math.hypot(dx, dy);
    if (far < 3) continue;
    const length = Math.min(gap * 0.62, far / 2), ex = x + dx / far * length, ey = y + dy / far * length, a = Math.atan2(dy, dx);
    ctx.moveTo(x, y); ctx.lineTo(ex, ey);
    ctx.moveTo(ex - 4.5 * Math.cos(a - 0.5), ey - 4.5 * Math.sin(a - 0.5)); ctx.lineTo(ex, ey); ctx.lineTo(ex - 4.5 * Math.cos(a + 0.5), ey - 4.5 * Math.sin(a + 0.5));
  }
  ctx.stroke();
}

function drawPaths(now) {
  ctx.strokeStyle = css("--fg"); ctx.globalAlpha = 0.5; ctx.lineWidth = 1.2;
  ctx.beginPath();
  for (let p = 0; p < 2 * TRACED; p += 2) {
    ctx.moveTo(px(R.xs[0][p]), py(R.xs[0][p + 1]));
    for (let k = 1; k <= now.k; k++) { const x = R.xs[R.stops[k]]; ctx.lineTo(px(x[p]), py(x[p + 1])); }
    ctx.lineTo(px(now.x(p)), py(now.x(p + 1)));
  }
  ctx.stroke();
  ctx.globalAlpha = 1;
}

function drawTruth(ratio) {
  const { states, angles } = R.truth, until = Math.atan(ratio) - 1e-9;
  ctx.strokeStyle = css("--true"); ctx.lineWidth = 1.4; ctx.setLineDash([5, 3]);
  ctx.beginPath();
  for (let p = 0; p < 2 * TRACED; p += 2) {
    ctx.moveTo(px(states[0][p]), py(states[0][p + 1]));
    for (let k = 1; k < states.length && angles[k] >= until; k++) ctx.lineTo(px(states[k][p]), py(states[k][p + 1]));
  }
  ctx.stroke();
  ctx.setLineDash([]);
}

// --- the blobs: buttons over the plane, for mouse, touch and keyboard --------------------------------

function placeBlobs() {
  const box = $("blobs");
  while (box.children.length > blobs.length) box.lastChild.remove();
  while (box.children.length < blobs.length) box.append(blobButton(box.children.length));
  blobs.forEach(([x, y, c], k) => {
    const b = box.children[k];
    b.style.left = `${px(x)}px`; b.style.top = `${py(y)}px`;
    b.className = c ? "orange" : "";
    b.tabIndex = k === chosen ? 0 : -1;
    b.setAttribute("aria-current", k === chosen);
    b.setAttribute("aria-label", `Blob ${k + 1} of ${blobs.length}, ${c ? "orange" : "blue"}, at ${x.toFixed(1)}, ${y.toFixed(1)}`);
  });
}

function blobButton(k) {
  const b = document.createElement("button");
  b.type = "button";
  let held = false;
  b.onpointerdown = e => { held = true; chosen = k; b.setPointerCapture(e.pointerId); placeBlobs(); };
  b.onpointermove = e => {
    if (!held) return;
    const box = plane.getBoundingClientRect();
    blobs[k][0] = within((e.clientX - box.left - W / 2) / scale, W / 2 / scale - 0.1);
    blobs[k][1] = within((H / 2 - e.clientY + box.top) / scale, H / 2 / scale - 0.1);
    soon(false);
  };
  b.onpointerup = b.onpointercancel = () => { if (held) { held = false; soon(true); } };
  b.onfocus = () => { if (chosen !== k) { chosen = k; placeBlobs(); } };
  b.onkeydown = e => {
    const move = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[e.key];
    const n = blobs.length, other = { n: (k + 1) % n, PageDown: (k + 1) % n, p: (k + n - 1) % n, PageUp: (k + n - 1) % n }[e.key];
    if (move) { blobs[k][0] = within(blobs[k][0] + move[0], W / 2 / scale - 0.1); blobs[k][1] = within(blobs[k][1] + move[1], H / 2 / scale - 0.1); soon(true); }
    else if (other !== undefined) $("blobs").children[other].focus();
    else if (e.key === "Delete") remove();
    else return;
    e.preventDefault();
  };
  return b;
}

function remove() { if (blobs.length > 1) { blobs.splice(chosen, 1); chosen = Math.min(chosen, blobs.length - 1); soon(true); } }

// --- numbers, equation, step axis -------------------------------------------------------------------

const random = () => R.T.random;
const decimals = v => v >= 0.0995 ? v.toFixed(2) : v >= 0.00095 ? v.toFixed(3) : v.toExponential(0).replace("e-", " · 10⁻").replace(/\d+$/, d => [...d].map(c => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]).join(""));

function drawResults() {
  const m = measure();
  $("r-calls").textContent = R.T.n * (S.w === 0 || S.w === 1 ? 1 : 2);
  $("r-on-name").textContent = m.any ? "dots on a blob" : "dots on a blue blob";
  $("r-on").textContent = `${Math.round(100 * m.on / SAMPLES)} %`;
  $("r-modes").textContent = `${m.reached} of ${m.blobs}`;
  $("r-error").textContent = random() ? "random path" : R.error === null ? "…" : decimals(R.error);
  return m;
}

function announce() {
  const m = drawResults();
  $("live").textContent = `${DATA.samplers[S.sampler]}, ${S.n} steps: ${m.on} of ${SAMPLES} dots on a blob, ${m.reached} of ${m.blobs} blobs reached.`;
}

function drawTime() {
  const now = here(), { T } = R, last = R.stops.length - 1;
  const lam = now.sigma < 1e-3 ? "∞" : now.alpha < 1e-3 ? "−∞" : Math.log(now.alpha / now.sigma).toFixed(1).replace("-", "−");
  $("time").value = S.at;
  $("time-out").textContent = `${now.done ? now.k + 1 : now.f > 1e-6 ? `${now.k} → ${now.k + 1}` : now.k} of ${last}`;
  $("time").setAttribute("aria-valuetext", `step ${now.index} of ${last}, log signal-to-noise ${lam}`);
  const [c, w] = fit($("ticks")), pad = 8, at = v => pad + v * (w - 2 * pad);
  c.strokeStyle = css("--mute"); c.fillStyle = css("--mute"); c.font = "12px system-ui, sans-serif";
  c.beginPath();
  for (const p of R.positions) { c.moveTo(at(p), 1); c.lineTo(at(p), 8); }
  c.stroke();
  c.textAlign = "left"; c.fillText("noise", pad, 24);
  c.textAlign = "right"; c.fillText("data", w - pad, 24);
  $("level").textContent = `signal α = ${now.alpha.toFixed(2)},  noise σ = ${now.sigma.toFixed(2)},  log-SNR λ = ${lam}`;
  drawEquation(now.done && now.k + 1 < last ? now.k + 1 : now.k);
}

function drawEquation(k) {
  const { T } = R, from = R.stops[k], to = R.stops[k + 1], lines = [];
  for (let i = from; i < to; i++) lines.push(equation(T, i));
  const box = $("equation"), head = `Step ${k + 1}, t = ${Math.round(T.t[from])}` + (lines.length > 1 ? `, in ${lines.length} stages` : "");
  const text = head + lines.join("|");
  if (box.dataset.text === text) return;
  box.dataset.text = text;
  box.replaceChildren(line("p", "", head), ...lines.map(l => line("div", "math", l)));
}

function line(tag, kind, text) { const e = document.createElement(tag); e.className = kind; e.textContent = text; return e; }

// Weights that every earlier sample has, as in UniPC's corrector, are too many to print: four of each.
function equation(T, i) {
  const terms = [], back = ["", "₋₁", "₋₂", "₋₃"];
  const put = (v, name) => { if (Math.abs(v) >= 5e-5) terms.push([v, name]); };
  for (let k = 0; k < Math.min(4, T.A[i].length); k++) put(T.A[i][k], `x${back[k]}`);
  for (let k = 0; k < Math.min(4, T.B[i].length); k++) put(T.B[i][k], `x̂₀${back[k]}`);
  put(T.C[i], "z");
  const more = T.A[i].slice(4).some(v => Math.abs(v) >= 5e-5) || T.B[i].slice(4).some(v => Math.abs(v) >= 5e-5);
  return "x′ = " + terms.map(([v, name], k) => `${v < 0 ? (k ? " − " : "−") : k ? " + " : ""}${Math.abs(v).toFixed(4)}·${name}`).join("") + (more ? " + …" : "");
}

// --- error against network calls, live -----------------------------------------------------------------

const LINES = 48;
let errors = [];
function order() {
  const started = performance.now(), z = R.z.slice(0, 2 * LINES), many = R.many(S.w), ends = new Map();
  const names = [...new Set([...DATA.compared, S.sampler])].filter(n => DATA.tables[S.schedule][n]);
  errors = [];
  for (const name of names) {
    const steps = Object.keys(DATA.tables[S.schedule][name]).map(Number), points = [];
    for (const n of steps) {
      const T = table(S.schedule, name, n);
      if (T.random) break;
      const key = `${T.lam[0]} ${T.start}`;
      if (!ends.has(key)) ends.set(key, Engine.flow(z.map(v => v * T.start), T.lam[0], STD, many, 44).end);
      const truth = ends.get(key), end = Engine.run(T, z, null, many).xs[T.n];
      let sum = 0;
      for (let i = 0; i < end.length; i++) sum += (end[i] - truth[i]) ** 2;
      points.push([T.n, Math.sqrt(sum / LINES), n]);
    }
    if (points.length) errors.push({ name, points });
  }
  timing.order = performance.now() - started;
  drawOrder();
}

function drawOrder() {
  const [c, w, h] = fit($("order")), left = 40, right = 74, top = 10, bottom = 38, x = n => left + Math.log(n) / Math.log(100) * (w - left - right);
  const low = -3.5, y = e => top + (0.6 - Math.log10(Math.min(4, Math.max(10 ** low, e)))) / (0.6 - low) * (h - top - bottom);
  c.font = "12px system-ui, sans-serif"; c.lineWidth = 1; c.strokeStyle = css("--line"); c.fillStyle = css("--mute");
  c.textAlign = "right"; c.textBaseline = "middle";
  for (const [e, text] of [[1, "1"], [0.1, "0.1"], [0.01, "0.01"], [0.001, "0.001"]]) { c.beginPath(); c.moveTo(left, y(e)); c.lineTo(w - right, y(e)); c.stroke(); c.fillText(text, left - 6, y(e)); }
  c.textAlign = "center";
  for (const n of [1, 2, 5, 10, 20, 50, 100]) { c.beginPath(); c.moveTo(x(n), h - bottom); c.lineTo(x(n), h - bottom + 4); c.stroke(); c.fillText(n, x(n), h - bottom + 13); }
  c.fillText("network calls", (left + w - right) / 2, h - 7);
  const colours = ["--s0", "--s1", "--s2", "--s3", "--s4"], known = DATA.compared.filter(n => !DATA.plugins.includes(n)), labels = [];
  const colour = n => css(known.includes(n) ? colours[known.indexOf(n) % 5] : "--s5");
  for (const { name, points } of [...errors].sort((a, b) => (a.name === S.sampler) - (b.name === S.sampler))) {
    const mine = name === S.sampler;
    c.strokeStyle = colour(name); c.lineWidth = mine ? 3.5 : 1.5; c.globalAlpha = mine ? 1 : 0.85;
    c.beginPath();
    points.forEach(([n, e], k) => k ? c.lineTo(x(n), y(e)) : c.moveTo(x(n), y(e)));
    c.stroke();
    const here = mine && points.find(p => p[2] === S.n);
    if (here) { c.fillStyle = colour(name); c.beginPath(); c.arc(x(here[0]), y(here[1]), 5, 0, 7); c.fill(); }
    labels.push([y(points[points.length - 1][1]), name, mine]);
  }
  c.globalAlpha = 1; c.textAlign = "left";
  labels.sort((a, b) => a[0] - b[0]);
  let last = -99;
  const room = 14 * labels.length;
  labels.forEach(([at, name, mine], k) => {
    const place = Math.min(Math.max(at, last + 14), h - bottom - 14 * (labels.length - k - 1));
    c.font = `${mine ? "700 " : ""}12px system-ui, sans-serif`; c.fillStyle = colour(name);
    c.fillText(name.length > 10 ? name.slice(0, 9) + "…" : name, w - right + 8, place);
    last = place;
  });
  const mine = errors.find(e => e.name === S.sampler);
  $("order-note").textContent = mine ? "Distance of 48 samples from the ends of the true flow." : `${DATA.samplers[S.sampler]} draws fresh noise in every step, so it follows no single path and has no line here.`;
  $("order").setAttribute("aria-label", "Error against network calls. " + errors.map(e => `${e.name}: ${decimals(e.points[0][1])} with ${e.points[0][0]}, ${decimals(e.points[e.points.length - 1][1])} with ${e.points[e.points.length - 1][0]} calls`).join("; "));
}

// --- digits ---------------------------------------------------------------------------------------------

const SIDE = DATA.digits.side, PIXELS = SIDE * SIDE, DIGITS = DATA.digits.n;
const digits = (() => {
  const b = Engine.bytes(DATA.digits.v), m = new Float64Array(DIGITS * PIXELS);
  for (let i = 0; i < b.length; i++) { m[2 * i] = (b[i] >> 4) / 7.5 - 1; m[2 * i + 1] = (b[i] & 15) / 7.5 - 1; }
  return m;
})();
let D = null; // the run on digits
const shown = () => innerWidth < 600 || S.n > 20 ? 8 : 14;

function runDigits() {
  const started = performance.now(), count = shown(), g = Engine.normal(S.seed + 3), T = R.T;
  const wanted = S.digit === "any" ? null : Uint8Array.from({ length: DIGITS }, (_, i) => i % 10 === +S.digit ? 1 : 0);
  const { many } = Engine.mixture(digits, PIXELS, 0.02, wanted), z = Float64Array.from({ length: count * PIXELS }, g);
  D = { ...Engine.run(T, z, Engine.normal(S.seed + 5), many(S.w)), count };
  const end = D.xs[T.n];
  D.nearest = []; D.copies = 0;
  for (let p = 0; p < count; p++) {
    let best = Infinity, which = 0;
    for (let k = 0; k < DIGITS; k++) {
      let d = 0;
      for (let j = 0; j < PIXELS && d < best; j++) d += (end[p * PIXELS + j] - digits[k * PIXELS + j]) ** 2;
      if (d < best) { best = d; which = k; }
    }
    D.nearest.push(which);
    if (Math.sqrt(best / PIXELS) < 0.06) D.copies++;
  }
  timing.digits = performance.now() - started;
}

function film(box, rows) {
  if (box.children.length !== rows.length) box.replaceChildren(...rows.map(() => { const d = document.createElement("div"); d.append(line("span", "", ""), document.createElement("canvas")); d.lastChild.setAttribute("role", "img"); return d; }));
  return rows.map(([text, label], k) => { const [span, canvas] = box.children[k].children; span.textContent = text; canvas.setAttribute("aria-label", label); return canvas; });
}

// Draw images of `channels` × h × w values in [−1, 1] side by side.
function pictures(canvas, n, h, w, channels, value) {
  const gap = 1, c = canvas.getContext("2d");
  canvas.width = n * (w + gap) - gap; canvas.height = h;
  const image = c.createImageData(canvas.width, h);
  for (let p = 0; p < n; p++) for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
    const k = 4 * (y * canvas.width + p * (w + gap) + x);
    for (let ch = 0; ch < 3; ch++) image.data[k + ch] = 127.5 * (1 + value(p, channels === 3 ? ch : 0, y, x));
    image.data[k + 3] = 255;
  }
  c.putImageData(image, 0, 0);
}

function drawDigits() {
  if (!D || D.xs.length !== R.xs.length) return;
  const now = here(), index = R.stops[now.index], guess = D.x0s[Math.min(index, R.T.n - 1)], x = D.xs[index], at = (a, p, y, q) => a[p * PIXELS + y * SIDE + q];
  const rows = film($("film"), [["sample xₜ", "Noisy digits"], ["the denoiser’s guess x̂₀", "Guesses of the clean digits"], ["nearest of the " + DIGITS, "Nearest stored digits to the final samples"]]);
  pictures(rows[0], D.count, SIDE, SIDE, 1, (p, _, y, q) => at(x, p, y, q));
  pictures(rows[1], D.count, SIDE, SIDE, 1, (p, _, y, q) => at(guess, p, y, q));
  pictures(rows[2], D.count, SIDE, SIDE, 1, (p, _, y, q) => digits[D.nearest[p] * PIXELS + y * SIDE + q]);
  $("digit-note").textContent = `${D.copies} of ${D.count} samples end as copies of a stored digit. Move the step slider above to watch.`;
}

// --- when to do what ---------------------------------------------------------------------------------------

const timing = {};
let frame = 0, whole = false, later = 0;
function soon(all) {
  whole = whole || all;
  if (!frame) frame = requestAnimationFrame(() => { frame = 0; const all = whole; whole = false; refresh(all); });
}

// While a blob is dragged only the samples are computed; the rest follows when it is released.
function refresh(all) {
  const started = performance.now();
  compute();
  if (all) truth();
  draw();
  drawResults();
  timing.refresh = performance.now() - started;
  clearTimeout(later);
  later = setTimeout(rest, all ? 0 : 250);
}

function rest() {
  if (!R.truth) { truth(); drawPlane(); placeBlobs(); }
  runDigits(); drawDigits();
  order();
  announce();
  write();
  timing.done = performance.now();
}

function draw() { drawPlane(); placeBlobs(); drawTime(); drawDigits(); }

function move(at) { S.at = Math.min(1, Math.max(0, at)); drawPlane(); drawTime(); drawDigits(); clearTimeout(move.timer); move.timer = setTimeout(write, 200); }

// --- controls ------------------------------------------------------------------------------------------------

function fill(select, entries) { select.replaceChildren(...entries.map(([value, text]) => { const o = document.createElement("option"); o.value = value; o.textContent = text; return o; })); }

function sync() {
  fill($("sampler"), Object.keys(DATA.tables[S.schedule]).map(n => [n, DATA.samplers[n]]));
  for (const key of ["data", "schedule", "sampler", "digit"]) $(key).value = S[key];
  $("n").max = DATA.steps.length - 1; $("n").value = DATA.steps.indexOf(S.n); $("n").setAttribute("aria-valuetext", `${S.n} steps`);
  $("w").value = S.w;
  $("n-out").textContent = S.n;
  $("w-out").textContent = S.w === 0 ? "0 (no class)" : S.w === 1 ? "1 (no guidance)" : S.w;
  document.querySelectorAll("[data-show]").forEach(b => b.setAttribute("aria-pressed", S.show.includes(b.dataset.show)));
  const hidden = S.hide.split(",");
  document.querySelectorAll("[data-part]").forEach(e => { if (e.dataset.part !== "network" || DATA.model) e.hidden = hidden.includes(e.dataset.part); });
}

function set(changes) { Object.assign(S, changes); settle(); sync(); soon(true); }

$("data").onchange = e => { S.data = e.target.value; blobs = SETS[S.data](); chosen = 0; set({}); };
$("schedule").onchange = e => set({ schedule: e.target.value });
$("sampler").onchange = e => set({ sampler: e.target.value });
$("digit").onchange = e => set({ digit: e.target.value });
$("n").oninput = e => set({ n: DATA.steps[+e.target.value] });
$("w").oninput = e => set({ w: +e.target.value });
$("seed").onclick = () => set({ seed: S.seed + 1 });
$("time").oninput = e => { stop(); move(+e.target.value); };
$("add").onclick = () => { if (blobs.length < 40) { blobs.push([0, 0, 0]); chosen = blobs.length - 1; soon(true); } };
$("remove").onclick = remove;
$("colour").onclick = () => { blobs[chosen][2] = 1 - blobs[chosen][2]; soon(true); };
document.querySelectorAll("[data-show]").forEach(b => { b.onclick = () => { const k = b.dataset.show; S.show = S.show.includes(k) ? S.show.replace(k, "") : S.show + k; sync(); draw(); write(); }; });
$("back").onclick = () => { stop(); const now = here(); move(R.positions[now.f > 1e-6 && !now.done ? now.k : Math.max(0, now.index - 1)]); };
$("forward").onclick = () => { stop(); const now = here(); move(R.positions[Math.min(R.positions.length - 1, now.index + 1)]); };

let playing = 0;
function stop() { playing = 0; $("play").textContent = "Play"; }
$("play").onclick = () => {
  if (playing) return stop();
  if (S.at >= 1) S.at = 0;
  playing = performance.now();
  $("play").textContent = "Pause";
  const tick = now => {
    if (!playing) return;
    move(S.at + Math.min(0.1, (now - playing) / 1000) / 6);
    playing = now;
    if (S.at >= 1) stop(); else requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
};

// --- the trained network ----------------------------------------------------------------------------------------

const M = DATA.model;
let worker = null, drawn = null;
function setUpNetwork() {
  if (!M) return;
  $("network").hidden = S.hide.split(",").includes("network");
  $("h-network").textContent = `The trained network: ${M.name}`;
  if (M.pictures) return stillPictures();
  const millions = (Engine.bytes(M.graph.weights).length / 1e6).toFixed(1);
  $("net-text").textContent = `This is the model’s own network, run by this page: ${M.graph.nodes.filter(n => !"qf".includes(n[0]) && n[0] !== "input").length} operators and ${millions} million weights, rounded to 8 bits. It uses the sampler and the number of steps set above, on the noise schedule that it was trained with.`;
  fill($("net-class"), M.conditions.map((c, i) => [i, c || "–"]));
  $("net-class").parentNode.hidden = M.conditions.length < 2;
  $("net-what").textContent = M.conditions.some(c => c.includes(" ")) ? "Prompt" : "Class";
  $("net-w").parentNode.hidden = !M.nothing;
  S.cls = Math.min(M.conditions.length - 1, Math.max(0, Math.round(S.cls)));
  const show = () => { $("net-class").value = S.cls; $("net-w").value = S.nw; $("net-w-out").textContent = S.nw; };
  $("net-class").onchange = e => { S.cls = +e.target.value; write(); };
  $("net-w").oninput = e => { S.nw = +e.target.value; show(); write(); };
  $("net-draw").onclick = () => worker ? endDrawing("Stopped.") : startDrawing();
  show();
}

function stillPictures() {
  const { png, rows, columns, height, width, names } = M.pictures, image = new Image();
  $("net-text").textContent = `This network does not run in the page: ${M.reason}. Instead, here is what it guessed in Python, step by step: each row is x̂₀, the clean image that it predicted at that step of the model’s own sampler.`;
  $("net-controls").hidden = true;
  image.onload = () => {
    const list = Array.from({ length: rows }, (_, k) => [`step ${k + 1}`, `Predictions at step ${k + 1}: ${names.join(", ")}`]);
    film($("net-film"), list).forEach((canvas, k) => { canvas.width = columns * width; canvas.height = height; canvas.style.height = `${Math.min(64, 2 * height)}px`; canvas.getContext("2d").drawImage(image, 0, k * height, columns * width, height, 0, 0, columns * width, height); });
  };
  image.src = "data:image/png;base64," + png;
}

// The worker has the engine's own text, so the page and the worker run the same code.
const JOB = `let unet, decoder; onmessage = ({ data: m }) => {
  unet ??= Engine.network(m.graph); decoder ??= m.decoder && Engine.network(m.decoder);
  const T = Engine.table(m.table), zs = m.seeds.map(s => { const g = Engine.normal(s); return Float64Array.from({ length: m.size }, g); });
  const noises = m.seeds.map(s => Engine.normal(s + 7919)), shape = [1, ...m.shape];
  const see = x => decoder ? decoder([[x, shape]]).d : Float32Array.from(x);
  for (const d of Engine.draw({ run: unet, shape: m.shape }, T, m.scales, m.cond, m.nothing, m.w, m.interval, zs, noises))
    postMessage({ image: d.image, step: d.step, x: see(d.next), x0: see(d.x0), last: d.step === T.n - 1 && d.image === zs.length - 1 });
};`;

// Input scale, cx and co of each evaluation, by the nearest of the exported levels.
function scales(T) {
  return Array.from({ length: T.n }, (_, i) => {
    const angle = Math.atan2(T.sigma[i], T.alpha[i]);
    return M.levels.reduce((a, b) => Math.abs(b[0] - angle) < Math.abs(a[0] - angle) ? b : a).slice(1);
  });
}

function startDrawing() {
  const samplers = DATA.tables[M.schedule], sampler = samplers[S.sampler] ? S.sampler : Object.keys(samplers)[0];
  const have = Object.keys(samplers[sampler]).map(Number), n = have.includes(S.n) ? S.n : have[0], packed = samplers[sampler][n], T = Engine.table(packed);
  const url = URL.createObjectURL(new Blob([$("engine").textContent, JOB], { type: "text/javascript" }));
  worker = new Worker(url);
  drawn = { x: [], x0: [], started: performance.now() };
  $("net-draw").textContent = "Stop";
  $("net-note").textContent = `Drawing with ${DATA.samplers[sampler]} in ${n} steps …`;
  worker.onmessage = ({ data: d }) => {
    drawn.x[d.image] = d.x; drawn.x0[d.image] = d.x0; drawn.step = d.step;
    drawNetwork();
    $("net-note").textContent = `Step ${d.step + 1} of ${T.n}, ${DATA.samplers[sampler]}`;
    if (d.last) endDrawing(`Four samples with ${DATA.samplers[sampler]}, ${n} steps, in ${((performance.now() - drawn.started) / 1000).toFixed(1)} s.`);
  };
  worker.onerror = e => { e.preventDefault(); endDrawing(`The network stopped: ${e.message}`); };
  worker.postMessage({
    graph: M.graph, decoder: M.decoder, table: packed, scales: scales(T), seeds: [0, 1, 2, 3].map(k => 100 * S.seed + k), shape: M.shape, size: M.shape.reduce((a, b) => a * b, 1),
    cond: M.inputs[S.cls], nothing: M.nothing, w: M.nothing ? S.nw : 1, interval: M.interval,
  });
}

function endDrawing(text) { worker?.terminate(); worker = null; $("net-draw").textContent = "Draw four"; $("net-note").textContent = text; document.documentElement.dataset.drawn = "1"; }

function drawNetwork() {
  const pixels = drawn.x[0].length / M.channels, h = Math.round(Math.sqrt(pixels * M.shape[1] / M.shape[2])), w = pixels / h;
  const rows = film($("net-film"), [["sample xₜ", "Samples on their way"], ["the network’s guess x̂₀", "The network's predictions of the clean image"]]);
  for (const [canvas, key] of [[rows[0], "x"], [rows[1], "x0"]]) {
    pictures(canvas, 4, h, w, M.channels, (p, ch, y, x) => drawn[key][p] ? drawn[key][p][(ch * h + y) * w + x] : -1);
    canvas.style.height = "96px";
  }
}

// --- guess first ----------------------------------------------------------------------------------------------------

const QUESTIONS = [
  { ask: "DDIM gets only five steps. How many of the 160 dots miss the blue blobs?", guesses: ["none", "a few", "more than half"],
    setting: { data: "two classes", schedule: "cosine", sampler: "ddim", n: 5, w: 1 },
    found: m => `${SAMPLES - m.on} of ${SAMPLES} miss.`, why: "Each step is a straight line, and the true path bends most near the end, where five steps are too few. Set 20 steps, and all but a handful arrive." },
  { ask: "Four of the eight blobs are blue. Guidance towards blue is turned up to 6. How many blue blobs still get dots?", guesses: ["all four", "two", "only one"],
    setting: { data: "ring", schedule: "cosine", sampler: "dpm++", n: 20, w: 6 },
    found: m => `${m.reached} of ${m.blobs} blue blobs have a dot.`, why: "Guidance does not sample the blue class: it moves away from whatever looks orange, and so it deserts the blue blobs next to orange ones. Samples become more typical and less varied." },
  { ask: "A single step, from pure noise. Where do all dots go?", guesses: ["to the nearest blob", "to the centre", "everywhere"],
    setting: { data: "grid", schedule: "cosine", sampler: "ddim", n: 1, w: 0 },
    found: (m, r) => `The dots are ${decimals(r)} from the centre on average.`, why: "From noise alone the best guess is the average of the data, and one step jumps straight to the guess." },
  { ask: "A flow-matching schedule instead of the cosine one, same noise, 50 steps of Euler’s method. Do the dots end elsewhere?", guesses: ["the same places", "other blobs", "off the blobs"],
    setting: { data: "ring", schedule: "flow", sampler: "euler", n: 50, w: 0 },
    found: () => `The ends differ by ${decimals(compareSchedules())} from those of the cosine schedule.`, why: "A schedule is only a clock. Both methods follow the same flow and read it at different times; what differs is their error." },
];

function radius() { const end = R.xs[R.T.n]; let sum = 0; for (let p = 0; p < 2 * SAMPLES; p += 2) sum += Math.hypot(end[p], end[p + 1]); return sum / SAMPLES; }

// Distance between the ends of this run and those of the cosine schedule with as many steps.
function compareSchedules() {
  const T = table("cosine", "euler", S.n), { xs } = Engine.run(T, R.z, null, R.many(S.w)), a = xs[T.n], b = R.xs[R.T.n];
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += (a[i] - b[i]) ** 2;
  return Math.sqrt(sum / SAMPLES);
}

QUESTIONS.forEach(q => {
  const box = line("div", "question", ""), row = line("div", "row", ""), answer = line("p", "answer", "");
  const look = line("button", "look", "See it in the plane");
  look.type = "button"; look.hidden = true;
  look.onclick = () => $("h-plane").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  answer.setAttribute("aria-live", "polite");
  for (const guess of q.guesses) {
    const b = line("button", "", guess);
    b.type = "button";
    b.onclick = () => {
      row.querySelectorAll("button").forEach(o => o.setAttribute("aria-pressed", o === b));
      stop();
      Object.assign(S, q.setting, { seed: 1, at: 1 });
      blobs = SETS[S.data](); chosen = 0;
      settle(); sync(); refresh(true);
      answer.textContent = `You guessed “${guess}”. Measured: ${q.found(measure(), radius())} ${q.why}`;
      look.hidden = false;
    };
    row.append(b);
  }
  box.append(line("p", "", q.ask), row, answer, look);
  $("questions").append(box);
});

// --- start ------------------------------------------------------------------------------------------------------------

fill($("data"), Object.keys(SETS).map(k => [k, k]));
fill($("schedule"), Object.entries(DATA.schedules));
fill($("digit"), [["any", "any"], ...Array.from({ length: 10 }, (_, i) => [String(i), String(i)])]);
$("version").textContent = DATA.version;
$("digit-number").textContent = DIGITS;
$("parts").textContent = [...new Set([...document.querySelectorAll("[data-part]")].map(e => e.dataset.part))].join(", ");
read(); sync(); refresh(true);
setUpNetwork();
addEventListener("hashchange", () => { read(); sync(); refresh(true); });
addEventListener("resize", () => { if (R) draw(), drawOrder(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { draw(); drawOrder(); });
document.documentElement.dataset.ready = performance.now().toFixed(0);
