// @ts-check
"use strict";
// The picture: drawn from a state, lit up around what is pointed at or selected.

const DIMMED = 0.22,
  MOST_NAMES = 90,
  MOST_ENDS_NAMED = 24,
  REACH = 10;
const QUIET_EDGES = { thin: 0.4, thick: 2.4, faint: 0.07, strong: 0.5 };
const LIT_EDGES = { thin: 0.8, thick: 6.5, faint: 0.45, strong: 0.9 };
const MIDDLE = "supernode"; // where edges of a supernode end in the whole graph: amid its members

const NOTHING_PINNED =
  "Nothing is pinned yet: pin nodes (P) or mark several (Shift+click) and group them (G), and see here what goes on between them.";

class Picture {
  constructor(stage, about) {
    this.stage = stage;
    this.about = about;
    this.svg = null;
    this.drawnAt = "";
    this.places = new Map();
    this.guests = new Map();
    stage.addEventListener("scroll", () => this.stick());
  }

  size(zoom) {
    return { width: (this.stage.clientWidth - 2) * zoom, height: (this.stage.clientHeight - 4) * zoom };
  }

  // Whether the picture was drawn for the stage's present size.
  fits() {
    return this.drawnAt === this.stageSize();
  }

  stageSize() {
    return `${this.stage.clientWidth} ${this.stage.clientHeight}`;
  }

  drawGraph(state, nodes) {
    const layout = placed(nodes, this.about, this.size(state.zoom));
    this.places = layout.places;
    this.nodes = nodes;
    this.layout = layout;
    this.quiet = mark("g", { class: "edges" }, ...drawEdges(state.view.edges, layout.places, QUIET_EDGES));
    this.lit = mark("g", { class: "edges lit" });
    this.called = mark("g", { class: "nodes guests" });
    this.names = mark("g", { class: "names" });
    const marks = mark(
      "g",
      { class: "nodes" },
      ...nodes.map((node) => drawNode(node, layout.places.get(node.id), this.about, looksOf(node, state))),
    );
    this.replace(layout, [
      drawFrame(layout),
      this.quiet,
      this.lit,
      marks,
      this.called,
      this.names,
      drawTokenAxis(layout),
      drawLayerAxis(layout),
    ]);
  }

  drawSubgraph(state, boxes, edges) {
    if (!boxes.length) return this.drawNothing();
    const layout = placedBoxes(boxes, this.size(state.zoom));
    this.places = layout.places;
    this.guests = new Map();
    this.layout = null;
    this.boxes = boxes;
    this.quiet = mark("g", { class: "edges" }, ...drawEdges(edges, layout.places, LIT_EDGES));
    const marks = mark("g", { class: "nodes" }, ...boxes.map((box, number) => drawBox(box, layout.places.get(number), number)));
    this.names = mark("g", { class: "names" }, ...drawWeights(edges, layout.places));
    this.replace(layout, [this.quiet, marks, this.names]);
  }

  drawNothing() {
    Object.assign(this, {
      svg: null,
      places: new Map(),
      guests: new Map(),
      marks: new Map(),
      layout: null,
      boxes: [],
      quiet: { children: [] },
    });
    this.drawnAt = this.stageSize();
    this.stage.replaceChildren(make("p", { class: "empty" }, NOTHING_PINNED));
  }

  replace({ width, height }, parts) {
    const active = /** @type {HTMLElement | SVGElement} */ (document.activeElement);
    const focused = this.svg?.contains(active) ? active.dataset : null;
    const label = "Attribution graph; arrow keys go from node to node";
    this.svg = mark(
      "svg",
      { width, height, viewBox: `0 0 ${width.toFixed(1)} ${height.toFixed(1)}`, role: "group", "aria-label": label, "font-family": SANS },
      ...parts,
    );
    this.drawnAt = this.stageSize();
    this.stage.replaceChildren(this.svg);
    this.marks = new Map(
      [...this.svg.querySelectorAll(".node")].map((element) => [Number(element.dataset.id ?? element.dataset.box), element]),
    );
    const first = (focused && this.marks.get(Number(focused.id ?? focused.box))) ?? [...this.marks.values()].at(-1);
    first?.setAttribute("tabindex", 0);
    if (focused) first?.focus({ preventScroll: true });
    this.stick();
  }

  // Light up some nodes taken as one, with edges to and from them; without, everything.
  light(state, ids, edges) {
    if (!this.layout) return this.lightBox(ids);
    const ends = edges ? [...edges.incoming.ends, ...edges.outgoing.ends] : [];
    const lit = new Set([...ids, ...ends.map((end) => end.node.id)]);
    this.callGuests(state, lit);
    for (const [id, element] of this.marks) element.setAttribute("opacity", !ids.length || lit.has(id) || state.found.has(id) ? 1 : DIMMED);
    this.quiet.setAttribute("opacity", ids.length ? 0.12 : 1);
    this.lit.replaceChildren(...(edges ? drawEdges(this.edgesOf(ids, edges), new Map([...this.places, ...this.guests]), LIT_EDGES) : []));
    this.names.replaceChildren(...drawLabels(this.labels(state, ids, ends)));
    const positions = new Set(ids.map((id) => state.known.get(id).position));
    for (const label of this.svg.querySelectorAll(".tokens text"))
      label.setAttribute("font-weight", positions.has(Number(label.dataset.position)) ? 700 : 400);
  }

  // What is lit but was pruned away comes in beside what is there, and nothing moves.
  callGuests(state, lit) {
    this.guests = new Map();
    const { columns, layers, step } = this.layout;
    for (const id of lit) {
      const node = state.known.get(id);
      if (this.places.has(id) || node.kind > ERROR) continue;
      const taken = [...this.places.values(), ...this.guests.values()];
      this.guests.set(id, {
        ...freePlace(taken, columns[node.position].middle, layers[node.layer], step, this.layout.width),
        r: step * 0.25,
      });
    }
    this.called.replaceChildren(
      ...[...this.guests].map(([id, place]) =>
        drawNode(state.known.get(id), place, this.about, { ...looksOf(state.known.get(id), state), guest: true }),
      ),
    );
  }

  lightBox(ids) {
    const number = ids.length ? this.boxes.findIndex((box) => ids.every((id) => box.ids.includes(id))) : -1;
    const near = new Set([number]);
    for (const edge of this.quiet.children) {
      const ends = [Number(edge.dataset.source), Number(edge.dataset.target)],
        lit = number < 0 || ends.includes(number);
      edge.setAttribute("opacity", lit ? 1 : DIMMED);
      if (lit) for (const end of ends) near.add(end);
    }
    for (const [box, element] of this.marks) element.setAttribute("opacity", number < 0 || near.has(box) ? 1 : DIMMED);
  }

  edgesOf(ids, { incoming, outgoing }) {
    const own = ids.length === 1 ? ids[0] : MIDDLE;
    if (own === MIDDLE) {
      const members = ids.map((id) => this.places.get(id)).filter(Boolean);
      const mean = (measure) => members.reduce((sum, place) => sum + measure(place), 0) / members.length;
      this.places.set(MIDDLE, { x: mean((place) => place.x), y: mean((place) => place.y), r: 0 });
    }
    const edges = [
      ...incoming.ends.map((end) => ({ ...end, source: end.node.id, target: own })),
      ...outgoing.ends.map((end) => ({ ...end, source: own, target: end.node.id })),
    ];
    return edges;
  }

  // What is named in the picture: supernodes, then what is lit or pinned, then the most influential; as far as there is room.
  labels(state, ids, ends) {
    const label = (node, more) => {
      const place = this.places.get(node.id) ?? this.guests.get(node.id);
      return place && node.kind <= ERROR ? [{ ...place, text: node.name.split("@")[0], size: 11, own: [node.id], ...more }] : [];
    };
    const supernodes = state.supernodes.flatMap((one, number) => {
      const members = [...one.nodes].filter((id) => this.places.has(id)).sort((a, b) => this.places.get(a).x - this.places.get(b).x);
      const amid = members[members.length >> 1],
        look = { size: 12.5, font: SANS, weight: 700, colour: SUPERNODE_LINES[number % 7], over: true };
      return members.length ? [{ ...this.places.get(amid), text: one.name, own: [amid], ...look }] : [];
    });
    const own = ids.length === 1 ? label(state.known.get(ids[0]), { weight: 700, size: 12 }) : [];
    const strongest = ends
      .slice()
      .sort(byFalling((end) => Math.abs(end.weight)))
      .slice(0, MOST_ENDS_NAMED)
      .flatMap((end) => label(end.node, {}));
    const pinned = [...state.pinned].flatMap((id) => label(state.known.get(id), { weight: 600 }));
    const rest = ids.length
      ? []
      : this.nodes
          .filter((node) => node.kind === FEATURE)
          .sort(byFalling((node) => node.influence))
          .slice(0, MOST_NAMES)
          .flatMap((node) => label(node, { colour: QUIET, size: 10 }));
    const seen = new Set(),
      wanted = [...supernodes, ...own, ...pinned, ...strongest, ...rest].filter((one) => {
        const key = `${one.x} ${one.y} ${one.text}`;
        return !seen.has(key) && seen.add(key);
      });
    const inTheWay = (id) => id !== MIDDLE && (!ids.length || this.marks.get(id)?.getAttribute("opacity") === "1" || this.guests.has(id));
    const places = new Map([...this.places, ...this.guests].filter(([id]) => inTheWay(id)));
    return placedLabels(wanted, places, this.layout.width, this.layout.bottom);
  }

  // The axes stay in view when the picture is larger than the window.
  stick() {
    const { stage, svg, layout } = this;
    if (!svg || !layout) return;
    svg.querySelector(".layers").setAttribute("transform", `translate(${stage.scrollLeft} 0)`);
    svg
      .querySelector(".tokens")
      .setAttribute("transform", `translate(0 ${Math.min(0, stage.scrollTop + stage.clientHeight - layout.height)})`);
  }

  // Scroll a node into view, where it is not.
  reveal(id) {
    const place = this.places.get(id) ?? this.guests.get(id),
      { stage } = this;
    if (!place) return;
    const away = (at, start, length) => at < start + GUTTER || at > start + length - GUTTER;
    if (away(place.x, stage.scrollLeft, stage.clientWidth)) stage.scrollLeft = place.x - stage.clientWidth / 2;
    if (away(place.y, stage.scrollTop, stage.clientHeight)) stage.scrollTop = place.y - stage.clientHeight / 2;
  }

  // The node at or near a point, by its number; null where there is none.
  at(event) {
    const element = event.target.closest?.(".node");
    if (element) return Number(element.dataset.id ?? element.dataset.box);
    if (!this.svg || event.target.closest?.(".edge")) return null;
    const { left, top } = this.svg.getBoundingClientRect(),
      x = event.clientX - left,
      y = event.clientY - top;
    let nearest = null,
      least = REACH;
    for (const [id, place] of [...this.places, ...this.guests]) {
      const distance = Math.hypot(place.x - x, place.y - y) - place.r;
      if (id !== MIDDLE && distance < least) [nearest, least] = [id, distance];
    }
    return nearest;
  }

  // From a node to the next one in a direction: near, and rather straight on than aside.
  next(id, key) {
    const from = this.places.get(id),
      [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    let best = null,
      least = Infinity;
    for (const [other, place] of this.places) {
      const along = (place.x - from.x) * dx + (place.y - from.y) * dy,
        aside = Math.abs((place.x - from.x) * dy) + Math.abs((place.y - from.y) * dx);
      if (other !== MIDDLE && along > 0.5 && along + 3 * aside < least) [best, least] = [other, along + 3 * aside];
    }
    return best;
  }
}

// The free place nearest to the middle of a cell.
function freePlace(taken, middle, { top, bottom }, step, width) {
  const y = (top + bottom) / 2,
    rows = [0, -1, 1].filter((row) => y + row * step > top && y + row * step < bottom);
  for (let aside = 0; aside < 15; aside += 1) {
    for (const row of rows) {
      for (const side of aside ? [1, -1] : [1]) {
        const spot = { x: middle + side * aside * step, y: y + row * step };
        const inside = spot.x > GUTTER && spot.x < width - RIGHT / 2;
        if (inside && !taken.some((place) => Math.hypot(place.x - spot.x, place.y - spot.y) < step * 0.95)) return spot;
      }
    }
  }
  return { x: middle, y };
}

function looksOf(node, state) {
  const supernode = state.supernodes.findIndex((one) => one.nodes.has(node.id));
  return {
    supernode: supernode < 0 ? null : supernode,
    supernodeName: state.supernodes[supernode]?.name,
    pinned: state.pinned.has(node.id),
    chosen: state.chosen.has(node.id),
    found: state.found.has(node.id),
    selected: Boolean(state.selected?.ids.includes(node.id)),
  };
}
