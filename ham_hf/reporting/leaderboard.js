"use strict";
(() => {
  const all = (selector, from) => [...(from || document).querySelectorAll(selector)];
  const [attack, order, up] = ["attack", "order", "up"].map((id) => document.getElementById(id));
  const attacks = [...attack.options].map((option) => option.value);
  const orders = [...order.options].map((option) => option.value);
  const cheap = ["price", "seconds", "name"]; // lowest first when asked for
  const state = { attack: attacks[0], sort: "worst_class", up: false, row: null };
  const labels = new Set(all("article").map((found) => found.dataset.label));
  const articles = document.getElementById("details");
  let detail = null;

  // What is shown is in the address, so that a link shows the same.
  function read() {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (attacks.includes(asked.get("attack"))) state.attack = asked.get("attack");
    if (orders.includes(asked.get("sort"))) state.sort = asked.get("sort");
    if (asked.has("sort")) state.up = asked.get("order") === "up";
    state.row = labels.has(asked.get("row")) ? asked.get("row") : null;
  }
  function write() {
    const said = new URLSearchParams({ attack: state.attack, sort: state.sort, order: state.up ? "up" : "down" });
    if (state.row !== null) said.set("row", state.row);
    const hash = `#${said}`;
    if (location.hash !== hash) history.replaceState(null, "", hash);
  }

  // Rows without a number come last either way.
  function compare(a, b) {
    if (state.sort === "name") return a.dataset.name.localeCompare(b.dataset.name) * (state.up ? 1 : -1);
    const [left, right] = [a, b].map((row) => row.getAttribute(`data-${state.sort}`));
    if (left === right) return a.dataset.name.localeCompare(b.dataset.name);
    if (left === "" || right === "") return left === "" ? 1 : -1;
    return (Number(left) - Number(right)) * (state.up ? 1 : -1);
  }

  function draw() {
    attack.value = state.attack;
    order.value = state.sort;
    up.checked = state.up;
    if (detail) detail.remove();
    detail = null;
    for (const article of all("article")) articles.append(article);
    for (const section of all(".attack")) {
      section.hidden = section.dataset.attack !== state.attack;
      if (section.hidden) continue;
      for (const board of all(".board", section)) {
        for (const head of all("th[data-sort]", board)) {
          if (head.dataset.sort === state.sort) head.setAttribute("aria-sort", state.up ? "ascending" : "descending");
          else head.removeAttribute("aria-sort");
        }
        board.tBodies[0].append(...all(".entry", board).sort(compare));
      }
      const buttons = all(".model", section);
      for (const button of buttons) {
        const row = button.closest(".entry");
        const chosen = row.dataset.label === state.row;
        row.toggleAttribute("data-chosen", chosen);
        button.setAttribute("aria-expanded", String(chosen));
        button.tabIndex = -1;
        if (chosen && !detail) open(row);
      }
      // Of the rows, the Tab key reaches one; arrow keys move.
      const first = all("[data-chosen] .model", section)[0] || buttons[0];
      if (first) first.tabIndex = 0;
    }
    write();
  }
  function open(row) {
    const cell = document.createElement("td");
    cell.colSpan = row.children.length;
    cell.append(all("article").find((article) => article.dataset.label === row.dataset.label));
    detail = document.createElement("tr");
    detail.className = "detail";
    detail.append(cell);
    row.after(detail);
  }
  function sortBy(key) {
    state.up = state.sort === key ? !state.up : cheap.includes(key);
    state.sort = key;
  }

  attack.addEventListener("change", () => { state.attack = attack.value; draw(); });
  order.addEventListener("change", () => { state.sort = order.value; state.up = cheap.includes(order.value); draw(); });
  up.addEventListener("change", () => { state.up = up.checked; draw(); });
  document.getElementById("choices").addEventListener("submit", (event) => event.preventDefault());
  for (const button of all(".sort")) button.addEventListener("click", () => {
    sortBy(button.dataset.sort);
    draw();
  });
  for (const button of all(".model")) button.addEventListener("click", () => {
    const label = button.closest(".entry").dataset.label;
    state.row = state.row === label ? null : label;
    draw();
    button.focus(); // drawing moves rows, which takes the focus away from them
  });
  document.addEventListener("keydown", (event) => {
    if (!event.target.matches(".model")) return;
    const buttons = all(".attack:not([hidden]) .model");
    const here = buttons.indexOf(event.target);
    const there = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (there === undefined || !buttons[there]) return;
    event.preventDefault();
    buttons[there].focus();
  });
  window.addEventListener("hashchange", () => {
    if (!location.hash.includes("=")) return; // the link that skips to the ranking
    read();
    draw();
  });
  articles.hidden = true;
  read();
  draw();
  document.documentElement.dataset.ready = "yes";
})();
