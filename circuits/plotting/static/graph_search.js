// @ts-check
"use strict";
// The search box: a list under it, and rings around what was found.

const LISTED = 12,
  SEARCH_DELAY = 120;

function startSearch(page) {
  const box = /** @type {HTMLInputElement} */ (document.getElementById("search")),
    list = document.getElementById("found");
  let nodes = [],
    at = -1,
    turn = 0,
    waiting = null;

  function close() {
    list.hidden = true;
    at = -1;
    box.setAttribute("aria-expanded", "false");
    box.removeAttribute("aria-activedescendant");
  }

  function move(to) {
    at = nodes.length ? (to + nodes.length) % nodes.length : -1;
    for (const [place, entry] of list.querySelectorAll("[role=option]").entries()) entry.setAttribute("aria-selected", String(place === at));
    if (at >= 0) box.setAttribute("aria-activedescendant", `found-${at}`);
    list.children[at]?.scrollIntoView({ block: "nearest" });
  }

  function choose(node) {
    close();
    page.remember([node]);
    page.select(node.id);
  }

  function entry(node, place) {
    const [name, where] = nodeWords(node, page.about);
    return make(
      "li",
      {
        role: "option",
        id: `found-${place}`,
        "aria-selected": "false",
        "data-node": node.name,
        onpointerdown: (event) => {
          event.preventDefault();
          choose(node);
        },
      },
      make("span", { class: node.kind <= ERROR ? "name" : "" }, name),
      " ",
      make("small", {}, `${where} \u00b7 ${percent(shareOf(node, page.about))}`),
    );
  }

  async function look() {
    const own = ++turn,
      text = box.value;
    const answer = text.trim() ? await page.source.search(text, LISTED) : { nodes: [], found: 0 };
    if (own !== turn) return;
    nodes = answer.nodes;
    page.remember(nodes);
    page.found(nodes.map((node) => node.id));
    const more = answer.found > nodes.length ? [make("li", { class: "hint" }, `and ${count(answer.found - nodes.length)} more`)] : [];
    const nothing = text.trim() && !nodes.length ? [make("li", { class: "hint" }, "No node has this name or token")] : [];
    list.replaceChildren(...nodes.map(entry), ...more, ...nothing);
    list.hidden = !text.trim();
    box.setAttribute("aria-expanded", String(!list.hidden));
    move(0);
  }

  box.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => look().catch((error) => page.tell(error)), SEARCH_DELAY);
  });
  box.addEventListener("focus", () => {
    list.hidden = !list.children.length || !box.value.trim();
  });
  box.addEventListener("blur", close);
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") move(at + 1);
    else if (event.key === "ArrowUp") move(at - 1);
    else if (event.key === "Enter" && at >= 0 && !list.hidden) choose(nodes[at]);
    else if (event.key === "Escape") {
      box.value = "";
      look();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
}
