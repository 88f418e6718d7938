// Filters the systems that the page lists, and draws the figures in the reader's theme.

"use strict"
{
  const CONFIG = { displayModeBar: false, responsive: true }
  const LEGEND = 24 // pixels that its legend takes; the boxes of the filter show the same marks
  const NARROW = 760 // pixels of the plot below which the axis takes its shorter name

  const element = (id) => document.getElementById(id)
  const figures = JSON.parse(element("figures").textContent)
  const systems = [...document.querySelectorAll(".system")]
  const root = document.documentElement
  const dark = matchMedia("(prefers-color-scheme: dark)")
  const theme = () => root.dataset.theme || (dark.matches ? "dark" : "light")

  // A row is the traces that carry its slug, on an axis of slugs; the keys of the legend carry none.
  function drawForest() {
    const { data, layout } = figures[theme()].forest
    const left = new Set(systems.filter((system) => !system.hidden).map((system) => system.id))
    const rows = layout.yaxis.categoryarray
    const kept = rows.filter((slug) => left.has(slug))
    element("effects").hidden = kept.length === 0
    if (kept.length === 0) return
    const title = structuredClone(layout.xaxis.title)
    if (element("forest").clientWidth < NARROW) title.text = layout.meta.short
    const changed = {
      height: layout.height - layout.meta.row * (rows.length - kept.length) - LEGEND,
      margin: { ...layout.margin, b: layout.margin.b - LEGEND },
      showlegend: false,
      xaxis: { ...layout.xaxis, title },
      yaxis: { ...layout.yaxis, categoryarray: kept, range: [kept.length - 0.5, -0.5] },
    }
    const traces = data.filter((trace) => trace.meta === undefined || left.has(trace.meta))
    Plotly.react("forest", structuredClone(traces), { ...layout, ...changed }, CONFIG)
  }

  function drawStudy(system) {
    const plot = system.querySelector(".figure")
    if (plot === null || !system.open) return
    const { data, layout } = structuredClone(figures[theme()].studies[system.id])
    Plotly.react(plot, data, layout, CONFIG)
  }

  function draw() {
    drawForest()
    systems.forEach(drawStudy)
  }

  function filter() {
    const words = element("words").value.toLowerCase().split(/\s+/).filter(Boolean)
    const family = element("family").value
    const verdicts = [...document.querySelectorAll("[name=verdict]:checked")].map((box) => box.value)
    for (const system of systems) {
      const { text, family: own, verdict } = system.dataset
      const found = words.every((word) => text.includes(word))
      system.hidden = !(found && [own, ""].includes(family) && (verdicts.length === 0 || verdicts.includes(verdict)))
    }
    const count = systems.filter((system) => !system.hidden).length
    element("count").value = `${count} of ${systems.length} systems`
    element("none").hidden = count > 0
    drawForest()
  }

  function show(system) {
    system.open = true
    system.scrollIntoView({ block: "start" })
    system.querySelector("summary").focus({ preventScroll: true })
  }

  element("theme").value = root.dataset.theme
  element("theme").addEventListener("change", (event) => {
    root.dataset.theme = event.target.value
    draw()
  })
  dark.addEventListener("change", draw)
  element("filter").addEventListener("input", filter)
  element("filter").addEventListener("submit", (event) => event.preventDefault())
  element("filter").addEventListener("reset", () => setTimeout(filter)) // once the fields are empty
  systems.forEach((system) => system.addEventListener("toggle", () => drawStudy(system)))
  filter() // a page that is loaded again keeps what was typed
  const named = element(decodeURIComponent(location.hash.slice(1)))
  if (systems.includes(named)) show(named)
  if (element("forest").on !== undefined) {
    element("forest").on("plotly_click", ({ points }) => show(element(points[0].data.meta)))
  }
}
