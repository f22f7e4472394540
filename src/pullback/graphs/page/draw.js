// From the laid out graph to elements of an SVG. Text enters as text nodes only, so that no label can become markup.

const FONT = getComputedStyle(document.documentElement).getPropertyValue("--font");
const LABEL_FONT = `600 12.5px ${FONT}`;
const NOTE_FONT = `11px ${FONT}`;
const MAX_LABEL = 40;
const MARKS = ["data", "saved", "cut", "unsafe", "rank0", "rank1", "rank2", "hot"];

const widths = new Map();
const pen = document.createElement("canvas").getContext("2d");

function textWidth(text, font) {
  const key = font + text;
  if (!widths.has(key)) {
    pen.font = font;
    widths.set(key, pen.measureText(text).width);
  }
  return widths.get(key);
}

function shownLabel(item) {
  const name = item.isGroup ? item.name : item.label;
  const label = shorten(name.replace(/\s+/g, " ") || (item.isGroup ? "(unnamed)" : item.kind), item.kind === "operator" ? 2 * MAX_LABEL : MAX_LABEL);
  return item.count > 1 ? `${label} ×${item.count}` : label;
}

function shownNote(item) {
  if (item.isGroup) return [item.type && shorten(item.type, 28), plural(item.size, "node")].filter(Boolean).join(" · ");
  if (!item.values.length) return "";
  const more = item.values.length > 1 ? ` +${item.values.length - 1}` : "";
  return shorten(item.values[0], MAX_LABEL) + more;
}

function measure(item) {
  const note = shownNote(item);
  const content = Math.max(textWidth(shownLabel(item), LABEL_FONT), note ? textWidth(note, NOTE_FONT) : 0);
  return { w: Math.ceil(Math.max(64, content + (item.isGroup ? 50 : 28))), h: note ? 42 : 30 };
}

function titleText(group) {
  return group.type && group.type !== group.name ? `${group.name} · ${group.type}` : group.name;
}

function titleWidth(group) {
  return textWidth(shorten(titleText(group), MAX_LABEL), LABEL_FONT) + 56;
}

function element(svg, name, attributes = {}, text = null) {
  const made = document.createElementNS(svg.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

// Fill `layer` with everything shown; returns item.uid -> element (of an open group: its
// title, and apart from it its frame, which lies below the edges) and link.key -> element.
function draw(svg, layer, model, shown, links) {
  const nodes = new Map();
  const frames = new Map();
  const edges = new Map();
  const boxes = element(svg, "g", { class: "boxes" });
  const bars = element(svg, "g", { class: "bars" });
  const lines = element(svg, "g", { class: "edges" });
  const labels = element(svg, "g", { class: "edge-labels" });
  const items = element(svg, "g", { class: "nodes" });
  for (const group of model.groups) {
    if (group.open && !isHidden(group)) {
      const { frame, bar } = drawOpenGroup(svg, group);
      frames.set(group.uid, frame);
      nodes.set(group.uid, bar);
      boxes.append(frame);
      bars.append(bar);
    }
  }
  for (const link of links) {
    const made = drawLink(svg, link);
    edges.set(link.key, made);
    lines.append(made);
    if (link.label) labels.append(drawLinkLabel(svg, link));
  }
  for (const item of shown) {
    const made = drawItem(svg, item);
    nodes.set(item.uid, made);
    items.append(made);
  }
  layer.replaceChildren(boxes, lines, bars, labels, items);
  return { nodes, frames, edges };
}

function isHidden(item) {
  for (let g = item.parent; g; g = g.parent) if (!g.open) return true;
  return false;
}

function drawOpenGroup(svg, group) {
  const { x, y, w, h } = group;
  const text = shorten(titleText(group), MAX_LABEL);
  const bar = element(svg, "g", {
    class: "group open bar", "data-uid": group.uid, "data-path": group.path.join("/"),
    tabindex: "0", role: "button", "aria-expanded": "true", "aria-label": `Module ${group.path.join(".")}, open. Press Enter to close it.`,
  });
  bar.append(
    element(svg, "rect", { class: "bar-area", x: x + 1, y: y + 1, width: titleWidth(group) - 20, height: TITLE - 4, rx: 8 }),
    element(svg, "text", { class: "title", x: x + 30, y: y + 18 }, text),
    ...sign(svg, x + 16, y + 13.5, false),
  );
  const frame = element(svg, "g", { class: "group-frame", "data-level": group.depth % 2 });
  frame.append(element(svg, "rect", { class: "frame", x, y, width: w, height: h, rx: 10 }));
  return { frame, bar };
}

function sign(svg, x, y, plus) {
  const d = plus ? `M${x - 4},${y}h8M${x},${y - 4}v8` : `M${x - 4},${y}h8`;
  return [element(svg, "circle", { class: "sign", cx: x, cy: y, r: 7.5 }), element(svg, "path", { class: "sign-mark", d })];
}

function drawItem(svg, item) {
  const { x, y, w, h } = item;
  const kind = item.isGroup ? "module" : item.kind;
  const flags = [...item.flags].map((flag) => `flag-${flag}`).join(" ");
  const made = element(svg, "g", {
    class: `${item.isGroup ? "group closed" : "node"} kind-${kind} ${flags}`, "data-uid": item.uid, tabindex: "0", role: "button",
    "aria-label": spokenName(item),
  });
  if (item.isGroup) {
    made.setAttribute("data-path", item.path.join("/"));
    made.setAttribute("aria-expanded", "false");
    made.append(element(svg, "rect", { class: "shadow", x: x + 4, y: y + 4, width: w, height: h, rx: 9 }));
  } else made.setAttribute("data-id", item.id);
  const round = ["leaf", "parameter", "input", "constant"].includes(kind) ? h / 2 : item.isGroup ? 9 : 6;
  made.append(element(svg, "rect", { class: "body", x, y, width: w, height: h, rx: round }));
  const note = shownNote(item);
  const middle = x + w / 2 + (item.isGroup ? 11 : 0);
  made.append(element(svg, "text", { class: "label", x: middle, y: y + (note ? 18 : h / 2 + 4.5) }, shownLabel(item)));
  if (note) made.append(element(svg, "text", { class: "note", x: middle, y: y + 33 }, note));
  if (item.isGroup) made.append(...sign(svg, x + 17, y + h / 2, true));
  if (!item.isGroup && item.kind === "output") {
    made.append(element(svg, "rect", { class: "ring", x: x - 3, y: y - 3, width: w + 6, height: h + 6, rx: 8 }));
  }
  return made;
}

function spokenName(item) {
  if (item.isGroup) return `Module ${item.path.join(".")}, ${plural(item.size, "node")}, closed. Press Enter to open it.`;
  const flags = item.flags.map((flag) => FLAG_WORDS[flag] || flag);
  return [`${item.kind} ${item.label}`, item.values.join(" and "), ...flags].filter(Boolean).join(", ");
}

function drawLink(svg, link) {
  const rank = link.rank === null ? "" : ` ranked rank${Math.min(link.rank, 2)}`;
  const mark = link.rank === null ? link.style : `rank${Math.min(link.rank, 2)}`;
  const made = element(svg, "g", { class: `edge style-${link.style}${rank}`, "data-key": link.key });
  const d = curve(link.points);
  made.append(
    element(svg, "path", { class: "reach", d }),
    element(svg, "path", { class: "line", d, "marker-end": `url(#mark-${mark})`, "data-mark": mark }),
  );
  return made;
}

function drawLinkLabel(svg, link) {
  const { x, y } = labelPlace(link);
  return element(svg, "text", { class: `edge-label style-${link.style}`, x, y: y + 4, "data-key": link.key }, link.label);
}

function makeMarks(svg) {
  const defs = element(svg, "defs");
  for (const name of MARKS) {
    const mark = element(svg, "marker", {
      id: `mark-${name}`, class: `mark mark-${name}`, viewBox: "0 0 10 10", refX: 9, refY: 5, markerWidth: 9, markerHeight: 9,
      markerUnits: "userSpaceOnUse", orient: "auto",
    });
    mark.append(element(svg, "path", { d: "M0,1L10,5L0,9L2.5,5z" }));
    defs.append(mark);
  }
  svg.prepend(defs);
}
