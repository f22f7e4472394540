// One line for many edges: what is used in many rows (a mask, the memory of an encoder) runs down as a single trunk, off
// which the edges branch. Without it the drawing is as wide as there are users, and the layout slow.

const BUS_FROM = 5; // edges of one source

// Replace each such bundle by a chain of small boxes, the taps; `joinBuses` puts the edges together again.
function makeBuses(sizes, ends) {
  const bundles = new Map();
  ends.forEach((end, i) => {
    if (end.label || end.a === end.b || sizes[end.b].side) return;
    if (!bundles.has(end.source)) bundles.set(end.source, []);
    bundles.get(end.source).push(i);
  });
  const wide = [...bundles.values()].filter((bundle) => bundle.length >= BUS_FROM);
  if (!wide.length) return null;
  const position = depthFirstOrder(sizes.length, ends);
  const depth = longestPaths(sizes.length, ends, position);
  const bus = { sizes: [...sizes], ends: [...ends], courses: ends.map((_, i) => [i]), trunks: [] };
  for (const bundle of wide) {
    const below = bundle.filter((i) => position[ends[i].a] < position[ends[i].b]);
    const rows = [...new Set(below.map((i) => depth[ends[i].b]))].sort((p, q) => p - q);
    if (rows.length >= BUS_FROM) addTrunk(bus, ends, below, rows, depth);
  }
  return bus;
}

function addTrunk(bus, ends, bundle, rows, depth) {
  const start = ends[bundle[0]].a;
  const trunk = [];
  let last = start;
  bus.trunks.push(trunk);
  for (const row of rows) {
    const tap = bus.sizes.push({ w: 2, h: 2 }) - 1;
    const minlen = last === start ? Math.max(1, row - depth[start] - 1) : 1;
    trunk.push(bus.ends.push({ a: last, b: tap, label: 0, weight: 3, minlen }) - 1);
    for (const i of bundle) {
      if (depth[ends[i].b] !== row) continue;
      bus.courses[i] = [...trunk, bus.ends.push({ a: tap, b: ends[i].b, label: 0, weight: 1 }) - 1];
      bus.ends[i] = null;
    }
    last = tap;
  }
}

// The layout of what was asked for, from the layout with taps.
function joinBuses(bus, sizes, layout) {
  const used = bus.ends.map((end, i) => (end ? i : -1)).filter((i) => i >= 0);
  const found = layout(bus.sizes, used.map((i) => bus.ends[i]));
  const laid = new Map(used.map((i, k) => [i, found.links[k]]));
  for (const trunk of bus.trunks) straighten(trunk.map((i) => [found.boxes[bus.ends[i].b], laid.get(i).points]), sizes, found.boxes);
  const links = bus.courses.map((course) => {
    if (course.length === 1) return laid.get(course[0]);
    const points = course.flatMap((i) => {
      const tap = bus.ends[i].b >= sizes.length ? [found.boxes[bus.ends[i].b]] : [];
      return [...laid.get(i).points, ...tap];
    });
    return { points };
  });
  return { boxes: found.boxes.slice(0, sizes.length), links, bands: found.bands };
}

// A trunk that can be a vertical line without touching a box becomes one. `pieces`: tap, and points that lead to it.
function straighten(pieces, sizes, boxes) {
  const taps = pieces.map(([tap]) => tap);
  const [top, bottom] = [taps[0].y, taps[taps.length - 1].y];
  let [low, high] = [-Infinity, Infinity];
  sizes.forEach(({ w, h }, i) => {
    const box = boxes[i];
    if (box.y + h / 2 < top || box.y - h / 2 > bottom) return;
    const beside = taps.reduce((near, tap) => (Math.abs(tap.y - box.y) < Math.abs(near.y - box.y) ? tap : near));
    if (beside.x > box.x) low = Math.max(low, box.x + w / 2);
    else high = Math.min(high, box.x - w / 2);
  });
  if (high - low < 24) return;
  const x = Math.min(high - 12, Math.max(low + 12, taps[0].x));
  pieces.forEach(([tap, points], i) => {
    tap.x = x;
    if (i) for (const point of points) point.x = x;
  });
}
