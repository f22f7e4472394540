// The drawing as an SVG file of its own: a copy in which every style has been written out.

const STYLES = {
  rect: ["fill", "stroke", "stroke-width", "stroke-dasharray"],
  path: ["fill", "stroke", "stroke-width", "stroke-dasharray", "marker-end"],
  circle: ["fill", "stroke", "stroke-width"],
  text: ["fill", "font-family", "font-size", "font-weight", "text-anchor", "paint-order", "stroke", "stroke-width", "stroke-linejoin"],
  g: ["opacity"],
};

function exportSvg(svg, camera, title) {
  const copy = svg.cloneNode(true);
  svg.classList.remove("far");
  const from = svg.querySelectorAll("*");
  const to = copy.querySelectorAll("*");
  const drop = [];
  from.forEach((original, i) => {
    const wanted = STYLES[original.localName];
    if (original.classList.contains("reach")) drop.push(to[i]);
    if (!wanted) return;
    const computed = getComputedStyle(original);
    if (computed.display === "none") drop.push(to[i]);
    for (const name of wanted) {
      const value = computed.getPropertyValue(name);
      if (value && !(name === "marker-end")) to[i].setAttribute(name, value);
    }
    for (const name of ["style", "tabindex", "role"]) to[i].removeAttribute(name);
  });
  drop.forEach((made) => made.remove());
  const margin = 20;
  const [w, h] = [camera.width + 2 * margin, camera.height + 2 * margin];
  copy.querySelector("#layer").removeAttribute("transform");
  for (const name of ["class", "style", "role", "aria-label"]) copy.removeAttribute(name);
  copy.setAttribute("viewBox", `${-margin} ${-margin} ${w} ${h}`);
  copy.setAttribute("width", w);
  copy.setAttribute("height", h);
  const paper = element(svg, "rect", {
    x: -margin, y: -margin, width: w, height: h, fill: getComputedStyle(document.body).backgroundColor,
  });
  copy.querySelector("#layer").before(element(svg, "title", {}, title), paper);
  svg.classList.toggle("far", camera.scale < 0.3);
  return new XMLSerializer().serializeToString(copy);
}

function download(text, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
