// Fills in the sections of the page from the data that writer.py wrote.

const DATA = JSON.parse(document.getElementById('data').textContent);
const CLASSES = ['a', 'b', 'c', 'd', 'none'];
const PAGE = 24; // Clusters that "Show more" adds.

function status() {
  const s = DATA.status;
  document.getElementById('status').append(
    el('b', {class: s.failed ? 'bad' : s.done ? 'good' : null}, s.text),
    ` · ${DATA.workdir} · written ${new Date(1000 * DATA.written).toLocaleString()}`,
    s.done || s.failed ? '' : ' · reload for what came after');
}

function summary() {
  section('summary', 'Summary',
    el('div', {class: 'halves'},
      table(['run', ''], DATA.summary.map(([name, value]) => [name,
        typeof value === 'number' ? format(value) : value])),
      table(['stage', 'state', 'time'], DATA.stages.map((s) => [s.name, s.state,
        s.seconds ? duration(s.seconds) : '–']), [2])));
}

function curves() {
  const {step, values} = DATA.curves;
  if (!step.length) return;
  const first = ['train/loss', 'train/learning_rate', 'train/gradient_norm',
    'train/images_per_second', 'train/model_flop_utilisation'];
  const parts = ['train/data_wait_fraction', 'train/save_fraction'];
  const names = [...first.filter((n) => n in values),
    ...Object.keys(values).filter((n) => !first.includes(n) && !parts.includes(n))];
  const charts = names.map((name) => lineChart(name.replace('train/', '').replaceAll('_', ' '),
    step, values[name]));
  section('curves', 'Curves',
    'train/model_flop_utilisation' in values ? '' : el('p', {class: 'soft'},
      'Model FLOP utilisation is not shown: the peak of these devices is not known.'),
    el('div', {class: 'charts'}, charts));
}

function time() {
  const timed = DATA.stages.filter((s) => s.seconds);
  const charts = [];
  if (timed.length) {
    charts.push(shareBar('stages', duration(timed.reduce((sum, s) => sum + s.seconds, 0)),
      timed.map((s) => s.name), timed.map((s) => s.seconds), CLASSES, duration));
  }
  const {step, values} = DATA.curves;
  const wait = values['train/data_wait_fraction'], save = values['train/save_fraction'];
  const rows = step.map((_, i) => i).filter((i) => wait && wait[i] !== null);
  if (rows.length) {
    const mean = (v) => v ? rows.reduce((sum, i) => sum + (v[i] ?? 0), 0) / rows.length : 0;
    const data = mean(wait), saved = mean(save);
    charts.push(shareBar('a training step', '', ['compute and the rest', 'waiting for data', 'saving'],
      [Math.max(0, 1 - data - saved), data, saved], CLASSES, percent));
    const hundredths = (v) => v.map((x) => x === null ? null : 100 * x);
    charts.push(lineChart('waiting for data, %', step, hundredths(wait)));
    if (save) charts.push(lineChart('saving, %', step, hundredths(save)));
  }
  if (charts.length) section('time', 'Where the time goes', el('div', {class: 'charts'}, charts));
}

function thumb(row) {
  const t = DATA.clusters.thumbnails[row];
  if (!t) return null;
  const says = [t.key, t.label === null ? '' : `class ${t.label}`, t.caption].filter(Boolean).join(' · ');
  return picture(t.image, says);
}

function picture(source, says) {
  if (!source) return el('span', {class: 'thumb missing', title: says}, 'no image');
  const image = el('img', {class: 'thumb', src: source, alt: says, title: says, loading: 'lazy', decoding: 'async'});
  // Tiny images such as digits are enlarged with sharp pixels.
  image.addEventListener('load', () => image.classList.toggle('tiny', image.naturalWidth < 48));
  return image;
}

function clusterTitle(id) {
  const name = DATA.clusters.cards[id]?.name;
  return name ? `${name} (#${id})` : `#${id}`;
}

function clusterFacts(card) {
  return `${format(card.size)} image${card.size === 1 ? '' : 's'}, mean cosine ${card.cosine.toFixed(3)}`
    + (card.class === null ? '' : `, mostly class ${card.class}`);
}

/** Returns the text of a cluster that the search looks at. */
function clusterText(id) {
  const card = DATA.clusters.cards[id];
  return [`#${id}`, card.name, card.class === null ? '' : `class ${card.class}`,
    ...card.rows.map((r) => `${DATA.clusters.thumbnails[r]?.key} ${DATA.clusters.thumbnails[r]?.caption}`)].join(' ');
}

function clusterCard(id) {
  const card = DATA.clusters.cards[id];
  return el('article', {class: 'card', tabindex: 0, 'aria-label': clusterTitle(id)},
    el('h3', {}, clusterTitle(id)), el('p', {class: 'soft'}, clusterFacts(card)),
    el('div', {class: 'thumbs'}, card.rows.map(thumb)));
}

function distributions() {
  const c = DATA.clusters;
  const sizes = c.sizes.filter((s, i) => s[2] || i);
  const [from, to] = c.cosine_edges, width = (to - from) / c.cosines.length;
  // The bins without images at both ends are cut off.
  const used = c.cosines.map((n, i) => n ? i : -1).filter((i) => i >= 0);
  const bins = c.cosines.slice(used[0], used.at(-1) + 1);
  const charts = [
    barChart('images a cluster', `${format(c.num_images / c.num_clusters)} in the mean`,
      sizes.map(([low, high]) => low === high ? short(low) : `${short(low)}–${short(high)}`),
      [sizes.map((s) => s[2])]),
    barChart('cosine to the nearest center', `${format(c.num_images)} images`,
      bins.map((_, i) => (from + (used[0] + i) * width).toFixed(2)), [bins]),
  ];
  if (DATA.clustering) {
    const {objective} = DATA.clustering;
    charts.push(lineChart('mean cosine by k-means iteration', objective.map((_, i) => i + 1), objective));
  }
  return el('div', {class: 'charts'}, charts);
}

/** Returns the table of what the labels know of the attributes. */
function coverage() {
  const q = DATA.clustering?.label_quality;
  if (!q) return null;
  const pair = (v, name) => [percent(v[name]), percent(v[`${name}_chance`])];
  const left = [[q.unlabelled, 'without a label'], [q.unknown, 'without known attributes']]
    .filter(([n]) => n).map(([n, why]) => `${format(n)} ${why}`);
  return el('figure', {}, el('figcaption', {}, el('b', {}, `What the labels know of ${q.attributes_key}`)),
    table(['labels', 'attributes named', 'chance', 'labels that name one', 'chance', 'presence mAP', 'chance'],
      Object.entries(q.labels).sort((a, b) => a[0] - b[0]).map(([count, v]) => [count,
        ...pair(v, 'coverage'), ...pair(v, 'precision'), ...pair(v, 'presence_map')]), [0, 1, 2, 3, 4, 5, 6]),
    el('p', {class: 'soft'}, `Over ${format(q.images)} images${left.length ? ` (${left.join(', ')} left out)` : ''}. `
      + 'A label names the attribute that most of its images in the other half of the data have; presence mAP ranks the images '
      + 'by the frequencies of all attributes; chance is by the labels of another image.'));
}

function clusters() {
  const c = DATA.clusters;
  if (!c) return;
  const search = el('input', {type: 'search', placeholder: 'words, #number or key', id: 'cluster-search'});
  const kind = el('select', {}, ['all shown', ...Object.keys(c.groups)].map((g) => el('option', {value: g}, g)));
  const order = el('select', {}, ['largest first', 'smallest first', 'tightest first', 'loosest first']
    .map((g) => el('option', {value: g}, g)));
  const count = el('output', {class: 'soft', 'aria-live': 'polite'});
  const grid = el('div', {class: 'cards', id: 'cluster-cards'});
  const more = el('button', {type: 'button'}, 'Show more');
  const all = [...new Set(Object.values(c.groups).flat())];
  const texts = new Map(all.map((id) => [id, clusterText(id)]));
  const by = {
    'largest first': (a, b) => b.size - a.size, 'smallest first': (a, b) => a.size - b.size,
    'tightest first': (a, b) => b.cosine - a.cosine, 'loosest first': (a, b) => a.cosine - b.cosine,
  };
  let limit = PAGE;
  const draw = () => {
    const found = (c.groups[kind.value] ?? all).filter((id) => matches(search.value, texts.get(id)))
      .sort((a, b) => by[order.value](c.cards[a], c.cards[b]) || a - b);
    grid.replaceChildren(...found.slice(0, limit).map(clusterCard));
    count.textContent = `${found.length} of ${all.length} clusters sampled from ${format(c.num_clusters)}`;
    more.hidden = found.length <= limit;
  };
  const restart = () => { limit = PAGE; draw(); };
  search.addEventListener('input', restart);
  kind.addEventListener('change', restart);
  order.addEventListener('change', restart);
  more.addEventListener('click', () => { limit += PAGE; draw(); });
  section('clusters', 'Clusters',
    el('p', {}, `${format(c.num_images)} images in ${format(c.num_clusters)} clusters, ${format(c.num_empty)} of them empty. `
      + 'Each is shown by the images nearest to its center'
      + (all.some((id) => c.cards[id].name) ? ', and named by the words of their captions that set it apart.' : '.')),
    distributions(), coverage(),
    el('div', {class: 'controls'}, labelled('Search clusters', search), labelled('Kind', kind),
      labelled('Order', order), count),
    grid, el('p', {}, more));
  draw();
  duplicates();
}

function duplicates() {
  const c = DATA.clusters;
  if (!c.pairs.length) return;
  const half = (id) => el('div', {}, el('p', {}, clusterTitle(id)),
    el('div', {class: 'thumbs beside'}, c.cards[id].rows.slice(0, 3).map(thumb)));
  const counted = DATA.clustering?.near_duplicate_centers;
  section('duplicates', 'Near-duplicate centers',
    el('p', {}, (counted === undefined ? '' : `${format(counted)} centers have another one above a cosine of 0.99. `)
      + 'The closest pairs found:'),
    el('div', {class: 'pairs'}, c.pairs.map(([a, b, cosine]) => el('div', {class: 'card'},
      el('p', {class: 'soft'}, `cosine ${cosine.toFixed(3)}`),
      el('div', {class: 'pair'}, half(a), half(b))))));
}

function imageDetail(image) {
  const c = DATA.clusters;
  return [
    el('div', {}, picture(image.large, image.key), el('p', {}, image.caption),
      el('p', {class: 'soft'}, image.key + (image.label === null ? '' : ` · class ${image.label}`))),
    el('ol', {}, image.clusters.map((id, rank) => {
      const card = c.cards[id];
      // A cluster without another image names no class; see agreement.py.
      const others = card.rows.some((row) => row !== image.row);
      const right = others && image.label !== null && card.class === image.label;
      return el('li', {},
        el('div', {}, el('h3', {}, `${rank + 1}. ${clusterTitle(id)}`),
          el('p', {class: 'soft'}, `${DATA.clusters.rule === 'pursuit' ? 'coefficient' : 'cosine'} ${image.cosines[rank].toFixed(3)} · ${clusterFacts(card)}`,
            right ? el('b', {class: 'good'}, ' ✓ its class') : '')),
        el('div', {class: 'thumbs beside'}, card.rows.slice(0, 5).map(thumb)));
    })),
  ];
}

/** Returns which centers are an image's labels. */
function ruleText(rule, count) {
  if (rule === 'views') return `the nearest centers of its views as labels, ${count} at most`;
  if (rule === 'pursuit') return `the centers that add up to it as labels, ${count} at most`;
  return `its ${count} nearest center${count > 1 ? 's' : ''} as label${count > 1 ? 's' : ''}`;
}

function images() {
  const c = DATA.clusters;
  if (!c) return;
  const search = el('input', {type: 'search', placeholder: 'caption, key or cluster', id: 'image-search'});
  const count = el('output', {class: 'soft', 'aria-live': 'polite'});
  const picker = el('div', {class: 'picker', role: 'group', 'aria-label': 'Images'});
  const detail = el('div', {class: 'detail', id: 'image-detail', 'aria-live': 'polite'});
  const texts = c.images.map((i) => [i.key, i.caption, i.label === null ? '' : `class ${i.label}`,
    ...i.clusters.map(clusterTitle)].join(' '));
  const buttons = c.images.map((image) => el('button', {
    type: 'button', 'aria-label': `${image.key} ${image.caption}`, click: () => show(image),
  }, thumb(image.row)));
  const show = (image) => {
    buttons.forEach((b, i) => b.setAttribute('aria-current', c.images[i] === image));
    detail.replaceChildren(...imageDetail(image));
  };
  const draw = () => {
    const found = c.images.filter((_, i) => matches(search.value, texts[i]));
    picker.replaceChildren(...found.map((image) => buttons[c.images.indexOf(image)]));
    count.textContent = `${found.length} of ${c.images.length} images sampled from ${format(c.num_images)}`;
    // The detail always shows an image that the search found.
    if (found.length) show(found[0]); else detail.replaceChildren();
  };
  search.addEventListener('input', draw);
  section('images', 'Images and their labels',
    el('p', {}, `An image is trained with ${ruleText(c.rule, c.num_labels)}. `
      + `Each cluster is shown by its own nearest images, ${c.rule === 'pursuit' ? 'in the order in which they were taken' : 'nearest cluster first'}.`),
    el('div', {class: 'controls'}, labelled('Search images', search), count), picker, detail);
  draw();
}

function quality() {
  const q = DATA.clusters?.quality;
  if (!q) return;
  const labels = q.right.map((_, i) => `${i + 1}`);
  const wrong = q.right.map((r, i) => Math.max(0, 1 - r - q.silent[i]));
  section('quality', 'Labels against the truth',
    el('div', {class: 'halves'}, table(['measure', 'value'], [
      ['purity', percent(q.purity)],
      ['normalised mutual information', q.nmi.toFixed(3)],
      ['the 1st label names another class', percent(q.wrong_first)],
      ['of these, a later label names the true one', percent(q.rescued)],
      ['no label names the true class', percent(1 - q.any.at(-1))],
    ], [1])),
    el('p', {class: 'soft'}, `Purity and information over ${format(q.counted)} images in ${format(q.clusters)} clusters, the rest over `
      + `${format(q.images)} images. A label names the class that most other images of its cluster have; a cluster of one image names none.`),
    el('div', {class: 'charts'},
      barChart('what each label names', '', labels, [q.right, wrong, q.silent],
        {classes: ['c', 'b', 'none'], names: ['the true class', 'another', 'none'], show: percent, max: 1}),
      barChart('one of the first names the true class', percent(q.any.at(-1)), labels, [q.any],
        {show: percent, max: 1, classes: ['c']})));
}

function results() {
  const found = Object.entries(DATA.results);
  if (!found.length) return;
  const groups = new Map(), objects = new Map();
  for (const [key, value] of found) {
    const [encoder, dataset, task, metric] = key.split('/');
    // Only scores have an interval; penalty, count and the like do not.
    if (!(`${key}_low` in DATA.results)) continue;
    if (task === 'multi_label' && metric.startsWith('recall_')) {
      if (!objects.has(dataset)) objects.set(dataset, {});
      (objects.get(dataset)[encoder] ??= {})[metric.slice(7)] = value;
      continue;
    }
    const name = `${dataset} / ${task} / ${metric}`;
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push([encoder, value, DATA.results[`${key}_low`], DATA.results[`${key}_high`]]);
  }
  const order = Object.keys(DATA.encoders);
  const tables = [...groups].map(([name, rows]) => {
    rows.sort((a, b) => order.indexOf(a[0]) - order.indexOf(b[0]));
    const known = rows.flat().filter((x) => typeof x === 'number');
    const low = Math.min(...known), high = Math.max(...known);
    return el('figure', {}, el('figcaption', {}, el('b', {}, name.replaceAll('_', ' '))),
      table(['features', 'value', '95 %', ''], rows.map(([encoder, v, a, b]) => [
        DATA.encoders[encoder] ?? encoder, percent(v), a === null ? '–' : `${(100 * a).toFixed(1)}–${(100 * b).toFixed(1)}`,
        v === null || a === null ? '' : interval(a, v, b, low, high)]), [1, 2]));
  });
  tables.push(...[...objects].map(([dataset, rows]) => recall(dataset, rows, order)));
  section('results', 'Evaluation', el('p', {}, 'In percent, with 95 % intervals, the baselines beside the trained encoder.'),
    el('div', {class: 'charts wide'}, tables));
}

/** Returns the figure with the recall of objects by size and number. */
function recall(dataset, rows, order) {
  const sizes = ['small', 'medium', 'large', 'of_1', 'of_2', 'of_3_to_4', 'of_5_up']
    .filter((size) => Object.values(rows).some((row) => size in row));
  return el('figure', {}, el('figcaption', {}, el('b', {}, `${dataset} / multi label / recall of objects`)),
    table(['features', ...sizes.map((size) => size.replaceAll('_', ' '))],
      Object.entries(rows).sort((a, b) => order.indexOf(a[0]) - order.indexOf(b[0])).map(([encoder, row]) => [
        DATA.encoders[encoder] ?? encoder, ...sizes.map((size) => percent(row[size]))]),
      sizes.map((_, i) => i + 1)),
    el('p', {class: 'soft'}, 'Small, medium and large are thirds of the objects by their share of the image; “of 2” is in images with two objects.'));
}

function patches() {
  if (!DATA.patches?.length) return;
  section('patches', 'Patch features',
    el('p', {}, 'The first three principal components of the trained encoder’s patch features as red, green and blue, '
      + 'in one basis for all images: like colours are like features.'),
    el('div', {class: 'patches'}, DATA.patches.map((p) => el('figure', {},
      picture(p.image, p.key), picture(p.colours, `patch features of ${p.key}`)))));
}

function bad() {
  section('data', 'Bad data', DATA.bad.length
    ? table(['where', 'what', 'count', 'such as'], DATA.bad, [2])
    : el('p', {}, 'None found.'));
}

function config() {
  const search = el('input', {type: 'search', placeholder: 'field or value', id: 'config-search'});
  const only = el('input', {type: 'checkbox'});
  const changed = DATA.config.filter((f) => f.changed).length;
  const body = el('div', {class: 'tall'});
  const draw = () => {
    const rows = DATA.config.filter((f) => (!only.checked || f.changed) && matches(search.value, `${f.field} ${f.value}`))
      .map((f) => Object.assign([f.field, f.value, f.changed ? f.preset : ''], {className: f.changed ? 'changed' : null}));
    body.replaceChildren(table(['field', 'this run', `${DATA.preset}, where it differs`], rows));
  };
  search.addEventListener('input', draw);
  only.addEventListener('change', draw);
  section('config', 'Config',
    el('p', {}, `${changed} of ${DATA.config.length} fields differ from ${DATA.preset}.`),
    el('div', {class: 'controls'}, labelled('Search fields', search), labelled('Only what differs', only)), body);
  draw();
}

for (const part of [status, summary, curves, time, clusters, images, quality, results, patches, bad, config]) part();
