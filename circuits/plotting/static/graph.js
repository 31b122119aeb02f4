// @ts-check
"use strict";
// The page: what the reader does, what is drawn then, and what is kept of it.

const EDGES_LISTED = 10;
const EDGES_MORE = 40;
const SAVE_DELAY = 300;
const POINT_DELAY = 60;
const REMEMBERED = 400;

class GraphPage {
  constructor(source, store, about) {
    this.source = source;
    this.store = store;
    this.about = about;
    this.turn = 0;
    this.pointed = null;
    this.answers = new Map();
    this.edited = false;
    // Nodes go by their numbers; `known` has what is known of each.
    this.state = {
      view: { nodes: [], edges: [], kept: { nodes: 0, edges: 0 } },
      known: new Map(),
      pinned: new Set(),
      supernodes: [],
      chosen: new Set(),
      found: new Set(),
      selected: null,
      edges: null,
      most: EDGES_LISTED,
      subgraph: false,
      zoom: 1,
    };
    /** @type {Record<string, any>} */
    this.elements = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
    this.picture = new Picture(this.elements.stage, about);
    this.tip = document.body.appendChild(make("div", { class: "tip", hidden: true }));
  }

  async start() {
    await this.load();
    startInput(this);
    startSearch(this);
    await this.refresh();
    const targets = this.state.view.nodes.filter((node) => node.kind === TARGET);
    if (targets.length) this.picture.reveal(targets.sort(byFalling((node) => node.probability))[0].id);
    document.body.dataset.ready = "true";
  }

  remember(nodes) {
    for (const node of nodes) this.state.known.set(node.id, node);
  }

  say(text, failed = false) {
    this.elements.kept.textContent = text;
    this.elements.kept.classList.toggle("failed", failed);
  }

  tell(error) {
    this.say(error.message, true);
  }

  // Run what may have to wait for the server, and say what went wrong.
  run(promise) {
    promise.catch((error) => this.tell(error));
  }

  thresholds() {
    return ["node-threshold", "edge-threshold"].map((id) => Number(this.elements[id].value));
  }

  async refresh() {
    const turn = ++this.turn;
    const [nodes, edges] = this.thresholds();
    document.querySelector("output[for=node-threshold]").textContent = `${Math.round(100 * nodes)} %`;
    document.querySelector("output[for=edge-threshold]").textContent = `${Math.round(100 * edges)} %`;
    const view = await this.source.view(nodes, edges);
    if (turn !== this.turn) return;
    this.state.view = view;
    this.remember(view.nodes);
    if (this.elements.kept.classList.contains("failed") && !this.edited) this.say("");
    await this.draw();
  }

  // Everything anew: the picture and the column beside it.
  async draw() {
    const { state } = this;
    if (state.subgraph) {
      const boxes = boxesOf(state, this.about);
      const edges = edgesBetween(boxes, await this.source.between(boxes.flatMap((box) => box.ids)));
      if (!state.subgraph) return;
      this.picture.drawSubgraph(state, boxes, edges);
    } else {
      const shown = new Set(state.view.nodes.map((node) => node.id));
      const members = state.supernodes.flatMap((one) => [...one.nodes]);
      const more = [...new Set([...state.pinned, ...state.chosen, ...members])].filter((id) => !shown.has(id));
      this.picture.drawGraph(state, [...state.view.nodes, ...more.map((id) => state.known.get(id))]);
    }
    this.elements.shown.textContent = state.subgraph ? "An edge is the sum over the members of its ends" : this.counts();
    drawSelection(this.elements.selection, state, this.about, this);
    drawGroups(this.elements.groups, state, this.about, this);
    this.elements["show-graph"].setAttribute("aria-pressed", String(!state.subgraph));
    this.elements["show-subgraph"].setAttribute("aria-pressed", String(state.subgraph));
    await this.light();
  }

  counts() {
    const { view } = this.state;
    const part = (shown, kept, all, name) =>
      shown < kept
        ? `the ${count(shown)} most influential of ${count(kept)} kept ${name} (${count(all)} in all)`
        : `${count(shown)} of ${count(all)} ${name}`;
    const nodes = part(this.picture.nodes.length, view.kept.nodes, this.about.total.nodes, "nodes");
    return `Drawn: ${nodes}, ${part(view.edges.length, view.kept.edges, this.about.total.edges, "edges")}`;
  }

  // Pointing and selecting

  async ask(ids, most) {
    const key = `${ids.join()} ${most}`;
    if (this.answers.size > REMEMBERED) this.answers.clear();
    if (!this.answers.has(key)) this.answers.set(key, await this.source.around(ids, most));
    const edges = this.answers.get(key);
    this.remember([...edges.incoming.ends, ...edges.outgoing.ends].map((end) => end.node));
    return edges;
  }

  // The pointer came to a node or box, or left it; not every one that it runs across lights up.
  point(number, event) {
    if (number === this.pointed) return;
    this.pointed = number;
    clearTimeout(this.pointing);
    this.pointing = setTimeout(() => this.run(this.light(event)), number === null ? 0 : POINT_DELAY);
  }

  async light(event) {
    const { state, pointed } = this;
    const ids = pointed === null ? (state.selected?.ids ?? []) : this.idsAt(pointed);
    const edges = pointed === null ? state.edges : await this.ask(ids, EDGES_LISTED);
    if (pointed !== this.pointed) return;
    this.picture.light(state, ids, edges);
    for (const row of this.elements.selection.querySelectorAll("tr[data-id]"))
      row.classList.toggle("lit", Number(row.dataset.id) === pointed);
    if (event && ids.length === 1) this.showTip(tipText(state.known.get(ids[0]), edges, this.about), event);
  }

  // The subgraph's boxes are numbered, and may stand for several nodes.
  idsAt(number) {
    return this.state.subgraph ? (this.picture.boxes[number]?.ids ?? [number]) : [number];
  }

  clicked(number, several) {
    if (!this.state.subgraph) return several ? this.choose(number) : this.select(number);
    const box = this.picture.boxes[number];
    return box.supernode === null ? this.select(box.ids[0]) : this.selectSupernode(this.state.supernodes[box.supernode]);
  }

  select(id) {
    this.run(this.selectIds(id === null ? null : { ids: [id] }, EDGES_LISTED));
  }

  selectSupernode(supernode) {
    this.run(this.selectIds({ ids: [...supernode.nodes], supernode }, EDGES_LISTED));
  }

  listMore() {
    this.run(this.selectIds(this.state.selected, this.state.most + EDGES_MORE));
  }

  async selectIds(selected, most) {
    const edges = selected && (await this.ask(selected.ids, most));
    Object.assign(this.state, { selected, edges, most });
    this.pointed = null;
    await this.draw();
    if (selected?.ids.length === 1) this.picture.reveal(selected.ids[0]);
    if (most === EDGES_LISTED) this.elements.selection.parentElement.scrollTop = 0;
  }

  // Mark a node, to be grouped with others.
  choose(id) {
    const { chosen } = this.state;
    if (!chosen.delete(id)) chosen.add(id);
    this.run(this.draw());
  }

  unmark() {
    this.state.chosen.clear();
    this.run(this.draw());
  }

  found(ids) {
    this.state.found = new Set(ids);
    this.run(this.draw());
  }

  showTip(text, event) {
    const { tip } = this;
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 16, innerWidth - tip.offsetWidth - 8))}px`;
    const under = event.clientY + 16 + tip.offsetHeight < innerHeight;
    tip.style.top = `${under ? event.clientY + 16 : Math.max(4, event.clientY - tip.offsetHeight - 14)}px`;
  }

  // Pins and supernodes

  pin(id) {
    const { pinned } = this.state;
    if (!pinned.delete(id)) pinned.add(id);
    this.changed();
  }

  group(ids) {
    if (!ids.size) return;
    const { state } = this;
    for (const one of state.supernodes) for (const id of ids) one.nodes.delete(id);
    state.supernodes = state.supernodes.filter((one) => one.nodes.size);
    const names = new Set(state.supernodes.map((one) => one.name));
    let number = state.supernodes.length + 1;
    while (names.has(`supernode ${number}`)) number += 1;
    state.supernodes.push({ name: `supernode ${number}`, nodes: new Set(ids) });
    state.chosen = new Set();
    this.changed();
    /** @type {HTMLInputElement | undefined} */
    const name = [...this.elements.groups.querySelectorAll(".supernodes input")].at(-1);
    name?.focus();
    name?.select();
  }

  ungroup(supernode) {
    const { state } = this;
    state.supernodes = state.supernodes.filter((one) => one !== supernode);
    if (state.selected?.supernode === supernode) Object.assign(state, { selected: null, edges: null });
    this.changed();
  }

  rename(supernode, name) {
    supernode.name = name.trim().slice(0, LONGEST_NAME) || supernode.name;
    this.changed();
  }

  changed() {
    this.run(this.draw());
    this.keep();
  }

  // Keeping

  async load() {
    const kept = await this.store.load();
    this.remember(kept.nodes);
    const numbers = new Map(kept.nodes.map((node) => [node.name, node.id]));
    const ids = (names) => (names ?? []).map((name) => numbers.get(name)).filter((id) => id !== undefined);
    const supernodes = (kept.supernodes ?? []).map((one) => ({ name: one.name, nodes: new Set(ids(one.nodes)) }));
    this.state.pinned = new Set(ids(kept.pinned));
    this.state.supernodes = supernodes.filter((one) => one.nodes.size);
    if (kept.node_threshold !== undefined) this.elements["node-threshold"].value = kept.node_threshold;
    if (kept.edge_threshold !== undefined) this.elements["edge-threshold"].value = kept.edge_threshold;
  }

  keep() {
    this.edited = true;
    clearTimeout(this.saving);
    this.saving = setTimeout(() => this.save(), SAVE_DELAY);
  }

  async save() {
    if (!this.edited) return;
    this.edited = false;
    clearTimeout(this.saving);
    const { state, store } = this;
    const names = (ids) => [...ids].map((id) => state.known.get(id).name);
    const supernodes = state.supernodes.map((one) => ({ name: one.name, nodes: names(one.nodes) }));
    const [nodes, edges] = this.thresholds();
    try {
      await store.save({ pinned: names(state.pinned), supernodes, node_threshold: nodes, edge_threshold: edges });
      this.say(`Pins, supernodes and thresholds are kept ${store.where}.`);
    } catch (error) {
      this.edited = true;
      this.tell(new Error(`Not kept ${store.where}: ${error.message}`));
    }
  }
}

function startPage() {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const about = read("about");
  const held = read("held");
  about.whole = !held || held.edges.source.length === about.total.edges;
  const source = held ? new HeldGraph(held, about) : new ServedGraph(about);
  const page = new GraphPage(source, held ? new BrowserStore(source) : new ServerStore(source), about);
  drawLegend(document.querySelector(".legend"));
  page.run(page.start());
}

startPage();
