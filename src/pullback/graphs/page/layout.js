// Where everything lies. Every open group is laid out on its own, and is then one box in the group around it, so that
// boxes never overlap and opening one module leaves the inside of the others as it is. Edges that leave a group go
// through ports on its border.

const PAD = 18;
const TITLE = 28;
const DAGRE_LIMIT = 300; // boxes and links in one group beyond which the layout in layers is faster and no worse
const SHOWN_LIMIT = 1500;
const MINOR = new Set(["leaf", "parameter", "input", "constant", "accumulate", "saved"]); // the line of the others is kept straight
const MAIN = 4; // weight of the others
const layouts = new Map(); // equal modules are laid out once

function layoutGraph(model, shown, links, measure) {
  const plain = shown.length > SHOWN_LIMIT;
  prepare(model.root, shown, measure);
  const routes = links.map((link) => traceRoute(link));
  arrange(model.root, plain);
  place(model.root, 0, 0);
  links.forEach((link, i) => { link.points = pointsOf(routes[i]); });
  spreadArrivals(links);
  return { width: model.root.w, height: model.root.h };
}

function prepare(group, shown, measure) {
  const visit = (g) => {
    g.inner = { boxes: [...g.items], links: [], byKey: new Map(), ports: new Map() };
    g.items.forEach((item) => {
      if (item.isGroup && item.open) visit(item);
    });
  };
  visit(group);
  for (const item of shown) Object.assign(item, measure(item));
}

// Steps of one link: out of every group that does not hold the target, across, and into the groups around the target.
function traceRoute(link) {
  const chain = (item) => {
    const groups = [];
    for (let g = item.parent; g; g = g.parent) groups.push(g);
    return groups;
  };
  const ups = chain(link.source);
  const downs = chain(link.target);
  while (ups.length > 1 && downs.length > 1 && ups[ups.length - 2] === downs[downs.length - 2]) {
    ups.pop();
    downs.pop();
  }
  const shared = ups.pop();
  downs.pop();
  downs.reverse();
  const key = `${link.source.uid} ${link.style}`;
  const steps = ups.map((g, i) => step(g, i ? ups[i - 1] : link.source, port(g, `out ${key}`, "out"), key));
  const from = ups.length ? ups[ups.length - 1] : link.source;
  const to = downs.length ? downs[0] : link.target;
  const across = step(shared, from, to, key);
  link.across = across.label ? {} : across; // a place for one label
  across.label ||= link.label;
  steps.push(across);
  downs.forEach((g, i) => {
    const inner = i + 1 < downs.length ? downs[i + 1] : link.target;
    steps.push(step(g, port(g, `in ${key}`, "in"), inner, key));
  });
  return { link, steps };
}

function port(group, key, side) {
  const { ports, boxes } = group.inner;
  let found = ports.get(key);
  if (!found) {
    found = { side, uid: key, w: 2, h: 2 };
    ports.set(key, found);
    if (side === "in") boxes.unshift(found);
    else boxes.push(found);
  }
  return found;
}

function step(group, a, b, key) {
  const { links, byKey } = group.inner;
  const full = `${a.uid}|${b.uid}|${key}`;
  let found = byKey.get(full);
  if (!found) {
    found = { group, a, b, key, label: "" };
    byKey.set(full, found);
    links.push(found);
  }
  return found;
}

// Sizes and positions inside of a group, from the inside out.
function arrange(group, plain) {
  const { boxes, links } = group.inner;
  for (const box of boxes) if (box.isGroup && box.open) arrange(box, plain);
  const index = new Map(boxes.map((box, i) => [box, i]));
  const sizes = boxes.map((box) => ({ w: box.w, h: box.h, side: box.side }));
  const sources = new Map();
  const numbered = (key) => sources.get(key) ?? sources.set(key, sources.size).size - 1;
  const ends = links.map(({ a, b, label, key }) => ({
    a: index.get(a), b: index.get(b), label: label.length, weight: MINOR.has(a.kind) || MINOR.has(b.kind) ? 1 : MAIN,
    source: numbered(`${a.uid}|${key}`),
  }));
  keepPortsOutside(sizes, ends);
  const signature = JSON.stringify([plain, sizes, ends]);
  let result = layouts.get(signature);
  if (!result) {
    const cheap = plain || boxes.length + links.length > DAGRE_LIMIT;
    const bus = makeBuses(sizes, ends);
    const laid = bus ? joinBuses(bus, sizes, cheap ? layoutInLayers : layoutStraight) : (cheap ? layoutInLayers : layoutByDagre)(sizes, ends);
    result = frame(sizes, ends, laid);
    layouts.set(signature, result);
  }
  group.inner.result = result;
  const title = group.parent ? TITLE : 0;
  group.w = Math.max(result.width + 2 * PAD, group.parent ? titleWidth(group) : 0);
  group.h = result.height + 2 * PAD + title;
}

// Ports lie above, or below, everything that they are joined to.
function keepPortsOutside(sizes, ends) {
  const inside = ends.filter(({ a, b }) => !sizes[a].side && !sizes[b].side && a !== b);
  if (inside.length === ends.length) return;
  const position = depthFirstOrder(sizes.length, inside);
  const depth = longestPaths(sizes.length, inside, position);
  const turned = inside.map(({ a, b }) => ({ a: b, b: a }));
  const height = longestPaths(sizes.length, turned, position.map((p) => sizes.length - p));
  for (const end of ends) {
    if (sizes[end.a].side) end.minlen = depth[end.b] + 1;
    else if (sizes[end.b].side) end.minlen = height[end.a] + 1;
  }
}

// Beside a trunk dagre may draw a straight line as a staircase, depending on the side from which it aligns: try all.
function layoutStraight(sizes, ends) {
  const main = ends.filter(({ weight }) => weight === MAIN);
  const bend = ({ boxes }) => main.reduce((sum, { a, b }) => sum + Math.abs(boxes[a].x - boxes[b].x), 0);
  const sides = sizes.length + ends.length < 150 ? ["UL", "UR", "DL", "DR"] : [];
  const found = [undefined, ...sides].map((align) => layoutByDagre(sizes, ends, align));
  return found.reduce((best, one) => (bend(one) < bend(best) ? one : best));
}

function layoutByDagre(sizes, ends, align) {
  const g = new dagre.graphlib.Graph({ multigraph: true });
  g.setGraph({ ranksep: 30, nodesep: 22, edgesep: 14, align });
  sizes.forEach((box, i) => g.setNode(String(i), { width: box.w, height: box.h }));
  ends.forEach((end, i) => {
    const label = { minlen: end.minlen || 1, weight: end.weight };
    if (end.label) Object.assign(label, { width: end.label * 6.2 + 8, height: 14, labelpos: "c" });
    if (end.a !== end.b) g.setEdge(String(end.a), String(end.b), label, String(i));
  });
  for (const side of ["in", "out"]) tiePorts(g, sizes, side);
  dagre.layout(g);
  const heights = new Map();
  const boxes = sizes.map((box, i) => {
    const { x, y } = g.node(String(i));
    heights.set(Math.round(y), Math.max(heights.get(Math.round(y)) || 0, box.h));
    return { x, y };
  });
  const links = ends.map((end, i) => {
    if (end.a === end.b) return { points: [] };
    const edge = g.edge(String(end.a), String(end.b), String(i));
    const keep = (p) => heights.has(Math.round(p.y)) || (end.label && Math.abs(p.y - edge.y) < 1);
    const points = edge.points.slice(1, -1).filter(keep);
    return end.label ? { points, at: { x: edge.x, y: edge.y } } : { points };
  });
  return { boxes, links, bands: [...heights].map(([y, height]) => ({ y, height })) };
}

// All ports of a side in one row: a heavy edge from each to one helper.
function tiePorts(g, sizes, side) {
  const ports = sizes.map((box, i) => [box, String(i)]).filter(([box]) => box.side === side);
  if (ports.length < 2) return;
  g.setNode(side, { width: 1, height: 1 });
  for (const [, i] of ports) {
    if (side === "in") g.setEdge(side, i, { weight: 50 }, "tie");
    else g.setEdge(i, side, { weight: 50 }, "tie");
  }
}

// Shift the contents to (0, 0); ports do not count for the size in y, since they end on the border.
function frame(sizes, ends, found) {
  let [x0, y0, x1, y1] = [Infinity, Infinity, -Infinity, -Infinity];
  const cover = (x, y, w, h) => {
    [x0, y0] = [Math.min(x0, x - w / 2), Math.min(y0, y - h / 2)];
    [x1, y1] = [Math.max(x1, x + w / 2), Math.max(y1, y + h / 2)];
  };
  found.boxes.forEach((p, i) => {
    if (!sizes[i].side) cover(p.x, p.y, sizes[i].w, sizes[i].h);
  });
  const [top, bottom] = [y0, y1];
  const within = (p) => p.y >= top && p.y <= bottom;
  found.boxes.forEach((p, i) => {
    if (sizes[i].side) cover(p.x, (top + bottom) / 2, 8, 0);
  });
  found.links.forEach((link, i) => {
    link.points = link.points.filter(within);
    link.points.forEach((p) => cover(p.x, p.y, 8, 0));
    if (link.at) cover(link.at.x, link.at.y, ends[i].label * 6.2 + 8, 14);
  });
  if (x0 === Infinity) [x0, y0, x1, y1] = [0, 0, 0, 0];
  const move = (p) => ({ x: p.x - x0, y: p.y - y0 });
  return {
    width: x1 - x0,
    height: y1 - y0,
    boxes: found.boxes.map(move),
    links: found.links.map(({ points, at }) => ({ points: points.map(move), at: at && move(at) })),
    bands: found.bands.map(({ y, height }) => ({ y: y - y0, height })),
  };
}

// Absolute positions, from the outside in. `x` and `y` of an item are its upper left corner; `meets` tells where an edge
// comes from, or goes to, outside: the inside is turned left to right if its ports are nearer to that so.
function place(group, x, y, meets = new Map()) {
  Object.assign(group, { x, y });
  const { boxes, links, result } = group.inner;
  const left = x + (group.w - result.width) / 2;
  const top = y + PAD + (group.parent ? TITLE : 0);
  const turned = turnsAround(group.inner, left, meets);
  const move = (p) => ({ x: (turned ? result.width - p.x : p.x) + left, y: p.y + top });
  const bands = new Map(result.bands.map((b) => [Math.round(b.y), b]));
  boxes.forEach((box, i) => {
    const p = move(result.boxes[i]);
    const half = (bands.get(Math.round(p.y - top)) || { height: box.h }).height / 2;
    box.band = { top: p.y - half, bottom: p.y + half };
    if (box.side) Object.assign(box, { x: p.x, y: box.side === "in" ? y : y + group.h });
    else Object.assign(box, { x: p.x - box.w / 2, y: p.y - box.h / 2 });
  });
  links.forEach((link, i) => {
    link.up = link.a.band.top > link.b.band.bottom;
    link.points = result.links[i].points.flatMap((p) => {
      const half = (bands.get(Math.round(p.y)) || { height: 0 }).height / 2;
      const ends = half < 1 ? [p.y] : [p.y - half, p.y + half];
      return (link.up ? ends.reverse() : ends).map((end) => move({ x: p.x, y: end }));
    });
    link.at = result.links[i].at && move(result.links[i].at);
  });
  const inside = boxes.filter((box) => box.isGroup && box.open).sort((a, b) => a.y - b.y);
  for (const box of inside) place(box, box.x, box.y, meetingPoints(box, links));
}
