// @ts-check
"use strict";
// Where nodes and labels stand. Columns are positions, bands are layers; the nodes of one layer and position share a cell, side by side
// and, where that is too wide, in rows. Nothing here touches the page but to measure text.

const SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif";
const MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
const GUTTER = 62,
  RIGHT = 18,
  TOP = 10,
  PILL = 22,
  TOKEN_ROW = 26;
const STEPS = [26, 23, 20, 18, 16, 14, 12, 11, 10, 9, 8, 7]; // distances between nodes, the first that fits is taken
const SLANT = 55,
  LONGEST_TOKEN = 13,
  LONGEST_LABEL = 24;

const pen = document.createElement("canvas").getContext("2d");
function textWidth(text, size, font = SANS, weight = 400) {
  pen.font = `${weight} ${size}px ${font}`;
  return pen.measureText(text).width;
}

// What has no shape of its own made visible (some of it would turn the text around it), long text cut.
function shownText(text, longest) {
  const visible = text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");
  const letters = [...visible.replace(/[\p{Cc}\p{Cf}]/gu, (letter) => `<${letter.codePointAt(0).toString(16)}>`)];
  return letters.length > longest ? `${letters.slice(0, longest - 1).join("")}\u2026` : letters.join("");
}

// Tokens with their spaces.
function tokenText(word, longest = LONGEST_TOKEN) {
  return shownText(word.replace(/ /g, "\u00b7") || "\u2205", longest);
}

function targetLabel(node, about) {
  const { label, token } = about.targets[node.index];
  return token === null ? shownText(label, LONGEST_LABEL) : tokenText(label, LONGEST_LABEL);
}

function targetText(node, about) {
  const share = about.targets[node.index].token === null ? "" : `  ${percent(node.probability)}`;
  return `${targetLabel(node, about)}${share}`;
}

function percent(share) {
  if (share === null) return "undefined";
  return `${share >= 0.0995 ? (100 * share).toFixed(0) : Number((100 * share).toPrecision(2))} %`;
}

// The nodes of each layer and position, most influential first, errors last; and how many there are at most in each column.
function cellsOf(nodes, about) {
  const cells = new Map(),
    fullest = about.words.map(() => 0);
  for (const node of nodes) {
    if (node.kind > ERROR) continue;
    const key = `${node.layer} ${node.position}`;
    if (!cells.has(key)) cells.set(key, { layer: node.layer, position: node.position, nodes: [] });
    cells.get(key).nodes.push(node);
  }
  for (const cell of cells.values()) {
    cell.nodes.sort((a, b) => a.kind - b.kind || b.influence - a.influence || a.id - b.id);
    fullest[cell.position] = Math.max(fullest[cell.position], cell.nodes.length);
  }
  return { cells: [...cells.values()], fullest };
}

// Token labels upright where all fit side by side, slanted otherwise.
function tokenLabels(about, width) {
  const texts = about.words.map((word) => tokenText(word)),
    widths = texts.map((text) => textWidth(text, 12) + 12);
  if (widths.reduce((sum, each) => sum + Math.max(each, 20), 0) <= width)
    return { texts, least: widths.map((each) => Math.max(each, 20)), slanted: false, height: TOKEN_ROW };
  const reach = Math.max(...widths) * Math.sin((SLANT * Math.PI) / 180);
  const least = Math.min(13, Math.max(11, width / widths.length));
  return { texts, least: widths.map(() => least), slanted: true, height: reach + 18 };
}

// The largest distance between nodes, and the most nodes in a row, with which everything fits; else the smallest, and the least scrolling.
function spacing({ cells, fullest }, least, layers, width, height) {
  const most = Math.max(1, ...fullest);
  for (const step of STEPS) {
    for (let across = most; across >= 1; across -= 1) {
      const sized = sizes({ cells, fullest }, least, layers, step, across);
      if (sized.width > width + 0.5) continue;
      if (sized.height <= height) return sized;
      break; // fewer in a row only makes it taller
    }
  }
  const smallest = Array.from({ length: most }, (_, fewer) => sizes({ cells, fullest }, least, layers, STEPS.at(-1), fewer + 1));
  const scrolled = (sized) => Math.max(sized.width / width, sized.height / height);
  return smallest.sort((a, b) => scrolled(a) - scrolled(b))[0];
}

function sizes({ cells, fullest }, least, layers, step, across) {
  const columns = fullest.map((count, position) => Math.max(least[position], Math.min(count, across) * step + 1));
  const rows = new Array(layers).fill(1);
  for (const cell of cells) rows[cell.layer] = Math.max(rows[cell.layer], Math.ceil(cell.nodes.length / across));
  const bands = rows.map((count) => Math.max(15, count * step + 4));
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  return { step, across, columns, bands, width: sum(columns), height: sum(bands) };
}

// Places of everything in a picture at least as large as `size`.
function placed(nodes, about, size) {
  const targets = pills(
    nodes.filter((node) => node.kind === TARGET),
    about,
  );
  const labels = tokenLabels(about, size.width - GUTTER - RIGHT);
  const room = { width: size.width - GUTTER - RIGHT, height: size.height - TOP - targets.height - TOKEN_ROW - labels.height };
  const sized = spacing(cellsOf(nodes, about), labels.least, about.n_layers, room.width, room.height);
  const columns = spread(sized.columns, room.width, GUTTER),
    bands = spread(sized.bands, room.height, 0);
  const width = columns.at(-1).end + RIGHT,
    bottom = TOP + targets.height + bands.at(-1).end;
  const layers = bands.map(({ start, end }) => ({ top: bottom - end, bottom: bottom - start }));
  const places = new Map();
  targets.place(places, columns, GUTTER, width - 6);
  placeCells(places, cellsOf(nodes, about).cells, columns, layers, sized);
  for (const node of nodes)
    if (node.kind === EMBEDDING)
      places.set(node.id, {
        x: columns[node.position].middle,
        y: bottom + TOKEN_ROW / 2,
        r: Math.min(4.5, labels.least[node.position] * 0.3),
      });
  return {
    places,
    columns,
    layers,
    labels,
    width,
    height: bottom + TOKEN_ROW + labels.height,
    bottom,
    targetsBottom: TOP + targets.height,
    step: sized.step,
  };
}

// Lengths one after the other, stretched alike to fill the room.
function spread(lengths, room, start) {
  const more = Math.max(0, (room - lengths.reduce((sum, length) => sum + length, 0)) / lengths.length);
  return lengths.map((length) => {
    const end = start + length + more,
      part = { start, end, middle: (start + end) / 2 };
    start = end;
    return part;
  });
}

function placeCells(places, cells, columns, layers, { step, across }) {
  const largest = Math.max(1e-12, ...cells.flatMap((cell) => cell.nodes.map((node) => node.influence)));
  for (const { layer, position, nodes } of cells) {
    const rows = Math.ceil(nodes.length / across),
      band = layers[layer],
      column = columns[position];
    nodes.forEach((node, place) => {
      const row = Math.floor(place / across),
        inRow = Math.min(across, nodes.length - row * across);
      places.set(node.id, {
        x: column.middle + ((place % across) - (inRow - 1) / 2) * step,
        y: (band.top + band.bottom) / 2 + (row - (rows - 1) / 2) * step,
        r: Math.max(2, step * (0.2 + 0.2 * Math.sqrt(node.influence / largest))),
      });
    });
  }
}

// Targets as pills, in rows around their position; blocks of several positions one over the other where they would overlap.
function pills(targets, about) {
  const blocks = new Map();
  for (const node of targets) {
    if (!blocks.has(node.position)) blocks.set(node.position, []);
    blocks.get(node.position).push({ node, width: textWidth(targetText(node, about), 12, SANS, 600) + 18 });
  }
  const all = [...blocks].map(([position, entries]) => ({
    position,
    rows: rowsOfPills(entries.sort((a, b) => b.node.probability - a.node.probability)),
  }));
  const room = all.reduce((sum, block) => sum + block.rows.length, 0);
  const place = (places, columns, left, right) => {
    const taken = [];
    for (const block of all) {
      const wide = Math.max(...block.rows.map((row) => row.width)),
        tall = block.rows.length * PILL;
      const start = Math.min(Math.max(columns[block.position].middle - wide / 2, left), right - wide);
      let bottom = TOP + room * PILL;
      const overlaps = (other) =>
        start < other.end + 6 && other.start < start + wide + 6 && bottom > other.top && other.bottom > bottom - tall;
      for (let other = taken.find(overlaps); other; other = taken.find(overlaps)) bottom = other.top;
      taken.push({ start, end: start + wide, top: bottom - tall, bottom });
      block.rows.forEach((row, number) => {
        let x = start + (wide - row.width) / 2;
        for (const { node, width } of row.entries) {
          places.set(node.id, { x: x + width / 2, y: bottom - tall + number * PILL + PILL / 2, r: PILL / 2, width });
          x += width + 6;
        }
      });
    }
  };
  return { height: room * PILL + 6, place };
}

function rowsOfPills(entries) {
  const rows = [];
  for (const entry of entries) {
    if (!rows.length || rows.at(-1).width + 6 + entry.width > 460) rows.push({ entries: [], width: -6 });
    rows.at(-1).entries.push(entry);
    rows.at(-1).width += 6 + entry.width;
  }
  return rows;
}

// Of some labels, most important first, those that fit: beside, under or over their node, across no other label and no other node.
function placedLabels(wanted, places, width, height) {
  const nodes = [...places].map(([id, { x, y, r, width: wide }]) => ({
    id,
    left: x - (wide ? wide / 2 : r),
    right: x + (wide ? wide / 2 : r),
    top: y - r,
    bottom: y + r,
  }));
  const taken = [],
    result = [];
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  for (const label of wanted) {
    const wide = textWidth(label.text, label.size, label.font ?? MONO, label.weight ?? 400),
      tall = label.size + 1,
      gap = label.r + 3;
    const spots = [
      [label.x + gap, label.y - tall / 2],
      [label.x - gap - wide, label.y - tall / 2],
      [label.x - wide / 2, label.y - gap - tall + 1],
      [label.x - wide / 2, label.y + gap - 1],
    ];
    for (const [left, top] of label.over ? [spots[2], spots[3], spots[0], spots[1]] : spots) {
      const box = { left, top, right: left + wide, bottom: top + tall };
      if (left < GUTTER - 4 || box.right > width || top < 0 || box.bottom > height) continue;
      if (taken.some((other) => meet(box, other)) || nodes.some((node) => !label.own.includes(node.id) && meet(box, node))) continue;
      taken.push(box);
      result.push({ ...label, left, baseline: top + tall - 2 });
      break;
    }
  }
  return result;
}
