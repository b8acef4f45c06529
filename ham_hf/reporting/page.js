"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const at = (id) => document.getElementById(id);
  const numbers = read("numbers");
  const images = read("images");
  const FIRST = 40; // rows drawn before "show all"
  const CELLS = 30; // classes of the matrix
  const state = { run: 0, entry: null, order: "worst", find: "", label: null, all: false, point: 0, cell: [0, 1] };
  let run, shown, clean;

  // Elements. Text is only ever set as text: names come from anywhere.
  const element = (tag, attributes, ...children) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key === "text") made.textContent = value;
      else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  };
  const svg = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key === "text") made.textContent = value;
      else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  };
  const percent = (share) => (share === null || share === undefined ? "–" : (100 * share).toFixed(1));
  const percents = (share) => `${percent(share)} %`;
  const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
  const nameOf = (label) => (label < 0 ? "not finite" : run.names[label]);
  const share = (entry, label) => {
    const [count, correct] = entry.classes[label];
    return count ? correct / count : null;
  };
  const wilson = (correct, count) => {
    if (!count) return [null, null];
    const z2 = 1.959963984540054 ** 2;
    const middle = (correct + z2 / 2) / (count + z2);
    const half = Math.sqrt(z2 * ((correct * (count - correct)) / count + z2 / 4)) / (count + z2);
    return [Math.max(0, middle - half), Math.min(1, middle + half)];
  };
  const x = (value) => `${(100 * value).toFixed(2)}%`;

  // Marks: a circle is clean, a diamond attacked.
  const circle = (value, y, kind, r = 4.5) => svg("circle", { cx: x(value), cy: y, r, class: kind });
  const diamond = (value, y, kind) => {
    const holder = svg("svg", { x: x(value), y, overflow: "visible" });
    holder.append(svg("path", { d: "M0 -5.5 L5.5 0 L0 5.5 L-5.5 0 Z", class: kind }));
    return holder;
  };
  const whisker = (low, high, y, kind) =>
    svg("line", { x1: x(low), x2: x(high), y1: y, y2: y, class: `${kind} whisker` });
  const scale = () =>
    [0, 0.25, 0.5, 0.75, 1].map((value) =>
      svg("line", { x1: x(value), x2: x(value), y1: 0, y2: "100%", class: "grid" }));

  const attacked = () => (shown.name === "clean" ? null : shown);

  function ordered() {
    const labels = run.names.map((_, label) => label);
    const known = (value) => (value === null ? Infinity : value);
    const keys = {
      worst: (label) => known(share(shown, label)),
      clean: (label) => known(clean ? share(clean, label) : null),
      loss: (label) => {
        const before = clean ? share(clean, label) : null;
        const after = share(shown, label);
        return before === null || after === null ? Infinity : after - before;
      },
      label: (label) => label,
    };
    if (state.order === "name") labels.sort((a, b) => run.names[a].localeCompare(run.names[b]) || a - b);
    else labels.sort((a, b) => {
      const [left, right] = [keys[state.order](a), keys[state.order](b)];
      return left === right ? a - b : left - right;
    });
    const wanted = state.find.trim().toLowerCase();
    return wanted ? labels.filter((label) => run.names[label].toLowerCase().includes(wanted)) : labels;
  }

  function classRow(label) {
    const entry = attacked();
    const plot = svg("svg", { "aria-hidden": "true" }, ...scale());
    const parts = [];
    for (const [found, y, kind] of [[clean, entry ? 7 : 12, "c-clean"], [entry, clean ? 17 : 12, "c-robust"]]) {
      if (!found) continue;
      const [count, correct, low, high] = found.classes[label];
      if (!count) continue;
      plot.append(whisker(low, high, y, kind));
      plot.append(kind === "c-clean" ? circle(correct / count, y, kind) : diamond(correct / count, y, kind));
      parts.push(`${found.title} ${percents(correct / count)}`);
    }
    const [count, , low, high] = shown.classes[label];
    const number = element("span", { class: "number" });
    if (count) {
      number.append(element("b", { text: percent(share(shown, label)) }), " ");
      number.append(element("small", { text: `${percent(low)}–${percent(high)}` }));
    } else number.append(element("small", { text: "no test image" }));
    const name = run.names[label];
    return element("li", {}, element("button", {
      type: "button", class: "row", "data-label": label, "aria-pressed": String(label === state.label), title: name,
      tabindex: "-1", "aria-label": `${name}: ${parts.join(", ") || "no test image"}`,
      onclick: () => choose(label, true),
    }, element("span", { class: "name", text: name }), plot, number));
  }

  function drawClasses() {
    const list = at("classes");
    const labels = ordered();
    const some = state.all ? labels : labels.slice(0, FIRST);
    list.replaceChildren(...some.map(classRow));
    const more = at("more");
    more.hidden = some.length === labels.length;
    more.textContent = `Show all ${labels.length.toLocaleString("en")} classes`;
    if (!labels.length) list.append(element("li", { class: "quiet", text: "No class has such a name." }));
    const entry = point();
    if (entry) entry.tabIndex = 0;
    at("settings").textContent =
      `${shown.title}: ${shown.settings || "settings unknown"}; ${shown.images.toLocaleString("en")} images` +
      (shown.subset ? ", a part of the test images" : "") + `, ${percents(shown.average[0])} on average`;
    const legend = at("legend");
    legend.replaceChildren();
    const mark = (made, text) =>
      legend.append(element("span", {}, svg("svg", { "aria-hidden": "true" }, made), text));
    if (clean) mark(circle(0.5, 8, "c-clean"), "Clean");
    if (attacked()) mark(diamond(0.5, 8, "c-robust"), shown.title);
    legend.append(element("span", { text: "0 to 100 %, lines are 95 % intervals" }));
  }
  // The one row that the Tab key reaches.
  const point = () => at("classes").querySelector('[aria-pressed="true"]') || at("classes").querySelector(".row");

  function choose(label, asked) {
    state.label = label;
    for (const row of at("classes").querySelectorAll(".row")) {
      row.setAttribute("aria-pressed", String(Number(row.dataset.label) === label));
      row.tabIndex = -1;
    }
    if (point()) point().tabIndex = 0;
    drawDetail();
    drawCurves();
    drawFrontier();
    if (asked && window.matchMedia("(max-width: 860px)").matches) at("detail").scrollIntoView({ block: "start" });
  }

  const link = (label) =>
    label < 0 ? element("span", { text: nameOf(label) })
      : element("button", { type: "button", text: nameOf(label), title: nameOf(label), onclick: () => choose(label, true) });

  function drawDetail() {
    const label = state.label;
    const body = at("detail-body");
    body.replaceChildren();
    at("detail-title").textContent = label === null ? "" : run.names[label];
    if (label === null) return;
    const rows = run.entries.map((entry) => {
      const [count, correct, low, high] = entry.classes[label];
      return element("tr", {}, element("th", { scope: "row", text: entry.title }),
        element("td", { text: `${correct} of ${count}` }),
        element("td", {}, element("b", { text: percent(count ? correct / count : null) }), " ",
          element("small", { text: count ? `${percent(low)}–${percent(high)}` : "" })));
    });
    const head = element("tr", {}, ...["Evaluation", "Right", "Percent"].map((text) => element("th", { scope: "col", text })));
    body.append(element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
    drawTaken(body, label);
    drawShots(body, label);
  }

  function drawTaken(body, label) {
    const known = confusing();
    body.append(element("h3", { text: `Taken for (${known.title})` }));
    const taken = known.taken ? known.taken[label] : null;
    if (!taken || !taken.length) {
      body.append(element("p", { class: "quiet", text: taken ? "Never taken for another class." : "Not kept by this run." }));
      return;
    }
    const list = element("ol", { class: "taken" });
    const count = known.classes[label][0];
    for (let i = 0; i < Math.min(taken.length, 20); i += 2) {
      const bar = svg("svg", { "aria-hidden": "true" },
        svg("rect", { width: x(taken[i + 1] / Math.max(taken[1], 1)), height: "100%", class: "c-robust" }));
      list.append(element("li", {}, link(taken[i]), bar,
        element("span", { class: "number", text: `${taken[i + 1]} of ${count}` })));
    }
    body.append(list);
  }

  function drawShots(body, label) {
    const found = images[state.run];
    if (!found) {
      body.append(element("p", { class: "quiet", text: "This page has no images." }));
      return;
    }
    const own = found.images.filter((image) => image.label === label);
    for (const [kind, title] of [["weak", "Most easily broken"], ["strong", "Hold best"]]) {
      const some = own.filter((image) => image.kind === kind);
      if (!some.length) continue;
      body.append(element("h3", { text: `${title} (${found.attack})` }));
      const holder = element("div", { class: "shots" });
      for (const image of some) {
        const titles = ["before", "after", `change\u00a0×\u00a0${image.times}`];
        const three = element("div", { class: "three" }, ...image.pictures.map((picture, i) => element("div", {},
          element("img", { src: `data:image/${picture.startsWith("/9j/") ? "jpeg" : "png"};base64,${picture}`, alt: `${run.names[label]}, image ${image.position}, ${titles[i]}` }),
          element("span", { text: titles[i] }))));
        const held = image.after === label ? "stays" : "becomes";
        holder.append(element("figure", {}, three, element("figcaption", {},
          `Image ${image.position}: ${cut(nameOf(image.before), 40)} ${held} ${cut(nameOf(image.after), 40)}`,
          element("small", { text: image.margin === null ? "" : ` · smallest margin ${image.margin}` }))));
      }
      body.append(holder);
    }
    if (!own.length) body.append(element("p", { class: "quiet", text: "No images of this class: there is room for those of the worst classes only." }));
  }

  // Where the verdict's is not kept, that of the first attack.
  const confusing = () => (shown.taken ? shown : run.entries.find((entry) => entry.taken && entry.name !== "clean") || shown);

  // Confusion: the classes that are confused most, those next to each other that are taken for one another.
  function confused() {
    const mass = new Map();
    const pairs = new Map();
    confusing().taken.forEach((taken, label) => {
      for (let i = 0; i < taken.length; i += 2) {
        const [other, count] = [taken[i], taken[i + 1]];
        if (other < 0) continue;
        mass.set(label, (mass.get(label) || 0) + count);
        mass.set(other, (mass.get(other) || 0) + count);
        pairs.set(`${label},${other}`, count);
      }
    });
    const left = new Set([...mass.keys()].sort((a, b) => mass.get(b) - mass.get(a) || a - b).slice(0, CELLS));
    const both = (a, b) => (pairs.get(`${a},${b}`) || 0) + (pairs.get(`${b},${a}`) || 0);
    const order = [];
    while (left.size) {
      const last = order[order.length - 1];
      let best = null;
      for (const label of left) {
        if (best === null || (last !== undefined && both(last, label) > both(last, best))) best = label;
      }
      order.push(best);
      left.delete(best);
    }
    return { order, pairs, total: mass.size };
  }

  let matrix = null;
  function drawMatrix() {
    at("cell").textContent = "";
    at("pairs").replaceChildren();
    matrix = null;
    const known = confusing();
    at("confusion-body").hidden = !known.taken;
    if (!known.taken) {
      at("matrix").replaceChildren();
      at("confusion-note").textContent = "Not kept by this run.";
      return;
    }
    const { order, pairs, total } = confused();
    const size = order.length;
    at("confusion-note").textContent = size
      ? `${known.title}. A row is a true class, a column what it is taken for; classes that are confused stand together. ` +
        (total > size ? `The ${size} of ${total} classes that are confused most. ` : "") + "Arrow keys move in the matrix, Enter opens the class."
      : "Nothing was taken for anything else.";
    at("matrix").replaceChildren();
    if (!size) return;
    const width = at("matrix").clientWidth || 600;
    const longest = Math.max(...order.map((label) => run.names[label].length));
    const text = Math.min(longest * 7 + 10, width < 480 ? 84 : 150);
    const cell = Math.max(12, Math.min(40, Math.floor((width - text - 4) / size)));
    const side = cell * size;
    const letters = Math.floor((text - 10) / 6.6);
    const large = Math.max(...order.map((a) => Math.max(...order.map((b) => (pairs.get(`${a},${b}`) || 0) / Math.max(1, known.classes[a][0])))), 1e-9);
    const drawing = svg("svg", {
      width: text + side + 4, height: text + side + 4, tabindex: 0, role: "application",
      "aria-roledescription": "matrix", "aria-labelledby": "confusion-title", "aria-describedby": "cell",
    });
    order.forEach((row, i) => {
      const y = text + i * cell;
      const label = svg("text", { x: text - 6, y: y + cell / 2 + 4, "text-anchor": "end" }, svg("title", { text: run.names[row] }));
      label.append(cut(run.names[row], letters));
      const column = svg("text", { transform: `translate(${text + i * cell + cell / 2 + (longest > 2 ? 4 : 0)} ${text - 6}) ${longest > 2 ? "rotate(-90)" : ""}`, "text-anchor": longest > 2 ? "start" : "middle" }, svg("title", { text: run.names[row] }));
      column.append(cut(run.names[row], letters));
      if (cell < 14) { label.style.fontSize = "10px"; column.style.fontSize = "10px"; }
      drawing.append(label, column);
      order.forEach((other, j) => {
        const count = pairs.get(`${row},${other}`) || 0;
        const part = count / Math.max(1, known.classes[row][0]) / large;
        const place = { x: text + j * cell, y, width: cell - 1, height: cell - 1 };
        drawing.append(svg("rect", { ...place, class: i === j ? "same" : "empty" }));
        if (i === j) return;
        const rect = svg("rect", { ...place, class: "c-robust hit", "fill-opacity": count ? 0.15 + 0.85 * part : 0, "stroke-opacity": 0,
          onclick: () => { state.cell = [i, j]; moveCell(); choose(row, true); } }, svg("title", { text: cellText(row, other, count) }));
        drawing.append(rect);
        if (cell >= 24 && count) {
          const number = svg("text", { x: place.x + cell / 2 - 0.5, y: y + cell / 2 + 4, "text-anchor": "middle", "pointer-events": "none", class: part > 0.5 ? "on" : "", text: count });
          drawing.append(number);
        }
      });
    });
    const cursor = svg("rect", { width: cell - 1, height: cell - 1, class: "cursor", "pointer-events": "none", visibility: "hidden" });
    drawing.append(cursor);
    matrix = { order, pairs, cursor, text, cell };
    state.cell = [0, Math.min(1, size - 1)];
    drawing.addEventListener("keydown", matrixKey);
    drawing.addEventListener("focus", moveCell);
    drawing.addEventListener("blur", () => cursor.setAttribute("visibility", "hidden"));
    at("matrix").append(drawing);
    const most = [...pairs].map(([key, count]) => [...key.split(",").map(Number), count]).sort((a, b) => b[2] - a[2] || a[0] - b[0]);
    at("pairs").replaceChildren(...most.slice(0, 10).map(([row, other, count]) => element("li", {},
      element("button", { type: "button", text: `${cut(run.names[row], 60)} → ${cut(run.names[other], 60)}`, onclick: () => choose(row, true) }),
      element("small", { text: ` ${count} of ${known.classes[row][0]}` }))));
  }
  const cellText = (row, other, count) =>
    row === other ? `${run.names[row]}: ${percents(share(confusing(), row))} right`
      : `${run.names[row]} taken for ${run.names[other]}: ${count} of ${confusing().classes[row][0]}`;
  function moveCell() {
    const [i, j] = state.cell;
    const { order, pairs, cursor, text, cell } = matrix;
    cursor.setAttribute("x", text + j * cell);
    cursor.setAttribute("y", text + i * cell);
    cursor.setAttribute("visibility", "visible");
    at("cell").textContent = cellText(order[i], order[j], pairs.get(`${order[i]},${order[j]}`) || 0);
  }
  function matrixKey(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) {
      state.cell = state.cell.map((place, i) => Math.max(0, Math.min(matrix.order.length - 1, place + step[i])));
      moveCell();
    } else if (event.key === "Enter") choose(matrix.order[state.cell[0]], true);
    else return;
    event.preventDefault();
  }

  // A plot of lines over a shared axis; values in [0, 1].
  function plot(title, places, lines, options = {}) {
    const holder = element("div", { class: "plot" });
    const width = Math.max(260, Math.min(options.width || 900, 1000));
    const [height, left, top, bottom] = [216, 40, 8, 40];
    const right = 10;
    const [first, last] = [Math.min(...places), Math.max(...places)];
    const px = (value) => left + ((width - left - right) * (value - first)) / (last - first || 1);
    const py = (value) => top + (height - top - bottom) * (1 - value);
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
    for (const value of [0, 0.25, 0.5, 0.75, 1]) {
      drawing.append(svg("line", { x1: left, x2: width - right, y1: py(value), y2: py(value), class: "grid" }),
        svg("text", { x: left - 6, y: py(value) + 4, "text-anchor": "end", class: "quiet", text: 100 * value }));
    }
    for (const value of ticks(places)) drawing.append(svg("text", { x: px(value), y: height - bottom + 18, "text-anchor": "middle", class: "quiet", text: value }));
    drawing.append(svg("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle", class: "quiet", text: options.axis || "" }));
    if (options.mark !== undefined && options.mark !== null && options.mark >= first && options.mark <= last) {
      drawing.append(svg("line", { x1: px(options.mark), x2: px(options.mark), y1: top, y2: height - bottom, class: "mark" }));
    }
    const legend = element("p", { class: "legend" });
    for (const line of lines) {
      const points = places.map((place, i) => [px(place), line.values[i]]).filter((pair) => pair[1] !== null && pair[1] !== undefined).map(([a, b]) => [a, py(b)]);
      if (!points.length) continue;
      if (line.band) {
        const edge = (side) => places.map((place, i) => `${px(place)},${py(line.band[i][side])}`);
        drawing.append(svg("polygon", { points: [...edge(0), ...edge(1).reverse()].join(" "), class: `${line.kind} band` }));
      }
      drawing.append(svg("polyline", { points: points.map((pair) => pair.join(",")).join(" "), class: line.kind === "many" ? "many" : `${line.kind} curve`, "stroke-dasharray": line.dash || "none", "fill-opacity": 0 }));
      if (points.length <= 30 && line.kind !== "many") for (const [a, b] of points) drawing.append(svg("circle", { cx: a, cy: b, r: 2.6, class: line.kind }));
      if (line.title) {
        const key = svg("svg", { "aria-hidden": "true" }, svg("line", { x1: 0, x2: 16, y1: 8, y2: 8, class: line.kind === "many" ? "many" : `${line.kind} curve`, "stroke-dasharray": line.dash || "none" }));
        legend.append(element("span", {}, key, line.title));
      }
    }
    holder.append(element("h3", { text: title }), drawing, legend);
    return holder;
  }
  function ticks(places) {
    const different = [...new Set(places)].sort((a, b) => a - b);
    if (different.length <= 8) return different;
    return [0, 1, 2, 3, 4, 5].map((i) => different[Math.round((i * (different.length - 1)) / 5)]);
  }

  function drawCurves() {
    const curves = run.curves;
    at("curves").hidden = !curves;
    if (!curves) return;
    const width = at("curves").clientWidth || 900;
    const options = { axis: "step", mark: curves.selected, width };
    const note = curves.selected === null ? "" : ` Dashed vertical line: the selected weights (step ${curves.selected}).`;
    const body = [plot("Held-out accuracy, percent", curves.steps, [
      { title: "clean", kind: "c-clean", values: curves.clean },
      { title: "robust", kind: "c-robust", values: curves.robust, dash: "7 3" },
      { title: "robust, worst class", kind: "c-third", values: curves.worst, dash: "2 3" },
    ], options)];
    if (curves.hard) {
      const of = (label) => curves.hard.map((line) => (line ? line[label] : null));
      const many = run.names.length > 100 ? [] : run.names.map((_, label) => ({ kind: "many", values: of(label), title: label ? "" : "every class" }));
      const own = state.label === null ? [] : [{ title: cut(run.names[state.label], 60), kind: "c-robust", values: of(state.label) }];
      body.push(plot("Hard examples among those that were mined, percent, by class", curves.steps, [...many, ...own], options));
    }
    at("curves-body").replaceChildren(...body, element("p", { class: "quiet", text: `The class that is open above is drawn strong.${note}` }));
  }

  function drawFrontier() {
    const frontier = run.frontier;
    at("frontier").hidden = !frontier;
    if (!frontier) return;
    const slider = at("fairness");
    slider.max = frontier.points.length - 1;
    slider.value = state.point;
    const now = frontier.points[state.point];
    const before = frontier.points[0];
    const is = now.fairness === frontier.chosen ? " (this model)" : "";
    const words = `${now.fairness}${is}: average ${percents(now.average[0])}, worst 30 % ${percents(now.worst30[0])}, worst class ${percents(now.worst[0])}`;
    at("fairness-text").textContent = words;
    slider.setAttribute("aria-valuetext", words);
    at("frontier-note").textContent =
      `One number per class is added to the logits; counted on images that they were not found on (${frontier.images}).` +
      " A ring is the class without shifts, a diamond with those of this fairness." +
      (frontier.seen ? " The model was trained on these images, so this is too good." : "");
    const places = frontier.points.map((found) => found.fairness);
    const line = (key, title, kind, dash) => ({ title, kind, dash, values: frontier.points.map((found) => found[key][0]), band: frontier.points.map((found) => found[key].slice(1)) });
    at("frontier-plot").replaceChildren(plot("Accuracy by fairness, percent", places, [
      line("average", "average", "c-clean"), line("worst30", "worst 30 %", "c-robust", "7 3"), line("worst", "worst class", "c-third", "2 3"),
    ], { axis: "fairness", mark: now.fairness, width: at("frontier-plot").clientWidth || 520 }));
    const of = (found, label) => (frontier.counts[label] ? found.correct[label] / frontier.counts[label] : null);
    const labels = frontier.counts.map((_, label) => label).filter((label) => frontier.counts[label]);
    labels.sort((a, b) => of(before, a) - of(before, b) || a - b);
    const some = labels.slice(0, FIRST);
    if (state.label !== null && frontier.counts[state.label] && !some.includes(state.label)) some.unshift(state.label);
    at("frontier-classes").replaceChildren(...some.map((label) => {
      const value = of(now, label);
      const drawing = svg("svg", { "aria-hidden": "true" }, ...scale(),
        whisker(...wilson(now.correct[label], frontier.counts[label]), 12, "c-robust"), circle(of(before, label), 12, "c-before"), diamond(value, 12, "c-robust"));
      const change = value - of(before, label);
      return element("li", { class: "row", "aria-pressed": String(label === state.label) }, element("span", { class: "name", text: run.names[label], title: run.names[label] }), drawing,
        element("span", { class: "number" }, element("b", { text: percent(value) }), " ", element("small", { text: `${change < 0 ? "−" : "+"}${percent(Math.abs(change))}` })));
    }));
  }

  function drawComparison() {
    const found = numbers.comparison;
    at("comparison").hidden = !found;
    if (!found) return;
    const rows = found.rows[at("comparison-entry").value] || [];
    at("comparison-note").textContent =
      `Each dot is a run (a seed), the bar their mean. Differences: row minus ${found.baseline} on the same images, in points, with 95 % intervals of the images (not of other seeds).`;
    const body = [];
    for (const [metric, title] of [["average", "Average"], ["worst_30_percent", "Worst 30 %"], ["worst_class", "Worst class"]]) {
      body.push(element("h3", { text: title }));
      for (const row of rows) {
        const values = row.values[metric];
        const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
        const drawing = svg("svg", { role: "img", "aria-label": values.map(percents).join(", ") }, ...scale(),
          svg("line", { x1: x(mean), x2: x(mean), y1: 3, y2: 21, class: "c-robust whisker" }),
          ...values.map((value, i) => { const dot = circle(value, 12, "c-clean"); dot.append(svg("title", { text: `seed ${row.seeds[i]}: ${percents(value)}` })); return dot; }));
        const difference = row.differences[metric];
        const sign = (value) => `${value < 0 ? "−" : "+"}${percent(Math.abs(value))}`;
        const words = difference ? `${sign(difference[0])} (${sign(difference[1])} to ${sign(difference[2])}) ${row.note}` : row.note || (row.label === found.baseline ? "the baseline" : "");
        body.push(element("div", { class: "compare" }, element("span", { text: row.label }), drawing,
          element("span", {}, element("b", { text: percents(mean) }), " ", element("small", { text: words }))));
      }
    }
    at("comparison-body").replaceChildren(...body);
  }

  function draw() {
    drawClasses();
    drawDetail();
    drawMatrix();
    drawCurves();
    drawFrontier();
  }

  function openRun(index) {
    state.run = index;
    run = numbers.runs[index];
    clean = run.entries.find((entry) => entry.name === "clean") || null;
    const names = run.entries.map((entry) => entry.name);
    if (!names.includes(state.entry)) state.entry = names.find((name) => name !== "clean") || names[0];
    const select = at("entry");
    select.replaceChildren(...run.entries.map((entry) => element("option", { value: entry.name, text: entry.title })));
    select.value = state.entry;
    state.point = run.frontier ? Math.max(0, run.frontier.points.findIndex((found) => found.fairness === run.frontier.chosen)) : 0;
    openEntry(state.entry);
    state.label = null;
    const first = ordered()[0];
    state.label = first === undefined ? null : first;
    draw();
  }
  function openEntry(name) {
    state.entry = name;
    shown = run.entries.find((entry) => entry.name === name);
  }

  at("run").replaceChildren(...numbers.runs.map((entry, i) => element("option", { value: i, text: entry.label })));
  at("run-choice").hidden = numbers.runs.length < 2;
  at("run").addEventListener("change", (event) => openRun(Number(event.target.value)));
  at("entry").addEventListener("change", (event) => { openEntry(event.target.value); draw(); });
  at("order").addEventListener("change", (event) => { state.order = event.target.value; drawClasses(); });
  at("find").addEventListener("input", (event) => { state.find = event.target.value; drawClasses(); });
  at("choices").addEventListener("submit", (event) => event.preventDefault());
  at("more").addEventListener("click", () => {
    const next = at("classes").querySelectorAll(".row").length;
    state.all = true;
    drawClasses();
    const row = at("classes").querySelectorAll(".row")[next];
    if (row) row.focus();
  });
  at("fairness").addEventListener("input", (event) => { state.point = Number(event.target.value); drawFrontier(); });
  at("classes").addEventListener("keydown", (event) => {
    const rows = [...at("classes").querySelectorAll(".row")];
    const here = rows.indexOf(document.activeElement);
    const there = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: rows.length - 1 }[event.key];
    if (there === undefined || !rows[there]) return;
    event.preventDefault();
    rows[there].focus();
  });
  if (numbers.comparison) {
    at("comparison-entry").replaceChildren(...Object.keys(numbers.comparison.rows).map((title) => element("option", { value: title, text: title })));
    at("comparison-entry").addEventListener("change", drawComparison);
  }
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width || !run) return;
    width = window.innerWidth;
    drawMatrix();
    drawCurves();
    drawFrontier();
  });
  // After the first paint, which shows the head of the page.
  requestAnimationFrame(() => setTimeout(() => {
    openRun(0);
    if (numbers.comparison) drawComparison();
    document.documentElement.dataset.ready = "yes";
  }, 0));
})();
