// The course of every edge as a list of points, and as a path of an SVG. Edges run vertically past a row of boxes and
// bend in the gaps between rows, so that they touch no box on their way.

function pointsOf({ link, steps }) {
  const { source, target } = link;
  if (source === target) return loopPoints(source);
  const centre = source.x + source.w / 2;
  const points = [{ x: centre, y: source.y + source.h }];
  let last = source;
  for (const current of steps) {
    if (current.up) points.push(...detour(points[points.length - 1], current));
    else {
      const x = points[points.length - 1].x;
      if (!last.side) points.push({ x, y: last.band.bottom });
      points.push(...current.points);
    }
    if (current.b.side === "out") {
      points.push({ x: current.b.x, y: current.b.y });
      last = current.group;
    } else if (current.b !== target) {
      const entry = entryOf(steps, current);
      points.push({ x: entry.x, y: current.b.band.top }, { x: entry.x, y: entry.y });
      last = entry;
    }
  }
  const x = target.x + target.w / 2;
  points.push({ x, y: target.band.top }, { x, y: target.y });
  return points;
}

// The port by which the next step starts.
function entryOf(steps, current) {
  return steps[steps.indexOf(current) + 1].a;
}

// An edge that runs up, against the flow (a module that is used twice): around the right of both ends.
function detour(start, { a, b, points }) {
  const right = (box) => box.x + (box.side ? 0 : box.w) + 14;
  const [low, high] = [a.side ? start : { y: a.y + a.h }, b];
  return [
    { x: start.x, y: low.y + 10 },
    { x: right(a), y: low.y + 10 },
    { x: right(a), y: (a.side ? start.y : a.y) - 10 },
    ...points,
    { x: right(b), y: high.y + (high.side ? 0 : high.h) + 10 },
    { x: right(b), y: high.y - 12 },
    { x: high.x + (high.side ? 0 : high.w / 2), y: high.y - 12 },
  ];
}

function loopPoints({ x, y, w, h }) {
  const right = x + w;
  return [
    { x: right, y: y + h - 8 }, { x: right + 22, y: y + h - 8 }, { x: right + 22, y: y + 8 }, { x: right, y: y + 8 },
  ];
}

// Edges that end at the same box arrive side by side, in the order in which they come.
function spreadArrivals(links) {
  const arrivals = new Map();
  for (const link of links) {
    if (link.source === link.target) continue;
    if (!arrivals.has(link.target)) arrivals.set(link.target, []);
    arrivals.get(link.target).push(link);
  }
  for (const [box, group] of arrivals) {
    if (group.length < 2) continue;
    const origin = (link) => link.points[Math.max(0, link.points.length - 3)].x;
    group.sort((a, b) => origin(a) - origin(b));
    const gap = Math.min(18, (box.w * 0.7) / (group.length - 1));
    group.forEach((link, i) => {
      const shift = (i - (group.length - 1) / 2) * gap;
      for (const p of link.points.slice(-2)) p.x += shift;
    });
  }
}

// A smooth curve through points: straight where x stays, an S where it changes, round corners on level pieces.
function curve(points) {
  const line = points.filter((p, i) => !i || Math.hypot(p.x - points[i - 1].x, p.y - points[i - 1].y) > 0.5);
  const n = (value) => Math.round(value * 10) / 10;
  let d = `M${n(line[0].x)},${n(line[0].y)}`;
  for (let i = 1; i < line.length; i++) {
    const [p, q] = [line[i - 1], line[i]];
    const [dx, dy] = [q.x - p.x, q.y - p.y];
    if (Math.abs(dx) < 0.5 || Math.abs(dy) < 0.5) d += `L${n(q.x)},${n(q.y)}`;
    else d += `C${n(p.x)},${n(p.y + dy / 2)} ${n(q.x)},${n(q.y - dy / 2)} ${n(q.x)},${n(q.y)}`;
  }
  return d;
}

// Where to write on an edge: its reserved place, or the middle of its longest vertical piece.
function labelPlace(link) {
  if (link.across.at) return link.across.at;
  const { points } = link;
  let best = 1;
  for (let i = 1; i < points.length; i++) {
    if (Math.abs(points[i].y - points[i - 1].y) > Math.abs(points[best].y - points[best - 1].y)) best = i;
  }
  return { x: (points[best].x + points[best - 1].x) / 2, y: (points[best].y + points[best - 1].y) / 2 };
}
