// @ts-check
"use strict";
// The picture of pinned nodes and supernodes alone.

const BOX_HEIGHT = 40,
  BOX_GAP = 18;
const MOST_BOX_EDGES = 300,
  MOST_WEIGHTS = 24;

// A box for each supernode and each pinned node outside of them.
function boxesOf(state, about) {
  const grouped = new Set(state.supernodes.flatMap((one) => [...one.nodes]));
  const mean = (ids, measure) => ids.reduce((sum, id) => sum + measure(state.known.get(id)), 0) / ids.length;
  const box = (ids, title, subtitle, supernode) => {
    const measures = {
      level: mean(ids, (node) => node.layer),
      position: mean(ids, (node) => node.position),
      influence: mean(ids, (node) => node.influence),
    };
    return { ids, title, subtitle, supernode, kind: state.known.get(ids[0]).kind, ...measures };
  };
  const supernodes = state.supernodes.map((one, number) => {
    const ids = [...one.nodes],
      positions = [...new Set(ids.map((id) => state.known.get(id).position))].sort((a, b) => a - b);
    const where = positions.length > 3 ? `@${positions[0]} to ${positions.at(-1)}` : positions.map((position) => `@${position}`).join(" ");
    return box(ids, one.name, `${ids.length} node${ids.length > 1 ? "s" : ""}  ${where}`, number);
  });
  const pinned = [...state.pinned]
    .filter((id) => !grouped.has(id))
    .map((id) => {
      const node = state.known.get(id),
        at = `@${node.position}`,
        word = tokenText(about.words[node.position]);
      if (node.kind === TARGET) return box([id], targetText(node, about), `target ${at}`, null);
      if (node.kind === EMBEDDING) return box([id], word, `token ${at}`, null);
      return box([id], node.name.split("@")[0], `${word} ${at}`, null);
    });
  return [...supernodes, ...pinned];
}

// Edges between boxes: the sums of their members'.
function edgesBetween(boxes, edges) {
  const owner = new Map(boxes.flatMap((box, number) => box.ids.map((id) => [id, number])));
  const sums = new Map();
  for (const edge of edges) {
    const source = owner.get(edge.source),
      target = owner.get(edge.target),
      key = `${source} ${target}`;
    if (source === target) continue;
    const sum = sums.get(key) ?? { source, target, weight: 0, direct: 0 };
    sum.weight += edge.weight;
    sum.direct += edge.direct;
    sums.set(key, sum);
  }
  return [...sums.values()].sort(byFalling((edge) => Math.abs(edge.weight))).slice(0, MOST_BOX_EDGES);
}

// From bottom to top by layer, from left to right by position.
function placedBoxes(boxes, size) {
  const levels = [...new Set(boxes.map((box) => Math.round(box.level)))].sort((a, b) => a - b);
  const positions = boxes.map((box) => box.position),
    [low, high] = [Math.min(...positions), Math.max(...positions)];
  const height = Math.max(size.height, levels.length * (BOX_HEIGHT + 34) + 20),
    step = height / Math.max(levels.length, 1);
  let width = size.width;
  const rows = levels.map((level, row) => {
    const members = boxes
      .filter((box) => Math.round(box.level) === level)
      .map((box) => ({
        box,
        y: height - step * (row + 0.5),
        height: BOX_HEIGHT,
        width: Math.max(textWidth(box.title, 13, SANS, 600), textWidth(box.subtitle, 11)) + 28,
      }))
      .sort((a, b) => a.box.position - b.box.position || b.box.influence - a.box.influence);
    width = Math.max(
      width,
      members.reduce((sum, each) => sum + each.width + BOX_GAP, BOX_GAP),
    );
    return members;
  });
  const places = new Map();
  for (const members of rows) {
    let left = BOX_GAP;
    for (const each of members) {
      const wanted = high > low ? 90 + ((each.box.position - low) / (high - low)) * (width - 180) : width / 2;
      each.x = Math.max(wanted, left + each.width / 2);
      left = each.x + each.width / 2 + BOX_GAP;
    }
    let right = width - BOX_GAP;
    for (const each of members.reverse()) {
      each.x = Math.min(each.x, right - each.width / 2);
      right = each.x - each.width / 2 - BOX_GAP;
      places.set(boxes.indexOf(each.box), { x: each.x, y: each.y, r: BOX_HEIGHT / 2, width: each.width, height: each.height });
    }
  }
  return { places, width, height };
}

// A supernode or a pinned node with its name.
function drawBox(box, place, number) {
  const { x, y, width, height } = place,
    left = x - width / 2,
    top = y - height / 2;
  const colours =
    box.supernode === null
      ? { fill: FILLS[box.kind], stroke: INK }
      : { fill: SUPERNODE_FILLS[box.supernode % 7], stroke: SUPERNODE_LINES[box.supernode % 7] };
  const ink = box.supernode === null && box.kind === TARGET ? "#fff" : INK;
  const group = mark("g", {
    class: "node box",
    "data-box": number,
    role: "button",
    tabindex: -1,
    "aria-label": `${box.title}, ${box.subtitle}`,
  });
  if (box.supernode !== null)
    group.append(mark("rect", { x: left + 4, y: top - 4, width, height, rx: 7, ...colours, "fill-opacity": 0.55 }));
  group.append(
    mark("rect", {
      x: left,
      y: top,
      width,
      height,
      rx: box.supernode === null && box.kind === FEATURE ? height / 2 : 7,
      ...colours,
      "stroke-width": 1.4,
    }),
  );
  group.append(
    words(x, y - 2, box.title, { "text-anchor": "middle", "font-weight": 600, "font-size": 13, fill: ink, "xml:space": "preserve" }),
  );
  group.append(
    words(x, y + 13, box.subtitle, { "text-anchor": "middle", "font-size": 11, fill: ink, "fill-opacity": 0.75, "xml:space": "preserve" }),
  );
  return group;
}

// The weights of the strongest edges, at their middles.
function drawWeights(edges, places) {
  return edges.slice(0, MOST_WEIGHTS).map((edge) => {
    const from = places.get(edge.source),
      to = places.get(edge.target);
    return words((from.x + to.x) / 2, (from.y + to.y) / 2 + 4, signed(edge.weight, 2), {
      "text-anchor": "middle",
      "font-size": 11,
      "font-weight": 600,
      fill: edge.weight < 0 ? "#a34700" : "#00568a",
      stroke: "#fff",
      "stroke-width": 3.5,
      "paint-order": "stroke",
    });
  });
}
