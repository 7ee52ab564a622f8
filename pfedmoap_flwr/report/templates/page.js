"use strict";
{
  const $ = (selector, under = document) => under.querySelector(selector);
  const all = (selector, under = document) => [...under.querySelectorAll(selector)];
  const data = JSON.parse($("#curves").textContent);
  const runs = data.runs || [];
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const there = (values) => values.filter((value) => value !== null && value !== undefined);
  const unique = (values) => [...new Set(values)];
  const percent = (value) => (100 * value).toFixed(1);

  // A column's click sorts its rows by their unrounded numbers, or by text where it has none
  for (const table of all("table")) {
    all("th", table).forEach((head, index) => {
      head.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") === "descending";
        all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => {
          const cell = row.cells[index];
          return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
        };
        const order = (a, b) => {
          const [x, y] = [key(a), key(b)];
          if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
          const less = typeof x === "number" ? x - y : x.localeCompare(y);
          return up ? less : -less;
        };
        const body = $("tbody", table);
        body.append(...[...body.rows].sort(order));
      });
    });
  }

  const form = $("#filter");
  if (form) {
    const methods = unique(runs.map((run) => run.method));
    const colour = Object.fromEntries(
      methods.map((name, i) => [name, `hsl(${Math.round((i * 360) / methods.length)} 65% 50%)`]),
    );
    const choices = (name, pairs) => {
      const select = form.elements[name];
      for (const [value, said] of pairs) select.add(new Option(said, value));
      select.parentElement.hidden = pairs.length < 2;
    };
    const numbers = (values) => unique(values).sort((a, b) => a - b);
    choices("measure", [["personal-accuracy", "personal accuracy"], ["global-accuracy", "global accuracy"]]);
    choices("dataset", unique(runs.map((run) => run.dataset)).map((name) => [name, name]));
    choices("seed", [["", "all"], ...numbers(runs.map((run) => run.seed)).map((n) => [n, n])]);
    const clients = numbers(runs.flatMap((run) => run.clients));
    choices("client", clients.length ? [["", "all"], ...clients.map((n) => [n, n])] : []);
    for (const name of methods) {
      const [label, box, dot] = ["label", "input", "i"].map((tag) => document.createElement(tag));
      Object.assign(box, { type: "checkbox", value: name, checked: true });
      dot.style.background = colour[name];
      label.append(box, dot, name);
      label.addEventListener("pointerenter", () => highlight(name));
      label.addEventListener("pointerleave", () => highlight(null));
      $("#methods").append(label);
    }
    form.addEventListener("change", draw);
    for (const button of all("[data-all]", form)) {
      button.addEventListener("click", () => {
        for (const box of all("#methods input")) box.checked = Boolean(button.dataset.all);
        draw();
      });
    }
    form.addEventListener("submit", (event) => event.preventDefault());
    draw();

    function draw() {
      const { measure, dataset, seed, client } = Object.fromEntries(
        ["measure", "dataset", "seed", "client"].map((name) => [name, form.elements[name].value]),
      );
      const wanted = new Set(all("#methods input:checked").map((box) => box.value));
      const chosen = runs.filter(
        (run) => run.dataset === dataset && wanted.has(run.method) && (!seed || run.seed === Number(seed)),
      );
      // Of a run's round: the chosen client, or all there are
      const row = (run, index) =>
        run[measure][index].filter((_, place) => !client || run.clients[place] === Number(client));
      drawRounds(chosen, row);
      drawClients(chosen, row);
      filterRows(wanted, { "data set": dataset, seed, client });
    }

    function drawRounds(chosen, row) {
      const lines = methods.map((method) => {
        const by = new Map();
        for (const run of chosen.filter((run) => run.method === method)) {
          run.rounds.forEach((round, index) => {
            const values = there(row(run, index));
            if (values.length) by.set(round, [...(by.get(round) || []), mean(values)]);
          });
        }
        const points = [...by].sort((a, b) => a[0] - b[0]).map(([round, values]) => [round, mean(values)]);
        return { method, points };
      }).filter((line) => line.points.length);
      const points = lines.flatMap((line) => line.points);
      const svg = $("#rounds");
      const [x, y] = axes(svg, 560, 340, range(points.map((p) => p[0])), range(points.map((p) => p[1])), 46);
      for (const { method, points: own } of lines) {
        const path = own.map(([round, value]) => `${x(round)},${y(value)}`).join(" ");
        add(svg, "polyline", { points: path, fill: "none", stroke: colour[method], "stroke-width": 2 }, method);
        for (const [round, value] of own) {
          const dot = add(svg, "circle", { cx: x(round), cy: y(value), r: 3, fill: colour[method] }, method);
          hint(dot, `${method}, round ${round}: ${percent(value)} %`);
        }
      }
    }

    function drawClients(chosen, row) {
      const dots = chosen.flatMap((run) => {
        const last = run.rounds.length - 1;
        const kept = (client) => !form.elements.client.value || client === Number(form.elements.client.value);
        const names = run.clients.filter(kept);
        return row(run, last).map((value, place) => ({ run, value, client: names[place] }));
      }).filter((dot) => dot.value !== null && dot.value !== undefined);
      const rows = methods.filter((method) => dots.some((dot) => dot.run.method === method));
      const svg = $("#strip");
      const height = 40 + 18 * Math.max(rows.length, 4);
      const [x] = axes(svg, 560, height, range(dots.map((dot) => dot.value)), null, 150);
      rows.forEach((method, index) => {
        const at = 16 + 18 * index;
        const name = method.length > 22 ? `${method.slice(0, 21)}…` : method;
        add(svg, "text", { x: 144, y: at + 4, "text-anchor": "end" }, method).textContent = name;
        const own = dots.filter((dot) => dot.run.method === method);
        const middle = x(mean(own.map((dot) => dot.value)));
        add(svg, "line", { x1: middle, x2: middle, y1: at - 7, y2: at + 7, stroke: colour[method], "stroke-width": 3 }, method);
        for (const { run, value, client } of own) {
          const dot = add(svg, "circle", { cx: x(value), cy: at, r: 4, fill: colour[method], "fill-opacity": 0.45 }, method);
          const who = client === undefined ? "" : `, client ${client}`;
          hint(dot, `${method}, seed ${run.seed}${who}: ${percent(value)} %`);
        }
      });
    }

    function filterRows(wanted, chosen) {
      for (const table of all("table")) {
        const keys = all("th", table).map((head) => head.dataset.key);
        for (const row of $("tbody", table).rows) {
          row.hidden = keys.some((key, index) => {
            const said = row.cells[index].textContent;
            if (key === "method") return methods.includes(said) && !wanted.has(said);
            return Boolean(chosen[key]) && said !== chosen[key] && key in chosen && table.id === "table-clients";
          });
        }
      }
    }

    function axes(svg, width, height, [left, right], vertical, margin) {
      svg.replaceChildren();
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      const x = (value) => margin + ((value - left) / (right - left)) * (width - margin - 12);
      const bottom = height - 24;
      const isRound = vertical !== null;
      for (const tick of ticks(left, right, isRound)) {
        add(svg, "line", { x1: x(tick), x2: x(tick), y1: 6, y2: bottom, class: "grid" });
        const said = isRound ? tick : (100 * tick).toFixed(0);
        add(svg, "text", { x: x(tick), y: height - 8, "text-anchor": "middle" }).textContent = said;
      }
      if (!isRound) return [x];
      const [low, high] = vertical;
      const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - 10);
      for (const tick of ticks(low, high, false)) {
        add(svg, "line", { x1: margin, x2: width - 12, y1: y(tick), y2: y(tick), class: "grid" });
        add(svg, "text", { x: margin - 6, y: y(tick) + 4, "text-anchor": "end" }).textContent = (100 * tick).toFixed(0);
      }
      return [x, y];
    }

    function range(values) {
      if (!values.length) return [0, 1];
      // Not Math.min(...values): of 100,000 clients it overflows the stack
      const [low, high] = [Math.min, Math.max].map((end) => values.reduce((a, b) => end(a, b)));
      return low === high ? [low - 0.05, high + 0.05] : [low, high];
    }

    function ticks(low, high, whole) {
      const rough = (high - low) / 6;
      const power = 10 ** Math.floor(Math.log10(rough));
      let step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
      if (whole) step = Math.max(1, Math.round(step));
      const found = [];
      for (let tick = Math.ceil(low / step) * step; tick <= high + 1e-9; tick += step) found.push(tick);
      return found;
    }

    function add(svg, tag, attributes, method) {
      const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
      if (method !== undefined) made.dataset.method = method;
      return svg.appendChild(made);
    }

    function hint(mark, said) {
      const box = $("#hint");
      mark.addEventListener("pointerenter", (event) => {
        box.textContent = said;
        box.hidden = false;
        box.style.left = `${Math.min(event.clientX + 12, innerWidth - box.offsetWidth - 8)}px`;
        box.style.top = `${event.clientY + 14}px`;
        highlight(mark.dataset.method);
      });
      mark.addEventListener("pointerleave", () => {
        box.hidden = true;
        highlight(null);
      });
    }

    function highlight(method) {
      for (const mark of all("#charts svg [data-method]")) {
        mark.classList.toggle("faint", method !== null && mark.dataset.method !== method);
      }
    }
  }
}
