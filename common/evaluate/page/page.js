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
  let near = null, only = null;

  function show(event) {
    const box = svg.getBoundingClientRect(), scale = 1000 / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = -1, least = (18 * scale) ** 2;
    places.forEach(([px, py], i) => {
      if (only !== null && points[i].dataset.label !== only) return;
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [i, distance];
    });
    if (near) near.classList.remove("near");
    near = best < 0 ? null : points[best];
    tip.hidden = best < 0;
    if (best < 0) return;
    near.classList.add("near");
    const label = +near.dataset.label;
    text.textContent = data.names[best] + (label >= 0 ? ` (${data.classes[label]})` : "");
    if (picture) {
      const a = data.atlas, zoom = 96 / a.side;
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
    if (near) near.classList.remove("near");
    near = null;
    tip.hidden = true;
  }

  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
  const buttons = [...document.querySelectorAll(".legend button")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      only = only === button.dataset.label ? null : button.dataset.label;
      for (const b of buttons) b.setAttribute("aria-pressed", b.dataset.label === only);
      for (const p of points) p.classList.toggle("faint", only !== null && p.dataset.label !== only);
      hide();
    });
  }
})();
