// Brings the explorers that need no kernel (clicks on patches) to life in a page: `tour.py` keeps no others.

const VIEW = 'script[type="application/vnd.jupyter.widget-view+json"]';
const STATE = 'script[type="application/vnd.jupyter.widget-state+json"]';

function bytes(text) {
  return new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

function restored(entry) { // the values of a model, binary ones put back where they belong
  const values = structuredClone(entry.state);
  for (const { path, data } of entry.buffers ?? []) {
    const inside = path.slice(0, -1).reduce((at, key) => at[key], values);
    inside[path.at(-1)] = bytes(data);
  }
  return values;
}

class Model { // what a widget's module asks of its model
  constructor(values) { this.values = values; this.heard = {}; }
  get(name) { return this.values[name]; }
  set(name, value) { this.values[name] = value; (this.heard[`change:${name}`] ?? []).forEach((f) => f()); }
  on(event, f) { (this.heard[event] ??= []).push(f); }
  off() {}
  save_changes() {}
  send() {}
}

function* boards(id, models) {
  const entry = models[id];
  if (!entry) return;
  if (entry.model_module === "anywidget") yield restored(entry);
  for (const child of entry.state.children ?? []) yield* boards(child.replace("IPY_MODEL_", ""), models);
}

async function show(place, values) {
  const el = place.parentElement.insertBefore(document.createElement("div"), place);
  const address = URL.createObjectURL(new Blob([values._esm], { type: "text/javascript" }));
  const { default: widget } = await import(address);
  widget.render({ model: new Model(values), el });
}

async function revive() {
  const kept = document.querySelector(STATE);
  if (!kept) return;
  const models = JSON.parse(kept.textContent).state;
  for (const place of document.querySelectorAll(VIEW))
    for (const values of boards(JSON.parse(place.textContent).model_id, models))
      try {
        await show(place, values);
      } catch (error) { // the others may still work
        console.error(error);
      }
}

revive();
