// Find nodes and modules by any word of theirs.

function makeIndex(model) {
  const entries = [];
  const add = (item, words) => entries.push({ item, text: words.filter(Boolean).join("\n").toLowerCase() });
  for (const group of model.groups) add(group, [group.name, group.type, group.path.length > 1 && group.path.join(".")]);
  for (const node of model.nodes) {
    const path = node.group;
    add(node, [
      node.label, node.id, node.kind, path.join("."), path.join("/"), model.data.groups?.[path.join("/")], node.values.join("\n"),
      ...Object.entries(node.details).map(([name, value]) => `${name}=${value}`), ...node.flags, node.source,
    ]);
  }
  return entries;
}

// Items that contain every word of the query, those of this very name first. Spaces in shapes do not matter: "(1,64" finds "(1, 64".
function search(index, query) {
  const words = query.toLowerCase().replace(/,\s+/g, ",").split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const hits = index.filter(({ text }) => {
    const tight = text.replaceAll(", ", ",");
    return words.every((word) => text.includes(word) || tight.includes(word));
  });
  const whole = ({ text }) => text.split("\n", 1)[0] === words.join(" "); // its name, not a part of something
  return [...hits.filter(whole), ...hits.filter((hit) => !whole(hit))].map(({ item }) => item);
}

// The search box: counts hits while typing, Enter and Shift+Enter go from hit to hit, Esc clears.
function makeSearch(input, counter, index, { onHits, onJump }) {
  const state = { hits: [], at: -1 };
  const show = () => {
    const { hits, at } = state;
    if (!input.value.trim()) counter.textContent = "";
    else if (!hits.length) counter.textContent = "no hits";
    else counter.textContent = at < 0 ? plural(hits.length, "hit") : `${at + 1} of ${hits.length}`;
  };
  state.run = () => {
    state.hits = search(index, input.value);
    state.at = -1;
    show();
    onHits(state.hits);
  };
  state.jump = (step) => {
    const { hits } = state;
    if (!hits.length) return;
    state.at = state.at < 0 ? (step > 0 ? 0 : hits.length - 1) : (state.at + step + hits.length) % hits.length;
    show();
    onJump(hits[state.at]);
  };
  state.clear = () => {
    input.value = "";
    state.run();
  };
  input.addEventListener("input", state.run);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      state.jump(event.shiftKey ? -1 : 1);
    } else if (event.key === "Escape") {
      event.stopPropagation();
      state.clear();
      input.blur();
    }
  });
  return state;
}
