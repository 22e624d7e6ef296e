"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const shown = {};

  function theme() {
    const style = getComputedStyle(root);
    const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
    const axis = { gridcolor: line, linecolor: line, tickcolor: line };
    return { font: { color: ink, family: "system-ui, sans-serif", size: 12 }, axis };
  }

  function layoutOf(key) {
    const figure = figures[key], { font, axis } = theme(), own = figure.panels[shown[key] || 0].layout;
    const narrow = window.innerWidth < 640;
    const margin = narrow ? { ...figure.layout.margin, l: 48, r: 8 } : figure.layout.margin;
    return { ...figure.layout, ...own, font, margin,
             xaxis: { ...own.xaxis, ...axis }, yaxis: { ...own.yaxis, ...axis } };
  }

  function draw(place) {
    const key = place.dataset.key, visible = figures[key].panels[shown[key] || 0].visible;
    const data = figures[key].data.map((trace, number) => ({ ...trace, visible: visible[number] }));
    const bar = matchMedia("(hover: none)").matches ? false : "hover";
    place.style.height = `${figures[key].layout.height + 14}px`;
    const options = { responsive: true, displaylogo: false, displayModeBar: bar, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };
    Plotly.react(place, data, layoutOf(key), options);
  }

  const places = [...document.querySelectorAll(".chart")];
  const drawAll = () => places.forEach(draw);
  drawAll();
  root.dataset.drawn = places.length;

  document.querySelectorAll(".panels button").forEach((button) => button.addEventListener("click", () => {
    const key = button.dataset.chart, part = Number(button.dataset.part), panels = figures[key].panels;
    const wanted = [...panels[shown[key] || 0].choice];
    wanted[part] = button.dataset.value;
    const fits = (panel) => panel.choice.filter((each, place) => each === wanted[place]).length;
    const able = panels.map((panel, number) => [panel, number]).filter(([panel]) => panel.choice[part] === wanted[part]);
    shown[key] = able.sort(([a], [b]) => fits(b) - fits(a))[0][1];
    const now = panels[shown[key]].choice;
    document.querySelectorAll(`.panels button[data-chart="${key}"]`).forEach((each) =>
      each.setAttribute("aria-pressed", each.dataset.value === now[Number(each.dataset.part)]));
    draw(places.find((place) => place.dataset.key === button.dataset.chart));
  }));

  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  function compare(one, other) {
    if (one === "" || other === "") return (one === "") - (other === "") || 0;
    const a = Number(one), b = Number(other);
    return Number.isNaN(a) || Number.isNaN(b) ? one.localeCompare(other) : a - b;
  }

  document.querySelectorAll("table.sortable th button").forEach((button) => button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), column = head.cellIndex;
    const numeric = table.tBodies[0].rows[0]?.cells[column].classList.contains("number");
    const now = head.getAttribute("aria-sort");
    const down = now === "none" ? numeric : now === "ascending";
    table.querySelectorAll("th").forEach((each) => each.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const empty = (value(a) === "") - (value(b) === "");
      return empty || (down ? -1 : 1) * compare(value(a), value(b));
    });
    table.tBodies[0].append(...rows);
  }));
})();
