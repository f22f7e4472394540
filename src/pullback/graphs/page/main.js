// Joins the parts: state, what the mouse and the keys do, buttons.

function makeApp(data) {
  const get = (id) => document.getElementById(id);
  const svg = get("graph");
  const layer = get("layer");
  const model = buildModel(data);
  model.data = data;
  const app = {
    model, svg, shown: [], links: [], elements: null, selected: null, current: null, direction: "both",
    pathsOnly: false, norms: false, depth: openingDepth(model), search: null,
  };
  makeMarks(svg);
  const tooltip = makeTooltip(get("tooltip"));
  const camera = makeCamera(svg, layer, get("map"), () => tooltip.hide());
  Object.assign(app, { camera, tooltip });

  app.say = (text) => { get("status").textContent = text; };
  app.item = (uid) => app.items.get(uid);
  app.drawn = () => [...app.elements.nodes, ...app.elements.frames].map(([uid, made]) => [app.item(uid), made]);
  app.lightLink = (link, on) => {
    app.elements.edges.get(link.key).classList.toggle("lit", on);
    const label = svg.querySelector(`.edge-label[data-key="${CSS.escape(link.key)}"]`);
    if (label) label.classList.toggle("lit", on);
  };
  app.items = new Map([...model.nodes, ...model.groups].map((item) => [item.uid, item]));

  // Lay out and draw again; `anchor` stays where it is on the screen.
  app.refresh = (anchor = null) => {
    const before = anchor && camera.screen(anchor);
    app.shown = computeShown(model);
    app.links = liftEdges(model);
    const size = layoutGraph(model, app.shown, app.links, measure);
    app.elements = draw(svg, layer, model, app.shown, app.links);
    const frames = model.groups.filter((g) => g.open && !isHidden(g));
    camera.setContent(size.width, size.height, app.shown.length > 4000 ? frames : app.shown);
    if (before) {
      const after = camera.screen(anchor);
      camera.x += before.x + before.w / 2 - after.x - after.w / 2;
      camera.y += before.y - after.y;
    }
    markHits(app);
    markSelection(app);
    if (app.pathsOnly) markPaths(app);
    if (app.norms) markNorms(app);
    get("depth").textContent = `depth ${app.depth}`;
    camera.apply();
  };
  app.setOpen = (group, open) => {
    tooltip.hide();
    if (open) openGroup(group);
    else group.open = false;
    app.refresh(group);
    app.focus(group);
  };
  app.setDepth = (depth) => {
    app.depth = Math.max(0, Math.min(model.depth, depth));
    setDepth(model, app.depth);
    app.refresh();
    app.overview(0.5);
  };
  app.overview = (least) => camera.fit(least, app.shown.reduce((top, item) => (top && top.y <= item.y ? top : item), null));
  app.select = (item) => {
    app.selected = item === app.selected ? null : item;
    markSelection(app);
  };
  app.focus = (item) => {
    const made = app.elements.nodes.get(item.uid);
    if (made) made.focus({ preventScroll: true });
  };
  app.jump = (item) => {
    if (isHidden(item)) {
      reveal(item);
      app.refresh();
    }
    app.current = item;
    markHits(app);
    camera.centre(item);
  };
  setDepth(model, app.depth);
  return app;
}

function describe(app, made) {
  const item = app.item(made.dataset.uid);
  return item.isGroup ? describeGroup(item) : describeNode(item, app.model);
}

function listenToDrawing(app) {
  const { svg, camera, tooltip } = app;
  const found = (event) => event.target.closest("[data-uid]");
  svg.addEventListener("click", (event) => {
    if (camera.moved || event.detail > 1) return;
    const made = found(event);
    if (!made) {
      if (app.selected && !event.target.closest(".edge")) app.select(app.selected);
      return;
    }
    const item = app.item(made.dataset.uid);
    if (!item.isGroup || event.shiftKey) app.select(item);
    else app.setOpen(item, !item.open);
  });
  svg.addEventListener("pointermove", (event) => {
    if (event.buttons) return;
    const outer = svg.getBoundingClientRect();
    const near = { x: event.clientX - outer.left, y: event.clientY - outer.top, w: 0, h: 0 };
    const made = found(event);
    const edge = event.target.closest(".edge");
    if (edge) tooltip.show(describeLink(app.links.find((link) => link.key === edge.dataset.key)), near);
    else if (made) tooltip.show(describe(app, made), near);
    else tooltip.hide();
  });
  svg.addEventListener("pointerleave", tooltip.hide);
  svg.addEventListener("focusin", (event) => {
    const made = found(event);
    if (!made || !made.matches(":focus-visible")) return;
    bringIntoView(app, app.item(made.dataset.uid));
    tooltip.show(describe(app, made), camera.screen(app.item(made.dataset.uid)));
  });
  svg.addEventListener("focusout", tooltip.hide);
  svg.addEventListener("keydown", (event) => {
    const made = found(event);
    if (!made) return;
    const item = app.item(made.dataset.uid);
    if (event.key === "Enter" && item.isGroup) app.setOpen(item, !item.open);
    else if (event.key === "Enter" || event.key === " ") app.select(item);
    else if (event.key.startsWith("Arrow")) step(event.key);
    else return;
    event.preventDefault();
    function step(key) {
      const target = neighbour(app, item, key);
      if (target) app.focus(target);
    }
  });
}

function bringIntoView(app, item) {
  const { camera, svg } = app;
  const box = camera.screen(item);
  const outside = box.x + box.w < 20 || box.y + 20 < 0 || box.x > svg.clientWidth - 20 || box.y > svg.clientHeight - 20;
  if (outside) camera.centre(item);
}

// Up and down along edges; left and right to what lies beside.
function neighbour(app, item, key) {
  const x = (box) => box.x + box.w / 2;
  const nearest = (boxes, cost) => boxes.reduce((best, box) => (best && cost(best) <= cost(box) ? best : box), null);
  if (key === "ArrowDown" || key === "ArrowUp") {
    const down = key === "ArrowDown";
    const links = app.links.filter((link) => (down ? link.source : link.target) === item);
    return nearest(links.map((link) => (down ? link.target : link.source)), (box) => Math.abs(x(box) - x(item)));
  }
  const side = key === "ArrowRight" ? 1 : -1;
  const beside = app.shown.filter((box) => side * (x(box) - x(item)) > 1);
  return nearest(beside, (box) => Math.abs(x(box) - x(item)) + 4 * Math.abs(box.y - item.y));
}

function listenToControls(app) {
  const { camera, model } = app;
  const get = (id) => document.getElementById(id);
  const on = (id, action) => get(id).addEventListener("click", action);
  on("expand-all", () => app.setDepth(model.depth));
  on("collapse-all", () => app.setDepth(0));
  on("deeper", () => app.setDepth(app.depth + 1));
  on("shallower", () => app.setDepth(app.depth - 1));
  on("zoom-in", () => camera.zoom(ZOOM_STEP));
  on("zoom-out", () => camera.zoom(1 / ZOOM_STEP));
  on("fit", () => camera.fit());
  on("save", () => download(exportSvg(app.svg, camera, document.title), `${fileName(document.title)}.svg`));
  on("direction", () => {
    const order = ["both", "up", "down"];
    app.direction = order[(order.indexOf(app.direction) + 1) % 3];
    get("direction").textContent = { both: "Paths: both ways", up: "Paths: to inputs", down: "Paths: to results" }[app.direction];
    markSelection(app);
  });
  const toggle = (id, name, mark) => on(id, () => {
    app[name] = !app[name];
    get(id).setAttribute("aria-pressed", String(app[name]));
    mark(app);
  });
  toggle("paths", "pathsOnly", markPaths);
  toggle("norms", "norms", markNorms);
  on("scheme", () => {
    const root = document.documentElement;
    root.dataset.scheme = root.dataset.scheme === "dark" ? "light" : "dark";
  });
  get("paths").hidden = !model.edges.some((edge) => edge.rank !== null);
  get("norms").hidden = !model.edges.some((edge) => edge.norm !== null);
  get("levels").hidden = !model.groups.length;
}

function listenToKeys(app) {
  const { camera } = app;
  const input = document.getElementById("search");
  document.addEventListener("keydown", (event) => {
    if (event.target === input || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") input.focus();
    else if (event.key === "+" || event.key === "=") camera.zoom(ZOOM_STEP);
    else if (event.key === "-") camera.zoom(1 / ZOOM_STEP);
    else if (event.key === "0") camera.fit();
    else if (event.key === "Escape") {
      app.current = null;
      app.search.clear();
      app.tooltip.hide();
      if (app.selected) app.select(app.selected);
      return;
    } else return;
    event.preventDefault();
  });
}

function fileName(title) {
  return title.replace(/[^\p{L}\p{N}_-]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "graph";
}

function start() {
  const begin = performance.now();
  const data = JSON.parse(document.getElementById("data").textContent);
  const app = makeApp(data);
  const { model } = app;
  const memory = model.root.nbytes ? ` · ${formatBytes(model.root.nbytes)} saved` : "";
  document.getElementById("counts").textContent =
    `${plural(model.nodes.length, "node")} · ${plural(model.edges.length, "edge")}${memory}`;
  document.getElementById("empty").hidden = model.nodes.length > 0;
  app.search = makeSearch(document.getElementById("search"), document.getElementById("hits"), makeIndex(model), {
    onHits: () => {
      app.current = null;
      markHits(app);
    },
    onJump: app.jump,
  });
  app.refresh();
  app.overview(0.7);
  const legend = document.getElementById("legend");
  makeLegend(legend, model);
  legend.open = app.svg.clientWidth >= 700 && app.svg.clientHeight >= 420;
  listenToDrawing(app);
  listenToControls(app);
  listenToKeys(app);
  new ResizeObserver(() => app.camera.apply()).observe(app.svg);
  const group = (path) => model.groups.find((g) => g.path.join("/") === path);
  window.pullbackGraph = {
    ready: performance.now() - begin,
    expand: (path) => app.setOpen(group(path), true),
    collapse: (path) => app.setOpen(group(path), false),
    expandAll: () => app.setDepth(model.depth),
    collapseAll: () => app.setDepth(0),
    shown: () => app.shown.map((item) => (item.isGroup ? item.path.join("/") : item.id)),
    svg: () => exportSvg(app.svg, app.camera, document.title),
  };
}

start();
