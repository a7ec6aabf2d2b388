// Draws each chart of the page with uPlot, from the JSON in its data-chart attribute (w1train/reports/chart.py writes it). Names from the
// run only ever become text nodes and attribute values, so that none of them is read as markup.
'use strict';
(() => {
const FONT = '12px system-ui, sans-serif';
const ZOOM = 0.6;
const WHOLE_STEPS = [1, 2, 5].flatMap(factor => [...Array(16).keys()].map(power => factor * 10 ** power)).sort((a, b) => a - b);
const pen = document.createElement('canvas').getContext('2d');
pen.font = FONT;

// Texts of numbers. They are those of w1train/runtime/quantities.py and w1train/reports/chart.py.
const digits = (value, count) => String(Number(value.toPrecision(count)));
const scientific = value => value === 0 ? '0' : value.toExponential(2).replace(/\.?0*e\+?/, 'e');
const count = value => Math.round(value).toLocaleString('en');
function quantity(value) {
  const [factor, suffix] = [[1e12, 'T'], [1e9, 'B'], [1e6, 'M'], [1e3, 'k']].find(([least]) => Math.abs(value) >= 0.9995 * least) ?? [1, ''];
  return digits(value / factor, 3) + suffix;
}
const FORMATS = {general: value => digits(value, 4), exact: value => value.toFixed(4), percent: value => `${(100 * value).toFixed(1)}%`,
  quantity, scientific, count};
function tick(value, format) {
  if (value == null) return '';
  if (format === 'percent') return `${digits(100 * value, 4)}%`;
  const size = Math.abs(value);
  return size >= 1e4 ? quantity(value) : size > 0 && size < 0.01 ? scientific(value) : value.toLocaleString('en', {maximumSignificantDigits: 6});
}
const placeText = (label, x) => label === 'tokens' ? `${quantity(x)} tokens` : `${label} ${label === 'step' ? count(x) : digits(x, 3)}`;

function element(name, css, text = '', style = {}) {
  const made = document.createElement(name);
  made.className = css;
  made.textContent = text;
  Object.assign(made.style, style);
  return made;
}

class Plot {
  constructor(box) {
    this.box = box;
    this.chart = JSON.parse(box.dataset.chart);
    this.lines = this.chart.lines ?? [];
    this.log = Boolean(this.chart.log);
    this.value = box.closest('figure').querySelector('.value');
    this.resting = [...this.value.childNodes];
    this.makeTools();
    box.tabIndex = 0;
    box.setAttribute('role', 'slider');
    box.setAttribute('aria-label', `Chart: ${this.chart.title}. The arrow keys show values, + and - zoom, Escape shows all.`);
    [box.ariaValueMin, box.ariaValueMax] = this.chart.x.range;
    box.ariaValueNow = this.chart.x.range[1];
    this.draw();
    box.addEventListener('keydown', event => this.pressed(event));
    box.addEventListener('focus', () => box.matches(':focus-visible') && this.move(0));
    box.addEventListener('blur', () => this.rest());
    new ResizeObserver(() => this.plot.setSize(this.size())).observe(box);
  }

  size() { return {width: this.box.clientWidth, height: this.chart.height}; }

  color(name) { return getComputedStyle(this.box).getPropertyValue(`--${name}`).trim(); }

  draw() {
    const zoomed = this.plot && this.isZoomed() ? {...this.plot.scales.x} : null;
    this.plot?.destroy();
    this.plot = new uPlot(this.options(), this.data(), this.box);
    this.tip = this.plot.over.appendChild(element('div', 'tip'));
    this.decorations = this.plot.over.appendChild(element('div', 'decorations'));
    this.decorate();
    if (zoomed) this.plot.setScale('x', {min: zoomed.min, max: zoomed.max});
  }

  data() {
    if (this.chart.cells) return [this.chart.cells.edges.slice(0, -1)];
    // A logarithmic axis has no place for zero and less.
    const held = y => this.log && y <= 0 ? null : y;
    const tables = this.chart.tables.map(([xs, ...curves]) => [xs, ...curves.map(ys => ys.map(held))]);
    return tables.length > 1 ? uPlot.join(tables) : tables[0];
  }

  options() {
    const {chart} = this, color = name => () => this.color(name), isHeat = Boolean(chart.cells);
    const axis = {stroke: color('muted'), font: FONT, labelFont: FONT};
    const named = splits => splits.map((x, index) => index ? tick(x) : `${chart.x.label} ${tick(x)}`);
    return {
      ...this.size(),
      padding: [10, 18, 0, 0],
      legend: {show: false},
      scales: {
        x: {time: false, range: (plot, low, high) => this.xRange(low, high)},
        y: {distr: this.log ? 3 : 1, range: (plot, low, high) => this.yRange(plot, low, high)},
      },
      axes: [
        {...axis, size: 30, space: 60, grid: {show: false}, ticks: {stroke: color('rule'), size: 4}, values: (plot, splits) => named(splits),
          ...(['step', 'expert'].includes(chart.x.label) && {incrs: WHOLE_STEPS})},
        {...axis, size: 52, space: isHeat ? 60 : 34, gap: 8, grid: {show: !isHeat, stroke: color('rule'), width: 1}, ticks: {show: false},
          values: (plot, splits) => splits.map(y => tick(y, chart.format))},
      ],
      series: [{}, ...this.lines.map((line, index) => this.series(line, index))],
      bands: this.lines.flatMap((line, index) =>
        line.band === 'high' ? [{series: [index + 1, index + 2], fill: () => `${this.color(line.css)}33`}] : []),
      cursor: {
        y: isHeat,
        points: {size: 8},
        drag: {x: true, y: false, dist: 5},
        sync: {key: chart.x.label, scales: ['x', null]},
        dataIdx: (plot, series, hovered) => series === 0 ? hovered : this.nearest(plot, series, hovered),
      },
      hooks: {
        drawClear: [plot => this.fillCells(plot)],
        draw: [() => this.decorate()],
        setCursor: [() => this.show()],
        setScale: [(plot, key) => { if (key === 'x') this.tools.all.hidden = !this.isZoomed(); }],
      },
    };
  }

  series(line, index) {
    const color = () => line.band ? 'transparent' : this.color(line.css);
    const known = this.chart.tables.flatMap(table => table.slice(1))[index].filter(y => y != null).length;
    // A path of one point is invisible: a single value is a dot.
    return {stroke: color, width: line.raw ? 1 : 1.75, alpha: line.raw ? 0.35 : 1,
      points: {show: Boolean(line.dots) || known === 1, size: 7, fill: color, stroke: () => this.color('paper'), width: 1.5}};
  }

  // uPlot asks for the range of all data when the zoom is reset.
  xRange(low, high) {
    const [first, last] = this.chart.x.range, data = this.plot?.data[0] ?? [];
    return low == null || (low === data[0] && high === data.at(-1)) || !this.plot ? [first, last] : [low, high];
  }

  yRange(plot, low, high) {
    if (this.chart.cells) return this.chart.cells.range;
    if (this.log === Boolean(this.chart.log) && !this.isZoomed(plot)) [low, high] = this.chart.range;
    else if (low == null) [low, high] = this.log ? [1, 10] : [0, 1];
    else if (!this.log) return uPlot.rangeNum(low, high, 0.1, true);
    // The ticks of a logarithmic axis begin at its end, so this has to be a round number.
    return this.log ? uPlot.rangeLog(low, high, 10, false) : [low, high];
  }

  isZoomed(plot = this.plot) {
    const [first, last] = this.chart.x.range, {min, max} = plot.scales.x;
    return min != null && (min > first || max < last);
  }

  // The index of a curve's known value that is nearest to a place, because curves have their values at different places.
  nearest(plot, series, hovered) {
    const xs = plot.data[0], ys = plot.data[series], line = this.lines[series - 1];
    if (line.raw || line.band) return null;
    let before = hovered, after = hovered;
    while (before >= 0 && ys[before] == null) before--;
    while (after < ys.length && ys[after] == null) after++;
    if (before < 0 || after >= ys.length) return before >= 0 ? before : after < ys.length ? after : null;
    return xs[hovered] - xs[before] <= xs[after] - xs[hovered] ? before : after;
  }

  // Values under the pointer, as {css, name, text}.
  values() {
    const {plot, chart} = this, {idxs} = plot.cursor, xs = plot.data[0], at = xs[plot.cursor.idx];
    if (chart.cells) return this.cellValue();
    const format = FORMATS[chart.format], far = 0.005 * (chart.x.range[1] - chart.x.range[0]);
    return this.lines.flatMap((line, index) => {
      const found = idxs[index + 1];
      if (line.raw || line.band || found == null) return [];
      const place = Math.abs(xs[found] - at) > far ? ` at ${placeText(chart.x.label, xs[found])}` : '';
      return [{css: line.css, name: line.name ?? '', text: format(plot.data[index + 1][found]) + place}];
    });
  }

  cellValue() {
    const {rows, columns, range: [first, last], label} = this.chart.cells, {idx, top} = this.plot.cursor;
    const share = (this.plot.posToVal(top, 'y') - first) / (last - first);
    const row = Math.max(0, Math.min(rows.length - 1, Math.floor(share * rows.length)));
    const value = columns[idx][row];
    return [{css: 'accent', name: `${label} ${digits(rows[row], 3)}`, text: value == null ? 'no value' : digits(value, 4)}];
  }

  show() {
    const {plot} = this, {idx, left} = plot?.cursor ?? {};
    if (!this.tip || idx == null || left < 0) return this.rest(false);
    const values = this.values(), x = plot.data[0][idx], place = this.place(x);
    const said = values.map(({name, text}) => `${name} ${text}`.trim()).join(', ');
    this.box.ariaValueNow = x;
    this.box.ariaValueText = `${place}: ${said}`;
    const isHere = this.box.matches(':hover, :focus');
    this.tip.hidden = !isHere;
    if (values.length === 1 && !isHere) this.value.replaceChildren(said);
    else this.value.replaceChildren(...this.resting);
    this.tip.replaceChildren(element('b', '', place), ...values.map(({css, name, text}) => {
      const row = element('span', 'row');
      row.append(element('span', `dot ${css}`), ...(name ? [element('span', 'name', name)] : []), element('span', 'number', text));
      return row;
    }));
    const width = plot.over.clientWidth, isRight = left > width / 2;
    Object.assign(this.tip.style, {left: isRight ? '' : `${left + 12}px`, right: isRight ? `${width - left + 12}px` : ''});
  }

  rest(hideCursor = true) {
    if (this.tip) this.tip.hidden = true;
    this.value.replaceChildren(...this.resting);
    if (hideCursor) this.plot.setCursor({left: -10, top: -10});
  }

  place(x) {
    const stage = (this.chart.sections ?? []).findLast(([begin]) => begin <= x);
    return placeText(this.chart.x.label, x) + (stage ? `, ${stage[1]}` : '');
  }

  fillCells(plot) {
    if (!this.chart.cells) return;
    const {edges, columns, rows, range: [first, last], low, high} = this.chart.cells, {ctx} = plot;
    const at = (value, scale) => Math.round(plot.valToPos(value, scale, true));
    const edge = row => at(first + (last - first) * row / rows.length, 'y');
    ctx.save();
    ctx.beginPath();
    ctx.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
    ctx.clip();
    ctx.fillStyle = this.color('accent');
    columns.forEach((column, index) => column.forEach((value, row) => {
      if (value == null) return;
      const [left, right] = [at(edges[index], 'x'), at(edges[index + 1], 'x')];
      const [bottom, top] = [edge(row), edge(row + 1)];
      ctx.globalAlpha = 0.04 + 0.96 * Math.max(0, Math.min(1, (value - low) / (high - low)));
      ctx.fillRect(left, top, right - left, bottom - top);
    }));
    ctx.restore();
  }

  // Stages, events, NaN and infinite values, and the line of reference, over the curves.
  decorate() {
    const {plot, chart} = this, width = plot.over.clientWidth, {min, max} = plot.scales.x, parts = [];
    if (!this.decorations || min == null) return;
    const px = value => plot.valToPos(value, 'x');
    for (const [x, kind] of chart.marks ?? [])
      if (min <= x && x <= max) parts.push(element('i', kind, '', {left: `${px(x)}px`}));
    (chart.sections ?? []).forEach(([begin, name], index, all) => {
      const left = Math.max(0, px(begin)), right = Math.min(width, index + 1 < all.length ? px(all[index + 1][0]) : width);
      if (right <= left) return;
      if (begin > min) parts.push(element('i', 'edge', '', {left: `${left}px`}));
      const text = [`${index + 1} ${name}`, `${index + 1}`].find(each => pen.measureText(each).width + 8 <= right - left);
      if (text) parts.push(element('span', 'section', text, {left: `${left + 4}px`}));
    });
    if (chart.reference) {
      const top = plot.valToPos(chart.reference[0], 'y');
      if (top >= 0 && top <= plot.over.clientHeight) {
        const line = element('i', 'reference', '', {top: `${top}px`});
        line.append(element('span', '', chart.reference[1]));
        parts.push(line);
      }
    }
    this.decorations.replaceChildren(...parts);
  }

  makeTools() {
    const {title} = this.chart, tools = element('span', 'tools');
    const button = (text, label, act) => {
      const made = element('button', '', text);
      made.type = 'button';
      made.setAttribute('aria-label', `${label}: ${title}`);
      made.addEventListener('click', act);
      tools.append(made);
      return made;
    };
    const canBeLog = !this.chart.cells && this.chart.tables?.some(([, ...curves]) => curves.some(ys => ys.some(y => y > 0)));
    this.tools = {all: button('all', 'Show all', () => this.zoom(0))};
    for (const [text, label, factor] of [['\u2212', 'Zoom out', 1 / ZOOM], ['+', 'Zoom in', ZOOM]])
      button(text, label, () => this.zoom(factor)).classList.add('zoom');
    if (canBeLog) {
      const log = button('log', 'Logarithmic axis', () => {
        this.log = !this.log;
        log.ariaPressed = this.log;
        this.draw();
      });
      log.ariaPressed = this.log;
    }
    this.tools.all.hidden = true;
    this.box.closest('figure').querySelector('figcaption').append(tools);
  }

  // Multiplies the length of the axis by a factor around the cursor, as far as there are values; 0 shows all.
  zoom(factor) {
    const {min, max} = this.plot.scales.x, [first, last] = this.chart.x.range, {idx} = this.plot.cursor;
    const center = idx == null ? (min + max) / 2 : this.plot.data[0][idx];
    const low = factor ? Math.max(first, center - factor * (center - min)) : first;
    const high = factor ? Math.min(last, center + factor * (max - center)) : last;
    if (high - low > 1e-9 * (last - first)) for (const {plot} of this.synced()) plot.setScale('x', {min: low, max: high});
  }

  // The charts that have the cursor and the zoom of this chart.
  synced() { return plots.filter(({chart}) => chart.x.label === this.chart.x.label); }

  move(steps) {
    const {plot} = this, [first, last] = plot.series[0].idxs ?? [0, plot.data[0].length - 1];
    const index = Math.max(first, Math.min(last, (plot.cursor.idx ?? last) + steps)), height = plot.over.clientHeight;
    plot.setCursor({left: plot.valToPos(plot.data[0][index], 'x'), top: plot.cursor.top > 0 ? plot.cursor.top : height / 2});
  }

  moveRow(rows) {
    const height = this.plot.over.clientHeight, step = height / (this.chart.cells?.rows.length ?? 1);
    const top = Math.max(1, Math.min(height - 1, this.plot.cursor.top - rows * step));
    if (this.chart.cells) this.plot.setCursor({left: this.plot.cursor.left, top});
  }

  pressed(event) {
    const far = Math.ceil(this.plot.data[0].length / 10);
    const act = {
      ArrowLeft: () => this.move(-1), ArrowRight: () => this.move(1), PageDown: () => this.move(-far), PageUp: () => this.move(far),
      Home: () => this.move(-Infinity), End: () => this.move(Infinity),
      ArrowUp: this.chart.cells && (() => this.moveRow(1)), ArrowDown: this.chart.cells && (() => this.moveRow(-1)),
      '+': () => this.zoom(ZOOM), '-': () => this.zoom(1 / ZOOM), Escape: () => this.zoom(0),
    }[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  }
}

const plots = [...document.querySelectorAll('.plot')].map(box => new Plot(box));
// Colours are read when a chart is drawn.
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => plots.forEach(each => each.draw()));
})();
