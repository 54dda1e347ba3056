// Clicking a header sorts by that column, best first; clicking again reverses the order. Rows without a number (failed
// plans) stay last. A header is a button, so it also works with the keyboard.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.querySelectorAll("th[data-column]")];
  const value = (row, column) => {
    const cell = row.querySelector(`[data-of="${column}"]`);
    return cell && cell.dataset.value !== undefined ? cell.dataset.value : null;
  };
  const sort = (header) => {
    const { column, kind, begin } = header.dataset;
    const now = header.getAttribute("aria-sort");
    const order = now === null ? begin : now === "ascending" ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [value(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (kind === "text" ? a.localeCompare(b, "en", { numeric: true }) : Number(a) - Number(b));
    });
    body.append(...rows.map(([, row]) => row));
    for (const other of headers) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", order);
  };
  for (const header of headers) header.querySelector("button").addEventListener("click", () => sort(header));
}
// A table that is too wide shows a hint as long as there are more columns to the right.
for (const place of document.querySelectorAll(".scroll")) {
  const look = () => place.classList.toggle("cut", place.scrollLeft + place.clientWidth < place.scrollWidth - 1);
  place.addEventListener("scroll", look);
  addEventListener("resize", look);
  look();
}
