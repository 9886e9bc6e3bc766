"use strict";
// Labels typed beside the images, and the table of them to save.
(() => {
  const inputs = [...document.querySelectorAll(".sheet input")];
  const offered = document.getElementById("labels");
  const button = document.querySelector(".bar button"), count = document.querySelector(".bar span");
  const table = document.querySelector("footer").dataset.table;
  let saved = true;
  document.documentElement.classList.add("live");

  const label = (input) => input.value.trim();
  // as `spreadsheet.cell`: an apostrophe before what a spreadsheet would run as a formula
  const plain = (text) => /^[=+\-@\t\r]/.test(text) ? "'" + text : text;
  const quoted = (text) => /[",;\t\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  const cell = (text) => quoted(plain(text));

  // What was typed is still there after the page was closed, where the browser keeps it.
  const place = `labels of ${location.pathname}`;
  function keep() {
    const typed = inputs.filter(label).map((x) => [x.dataset.name, x.value]);
    try { localStorage.setItem(place, JSON.stringify(Object.fromEntries(typed))); } catch { }
  }
  function restore() {
    let typed = {};
    try { typed = JSON.parse(localStorage.getItem(place)) || {}; } catch { }
    for (const input of inputs) {
      if (!Object.hasOwn(typed, input.dataset.name)) continue;
      input.value = typed[input.dataset.name];
      offer(input);
    }
  }
  function offer(input) {
    const known = [...offered.options].map((option) => option.value);
    if (!label(input) || known.includes(label(input))) return;
    const option = document.createElement("option");
    option.value = label(input);
    offered.append(option);
  }

  function show() {
    const labels = inputs.map(label).filter(Boolean);
    count.textContent = `${labels.length} of ${inputs.length} labelled` + (saved ? "" : ", not saved");
  }

  inputs.forEach((input, i) => {
    input.addEventListener("input", () => { saved = false; keep(); show(); });
    input.addEventListener("change", () => offer(input));
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && inputs[i + 1]) inputs[i + 1].focus();
    });
  });

  button.addEventListener("click", () => {
    const rows = inputs.map((x) => [x.dataset.name, label(x), x.dataset.size].map(cell).join(","));
    const text = "\ufeff" + ["file,label,cluster_size", ...rows, ""].join("\n");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = table;
    link.click();
    saved = true;
    show();
  });

  window.addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });
  restore();
  show();
})();
