// @ts-check
"use strict";
// The same answers as HeldGraph and BrowserStore give, from the server that sent the page.

const MOST_KEPT_ALIVE = 60000; // bytes that browsers still send while a page is closing

class ServedGraph {
  constructor(about) {
    this.about = about;
    this.delay = 150;
  }

  async fetched(address, options) {
    let answer;
    try {
      answer = await fetch(address, options);
    } catch {
      throw new Error("The server does not answer; start circuits view again.");
    }
    if (!answer.ok) throw new Error((await answer.text()).trim());
    return answer.json();
  }

  async ask(address, values) {
    return this.fetched(`${address}?${new URLSearchParams(values)}`, {});
  }

  async view(nodeThreshold, edgeThreshold) {
    const values = { node_threshold: nodeThreshold, edge_threshold: edgeThreshold, max_nodes: 3000, max_edges: DRAWN_EDGES };
    const { nodes, edges, kept } = await this.ask("/api/nodes", values);
    return { nodes: rowsOf(nodes), edges: rowsOf(edges), kept };
  }

  async around(ids, most) {
    const { incoming, outgoing, constants, nodes } = await this.ask("/api/edges", { node: ids.join(), most });
    const known = new Map(rowsOf(nodes).map((node) => [node.id, node]));
    const side = ({ total, ...columns }) => ({ total, ends: rowsOf(columns).map((end) => ({ ...end, node: known.get(end.node) })) });
    return { incoming: side(incoming), outgoing: side(outgoing), constants };
  }

  async between(ids) {
    return ids.length ? rowsOf(await this.ask("/api/between", { node: ids.join() })) : [];
  }

  async search(text, most) {
    const { nodes, found } = await this.ask("/api/search", { text, most });
    return { nodes: rowsOf(nodes), found };
  }
}

class ServerStore {
  constructor(graph) {
    this.graph = graph;
    this.where = "in groups.json";
  }

  async load() {
    const kept = await this.graph.ask("/api/groups", {});
    return { ...kept, nodes: rowsOf(kept.nodes) };
  }

  // keepalive: what was done in the last moment is kept although the page is closing.
  async save(kept) {
    const body = JSON.stringify(kept);
    const headers = { "Content-Type": "application/json" };
    await this.graph.fetched("/api/groups", { method: "POST", headers, body, keepalive: body.length < MOST_KEPT_ALIVE });
  }
}
