// The sections of the page, one function each; curves.js stands before this.

// ---- the result --------------------------------------------------------------------------------

function showResults() {
  if (!data.results.length) return;
  section("result", "The result", ...data.results.map((result) =>
    table(visible(result.name), ["figure", ...result.policies, "what it means"],
      result.rows.map((row) => [row.name, ...row.cells, row.meaning]), null, new Set([1, 2, 3]),
      "result")));
}

function showCurves() {
  if (!data.panels.length) return;
  section("curves", "The curves", make("div", { class: "grid" }, ...data.panels.map(chart)));
}

// ---- answers side by side ----------------------------------------------------------------------

function figures(values) {
  return ["gold", "score"].filter((name) => values[name] !== null)
    .map((name) => `${name} ${number(values[name])}`).join(", ");
}

function showAnswers() {
  if (!data.answers.length && !data.notes.length) return;
  const part = section("answers", "Answers side by side", make("p", {},
    "One answer of each policy to the same prompts, all sampled with the same random numbers. "
    + "gold is what the judge of the text world says, which nothing optimises; score is what the "
    + "reward model says."));
  for (const note of data.notes) part.append(make("p", { class: "faint" }, visible(note)));
  for (const asked of data.answers) {
    const answers = asked.answers.map((answer) => make("div", {},
      make("strong", {}, visible(answer.policy)),
      make("span", { class: "faint" }, " " + figures(answer)),
      make("div", { class: "text" },
        paragraph(answer.text) + (answer.ended ? "" : " [cut off]"))));
    part.append(make("h3", { class: "text" }, paragraph(question(asked.prompt))),
      make("div", { class: "side" }, ...answers));
  }
}

// ---- responses token by token ------------------------------------------------------------------

const MEASURES = {
  kl_ref: ["kl_ref", "log-probability under the policy minus that under the reference, in nats: "
    + "above 0 the policy likes the token better than the reference does"],
  rewards: ["reward", "minus kl_coef times kl_ref; the last token gets the score on top"],
  old_values: ["value", "what the critic expected from here on, before the update"],
  advantages: ["advantage", "how much better than expected it went from here on, whitened: above "
    + "0 the update makes the token likelier"],
  ratio: ["ratio", "probability after the update divided by that before it; shown as its distance "
    + "from 1"],
};
const COLUMNS = ["old_logprobs", "ref_logprobs", "kl_ref", "rewards", "old_values", "advantages",
  "returns", "ratio", "entropy"];
const state = { measure: "kl_ref", series: 0, stop: 0 };

// What colours a token; null where the response has no such figure.
function valueOf(record, measure, i) {
  if (!record[measure]) return null;
  return measure === "ratio" ? record.ratio[i] - 1 : record[measure][i];
}

// All numbers of one token in one line.
function describe(record, i) {
  const words = COLUMNS.filter((name) => record[name])
    .map((name) => `${name} ${number(record[name][i], 3)}`);
  return `${word(record.tokens[i])}  —  ${words.join(", ")}`;
}

function likeliest(title, choices, chosen) {
  const rows = choices.map(([token, probability]) => {
    const bar = make("span", { class: "bar", "aria-hidden": "true" });
    bar.style.width = `${Math.round(60 * probability)}px`;
    return [word(token) + (token === chosen ? " ◀ chosen" : ""), number(probability, 3), bar];
  });
  return make("div", {}, table(title, ["token", "probability", ""], rows, null, new Set([1])));
}

// The table of a response. Its sums are those that the run kept, of all tokens.
function numbers(record) {
  const columns = COLUMNS.filter((name) => record[name]);
  const rows = record.tokens.map((token, i) =>
    [make("span", { class: "text" }, word(token)),
      ...columns.map((name) => number(record[name][i], 3))]);
  const rest = record.length - record.tokens.length;
  if (rest > 0) {
    rows.push([`${rest} more tokens`, ...columns.map((name) => name in record.sums
      ? number(record.sums[name] - record[name].reduce((a, b) => a + b, 0), 3) : "")]);
  }
  const sums = ["sum", ...columns.map((name) =>
    name in record.sums ? number(record.sums[name], 3) : "")];
  const [score, kl_coef, kl_ref, rewards] = [record.score, record.kl_coef, record.sums.kl_ref,
    record.sums.rewards].map((value) => number(value, 3));
  const law = "Sum of the rewards: score − kl_coef × kl_ref = "
    + `${score} − ${kl_coef} × ${kl_ref} = ${rewards}`;
  return make("div", {}, make("p", { class: "law" }, law),
    table("", ["token", ...columns], rows, sums, new Set(columns.map((_, i) => i + 1))));
}

// Arrow keys, Home and End move along the tokens; Tab goes past them.
function moveWithArrows(list) {
  list.addEventListener("keydown", (event) => {
    const buttons = [...list.querySelectorAll("button")], last = buttons.length - 1;
    const at = buttons.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
    if (at < 0 || to === undefined || !buttons[to]) return;
    event.preventDefault();
    buttons.forEach((button, i) => button.setAttribute("tabindex", i === to ? "0" : "-1"));
    buttons[to].focus();
  });
}

// One run's response, with all that can be looked at in it. `most` is the value of the full colour.
function showResponse(name, record, most) {
  const readout = make("p", { class: "readout", "aria-live": "polite" },
    "Point at a token for its numbers; click or press Enter for what else could have stood there.");
  const others = make("div", { class: "side others" });
  const details = numbers(record);
  const list = make("ol", { class: "tokens", "aria-label": "the response, token by token" });
  record.tokens.forEach((token, i) => {
    const value = valueOf(record, state.measure, i);
    const sign = !value || Math.abs(value) < 0.005 ? " zero" : value < 0 ? " below" : "";
    const button = make("button",
      { type: "button", class: "token" + sign, tabindex: i ? "-1" : "0", "aria-pressed": "false" },
      make("span", { class: "text" }, word(token)),
      make("span", { class: "value" }, value === null ? "–" : signed(value)));
    button.style.setProperty("--strength", value === null || !most ? 0 : Math.abs(value) / most);
    const look = () => { readout.textContent = describe(record, i); };
    button.addEventListener("pointerenter", look);
    button.addEventListener("focus", look);
    button.addEventListener("click", () => {
      for (const one of list.querySelectorAll("button")) {
        one.setAttribute("aria-pressed", one === button);
      }
      details.querySelectorAll("tbody tr").forEach((row, j) =>
        row.classList.toggle("picked", i === j));
      others.replaceChildren(
        likeliest("likeliest under the policy after the update", record.policy[i], token),
        likeliest("likeliest under the reference", record.ref_policy[i], token));
    });
    list.append(make("li", {}, button));
  });
  moveWithArrows(list);
  return make("div", { class: "response" }, make("strong", {}, visible(name)),
    make("span", { class: "faint" }, (record.asked_again ? " after the update of iteration "
      : " from the rollout of iteration ") + `${record.iteration}: ${figures(record)}, kl_ref `
      + number(record.sums.kl_ref) + (record.ended ? "" : ", cut off")),
    make("div", { class: "text" }, paragraph(record.prompt)), list, readout, others, details);
}

// The last record up to an iteration.
function upTo(records, iteration) {
  return records.filter((record) => record.iteration <= iteration).pop();
}

function stopsOf(series) {
  return [...new Set(series.runs.flat().map((record) => record.iteration))].sort((a, b) => a - b);
}

// Every answer of a series in one list: what the slider shows one by one.
function showAll(series) {
  const rows = series.runs.flatMap((records, i) => records.map((record) => [
    String(record.iteration), visible(data.runs[i]), make("span", { class: "text" },
      paragraph(record.tokens.join("")) + (record.length > record.tokens.length ? " …" : "")),
    number(record.gold), number(record.score), number(record.sums.kl_ref)]));
  return make("details", {}, make("summary", {}, "All of them in a list"),
    table("", ["iteration", "run", "response", "gold", "score", "kl_ref"], rows, null,
      new Set([0, 3, 4, 5])));
}

function renderTokens(place) {
  const series = data.series[state.series], stops = stopsOf(series);
  const records = series.runs.map((kept) => upTo(kept, stops[state.stop]));
  const values = series.runs.flat().flatMap((record) =>
    record.tokens.map((_, i) => Math.abs(valueOf(record, state.measure, i))));
  const most = values.reduce((a, b) => Math.max(a, b), 0);
  const missing = records.every((record) => record && !record[state.measure])
    ? make("p", { class: "faint" }, "These answers are asked again and again and not trained on, "
      + "so they have no ratio; choose the first response of the rollout.") : null;
  place.replaceChildren(...[missing].filter((part) => part), make("div", { class: "side" },
    ...records.map((record, i) => record ? showResponse(data.runs[i], record, most) : null)
      .filter((part) => part)), showAll(series));
}

function showTokens() {
  if (!data.series.length) return;
  const place = make("div", { id: "tokens-place" }), meaning = make("p", { class: "faint" });
  const slider = make("input", { type: "range", min: "0", step: "1", id: "stop" });
  const shown = make("output", { for: "stop", id: "stop-text" });
  const update = () => {
    const stops = stopsOf(data.series[state.series]);
    state.stop = Math.min(state.stop, stops.length - 1);
    slider.max = stops.length - 1;
    slider.value = state.stop;
    const words = `${stops[state.stop]} (${state.stop + 1} of ${stops.length})`;
    slider.setAttribute("aria-valuetext", words);
    shown.textContent = words;
    meaning.textContent = MEASURES[state.measure].join(": ") + ".";
    renderTokens(place);
  };
  slider.addEventListener("input", () => { state.stop = +slider.value; update(); });
  const choice = make("select", { id: "series" }, ...data.series.map((series, i) =>
    make("option", { value: i }, visible(question(series.name)))));
  choice.addEventListener("change", () => { state.series = +choice.value; update(); });
  const radios = Object.entries(MEASURES).map(([name, [label]]) => {
    const radio = make("input", { type: "radio", name: "measure", value: name });
    radio.checked = name === state.measure;
    radio.addEventListener("change", () => { state.measure = name; update(); });
    return make("label", {}, radio, " " + label);
  });
  state.stop = stopsOf(data.series[0]).length - 1;
  section("tokens", "Responses, token by token",
    make("p", {}, "The slider goes through the training. The same prompt is answered again and "
      + "again with the same random numbers, so what changes is the policy alone. Solid line: "
      + "above 0; hatched with a dashed line: below."),
    make("p", {}, make("label", { for: "series" }, "Prompt: "), choice),
    make("p", {}, make("label", { for: "stop" }, "Iteration: "), shown, slider),
    make("fieldset", {}, make("legend", {}, "Colour by"), ...radios), meaning, place);
  update();
}

// ---- what the runs printed ---------------------------------------------------------------------

function showSamples() {
  if (!data.samples.length) return;
  section("samples", "What the runs wrote down", ...data.samples.flatMap((sample) => [
    make("h3", {}, visible(sample.name)), make("pre", { tabindex: "0" }, paragraph(sample.text))]));
}

showResults();
showCurves();
showAnswers();
showTokens();
showSamples();
