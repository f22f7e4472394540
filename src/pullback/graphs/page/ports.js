// Where edges pass the border of an open group: shall its inside be turned left to right?

const CROSSING = 120; // how many pixels of detour are as bad as a crossing

// Whether the ports lie nearer to `meets`, and with fewer crossings, if the group is mirrored; only for a clear gain.
function turnsAround({ ports, boxes, result }, left, meets) {
  const met = [...ports].filter(([key]) => meets.has(key));
  const pairs = met.map(([key, port]) => ({ side: port.side, x: result.boxes[boxes.indexOf(port)].x, outside: meets.get(key) - left }));
  const cost = (at) => {
    let sum = 0;
    pairs.forEach((p, i) => {
      sum += Math.abs(at(p.x) - p.outside);
      for (const q of pairs.slice(0, i)) {
        if (p.side === q.side && (at(p.x) - at(q.x)) * (p.outside - q.outside) < 0) sum += CROSSING;
      }
    });
    return sum;
  };
  return cost((x) => result.width - x) < 0.85 * cost((x) => x) - 10;
}

// Port -> x of where its edge comes from, or goes to, in the group around.
function meetingPoints(group, links) {
  const meets = new Map();
  for (const { a, b, key, points } of links) {
    const side = b === group ? "in" : "out";
    const other = b === group ? a : b;
    if (a !== group && b !== group) continue;
    const placed = other.isGroup && other.open && other.inner.ports.get(`${side === "in" ? "out" : "in"} ${key}`);
    const near = side === "in" ? points[points.length - 1] : points[0];
    if (near) meets.set(`${side} ${key}`, near.x);
    else if (placed && placed.x !== undefined) meets.set(`${side} ${key}`, placed.x);
    else meets.set(`${side} ${key}`, other.side ? other.x : other.x + other.w / 2);
  }
  return meets;
}
