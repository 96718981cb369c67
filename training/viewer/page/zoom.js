// SPDX-License-Identifier: Apache-2.0
// A slide on a canvas: Deep Zoom tiles, pan and zoom, and one picture with a pixel per tile of the model over it.
"use strict";

const MAX_KEPT_TILES = 600;
const MAX_LOADING = 8;

class SlideCanvas {
  // onChange() is called after every change of what is shown.
  constructor(canvas, onChange) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.onChange = onChange;
    this.slide = null;
    this.overlay = null; // { picture, left, top, cell } in px of the slide; one pixel of the picture covers one cell
    this.opacity = 0.55;
    this.tiles = new Map(); // address -> image, in the order of use
    this.waiting = []; // addresses to load, the most wanted first
    this.loading = 0;
    this.pending = false;
    new ResizeObserver(() => this.resize()).observe(canvas);
    this.listen();
  }

  // slide: what /api/slides says of it; url(level, column, row): address of a tile.
  show(slide, url) {
    Object.assign(this, { slide, url, overlay: null, waiting: [] });
    this.tiles.clear();
    this.home();
  }

  setOverlay(overlay) {
    this.overlay = overlay;
    this.redraw();
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.canvas.clientWidth * ratio);
    this.canvas.height = Math.round(this.canvas.clientHeight * ratio);
    if (!this.slide) return;
    if (this.moved) this.redraw();
    else this.home();
  }

  // The view: slide px at the middle of the canvas, and canvas px per slide px.
  home() {
    const { width_px, height_px } = this.slide;
    this.fit = 0.94 * Math.min(this.canvas.width / width_px, this.canvas.height / height_px);
    Object.assign(this, { x: width_px / 2, y: height_px / 2, zoom: this.fit, moved: false });
    this.redraw();
  }

  // zoom, as that of the view: canvas px per slide px.
  moveTo(x, y, zoom = this.zoom) {
    this.zoom = Math.min(Math.max(zoom, this.fit / 2), 4);
    this.x = Math.min(Math.max(x, 0), this.slide.width_px);
    this.y = Math.min(Math.max(y, 0), this.slide.height_px);
    this.moved = true;
    this.redraw();
  }

  // Zooms so that the point under (canvasX, canvasY) stays where it is.
  zoomBy(factor, canvasX = this.canvas.width / 2, canvasY = this.canvas.height / 2) {
    const zoom = Math.min(Math.max(this.zoom * factor, this.fit / 2), 4);
    const [x, y] = this.toSlide(canvasX, canvasY);
    const shift = 1 - this.zoom / zoom;
    this.moveTo(this.x + (x - this.x) * shift, this.y + (y - this.y) * shift, zoom);
  }

  toSlide(canvasX, canvasY) {
    return [this.x + (canvasX - this.canvas.width / 2) / this.zoom, this.y + (canvasY - this.canvas.height / 2) / this.zoom];
  }

  toCanvas(x, y) {
    return [(x - this.x) * this.zoom + this.canvas.width / 2, (y - this.y) * this.zoom + this.canvas.height / 2];
  }

  redraw() {
    if (this.pending || !this.slide) return;
    this.pending = true;
    requestAnimationFrame(() => { this.pending = false; this.draw(); this.onChange(); });
  }

  draw() {
    const { context, canvas, slide } = this;
    context.fillStyle = "#f2f2f2";
    context.fillRect(0, 0, canvas.width, canvas.height);
    const last = slide.num_levels - 1;
    const wanted = Math.min(last, Math.max(0, Math.ceil(last + Math.log2(this.zoom) - 0.25)));
    const smallest = Math.max(0, Math.ceil(Math.log2(slide.tile_px))); // one tile, about
    this.waiting = [];
    // Coarse levels first: what is there already shows until finer tiles arrive.
    const levels = [];
    for (let level = Math.min(wanted, smallest); level <= wanted; level++) levels.push(level);
    for (const level of levels) this.drawLevel(level, level === wanted || level === levels[0]);
    this.waiting.reverse();
    this.load();
    if (this.overlay && this.opacity > 0) this.drawOverlay();
  }

  drawLevel(level, isWanted) {
    const size = this.slide.tile_px * 2 ** (this.slide.num_levels - 1 - level); // of a tile, slide px
    const [left, top] = this.toSlide(0, 0);
    const [right, bottom] = this.toSlide(this.canvas.width, this.canvas.height);
    const first = [Math.max(0, Math.floor(left / size)), Math.max(0, Math.floor(top / size))];
    const end = [Math.min(right, this.slide.width_px) / size, Math.min(bottom, this.slide.height_px) / size];
    for (let row = first[1]; row < end[1]; row++) {
      for (let column = first[0]; column < end[0]; column++) {
        const address = this.url(level, column, row);
        const image = this.tiles.get(address);
        if (!image) { if (isWanted) this.waiting.push(address); continue; }
        this.tiles.delete(address);
        this.tiles.set(address, image); // used now
        if (!image.naturalWidth) continue;
        // Edges on whole pixels, the same for both neighbours, so that no seam shows.
        const scale = size / this.slide.tile_px;
        const [x0, y0] = this.toCanvas(column * size, row * size).map(Math.round);
        const [x1, y1] = this.toCanvas(
          column * size + image.naturalWidth * scale, row * size + image.naturalHeight * scale).map(Math.round);
        this.context.imageSmoothingEnabled = true;
        this.context.drawImage(image, x0, y0, x1 - x0, y1 - y0);
      }
    }
  }

  load() {
    while (this.loading < MAX_LOADING && this.waiting.length) {
      const address = this.waiting.pop();
      if (this.tiles.has(address)) continue;
      const image = new Image();
      this.loading++;
      const done = () => { this.loading--; this.redraw(); this.load(); };
      Object.assign(image, { onload: done, onerror: done, src: address });
      this.tiles.set(address, image);
    }
    for (const address of this.tiles.keys()) {
      if (this.tiles.size <= MAX_KEPT_TILES) break;
      this.tiles.delete(address);
    }
  }

  drawOverlay() {
    const { picture, left, top, cell } = this.overlay;
    const [x, y] = this.toCanvas(left, top);
    this.context.globalAlpha = this.opacity;
    this.context.imageSmoothingEnabled = false;
    this.context.drawImage(picture, x, y, picture.width * cell * this.zoom, picture.height * cell * this.zoom);
    this.context.globalAlpha = 1;
  }

  listen() {
    const { canvas } = this;
    const ratio = () => canvas.width / canvas.clientWidth;
    const pointers = new Map();
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const step = event.deltaMode === 1 ? 30 * event.deltaY : event.deltaY;
      this.zoomBy(Math.exp(-step / 400), event.offsetX * ratio(), event.offsetY * ratio());
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      canvas.classList.add("moving");
      pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before) return;
      const now = [event.offsetX, event.offsetY];
      const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
      pointers.set(event.pointerId, now);
      if (other) { // two fingers
        const factor = Math.hypot(now[0] - other[0], now[1] - other[1]) / Math.hypot(before[0] - other[0], before[1] - other[1]);
        this.zoomBy(factor, (now[0] + other[0]) / 2 * ratio(), (now[1] + other[1]) / 2 * ratio());
      } else {
        const scale = ratio() / this.zoom;
        this.moveTo(this.x - (now[0] - before[0]) * scale, this.y - (now[1] - before[1]) * scale);
      }
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => {
        pointers.delete(event.pointerId);
        canvas.classList.toggle("moving", pointers.size > 0);
      });
    }
    canvas.addEventListener("dblclick", (event) => this.zoomBy(2, event.offsetX * ratio(), event.offsetY * ratio()));
    canvas.addEventListener("keydown", (event) => {
      const step = canvas.width / 8 / this.zoom;
      const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
      if (moves[event.key]) this.moveTo(this.x + moves[event.key][0], this.y + moves[event.key][1]);
      else if (event.key === "+" || event.key === "=") this.zoomBy(1.5);
      else if (event.key === "-") this.zoomBy(1 / 1.5);
      else if (event.key === "0") this.home();
      else return;
      event.preventDefault();
    });
  }
}
