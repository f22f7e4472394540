// The graph in memory: nodes, the tree of modules, what is open, what is shown, and which edges join what is shown.
// An "item" is a node or a group. A closed group hides what is in it and takes over its edges.

const NODE_DEFAULTS = {
  kind: "operation", values: [], group: [], details: {}, flags: [], nbytes: 0, source: "", count: 1,
};
const EDGE_DEFAULTS = { output: 0, input: 0, kind: "data", reason: "", label: "", norm: null, rank: null };

function makeGroup(name, parent, types) {
  const path = parent ? [...parent.path, name] : [];
  return {
    isGroup: true, uid: "", name, path, parent, type: types[path.join("/")] || "", items: [], byName: new Map(),
    open: !parent, depth: path.length, size: 0, nbytes: 0, flags: new Set(),
  };
}

// Numbers that JSON cannot hold come as the strings "nan", "inf", "-inf".
function number(value) {
  if (typeof value !== "string") return value;
  return { nan: NaN, inf: Infinity, "-inf": -Infinity }[value];
}

function buildModel(data) {
  const types = data.groups || {};
  const root = makeGroup("", null, types);
  const groups = [];
  const byId = new Map();
  const nodes = data.nodes.map((raw) => {
    const node = { ...NODE_DEFAULTS, ...raw, isGroup: false, next: [], previous: [] };
    byId.set(node.id, node);
    let group = root;
    for (const name of node.group) {
      let inner = group.byName.get(name);
      if (!inner) {
        inner = makeGroup(name, group, types);
        group.byName.set(name, inner);
        group.items.push(inner);
        groups.push(inner);
      }
      group = inner;
    }
    node.parent = group;
    group.items.push(node);
    for (let g = group; g; g = g.parent) {
      g.size += 1;
      g.nbytes += node.nbytes;
      node.flags.forEach((flag) => g.flags.add(flag));
    }
    return node;
  });
  const edges = data.edges.map((raw) => {
    const edge = { ...EDGE_DEFAULTS, ...raw, from: byId.get(raw.source), to: byId.get(raw.target) };
    edge.norm = number(edge.norm);
    edge.style = edge.kind === "cut" && edge.reason.includes(".data") ? "unsafe" : edge.kind;
    edge.from.next.push(edge);
    edge.to.previous.push(edge);
    return edge;
  });
  const kept = groups.filter((group) => !dissolveIfAlone(group) && !dissolveIfScattered(group));
  [...nodes, ...kept].forEach((item, i) => { item.uid = `i${i}`; });
  const model = { ...data, nodes, edges, groups: kept, root, byId };
  model.depth = Math.max(0, ...kept.map((g) => g.depth));
  return model;
}

// A group around one node says no more than the node: the node takes its place. Its module stays in the tooltip.
function dissolveIfAlone(group) {
  if (group.size > 1) return false;
  const node = group.items[0];
  if (node.isGroup) return dissolveIfAlone(node) && dissolveIfAlone(group);
  node.parent = group.parent;
  group.parent.items[group.parent.items.indexOf(group)] = node;
  return true;
}

// A module that is called in several places (a ReLU) and whose calls have nothing between them: its nodes stand where
// they are used. As one box they would turn the graph into loops.
function dissolveIfScattered(group) {
  const { items, parent } = group;
  const inside = new Set(items);
  const joined = (node) => node.isGroup || node.next.some((edge) => inside.has(edge.to));
  if (items.some(joined)) return false;
  const after = reach(items.flatMap((node) => node.next.map((edge) => edge.to)), "next");
  if (!items.some((node) => after.has(node))) return false;
  for (const node of items) node.parent = parent;
  parent.items.splice(parent.items.indexOf(group), 1, ...items);
  return true;
}

// Give every node and group the item that stands for it on the screen; return the items shown, in order.
function computeShown(model) {
  const shown = [];
  const visit = (group, stand) => {
    for (const item of group.items) {
      item.shown = stand || item;
      const open = item.isGroup && item.open;
      if (!stand && !open) shown.push(item);
      if (item.isGroup) visit(item, stand || (open ? null : item));
    }
  };
  visit(model.root, null);
  return shown;
}

function setDepth(model, depth) {
  for (const group of model.groups) group.open = group.depth <= depth;
}

// How many items are shown if all groups down to `depth` are open.
function countAtDepth(model, depth) {
  let count = 0;
  const stack = [model.root];
  while (stack.length) {
    for (const item of stack.pop().items) {
      if (item.isGroup && item.depth <= depth) stack.push(item);
      else count += 1;
    }
  }
  return count;
}

// The outermost groups stay closed, unless that would show next to nothing.
function openingDepth(model) {
  let depth = 0;
  while (depth < model.depth && countAtDepth(model, depth) < 12 && countAtDepth(model, depth + 1) <= 60) depth += 1;
  return depth;
}

// Opening a group that holds nothing but one group opens that one as well.
function openGroup(group) {
  group.open = true;
  if (group.items.length === 1 && group.items[0].isGroup) openGroup(group.items[0]);
}

function reveal(item) {
  for (let g = item.parent; g; g = g.parent) g.open = true;
}

// One link for all edges of one style between the same two shown items.
function liftEdges(model) {
  const links = new Map();
  for (const edge of model.edges) {
    const source = edge.from.shown;
    const target = edge.to.shown;
    if (source === target && edge.from !== edge.to) continue;
    if (source === target && source.isGroup) continue;
    const key = `${source.uid} ${target.uid} ${edge.style}`;
    const link = links.get(key);
    if (link) link.edges.push(edge);
    else links.set(key, { key, source, target, style: edge.style, edges: [edge] });
  }
  for (const link of links.values()) summarise(link);
  return [...links.values()];
}

function summarise(link) {
  const ranks = link.edges.map((e) => e.rank).filter((r) => r !== null);
  link.rank = ranks.length ? Math.min(...ranks) : null;
  const norms = link.edges.map((e) => e.norm).filter((n) => n !== null);
  link.norm = norms.length ? Math.hypot(...norms) : null;
  if (norms.some(Number.isNaN)) link.norm = NaN;
  const unique = (values) => [...new Set(values.filter(Boolean))];
  const reasons = unique(link.edges.map((e) => e.label || e.reason));
  const lifted = link.source.isGroup || link.target.isGroup;
  const outputs = unique(link.edges.map((e) => (e.output || e.from.values.length > 1 ? `out ${e.output}` : "")));
  if (!reasons.length && !lifted && outputs.length) reasons.push(outputs.join(", "));
  if (link.edges.length > 1) reasons.push(`×${link.edges.length}`);
  link.label = shorten(reasons.join(" "), 32);
}

// All nodes that lead to `start` (direction "previous") or that follow from it ("next"). Cuts end a path.
function reach(start, direction) {
  const found = new Set(start);
  const stack = [...start];
  const end = direction === "next" ? "to" : "from";
  while (stack.length) {
    for (const edge of stack.pop()[direction]) {
      if (edge.kind === "cut" || found.has(edge[end])) continue;
      found.add(edge[end]);
      stack.push(edge[end]);
    }
  }
  return found;
}

function nodesOf(item) {
  if (!item.isGroup) return [item];
  const found = [];
  const stack = [item];
  while (stack.length) {
    for (const inner of stack.pop().items) (inner.isGroup ? stack : found).push(inner);
  }
  return found;
}

function shorten(text, length) {
  const characters = Array.from(text);
  return characters.length > length ? `${characters.slice(0, length - 1).join("")}…` : text;
}

function formatBytes(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (bytes >= 1000 && i < units.length - 1) {
    bytes /= 1000;
    i += 1;
  }
  return `${Number(bytes.toPrecision(3))} ${units[i]}`;
}

function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}
