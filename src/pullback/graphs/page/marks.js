// What is emphasised: hits of the search, the paths through a selection, the largest gradient paths, gradient norms.

function markHits(app) {
  const hits = new Set(app.search ? app.search.hits : []);
  const holds = new Set([...hits].map((item) => item.shown).filter((shown) => shown && !hits.has(shown)));
  for (const [item, made] of app.drawn()) {
    made.classList.toggle("hit", hits.has(item));
    made.classList.toggle("holds-hit", holds.has(item));
    made.classList.toggle("current", app.current === item);
  }
}

// Light up everything that leads to the selection and everything that follows from it.
function markSelection(app) {
  const { svg, selected, direction } = app;
  svg.classList.toggle("tracing", Boolean(selected));
  for (const name of ["lit", "selected"]) svg.querySelectorAll(`.${name}`).forEach((made) => made.classList.remove(name));
  app.say("");
  if (!selected) return;
  const start = nodesOf(selected);
  const sets = [];
  if (direction !== "down") sets.push(reach(start, "previous"));
  if (direction !== "up") sets.push(reach(start, "next"));
  const lit = new Set();
  for (const set of sets) for (const node of set) lit.add(node.shown);
  for (const [item, made] of app.drawn()) {
    made.classList.toggle("lit", lit.has(item) || (item.isGroup && item.open));
    made.classList.toggle("selected", item === selected);
  }
  for (const link of app.links) {
    const on = link.edges.some((e) => e.kind !== "cut" && sets.some((set) => set.has(e.from) && set.has(e.to)));
    app.lightLink(link, on);
  }
  const words = { up: ["before"], down: ["after"], both: ["before", "after"] }[direction];
  const counts = sets.map((set, i) => `${plural(set.size - start.length, "node")} ${words[i]}`);
  app.say(`${shorten(selected.isGroup ? selected.path.join(".") : selected.label, 30)}: ${counts.join(", ")}`);
}

function markPaths(app) {
  app.svg.classList.toggle("isolating", app.pathsOnly);
  const on = new Set();
  for (const link of app.links) {
    if (link.rank === null) continue;
    on.add(link.source);
    on.add(link.target);
  }
  for (const [item, made] of app.drawn()) made.classList.toggle("on-path", on.has(item));
}

// Width and colour of edges by the logarithm of the gradient's norm.
function markNorms(app) {
  const on = app.norms;
  app.svg.classList.toggle("norms", on);
  const range = on && normRange(app.model);
  for (const link of app.links) {
    const made = app.elements.edges.get(link.key);
    const line = made.querySelector(".line");
    const shows = on && link.norm !== null;
    made.classList.toggle("norm-zero", shows && link.norm === 0);
    made.classList.toggle("norm-bad", shows && !Number.isFinite(link.norm));
    line.removeAttribute("style");
    line.setAttribute("marker-end", `url(#mark-${shows ? "hot" : line.dataset.mark})`);
    if (!shows || link.norm === 0 || !Number.isFinite(link.norm)) continue;
    const span = range.high - range.low;
    const part = span ? Math.min(1, Math.max(0, (Math.log10(link.norm) - range.low) / span)) : 0.5;
    line.style.strokeWidth = `${(1 + 4.5 * part).toFixed(2)}px`;
    line.style.stroke = `color-mix(in oklab, var(--norm-high) ${Math.round(100 * part)}%, var(--norm-low))`;
  }
}

function normRange(model) {
  const logs = model.edges.map((e) => e.norm).filter((n) => n > 0 && Number.isFinite(n)).map(Math.log10);
  let [low, high] = [Infinity, -Infinity];
  for (const log of logs) [low, high] = [Math.min(low, log), Math.max(high, log)];
  return { low, high };
}

function makeLegend(box, model) {
  const add = (heading, rows) => {
    if (!rows.length) return;
    const title = document.createElement("h2");
    title.textContent = heading;
    const list = document.createElement("ul");
    for (const [className, text] of rows) {
      const row = document.createElement("li");
      const swatch = document.createElement("span");
      swatch.className = `swatch ${className}`;
      row.append(swatch, text);
      list.append(row);
    }
    box.append(title, list);
  };
  const count = new Map();
  for (const node of model.nodes) count.set(node.kind, (count.get(node.kind) || 0) + 1);
  const kinds = Object.keys(KIND_WORDS).filter((kind) => count.has(kind) || (kind === "module" && model.groups.length));
  add("Nodes", kinds.map((kind) => [`kind-${kind}`, KIND_WORDS[kind]]));
  const flags = ["nan", "unsafe", "freed", "no_grad"].filter((flag) => model.nodes.some((n) => n.flags.includes(flag)));
  const shortFlags = { nan: "first NaN or infinity", unsafe: "unsafe", freed: "freed by backward", no_grad: "under no_grad" };
  add("Flags", flags.map((flag) => [`flag-${flag}`, shortFlags[flag]]));
  const styles = [["data", "values"], ["saved", "saved for the derivative"], ["cut", "cut: no gradient"], ["unsafe", "unsafe: .data"]];
  const edges = styles.filter(([style]) => model.edges.some((e) => e.style === style)).map(([style, text]) => [`line-${style}`, text]);
  const ranks = [...new Set(model.edges.map((e) => e.rank).filter((r) => r !== null).map((r) => Math.min(r, 2)))].sort();
  add("Edges", [...edges, ...ranks.map((rank) => [`line-rank${rank}`, ["largest gradient path", "second", "third and further"][rank]])]);
  if (model.edges.some((e) => e.norm !== null)) {
    const { low, high } = normRange(model);
    const short = (log) => String(Number((10 ** log).toPrecision(3)));
    const range = low < high ? `${short(low)} to ${short(high)}` : low === high ? short(low) : "zero";
    add("Gradient norm", [["ramp", range]]);
  }
}
