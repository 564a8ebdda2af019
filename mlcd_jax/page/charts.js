// Draws charts as SVG.

const WIDTH = 360, HEIGHT = 180; // Units of the viewBox; CSS sets the size.
const BOX = {left: 46, right: 8, top: 8, bottom: 22}; // Room for the tick labels.

/** Returns the linear function that maps low..high to from..to. */
function scale(low, high, from, to) {
  const span = high - low || 1;
  return (x) => from + (x - low) / span * (to - from);
}

/** Returns about `count` round numbers between low and high. */
function ticks(low, high, count = 4) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= .9 * raw) * power;
  const found = [];
  for (let t = Math.ceil(low / step); t * step <= high + step * 1e-9; t++) found.push(t * step);
  return found;
}

/** Formats a tick label, with at most three digits. */
function short(x) {
  const size = Math.abs(x);
  if (size >= 1e9) return `${+(x / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(x / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(x / 1e3).toPrecision(3)}k`;
  return size && size < 1e-3 ? x.toExponential(0) : `${+x.toPrecision(3)}`;
}

/** Draws the ticks xs and ys; x and y map values to units. */
function axes(xs, ys, x, y) {
  const bottom = HEIGHT - BOX.bottom;
  return [
    ys.map((t) => [
      svg('line', {class: 'axis', x1: BOX.left, x2: WIDTH - BOX.right, y1: y(t), y2: y(t)}),
      svg('text', {x: BOX.left - 5, y: y(t) + 4, 'text-anchor': 'end'}, short(t)),
    ]),
    xs.map((t) => svg('text', {
      x: x(t), y: bottom + 15,
      'text-anchor': x(t) > WIDTH - BOX.right - 14 ? 'end' : 'middle',
    }, short(t))),
  ].flat(2);
}

/** Makes the SVG of a chart; screen readers read the label. */
function canvas(label, ...children) {
  return svg('svg', {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', 'aria-label': label},
    ...children);
}

/** Frames a chart with its title, and a value at the right. */
function figure(title, value, drawn, ...below) {
  return el('figure', {},
    el('figcaption', {}, el('b', {}, title), el('output', {}, value)), drawn, ...below);
}

/** Draws one curve; beside its title stands the value under the pointer, or the last. */
function lineChart(title, steps, values, show = format) {
  const points = steps.map((s, i) => [s, values[i]]).filter((p) => p[1] !== null && p[1] !== undefined);
  if (!points.length) return null;
  const ys = points.map((p) => p[1]);
  let low = Math.min(...ys), high = Math.max(...ys);
  if (low === high) [low, high] = [Math.min(0, low), high || 1];
  const x = scale(points[0][0], points.at(-1)[0], BOX.left, WIDTH - BOX.right);
  const y = scale(low, high, HEIGHT - BOX.bottom, BOX.top);
  const path = points.map((p, i) => `${i ? 'L' : 'M'}${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join('');
  const cursor = svg('line', {class: 'cursor', y1: BOX.top, y2: HEIGHT - BOX.bottom, visibility: 'hidden'});
  const last = points.at(-1);
  const drawn = canvas(`${title}: from ${show(points[0][1])} to ${show(last[1])} at step ${format(last[0])}`,
    axes(ticks(points[0][0], last[0]), ticks(low, high), x, y),
    points.length > 1 ? svg('path', {class: 'series', d: path})
      : svg('circle', {class: 'a', cx: x(last[0]), cy: y(last[1]), r: 3}),
    cursor);
  const made = figure(title, show(last[1]), drawn);
  const out = made.querySelector('output');
  drawn.addEventListener('pointermove', (event) => {
    const box = drawn.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * WIDTH;
    const near = points.reduce((a, b) => Math.abs(x(b[0]) - at) < Math.abs(x(a[0]) - at) ? b : a);
    cursor.setAttribute('x1', x(near[0]));
    cursor.setAttribute('x2', x(near[0]));
    cursor.setAttribute('visibility', 'visible');
    out.textContent = `${show(near[1])} at step ${format(near[0])}`;
  });
  drawn.addEventListener('pointerleave', () => {
    cursor.setAttribute('visibility', 'hidden');
    out.textContent = show(last[1]);
  });
  return made;
}

/** Lists the names with the colors of their CSS classes. */
function legend(names, classes) {
  return el('ul', {class: 'legend'}, names.map((name, i) => el('li', {},
    svg('svg', {viewBox: '0 0 10 10', 'aria-hidden': 'true'},
      svg('rect', {class: classes[i], width: 10, height: 10, rx: 2})), name)));
}

/** Draws a bar for each label; stacks[j][i] is part j of bar i. */
function barChart(title, value, labels, stacks, {classes = ['a'], names = null, show = format, max = null} = {}) {
  const sums = labels.map((_, i) => stacks.reduce((sum, part) => sum + part[i], 0));
  const high = max ?? (Math.max(...sums) || 1);
  const y = scale(0, high, HEIGHT - BOX.bottom, BOX.top);
  const slot = (WIDTH - BOX.left - BOX.right) / labels.length;
  const every = Math.ceil(labels.length / 8);
  const bars = labels.flatMap((label, i) => {
    let below = 0;
    return stacks.map((part, j) => {
      const from = below;
      below += part[i];
      return svg('rect', {
        class: classes[j], x: BOX.left + i * slot + slot * .08, width: slot * .84,
        y: y(below), height: Math.max(0, y(from) - y(below)),
      }, svg('title', {}, `${label}: ${show(part[i])}${names ? ' ' + names[j] : ''}`));
    });
  });
  const texts = labels.map((label, i) => i % every ? null : svg('text', {
    x: BOX.left + (i + .5) * slot, y: HEIGHT - 7, 'text-anchor': 'middle',
  }, label));
  const drawn = canvas(
    `${title}: ` + labels.map((l, i) => `${l}: ${stacks.map((p) => show(p[i])).join(' + ')}`).join('; '),
    axes([], ticks(0, high), null, y), bars, texts.filter(Boolean));
  return figure(title, value, drawn, names ? legend(names, classes) : null);
}

/** Draws the parts of a whole as one bar. */
function shareBar(title, value, names, parts, classes, show) {
  const total = parts.reduce((a, b) => a + b, 0) || 1;
  let left = 0;
  const rects = parts.map((part, i) => {
    const x = left;
    left += part / total * WIDTH;
    return svg('rect', {class: classes[i], x, y: 0, width: Math.max(0, left - x - 1), height: 26},
      svg('title', {}, `${names[i]}: ${show(part)}`));
  });
  return figure(title, value,
    svg('svg', {viewBox: `0 0 ${WIDTH} 26`, role: 'img',
      'aria-label': names.map((n, i) => `${n} ${show(parts[i])}`).join(', ')}, rects),
    legend(names.map((n, i) => `${n} ${show(parts[i])}`), classes));
}

/** Draws a value with its interval; the rows of a table share the scale from..to. */
function interval(low, value, high, from, to) {
  const x = scale(from, to, 4, 116);
  return svg('svg', {viewBox: '0 0 120 14', width: 120, 'aria-hidden': 'true'},
    svg('line', {class: 'axis', x1: 0, x2: 120, y1: 7, y2: 7}),
    svg('rect', {class: 'a', x: x(low), y: 4, width: Math.max(1, x(high) - x(low)), height: 6, rx: 3, opacity: .45}),
    svg('circle', {class: 'a', cx: x(value), cy: 7, r: 3.5}));
}
