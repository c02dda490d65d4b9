"use strict";
for (const section of document.querySelectorAll("section")) {
  const svg = section.querySelector(".timeline svg");
  if (!svg) continue;
  const all = Number(svg.dataset.width), height = svg.viewBox.baseVal.height;
  const axis = section.querySelector(".axis"), detail = section.querySelector(".detail");
  let from = 0, width = all;

  function draw() {
    width = Math.min(all, Math.max(all / 2000, width));
    from = Math.min(all - width, Math.max(0, from));
    svg.setAttribute("viewBox", `${from} 0 ${width} ${height}`);
    const rough = width / 1000 / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough);
    axis.textContent = "";
    for (let v = Math.ceil(from / 1000 / step) * step; v <= (from + width * 0.97) / 1000; v += step) {
      const label = document.createElement("span");
      label.style.left = `${(v * 1000 - from) / width * 100}%`;
      label.textContent = String(Number(v.toPrecision(6)));
      axis.append(label);
    }
  }

  function zoom(by, share) {
    const at = from + width * share;
    width = by === 0 ? all : width / by;
    from = by === 0 ? 0 : at - Math.min(all, width) * share;
    draw();
  }

  section.querySelectorAll("[hidden]").forEach(e => { e.hidden = false; });
  section.querySelectorAll("[data-zoom]").forEach(b => b.addEventListener("click", () => zoom(Number(b.dataset.zoom), 0.5)));
  svg.addEventListener("wheel", e => {
    if (!e.ctrlKey) return;
    e.preventDefault();
    zoom(e.deltaY < 0 ? 1.3 : 1 / 1.3, e.offsetX / svg.clientWidth);
  }, { passive: false });
  let last = null;
  svg.addEventListener("pointerdown", e => { last = e.clientX; });
  addEventListener("pointerup", () => { last = null; });
  svg.addEventListener("pointermove", e => {
    if (last === null) return;
    from -= (e.clientX - last) / svg.clientWidth * width;
    last = e.clientX;
    draw();
  });
  const tell = e => {
    const title = e.target.closest("rect")?.querySelector("title");
    if (title) detail.textContent = title.textContent;
  };
  svg.addEventListener("pointerover", tell);
  svg.addEventListener("click", tell);
}
