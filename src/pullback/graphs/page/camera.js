// What part of the drawing is seen: pan, zoom, pinch, and the small map.

const ZOOM_STEP = 1.25;
const MIN_SCALE = 0.01;
const MAX_SCALE = 6;
const MAP = { w: 150, h: 190 }; // most that the small map takes

function makeCamera(svg, layer, map, onChange) {
  const camera = { x: 0, y: 0, scale: 1, width: 1, height: 1, moved: false };
  const size = () => ({ w: svg.clientWidth || 800, h: svg.clientHeight || 600 });

  camera.apply = () => {
    layer.setAttribute("transform", `translate(${camera.x.toFixed(2)},${camera.y.toFixed(2)}) scale(${camera.scale.toFixed(4)})`);
    svg.classList.toggle("far", camera.scale < 0.3);
    drawWindow();
    onChange(camera);
  };
  camera.zoomAt = (factor, px, py) => {
    const scale = Math.min(MAX_SCALE, Math.max(MIN_SCALE, camera.scale * factor));
    camera.x = px - ((px - camera.x) * scale) / camera.scale;
    camera.y = py - ((py - camera.y) * scale) / camera.scale;
    camera.scale = scale;
    camera.apply();
  };
  camera.zoom = (factor) => {
    const { w, h } = size();
    camera.zoomAt(factor, w / 2, h / 2);
  };
  const whole = () => {
    const { w, h } = size();
    return Math.min((w - 40) / camera.width, (h - 40) / camera.height, 1.4);
  };
  // Everything, or if that were smaller than `least`, the part around `start`.
  camera.fit = (least = MIN_SCALE, start = null) => {
    const { w, h } = size();
    camera.scale = Math.max(whole(), least);
    const [x, y] = [w - camera.width * camera.scale, h - camera.height * camera.scale];
    camera.x = x >= 40 || !start ? x / 2 : w / 2 - (start.x + start.w / 2) * camera.scale;
    camera.y = y >= 40 || !start ? y / 2 : 40 - start.y * camera.scale;
    camera.apply();
  };
  camera.centre = (box) => {
    const { w, h } = size();
    camera.scale = Math.max(camera.scale, 0.8);
    camera.x = w / 2 - (box.x + box.w / 2) * camera.scale;
    camera.y = h / 2 - (box.y + Math.min(box.h, h / camera.scale) / 2) * camera.scale;
    camera.apply();
  };
  camera.screen = (box) => ({
    x: camera.x + box.x * camera.scale,
    y: camera.y + box.y * camera.scale,
    w: box.w * camera.scale,
    h: box.h * camera.scale,
  });

  // The small map: all boxes as one path, and the window as a rectangle.
  let mapScale = 1;
  camera.setContent = (width, height, boxes) => {
    Object.assign(camera, { width, height });
    mapScale = Math.min(MAP.w / width, MAP.h / height);
    map.style.width = `${Math.max(24, width * mapScale + 8)}px`;
    map.style.height = `${Math.max(24, height * mapScale + 8)}px`;
    const least = 1.2 / mapScale;
    const part = (b) => `M${b.x | 0},${b.y | 0}h${Math.max(least, b.w) | 0}v${Math.max(least, b.h) | 0}h-${Math.max(least, b.w) | 0}z`;
    map.querySelector("g").setAttribute("transform", `translate(4,4) scale(${mapScale})`);
    map.querySelector("path").setAttribute("d", boxes.map(part).join(""));
  };
  function drawWindow() {
    const { w, h } = size();
    const hidden = camera.width * camera.scale <= w && camera.height * camera.scale <= h;
    map.classList.toggle("hidden", hidden && camera.x > 0 && camera.y > 0);
    const rect = map.querySelector("rect");
    const values = { x: -camera.x, y: -camera.y, width: w, height: h };
    for (const [name, value] of Object.entries(values)) rect.setAttribute(name, (value / camera.scale).toFixed(1));
    rect.setAttribute("stroke-width", (1.5 / mapScale).toFixed(2));
  }

  listen(svg, map, camera, () => mapScale, size);
  return camera;
}

function listen(svg, map, camera, mapScale, size) {
  const pointers = new Map();
  let start = null;
  const at = (event) => {
    const box = svg.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  };
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    const p = at(event);
    const lines = event.deltaMode === 1 ? 16 : 1;
    const speed = event.ctrlKey ? 0.01 : 0.0016;
    camera.zoomAt(Math.exp(-Math.max(-400, Math.min(400, event.deltaY * lines)) * speed), p.x, p.y);
  }, { passive: false });
  svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    pointers.set(event.pointerId, at(event));
    if (pointers.size === 1) {
      camera.moved = false;
      start = at(event);
    }
  });
  svg.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const now = at(event);
    if (!camera.moved && Math.hypot(now.x - start.x, now.y - start.y) < 4) return;
    if (!camera.moved) svg.setPointerCapture(event.pointerId);
    camera.moved = true;
    svg.classList.add("dragging");
    if (pointers.size === 1) {
      camera.x += now.x - before.x;
      camera.y += now.y - before.y;
    } else pinch(event.pointerId, before, now);
    pointers.set(event.pointerId, now);
    camera.apply();
  });
  function pinch(id, before, now) {
    const other = [...pointers].find(([key]) => key !== id)[1];
    const factor = Math.hypot(now.x - other.x, now.y - other.y) / Math.hypot(before.x - other.x, before.y - other.y);
    if (Number.isFinite(factor)) camera.zoomAt(factor, other.x, other.y);
  }
  const release = (event) => {
    pointers.delete(event.pointerId);
    if (!pointers.size) svg.classList.remove("dragging");
  };
  for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) svg.addEventListener(name, release);

  const jump = (event) => {
    const box = map.getBoundingClientRect();
    const { w, h } = size();
    camera.x = w / 2 - ((event.clientX - box.left - 4) / mapScale()) * camera.scale;
    camera.y = h / 2 - ((event.clientY - box.top - 4) / mapScale()) * camera.scale;
    camera.apply();
  };
  map.addEventListener("pointerdown", (event) => {
    map.setPointerCapture(event.pointerId);
    jump(event);
  });
  map.addEventListener("pointermove", (event) => {
    if (event.buttons) jump(event);
  });
}
