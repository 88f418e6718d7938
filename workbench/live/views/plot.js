// Draws a plotly figure sent as JSON, when there is time for it: a figure that arrives while another is being drawn
// waits, a newer one takes its place, and what is not on the screen is drawn when it comes into view. Python is told
// which figure was drawn last, so that it sends no more than the browser can draw.

const CONFIG = { displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] }
const MARK = "step" // the name of the shape that marks the reader's step
const NEAR = "150px" // what is this close to the screen is drawn already

// the plots of a page take turns, with a pause in which the browser shows what is drawn and hears the reader
let turn = Promise.resolve()
function takeTurn(work) {
  turn = turn
    .then(work)
    .catch((error) => console.error(error)) // one that cannot be drawn does not hold up the others
    .then(() => new Promise((next) => setTimeout(next, 0)))
}

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
  let drawn = 0
  let inView = false
  let removed = false
  let marked = null
  let listening = false

  async function react() {
    const figure = JSON.parse(model.figure) // the newest by now
    if (figure.version <= drawn || removed) return
    figure.layout.width = plot.clientWidth
    figure.layout.height = plot.clientHeight
    marked = model.step
    moveMark(figure.layout.shapes ?? [], marked)
    try {
      if (drawn === 0) adoptStyles(plot.getRootNode())
      await window.Plotly.react(plot, figure.data, figure.layout, CONFIG)
    } finally {
      drawn = figure.version
      model.drawn = drawn
    }
    if (!listening) {
      listening = true
      plot.on("plotly_click", (event) => {
        const { x, y } = event.points[0]
        model.send_msg({ x, y })
      })
    }
    mark()
  }

  // what is off the screen can wait until it is scrolled to, and nobody waits for it
  function draw() {
    if (!inView) {
      model.drawn = JSON.parse(model.figure).version
    } else if (window.Plotly === undefined) {
      setTimeout(draw, 50)
    } else {
      takeTurn(react)
    }
  }

  function mark() {
    if (drawn === 0 || marked === model.step) return
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
    removed = true
    sight.disconnect()
    size.disconnect()
    if (drawn > 0) window.Plotly.purge(plot)
  })
  return plot
}
