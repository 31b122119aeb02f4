// @ts-check
"use strict";
// The marks of the picture. Looks are attributes and not style, so that a saved picture is the one on the page.

const INK = "#1f2430",
  QUIET = "#5c6370",
  LINE = "#d9dce2",
  BAND = "#f5f6f8",
  ACCENT = "#0b5fa5";
const POSITIVE = "#0072b2",
  NEGATIVE = "#d55e00";
const FILLS = ["#fdf1d3", "#d7dae0", "#dfe4ec", INK];
// Light enough for text on them; the strokes are Okabe and Ito's colours, which stay apart for colour-blind readers.
const SUPERNODE_FILLS = ["#bfe3fb", "#ffd9bd", "#b8ead9", "#f6d2e4", "#eadf9a", "#d6d2f5", "#d9d9d9"];
const SUPERNODE_LINES = ["#0072b2", "#d55e00", "#009e73", "#b0528a", "#8a6d00", "#5b50c0", "#555555"];

function mark(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    // Coordinates to a hundredth of a pixel; data as they are.
    const rounded = typeof value === "number" && !key.startsWith("data-") ? Math.round(value * 100) / 100 : value;
    element.setAttribute(key, rounded);
  }
  element.append(...children);
  return element;
}

function words(x, y, text, attributes = {}) {
  return mark("text", { x, y, "font-size": 12, fill: INK, ...attributes }, text);
}

function drawFrame(layout) {
  const bands = mark("g", { class: "bands" });
  layout.layers.forEach(({ top, bottom }, layer) => {
    if (layer % 2 === 0)
      bands.append(mark("rect", { x: GUTTER - 8, y: top, width: layout.width - GUTTER + 4, height: bottom - top, fill: BAND }));
  });
  for (const { start } of layout.columns.slice(1)) {
    bands.append(
      mark("path", {
        d: `M${start.toFixed(1)} ${layout.layers.at(-1).top.toFixed(1)}V${layout.bottom + TOKEN_ROW}`,
        stroke: LINE,
        "stroke-width": 0.6,
      }),
    );
  }
  return bands;
}

// The names of layers, on paper of their own because they stay in view when the picture scrolls.
function drawLayerAxis(layout) {
  const axis = mark(
    "g",
    { class: "layers" },
    mark("rect", { x: 0, y: 0, width: GUTTER - 8, height: layout.bottom + TOKEN_ROW, fill: "#fff" }),
  );
  let last = Infinity;
  layout.layers.forEach(({ top, bottom }, layer) => {
    const y = (top + bottom) / 2 + 4;
    if (last - y < 13) return;
    last = y;
    axis.append(words(GUTTER - 14, y, `layer ${layer}`, { fill: QUIET, "font-size": 11.5, "text-anchor": "end" }));
  });
  const y = layout.bottom + TOKEN_ROW / 2 + 4;
  axis.append(words(GUTTER - 14, y, "tokens", { fill: QUIET, "font-size": 11.5, "text-anchor": "end" }));
  return axis;
}

function drawTokenAxis(layout) {
  const { labels, columns, bottom, width, height } = layout,
    top = bottom + TOKEN_ROW;
  const axis = mark("g", { class: "tokens" }, mark("rect", { x: 0, y: top, width, height: height - top + 2, fill: "#fff" }));
  labels.texts.forEach((text, position) => {
    const x = columns[position].middle;
    const slanted = { "text-anchor": "end", transform: `rotate(${-SLANT} ${(x + 4).toFixed(1)} ${(top + 8).toFixed(1)})` };
    axis.append(
      words(labels.slanted ? x + 4 : x, labels.slanted ? top + 8 : top + 13, text, {
        "data-position": position,
        ...(labels.slanted ? slanted : { "text-anchor": "middle" }),
      }),
    );
  });
  return axis;
}

function drawNode(node, place, about, looks) {
  const { x, y, r, width } = place,
    { supernode, pinned, chosen, found, guest, selected } = looks;
  const fill = supernode === null ? FILLS[node.kind] : SUPERNODE_FILLS[supernode % SUPERNODE_FILLS.length];
  const stroke = supernode === null ? (node.kind === ERROR ? "#7b828e" : INK) : SUPERNODE_LINES[supernode % SUPERNODE_LINES.length];
  const group = mark("g", {
    class: "node",
    "data-id": node.id,
    "data-kind": KINDS[node.kind],
    role: "button",
    tabindex: -1,
    "aria-pressed": String(selected),
    "aria-label": spoken(node, about, looks),
  });
  const ring = (distance, attributes) =>
    group.append(
      mark("rect", {
        x: x - (width ? width / 2 : r) - distance,
        y: y - r - distance + (width ? 2 : 0),
        width: (width ?? 2 * r) + 2 * distance,
        height: 2 * r + 2 * distance - (width ? 4 : 0),
        rx: node.kind === TARGET ? 6 + distance : node.kind === FEATURE ? r + distance : 2 + distance,
        fill: "none",
        ...attributes,
      }),
    );
  if (found) ring(4, { stroke: "#e69f00", "stroke-width": 2.5 });
  if (pinned) ring(2.6, { stroke: ACCENT, "stroke-width": 2 });
  if (chosen) ring(4.6, { stroke: INK, "stroke-width": 1.4, "stroke-dasharray": "3 2" });
  const line = {
    fill,
    stroke,
    "stroke-width": selected ? 2.4 : supernode === null ? 0.9 : 1.8,
    "stroke-dasharray": guest ? "2 1.4" : null,
  };
  if (node.kind === FEATURE) group.append(mark("circle", { cx: x, cy: y, r, ...line }));
  if (node.kind === ERROR)
    group.append(mark("path", { d: `M${x} ${y - r * 1.15}L${x + r * 1.15} ${y}L${x} ${y + r * 1.15}L${x - r * 1.15} ${y}Z`, ...line }));
  if (node.kind === EMBEDDING) group.append(mark("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, rx: 1.5, ...line }));
  if (node.kind === TARGET) {
    group.append(mark("rect", { x: x - width / 2, y: y - r + 2, width, height: 2 * r - 4, rx: 5, ...line }));
    const colour = supernode === null ? "#fff" : INK;
    group.append(
      words(x, y + 4.2, targetText(node, about), { "text-anchor": "middle", "font-weight": 600, fill: colour, "xml:space": "preserve" }),
    );
  }
  return group;
}

function spoken(node, about, { supernode, pinned, chosen, supernodeName }) {
  const more = [pinned && "pinned", chosen && "marked", supernode !== null && `in ${supernodeName}`].filter(Boolean);
  return [
    `${KINDS[node.kind]} ${node.name}`,
    JSON.stringify(textOf(node, about)),
    `influence ${percent(shareOf(node, about))}`,
    ...more,
  ].join(", ");
}

function shareOf(node, about) {
  if (node.kind === TARGET) return node.probability;
  const total = about.total.influence;
  // Weights that are not finite leave influences undefined.
  return total === null || node.influence === null ? null : node.influence / Math.max(total, 1e-12);
}

// A curve that leaves and arrives vertically; sign as colour and dashes, |weight| as width.
function drawEdge(edge, from, to, width, opacity) {
  const [x, y, ends, top] = [from.x, from.y - from.r, to.x, to.y + (to.width ? to.r - 2 : to.r)];
  const bend = Math.max(8, (y - top) * 0.45);
  const at = (...numbers) => numbers.map((number) => number.toFixed(1)).join(" ");
  const path = `M${at(x, y)}C${at(x, y - bend, ends, top + bend, ends, top)}`;
  const dashes = edge.weight < 0 ? `${(width * 1.5 + 3).toFixed(1)} ${(width * 0.8 + 1.6).toFixed(1)}` : null;
  return mark("path", {
    class: "edge",
    d: path,
    fill: "none",
    stroke: edge.weight < 0 ? NEGATIVE : POSITIVE,
    "stroke-width": width.toFixed(2),
    "stroke-opacity": opacity.toFixed(2),
    "stroke-dasharray": dashes,
    "data-source": edge.source,
    "data-target": edge.target,
    "data-weight": edge.weight,
    "data-direct": edge.direct,
  });
}

// Weak ones first, so that strong ones lie on top. Weights span orders of magnitude: the root keeps the weak visible.
function drawEdges(edges, places, { thin, thick, faint, strong }) {
  const drawn = edges.filter((edge) => places.has(edge.source) && places.has(edge.target));
  const largest = Math.max(1e-30, ...drawn.map((edge) => Math.abs(edge.weight)));
  const share = (edge) => Math.sqrt(Math.abs(edge.weight) / largest);
  return drawn
    .sort((a, b) => share(a) - share(b))
    .map((edge) => {
      const part = share(edge);
      return drawEdge(
        edge,
        places.get(edge.source),
        places.get(edge.target),
        thin + (thick - thin) * part,
        faint + (strong - faint) * part,
      );
    });
}

function drawLabels(labels) {
  return labels.map((label) =>
    words(label.left, label.baseline, label.text, {
      "font-size": label.size,
      "font-family": label.font ?? MONO,
      "font-weight": label.weight ?? null,
      fill: label.colour ?? INK,
      stroke: "#fff",
      "stroke-width": 3,
      "paint-order": "stroke",
      "stroke-linejoin": "round",
    }),
  );
}

// What the marks mean, drawn as they are in the picture.
function drawLegend(list) {
  const sample = (...marks) => mark("svg", { width: 18, height: 14, "aria-hidden": "true" }, ...marks);
  const line = (attributes) => sample(mark("path", { d: "M0 7H18", "stroke-width": 3, ...attributes }));
  const entries = [
    [sample(mark("circle", { cx: 9, cy: 7, r: 5, fill: FILLS[FEATURE], stroke: INK })), "feature"],
    [sample(mark("path", { d: "M9 1.5L14.5 7L9 12.5L3.5 7Z", fill: FILLS[ERROR], stroke: "#7b828e" })), "error"],
    [sample(mark("rect", { x: 4.5, y: 2.5, width: 9, height: 9, rx: 1.5, fill: FILLS[EMBEDDING], stroke: INK })), "token"],
    [line({ stroke: POSITIVE }), "weight above 0"],
    [line({ stroke: NEGATIVE, "stroke-dasharray": "5 3" }), "below 0"],
  ];
  for (const [picture, text] of entries) {
    const entry = document.createElement("li");
    entry.append(picture, text);
    list.append(entry);
  }
}
