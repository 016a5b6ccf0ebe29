// The page of `python -m monai_conres draw`. Volumes are arrays of bytes (slices, rows, columns), as the server sends
// them: axis 0 is the slice axis. Only slices of axis 0 are painted.

const $ = (id) => document.getElementById(id);
const COLORS = ["#56b4e9", "#e69f00", "#2fc48d", "#f0e442", "#cc79a7", "#ff6d4d", "#4a7dff", "#c3f24b", "#b58cff"];
const DOUBT = [255, 40, 200];
const UNDO_STEPS = 100;

let info, state;
let sizes, plane; // voxels along each axis, and in a slice
let labels, completed, doubt; // what is shown: drawn slices, else what the server completed
let predicted = null; // what the network says, once it has run
const drawn = new Map(); // slice number -> done? Its values are in labels.
const images = []; // by channel: {low, high, values}
const look = { axis: 0, at: [0, 0, 0], zoom: 1, pan: [0, 0], channel: 0, black: [], white: [] };
const paint = { value: 0, tool: "brush", size: 6 };
let hidden = false; // labels, while H is held
let stroke = null; // {before, last} while a button is down
let pointer = null; // where the mouse is, in voxels of the plane
const past = [], future = []; // {number, before, after}; each is {values, done}, with null for untouched slices

// Talking to the server. A change of a slice waits in `unsent` until the server has written it to its file.

const unsent = new Map(); // slice number -> its last change
let stale = null; // [from, to] of the completed slices that the page has to fetch
let tab = null, sending = null, fetching = Promise.resolve(), polling = 0, offline = false;

async function call(path, { body, method = body === undefined ? "GET" : "POST" } = {}) {
  const headers = tab === null ? {} : { "X-Tab": String(tab) };
  const response = await fetch(path, { method, body, headers, cache: "no-store" });
  if (response.ok) return response;
  const reason = (await response.json().catch(() => ({}))).error ?? response.statusText;
  throw Object.assign(new Error(reason), { status: response.status });
}

const bytes = async (path) => new Uint8Array(await (await call(path)).arrayBuffer());

function keep(number) {
  unsent.set(number, Symbol());
  $("saved").textContent = "Keeping the stroke …";
  send();
}

// Ends when nothing waits, or when trying again by itself is of no use.
function send() {
  document.body.dataset.sent = "";
  return (sending ??= sendAll().finally(() => (sending = null)));
}

async function sendAll() {
  while (unsent.size) {
    const [[number, change]] = unsent;
    const kind = drawn.has(number) ? (drawn.get(number) ? "done" : "open") : "none";
    const hangs = "The program has not answered for 10 s. Your last strokes are only in this page.";
    const late = setTimeout(tell, 10000, hangs);
    try {
      const body = kind === "none" ? "" : slice(labels, number).slice();
      const request = call(`slices/${number}/${kind}`, { body }).finally(() => clearTimeout(late));
      const answer = await (await request).json();
      if (unsent.get(number) === change) unsent.delete(number);
      if (!unsent.size) $("saved").textContent = "Strokes are kept";
      tell(null);
      apply(answer);
      outdate(...answer.changed);
      refresh().catch(trouble); // poll() tries again
    } catch (error) {
      outdate(0, sizes[0]); // the server may have the change: perhaps only its answer is lost
      if (trouble(error)) return;
      await new Promise((wake) => setTimeout(wake, 2000));
    }
  }
}

// Says what happened, and what the button of the banner does `again`. True: trying again by itself is of no use.
function trouble(error, again) {
  offline = error.status === undefined;
  $("saved").textContent = "";
  const kept = unsent.size ? "Your last stroke is only in this page." : "Your strokes are kept.";
  const command = "Start it again with the same command, without --drawn, and use its new address.";
  if (error.status === 409) elsewhere();
  else if (offline) tell(`The program does not answer. ${kept} ${command}`, again);
  else tell(`The program says: ${error.message.replace(/\.$/, "")}. ${kept}`, again);
  return !offline;
}

function tell(text, again = () => (send(), poll())) {
  if (text === null) offline = false;
  $("banner").hidden = text === null;
  $("banner").firstElementChild.textContent = text ?? "";
  $("banner").lastElementChild.onclick = () => (tell(null), again());
}

function elsewhere() {
  if (unsent.size) $("kept").textContent = "The last stroke of this tab was not saved.";
  unsent.clear();
  if (!$("elsewhere").open) $("elsewhere").showModal();
}

function apply(answer) {
  state = answer;
  if (tab !== null && state.tab !== tab && !sending) elsewhere();
  const part = Math.round(100 * state.progress);
  $("progress").hidden = state.completes && !state.problem;
  $("progress").firstElementChild.style.width = `${part}%`;
  $("progress").setAttribute("aria-valuenow", part);
  $("progress").lastElementChild.textContent = state.problem ? "network stopped" : `network ${part} %`;
  if (state.problem) tell(`The network stopped: ${state.problem}. You can paint; nothing is completed.`);
  draw();
}

// The completed slices low to high - 1 may have changed.
function outdate(low, high) {
  if (high > low) stale = stale ? [Math.min(stale[0], low), Math.max(stale[1], high)] : [low, high];
}

// Fetches what is stale, one fetch after the other: no older answer may replace a newer one.
const refresh = () => (fetching = fetching.catch(() => {}).then(fetchStale));

async function fetchStale() {
  while (stale && state.completes) {
    const [low, high] = stale, query = `?from=${low}&to=${high}`;
    stale = null;
    try {
      predicted ??= await bytes("predicted");
      const [new_labels, new_doubt] = await Promise.all([bytes("completed" + query), bytes("doubt" + query)]);
      completed.set(new_labels, low * plane);
      doubt.set(new_doubt, low * plane);
    } catch (error) {
      outdate(low, high);
      throw error;
    }
    doubtSums = [];
    for (let number = low; number < high; number++)
      if (!drawn.has(number) && number !== stroke?.number) slice(labels, number).set(slice(completed, number));
    draw();
  }
  if (!unsent.size) document.body.dataset.sent = "yes";
}

async function poll() {
  const known = state;
  try {
    const answer = await (await call("state")).json();
    if (state === known) apply(answer); // else a newer one came in between
    await refresh();
    if (offline && !unsent.size) tell(null), showChannel(look.channel); // perhaps its image is still missing
  } catch (error) {
    trouble(error);
  }
  clearTimeout(polling);
  polling = setTimeout(poll, state.completes || state.problem ? 3000 : 400);
}

// Geometry: how a plane of the volume lies on the screen.

const slice = (volume, number) => volume.subarray(number * plane, (number + 1) * plane);

function layout(axis = look.axis) {
  const group = { S: "SI", I: "SI", A: "AP", P: "AP", L: "LR", R: "LR" };
  const wanted = { SI: ["L", "P"], AP: ["L", "I"], LR: ["P", "I"] }[group[info.codes[axis]]]; // to the right, down
  const [h, v] = wanted.map((letter) => [0, 1, 2].find((k) => group[info.codes[k]] === group[letter]));
  const strides = [plane, sizes[2], 1];
  const flip = [info.codes[h] !== wanted[0], info.codes[v] !== wanted[1]];
  const index = (x, y) => (flip[0] ? sizes[h] - 1 - x : x) * strides[h] + (flip[1] ? sizes[v] - 1 - y : y) * strides[v];
  const opposite = { S: "I", I: "S", A: "P", P: "A", L: "R", R: "L" };
  return {
    h, v, flip, width: sizes[h], height: sizes[v], index, start: look.at[axis] * strides[axis],
    edges: [opposite[wanted[1]], opposite[wanted[0]], wanted[0], wanted[1]],
  };
}

// Screen pixels of the picture: {left, top, sx, sy}, sx and sy for one voxel.
function placement({ h, v, width, height }) {
  const box = canvas.getBoundingClientRect();
  const [mm_x, mm_y] = [info.spacing[h], info.spacing[v]];
  const fit = Math.min(box.width / (width * mm_x), box.height / (height * mm_y)) * 0.96;
  const [sx, sy] = [fit * look.zoom * mm_x, fit * look.zoom * mm_y];
  return {
    sx, sy, left: (box.width - sx * width) / 2 + look.pan[0], top: (box.height - sy * height) / 2 + look.pan[1],
  };
}

function voxel(event) {
  const view = layout(), place = placement(view), box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left - place.left) / place.sx, (event.clientY - box.top - place.top) / place.sy];
}

// Drawing of the page

const canvas = $("canvas"), context = canvas.getContext("2d");
const picture = document.createElement("canvas"), overlay = document.createElement("canvas");
let frame = 0;

const draw = () => (frame ||= requestAnimationFrame(render));
const rgb = (color) => [1, 3, 5].map((k) => parseInt(color.slice(k, k + 2), 16));

function render() {
  frame = 0;
  if (!labels) return;
  const view = layout(), place = placement(view), scale = devicePixelRatio;
  const box = canvas.getBoundingClientRect();
  canvas.width = Math.round(box.width * scale);
  canvas.height = Math.round(box.height * scale);
  context.setTransform(scale, 0, 0, scale, 0, 0);
  const rectangle = [place.left, place.top, place.sx * view.width, place.sy * view.height];
  const image = images[look.channel];
  if (image) {
    paintPixels(picture, view, (pixels) => {
      const [low, high] = [65.535 * look.black[look.channel], 65.535 * look.white[look.channel]];
      const factor = 255 / Math.max(1, high - low);
      each(view, (from, to) => {
        const gray = (image.values[from] - low) * factor;
        pixels[to] = pixels[to + 1] = pixels[to + 2] = gray;
        pixels[to + 3] = 255;
      });
    });
    context.imageSmoothingEnabled = true;
    context.drawImage(picture, ...rectangle);
  }
  if (!hidden) {
    const colors = new Map(info.classes.map(({ value }, k) => [value, rgb(COLORS[k % COLORS.length])]));
    const opacity = $("showLabels").checked ? 2.55 * $("opacity").value : 0;
    const showDoubt = $("showDoubt").checked;
    paintPixels(overlay, view, (pixels) =>
      each(view, (from, to) => {
        const value = labels[from], doubtful = showDoubt ? doubt[from] : 0;
        const color = doubtful ? DOUBT : colors.get(value);
        if (!color || !(doubtful || opacity)) return (pixels[to + 3] = 0);
        pixels.set(color, to);
        pixels[to + 3] = doubtful ? 40 + doubtful * 0.9 : opacity;
      }));
    context.imageSmoothingEnabled = false;
    context.drawImage(overlay, ...rectangle);
    if ($("showNetwork").checked && predicted) outline(view, place, colors);
  }
  if (look.axis !== 0) lines(view, place);
  brushCircle(view, place);
  document.querySelectorAll(".edge").forEach((edge, k) => (edge.textContent = view.edges[k]));
  marks();
  panel();
  readout();
}

function each(view, visit) {
  for (let y = 0, to = 0; y < view.height; y++)
    for (let x = 0; x < view.width; x++, to += 4) visit(view.start + view.index(x, y), to);
}

function paintPixels(target, view, fill) {
  if (target.width !== view.width || target.height !== view.height)
    [target.width, target.height] = [view.width, view.height];
  const pixels = (target.data ??= {});
  if (pixels.image?.width !== view.width || pixels.image?.height !== view.height)
    pixels.image = new ImageData(view.width, view.height);
  fill(pixels.image.data);
  target.getContext("2d").putImageData(pixels.image, 0, 0);
}

// Edges between voxels of different classes of the network alone
function outline(view, place, colors) {
  const at = (x, y) => (x < 0 || y < 0 || x >= view.width || y >= view.height ? 0 : predicted[view.start + view.index(x, y)]);
  context.lineWidth = 1.6;
  context.setLineDash([4, 3]);
  for (const [value, color] of colors) {
    context.beginPath();
    for (let y = 0; y <= view.height; y++)
      for (let x = 0; x <= view.width; x++) {
        const own = at(x, y) === value, px = place.left + x * place.sx, py = place.top + y * place.sy;
        if (own !== (at(x - 1, y) === value)) context.moveTo(px, py), context.lineTo(px, py + place.sy);
        if (own !== (at(x, y - 1) === value)) context.moveTo(px, py), context.lineTo(px + place.sx, py);
      }
    context.strokeStyle = `rgb(${color})`;
    context.stroke();
  }
  context.setLineDash([]);
}

// In the other views: where the slice is, and the slices that are drawn
function lines(view, place) {
  const across = view.h === 0; // slices are columns
  const line = (number, color, width, dash = []) => {
    const flip = view.flip[across ? 0 : 1], where = (flip ? sizes[0] - 1 - number : number) + 0.5;
    context.setLineDash(dash);
    context.beginPath();
    if (across) {
      context.moveTo(place.left + where * place.sx, place.top);
      context.lineTo(place.left + where * place.sx, place.top + view.height * place.sy);
    } else {
      context.moveTo(place.left, place.top + where * place.sy);
      context.lineTo(place.left + view.width * place.sx, place.top + where * place.sy);
    }
    context.strokeStyle = color;
    context.lineWidth = width;
    context.stroke();
    context.setLineDash([]);
  };
  for (const [number, done] of drawn) line(number, done ? "#35c98b" : "#f0b44c", 1);
  line(look.at[0], "#fff", 1, [5, 4]);
}

function brushCircle(view, place) {
  canvas.style.cursor = look.axis === 0 && pointer && paint.tool !== "fill" && !drawn.get(look.at[0]) ? "none" : "crosshair";
  if (canvas.style.cursor !== "none") return;
  const radius = (paint.size / 2) * Math.min(info.spacing[view.h], info.spacing[view.v]);
  const millimetre = place.sx / info.spacing[view.h];
  context.beginPath();
  context.arc(place.left + pointer[0] * place.sx, place.top + pointer[1] * place.sy, Math.max(1.5, radius * millimetre), 0, 7);
  context.lineWidth = 3;
  context.strokeStyle = "#000a";
  context.stroke();
  context.lineWidth = 1.3;
  context.strokeStyle = paint.tool === "eraser" ? "#fff" : COLORS[info.classes.findIndex((c) => c.value === paint.value) % COLORS.length];
  context.stroke();
}

// The strip above the slider: voxels in doubt, drawn slices, the slices to draw next
function marks() {
  const strip = $("marks"), box = strip.getBoundingClientRect(), c = strip.getContext("2d"), scale = devicePixelRatio;
  [strip.width, strip.height] = [box.width * scale, box.height * scale];
  c.scale(scale, scale);
  const style = getComputedStyle(document.documentElement), color = (name) => style.getPropertyValue(name);
  const thumb = 8, x = (number) => thumb + ((box.width - 2 * thumb) * number) / Math.max(1, sizes[0] - 1);
  if (state.completes) {
    const sums = Array.from({ length: sizes[0] }, (_, number) => (drawn.get(number) ? 0 : doubtOf(number)));
    const top = Math.max(1, ...sums), width = Math.max(1, (box.width - 2 * thumb) / sizes[0] - 1);
    c.fillStyle = color("--soft");
    c.globalAlpha = 0.4;
    sums.forEach((sum, number) => c.fillRect(x(number) - width / 2, box.height, width, (-(box.height - 14) * sum) / top));
    c.globalAlpha = 1;
  }
  for (const [number, done] of drawn) {
    c.beginPath();
    c.arc(x(number), 7, 4, 0, 7);
    c.fillStyle = c.strokeStyle = color(done ? "--done" : "--open");
    c.lineWidth = 2;
    done ? c.fill() : c.stroke();
  }
  if ($("showNext").checked)
    state.ranking.slice(0, 3).forEach(([number], k) => {
      c.globalAlpha = [1, 0.6, 0.35][k];
      c.fillStyle = color("--next");
      c.beginPath();
      c.moveTo(x(number) - 5, 2);
      c.lineTo(x(number) + 5, 2);
      c.lineTo(x(number), 12);
      c.fill();
      c.globalAlpha = 1;
    });
}

let doubtSums = []; // by slice
const doubtOf = (number) => (doubtSums[number] ??= slice(doubt, number).reduce((sum, value) => sum + value, 0) / 255);

function panel() {
  const number = look.at[0], done = drawn.get(number);
  const kind = done ? "done" : drawn.has(number) ? "open" : "";
  const proposal = state.completes ? ([...drawn.values()].includes(true) ? "completed" : "proposed") : "empty";
  $("number").textContent = `Slice ${number} of 0 to ${sizes[0] - 1}`;
  $("chip").textContent = { done: "done", open: "started", "": proposal }[kind];
  $("chip").className = kind;
  $("done").textContent = done ? "Open again" : "Done";
  $("done").classList.toggle("primary", !done);
  const next = state.ranking[0];
  $("next").disabled = !next;
  $("next").textContent = next ? `Next: slice ${next[0]}` : state.completes ? "All are drawn" : "Next";
  $("undo").disabled = !past.length;
  $("redo").disabled = !future.length;
  $("clear").disabled = Boolean(done);
  $("reset").disabled = done || !drawn.has(number);
  $("save").disabled = !state.completes || ![...drawn.values()].includes(true);
  $("slice").value = number;
  const image = images[look.channel];
  for (const name of ["black", "white"]) {
    $(name).value = look[name][look.channel] ?? 0;
    if (image) $(name + "Text").textContent = short(image.low + ((image.high - image.low) * $(name).value) / 1000);
  }
}

const short = (value) => (Math.abs(value) >= 100 ? Math.round(value) : Number(value.toPrecision(3)));

let fading = 0;
function hint(text) {
  $("hint").textContent = text;
  $("hint").classList.add("shown");
  clearTimeout(fading);
  fading = setTimeout(() => $("hint").classList.remove("shown"), 3500);
}

// Painting

const snapshot = (number) =>
  drawn.has(number) ? { values: slice(labels, number).slice(), done: drawn.get(number) } : null;

function restore(number, snap) {
  if (snap) {
    slice(labels, number).set(snap.values);
    drawn.set(number, snap.done);
  } else {
    drawn.delete(number);
    slice(labels, number).set(slice(completed, number));
  }
}

function remember(number, before) {
  past.push({ number, before, after: snapshot(number) });
  if (past.length > UNDO_STEPS) past.shift();
  future.length = 0;
  keep(number);
  draw();
}

function travel(from, to, key) {
  const step = from.pop();
  if (!step) return;
  to.push(step);
  restore(step.number, step[key]);
  show(0, step.number);
  keep(step.number);
}

// Whether the slice may be painted now; else the page says why not.
function ready() {
  const done = drawn.get(look.at[0]);
  if (look.axis !== 0) hint("Slices are painted in the first view only. Press V.");
  else if (offline) hint("The program does not answer, so nothing can be painted.");
  else if (done) hint(`Slice ${look.at[0]} is done. Press D to open it again.`);
  return look.axis === 0 && !offline && !done;
}

function disc(view, [cx, cy], change) {
  const [mm_x, mm_y] = [info.spacing[view.h], info.spacing[view.v]], unit = Math.min(mm_x, mm_y);
  const radius = (paint.size / 2) * unit;
  const [reach_x, reach_y] = [Math.ceil(radius / mm_x), Math.ceil(radius / mm_y)];
  const [vx, vy] = [Math.floor(cx), Math.floor(cy)];
  for (let y = Math.max(0, vy - reach_y); y <= Math.min(view.height - 1, vy + reach_y); y++)
    for (let x = Math.max(0, vx - reach_x); x <= Math.min(view.width - 1, vx + reach_x); x++)
      if ((x === vx && y === vy) || Math.hypot((x + 0.5 - cx) * mm_x, (y + 0.5 - cy) * mm_y) <= radius) change(x, y);
}

function paintLine(from, to) {
  const view = layout(), erase = paint.tool === "eraser", only = $("only").checked;
  const change = (x, y) => {
    const place = view.start + view.index(x, y);
    if (!erase) labels[place] = paint.value;
    else if (!only || labels[place] === paint.value) labels[place] = 0;
  };
  const steps = Math.max(1, Math.ceil(2 * Math.hypot(to[0] - from[0], to[1] - from[1])));
  for (let k = 0; k <= steps; k++)
    disc(view, [0, 1].map((i) => from[i] + ((to[i] - from[i]) * k) / steps), change);
}

// Gives all voxels that hang together with this one, and have its label, the chosen class
function fill([fx, fy]) {
  const view = layout(), start = [Math.floor(fx), Math.floor(fy)];
  const inside = ([x, y]) => x >= 0 && y >= 0 && x < view.width && y < view.height;
  if (!inside(start)) return;
  const old = labels[view.start + view.index(...start)], stack = [start];
  if (old === paint.value) return;
  while (stack.length) {
    const [x, y] = stack.pop(), place = view.start + view.index(x, y);
    if (labels[place] !== old) continue;
    labels[place] = paint.value;
    for (const next of [[x + 1, y], [x - 1, y], [x, y + 1], [x, y - 1]]) if (inside(next)) stack.push(next);
  }
}

function finish() {
  const { number, before, first } = stroke;
  stroke = null;
  const same = slice(labels, number).every((value, k) => value === first[k]);
  if (same) return restore(number, before), draw(); // shows what was fetched meanwhile
  drawn.set(number, false);
  remember(number, before);
}

function change(edit) {
  const number = look.at[0], before = snapshot(number);
  edit(number);
  remember(number, before);
}

const actions = {
  done() {
    if (offline) return ready();
    const number = look.at[0], done = !drawn.get(number);
    change(() => drawn.set(number, done));
    if (done && !state.completes) hint("The volume is completed when the network has run.");
  },
  next() {
    if (!state.ranking[0]) return;
    if (look.axis === 0 && look.at[0] === state.ranking[0][0]) hint("This is the slice to draw next.");
    show(0, state.ranking[0][0]);
  },
  clear() {
    if (ready()) change((number) => (slice(labels, number).fill(0), drawn.set(number, false)));
  },
  reset() {
    if (drawn.has(look.at[0]) && ready()) change((number) => restore(number, null));
  },
  undo: () => travel(past, future, "before"),
  redo: () => travel(future, past, "after"),
  async save() {
    await send();
    if (unsent.size) return; // the banner says why
    $("saved").textContent = "Saving …";
    try {
      const { files } = await (await call("save", { body: "" })).json();
      tell(null);
      $("saved").textContent = `Saved ${files[0].split(/[\\/]/).pop()}`;
      hint(`Saved ${files.join(" and ")}`);
    } catch (error) {
      trouble(error, actions.save);
    }
  },
  help: () => $("keys").showModal(),
  fit() {
    Object.assign(look, { zoom: 1, pan: [0, 0] });
    draw();
  },
  auto: () => autoWindow(look.channel),
};

// Looking

function show(axis, number) {
  if (axis !== look.axis) {
    look.axis = axis;
    $("axis").value = axis;
    Object.assign(look, { zoom: 1, pan: [0, 0] });
  }
  look.at[axis] = Math.min(sizes[axis] - 1, Math.max(0, number));
  draw();
}

async function showChannel(channel) {
  look.channel = channel;
  $("channel").value = channel;
  draw();
  if (images[channel]) return;
  try {
    const response = await call(`image/${channel}`);
    const [low, high] = ["X-Low", "X-High"].map((name) => Number(response.headers.get(name)));
    images[channel] = { low, high, values: new Uint16Array(await response.arrayBuffer()) };
    autoWindow(channel);
  } catch (error) {
    trouble(error, () => showChannel(channel));
  }
}

// From the 1st to the 99.5th percentile of the voxels above the smallest value
function autoWindow(channel) {
  if (!images[channel]) return;
  const { values } = images[channel], counts = new Uint32Array(65536);
  const step = Math.max(1, Math.floor(values.length / 500000));
  for (let k = 0; k < values.length; k += step) counts[values[k]]++;
  counts[0] = 0;
  const total = counts.reduce((sum, count) => sum + count, 0);
  const at = (part) => {
    let sum = 0;
    return Math.max(0, counts.findIndex((count) => (sum += count) > part * total)) / 65.535;
  };
  [look.black[channel], look.white[channel]] = total ? [at(0.01), at(0.995)] : [0, 1000];
  draw();
}

function setWindow(black, white) {
  look.black[look.channel] = Math.min(999, Math.max(0, black));
  look.white[look.channel] = Math.max(look.black[look.channel] + 1, Math.min(1000, white));
  draw();
}

function zoom(factor, event) {
  const box = canvas.getBoundingClientRect();
  const [x, y] = event ? [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2] : [0, 0];
  const before = look.zoom;
  look.zoom = Math.min(20, Math.max(0.5, before * factor));
  look.pan = [x, y].map((c, k) => c - ((c - look.pan[k]) * look.zoom) / before);
  draw();
}

function readout() {
  const view = layout(), [x, y] = (pointer ?? [-1, -1]).map(Math.floor);
  if (x < 0 || y < 0 || x >= view.width || y >= view.height) return ($("readout").textContent = "");
  const place = view.start + view.index(x, y), image = images[look.channel];
  const value = image && short(image.low + ((image.high - image.low) * image.values[place]) / 65535);
  const name = info.classes.find((entry) => entry.value === labels[place])?.name;
  const doubtful = doubt[place] ? `${Math.round(doubt[place] / 2.55)} % doubt` : undefined;
  $("readout").textContent = [value, name, doubtful].filter((part) => part !== undefined).join(" · ");
}

// Mouse, pen and keys

let held = null; // the mouse, pen or finger that is down
let drag = null;
canvas.addEventListener("contextmenu", (event) => event.preventDefault());
canvas.addEventListener("pointerdown", (event) => {
  if (held !== null && held !== event.pointerId) return; // one finger at a time
  held = event.pointerId;
  canvas.setPointerCapture(event.pointerId);
  canvas.focus({ preventScroll: true });
  event.preventDefault();
  pointer = voxel(event);
  if (event.button === 0 && !event.shiftKey) {
    if (look.axis !== 0) {
      const view = layout(), across = view.h === 0, flip = view.flip[across ? 0 : 1];
      const number = Math.floor(pointer[across ? 0 : 1]);
      drag = { kind: "go" };
      look.at[0] = Math.min(sizes[0] - 1, Math.max(0, flip ? sizes[0] - 1 - number : number));
      return draw();
    }
    if (!ready()) return;
    const number = look.at[0];
    stroke = { number, before: snapshot(number), first: slice(labels, number).slice(), last: pointer };
    if (paint.tool === "fill") return fill(pointer), finish();
    paintLine(pointer, pointer);
    return draw();
  }
  drag = { kind: event.button === 2 ? "window" : "pan", x: event.clientX, y: event.clientY };
  drag.from = drag.kind === "pan" ? [...look.pan] : [look.black[look.channel], look.white[look.channel]];
});
canvas.addEventListener("pointermove", (event) => {
  if (held !== null && held !== event.pointerId) return;
  pointer = voxel(event);
  if (stroke) {
    const events = event.getCoalescedEvents?.() ?? [];
    for (const part of events.length ? events : [event]) {
      const to = voxel(part);
      paintLine(stroke.last, to);
      stroke.last = to;
    }
  } else if (drag?.kind === "pan") {
    look.pan = [drag.from[0] + event.clientX - drag.x, drag.from[1] + event.clientY - drag.y];
  } else if (drag?.kind === "window") {
    const [dx, dy] = [event.clientX - drag.x, drag.y - event.clientY], [black, white] = drag.from;
    setWindow(black - dx - dy, white + dx - dy);
  }
  draw();
});
const release = (event) => {
  if (held !== event.pointerId) return;
  held = drag = null;
  if (stroke) finish();
};
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", release);
canvas.addEventListener("pointerleave", () => ((pointer = null), draw()));
let turned = 0;
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  if (event.ctrlKey) return zoom(Math.exp(-event.deltaY / 400), event);
  if (stroke) return;
  const notch = event.deltaMode || Math.abs(event.deltaY) >= 60; // of a wheel: one slice; small steps of a touchpad add up
  turned = notch ? 30 * Math.sign(event.deltaY) : turned + event.deltaY;
  const steps = Math.trunc(turned / 30);
  turned -= 30 * steps;
  if (steps) show(look.axis, look.at[look.axis] - steps);
}, { passive: false });

const scroll = (step) => () => show(look.axis, look.at[look.axis] + step);
const tool = (name) => () => {
  paint.tool = name;
  document.querySelector(`[name=tool][value=${name}]`).checked = true;
  draw();
};
const resize = (step) => () => setSize(paint.size + Math.sign(step) * Math.max(1, Math.round(paint.size / 8)));
const flip = (id) => () => (($(id).checked = !$(id).checked), draw());
const keys = {
  ArrowUp: scroll(1), ArrowDown: scroll(-1), PageUp: scroll(10), PageDown: scroll(-10),
  b: tool("brush"), e: tool("eraser"), f: tool("fill"), "[": resize(-1), "]": resize(1),
  d: actions.done, n: actions.next, x: actions.clear, r: actions.reset, "?": actions.help, 0: actions.fit,
  o: flip("showNetwork"), u: flip("showDoubt"), "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8),
  v: () => show((look.axis + 1) % 3, look.at[(look.axis + 1) % 3]),
  c: () => showChannel((look.channel + 1) % info.channels.length),
  h: () => ((hidden = true), draw()),
};
const withControl = { z: actions.undo, "shift z": actions.redo, y: actions.redo, s: actions.save };

addEventListener("keydown", (event) => {
  if (!document.body.dataset.ready || document.querySelector("dialog[open]") || stroke) return;
  if (event.altKey && !"[]".includes(event.key)) return; // many keyboards have brackets with AltGr, which is Ctrl+Alt
  const control = (event.ctrlKey || event.metaKey) && !event.altKey;
  const own = "select, input[type=range]:not(#slice), input[type=radio]"; // have their own use for arrows
  if (event.target.matches(own) && event.key.startsWith("Arrow")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const number = key >= "1" && key <= "9" ? () => choose(Number(key) - 1) : null;
  const found = control ? withControl[event.shiftKey ? `shift ${key}` : key] : keys[key] ?? number;
  if (!found) return;
  event.preventDefault();
  if (!event.repeat || /^(Arrow|Page|[-+=[\]])/.test(key)) found();
});
addEventListener("keyup", (event) => {
  if (event.key.toLowerCase() === "h") (hidden = false), draw();
});
addEventListener("blur", () => ((hidden = false), draw()));
addEventListener("resize", draw);
addEventListener("beforeunload", (event) => {
  if (unsent.size) event.preventDefault();
});

function setSize(size) {
  paint.size = Math.min(60, Math.max(1, size));
  $("size").value = $("sizeText").textContent = paint.size;
  draw();
}

function choose(k) {
  if (!info.classes[k]) return;
  paint.value = info.classes[k].value;
  document.querySelectorAll("[name=class]")[k].checked = true;
  if (paint.tool === "eraser" && !$("only").checked) tool("brush")();
  draw();
}

for (const name of ["done", "next", "clear", "reset", "undo", "redo", "save", "help", "fit", "auto"])
  $(name).addEventListener("click", actions[name]);
// After a click of the mouse the keys are for the picture again. Keyboards stay where they are.
addEventListener("click", ({ detail }) => {
  const back = () => document.activeElement.matches("button, [type=radio]") && canvas.focus({ preventScroll: true });
  if (detail) setTimeout(back);
});
document.querySelectorAll("[name=tool]").forEach((input) => input.addEventListener("change", tool(input.value)));
for (const name of ["showLabels", "showNetwork", "showDoubt", "showNext", "opacity"]) $(name).addEventListener("input", draw);
$("size").addEventListener("input", () => setSize(Number($("size").value)));
$("slice").addEventListener("input", () => show(0, Number($("slice").value)));
$("axis").addEventListener("change", () => show(Number($("axis").value), look.at[Number($("axis").value)]));
$("channel").addEventListener("change", () => showChannel(Number($("channel").value)));
$("black").addEventListener("input", () => setWindow(Number($("black").value), Math.max(Number($("black").value) + 1, look.white[look.channel])));
$("white").addEventListener("input", () => setWindow(Math.min(Number($("white").value) - 1, look.black[look.channel]), Number($("white").value)));
$("here").addEventListener("click", () => location.reload());
$("elsewhere").addEventListener("cancel", (event) => event.preventDefault());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

async function start() {
  info = await (await call("info")).json();
  state = await (await call("claim", { body: "" })).json();
  tab = state.tab;
  sizes = info.shape;
  plane = sizes[1] * sizes[2];
  [labels, completed, doubt] = Array.from({ length: 3 }, () => new Uint8Array(sizes[0] * plane));
  document.title = `${info.name} · monai_conres draw`;
  $("name").textContent = info.name;
  $("name").title = `Saved as ${info.out}`;
  $("slice").max = sizes[0] - 1;
  $("channelLine").hidden = info.channels.length === 1;
  const names = { S: "axial", I: "axial", A: "coronal", P: "coronal", L: "sagittal", R: "sagittal" };
  info.channels.forEach((name, k) => $("channel").add(new Option(name, k)));
  info.codes.forEach((code, k) => $("axis").add(new Option(names[code] + (k ? ", to look" : ", to paint"), k)));
  info.classes.forEach(({ value, name }, k) => {
    const label = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "class", value, checked: k === 0 });
    const [swatch, key] = ["i", "kbd"].map((kind) => document.createElement(kind));
    swatch.style.background = COLORS[k % COLORS.length];
    if (k < 9) key.textContent = k + 1;
    label.append(input, swatch, name, key);
    input.addEventListener("change", () => choose(k));
    $("classes").append(label);
  });
  paint.value = info.classes[0].value;
  for (const [number, done] of Object.entries(state.slices)) {
    slice(labels, Number(number)).set(await bytes(`slices/${number}`));
    drawn.set(Number(number), done);
  }
  look.at = sizes.map((size) => size >> 1);
  const last = [...drawn.keys()].pop();
  if (last !== undefined) look.at[0] = last;
  apply(state);
  outdate(0, sizes[0]);
  await refresh();
  poll();
  await showChannel(0);
  hint("Paint with the left button. Scroll with the wheel. Press ? for all keys.");
  document.querySelectorAll("[inert]").forEach((part) => (part.inert = false));
  document.body.dataset.ready = "yes";
}

start().catch((error) => trouble(error, () => location.reload()));
