// @ts-check
"use strict";
// Everything is read from the page itself: drawings carry data-rank, data-source, data-target and data-node, table rows data-rank.

const tip = document.body.appendChild(Object.assign(document.createElement("div"), { className: "tip", hidden: true }));
tip.setAttribute("role", "status");

// At this share of its size, a label is still readable.
const SMALLEST = 0.75;

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = tip;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 14 + height < innerHeight ? y + 14 : Math.max(4, y - height - 12)}px`;
}

// The browser's own tooltips would show beside ours, so titles become labels; invisible wide strokes make thin edges easy to hit.
function prepare(mark) {
  const title = mark.querySelector("title");
  mark.dataset.tip = title.textContent;
  mark.setAttribute("aria-label", title.textContent);
  title.remove();
  const path = mark.querySelector("path");
  if (path) mark.appendChild(path.cloneNode()).setAttribute("class", "hit");
}

function startCircuit(panel) {
  const drawing = panel.querySelector(".drawing");
  const edges = [...drawing.querySelectorAll(".edge")];
  const nodes = [...drawing.querySelectorAll(".node")];
  const rows = [...panel.querySelectorAll("tr[data-rank]")];
  const node = new Map(nodes.map((mark) => [mark.dataset.node, mark]));
  let held = null, shown = null;
  [...edges, ...nodes].forEach(prepare);
  for (const mark of nodes) mark.setAttribute("tabindex", "0");

  function light(mark) {
    if (mark === shown) return;
    shown = mark;
    const near = mark?.matches(".edge") ? [mark] : edges.filter((edge) => mark && [edge.dataset.source, edge.dataset.target].includes(mark.dataset.node));
    const lit = new Set([mark, ...near, ...near.flatMap((edge) => [node.get(edge.dataset.source), node.get(edge.dataset.target)])]);
    const ranks = new Set(near.map((edge) => edge.dataset.rank));
    drawing.classList.toggle("picked", Boolean(mark));
    for (const each of [...edges, ...nodes]) each.classList.toggle("lit", lit.has(each));
    for (const row of rows) row.classList.toggle("lit", ranks.has(row.dataset.rank));
  }

  drawing.addEventListener("pointermove", (event) => {
    const mark = event.target.closest(".edge, .node");
    light(mark || held);
    if (mark) showTip(mark.dataset.tip, event.clientX, event.clientY);
    else tip.hidden = true;
  });
  drawing.addEventListener("pointerleave", () => { light(held); tip.hidden = true; });
  drawing.addEventListener("click", (event) => { held = event.target.closest(".edge, .node"); light(held); });
  drawing.addEventListener("focusin", (event) => {
    const mark = event.target.closest(".node:focus-visible");
    if (!mark) return;
    const { right, bottom } = mark.getBoundingClientRect();
    light(mark);
    showTip(mark.dataset.tip, right, bottom);
  });
  drawing.addEventListener("focusout", () => { light(held); tip.hidden = true; });
  for (const row of rows) {
    const edge = edges.find((each) => each.dataset.rank === row.dataset.rank);
    row.addEventListener("pointerenter", () => light(edge || held));
    row.addEventListener("pointerleave", () => light(held));
  }

  const slider = panel.querySelector("[data-strongest]");
  slider?.addEventListener("input", () => {
    const most = Number(slider.value), all = slider.value === slider.max;
    panel.querySelector("output").textContent = slider.value;
    for (const edge of edges) edge.classList.toggle("weak", Number(edge.dataset.rank) > most);
    for (const row of rows) row.hidden = !all && Number(row.dataset.rank) > most;
    const ends = new Set(edges.filter((edge) => !edge.matches(".weak")).flatMap((edge) => [edge.dataset.source, edge.dataset.target]));
    for (const mark of nodes) mark.classList.toggle("weak", !ends.has(mark.dataset.node));
  });
  const fit = panel.querySelector("[data-fit]");
  const setFit = (fits) => {
    fit.checked = fits;
    drawing.classList.toggle("fit", fits);
    drawing.scrollLeft = (drawing.scrollWidth - drawing.clientWidth) / 2;
  };
  drawing.addEventListener("scroll", () => drawing.style.setProperty("--scrolled", `${drawing.scrollLeft}px`));
  fit?.addEventListener("change", () => setFit(fit.checked));
  // A wide drawing is scrolled, from its middle on, because its labels would be too small.
  if (fit) setFit(drawing.querySelector("svg").width.baseVal.value * SMALLEST <= drawing.clientWidth);
}

// Sorting: numbers by the exact value in data-value, missing ones last either way.
function startTable(table) {
  const heads = [...table.querySelectorAll("th")];
  const body = table.tBodies[0];
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  for (const [column, head] of heads.entries()) head.querySelector("button").addEventListener("click", () => {
    const rising = head.getAttribute("aria-sort") === "descending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const numbers = head.matches(".number");
    const compare = (a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      if (!numbers) return rising ? x.localeCompare(y) : y.localeCompare(x);
      if (x === "" || y === "") return Number(x === "") - Number(y === "");
      return rising ? x - y : y - x;
    };
    body.append(...[...body.rows].sort(compare));
  });
}

// One method at a time, or all beside each other.
function startTabs(tabs) {
  /** @type {NodeListOf<HTMLElement>} */
  const methods = document.querySelectorAll(".method");
  const buttons = [...tabs.querySelectorAll("button")];
  const choose = (chosen) => {
    const every = chosen.dataset.show === "all";
    for (const button of buttons) button.setAttribute("aria-pressed", button === chosen);
    for (const method of methods) method.hidden = !every && method.dataset.method !== chosen.dataset.show;
    methods[0].parentElement.classList.toggle("beside", every);
  };
  tabs.hidden = false;
  for (const button of buttons) button.addEventListener("click", () => choose(button));
  choose(buttons[0]);
}

document.querySelectorAll("[data-circuit]").forEach(startCircuit);
document.querySelectorAll("table").forEach(startTable);
document.querySelectorAll(".tabs").forEach(startTabs);
// The scripts of a figure are text until the page is shown: they take longer than all the rest.
addEventListener("load", () => setTimeout(() => {
  for (const late of document.querySelectorAll("script.late")) late.replaceWith(Object.assign(document.createElement("script"), { textContent: late.textContent }));
}));
