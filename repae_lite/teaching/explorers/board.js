// A picture under a grid of cells that mouse, touch and keyboard can pick or paint, and, where similarities
// came along, one map beside it for each: how similar every cell is to the picked one. Needs no kernel.

const STOPS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // viridis

const STYLE = `
  .repae-board { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-end; }
  .repae-board figure { margin: 0; }
  .repae-board figcaption { font: 13px sans-serif; max-width: var(--side); }
  .repae-board .grid { position: relative; width: var(--side); cursor: crosshair; }
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
  image.alt = model.get("alt") || model.get("description");
  const png = model.get("pictures")[model.get("shown")];
  if (png === image.png) return before;
  if (before) URL.revokeObjectURL(before);
  image.png = png;
  image.hidden = !png;
  if (png) image.src = URL.createObjectURL(new Blob([png], { type: "image/png" }));
  return png ? image.src : null;
}

function still(model, el) { // a picture without cells
  const figure = make("figure", el), image = make("img", figure, { hidden: true });
  const caption = make("figcaption", figure);
  caption.setAttribute("role", "status"); // it stays where it is: what it says is read out when it changes
  figure.style.margin = 0;
  image.style.maxWidth = "100%";
  caption.style.font = "13px sans-serif";
  let address = null;
  image.onload = () => { caption.style.maxWidth = `max(20em, ${image.naturalWidth}px)`; };
  const show = () => {
    address = source(model, image, address);
    caption.textContent = model.get("description");
  };
  for (const name of ["pictures", "description", "alt"]) model.on(`change:${name}`, show);
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
  if (paint) grid.style.touchAction = "none"; // a finger paints; where it picks, it may also scroll
  const image = make("img", grid, { draggable: false, hidden: true });
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

  let cursor = Math.max(model.get("cell"), 0), pressed = false, painted = [], address = null, waiting = false;

  function send() { // at most once per frame, and nothing is left out: strokes are not states
    if (waiting) return;
    waiting = true;
    const of = model.get("of"); // the picture that was seen
    requestAnimationFrame(() => {
      waiting = false;
      if (!paint) model.save_changes();
      else if (painted.length) model.send({ of, cells: painted });
      painted = [];
    });
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
    const size = model.get("brush"); // as `patch` in latents.py
    const start = (at, most) => Math.max(0, Math.min(at - Math.floor((size - 1) / 2), most - size)) / most;
    const left = start(picked % columns, columns), top = start(Math.floor(picked / columns), rows);
    Object.assign(mark.style, { left: `${100 * left}%`, top: `${100 * top}%`,
      width: `${(100 * size) / columns}%`, height: `${(100 * size) / rows}%` });
    if (picked < 0) return;
    spoken.textContent = `row ${Math.floor(picked / columns) + 1}, column ${(picked % columns) + 1}`;
    if (!maps.length) return;
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
      const range = `${maps[m]}: cosine to the other cells from ` +
        `${Math.min(...rest).toFixed(2)} to ${Math.max(...rest).toFixed(2)}`;
      canvas.setAttribute("aria-label", range);
      if (!m) spoken.textContent += `; ${range}`;
    });
  }

  function at(event) {
    const box = grid.getBoundingClientRect();
    const part = (value, count) => Math.min(Math.max(Math.floor(value * count), 0), count - 1);
    const row = part((event.clientY - image.getBoundingClientRect().top) / image.clientHeight, rows);
    return row * columns + part((event.clientX - box.left) / box.width, columns);
  }

  function line(from, to) { // the cells behind `from` on the straight way to `to`
    const row = Math.floor(from / columns), column = from % columns;
    const down = Math.floor(to / columns) - row, right = (to % columns) - column;
    const count = Math.max(Math.abs(down), Math.abs(right));
    const at = (share) => Math.round(row + down * share) * columns + Math.round(column + right * share);
    return Array.from({ length: count }, (_, i) => at((i + 1) / count));
  }

  function visit(cell) {
    if (paint && pressed) painted.push(...line(cursor, cell).map((each) => [each, false]));
    cursor = cell;
    if (!paint) model.set("cell", cell);
    send();
    draw();
  }

  function touch(cell) { // a stroke begins
    if (paint) painted.push([cell, true]);
    cursor = cell;
    visit(cell);
  }

  grid.onpointerdown = (event) => {
    if (event.button || !event.isPrimary) return;
    grid.setPointerCapture(event.pointerId);
    touch(at(event));
    pressed = true;
  };
  grid.onpointermove = (event) => {
    if (pressed && event.isPrimary && at(event) !== cursor) visit(at(event));
  };
  grid.onpointerup = grid.onpointercancel = grid.onlostpointercapture = (event) => {
    if (event.isPrimary) pressed = false;
  };
  grid.onkeydown = (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === " " || event.key === "Enter") touch(cursor);
    else if (moves[event.key]) {
      const [down, right] = moves[event.key];
      const row = Math.min(Math.max(Math.floor(cursor / columns) + down, 0), rows - 1);
      visit(row * columns + Math.min(Math.max((cursor % columns) + right, 0), columns - 1));
    } else return;
    event.preventDefault();
    event.stopPropagation();
  };
  for (const name of ["pictures", "shown", "description", "alt"]) model.on(`change:${name}`, show);
  for (const name of ["cell", "brush"]) model.on(`change:${name}`, draw);
  show();
  return () => { if (address) URL.revokeObjectURL(address); };
}

export default { render };
