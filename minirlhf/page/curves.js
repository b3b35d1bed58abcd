"use strict";
// The page of a run. All it shows is in the JSON above, which minirlhf/page/collect.py describes.
// Text of models is only ever set as text, never as HTML; `visible` shows what could not be seen.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

// ---- small things ------------------------------------------------------------------------------

// An element with attributes, and with children that are elements or text.
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const UNSEEN = new RegExp("[\\u0080-\\u009f\\u00ad\\u061c\\u200b-\\u200f\\u2028-\\u202e"
  + "\\u2060-\\u206f\\ufeff\\ud800-\\udfff]", "gu");

// Control characters as symbols: the escape character of terminals becomes ␛, a line end ⏎; what
// turns the direction of writing, and invisible marks, become their numbers.
function visible(text) {
  return text.replace(/[\u0000-\u001f\u007f]/g, (c) =>
    c === "\n" ? "⏎" : c === "\u007f" ? "␡" : String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(UNSEEN, (c) =>
      "<U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + ">");
}

// A text of several lines, which stay lines.
function paragraph(text) {
  return text.split("\n").map(visible).join("\n");
}

// The question of a prompt, without the template around it.
function question(prompt) {
  return prompt.replace(/^Prompt: /, "").replace(/\nResponse:$/, "");
}

// A token; the space that most of them begin with is shown.
function word(token) {
  return visible(token).replace(/^ /, "␣");
}

function number(value, digits = 2) {
  if (value === null || value === undefined) return "";
  const text = Math.abs(value).toFixed(digits);
  return value < 0 && +text !== 0 ? "−" + text : text;     // never −0.00
}

function signed(value) {
  return +value.toFixed(2) > 0 ? "+" + number(value) : number(value);
}

// A table. Each cell is text or an element; columns whose number is in `numeric` hold numbers.
function table(caption, head, rows, foot, numeric, style) {
  const cell = (tag) => (content, i) =>
    make(tag, numeric.has(i) ? { class: "number" } : {}, content);
  const row = (cells, i) => {
    const line = make("tr", {},
      ...cells.map((content, j) => cell(j === 0 ? "th" : "td")(content, j)));
    line.firstChild.setAttribute("scope", "row");
    return line;
  };
  const made = make("table", style ? { class: style } : {},
    caption ? make("caption", {}, caption) : null,
    make("thead", {}, make("tr", {}, ...head.map(cell("th")))),
    make("tbody", {}, ...rows.map(row)));
  if (foot) made.append(make("tfoot", {}, row(foot)));
  return make("div", { class: "scroll", tabindex: "0", role: "region",
    "aria-label": caption || "table" }, made);
}

function section(id, title, ...children) {
  const part = make("section", { id, "aria-labelledby": id + "-title" },
    make("h2", { id: id + "-title" }, title), ...children);
  document.getElementById("page").append(part);
  document.getElementById("contents").append(make("a", { href: "#" + id }, title));
  return part;
}

// ---- curves ------------------------------------------------------------------------------------

const DASHES = { "-": "none", "--": "7 4", "-.": "8 3 2 3", ":": "2 4" };
const WIDTH = 340, HEIGHT = 210, LEFT = 58, RIGHT = 8, TOP = 8, BOTTOM = 38;

// Round numbers from low to high, about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const places = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) {
    places.push(i * step);
  }
  return places;
}

function tickText(value) {
  return Math.abs(value) < 1e-12 ? "0" : String(+value.toPrecision(3)).replace("-", "−");
}

// Marks of different shapes tell the lines apart without colours.
function mark(shape, x, y, colour) {
  const points = [[[-3, -3], [3, -3], [3, 3], [-3, 3]], [[0, -4], [4, 3], [-4, 3]],
    [[0, -4], [4, 0], [0, 4], [-4, 0]]][shape % 4 - 1];
  if (!points) return draw("circle", { cx: x, cy: y, r: 3, fill: colour });
  const corners = points.map(([a, b]) => `${x + a},${y + b}`).join(" ");
  return draw("polygon", { points: corners, fill: colour });
}

function line(curve, shape, toX, toY) {
  const points = curve.x.map((x, i) => [toX(x), toY(curve.y[i])]);
  const group = draw("g", {});
  if (curve.low.length) {
    const upper = curve.x.map((x, i) => `${toX(x)},${toY(curve.high[i])}`);
    const lower = curve.x.map((x, i) => `${toX(x)},${toY(curve.low[i])}`).reverse();
    group.append(draw("polygon", { points: [...upper, ...lower].join(" "), fill: curve.colour,
      opacity: 0.2 }));
  }
  group.append(draw("polyline", { points: points.map((p) => p.join(",")).join(" "), fill: "none",
    stroke: curve.colour, "stroke-width": 2, "stroke-dasharray": DASHES[curve.style] }));
  const every = Math.max(1, Math.ceil(points.length / 12));
  const marked = curve.marks ? points.filter((_, i) => i % every === 0) : [];
  group.append(...marked.map(([x, y]) => mark(shape, x, y, curve.colour)));
  return group;
}

function chart(panel) {
  const all = panel.curves.flatMap((c) => [...c.y, ...c.low, ...c.high]);
  const places = panel.curves.flatMap((c) => c.x);
  let [low, high] = panel.limits;
  const least = Math.min(...all), most = Math.max(...all), air = 0.06 * (most - least || 1);
  low = low === null ? least - air : low;
  high = high === null ? most + air : high;
  if (high <= low) high = low + 1;
  let first = Math.min(...places), last = Math.max(...places);
  if (first === last) [first, last] = [first - 1, last + 1];
  const toX = (x) => LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT);
  const toY = (y) => HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
  const place = (c, i) => `${number(c.y.at(i), 3)} at ${tickText(c.x.at(i))}`;
  const words = panel.curves.map((c) =>
    `${visible(c.label)}: ${place(c, 0)}, ${place(c, -1)}`).join("; ");
  const picture = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": `${panel.title}. ${words}` });
  for (const y of ticks(low, high, 5)) {
    picture.append(
      draw("line", { class: "grid-line", x1: LEFT, x2: WIDTH - RIGHT, y1: toY(y), y2: toY(y) }),
      draw("text", { x: LEFT - 5, y: toY(y) + 4, "text-anchor": "end" }, tickText(y)));
  }
  for (const x of ticks(first, last, 6)) {
    if (panel.whole && !Number.isInteger(+x.toPrecision(9))) continue;
    picture.append(draw("text", { x: toX(x), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" },
      tickText(x)));
  }
  picture.append(
    draw("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, panel.x),
    draw("text", { x: 11, y: (HEIGHT - BOTTOM) / 2, "text-anchor": "middle",
      transform: `rotate(-90 11 ${(HEIGHT - BOTTOM) / 2})` }, panel.y),
    ...panel.curves.map((curve, i) => line(curve, i, toX, toY)));
  const legend = panel.curves.map((curve, i) => {
    const sample = draw("svg", { viewBox: "0 0 42 12", "aria-hidden": "true" },
      draw("line", { x1: 0, x2: 42, y1: 6, y2: 6, stroke: curve.colour, "stroke-width": 2,
        "stroke-dasharray": DASHES[curve.style] }));
    if (curve.marks) sample.append(mark(i, 21, 6, curve.colour));
    return make("li", {}, sample, visible(curve.label));
  });
  return make("figure", {}, make("figcaption", {}, panel.title), picture,
    make("ul", { class: "legend" }, ...legend));
}
