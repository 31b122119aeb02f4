// @ts-check
"use strict";
// Pointer and keys, and the tools over the picture.

const ZOOM_STEP = 1.3,
  MOST_ZOOM = 12,
  DRAG = 4;

function startInput(page) {
  startTools(page);
  startPointer(page, page.elements.stage);
  page.elements.stage.addEventListener("keydown", (event) => onStageKey(page, event));
  page.elements.stage.addEventListener("focusin", (event) => {
    const element = event.target.closest(".node");
    if (element?.matches(":focus-visible")) page.point(Number(element.dataset.id ?? element.dataset.box), null);
  });
  document.addEventListener("keydown", (event) => onKey(page, event));
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) page.save();
  });
  window.addEventListener("pagehide", () => page.save());
  let frame = 0;
  new ResizeObserver(() => {
    cancelAnimationFrame(frame);
    // An observer is told once without any change; a drawing then would lose a press that has begun.
    frame = requestAnimationFrame(() => !page.picture.fits() && page.run(page.draw()));
  }).observe(page.elements.stage);
}

function startTools(page) {
  const { elements } = page;
  let waiting = null;
  for (const id of ["node-threshold", "edge-threshold"]) {
    elements[id].addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => page.run(page.refresh()), page.source.delay);
      page.keep();
    });
  }
  elements["show-graph"].addEventListener("click", () => show(page, false));
  elements["show-subgraph"].addEventListener("click", () => show(page, true));
  elements["zoom-in"].addEventListener("click", () => zoom(page, ZOOM_STEP));
  elements["zoom-out"].addEventListener("click", () => zoom(page, 1 / ZOOM_STEP));
  elements["zoom-fit"].addEventListener("click", () => zoom(page, 0));
  elements["save-svg"].addEventListener("click", () => page.picture.svg && saveSvg(page.picture.svg, page.about.title));
  elements["save-png"].addEventListener("click", () => page.picture.svg && page.run(savePng(page.picture.svg, page.about.title)));
}

function show(page, subgraph) {
  page.state.subgraph = subgraph;
  page.pointed = null;
  page.run(page.draw());
}

// Distances grow, marks and letters do not. What was under the pointer, or in the middle, stays there.
async function zoom(page, factor, event) {
  const { stage } = page.elements,
    before = page.state.zoom,
    box = stage.getBoundingClientRect();
  page.state.zoom = factor ? Math.min(MOST_ZOOM, Math.max(1, before * factor)) : 1;
  if (page.state.zoom === before) return;
  const x = event ? event.clientX - box.left : stage.clientWidth / 2,
    y = event ? event.clientY - box.top : stage.clientHeight / 2;
  const share = [(stage.scrollLeft + x) / stage.scrollWidth, (stage.scrollTop + y) / stage.scrollHeight];
  await page.draw();
  stage.scrollTo(share[0] * stage.scrollWidth - x, share[1] * stage.scrollHeight - y);
}

function startPointer(page, stage) {
  let drag = null;
  stage.addEventListener("pointermove", (event) => {
    if (drag) {
      const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
      drag.moved ||= Math.hypot(dx, dy) > DRAG;
      if (drag.moved) stage.scrollTo(drag.left - dx, drag.top - dy);
      return;
    }
    const edge = event.target.closest(".edge"),
      id = page.picture.at(event);
    if (id === null) page.tip.hidden = !edge;
    if (edge)
      page.showTip(
        edgeTip(edge, (end) => nameOfEnd(page, end)),
        event,
      );
    stage.style.cursor = id === null ? "" : "pointer";
    page.point(id, event);
  });
  stage.addEventListener("pointerleave", () => {
    page.tip.hidden = true;
    page.point(null, null);
  });
  stage.addEventListener("pointerdown", (event) => {
    if (event.button === 0 && page.picture.at(event) === null)
      drag = { x: event.clientX, y: event.clientY, left: stage.scrollLeft, top: stage.scrollTop, moved: false };
  });
  window.addEventListener("pointerup", () =>
    setTimeout(() => {
      drag = null;
    }),
  );
  stage.addEventListener("click", (event) => {
    const id = page.picture.at(event);
    page.tip.hidden = true;
    if (id !== null) page.clicked(id, event.shiftKey);
    else if (!drag?.moved) page.select(null);
  });
  stage.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      zoom(page, event.deltaY < 0 ? 1.12 : 1 / 1.12, event);
    },
    { passive: false },
  );
}

function nameOfEnd(page, end) {
  if (end === MIDDLE) return page.state.selected?.supernode?.name ?? end;
  return page.state.subgraph ? page.picture.boxes[end].title : nodeWords(page.state.known.get(Number(end)), page.about).join(" ");
}

function onStageKey(page, event) {
  const element = event.target.closest(".node");
  if (!element) return;
  const number = Number(element.dataset.id ?? element.dataset.box);
  if (event.key.startsWith("Arrow")) {
    const next = page.picture.marks.get(page.picture.next(number, event.key));
    if (next) {
      element.setAttribute("tabindex", -1);
      next.setAttribute("tabindex", 0);
      next.focus();
    }
  } else if (event.key === "Enter" || event.key === " ") page.clicked(number, event.shiftKey);
  else return;
  event.preventDefault();
}

function onKey(page, event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input")) return;
  const { state } = page,
    pointed = page.pointed === null ? (state.selected?.ids ?? []) : page.idsAt(page.pointed);
  const does = {
    "/": () => page.elements.search.focus(),
    p: () => pointed.length === 1 && page.pin(pointed[0]),
    g: () => page.group(state.chosen),
    "+": () => zoom(page, ZOOM_STEP),
    "-": () => zoom(page, 1 / ZOOM_STEP),
    0: () => zoom(page, 0),
    Escape: () => (state.chosen.size ? page.unmark() : page.select(null)),
  }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!does) return;
  event.preventDefault();
  does();
}
