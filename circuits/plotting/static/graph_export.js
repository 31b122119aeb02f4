// @ts-check
"use strict";
// The picture as a file: what is on the page, all of it, on white.

const SCALE = 2,
  MOST_PIXELS = 12000;

function pictureText(svg, title) {
  const copy = svg.cloneNode(true);
  for (const axis of copy.querySelectorAll(".layers, .tokens")) axis.removeAttribute("transform");
  for (const element of copy.querySelectorAll("*"))
    for (const name of ["tabindex", "role", "aria-label", "aria-pressed"]) element.removeAttribute(name);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.removeAttribute("tabindex");
  copy.prepend(mark("title", {}, title), mark("rect", { width: "100%", height: "100%", fill: "#ffffff" }));
  return `${new XMLSerializer().serializeToString(copy)}\n`;
}

function download(name, blob) {
  const address = URL.createObjectURL(blob);
  const link = make("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

function fileName(title, ending) {
  return `${
    title
      .toLowerCase()
      .replace(/[^\p{L}\p{N}]+/gu, "-")
      .replace(/^-|-$/g, "")
      .slice(0, 60) || "graph"
  }.${ending}`;
}

function saveSvg(svg, title) {
  download(fileName(title, "svg"), new Blob([pictureText(svg, title)], { type: "image/svg+xml" }));
}

async function savePng(svg, title) {
  const [width, height] = [svg.width.baseVal.value, svg.height.baseVal.value];
  const scale = Math.min(SCALE, MOST_PIXELS / Math.max(width, height));
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(pictureText(svg, title))}`;
  await image.decode();
  const canvas = make("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  download(fileName(title, "png"), await new Promise((done) => canvas.toBlob(done, "image/png")));
}
