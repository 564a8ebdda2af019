// Makes elements and formats values. Text is never parsed as markup.

const SVG = 'http://www.w3.org/2000/svg';

/** Makes an element; an attribute that is a function becomes an event listener. */
function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** Makes an SVG element, like `el`. */
function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

/** Sets the attributes and children of an element; it skips those that are null. */
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') element.addEventListener(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((x) => x !== null && x !== undefined));
  return element;
}

/** Formats a number with few digits and separated thousands. */
function format(x, digits = 4) {
  if (x === null || x === undefined) return '–';
  if (Number.isInteger(x)) return x.toLocaleString('en');
  if (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e7)) return x.toExponential(2);
  return Number(x.toPrecision(digits)).toLocaleString('en', {maximumSignificantDigits: digits});
}

function percent(x, digits = 1) {
  return x === null || x === undefined ? '–' : `${(100 * x).toFixed(digits)} %`;
}

function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** Makes a table; `numbers` lists the columns to align to the right. */
function table(headings, rows, numbers = []) {
  const kind = (i) => ({class: numbers.includes(i) ? 'number' : null});
  return el('div', {class: 'scroll', tabindex: 0, role: 'region', 'aria-label': headings.join(', ')},
    el('table', {},
      el('thead', {}, el('tr', {}, headings.map((h, i) => el('th', {scope: 'col', ...kind(i)}, h)))),
      el('tbody', {}, rows.map((row) => el('tr', {class: row.className ?? null},
        row.map((cell, i) => el('td', kind(i), cell)))))));
}

/** Adds a section to the page, and a link to the navigation. */
function section(id, title, ...children) {
  document.getElementById('sections').append(el('a', {href: `#${id}`}, title));
  const made = el('section', {id, 'aria-labelledby': `${id}-title`},
    el('h2', {id: `${id}-title`}, title), ...children);
  document.getElementById('main').append(made);
  return made;
}

function labelled(text, control) {
  return el('label', {}, text, control);
}

/** Returns whether a text has every word of a query; numbers match only whole words. */
function matches(query, text) {
  const low = text.toLowerCase();
  const words = new Set(low.split(/[\s()]+/));
  return query.toLowerCase().split(/\s+/)
    .every((word) => /^#?\d+$/.test(word) ? words.has(word) : low.includes(word));
}
