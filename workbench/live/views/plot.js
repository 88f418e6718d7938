// Draws a plotly figure sent as JSON, when there is time for it: a figure that arrives while another is being drawn
// waits, a newer one takes its place, and what is not on the screen is drawn when it comes into view. Python is told
// which figure was drawn last, so that it sends no more than the browser can draw.

const CONFIG = { displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] }
const MARK = "step" // the name of the shape that marks the reader's step
const NEAR = "150px" // what is this close to the screen is drawn already

// plotly puts its style sheet into the document, which a shadow tree does not see
function adoptStyles(root) {
  const own = document.getElementById("plotly.js-style-global")
  if (own === null || !(root instanceof ShadowRoot)) return
  const style = document.createElement("style")
  style.textContent = [...own.sheet.cssRules].map((rule) => rule.cssText).join("\n")
  root.append(style)
}

function moveMark(shapes, step) {
  for (const shape of shapes) {
    if (shape.name === MARK) {
      Object.assign(shape, { visible: step !== null, x0: step ?? 0, x1: step ?? 0 })
    }
  }
}

export function render({ model }) {
  const plot = document.createElement("div")
  plot.style.width = plot.style.height = "100%"
  let drawing = false
  let drawn = 0
  let inView = false
  let marked = null
  let listening = false

  // what is off the screen can wait until it is scrolled to, and nobody waits for it
  async function draw() {
    if (drawing) return
    if (!inView) {
      model.drawn = JSON.parse(model.figure).version
      return
    }
    if (window.Plotly === undefined) {
      setTimeout(draw, 50)
      return
    }
    const figure = JSON.parse(model.figure)
    if (!(figure.version > drawn)) return
    drawing = true
    figure.layout.width = plot.clientWidth
    figure.layout.height = plot.clientHeight
    marked = model.step
    moveMark(figure.layout.shapes ?? [], marked)
    try {
      if (drawn === 0) adoptStyles(plot.getRootNode())
      await window.Plotly.react(plot, figure.data, figure.layout, CONFIG)
    } finally {
      drawing = false
      drawn = figure.version
      model.drawn = drawn
    }
    mark()
    if (!listening) {
      listening = true
      plot.on("plotly_click", (event) => {
        const { x, y } = event.points[0]
        model.send_msg({ x, y })
      })
    }
    requestAnimationFrame(draw)
  }

  function mark() {
    if (drawn === 0 || drawing || marked === model.step) return
    marked = model.step
    const shapes = structuredClone(plot.layout.shapes ?? [])
    if (shapes.some((shape) => shape.name === MARK)) {
      moveMark(shapes, marked)
      window.Plotly.relayout(plot, { shapes })
    }
  }

  model.on("figure", draw)
  model.on("step", mark)

  const sight = new IntersectionObserver(
    (entries) => {
      inView = entries.at(-1).isIntersecting
      draw()
    },
    { rootMargin: NEAR },
  )
  const size = new ResizeObserver(() => {
    const [width, height] = [plot.clientWidth, plot.clientHeight]
    const full = plot._fullLayout
    if (drawn > 0 && width > 0 && (full.width !== width || full.height !== height)) {
      window.Plotly.relayout(plot, { width, height })
    }
  })
  sight.observe(plot)
  size.observe(plot)
  model.on("remove", () => {
    sight.disconnect()
    size.disconnect()
    if (drawn > 0) window.Plotly.purge(plot)
  })
  return plot
}
