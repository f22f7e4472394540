// What a node, a module or an edge has to tell, beside the pointer or beside what has the keyboard's focus.

const KIND_WORDS = {
  leaf: "leaf tensor that requires grad", parameter: "parameter", input: "input without grad", constant: "constant",
  operation: "operation", function: "custom autograd Function", operator: "operator of pullback",
  accumulate: "collects the gradient of a leaf", saved: "tensor kept for the derivative", output: "result", module: "module",
};
const FLAG_WORDS = {
  nan: "First to make a NaN or an infinity",
  unsafe: "Unsafe: .data hides a change of values from autograd, gradients may be silently wrong",
  freed: "Its saved tensors have been freed by a backward pass",
  no_grad: "Ran under no_grad: no gradient flows through it",
};
const RANK_WORDS = ["the largest path", "the second largest path", "the third largest path"];

function formatNorm(norm) {
  return Number.isFinite(norm) ? Number(norm.toPrecision(4)).toString() : String(norm).toLowerCase();
}

function describeNode(node, model) {
  const rows = [["kind", KIND_WORDS[node.kind] || node.kind]];
  node.values.forEach((value, i) => rows.push([node.values.length > 1 ? `result ${i}` : "result", value]));
  if (node.group.length) {
    const type = model.data.groups?.[node.group.join("/")];
    rows.push(["module", node.group.join(".") + (type ? ` (${type})` : "")]);
  }
  if (node.count > 1) rows.push(["stands for", plural(node.count, "equal node")]);
  for (const [name, value] of Object.entries(node.details)) rows.push([name, value]);
  if (node.nbytes) rows.push(["saved", formatBytes(node.nbytes)]);
  if (node.source) rows.push(["source", node.source]);
  for (const edge of node.previous) if (edge.kind === "cut") rows.push([`input ${edge.input}`, cutWords(edge)]);
  for (const edge of node.next) if (edge.kind === "cut") rows.push(["towards", `${edge.to.label}: ${cutWords(edge)}`]);
  const norms = node.next.map((edge) => edge.norm).filter((norm) => norm !== null);
  if (norms.length) rows.push(["gradient norm", norms.slice(0, 4).map(formatNorm).join(", ")]);
  rows.push(["id", node.id]);
  return { title: node.label || node.kind, rows, warnings: node.flags.map((flag) => FLAG_WORDS[flag] || flag) };
}

function describeGroup(group) {
  const rows = [["module", group.path.join(".")]];
  if (group.type) rows.push(["class", group.type]);
  rows.push(["holds", plural(group.size, "node")]);
  if (group.nbytes) rows.push(["saved", formatBytes(group.nbytes)]);
  rows.push(["keys", `Enter ${group.open ? "closes" : "opens"} it, Space shows its paths`]);
  const warnings = [...group.flags].map((flag) => `Inside: ${FLAG_WORDS[flag] || flag}`);
  return { title: group.name || "(unnamed)", rows, warnings };
}

function cutWords(edge) {
  return `values pass, gradients do not${edge.reason ? ` (${edge.reason})` : ""}`;
}

function describeLink(link) {
  const name = (item) => (item.isGroup ? item.path.join(".") : item.label);
  const [first] = link.edges;
  const rows = [];
  if (link.edges.length > 1) rows.push(["stands for", plural(link.edges.length, "edge")]);
  if (link.edges.length === 1 && first.from.values.length > 1) rows.push(["result", `${first.output} of ${first.from.values.length}`]);
  if (link.edges.length === 1) rows.push(["argument", String(first.input)]);
  const values = new Set(link.edges.map((e) => e.from.values[e.output]).filter(Boolean));
  if (values.size) rows.push(["carries", [...values].slice(0, 3).join(", ") + (values.size > 3 ? " ..." : "")]);
  const reasons = new Set(link.edges.filter((e) => e.kind === "cut").map(cutWords));
  for (const reason of reasons) rows.push(["cut", reason]);
  if (first.kind === "saved") rows.push(["kind", "kept for the derivative"]);
  if (link.norm !== null) rows.push(["gradient norm", formatNorm(link.norm)]);
  if (link.rank !== null) rows.push(["gradient path", RANK_WORDS[link.rank] || `number ${link.rank + 1} by size`]);
  const warnings = link.style === "unsafe" ? [FLAG_WORDS.unsafe] : [];
  return { title: `${shorten(name(link.source), 40)} → ${shorten(name(link.target), 40)}`, rows, warnings };
}

function makeTooltip(box) {
  const part = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    made.textContent = text;
    return made;
  };
  const tooltip = {};
  tooltip.show = ({ title, rows, warnings }, near) => {
    const list = document.createElement("dl");
    for (const [name, value] of rows) list.append(part("dt", "", name), part("dd", "", shorten(String(value), 400)));
    box.replaceChildren(part("div", "tip-title", shorten(title, 200)), ...warnings.map((w) => part("div", "tip-warning", w)), list);
    box.hidden = false;
    const outer = box.parentElement.getBoundingClientRect();
    const right = near.x + near.w + 14;
    const left = right + box.offsetWidth < outer.width - 8 ? right : near.x - box.offsetWidth - 14;
    box.style.left = `${Math.max(8, Math.min(left, outer.width - box.offsetWidth - 8))}px`;
    box.style.top = `${Math.max(8, Math.min(near.y + near.h / 2, outer.height - box.offsetHeight - 8))}px`;
  };
  tooltip.hide = () => { box.hidden = true; };
  return tooltip;
}
