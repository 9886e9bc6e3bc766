"use strict";
// The map: the nearest point's image and name, and one class at a time.
(() => {
  const data = JSON.parse(document.getElementById("map").textContent);
  const plot = document.querySelector(".plot"), svg = plot.querySelector("svg");
  const tip = plot.querySelector(".tip"), text = tip.querySelector("span");
  const picture = tip.querySelector(".atlas");
  const points = [...svg.querySelectorAll("circle")];
  const places = points.map((p) => [+p.getAttribute("cx"), +p.getAttribute("cy")]);
  document.documentElement.classList.add("live");
  // pictures by the number of their point
  const pictures = new Map([...plot.querySelectorAll(".pictures i")].map((e) => [+e.dataset.point, e]));
  let near = null, only = null;

  const hidden = (i) => only !== null && points[i].dataset.label !== only;

  // The picture under the pointer, the topmost first.
  function pictureAt(event) {
    if (plot.classList.contains("dots")) return -1;
    for (const [i, element] of [...pictures].reverse()) {
      const box = element.getBoundingClientRect();
      const inside = event.clientX >= box.left && event.clientX <= box.right
        && event.clientY >= box.top && event.clientY <= box.bottom;
      if (inside && !hidden(i)) return i;
    }
    return -1;
  }

  function mark(i) {
    if (near !== null) for (const e of [points[near], pictures.get(near)]) if (e) e.classList.remove("near");
    near = i < 0 ? null : i;
    if (near !== null) for (const e of [points[near], pictures.get(near)]) if (e) e.classList.add("near");
  }

  function show(event) {
    const box = svg.getBoundingClientRect(), scale = 1000 / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = pictureAt(event), least = best < 0 ? (18 * scale) ** 2 : -1;
    places.forEach(([px, py], i) => {
      if (hidden(i)) return;
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [i, distance];
    });
    mark(best);
    tip.hidden = best < 0;
    if (best < 0) return;
    const label = +points[best].dataset.label;
    text.textContent = data.names[best] + (label >= 0 ? ` (${data.classes[label]})` : "");
    if (picture) {
      const a = data.atlas, zoom = 136 / a.side;
      const column = best % a.columns, row = Math.floor(best / a.columns);
      picture.style.backgroundSize = `${a.columns * a.cell * zoom}px ${a.rows * a.cell * zoom}px`;
      picture.style.backgroundPosition = `${-column * a.cell * zoom}px ${-row * a.cell * zoom}px`;
    }
    const left = places[best][0] / scale, top = places[best][1] / scale;
    const right = left + 14 + tip.offsetWidth <= box.width;
    tip.style.left = `${right ? left + 14 : Math.max(0, left - 14 - tip.offsetWidth)}px`;
    tip.style.top = `${Math.max(0, Math.min(top - 20, box.height - tip.offsetHeight))}px`;
  }

  function hide() {
    mark(-1);
    tip.hidden = true;
  }

  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  // a finger leaves as soon as it is lifted, and then the image is to stay
  plot.addEventListener("pointerleave", (event) => event.pointerType === "touch" || hide());
  const toggle = document.querySelector(".toggle");
  if (toggle) {
    toggle.addEventListener("click", () => {
      const dots = plot.classList.toggle("dots");
      toggle.setAttribute("aria-pressed", !dots);
      hide();
    });
  }
  const buttons = [...document.querySelectorAll(".legend button")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      only = only === button.dataset.label ? null : button.dataset.label;
      for (const b of buttons) b.setAttribute("aria-pressed", b.dataset.label === only);
      points.forEach((p, i) => {
        for (const e of [p, pictures.get(i)]) if (e) e.classList.toggle("faint", hidden(i));
      });
      hide();
    });
  }
})();
