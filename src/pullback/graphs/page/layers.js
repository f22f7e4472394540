// A layered layout that stays fast for thousands of nodes: longest paths give the rows, averages of neighbours the order
// in them, and long edges get a place in every row they pass. Same input and output as the layout by dagre.

const LAYER_GAP = 34;
const NODE_GAP = 18;
const MAX_DUMMIES = 30000; // rows times long edges; longer edges than that allows are drawn straight

function layoutInLayers(boxes, links) {
  const order = depthFirstOrder(boxes.length, links);
  const rank = longestPaths(boxes.length, links, order);
  const places = boxes.map((box, i) => ({ w: box.w, h: box.h, rank: rank[i], near: [], x: 0, index: i }));
  const chains = links.map((link) => chainOf(link, rank, places));
  addDummies(chains, rank, places);
  const rows = [];
  for (const place of places) (rows[place.rank] ||= []).push(place);
  const filled = rows.filter(Boolean);
  sortRows(filled);
  const bands = stackRows(filled);
  return {
    boxes: boxes.map((box, i) => ({ x: places[i].x, y: places[i].y })),
    links: chains.map((chain) => ({ points: chain.inner.map((p) => ({ x: p.x, y: p.y })) })),
    bands,
  };
}

// Position of every box in an order in which edges point forward, except those that close a cycle.
function depthFirstOrder(count, links) {
  const after = Array.from({ length: count }, () => []);
  const entered = new Array(count).fill(0);
  for (const { a, b } of links) {
    after[a].push(b);
    if (a !== b) entered[b] += 1;
  }
  const state = new Uint8Array(count);
  const finished = [];
  const starts = [...Array(count).keys()].sort((i, j) => (entered[i] > 0) - (entered[j] > 0) || i - j);
  for (const start of starts) {
    const stack = [[start, 0]];
    if (state[start]) continue;
    state[start] = 1;
    while (stack.length) {
      const top = stack[stack.length - 1];
      const next = after[top[0]][top[1]++];
      if (next === undefined) finished.push(stack.pop()[0]);
      else if (!state[next]) {
        state[next] = 1;
        stack.push([next, 0]);
      }
    }
  }
  const position = new Array(count);
  finished.reverse().forEach((box, i) => { position[box] = i; });
  return position;
}

function longestPaths(count, links, position) {
  const forward = links.filter(({ a, b }) => position[a] < position[b]).sort((e, f) => position[e.a] - position[f.a]);
  const rank = new Array(count).fill(0);
  for (const { a, b, minlen } of forward) rank[b] = Math.max(rank[b], rank[a] + (minlen || 1));
  return tighten(rank, forward);
}

// What has no more edges in than out moves down to its first use; `forward` is sorted by its sources.
function tighten(rank, forward) {
  const entered = new Array(rank.length).fill(0);
  for (const { b } of forward) entered[b] += 1;
  for (let end = forward.length; end > 0; ) {
    const { a } = forward[end - 1];
    let begin = end;
    let first = Infinity;
    while (begin > 0 && forward[begin - 1].a === a) {
      begin -= 1;
      first = Math.min(first, rank[forward[begin].b] - (forward[begin].minlen || 1));
    }
    if (entered[a] <= end - begin) rank[a] = first;
    end = begin;
  }
  return rank;
}

function chainOf(link, rank, places) {
  const up = rank[link.a] > rank[link.b];
  const [top, bottom] = up ? [link.b, link.a] : [link.a, link.b];
  return { top: places[top], bottom: places[bottom], up, inner: [], pull: (link.weight || 1) ** 2 };
}

function addDummies(chains, rank, places) {
  let left = MAX_DUMMIES;
  const span = (chain) => chain.bottom.rank - chain.top.rank - 1;
  for (const chain of [...chains].sort((c, d) => span(c) - span(d))) {
    if (span(chain) <= left) {
      left -= Math.max(0, span(chain));
      for (let r = chain.top.rank + 1; r < chain.bottom.rank; r++) {
        const dummy = { w: 2, h: 0, rank: r, near: [], x: 0, index: -1 };
        places.push(dummy);
        chain.inner.push(dummy);
      }
    }
    const line = [chain.top, ...chain.inner, chain.bottom];
    for (let i = 1; i < line.length; i++) {
      line[i - 1].near.push({ place: line[i], pull: chain.pull });
      line[i].near.push({ place: line[i - 1], pull: chain.pull });
    }
    if (chain.up) chain.inner.reverse();
  }
}

// Mean position of the neighbours that `keep` accepts; weak edges count only for what has no strong ones.
function average(place, keep) {
  let [sum, count, strongest] = [0, 0, 0];
  for (const { place: other, pull } of place.near) {
    if (pull < strongest || !keep(other)) continue;
    if (pull > strongest) [sum, count, strongest] = [0, 0, pull];
    sum += other.x;
    count += 1;
  }
  return count ? sum / count : place.x;
}

function sortRows(rows) {
  for (const row of rows) {
    for (const place of row) {
      place.pull = place.near.reduce((most, { pull }) => Math.max(most, pull), 1);
      if (place.index < 0) place.pull *= 4; // long edges shall be straight
    }
    spread(row, row.map(() => 0));
  }
  for (let sweep = 0; sweep < 6; sweep++) {
    const down = sweep % 2 === 0;
    for (const row of down ? rows : [...rows].reverse()) {
      const wish = new Map(row.map((p) => [p, average(p, (q) => (down ? q.rank < p.rank : q.rank > p.rank))]));
      row.sort((p, q) => wish.get(p) - wish.get(q));
      spread(row, row.map((p) => wish.get(p)));
    }
  }
  for (let sweep = 0; sweep < 12; sweep++) {
    for (const row of sweep % 2 ? [...rows].reverse() : rows) spread(row, row.map((p) => average(p, () => true)));
  }
}

// The positions nearest to the wishes, in weighted least squares, that keep the order and the gaps: neighbours that
// would overlap move as one block (isotonic regression).
function spread(row, wishes) {
  const blocks = [];
  let offset = 0;
  row.forEach((place, i) => {
    if (i) offset += (row[i - 1].w + place.w) / 2 + NODE_GAP;
    let block = { at: wishes[i] - offset, weight: place.pull, places: [[place, offset]] };
    while (blocks.length && blocks[blocks.length - 1].at > block.at) {
      const left = blocks.pop();
      const weight = left.weight + block.weight;
      const at = (left.at * left.weight + block.at * block.weight) / weight;
      block = { at, weight, places: left.places.concat(block.places) };
    }
    blocks.push(block);
  });
  for (const { at, places } of blocks) for (const [place, shift] of places) place.x = at + shift;
}

function stackRows(rows) {
  let y = 0;
  return rows.map((row) => {
    const height = row.reduce((h, p) => Math.max(h, p.h), 0);
    for (const place of row) place.y = y + height / 2;
    const band = { y: y + height / 2, height };
    y += height + LAYER_GAP;
    return band;
  });
}
