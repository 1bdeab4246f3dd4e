// A picture under a grid of cells that mouse, touch and keyboard can pick or paint, and, where similarities
// came along, one map beside it for each: how similar every cell is to the picked one. Needs no kernel.

const STOPS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // viridis

const STYLE = `
  .repae-board { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-end; }
  .repae-board figure { margin: 0; } .repae-board figcaption { font: 13px sans-serif; max-width: var(--side); }
  .repae-board .grid { position: relative; width: var(--side); touch-action: none; cursor: crosshair; }
  .repae-board img { width: 100%; display: block; image-rendering: pixelated; user-select: none; }
  .repae-board .cell { position: absolute; box-sizing: border-box; pointer-events: none;
    outline: 2px solid #fff; border: 2px solid #d55e00; }
  .repae-board .grid:focus-visible { outline: 3px solid #0072b2; outline-offset: 2px; }
  .repae-board canvas { width: calc(var(--side) / 2); image-rendering: pixelated; display: block; }`;

function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
  const low = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[low].map((from, i) => from + (at - low) * (STOPS[low + 1][i] - from));
}

function half(bits) { // IEEE 754 binary16
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

function make(tag, parent, properties = {}) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

function source(model, image, before) { // shows the chosen PNG; returns its address, to be given back
  if (before) URL.revokeObjectURL(before);
  const png = model.get("pictures")[model.get("shown")];
  const address = png ? URL.createObjectURL(new Blob([png], { type: "image/png" })) : null;
  image.hidden = !address;
  if (address) image.src = address;
  image.alt = model.get("alt") || model.get("description");
  return address;
}

function still(model, el) { // a picture without cells
  const figure = make("figure", el), image = make("img", figure), caption = make("figcaption", figure);
  figure.style.margin = 0;
  image.style.maxWidth = "100%";
  caption.style.font = "13px sans-serif";
  let address = null;
  image.onload = () => { caption.style.maxWidth = `${image.naturalWidth}px`; };
  const show = () => {
    address = source(model, image, address);
    caption.textContent = model.get("description");
  };
  model.on("change:pictures", show);
  model.on("change:description", show);
  show();
}

function render({ model, el }) {
  const rows = model.get("rows"), columns = model.get("columns"), cells = rows * columns;
  const maps = model.get("maps"), names = model.get("names"), side = model.get("side");
  const paint = model.get("paint");
  if (!rows) { still(model, el); return; }
  el.classList.add("repae-board");
  el.style.setProperty("--side", `${side}px`); // the rules below hold for all boards of a page
  make("style", el, { textContent: STYLE });

  const main = make("figure", el);
  if (names.length > 1) {
    const select = make("select", make("label", main, { textContent: "picture " }));
    names.forEach((name, i) => make("option", select, { value: i, textContent: name }));
    select.value = model.get("shown");
    select.onchange = () => { model.set("shown", Number(select.value)); model.save_changes(); show(); };
  }
  const grid = make("div", main, { className: "grid", tabIndex: 0 });
  grid.setAttribute("role", "application");
  const image = make("img", grid, { draggable: false });
  const mark = make("div", grid, { className: "cell" });
  const caption = make("figcaption", main);
  const spoken = make("figcaption", main);
  spoken.setAttribute("aria-live", "polite");
  const views = maps.map((name) => {
    const figure = make("figure", el), canvas = make("canvas", figure, { width: columns, height: rows });
    canvas.setAttribute("role", "img");
    make("figcaption", figure, { textContent: name });
    return canvas;
  });

  let cursor = Math.max(model.get("cell"), 0), stroke = [], number = 0, address = null, waiting = false;

  function send(values) { // at most once per frame
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; model.save_changes(); });
  }

  function show() {
    address = source(model, image, address);
    caption.textContent = model.get("description");
    const keys = paint ? "Arrow keys move, Space or Enter paints." : "Arrow keys move and pick.";
    grid.setAttribute("aria-label", `${model.get("description")} ${rows} by ${columns} cells. ${keys}`);
    draw();
  }

  function draw() {
    const picked = paint ? cursor : model.get("cell");
    mark.hidden = picked < 0;
    Object.assign(mark.style, { width: `${100 / columns}%`, height: `${100 / rows}%`,
      left: `${(100 * (picked % columns)) / columns}%`, top: `${(100 * Math.floor(picked / columns)) / rows}%` });
    if (!maps.length || picked < 0) return;
    const view = model.get("similarities"), shown = model.get("shown");
    const at = (m, other) => 2 * (((shown * maps.length + m) * cells + picked) * cells + other);
    views.forEach((canvas, m) => {
      const pixels = new ImageData(columns, rows), found = [];
      for (let other = 0; other < cells; other++) {
        found.push(half(view.getUint16(at(m, other), true)));
        pixels.data.set([...colour(found[other]), 255], 4 * other);
      }
      canvas.getContext("2d").putImageData(pixels, 0, 0);
      const rest = found.filter((_, other) => other !== picked);
      canvas.setAttribute("aria-label", `${maps[m]}: cosine to the other cells from ` +
        `${Math.min(...rest).toFixed(2)} to ${Math.max(...rest).toFixed(2)}`);
    });
  }

  function at(event) {
    const box = grid.getBoundingClientRect();
    const part = (value, count) => Math.min(Math.max(Math.floor(value * count), 0), count - 1);
    const row = part((event.clientY - image.getBoundingClientRect().top) / image.clientHeight, rows);
    return row * columns + part((event.clientX - box.left) / box.width, columns);
  }

  function visit(cell) {
    cursor = cell;
    spoken.textContent = `row ${Math.floor(cell / columns) + 1}, column ${(cell % columns) + 1}`;
    if (paint) {
      if (stroke.length && !stroke.includes(cell)) send({ stroke: [number, ...(stroke = [...stroke, cell])] });
    } else send({ cell });
    draw();
  }

  function touch(cell) { // a stroke begins
    if (paint) send({ stroke: [++number, ...(stroke = [cell])] });
    visit(cell);
  }

  grid.onpointerdown = (event) => { grid.setPointerCapture(event.pointerId); touch(at(event)); };
  grid.onpointermove = (event) => { if (event.buttons && at(event) !== cursor) visit(at(event)); };
  grid.onpointerup = () => { stroke = []; };
  grid.onkeydown = (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === " " || event.key === "Enter") { touch(cursor); stroke = []; }
    else if (moves[event.key]) {
      const [down, right] = moves[event.key];
      const row = Math.min(Math.max(Math.floor(cursor / columns) + down, 0), rows - 1);
      visit(row * columns + Math.min(Math.max((cursor % columns) + right, 0), columns - 1));
    } else return;
    event.preventDefault();
    event.stopPropagation();
  };
  model.on("change:pictures", show);
  model.on("change:shown", show);
  model.on("change:description", show);
  model.on("change:cell", draw);
  show();
  return () => { if (address) URL.revokeObjectURL(address); };
}

export default { render };
