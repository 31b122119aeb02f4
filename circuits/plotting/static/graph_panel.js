// @ts-check
"use strict";
// The column beside the picture: what is selected with its strongest inputs and outputs, pinned nodes, supernodes.

const FEATURES_LISTED = 14;
const LONGEST_NAME = 200;
const BARS = { positive: "#c9e2f4", negative: "#fbd9c2", quiet: "#e6e9ee" };

// Elements of the page. Text is always set as text.
function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function signed(value, digits = 4) {
  const text = value && Math.abs(value) < 0.001 ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
  return value > 0 ? `+${text}` : text;
}

const count = (number) => number.toLocaleString("en-US");

// A node's name, and the token it stands at.
function nodeWords(node, about) {
  if (node.kind === TARGET) return [targetLabel(node, about), `target @${node.position}`];
  if (node.kind === EMBEDDING) return [tokenText(about.words[node.position], LONGEST_LABEL), `token @${node.position}`];
  return [node.name.split("@")[0], `@${node.position} ${tokenText(about.words[node.position])}`];
}

function drawSelection(place, state, about, act) {
  const { selected, edges } = state;
  if (!selected) {
    const hint = "Point at a node to see its strongest edges; click it to keep them and list them here.";
    place.replaceChildren(make("h2", {}, "Most influential features"), make("p", { class: "hint" }, hint), topFeatures(state, about, act));
    return;
  }
  place.replaceChildren(
    ...(selected.supernode ? supernodeHead(selected, state) : nodeHead(state.known.get(selected.ids[0]), state, about, act)),
  );
  if (!edges) return;
  place.append(
    constantsLine(edges.constants, about),
    edgeTable("Inputs", edges.incoming, about, act),
    edgeTable("Outputs", edges.outgoing, about, act),
  );
}

// Where to begin, as long as nothing is selected.
function topFeatures(state, about, act) {
  const features = state.view.nodes
    .filter((node) => node.kind === FEATURE)
    .sort(byFalling((node) => node.influence))
    .slice(0, FEATURES_LISTED);
  const head = ["feature", "influence", "activation"].map((name) =>
    make("th", { scope: "col", class: name === "feature" ? null : "number" }, name),
  );
  const rows = features.map((node) => {
    const cell = nodeCell(node, node.influence / features[0].influence, BARS.quiet, about, act);
    const numbers = [percent(shareOf(node, about)), String(Number(node.activation.toPrecision(3)))].map((text) =>
      make("td", { class: "number" }, text),
    );
    return make(
      "tr",
      { "data-id": node.id, onpointerenter: () => act.point(node.id), onpointerleave: () => act.point(null) },
      cell,
      ...numbers,
    );
  });
  return make("div", { class: "edges-of" }, make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
}

// A node to be clicked, over a bar.
function nodeCell(node, share, colour, about, act) {
  const [name, where] = nodeWords(node, about);
  const words_ = [make("span", { class: node.kind <= ERROR ? "name" : "" }, name), " ", make("small", {}, where)];
  const cell = make("td", {}, make("button", { type: "button", onclick: () => act.select(node.id) }, ...words_));
  cell.style.backgroundImage = `linear-gradient(${colour}, ${colour})`;
  cell.style.backgroundSize = `${100 * share}% 100%`;
  return cell;
}

function supernodeHead(selected, state) {
  const names = selected.ids.map((id) => state.known.get(id).name).join(", ");
  return [
    make("h2", {}, selected.supernode.name),
    make("p", { class: "facts" }, `Supernode of ${names}. Weights are sums over its members.`),
  ];
}

function nodeHead(node, state, about, act) {
  const facts = [
    ["layer", node.kind <= ERROR ? node.layer : null],
    ["activation", node.kind === FEATURE ? Number(node.activation.toPrecision(4)) : null],
  ];
  const about_ = about.targets[node.kind === TARGET ? node.index : 0];
  if (node.kind === TARGET) facts.push([about_?.token === null ? "weight" : "probability", percent(node.probability)]);
  else facts.push(["influence", `${percent(shareOf(node, about))}, rank ${count(node.rank)} of ${count(about.total.nodes)}`]);
  const supernode = state.supernodes.find((one) => one.nodes.has(node.id));
  if (supernode) facts.push(["supernode", supernode.name]);
  const [name, where] = nodeWords(node, about);
  const pinned = state.pinned.has(node.id),
    marked = state.chosen.has(node.id);
  return [
    make("h2", {}, make("span", { class: node.kind <= ERROR ? "name" : "" }, name), " ", make("small", {}, where)),
    make(
      "dl",
      { class: "facts" },
      ...[["kind", KINDS[node.kind]], ...facts]
        .filter(([, value]) => value !== null)
        .map(([key, value]) => make("div", {}, make("dt", {}, key), make("dd", {}, String(value)))),
    ),
    make(
      "div",
      { class: "buttons" },
      make("button", { type: "button", "aria-pressed": String(pinned), onclick: () => act.pin(node.id) }, pinned ? "Unpin" : "Pin"),
      make(
        "button",
        { type: "button", "aria-pressed": String(marked), onclick: () => act.choose(node.id) },
        marked ? "Unmark" : "Mark to group",
      ),
    ),
  ];
}

function constantsLine(constants, about) {
  const parts = about.constant_names.map((name, column) => [name.replaceAll("_", " "), constants[column]]).filter(([, value]) => value);
  if (!parts.length) return "";
  return make(
    "p",
    { class: "facts", title: "These and all edges in sum to the pre-activation" },
    `Besides edges: ${parts.map(([name, value]) => `${name} ${signed(value, 3)}`).join(", ")}`,
  );
}

function edgeTable(title, { ends, total }, about, act) {
  const edges = total > ends.length ? `the strongest ${ends.length} of ${count(total)}` : total === 1 ? "1 edge" : `${count(total)} edges`;
  // A page that holds only some of a graph's edges cannot speak for the others.
  const heading = make("h3", {}, title, " ", make("small", {}, `${edges}${about.whole ? "" : " in this page"}`));
  const section = make("div", { class: "edges-of", "data-side": title.toLowerCase() }, heading);
  if (!ends.length) return section;
  const largest = Math.abs(ends[0].weight) || 1;
  const head = ["node", "weight", "direct", "attention"].map((name) =>
    make("th", { scope: "col", class: name === "node" ? null : "number" }, name),
  );
  const rows = ends.map((end) => {
    const attention = end.weight - end.direct;
    const cell = nodeCell(end.node, Math.abs(end.weight) / largest, end.weight < 0 ? BARS.negative : BARS.positive, about, act);
    const numbers = [end.weight, end.direct, attention].map((value) =>
      make("td", { class: "number", "data-value": value }, signed(value, 3)),
    );
    return make(
      "tr",
      {
        "data-id": end.node.id,
        "data-node": end.node.name,
        onpointerenter: () => act.point(end.node.id),
        onpointerleave: () => act.point(null),
      },
      cell,
      ...numbers,
    );
  });
  section.append(make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
  if (total > ends.length) section.append(make("button", { type: "button", class: "more", onclick: () => act.listMore() }, "More"));
  return section;
}

function drawGroups(place, state, about, act) {
  const parts = [];
  if (state.chosen.size) {
    parts.push(
      make(
        "div",
        { class: "marked" },
        make("p", {}, `${state.chosen.size} marked: ${[...state.chosen].map((id) => state.known.get(id).name).join(", ")}`),
        make(
          "div",
          { class: "buttons" },
          make("button", { type: "button", id: "make-supernode", onclick: () => act.group(state.chosen) }, "Group into a supernode"),
          make("button", { type: "button", onclick: () => act.unmark() }, "Unmark all"),
        ),
      ),
    );
  }
  if (state.supernodes.length)
    parts.push(
      make("h3", {}, "Supernodes"),
      make("ul", { class: "supernodes" }, ...state.supernodes.map((one, number) => supernodeEntry(one, number, act))),
    );
  const loose = [...state.pinned].filter((id) => !state.supernodes.some((one) => one.nodes.has(id)));
  if (state.pinned.size) {
    parts.push(
      make("h3", {}, "Pinned"),
      make("ul", { class: "pinned" }, ...[...state.pinned].map((id) => pinnedEntry(state.known.get(id), about, act))),
    );
    if (loose.length > 1)
      parts.push(
        make(
          "button",
          { type: "button", id: "group-pinned", onclick: () => act.group(new Set(loose)) },
          `Group the ${loose.length} pinned nodes`,
        ),
      );
  }
  place.replaceChildren(...parts);
}

function supernodeEntry(one, number, act) {
  const swatch = make("span", { class: "swatch" });
  swatch.style.background = SUPERNODE_FILLS[number % SUPERNODE_FILLS.length];
  swatch.style.borderColor = SUPERNODE_LINES[number % SUPERNODE_LINES.length];
  const name = make("input", {
    type: "text",
    value: one.name,
    maxlength: LONGEST_NAME,
    "aria-label": "Name of the supernode",
    onchange: (event) => act.rename(one, event.target.value),
  });
  return make(
    "li",
    {},
    swatch,
    name,
    make("button", { type: "button", onclick: () => act.selectSupernode(one) }, `${one.nodes.size} node${one.nodes.size > 1 ? "s" : ""}`),
    make("button", { type: "button", "aria-label": `Ungroup ${one.name}`, onclick: () => act.ungroup(one) }, "Ungroup"),
  );
}

function pinnedEntry(node, about, act) {
  const [name, where] = nodeWords(node, about);
  return make(
    "li",
    {},
    make(
      "button",
      { type: "button", onclick: () => act.select(node.id) },
      make("span", { class: node.kind <= ERROR ? "name" : "" }, name),
      " ",
      make("small", {}, where),
    ),
    make("button", { type: "button", "aria-label": `Unpin ${node.name}`, title: "Unpin", onclick: () => act.pin(node.id) }, "\u00d7"),
  );
}

// What a pointer at a node says at once, before anything is clicked.
function tipText(node, edges, about) {
  const [name, where] = nodeWords(node, about);
  const lines = [
    `${name}  ${where}`,
    node.kind === TARGET ? "" : `influence ${percent(shareOf(node, about))}, rank ${count(node.rank)}`,
  ].filter(Boolean);
  for (const [title, side] of edges
    ? [
        ["in", edges.incoming],
        ["out", edges.outgoing],
      ]
    : []) {
    if (!side.ends.length) continue;
    lines.push(
      `${title}: ${count(side.total)}`,
      ...side.ends.slice(0, 4).map((end) => `  ${signed(end.weight, 3).padEnd(8)} ${nodeWords(end.node, about).join(" ")}`),
    );
  }
  return lines.join("\n");
}

function edgeTip(edge, name) {
  const { source, target, weight, direct } = edge.dataset;
  const parts = `direct ${signed(Number(direct), 3)}, attention ${signed(weight - direct, 3)}`;
  return `${name(source)} \u2192 ${name(target)}\n${signed(Number(weight))}  ${parts}`;
}
