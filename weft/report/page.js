"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = { displayModeBar: false, responsive: true };
  const touch = matchMedia("(pointer: coarse)").matches;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  function themed(figure) {
    const { data, layout } = structuredClone(figure);
    for (const trace of data.filter((t) => t.meta)) {
      const c = colour(trace.meta);
      trace.marker = { ...trace.marker, color: c };
      trace.line = { ...trace.line, color: c };
      if (trace.error_y) trace.error_y.color = c;
    }
    for (const axis of [layout.xaxis, layout.yaxis]) axis.gridcolor = colour("rule");
    for (const shape of layout.shapes ?? []) shape.line.color = colour("muted");
    for (const note of layout.annotations ?? []) note.font = { color: colour("muted"), size: 12 };
    layout.font = { family: "system-ui, sans-serif", size: 13, color: colour("ink") };
    layout.hoverlabel = { align: "left", bgcolor: colour("card"), bordercolor: colour("rule"), font: { color: colour("ink") } };
    return { data, layout: { ...layout, paper_bgcolor: "transparent", plot_bgcolor: "transparent", dragmode: touch ? false : "zoom" } };
  }

  function draw() {
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout } = themed(figure);
      Plotly.react(id, data, layout, config);
    }
  }

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  const button = document.getElementById("copy");
  const command = document.getElementById("command");
  button.hidden = false;
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(command);
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected";
    }
  });
})();
