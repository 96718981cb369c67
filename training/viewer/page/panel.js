// SPDX-License-Identifier: Apache-2.0
// What stands beside the slide: which slide, which text, which overlay, its legend, and slides of the index.
"use strict";

const $ = (selector) => document.querySelector(selector);
const view = new SlideCanvas($("#slide"), drawMarks);
let about = null; // what /api/slides says
let number = 0; // of the slide that is shown
let features = null; // its tiles: places and codewords
let match = null; // what was found for the last text
let onlyCodeword = null;

async function ask(path) {
  const answer = await fetch(path);
  const found = await answer.json().catch(() => ({ error: `The server answered ${answer.status}.` }));
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function say(text, kind = "") {
  $("#status").textContent = text;
  $("#status").className = kind;
}

async function showSlide(chosen) {
  number = chosen;
  features = match = onlyCodeword = null;
  const slide = about.slides[number];
  $("#slides").value = number;
  const mm = (px) => (px * slide.mpp / 1000).toFixed(1);
  $("#facts").textContent = `${slide.width_px.toLocaleString("en")} × ${slide.height_px.toLocaleString("en")} px, ` +
    `${mm(slide.width_px)} × ${mm(slide.height_px)} mm, ${+slide.mpp.toFixed(4)}\u00a0µm/px`;
  $("#overview").src = `api/slides/${number}/thumbnail.jpg`;
  view.show(slide, (level, column, row) => `api/slides/${chosen}/tiles/${level}/${column}/${row}.jpg`);
  for (const name of ["#query", "#overlay", "#matching", "#nearest"]) $(name).hidden = true;
  chooseLayer("none");
  say("");
  if (about.has_model) await waitForFeatures(chosen);
}

async function waitForFeatures(chosen) {
  for (let seconds = 0; ; seconds++) {
    const { state, message } = await ask(`api/slides/${chosen}/state`);
    if (number !== chosen) return; // another slide was chosen meanwhile
    if (state === "failed") return say(message, "error");
    if (state === "ready") break;
    say(`Reading or encoding the tiles of this slide: ${seconds} s`, "busy");
    await new Promise((done) => setTimeout(done, seconds ? 1000 : 150));
  }
  const found = await ask(`api/slides/${chosen}/features`);
  if (number !== chosen) return;
  features = found;
  say(`${features.tile_xy.length.toLocaleString("en")} tiles, ${features.num_codewords} codewords`);
  $("#overlay").hidden = false;
  $("#query").hidden = !about.has_text;
  if (about.has_index) fillSlides("#nearest", await ask(`api/slides/${chosen}/nearest`), chosen);
  if (about.has_text && $("#text").value.trim()) await find();
}

async function find() {
  const text = $("#text").value.trim();
  if (!text || !features) return;
  const chosen = number;
  const asked = new URLSearchParams({ text, against: $("#against").value.trim(), mode: $("#mode").value });
  say("Comparing every tile with the text", "busy");
  try {
    const found = await ask(`api/slides/${chosen}/match?${asked}`);
    if (number !== chosen) return;
    match = found;
    say(`Similarity of the slide: ${match.similarity.toFixed(3)}`);
    $("[value=match]").disabled = false;
    chooseLayer("match");
    fillSlides("#matching", match.slides, chosen);
  } catch (error) {
    say(error.message, "error");
  }
}

function fillSlides(section, slides, chosen) {
  if (number !== chosen) return;
  $(section).hidden = slides.length === 0;
  $(`${section} ol`).replaceChildren(...slides.map((slide) => {
    const item = document.createElement("li");
    const [name, score] = [document.createElement("span"), document.createElement("b")];
    [name.textContent, score.textContent, name.title] = [slide.slide_id, slide.score.toFixed(3), slide.slide_id];
    item.append(name, score);
    if (slide.number !== null) {
      const image = document.createElement("img");
      Object.assign(image, { src: `api/slides/${slide.number}/thumbnail.jpg`, alt: "" });
      item.prepend(image);
      item.tabIndex = 0;
      item.onclick = () => start(slide.number);
      item.onkeydown = (event) => event.key === "Enter" && item.onclick();
      item.classList.toggle("here", slide.number === chosen);
    }
    return item;
  }));
}

// Colours. A match: blue speaks against the text, red for it. Codewords: hues far from their neighbours'.
const RAMP = [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]];

function rampColour(share) { // -1 .. 1
  const place = (Math.min(1, Math.max(-1, share)) + 1) / 2 * (RAMP.length - 1);
  const from = Math.min(RAMP.length - 2, Math.floor(place));
  return RAMP[from].map((value, k) => Math.round(value + (RAMP[from + 1][k] - value) * (place - from)));
}

function codewordColour(codeword) {
  const [hue, light] = [(codeword * 137.508) % 360, [0.45, 0.62, 0.34][codeword % 3]];
  const part = (k) => {
    const at = (k + hue / 30) % 12;
    return Math.round(255 * (light - 0.68 * Math.min(light, 1 - light) * Math.max(-1, Math.min(at - 3, 9 - at, 1))));
  };
  return [part(0), part(8), part(4)];
}

// Numbers around their middle, as shares of the 98th percentile of their distance from it.
function spread(values) {
  const known = values.filter((value) => value !== null).sort((a, b) => a - b);
  const middle = match.mode === "contribution" ? 0 : known[Math.floor(known.length / 2)] ?? 0;
  const distances = known.map((value) => Math.abs(value - middle)).sort((a, b) => a - b);
  return { middle, reach: distances[Math.floor(0.98 * (distances.length - 1))] || 1e-12 };
}

function chooseLayer(layer) {
  if (layer === "none") $("[value=match]").disabled = !match;
  $(`[name=layer][value=${layer}]`).checked = true;
  $("#legend").replaceChildren();
  if (layer === "none" || !features) return view.setOverlay(null);
  let colour = (tile) => codewordColour(features.codewords[tile]);
  let shown = (tile) => onlyCodeword === null || features.codewords[tile] === onlyCodeword;
  if (layer === "match") {
    const { middle, reach } = spread(match.values);
    colour = (tile) => rampColour((match.values[tile] - middle) / reach);
    shown = (tile) => match.values[tile] !== null;
    showRamp(middle, reach);
  } else {
    showCodewords();
  }
  view.setOverlay(paint(colour, shown));
}

// One pixel per place of the tile grid.
function paint(colour, shown) {
  const { tile_xy, tile_size_level0_px: cell } = features;
  const left = Math.min(...tile_xy.map(([x]) => x)), top = Math.min(...tile_xy.map(([, y]) => y));
  const places = tile_xy.map(([x, y]) => [Math.round((x - left) / cell), Math.round((y - top) / cell)]);
  const picture = document.createElement("canvas");
  picture.width = Math.max(...places.map(([x]) => x)) + 1;
  picture.height = Math.max(...places.map(([, y]) => y)) + 1;
  const pixels = picture.getContext("2d").createImageData(picture.width, picture.height);
  places.forEach(([x, y], tile) => {
    if (shown(tile)) pixels.data.set([...colour(tile), 255], 4 * (y * picture.width + x));
  });
  picture.getContext("2d").putImageData(pixels, 0, 0);
  const slide = about.slides[number];
  return { picture, cell, left: left - slide.left_px, top: top - slide.top_px };
}

function showRamp(middle, reach) {
  const ramp = document.createElement("canvas");
  Object.assign(ramp, { width: 201, height: 1, className: "ramp" });
  const pixels = ramp.getContext("2d").createImageData(201, 1);
  for (let x = 0; x < 201; x++) pixels.data.set([...rampColour(x / 100 - 1), 255], 4 * x);
  ramp.getContext("2d").putImageData(pixels, 0, 0);
  const ends = document.createElement("div");
  ends.className = "ends";
  const words = match.mode === "contribution" ? ["speaks against", "", "speaks for"] : ["less like it", "", "more like it"];
  for (const [place, value] of [middle - reach, middle, middle + reach].entries()) {
    const label = document.createElement("span");
    label.textContent = `${words[place]} ${value.toPrecision(2)}`.trim();
    if (place === 1 && middle === 0) label.textContent = "0";
    ends.append(label);
  }
  $("#legend").append(ramp, ends);
}

function showCodewords() {
  const counts = Array(features.num_codewords).fill(0);
  features.codewords.forEach((codeword) => counts[codeword]++);
  const list = document.createElement("div");
  list.className = "codewords";
  counts.forEach((count, codeword) => {
    if (!count) return;
    const [button, swatch, tiles] = ["button", "i", "span"].map((name) => document.createElement(name));
    swatch.style.backgroundColor = `rgb(${codewordColour(codeword)})`;
    tiles.textContent = count.toLocaleString("en");
    button.append(swatch, `${codeword}`, tiles);
    button.title = `Show only codeword ${codeword}: ${count} tiles`;
    button.setAttribute("aria-pressed", onlyCodeword === codeword);
    button.onclick = () => { onlyCodeword = onlyCodeword === codeword ? null : codeword; chooseLayer("codewords"); };
    list.append(button);
  });
  $("#legend").append(list);
}

function drawMarks() {
  const slide = view.slide, ratio = view.canvas.width / view.canvas.clientWidth;
  const umPerPx = slide.mpp * ratio / view.zoom;
  const exponent = 10 ** Math.floor(Math.log10(140 * umPerPx));
  const um = [5, 2, 1].map((step) => step * exponent).find((length) => length <= 140 * umPerPx);
  $("#scale i").style.width = `${um / umPerPx}px`;
  $("#scale span").textContent = um >= 1000 ? `${um / 1000} mm` : `${um} µm`;
  const [overview, frame] = [$("#overview"), $("#overview-frame")];
  frame.hidden = !overview.naturalWidth; // nothing to lie on yet
  const scale = overview.clientWidth / slide.width_px;
  const [left, top] = view.toSlide(0, 0), [right, bottom] = view.toSlide(view.canvas.width, view.canvas.height);
  const clip = (value, end) => Math.min(Math.max(value, 0), end) * scale;
  Object.assign(frame.style, {
    left: `${overview.offsetLeft + clip(left, slide.width_px)}px`,
    top: `${overview.offsetTop + clip(top, slide.height_px)}px`,
    width: `${clip(right, slide.width_px) - clip(left, slide.width_px)}px`,
    height: `${clip(bottom, slide.height_px) - clip(top, slide.height_px)}px`,
  });
}

function describeTileAt(event) {
  const ratio = view.canvas.width / view.canvas.clientWidth, slide = about.slides[number];
  const [x, y] = view.toSlide(event.offsetX * ratio, event.offsetY * ratio);
  const layer = $("[name=layer]:checked").value;
  let text = "";
  if (features && layer !== "none") {
    const size = features.tile_size_level0_px;
    const tile = features.tile_xy.findIndex(([left, top]) => {
      const [inX, inY] = [x + slide.left_px - left, y + slide.top_px - top];
      return inX >= 0 && inY >= 0 && inX < size && inY < size;
    });
    if (tile >= 0 && layer === "codewords") text = `tile ${tile}, codeword ${features.codewords[tile]}`;
    if (tile >= 0 && layer === "match") text = `tile ${tile}, ${match.values[tile] ?? "no value"}`;
  }
  $("#hover").textContent = text;
}

async function start(chosen, asked = new URLSearchParams()) {
  try {
    const shown = showSlide(chosen);
    const { mpp, left_px, top_px } = view.slide, ratio = view.canvas.width / view.canvas.clientWidth;
    const [x, y, um] = ["x", "y", "um_per_px"].map((name) => parseFloat(asked.get(name)));
    if (um > 0) view.moveTo(x - left_px, y - top_px, mpp / um * ratio);
    await shown;
    if (features && asked.get("layer") === "codewords") chooseLayer("codewords");
  } catch (error) {
    say(error.message, "error");
  }
}

$("#query").addEventListener("submit", (event) => { event.preventDefault(); find(); });
$("#text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); find(); }
});
$("#mode").addEventListener("change", find);
$("#layers").addEventListener("change", (event) => { onlyCodeword = null; chooseLayer(event.target.value); });
$("#opacity").addEventListener("input", (event) => { view.opacity = event.target.value / 100; view.redraw(); });
$("#slides").addEventListener("change", (event) => start(+event.target.value));
$("#zoom-in").addEventListener("click", () => view.zoomBy(1.5));
$("#zoom-out").addEventListener("click", () => view.zoomBy(1 / 1.5));
$("#zoom-home").addEventListener("click", () => view.home());
$("#slide").addEventListener("pointermove", describeTileAt);
$("#overview").addEventListener("load", drawMarksSoon);
$("#overview").addEventListener("click", (event) => {
  const scale = view.slide.width_px / event.target.clientWidth;
  view.moveTo(event.offsetX * scale, event.offsetY * scale);
});

function drawMarksSoon() {
  if (view.slide) view.redraw();
}

ask("api/slides").then((found) => {
  about = found;
  $("#slides").replaceChildren(...about.slides.map((slide, place) => new Option(slide.slide_id, place)));
  // The address can name what is shown, so that a view can be linked to: slide, text, against, layer, and a place by
  // x and y (level-0 px of its middle) and um_per_px.
  const asked = new URLSearchParams(location.search);
  $("#text").value = asked.get("text") ?? "";
  $("#against").value = asked.get("against") ?? "";
  $("#against").closest("details").open = Boolean($("#against").value);
  const named = about.slides.findIndex((slide) => slide.slide_id === asked.get("slide"));
  start(Math.max(0, named), asked);
}).catch((error) => say(error.message, "error"));
