// Sorting and filtering of tables. A page without script shows all rows in the report's order.
"use strict";
for (const figure of document.querySelectorAll("figure.sortable")) {
  const body = figure.querySelector("tbody");
  const rows = Array.from(body.rows);
  const heads = Array.from(figure.querySelectorAll("thead th"));
  const value = (row, at) => {
    const cell = row.cells[at];
    return cell.dataset.v === undefined ? cell.textContent : cell.dataset.v === "" ? null : Number(cell.dataset.v);
  };
  const compare = (a, b) => {
    if (a === b) return 0;
    if (a === null || Number.isNaN(a)) return 1; // unknown: last in both directions
    if (b === null || Number.isNaN(b)) return -1;
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  };
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const known = (row) => { const v = value(row, at); return v !== null && !Number.isNaN(v); };
      const sorted = rows.slice().sort((a, b) => {
        if (known(a) !== known(b)) return known(a) ? -1 : 1;
        return (down ? -1 : 1) * compare(value(a, at), value(b, at));
      });
      body.append(...sorted);
    });
  });
  const bar = figure.querySelector(".filter");
  const input = bar.querySelector("input");
  const count = bar.querySelector("output");
  const say = (shown) => { count.textContent = `${shown} / ${rows.length} ${count.dataset.unit}`; };
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !wanted.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    say(shown);
  });
  bar.hidden = false;
  say(rows.length);
}
