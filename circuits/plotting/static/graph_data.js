// @ts-check
"use strict";
// Nodes, edges and pruning of what the page holds itself. Pruning is circuits/attribution/influence.py's, which a test compares it with.

const FEATURE = 0,
  ERROR = 1,
  EMBEDDING = 2,
  TARGET = 3;
const KINDS = ["feature", "error", "token", "target"];
const DRAWN_EDGES = 1000;

// Columns to one object a row.
function rowsOf(columns) {
  const names = Object.keys(columns);
  return columns[names[0]].map((_, row) => Object.fromEntries(names.map((name) => [name, columns[name][row]])));
}

function byFalling(measure) {
  return (a, b) => measure(b) - measure(a);
}

// The largest value such that all scores from it up make the share `threshold` of `total`.
function cutAt(scores, threshold, total) {
  const ordered = Float64Array.from(scores).sort().reverse();
  let sum = 0;
  for (const score of ordered) {
    sum += score;
    if (sum >= threshold * total) return score;
  }
  return ordered.length ? ordered[ordered.length - 1] : 0;
}

class HeldGraph {
  constructor(held, about) {
    this.about = about;
    this.delay = 20;
    this.nodes = rowsOf(held.nodes);
    this.constants = held.constants;
    this.place = new Map(this.nodes.map((node, place) => [node.id, place]));
    this.byName = new Map(this.nodes.map((node) => [node.name, node]));
    const { source, target, weight, direct, influence } = held.edges;
    this.weight = weight;
    this.direct = direct;
    this.influence = influence;
    this.source = source.map((id) => this.place.get(id));
    this.target = target.map((id) => this.place.get(id));
    // Edges stand by target: those into node i are first[i] to first[i + 1].
    this.first = new Int32Array(this.nodes.length + 1);
    for (const target of this.target) this.first[target + 1] += 1;
    for (let i = 0; i < this.nodes.length; i += 1) this.first[i + 1] += this.first[i];
    const level = (node) => (node.kind === TARGET ? Infinity : node.layer);
    this.downwards = this.nodes
      .map((_, place) => place)
      .filter((place) => [FEATURE, TARGET].includes(this.nodes[place].kind))
      .sort((a, b) => (level(this.nodes[a]) === level(this.nodes[b]) ? 0 : level(this.nodes[b]) - level(this.nodes[a])));
  }

  async view(nodeThreshold, edgeThreshold) {
    const { nodes, edges } = this.pruned(nodeThreshold, edgeThreshold);
    const drawn = edges
      .slice()
      .sort(byFalling((edge) => this.influence[edge]))
      .slice(0, DRAWN_EDGES);
    return {
      nodes: this.nodes.filter((_, place) => nodes[place]),
      edges: drawn.map((edge) => this.edge(edge)),
      kept: { nodes: nodes.reduce((sum, kept) => sum + kept, 0), edges: edges.length },
    };
  }

  edge(edge) {
    const [source, target] = [this.source, this.target].map((ends) => this.nodes[ends[edge]].id);
    return { source, target, weight: this.weight[edge], direct: this.direct[edge], influence: this.influence[edge] };
  }

  // The most influential nodes, and of the edges between them those that carry most when shares are taken anew.
  pruned(nodeThreshold, edgeThreshold) {
    const cut = cutAt(
      this.nodes.map((node) => node.influence),
      nodeThreshold,
      this.about.total.influence ?? Number.POSITIVE_INFINITY, // undefined: keep all
    );
    const nodes = this.nodes.map((node) => Number(node.influence >= cut || node.kind === EMBEDDING || node.kind === TARGET));
    const { between, scores } = this.carried(nodes);
    const edgeCut = cutAt(
      scores,
      edgeThreshold,
      scores.reduce((sum, score) => sum + score, 0),
    );
    return this.withoutLooseEnds(
      nodes,
      between.filter((_, place) => scores[place] >= edgeCut),
    );
  }

  // Influence along each edge between some nodes, as if there were no others.
  carried(nodes) {
    const reached = new Float64Array(this.nodes.length),
      between = [],
      scores = [];
    for (const target of this.downwards) {
      if (!nodes[target]) continue;
      const into = [];
      let sum = 0;
      for (let edge = this.first[target]; edge < this.first[target + 1]; edge += 1) {
        if (!nodes[this.source[edge]]) continue;
        into.push(edge);
        sum += Math.abs(this.weight[edge]);
      }
      const here = reached[target] + this.nodes[target].probability;
      for (const edge of into) {
        const score = (Math.abs(this.weight[edge]) / Math.max(sum, 1e-10)) * here;
        reached[this.source[edge]] += score;
        between.push(edge);
        scores.push(score);
      }
    }
    return { between, scores };
  }

  // Features and errors that lead nowhere go, and features that come from nowhere.
  withoutLooseEnds(nodes, edges) {
    for (;;) {
      const out = new Uint8Array(nodes.length),
        into = new Uint8Array(nodes.length);
      for (const edge of edges) out[this.source[edge]] = into[this.target[edge]] = 1;
      const fewer = nodes.map((kept, place) => {
        const kind = this.nodes[place].kind;
        return Number(kept && (out[place] || kind > ERROR) && (into[place] || kind !== FEATURE));
      });
      if (fewer.every((kept, place) => kept === nodes[place])) return { nodes, edges };
      nodes = fewer;
      edges = edges.filter((edge) => fewer[this.source[edge]] && fewer[this.target[edge]]);
    }
  }

  // The strongest edges into and out of some nodes taken as one.
  async around(ids, most) {
    const inside = new Set(ids.map((id) => this.place.get(id)));
    const side = (near, far) => {
      const sums = new Map();
      for (let edge = 0; edge < near.length; edge += 1) {
        if (!inside.has(near[edge]) || inside.has(far[edge])) continue;
        const end = sums.get(far[edge]) ?? { node: this.nodes[far[edge]], weight: 0, direct: 0 };
        end.weight += this.weight[edge];
        end.direct += this.direct[edge];
        sums.set(far[edge], end);
      }
      const ends = [...sums.values()].sort(byFalling((end) => Math.abs(end.weight)));
      return { ends: ends.slice(0, most), total: ends.length };
    };
    const constants = this.about.constant_names.map((_, column) =>
      [...inside].reduce((sum, place) => sum + this.constants[place][column], 0),
    );
    return { incoming: side(this.target, this.source), outgoing: side(this.source, this.target), constants };
  }

  async between(ids) {
    const inside = new Set(ids.map((id) => this.place.get(id)));
    const edges = this.source.map((_, edge) => edge).filter((edge) => inside.has(this.source[edge]) && inside.has(this.target[edge]));
    return edges.sort(byFalling((edge) => Math.abs(this.weight[edge]))).map((edge) => this.edge(edge));
  }

  async search(text, most) {
    const wanted = text.trim().toLowerCase();
    const fits = wanted ? this.nodes.map((node) => [this.fit(node, wanted), node]).filter(([fit]) => fit) : [];
    fits.sort(([fitA, a], [fitB, b]) => fitA - fitB || b.influence - a.influence || a.id - b.id);
    return { nodes: fits.slice(0, most).map(([, node]) => node), found: fits.length };
  }

  // 1 best, 0 not at all; as in graph_data.py.
  fit(node, wanted) {
    const name = node.name.toLowerCase(),
      text = textOf(node, this.about).toLowerCase();
    if (name.startsWith(wanted)) return name === wanted ? 1 : 2;
    if (text.includes(wanted) && node.kind >= EMBEDDING) return 3;
    if (name.includes(wanted)) return 4;
    return text.includes(wanted) && node.kind === FEATURE ? 5 : 0;
  }
}

// The token at a node's position, or what a target is called.
function textOf(node, about) {
  return node.kind === TARGET ? about.targets[node.index].label : about.words[node.position];
}

// What the reader did, kept by this browser for this graph.
class BrowserStore {
  constructor(graph) {
    this.graph = graph;
    this.key = `circuits.graph.${graph.about.digest}`;
    this.where = "in this browser";
  }

  async load() {
    try {
      const kept = JSON.parse(localStorage.getItem(this.key)) ?? {};
      const names = [...(kept.pinned ?? []), ...(kept.supernodes ?? []).flatMap((one) => one.nodes)];
      return { ...kept, nodes: names.map((name) => this.graph.byName.get(name)).filter(Boolean) };
    } catch {
      return { nodes: [] };
    }
  }

  async save(kept) {
    localStorage.setItem(this.key, JSON.stringify(kept));
  }
}
