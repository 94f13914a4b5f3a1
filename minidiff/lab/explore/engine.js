"use strict";
// Everything that the page computes, without the page: it runs in the window and in a worker.
// No sampler is in here. A sampler is a table, x' = Σ A·x + Σ B·x̂0 + C·z, made from its Python code.

const Engine = (() => {
  function bytes(base64) {
    const text = atob(base64), out = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
    return out;
  }

  // A table as tables.py packs it; row i holds the weights of the samples i, i − 1, …
  function table(packed) {
    const v = new Float64Array(bytes(packed.v).buffer), n = packed.t.length;
    let at = 0;
    const rows = lags => Array.from({ length: n }, (_, i) => {
      const m = Math.min(i + 1, lags), row = v.subarray(at, at + m);
      at += m;
      return row;
    });
    const A = rows(packed.a), B = rows(packed.b);
    const C = packed.c ? v.subarray(at, at += n) : new Float64Array(n);
    const lam = v.subarray(at, at + n + 1);
    const alpha = lam.map(l => 1 / Math.sqrt(1 + Math.exp(-2 * l)));
    const sigma = lam.map(l => 1 / Math.sqrt(1 + Math.exp(2 * l)));
    return { n, A, B, C, lam, alpha, sigma, t: packed.t, start: packed.s, random: packed.c };
  }

  // Standard normal numbers: mulberry32, then Box and Muller.
  function normal(seed) {
    let a = seed >>> 0;
    const uniform = () => {
      a = a + 0x6d2b79f5 | 0;
      let t = Math.imul(a ^ a >>> 15, 1 | a);
      t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
      return ((t ^ t >>> 14) >>> 0) / 4294967296;
    };
    return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  }

  // The sample after row i of a table.
  function step(T, i, xs, x0s, noise) {
    const size = xs[i].length, y = new Float64Array(size), A = T.A[i], B = T.B[i], c = T.C[i];
    for (let k = 0; k < A.length; k++) if (A[k]) for (let j = 0, a = A[k], x = xs[i - k]; j < size; j++) y[j] += a * x[j];
    for (let k = 0; k < B.length; k++) if (B[k]) for (let j = 0, b = B[k], x = x0s[i - k]; j < size; j++) y[j] += b * x[j];
    if (c) for (let j = 0; j < size; j++) y[j] += c * noise();
    return y;
  }

  // All samples of a table: xs[0 … n], and the denoiser's guesses x0s[0 … n − 1].
  function run(T, z, noise, denoise) {
    const xs = [Float64Array.from(z, v => v * T.start)], x0s = [];
    for (let i = 0; i < T.n; i++) {
      const x0 = new Float64Array(z.length);
      denoise(xs[i], T.alpha[i], T.sigma[i], x0);
      x0s.push(x0);
      xs.push(step(T, i, xs, x0s, noise));
    }
    return { xs, x0s };
  }

  // E[x0 | x] for K equal Gaussians of standard deviation s around means (K × D): the mean of the
  // Gaussians, weighted by how likely each made x. `wanted` marks those of the class; guidance with
  // scale w extrapolates from the mean of all through the mean of these. Every function returned
  // takes x at a level; `one` returns ln p(x) up to a constant, `many` takes points one after the
  // other in one array, four at a time through the means.
  function mixture(means, D, s, wanted) {
    const K = means.length / D, all = new Float64Array(D), some = new Float64Array(D), squares = new Float64Array(K), logits = new Float64Array(4 * K);
    for (let k = 0; k < K; k++) for (let j = 0; j < D; j++) squares[k] += means[k * D + j] ** 2;

    function mean(top, only, at, x, from, gain, alpha, out) {
      let z = 0;
      out.fill(0);
      for (let k = 0; k < K; k++) {
        if (only && !only[k] || logits[at + k] < top - 40) continue;
        const p = Math.exp(logits[at + k] - top), row = k * D;
        z += p;
        for (let j = 0; j < D; j++) out[j] += p * means[row + j];
      }
      for (let j = 0; j < D; j++) { const m = out[j] / z; out[j] = m + gain * (x[from + j] - alpha * m); }
      return z;
    }

    // From the logits at `at` of the point at `from` in x to the guess there in `out`.
    function guess(at, x, from, alpha, gain, out, w) {
      let top = -Infinity, best = -Infinity;
      for (let k = 0; k < K; k++) {
        const l = logits[at + k];
        if (l > top) top = l;
        if (wanted && wanted[k] && l > best) best = l;
      }
      const guided = wanted && w, z = w === 1 && wanted ? 1 : mean(top, null, at, x, from, gain, alpha, all);
      if (guided) mean(best, wanted, at, x, from, gain, alpha, some);
      for (let j = 0; j < D; j++) out[from + j] = !guided ? all[j] : w === 1 ? some[j] : all[j] + w * (some[j] - all[j]);
      return top + Math.log(z);
    }

    function near(x, from, alpha, v) { // two dimensions: distances are exact where a product would cancel
      for (let k = 0; k < K; k++) { const a = x[from] - alpha * means[2 * k], b = x[from + 1] - alpha * means[2 * k + 1]; logits[k] = -(a * a + b * b) / (2 * v); }
    }

    function one(x, alpha, sigma, out, w) {
      const v = alpha * alpha * s * s + sigma * sigma;
      near(x, 0, alpha, v);
      return guess(0, x, 0, alpha, alpha * s * s / v, out, w);
    }

    function products(xs, i, j, k, l) {
      for (let m = 0, row = 0; m < K; m++, row += D) {
        let a = 0, b = 0, c = 0, d = 0;
        for (let q = 0; q < D; q++) { const y = means[row + q]; a += xs[i + q] * y; b += xs[j + q] * y; c += xs[k + q] * y; d += xs[l + q] * y; }
        logits[m] = a; logits[K + m] = b; logits[2 * K + m] = c; logits[3 * K + m] = d;
      }
    }

    const many = w => (xs, alpha, sigma, out) => {
      const v = alpha * alpha * s * s + sigma * sigma, gain = alpha * s * s / v, P = xs.length / D;
      if (D === 2) { for (let p = 0; p < P; p++) { near(xs, 2 * p, alpha, v); guess(0, xs, 2 * p, alpha, gain, out, w); } return; }
      for (let p = 0; p < P; p += 4) {
        const [i, j, k, l] = [0, 1, 2, 3].map(q => Math.min(p + q, P - 1) * D);
        products(xs, i, j, k, l);
        for (let m = 0; m < 4 * K; m++) logits[m] = (alpha * logits[m] - alpha * alpha * squares[m % K] / 2) / v;
        for (let q = 0; q < Math.min(4, P - p); q++) guess(q * K, xs, (p + q) * D, alpha, gain, out, w);
      }
    };
    return { one, many };
  }

  // The true flow. With x = cos θ·x0 + sin θ·ε the probability-flow ODE is
  // dx/dθ = (cos θ·x − x̂0)/sin θ: Runge and Kutta's method, then the last bit, within one blob of
  // standard deviation s, in closed form. Returns the ends, and every second state on the way.
  function flow(start, lam, s, denoise, pieces = 72) {
    const from = Math.atan2(1, Math.exp(lam)), to = 0.02, size = start.length, states = [start], angles = [from];
    const h0 = new Float64Array(size), y = new Float64Array(size);
    const slope = (x, a, out) => {
      const c = Math.cos(a), d = Math.sin(a);
      denoise(x, c, d, h0);
      for (let j = 0; j < size; j++) out[j] = (c * x[j] - h0[j]) / d;
    };
    const k = [0, 1, 2, 3].map(() => new Float64Array(size));
    let x = Float64Array.from(start), a = from;
    for (let i = 1; i <= pieces; i++) {
      const next = to + (from - to) * (1 - i / pieces) ** 1.6, h = next - a;
      slope(x, a, k[0]);
      for (let j = 0; j < size; j++) y[j] = x[j] + h / 2 * k[0][j];
      slope(y, a + h / 2, k[1]);
      for (let j = 0; j < size; j++) y[j] = x[j] + h / 2 * k[1][j];
      slope(y, a + h / 2, k[2]);
      for (let j = 0; j < size; j++) y[j] = x[j] + h * k[2][j];
      slope(y, next, k[3]);
      for (let j = 0; j < size; j++) x[j] += h / 6 * (k[0][j] + 2 * k[1][j] + 2 * k[2][j] + k[3][j]);
      a = next;
      if (i % 2 === 0) { states.push(Float64Array.from(x)); angles.push(a); }
    }
    denoise(x, Math.cos(a), Math.sin(a), h0);
    const root = s / Math.hypot(s, Math.tan(a)), end = new Float64Array(size);
    for (let j = 0; j < size; j++) { const q = x[j] / Math.cos(a); end[j] = q + (h0[j] - q) / (1 + root); }
    states.push(end); angles.push(0);
    return { end, states, angles };
  }

  // --- a network as a list of operators, see trace.py ---------------------------------------

  const count = shape => shape.reduce((a, b) => a * b, 1);
  const tensor = (d, s) => ({ d, s });
  const each = (a, f) => { const d = new Float32Array(a.d.length); for (let i = 0; i < d.length; i++) d[i] = f(a.d[i]); return tensor(d, a.s); };
  const axis = (k, n) => (k + n) % n;

  function broadcast(a, b, f) {
    if (typeof a === "number") return each(b, v => f(a, v));
    if (typeof b === "number") return each(a, v => f(v, b));
    const n = Math.max(a.s.length, b.s.length), pad = s => [...Array(n - s.length).fill(1), ...s];
    const sa = pad(a.s), sb = pad(b.s), s = sa.map((v, i) => Math.max(v, sb[i])), d = new Float32Array(count(s));
    if (a.d.length === d.length && b.d.length === d.length) { for (let i = 0; i < d.length; i++) d[i] = f(a.d[i], b.d[i]); return tensor(d, s); }
    const strides = q => { let k = 1; const r = []; for (let i = n - 1; i >= 0; i--) { r[i] = q[i] === 1 ? 0 : k; k *= q[i]; } return r; };
    const ta = strides(sa), tb = strides(sb), at = new Array(n).fill(0);
    for (let i = 0, p = 0, q = 0; i < d.length; i++) {
      d[i] = f(a.d[p], b.d[q]);
      for (let j = n - 1; j >= 0; j--) {
        p += ta[j]; q += tb[j];
        if (++at[j] < s[j]) break;
        p -= ta[j] * s[j]; q -= tb[j] * s[j]; at[j] = 0;
      }
    }
    return tensor(d, s);
  }

  function permute(a, order) {
    const n = a.s.length, s = order.map(k => a.s[k]), old = [];
    for (let i = n - 1, k = 1; i >= 0; i--) { old[i] = k; k *= a.s[i]; }
    const st = order.map(k => old[k]), d = new Float32Array(a.d.length), at = new Array(n).fill(0);
    for (let i = 0, p = 0; i < d.length; i++) {
      d[i] = a.d[p];
      for (let j = n - 1; j >= 0; j--) { p += st[j]; if (++at[j] < s[j]) break; p -= st[j] * s[j]; at[j] = 0; }
    }
    return tensor(d, s);
  }

  function reshape(a, shape) {
    const s = shape.slice(), hole = s.indexOf(-1);
    if (hole >= 0) { s[hole] = 1; s[hole] = a.d.length / count(s); }
    return tensor(a.d, s);
  }

  // out (O × n) = W (O × K) · col (K × n) + bias, four rows at a time.
  function product(W, col, bias, out, O, K, n) {
    for (let o = 0; o < O; o += 4) {
      const rows = Math.min(4, O - o), a = out.subarray(o * n, o * n + n);
      if (rows < 4) {
        for (let r = o; r < O; r++) {
          const d = out.subarray(r * n, r * n + n);
          d.fill(bias ? bias[r] : 0);
          for (let k = 0; k < K; k++) for (let i = 0, w = W[r * K + k], c = k * n; i < n; i++) d[i] += w * col[c + i];
        }
        return;
      }
      const b = out.subarray((o + 1) * n, (o + 2) * n), c = out.subarray((o + 2) * n, (o + 3) * n), d = out.subarray((o + 3) * n, (o + 4) * n);
      [a, b, c, d].forEach((row, r) => row.fill(bias ? bias[o + r] : 0));
      const w = o * K;
      let k = 0;
      for (; k + 1 < K; k += 2) {
        const a0 = W[w + k], a1 = W[w + k + 1], b0 = W[w + K + k], b1 = W[w + K + k + 1];
        const c0 = W[w + 2 * K + k], c1 = W[w + 2 * K + k + 1], d0 = W[w + 3 * K + k], d1 = W[w + 3 * K + k + 1];
        for (let i = 0, p = k * n, q = p + n; i < n; i++, p++, q++) {
          const u = col[p], v = col[q];
          a[i] += a0 * u + a1 * v; b[i] += b0 * u + b1 * v; c[i] += c0 * u + c1 * v; d[i] += d0 * u + d1 * v;
        }
      }
      for (; k < K; k++) for (let i = 0, p = k * n; i < n; i++, p++) {
        const v = col[p];
        a[i] += W[w + k] * v; b[i] += W[w + K + k] * v; c[i] += W[w + 2 * K + k] * v; d[i] += W[w + 3 * K + k] * v;
      }
    }
  }

  function conv2d(x, w, bias, stride, padding, dilation, groups) {
    const [N, C, H, V] = x.s, [O, G, kh, kw] = w.s, [sy, sx] = stride, [py, px] = padding, [dy, dx] = dilation;
    const h = Math.floor((H + 2 * py - dy * (kh - 1) - 1) / sy) + 1, v = Math.floor((V + 2 * px - dx * (kw - 1) - 1) / sx) + 1;
    const n = h * v, K = G * kh * kw, per = O / groups, col = new Float32Array(K * n), d = new Float32Array(N * O * n);
    for (let b = 0; b < N; b++) for (let g = 0; g < groups; g++) {
      if (kh === 1 && kw === 1 && sy === 1 && sx === 1 && !py && !px) {
        product(w.d.subarray(g * per * K, (g + 1) * per * K), x.d.subarray((b * C + g * G) * n, (b * C + g * G + G) * n), bias && bias.d.subarray(g * per), d.subarray((b * O + g * per) * n, (b * O + g * per + per) * n), per, K, n);
        continue;
      }
      for (let c = 0, r = 0; c < G; c++) for (let ky = 0; ky < kh; ky++) for (let kx = 0; kx < kw; kx++, r += n) for (let y = 0; y < h; y++) {
        const iy = y * sy + ky * dy - py, line = ((b * C + g * G + c) * H + iy) * V;
        for (let q = 0; q < v; q++) {
          const ix = q * sx + kx * dx - px;
          col[r + y * v + q] = iy < 0 || iy >= H || ix < 0 || ix >= V ? 0 : x.d[line + ix];
        }
      }
      product(w.d.subarray(g * per * K, (g + 1) * per * K), col, bias && bias.d.subarray(g * per), d.subarray((b * O + g * per) * n, (b * O + g * per + per) * n), per, K, n);
    }
    return tensor(d, [N, O, h, v]);
  }

  function linear(x, w, bias) {
    const [O, K] = w.s, M = x.d.length / K, d = new Float32Array(M * O);
    for (let m = 0; m < M; m++) for (let o = 0; o < O; o++) {
      let a = 0, b = 0;
      const p = m * K, q = o * K;
      let k = 0;
      for (; k + 1 < K; k += 2) { a += x.d[p + k] * w.d[q + k]; b += x.d[p + k + 1] * w.d[q + k + 1]; }
      if (k < K) a += x.d[p + k] * w.d[q + k];
      d[m * O + o] = a + b + (bias ? bias.d[o] : 0);
    }
    return tensor(d, [...x.s.slice(0, -1), O]);
  }

  // Normalise stretches of `per` values; weight and bias change every `run` values.
  function normalise(x, per, run, weight, bias, eps) {
    const d = new Float32Array(x.d.length), n = weight ? weight.d.length : 1;
    for (let at = 0; at < d.length; at += per) {
      let m = 0, v = 0;
      for (let i = at; i < at + per; i++) m += x.d[i];
      m /= per;
      for (let i = at; i < at + per; i++) v += (x.d[i] - m) ** 2;
      const r = 1 / Math.sqrt(v / per + eps);
      for (let i = at; i < at + per; i++) { const c = Math.floor(i / run) % n; d[i] = (x.d[i] - m) * r * (weight ? weight.d[c] : 1) + (bias ? bias.d[c] : 0); }
    }
    return tensor(d, x.s);
  }

  function matmul(a, b) {
    const M = a.s[a.s.length - 2], K = a.s[a.s.length - 1], N = b.s[b.s.length - 1], batch = a.d.length / (M * K), other = b.d.length / (K * N);
    const d = new Float32Array(batch * M * N);
    for (let h = 0; h < batch; h++) product(a.d.subarray(h * M * K, (h + 1) * M * K), b.d.subarray(h % other * K * N, (h % other + 1) * K * N), null, d.subarray(h * M * N, (h + 1) * M * N), M, K, N);
    return tensor(d, [...a.s.slice(0, -1), N]);
  }

  function softmax(a, dim) {
    const k = axis(dim, a.s.length), n = a.s[k], inner = count(a.s.slice(k + 1)), d = new Float32Array(a.d.length);
    for (let o = 0; o < d.length; o += n * inner) for (let i = 0; i < inner; i++) {
      let top = -Infinity, z = 0;
      for (let j = 0; j < n; j++) top = Math.max(top, a.d[o + i + j * inner]);
      for (let j = 0; j < n; j++) z += d[o + i + j * inner] = Math.exp(a.d[o + i + j * inner] - top);
      for (let j = 0; j < n; j++) d[o + i + j * inner] /= z;
    }
    return tensor(d, a.s);
  }

  function attention(q, k, v, mask, dropout, causal, scale) {
    const n = q.s.length, swap = [...Array(n - 2).keys(), n - 1, n - 2], factor = scale ?? 1 / Math.sqrt(q.s[n - 1]);
    return matmul(softmax(each(matmul(q, permute(k, swap)), x => x * factor), -1), v);
  }

  function cut(a, dim, from, to, by = 1) {
    const k = axis(dim, a.s.length), n = a.s[k], inner = count(a.s.slice(k + 1)), outer = count(a.s.slice(0, k));
    const first = from == null ? 0 : from < 0 ? from + n : from, last = Math.min(to == null ? n : to < 0 ? to + n : to, n);
    const m = Math.max(0, Math.ceil((last - first) / by)), s = a.s.slice(), d = new Float32Array(outer * m * inner);
    s[k] = m;
    for (let o = 0, p = 0; o < outer; o++) for (let j = 0; j < m; j++, p += inner) { const at = (o * n + first + j * by) * inner; d.set(a.d.subarray(at, at + inner), p); }
    return tensor(d, s);
  }

  function pieces(a, sizes, dim) {
    const n = a.s[axis(dim, a.s.length)];
    if (typeof sizes === "number") sizes = Array.from({ length: Math.ceil(n / sizes) }, (_, i) => Math.min(sizes, n - i * sizes));
    let at = 0;
    return sizes.map(m => cut(a, dim, at, at += m));
  }

  function cat(list, dim) {
    const k = axis(dim, list[0].s.length), s = list[0].s.slice(), outer = count(s.slice(0, k));
    s[k] = list.reduce((sum, a) => sum + a.s[k], 0);
    const d = new Float32Array(count(s));
    for (let o = 0, p = 0; o < outer; o++) for (const a of list) { const n = a.d.length / outer; d.set(a.d.subarray(o * n, o * n + n), p); p += n; }
    return tensor(d, s);
  }

  function pad(a, sizes, mode, value) {
    let out = a;
    if (mode !== "constant") throw new Error("no padding of mode " + mode);
    for (let k = 0; k < sizes.length / 2; k++) {
      const dim = a.s.length - 1 - k, [before, after] = [sizes[2 * k], sizes[2 * k + 1]];
      const blank = m => { const s = out.s.slice(); s[dim] = m; return tensor(new Float32Array(count(s)).fill(value ?? 0), s); };
      if (before || after) out = cat([blank(before), out, blank(after)], dim);
    }
    return out;
  }

  function nearest(a, size, factors) {
    const [N, C, H, V] = a.s, [h, v] = size ?? [Math.floor(H * factors[0]), Math.floor(V * factors[1])], d = new Float32Array(N * C * h * v);
    for (let c = 0, p = 0; c < N * C; c++) for (let y = 0; y < h; y++) for (let x = 0; x < v; x++, p++) d[p] = a.d[(c * H + Math.floor(y * H / h)) * V + Math.floor(x * V / v)];
    return tensor(d, [N, C, h, v]);
  }

  // The error function to 1e-7 and better: its series, or the continued fraction of its tail.
  function erf(x) {
    const a = Math.abs(x);
    if (a > 5) return Math.sign(x);
    if (a < 2.5) {
      let term = a, sum = a;
      for (let n = 1; n < 60 && Math.abs(term) > 1e-16; n++) { term *= -a * a / n; sum += term / (2 * n + 1); }
      return Math.sign(x) * 2 / Math.sqrt(Math.PI) * sum;
    }
    let f = 0;
    for (let n = 40; n > 0; n--) f = n / 2 / (a + f);
    return Math.sign(x) * (1 - Math.exp(-a * a) / (Math.sqrt(Math.PI) * (a + f)));
  }
  const gelu = mode => mode === "tanh"
    ? v => v / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v ** 3)))
    : v => v / 2 * (1 + erf(v / Math.SQRT2));
  const plus = (a, b, scale) => broadcast(a, b, scale === 1 || scale == null ? (x, y) => x + y : (x, y) => x + scale * y);

  const OPERATORS = {
    add: plus, sub: (a, b, scale) => plus(a, b, -(scale ?? 1)),
    mul: (a, b) => broadcast(a, b, (x, y) => x * y), div: (a, b) => broadcast(a, b, (x, y) => x / y),
    neg: a => each(a, v => -v), exp: a => each(a, Math.exp), sin: a => each(a, Math.sin), cos: a => each(a, Math.cos), sqrt: a => each(a, Math.sqrt),
    silu: a => each(a, v => v / (1 + Math.exp(-v))), gelu: (a, mode) => each(a, gelu(mode)),
    relu: a => each(a, v => Math.max(0, v)), tanh: a => each(a, Math.tanh), sigmoid: a => each(a, v => 1 / (1 + Math.exp(-v))),
    softmax, linear, matmul, conv2d, cat, pad, nearest, upsample_nearest2d: nearest, scaled_dot_product_attention: attention,
    group_norm: (x, groups, w, b, eps) => normalise(x, count(x.s.slice(1)) / groups, count(x.s.slice(2)), w, b, eps),
    layer_norm: (x, shape, w, b, eps) => normalise(x, count(shape), 1, w, b, eps),
    embedding: (w, i) => { const D = w.s[1], d = new Float32Array(i.d.length * D); i.d.forEach((k, p) => d.set(w.d.subarray(k * D, k * D + D), p * D)); return tensor(d, [...i.s, D]); },
    view: reshape, reshape, flatten: (a, from, to) => { const n = a.s.length, i = axis(from, n), j = axis(to, n); return reshape(a, [...a.s.slice(0, i), count(a.s.slice(i, j + 1)), ...a.s.slice(j + 1)]); },
    unflatten: (a, dim, sizes) => { const k = axis(dim, a.s.length); return reshape(a, [...a.s.slice(0, k), ...sizes, ...a.s.slice(k + 1)]); },
    expand: (a, shape) => { const s = [...Array(shape.length - a.s.length).fill(1), ...a.s].map((v, i) => shape[i] === -1 ? v : shape[i]); return broadcast(a, tensor(new Float32Array(count(s)), s), x => x); },
    permute: (a, order) => permute(a, order.map(k => axis(k, a.s.length))),
    transpose: (a, i, j) => { const n = a.s.length, order = [...Array(n).keys()]; [order[axis(i, n)], order[axis(j, n)]] = [axis(j, n), axis(i, n)]; return permute(a, order); },
    unsqueeze: (a, k) => { const s = a.s.slice(); s.splice(k < 0 ? k + s.length + 1 : k, 0, 1); return tensor(a.d, s); },
    squeeze: (a, k) => { const dims = k == null ? [...a.s.keys()] : [k].flat().map(i => axis(i, a.s.length)); return tensor(a.d, a.s.filter((v, i) => v !== 1 || !dims.includes(i))); },
    split: (a, sizes, dim) => pieces(a, sizes, dim), chunk: (a, n, dim) => pieces(a, Math.ceil(a.s[axis(dim, a.s.length)] / n), dim),
    slice: (a, dim, from, to, by) => cut(a, dim, from, to, by), select: (a, dim, i) => { const k = axis(dim, a.s.length), n = i < 0 ? i + a.s[k] : i, b = cut(a, k, n, n + 1); return tensor(b.d, b.s.filter((_, j) => j !== k)); },
    clone: a => a, contiguous: a => a, getitem: (a, i) => a[i],
    arange: (...v) => { const [from, to, by] = v.length === 1 ? [0, v[0], 1] : [v[0], v[1], v[2] ?? 1]; const n = Math.ceil((to - from) / by); return tensor(Float32Array.from({ length: n }, (_, i) => from + i * by), [n]); },
    pixel_shuffle: (a, r) => { const [N, C, H, V] = a.s, c = C / r / r; return reshape(permute(reshape(a, [N, c, r, r, H, V]), [0, 1, 4, 2, 5, 3]), [N, c, H * r, V * r]); },
  };

  // A function from inputs, as arrays of numbers with their shapes, to the network's output.
  function network(graph) {
    const buffer = bytes(graph.weights).buffer;
    const constants = graph.nodes.map(([kind, shape, at, scales]) => {
      if (kind === "f") return tensor(new Float32Array(buffer, at, count(shape)), shape);
      if (kind !== "q") return null;
      const n = count(shape), per = n / shape[0], q = new Int8Array(buffer, at, n), s = new Float32Array(buffer, scales, shape[0]), d = new Float32Array(n);
      for (let i = 0; i < n; i++) d[i] = q[i] * s[Math.floor(i / per)];
      return tensor(d, shape);
    });
    return inputs => {
      const results = [];
      const value = a => Array.isArray(a) ? a.map(value) : a && typeof a === "object" ? results[a.r] : a;
      let next = 0;
      graph.nodes.forEach(([name, ...args], i) => {
        if (constants[i]) results[i] = constants[i];
        else if (name === "input") { const [d, s] = inputs[next++]; results[i] = tensor(Float32Array.from(d), s); }
        else if (OPERATORS[name]) results[i] = OPERATORS[name](...args.map(value));
        else throw new Error("no operator " + name);
      });
      return results[graph.output];
    };
  }

  // Draw samples with a network, all images in step; `show` gets every step's x and x̂0.
  function* draw(model, T, scales, cond, none, w, interval, zs, noises) {
    const shape = [1, ...model.shape], xs = zs.map(z => [Float64Array.from(z, v => v * T.start)]), x0s = zs.map(() => []);
    for (let i = 0; i < T.n; i++) {
      const [input, cx, co] = scales[i], ratio = Math.exp(-T.lam[i]);
      const guided = none && w !== 1 && (!interval || interval[0] < ratio && ratio <= interval[1]);
      for (let p = 0; p < zs.length; p++) {
        const x = xs[p][i], call = c => model.run([[x.map(v => v * input), shape], [[T.t[i]], [1]], ...c]).d;
        const c = call(cond), out = Float64Array.from(c), x0 = new Float64Array(x.length);
        if (guided) { const u = call(none); for (let j = 0; j < out.length; j++) out[j] = u[j] + w * (c[j] - u[j]); }
        for (let j = 0; j < x.length; j++) x0[j] = cx * x[j] + co * out[j];
        x0s[p].push(x0);
        yield { image: p, step: i, x, x0, next: (xs[p][i + 1] = step(T, i, xs[p], x0s[p], noises[p])) };
      }
    }
  }

  return { bytes, table, normal, step, run, mixture, flow, network, draw, OPERATORS };
})();
